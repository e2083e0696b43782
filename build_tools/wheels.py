"""Builds the wheels of a release from the source distribution, and checks each of them.

    python build_tools/wheels.py                              all platforms
    python build_tools/wheels.py win_amd64 macosx_11_0_arm64  some of them
    python build_tools/wheels.py --cuda 7.5+PTX               fewer architectures, for a trial
    python build_tools/wheels.py --check dist/*.whl           checks only
    python build_tools/wheels.py --check dist/*.whl --torch newest

Zig, which PyPI has, compiles for every platform with the headers and libraries of that platform, so
a wheel does not depend on the machine that built it. Only the CUDA library needs nvcc and g++.
torch's wheel for a platform is downloaded for its headers and for the symbols to link to; nothing
of it is packed. Exit status 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from toolchain import DEFAULT_CUDA_ARCHITECTURES, ROOT, TORCH_FLOOR, NotFound, find_torch, torch_in

WORK = ROOT / "build" / "wheels"
LOWEST_TORCH = ".".join(map(str, TORCH_FLOOR)) + ".0"


@dataclass(frozen=True)
class Platform:
    """A platform that gets a wheel."""

    target: str  # DEFORM_ATTN_TARGET
    zig: str  # the target's name in Zig
    torch: tuple[str, ...]  # the tags of torch's wheels
    cuda: bool = False  # has the CUDA library, and is built with the torch of the environment
    options: str = ""  # of the compiler


PLATFORMS = {
    # -mevex512: Zig turns 512-bit vectors off unless they are asked for.
    "manylinux_2_28_x86_64": Platform(
        "linux-x86_64",
        "x86_64-linux-gnu.2.28",
        ("manylinux_2_28_x86_64",),
        cuda=True,
        options="-mevex512",
    ),
    "manylinux_2_28_aarch64": Platform(
        "linux-aarch64", "aarch64-linux-gnu.2.28", ("manylinux_2_28_aarch64",)
    ),
    "macosx_11_0_arm64": Platform(
        "darwin-aarch64", "aarch64-macos.11.0", ("macosx_11_0_arm64", "macosx_14_0_arm64")
    ),
    "win_amd64": Platform(
        "win32-x86_64", "x86_64-windows-gnu", ("win_amd64",), options="-mevex512"
    ),
}

# Functions of libtorch_cuda.so, which a torch without CUDA lacks.
OF_CUDA_TORCH = {"aoti_torch_get_current_cuda_stream"}


class CheckError(Exception):
    """A wheel is not what it must be."""


def torch_for(platform: Platform, version: str | None = None) -> Path:
    """The folder "torch" with headers and libraries of a platform; downloads its wheel once.

    Without a version: the one that the platform's wheel is built with.
    """
    if version is None and platform.cuda:
        return find_torch().folder
    version = version or LOWEST_TORCH
    folder = ROOT / "build" / "torch" / platform.target / version / "torch"
    if torch_in(folder):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary=:all:", "--python-version=3.11"]
        command += [f"--platform={tag}" for tag in platform.torch]
        requirement = "torch" if version == "newest" else f"torch=={version}"
        subprocess.run([*command, f"--dest={scratch}", requirement], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        needed = re.compile(
            r"torch/(version\.py|include/torch/.*|lib/(lib)?(torch|torch_cpu|c10)\..*)"
        )
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder.parent, filter(needed.fullmatch, archive.namelist()))
    return folder


def check_tag(tag: str) -> None:
    """The tag of a release is its version, and the changelog has a section for it."""
    text = (ROOT / "deform_attn" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.*)"', text, re.MULTILINE)
    assert version is not None
    require(tag == f"v{version[1]}", f"--tag: expected v{version[1]}, got {tag}")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    section = rf"^## {re.escape(tag[1:])} - \d{{4}}-\d\d-\d\d$"
    found = re.search(section, changelog, re.MULTILINE)
    require(found is not None, f"CHANGELOG.md: expected a line '## {tag[1:]} - YYYY-MM-DD'")


def make_sdist(dist: Path) -> Path:
    """Builds the source distribution, and returns a folder with its contents."""
    for old in dist.glob("deform_attn-*.tar.gz"):
        old.unlink()
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", f"--outdir={dist}"]
    run([*build, str(ROOT)], DEFORM_ATTN_SKIP_EXT="1")
    (archive,) = dist.glob("deform_attn-*.tar.gz")
    folder = WORK / archive.name.removesuffix(".tar.gz")
    for old in folder.glob("*"):  # the object files of an earlier run stay
        if old.is_file():
            old.unlink()
        elif old.name != "build":
            shutil.rmtree(old)
    with tarfile.open(archive) as files:
        files.extractall(WORK, filter="data")
    return folder


def make_wheel(tag: str, source: Path, dist: Path, architectures: str) -> Path:
    """Compiles the libraries for a platform and packs them."""
    platform = PLATFORMS[tag]
    environ = {
        "CXX": f"{sys.executable} -m ziglang c++ -target {platform.zig} {platform.options}",
        "DEFORM_ATTN_TARGET": platform.target,
        "DEFORM_ATTN_TORCH_DIR": str(torch_for(platform)),
        "DEFORM_ATTN_REQUIRE_EXT": "1",
        "FORCE_CUDA": "0",
        "LDFLAGS": "-s",  # no debugging information: a fifth of the size
    }
    if platform.cuda and architectures != "none":
        environ["NVCC_CCBIN"] = os.environ.get("NVCC_CCBIN", "g++")
        environ |= {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures}
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", f"--outdir={dist}"]
    command += [f"-C--build-option=--plat-name={tag}", str(source)]
    for wheel in dist.glob(f"*-{tag}.whl"):
        wheel.unlink()
    run(command, **environ)
    (wheel,) = dist.glob(f"*-{tag}.whl")
    return wheel


def check(wheel: Path, torch: str | None = None) -> dict[str, str]:
    """Checks a wheel against a version of torch, or the one that it was built with; returns what
    was found. Raises CheckError.
    """
    tag = wheel.stem.rsplit("-", 1)[-1]
    platform = PLATFORMS[tag]
    folder = Path(tempfile.mkdtemp())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    try:
        libraries = sorted((folder / "deform_attn").glob("_C_*"))
        record = json.loads((folder / "deform_attn" / "_libraries.json").read_text())
        built = {facts.get("file") for facts in record["libraries"].values()} - {None}
        foreign = [
            p for p in folder.rglob("*") if re.search(r"\.(so|dll|dylib|pyd|lib|a)\b", p.name)
        ]
        require({p.name for p in libraries} == built, f"{built} were built, not {libraries}")
        require(sorted(foreign) == libraries, f"libraries of others: {foreign}")
        found = {"size": f"{wheel.stat().st_size / 2**20:.2f} MiB"}
        found["libraries"] = ", ".join(sorted(built))
        found["symbols"] = check_symbols(libraries, platform, torch)
        if tag.startswith("manylinux"):
            found["auditwheel"] = check_policy(wheel, tag)
        audit = last_line(tool("abi3audit", "--strict", "--summary", str(wheel)))
        found["abi3audit"] = audit.rpartition(".whl: ")[2]
        if platform.target.startswith("linux"):
            audit = tool("torch-abi-audit", "--check", "torch", *map(str, libraries))
            found["torch-abi-audit"] = last_line(audit)
        tool("twine", "check", "--strict", str(wheel))
        found["twine"] = "passed"
    finally:
        shutil.rmtree(folder)
    return found


# What a library may depend on besides torch_cpu: the C library, or the system's own libraries.
SYSTEM = re.compile(
    r"lib(c|m|dl|rt|pthread|gcc_s)\.so\.\d|ld-linux.*\.so\.\d|libtorch(_cpu)?\.so"
    r"|/usr/lib/libSystem\.B\.dylib|@rpath/libtorch_cpu\.dylib"
    r"|(KERNEL32|ntdll|torch_cpu)\.dll|api-ms-win-crt-.*\.dll",
    re.IGNORECASE,
)
# On macOS: allocation in C++, weak, so that the loader keeps that of the system; the file's header.
HARMLESS = re.compile(r"__Z(n|d)[wal].*|___dso_handle|__mh_dylib_header")


def check_symbols(libraries: list[Path], platform: Platform, torch: str | None) -> str:
    """Every undefined symbol is torch's, the C library's or the system's; none is exported."""
    folder = torch_for(platform, torch) / "lib"
    (provider,) = (
        p for p in folder.iterdir() if re.fullmatch(r"(lib)?torch_cpu\.(so|d.*)", p.name)
    )
    provided = Symbols(provider).exported
    count = 0
    for path in libraries:
        symbols = Symbols(path)
        foreign = {name for name in symbols.needed if not SYSTEM.fullmatch(name)}
        require(not foreign, f"{path.name}: depends on {sorted(foreign)}")
        lacking = symbols.of_torch - provided
        lacking -= OF_CUDA_TORCH if "cuda" in path.name else set()
        require(not lacking, f"{path.name}: {provider.name} lacks {sorted(lacking)}")
        # An exported function could take the place of another library's; not on Windows.
        exported = {n for n in symbols.exported if not HARMLESS.fullmatch(n)}
        exported = exported if path.suffix != ".pyd" else set()
        require(not exported, f"{path.name}: exports {sorted(exported)[:5]}")
        require(len(symbols.of_torch) > 20, f"{path.name}: too few symbols: {symbols.of_torch}")
        count += len(symbols.of_torch)
    version = torch_in(folder.parent).version
    return f"{count} of torch, all of them in {provider.name} of torch {version}"


class Symbols:
    """The dynamic symbols of an ELF, PE or Mach-O library."""

    def __init__(self, path: Path) -> None:
        import lief

        # Without its relocations, as torch has many of them.
        config = lief.ELF.ParserConfig()
        config.parse_relocations = config.parse_symtab_symbols = False
        if lief.is_elf(str(path)):
            binary = lief.ELF.parse(str(path), config)
        else:
            binary = lief.parse(str(path))
        if isinstance(binary, lief.MachO.FatBinary):
            binary = binary.at(0)
        if isinstance(binary, lief.ELF.Binary):
            self.needed = set(binary.libraries)
            symbols = [s for s in binary.dynamic_symbols if s.name]
            self.exported = {s.name for s in symbols if s.value}
            # Those of the C library have a version; weak ones may stay undefined.
            weak = lief.ELF.Symbol.BINDING.WEAK
            undefined = [s for s in symbols if not s.value and s.binding != weak]
            self.of_torch = {s.name for s in undefined if s.symbol_version.value <= 1}
        elif isinstance(binary, lief.PE.Binary):
            imports = {entry.name: {e.name for e in entry.entries} for entry in binary.imports}
            self.needed = set(imports)
            export = binary.get_export() if binary.has_exports else None
            self.exported = {e.name for e in export.entries} if export else set()
            self.of_torch = imports.get("torch_cpu.dll", set())
        else:
            own = lief.MachO.LoadCommand.TYPE.ID_DYLIB
            self.needed = {lib.name for lib in binary.libraries if lib.command != own}
            self.exported = {s.name for s in binary.exported_symbols}
            bound = [b for b in binary.bindings if b.has_library]
            self.of_torch = {b.symbol.name for b in bound if "torch" in b.library.name}


def check_policy(wheel: Path, tag: str) -> str:
    """The C library that a wheel needs is not newer than its tag promises."""
    facts = json.loads(tool("auditwheel", "show", "--json", str(wheel)))
    libc, promised = (
        tuple(map(int, re.search(r"_(\d+)_(\d+)_", name).groups()))
        for name in (facts["sym_tag"], tag)
    )
    require(libc <= promised, f"its C library must be that of {facts['sym_tag']}")
    outside = set(facts["external_libs"]) - {"libtorch.so", "libtorch_cpu.so"}
    require(not outside, f"it needs {sorted(outside)}")
    return f"{facts['sym_tag']}, with {', '.join(sorted(facts['external_libs']))} outside"


def tool(name: str, *arguments: str) -> str:
    """Runs a tool of this environment; returns its output. Raises CheckError where it fails."""
    program = shutil.which(name, path=str(Path(sys.executable).parent))
    if program is None:
        raise NotFound(f"{name} is not installed: pip install 'deform_attn[release]'")
    plain = os.environ | {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "1000"}
    command = [program, *arguments]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CheckError(f"{name}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout or done.stderr


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return [line.strip() for line in text.splitlines() if line.strip()][-1]


def require(condition: bool, message: str) -> None:
    """Raises CheckError unless `condition`."""
    if not condition:
        raise CheckError(message)


def run(command: list[str], **environ: str) -> None:
    """Runs a command, and prints what this package prints; exits with all of it where it fails."""
    done = subprocess.run(
        command, env=os.environ | environ, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}{done.stderr}\nwheels.py: failed: {' '.join(command)}")
    for line in done.stdout.splitlines():
        if line.startswith("deform_attn:"):
            print(line, flush=True)


def main() -> int:
    """Exit status 1 where a check fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("platforms", nargs="*", metavar="PLATFORM", default=[])
    parser.add_argument("--cuda", default=" ".join(DEFAULT_CUDA_ARCHITECTURES), metavar="LIST")
    parser.add_argument("--tag", help="of a release: fail unless version and changelog agree")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument("--check", nargs="+", type=Path, metavar="WHEEL")
    parser.add_argument("--torch", help="the version whose symbols are compared, or newest")
    arguments = parser.parse_args()
    if arguments.tag:
        try:
            check_tag(arguments.tag)
        except CheckError as error:
            raise SystemExit(f"wheels.py: {error}") from None
    dist = arguments.dist.absolute()
    dist.mkdir(parents=True, exist_ok=True)
    wheels = arguments.check or []
    if not wheels:
        source = make_sdist(dist)
        for tag in arguments.platforms or PLATFORMS:
            wheels.append(make_wheel(tag, source, dist, arguments.cuda))
    status = 0
    for wheel in wheels:
        try:
            facts = check(wheel, arguments.torch)
        except CheckError as error:
            facts, status = {"FAILED": str(error)}, 1
        print(wheel.name, *(f"  {name:16} {fact}" for name, fact in facts.items()), sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
