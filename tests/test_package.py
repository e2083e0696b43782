"""Packaging: what a build finds, libraries that are missing or cannot be loaded, and info."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import deform_attn
from deform_attn import info
from deform_attn.backends import BACKENDS, compiled

PACKAGE = Path(deform_attn.__file__).parent
ROOT = Path(__file__).resolve().parent.parent
needs_source = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="the tests run outside a source tree"
)


def run(*command: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("DEFORM_ATTN_")}
    return subprocess.run(
        command, cwd=cwd, env=inherited | environ, capture_output=True, text=True, check=False
    )


# --- what was built


def test_built_libraries_are_loaded() -> None:
    """A library that a build reports as made must serve its device."""
    file = PACKAGE / "_libraries.json"
    assert file.exists(), "nothing was built yet: python setup.py build_ext --inplace"
    for device, built in json.loads(file.read_text())["libraries"].items():
        if device == "cuda" and torch.version.cuda is None:
            continue
        reason = compiled.why_not(device, torch.float32)
        assert (reason is None) == ("file" in built), f"{device}: {built}; not loaded: {reason}"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_library_is_of_this_version(device: str) -> None:
    """Stale libraries of an editable install are noticed."""
    facts = compiled.build_facts(device)
    assert facts is None or facts["version"] == deform_attn.__version__


def test_libraries_hold_no_path_of_their_builder() -> None:
    for library in PACKAGE.glob("*.so"):
        strings = [s.decode() for s in re.findall(rb"/[\w.+/-]{5,}", library.read_bytes())]
        private = ("/home/", "/root/", "/tmp/", f"{ROOT}/", f"{sys.prefix}/")
        assert not [s for s in strings if s.startswith(private)]


CUDA_LIBRARY = PACKAGE / "_C_cuda.abi3.so"
REGISTERED = """
import ctypes, sys, torch, deform_attn
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[2])
for name in ("", "_backward", "_fused", "_fused_backward", "_by", "_by_backward"):
    name = "ms_deform_attn" + name
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"deform_attn::{name}", "CUDA"), name
print(torch.ops.deform_attn.cuda_build())
"""


@pytest.mark.skipif(not CUDA_LIBRARY.exists(), reason="no CUDA library (FORCE_CUDA=1 builds it)")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch loads it by itself")
def test_cuda_library_links_and_registers(tmp_path: Path) -> None:
    """A torch without CUDA lacks one function that it needs; a stand-in provides it."""
    stub = tmp_path / "stub.cpp"
    stub.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }')
    library = stub.with_suffix(".so")
    compiler = os.environ.get("CXX", "c++")
    assert run(compiler, "-shared", "-fPIC", str(stub), "-o", str(library)).returncode == 0
    done = run(sys.executable, "-c", REGISTERED, str(library), str(CUDA_LIBRARY), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["version"] == deform_attn.__version__
    assert facts["architectures"]


# --- libraries that cannot be loaded


@pytest.mark.parametrize(
    ("record", "version", "reason"),
    [
        (
            None,
            "2.13.0",
            "nothing was compiled in this clone .python setup.py build_ext --inplace does; an inst",
        ),
        ({"cpu": None}, "2.13.0", "_libraries.json is of an older deform_attn: compile again"),
        ({"file": "_C.so"}, "2.13.0", "_C.so was built, but is no longer in .*: install deform_"),
        (
            {"file": "text.so"},
            "2.9.1+cu130",
            "text.so needs PyTorch 2.10 .*2.9.1.cu130: pip install",
        ),
        ({"file": "text.so"}, "2.13.0", "text.so could not be loaded: .*(short|invalid)"),
        ({"missing": "no compiler"}, "2.13.0", "the cpu library was not built: no compiler"),
    ],
)
def test_library_that_cannot_be_loaded(
    record: dict | None,
    version: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each gets a sentence with the next step."""
    file = tmp_path / "_libraries.json"
    if record is not None:
        if "cpu" not in record:
            record = {"lowest_torch": [2, 10], "libraries": {"cpu": record}}
        file.write_text(json.dumps(record))
    (tmp_path / "text.so").write_text("no library")
    monkeypatch.setattr(compiled, "_FOLDER", tmp_path)
    monkeypatch.setattr(compiled, "_RECORD", file)
    monkeypatch.setattr(torch, "__version__", version)
    assert re.match(reason, compiled._load("cpu"))


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (
            12080,
            "_C_cuda.abi3.so .* CUDA 13.0.88 and needs .* 13.0 or newer, .* of CUDA 12.8: update",
        ),
        (13000, None),
        (13020, None),
        (None, None),
    ],
)
def test_driver_that_is_too_old(
    driver: int | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot run the CUDA runtime of the library, even where torch has an older one."""
    build = lambda: json.dumps({"nvcc": "13.0.88"})  # noqa: E731
    monkeypatch.setattr(torch.ops.deform_attn, "cuda_build", build, raising=False)
    monkeypatch.setattr(compiled, "_driver_version", lambda: driver)
    found = compiled._why_not_driver("_C_cuda.abi3.so")
    assert found is None if reason is None else re.match(reason, found or "")


# --- commands


@pytest.mark.parametrize("module", ["info", "check", "detr"])
def test_ctrl_c_during_the_imports_has_no_traceback(module: str, tmp_path: Path) -> None:
    """A torch that is interrupted while it is imported."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{PACKAGE.parent}"}
    command = [sys.executable, "-m", f"deform_attn.{module}"]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a background
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["-m", "other", "deform_attn.info"], False),
        (["-mother", "-m", "deform_attn.info"], False),
        (["-Bmdeform_attn.info", "other"], True),
    ],
)
def test_only_commands_of_the_package_change_what_ctrl_c_does(
    words: list[str], changed: bool, tmp_path: Path
) -> None:
    """Another program may import the package, and have its name among the arguments."""
    (tmp_path / "torch.py").write_text(
        "import signal, sys\nsys.exit(int(signal.getsignal(2) is signal.SIG_DFL))\n"
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import deform_attn")
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{PACKAGE.parent}"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == changed


def test_a_closed_pipe_ends_a_command_quietly() -> None:
    """As in `python -m deform_attn.info | head -0`: one that prints more than a pipe holds."""
    code = (
        "import sys; from deform_attn.console import command\n"
        "with command():\n"
        "    sys.stdin.read()\n"
        "    for _ in range(SIZE): print('x')\n"
        "    if SIZE < 2: sys.exit(3)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    for size, status in ((10**6, 141), (1, 3)):
        start = [sys.executable, "-c", code.replace("SIZE", str(size))]
        with subprocess.Popen(start, env=environment, text=True, **pipes) as process:
            for end in (process.stdout, process.stdin):
                end.close()
            assert (process.stderr.read(), process.wait()) == ("", status)


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    ("words", "buffered"),
    [
        (["info"], False),
        (["info"], True),
        (["check", "--help"], True),  # argparse ignores the errors of what is not buffered
        (["detr", "--help"], False),
        (["detr", "--help"], True),
    ],
)
def test_a_full_disk_is_an_error_of_one_line(words: list[str], buffered: bool) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", f"deform_attn.{words[0]}", *words[1:]],
            env=environment,
            cwd=PACKAGE.parent,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert re.fullmatch(".*No space left on device\n", done.stderr)


def test_a_full_disk_hides_no_other_error() -> None:
    """An error of a file is none of the output; a fault of the package keeps its traceback."""
    code = (
        "import os, sys; from deform_attn.console import command\n"
        "with command():\n"
        "    print('x')\n"
        "    BODY"
    )
    for body, status, last in (
        ("sys.exit(3)", 1, "output: cannot be written: No space left on device"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("open('none')", 1, "FileNotFoundError: [Errno 2] No such file or directory: 'none'"),
    ):
        with FULL.open("w") as full:
            done = subprocess.run(
                [sys.executable, "-c", code.replace("BODY", body)],
                env=os.environ | {"PYTHONUNBUFFERED": ""},
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert (done.returncode, done.stderr.splitlines()[-1]) == (status, last)


@pytest.mark.parametrize("module", ["info", "check", "detr"])
def test_an_unknown_backend_in_the_environment_is_named(module: str) -> None:
    """In one line by a command; a program that imports the package gets an exception."""
    message = "DEFORM_ATTN_BACKEND: expected one of compiled, triton, reference, got 'cuda'"
    environment = {"cwd": PACKAGE.parent, "DEFORM_ATTN_BACKEND": "cuda"}
    done = run(sys.executable, "-m", f"deform_attn.{module}", **environment)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{message}\n")
    if module == "info":
        done = run(sys.executable, "-c", "import deform_attn", **environment)
        assert done.stderr.splitlines()[-1] == f"ValueError: {message}"


# --- info


def test_info_explains_every_backend() -> None:
    done = run(sys.executable, "-m", "deform_attn.info", "--json", cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["libraries"]) == set(facts["backends"]) == {"cpu", "cuda"}
    for by_dtype in facts["backends"].values():
        for choice in by_dtype.values():
            better = list(BACKENDS)[: list(BACKENDS).index(choice["chosen"])]
            assert set(better) <= set(choice["why_not"])


def test_info_in_words_names_libraries_and_backends() -> None:
    done = run(sys.executable, "-m", "deform_attn.info", cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in ("torch", "cpu", "cuda", info.report()["backends"]["cpu"]["float32"]["chosen"]):
        assert word in done.stdout


def test_info_shows_a_forced_backend_that_cannot_run() -> None:
    done = run(
        sys.executable,
        *("-m", "deform_attn.info", "--json"),
        cwd=PACKAGE.parent,
        DEFORM_ATTN_BACKEND="triton",
        TRITON_INTERPRET="0",
    )
    facts = json.loads(done.stdout)
    on_cpu = facts["backends"]["cpu"]["float32"]
    assert facts["forced"] == "triton"
    assert on_cpu["chosen"] is None
    assert "cuda" in on_cpu["why_not"]["triton"]


# --- what a build finds


@pytest.fixture
def toolchain(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "build_tools"))
    return importlib.import_module("toolchain")


def fake_toolkit(home: Path) -> Path:
    """A folder with an nvcc that prints what the real one prints."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f"  --dryrun) echo '#$ TOP={home}/bin/..' >&2 ;;\n"
        "  --version) echo 'Cuda compilation tools, release 12.6, V12.6.20' ;;\n"
        "  --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_86\\ncompute_89\\n"
        "compute_90\\n' ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return home


@needs_source
def test_lowest_versions_are_written_once(toolchain) -> None:
    """pyproject.toml has them; the build derives them, the Makefile repeats one."""
    lowest = importlib.metadata.requires("deform_attn") or []
    assert f"torch>={'.'.join(map(str, toolchain.TORCH_FLOOR))}" in lowest
    record = json.loads((PACKAGE / "_libraries.json").read_text())
    assert record["lowest_torch"] == list(toolchain.TORCH_FLOOR)
    (setuptools,) = toolchain.lowest("setuptools")
    assert f'"setuptools>={setuptools}"' in (ROOT / "Makefile").read_text()


@needs_source
@pytest.mark.parametrize(
    ("asked", "machine", "target", "file"),
    [
        (None, "x86_64", ("linux", "x86_64"), "_C_cpu.abi3.so"),
        ("win32-AMD64", "x86_64", ("win32", "x86_64"), "_C_cpu.pyd"),
        ("darwin-arm64", "x86_64", ("darwin", "aarch64"), "_C_cpu.abi3.so"),
    ],
)
def test_names_of_platforms(
    toolchain, monkeypatch: pytest.MonkeyPatch, asked, machine, target, file
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DEFORM_ATTN_TARGET", raising=False)
    if asked:
        monkeypatch.setenv("DEFORM_ATTN_TARGET", asked)
    found = toolchain.find_target()
    assert (found.system, found.machine) == target
    assert found.library("cpu") == file


@needs_source
@pytest.mark.parametrize("command", ["cl", r'"C:\VC\bin\cl.exe"', "clang-cl.exe"])
def test_compilers_of_windows_that_cannot_build_get_a_reason(
    toolchain, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("CXX", command)
    with pytest.raises(toolchain.NotFound, match=r"CXX=.*cl.*: cl.exe cannot .* set CXX=clang\+\+"):
        toolchain.find_cxx()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(toolchain.NotFound, match="clang\\+\\+ is not on PATH: install LLVM"):
        toolchain.find_cxx()
    monkeypatch.setenv("CXX", "clang++ --target=x86_64-pc-windows-msvc")
    assert toolchain.find_cxx()[0] == "clang++"


@needs_source
@pytest.mark.parametrize("version", ["65.5.0", "70.0.0", "76.1.0"])
@pytest.mark.parametrize(
    "start", ["runpy.run_path('setup.py')", "importlib.import_module('backend')"]
)
def test_old_setuptools_is_refused_in_a_sentence(version: str, start: str) -> None:
    """By pip without build isolation, and by setup.py."""
    code = "import importlib, runpy, sys, setuptools; sys.path.insert(0, 'build_tools'); "
    code += f"setuptools.__version__ = {version!r}; {start}"
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.returncode == 1
    assert f"needs setuptools 77 or newer, this environment has {version}: pip" in done.stderr
    assert "Traceback" not in done.stderr


@needs_source
def test_imports_point_one_way() -> None:
    """No module imports, anywhere in its code, one that imports it."""
    root = Path(deform_attn.__file__).parents[1]
    files = sorted(root.glob("deform_attn/**/*.py"))
    names = [".".join(file.relative_to(root).with_suffix("").parts) for file in files]
    names = [name.removesuffix(".__init__") for name in names]
    imported: dict[str, set[str]] = {}
    for name, file in zip(names, files):
        found = imported.setdefault(name, set())
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names} & set(names)
            elif isinstance(node, ast.ImportFrom) and node.module in names:
                parts = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {part if part in names else node.module for part in parts}
    assert len(imported) > 60
    assert imported["deform_attn.operator"] >= {"deform_attn.composite", "deform_attn.operands"}
    list(graphlib.TopologicalSorter(imported).static_order())  # raises CycleError


def test_torch_is_found_where_nothing_can_be_imported() -> None:
    """As in pip's isolated build: the interpreter is the environment's, its packages are hidden."""
    find = """
import sys
sys.path = ["build_tools", *(folder for folder in sys.path if "site-packages" not in folder)]
import toolchain
print(toolchain.find_torch().version, "torch" in sys.modules)
"""
    done = run(sys.executable, "-c", find, cwd=ROOT)
    assert done.stdout.split() == [torch.__version__, "False"], done.stderr


@needs_source
def test_wrapper_of_nvcc_leads_to_its_toolkit(
    toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = fake_toolkit(tmp_path / "toolkit")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    toolkit = toolchain.find_cuda()
    assert (toolkit.home, toolkit.version) == (home.resolve(), "12.6")


@needs_source
def test_wrong_cuda_home_is_named(
    toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(toolchain.NotFound, match=re.escape(f"CUDA_HOME={tmp_path}")):
        toolchain.find_cuda()


@needs_source
def test_architectures(toolchain, tmp_path: Path) -> None:
    old = toolchain.CudaToolkit(fake_toolkit(tmp_path / "toolkit"), "12.6")
    assert toolchain.cuda_architectures(old, {}) == ["7.5", "8.0", "8.6", "8.9", "9.0+PTX"]
    asked = toolchain.cuda_architectures(old, {"TORCH_CUDA_ARCH_LIST": "8.0;9.0a 12.0+PTX"})
    assert asked == ["8.0", "9.0a", "12.0+PTX"]
    assert toolchain.gencode_flags(asked) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST.*'Ampere'"):
        toolchain.cuda_architectures(old, {"TORCH_CUDA_ARCH_LIST": "Ampere"})


# --- what is distributed


@needs_source
def test_source_distribution_is_small_and_complete(tmp_path: Path) -> None:
    """The recordings of official code stay in the repository."""
    done = run(sys.executable, "setup.py", "-q", "sdist", f"--dist-dir={tmp_path}", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.iterdir()
    assert archive.stat().st_size < 2 * 2**20
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    for file in ("csrc/cpu/simd.h", "csrc/cuda/ops.cu", "deform_attn/detr/weights/digits.pt"):
        assert file in names
    assert {f"build_tools/{p.name}" for p in (ROOT / "build_tools").glob("*.*")} <= names
    assert not [name for name in names if "goldens" in name or name.endswith((".so", ".json.gz"))]


@needs_source
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"deform_attn/lib/libtorch_cpu.so": "of torch"},
            r"libraries of others: .*libtorch_cpu.so",
        ),
        ({"deform_attn/_C_cuda.abi3.so": "not recorded"}, r"\{'_C_cpu.abi3.so'\} were built, not"),
        ({"deform_attn/_C_cpu.pyd": "of Windows"}, r"\{'_C_cpu.abi3.so'\} were built, not"),
    ],
)
def test_wheel_with_other_libraries_is_refused(
    toolchain, tmp_path: Path, extra: dict[str, str], message: str
) -> None:
    wheels = importlib.import_module("wheels")
    wheel = tmp_path / "deform_attn-0.1.0-cp310-abi3-manylinux_2_28_x86_64.whl"
    record = {"libraries": {"cpu": {"file": "_C_cpu.abi3.so"}, "cuda": {"missing": "FORCE_CUDA=0"}}}
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("deform_attn/_libraries.json", json.dumps(record))
        for name, text in {"deform_attn/_C_cpu.abi3.so": "ours", **extra}.items():
            archive.writestr(name, text)
    with pytest.raises(wheels.CheckError, match=message):
        wheels.check(wheel)


@needs_source
def test_a_wheel_is_compared_with_the_version_of_torch_that_was_asked_for(
    toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = importlib.import_module("wheels")
    monkeypatch.setattr(wheels, "torch_in", lambda folder: True)  # nothing is downloaded
    for platform in wheels.PLATFORMS.values():
        folder = wheels.torch_for(platform, "newest")
        assert folder.parts[-3:] == (platform.target, "newest", "torch")
        built_with = wheels.torch_for(platform)
        assert (built_with == wheels.find_torch().folder) == platform.cuda


@needs_source
def test_kernel_for_the_hub_is_loaded_as_kernels_does(tmp_path: Path) -> None:
    """A variant for each backend of a wheel; its folder is imported under another name."""
    wheel = tmp_path / "deform_attn-0.1.0-cp310-abi3-manylinux_2_28_x86_64.whl"
    record = {"libraries": {"cpu": {"file": "_C_cpu.abi3.so"}, "cuda": {"missing": "FORCE_CUDA=0"}}}
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in PACKAGE.rglob("*.py"):
            archive.write(file, f"deform_attn/{file.relative_to(PACKAGE)}")
        archive.writestr("deform_attn/_libraries.json", json.dumps(record))
    out = tmp_path / "hub"
    done = run(sys.executable, "build_tools/hub.py", str(wheel), f"--out={out}", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (variant,) = (out / "build").iterdir()
    assert variant.name == "torch-stable-abi210-cpu-x86_64-linux"
    facts = json.loads((variant / "metadata.json").read_text())
    assert facts["backend"] == {"type": "cpu"}
    load = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location({facts["id"]!r}, {str(variant / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.layers.MultiScaleDeformableAttention.__name__, module.__version__)
"""
    done = run(sys.executable, "-c", load, cwd=tmp_path)
    assert done.stdout.split() == ["MultiScaleDeformableAttention", deform_attn.__version__], (
        done.stderr
    )


# --- a build that fails


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the tree, to build in."""
    ignore = shutil.ignore_patterns("*.so", "_libraries.json", "__pycache__")
    for folder in ("build_tools", "csrc", "deform_attn"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


@needs_source
def test_failing_compiler_leaves_a_pure_wheel_that_says_why(source: Path) -> None:
    build = ("setup.py", "bdist_wheel", "--dist-dir", "dist")
    stale = source / "deform_attn" / "_C_cpu.abi3.so"
    stale.write_text("of an earlier build")
    done = run(sys.executable, *build, cwd=source, CXX="false", FORCE_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "deform_attn: no cpu library: false" in done.stderr
    assert re.findall("compiling the (.*) library", done.stdout) == ["cpu"]
    (wheel,) = (source / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    shutil.unpack_archive(wheel, source / "unpacked", "zip")
    package = source / "unpacked" / "deform_attn"  # not in a folder for one platform
    assert not list(package.glob("*.so"))
    record = json.loads((package / "_libraries.json").read_text())
    assert record["libraries"] == {
        "cpu": {"missing": "the compiler failed: no output"},
        "cuda": {"missing": "FORCE_CUDA=0"},
    }
    done = run(sys.executable, "-m", "deform_attn.info", "--json", cwd=package.parent)
    facts = json.loads(done.stdout)
    assert "the compiler failed" in facts["libraries"]["cpu"]["missing"]
    assert "the compiler failed" in facts["backends"]["cpu"]["float32"]["why_not"]["compiled"]


@needs_source
@pytest.mark.parametrize(
    "environ",
    [
        {"CXX": "false", "FORCE_CUDA": "0", "DEFORM_ATTN_REQUIRE_EXT": "1"},
        {"CXX": "false", "FORCE_CUDA": "1"},
        {"CXX": "", "PATH": "", "FORCE_CUDA": "0", "DEFORM_ATTN_REQUIRE_EXT": "1"},
    ],
)
def test_required_library_fails_the_build(source: Path, environ: dict[str, str]) -> None:
    build = ("setup.py", "build_ext", "--inplace")
    done = run(sys.executable, *build, cwd=source, **environ)
    assert done.returncode != 0
    assert re.search("error: deform_attn: no (cpu|cuda) library", done.stderr)
    assert not list((source / "deform_attn").glob("*.so"))


def test_a_package_of_an_extra_that_is_missing_is_named() -> None:
    code = "import sys; sys.modules['tyro'] = None; import deform_attn.detr.__main__"
    found = run(sys.executable, "-c", code)
    expected = 'tyro: expected its package to be installed: pip install "deform_attn[detr]"'
    assert found.stderr.splitlines()[-1] == f"ModuleNotFoundError: {expected}"
