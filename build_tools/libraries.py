"""The two compiled libraries: their sources, the flags of each, how they are built and linked.

    python build_tools/libraries.py

builds both into deform_attn/ at the same time, with torch, a C++ compiler and (for CUDA) nvcc
alone: no setuptools. The environment variables of a build are listed in setup.py. Exit status 1
where a library is missing that FORCE_CUDA or DEFORM_ATTN_REQUIRE_EXT require.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from toolchain import (
    ROOT,
    TORCH_FLOOR,
    CudaToolkit,
    NotFound,
    Target,
    Torch,
    cuda_architectures,
    find_cuda,
    find_cxx,
    find_target,
    find_torch,
    gencode_flags,
)

# The kernels are compiled once for each instruction set; cpu/ops.cpp chooses one at run time. Other
# processors get the portable kernels only.
INSTRUCTION_SETS = {
    "x86_64": {
        "kernels_avx512.cpp": (
            "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
        ),
        "kernels_avx2.cpp": "-mavx2 -mfma -mf16c",
        "kernels_portable.cpp": "",
    },
    "other": {"kernels_portable.cpp": ""},
}

# torch's stable ABI of the lowest version: one binary works with it and every later torch.
DEFINES = ["-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*TORCH_FLOOR)]

# errno and floating-point traps are never read. The kernels rely on all else of IEEE 754: no
# -ffast-math. Nothing is exported: the libraries register themselves when they are loaded.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",  # not on Windows
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",  # off by default in ISO C++: a * b + c becomes one instruction
    "-Wall",
    "-Wextra",
]
# -compress-all: the machine code of seven architectures takes a third of the space.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-DUSE_CUDA",
    "-Xfatbin=-compress-all",
]


# Tells the package the file of each library, or why there is none, and the lowest torch.
RECORD = Path("deform_attn") / "_libraries.json"


class BuildError(Exception):
    """A compiler or the linker failed; the message holds its command and its output."""

    def summary(self) -> str:
        """The first line of the output that reports an error."""
        _, *printed = str(self).splitlines()
        errors = [line for line in printed if "error" in line or "undefined reference" in line]
        return f"the compiler failed: {[*errors, *printed, 'no output'][0].strip()}"


@dataclass(frozen=True)
class Step:
    """One object file."""

    source: Path  # relative to ROOT: no path of the builder in the error messages of a library
    object: Path
    command: list[str]

    @property
    def record(self) -> Path:
        """The file with the command that made the object."""
        return Path(f"{self.object}.command")


def is_forced(name: str, *, failed: bool) -> bool:
    """Whether the build must fail: this library `failed` to compile, or cannot be built here."""
    if name == "cuda" and os.environ.get("FORCE_CUDA") == "1":
        return True
    return os.environ.get("DEFORM_ATTN_REQUIRE_EXT") == "1" and (failed or name == "cpu")


def build(name: str, library: Path, scratch: Path, version: str) -> str:
    """Compiles and links the library `name` ("cpu" or "cuda"); returns one line on how.

    Raises NotFound where something is missing or the library is switched off, BuildError where a
    compiler fails. An object file is kept until its command or a file that it includes changes.
    """
    if os.environ.get("DEFORM_ATTN_SKIP_EXT") == "1":
        raise NotFound("DEFORM_ATTN_SKIP_EXT=1")
    scratch = scratch.absolute() / name
    scratch.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    steps, link, how = {"cpu": _plan_cpu, "cuda": _plan_cuda}[name](scratch, version)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    if stale := [step for step in steps if not _is_fresh(step)]:
        print(f"deform_attn: compiling the {name} library", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(_compile, stale))
    linked = scratch / library.name  # not in the package: some linkers write files beside it
    run([*link, "-o", str(linked)])
    shutil.copyfile(linked, library)
    return how


def _plan_cpu(scratch: Path, version: str) -> tuple[list[Step], list[str], str]:
    torch, cxx, target = find_torch(), find_cxx(), find_target()
    steps = cpu_steps(torch, cxx, scratch, version)
    # An undefined symbol is an error of the build, not of a user's import.
    link = [*cxx, "-shared", *(str(s.object) for s in steps), *_link_flags(torch, target)]
    link += ["-ltorch_cpu", *(["-ldl", "-Wl,-z,defs"] if target.system == "linux" else [])]
    kernels = [s.source.name for s in steps if s.source.name in _kernel_files()]
    return steps, link, f"torch {torch.version}, {' '.join(cxx)}, {' '.join(kernels)}"


def cpu_steps(torch: Torch, cxx: list[str], scratch: Path, version: str) -> list[Step]:
    """The object files of the CPU library."""
    target = find_target()
    kernels = INSTRUCTION_SETS.get(target.machine, INSTRUCTION_SETS["other"])
    # Files without special instructions come first: where two objects hold the same inline
    # function, the linker keeps the first, which every processor must be able to run.
    sources = [f for f in _sources("csrc/cpu/*.cpp") if f.name not in _kernel_files()]
    sources += [Path("csrc/cpu") / file for file in sorted(kernels, key=lambda f: bool(kernels[f]))]

    flags = [flag for flag in CXX_FLAGS if flag != "-fPIC" or target.system != "win32"]
    common = [*cxx, *DEFINES, *_facts(torch.version, version), *flags, *_prefix_maps(torch)]
    common += shlex.split(os.environ.get("CXXFLAGS", ""))
    return [
        _step(scratch, source, [*common, *kernels.get(source.name, "").split()], torch)
        for source in sources
    ]


def _kernel_files() -> set[str]:
    return {file for files in INSTRUCTION_SETS.values() for file in files}


def _plan_cuda(scratch: Path, version: str) -> tuple[list[Step], list[str], str]:
    if os.environ.get("FORCE_CUDA") == "0":
        raise NotFound("FORCE_CUDA=0")
    torch, target = find_torch(), find_target()
    if target.system != "linux":
        raise NotFound(f"the CUDA library is built for Linux only, not for {target.system}")
    if torch.cuda is None and os.environ.get("FORCE_CUDA") != "1":
        raise NotFound(
            f"torch {torch.version} is built without CUDA and could not use the library "
            "(FORCE_CUDA=1 builds it nevertheless)"
        )
    cuda, cxx = find_cuda(), find_cxx()
    architectures = cuda_architectures(cuda)
    steps = cuda_steps(torch, cuda, cxx, architectures, scratch, version)
    # With the static runtime, a user needs only a driver.
    link = [*cxx, "-shared", *(str(s.object) for s in steps), *_link_flags(torch, target)]
    link += [f"-L{cuda.library_folder}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    link += _runtime_of_nvcc()
    how = f"CUDA {cuda.version} in {cuda.home}, for {' '.join(architectures)}"
    return steps, link, how


def cuda_steps(
    torch: Torch,
    cuda: CudaToolkit,
    cxx: list[str],
    architectures: list[str],
    scratch: Path,
    version: str,
) -> list[Step]:
    """The object files of the CUDA library."""
    sources = _sources("csrc/cuda/*.cu")
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    threads = os.environ.get("NVCC_THREADS") or str(max(1, jobs // max(1, len(sources))))
    host = [f for f in CXX_FLAGS if f.startswith("-f")] + _prefix_maps(torch)
    common = [
        cuda.nvcc,
        f"-ccbin={os.environ.get('NVCC_CCBIN') or cxx[-1]}",
        *DEFINES,
        *_facts(torch.version, version),
        *NVCC_FLAGS,
    ]
    common += [f"-Xcompiler={flag}" for flag in host]
    common += [*gencode_flags(architectures), f"--threads={threads}"]
    return [_step(scratch, source, common, torch) for source in sources]


def _sources(pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))


def _facts(torch_version: str, version: str) -> list[str]:
    return [f'-DDEFORM_ATTN_VERSION="{version}"', f'-DDEFORM_ATTN_TORCH="{torch_version}"']


def _prefix_maps(torch: Torch) -> list[str]:
    return [f"-fmacro-prefix-map={torch.folder / 'include'}/=", f"-fmacro-prefix-map={ROOT}/="]


def _link_flags(torch: Torch, target: Target) -> list[str]:
    flags = [f"-L{torch.folder / 'lib'}"]
    if target.system == "linux":
        # libtorch.so is loaded already; through it the loader finds the functions of the stable
        # ABI. No symbol is exported, of static libraries either.
        exports = Path("build_tools") / "exports.map"
        flags += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
        flags += [f"-Wl,--version-script={exports}"]
    if target.system == "darwin":
        flags += ["-install_name", f"@rpath/{target.library('cpu')}"]  # else the builder's path
    return flags + shlex.split(os.environ.get("LDFLAGS", ""))


def _runtime_of_nvcc() -> list[str]:
    # Where nvcc's host compiler is not the one that links: its own C++ library, linked statically,
    # and two functions of later C libraries that this needs.
    host = os.environ.get("NVCC_CCBIN")
    if not host:
        return []
    asked = [[host, f"-print-file-name={name}"] for name in ("libstdc++.a", "libgcc_s.so.1")]
    files = [subprocess.run(a, capture_output=True, text=True, check=True).stdout for a in asked]
    stubs = str(Path("build_tools") / "glibc_2_28.c")
    return ["-nostdlib++", *(file.strip() for file in files), "-x", "c", stubs, "-x", "none"]


def _step(scratch: Path, source: Path, flags: Sequence[str], torch: Torch) -> Step:
    target = scratch / f"{source.stem}.o"
    include = ["-Icsrc", "-isystem", str(torch.folder / "include")]
    depends = ["-MD", "-MF", f"{target}.d"]
    return Step(source, target, [*flags, *include, *depends, "-c", str(source), "-o", str(target)])


def _compile(step: Step) -> None:
    print(f"  {step.source}", flush=True)
    step.record.unlink(missing_ok=True)
    run(step.command)
    step.record.write_text(shlex.join(step.command), encoding="utf-8")


def _is_fresh(step: Step) -> bool:
    command = shlex.join(step.command)
    if not step.record.is_file() or step.record.read_text(encoding="utf-8") != command:
        return False
    _, _, listed = Path(f"{step.object}.d").read_text(encoding="utf-8").partition(":")
    built = step.object.stat().st_mtime
    try:
        return all(
            (ROOT / file).stat().st_mtime <= built
            for file in shlex.split(listed.replace("\\\n", " "))
        )
    except FileNotFoundError:
        return False


def run(command: list[str]) -> None:
    """Runs a compiler in ROOT and prints its warnings; raises BuildError where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr.strip():
        print(done.stderr, file=sys.stderr, flush=True)  # warnings


def write_record(folder: Path, built: dict[str, dict[str, str]]) -> None:
    """Writes RECORD below `folder`; `built` holds {"file": ...} or {"missing": ...} of each."""
    record = folder / RECORD
    record.parent.mkdir(parents=True, exist_ok=True)
    facts = {"lowest_torch": TORCH_FLOOR, "libraries": built}
    record.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Builds both libraries into the tree, at the same time."""
    text = (ROOT / "deform_attn" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.*)"', text, re.MULTILINE)[1]  # type: ignore[index]

    def build_one(name: str) -> tuple[dict[str, str], bool]:
        library = ROOT / "deform_attn" / find_target().library(name)
        try:
            how = build(name, library, ROOT / "build" / "libraries", version)
        except (NotFound, BuildError) as error:
            library.unlink(missing_ok=True)
            failed = isinstance(error, BuildError)
            print(f"deform_attn: no {name} library: {error}", file=sys.stderr, flush=True)
            reason = error.summary() if failed else str(error)
            return {"missing": reason}, is_forced(name, failed=failed)
        print(f"deform_attn: built {library.name} ({how})", flush=True)
        return {"file": library.name}, False

    with ThreadPoolExecutor() as pool:
        done = dict(zip(("cpu", "cuda"), pool.map(build_one, ("cpu", "cuda"))))
    write_record(ROOT, {name: built for name, (built, _) in done.items()})
    return 1 if any(forced for _, forced in done.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
