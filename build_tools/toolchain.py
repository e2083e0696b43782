"""Finds what a build needs: torch's headers, a C++ compiler, a CUDA toolkit, its architectures.

python build_tools/toolchain.py        prints what was found; exit status 1 if something is missing
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lowest(requirement: str) -> tuple[int, ...]:
    """The lowest version of a requirement that pyproject.toml accepts, such as (2, 10)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf'"{requirement}>=([\d.]+)"', text)
    if found is None:
        raise LookupError(f"pyproject.toml: expected a requirement {requirement}>=VERSION")
    return tuple(int(part) for part in found.group(1).split("."))


TORCH_FLOOR = lowest("torch")

# Every generation from Turing on, and PTX of the newest for later ones.
DEFAULT_CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")


class NotFound(Exception):
    """A library cannot be built here; the message says what is missing and how to install it."""


@dataclass(frozen=True)
class Target:
    """The platform that is built for."""

    system: str  # as sys.platform: "linux", "darwin" or "win32"
    machine: str  # "x86_64" or "aarch64", also where the system has another name for it

    def library(self, name: str) -> str:
        """The file of the library `name` ("cpu" or "cuda")."""
        return f"_C_{name}{'.pyd' if self.system == 'win32' else '.abi3.so'}"


def find_target() -> Target:
    """$DEFORM_ATTN_TARGET, such as "win32-x86_64", else this machine."""
    asked = os.environ.get("DEFORM_ATTN_TARGET", "")
    system, _, machine = (asked or f"{sys.platform}-{platform.machine()}").partition("-")
    names = {"amd64": "x86_64", "arm64": "aarch64"}
    return Target(system, names.get(machine.lower(), machine.lower()))


def require_setuptools() -> None:
    """Exits with one sentence where setuptools is too old to read pyproject.toml."""
    import setuptools

    version = setuptools.__version__
    floor = lowest("setuptools")
    if tuple(int(part) for part in re.findall(r"\d+", version)[: len(floor)]) < floor:
        needed = ".".join(map(str, floor))
        raise SystemExit(
            f"deform_attn: building needs setuptools {needed} or newer, this environment has "
            f"{version}: pip install --upgrade 'setuptools>={needed}', or build without "
            "--no-build-isolation"
        )


@dataclass(frozen=True)
class Torch:
    """A torch on disk. It is not imported: a build needs only its headers and libtorch."""

    folder: Path
    version: str
    cuda: str | None  # the CUDA version it was built with

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


def torch_in(folder: Path) -> Torch | None:
    """The torch in a folder named "torch"; None where it has no headers of the stable ABI."""
    if not (folder / "include" / "torch" / "csrc" / "stable").is_dir():
        return None
    facts = (folder / "version.py").read_text(encoding="utf-8")
    return Torch(folder, _assigned(facts, "__version__") or "0.0", _assigned(facts, "cuda"))


def find_torch() -> Torch:
    """The torch of the environment that is built for, also from inside pip's isolated build."""
    tried = []
    asked = os.environ.get("DEFORM_ATTN_TORCH_DIR")
    for folder in [Path(asked)] if asked else _torch_folders():
        torch = torch_in(folder)
        if torch is None:
            continue
        if torch.release >= TORCH_FLOOR:
            return torch
        tried.append(f"{torch.version} in {folder}")
    floor = ".".join(map(str, TORCH_FLOOR))
    found = f"found only {', '.join(tried)}" if tried else "found none"
    found += f" in DEFORM_ATTN_TORCH_DIR={asked}" if asked and not tried else ""
    raise NotFound(
        f"the headers of torch >= {floor} are needed, {found}: install torch first, "
        "then this package with --no-build-isolation"
    )


def _torch_folders() -> Iterator[Path]:
    spec = importlib.util.find_spec("torch")  # finds a top-level package without importing it
    if spec is not None and spec.origin:
        yield Path(spec.origin).parent
    # pip's isolated build hides site-packages from imports, but runs the environment's
    # interpreter; uv's runs a new one, of which only the base interpreter's folders are known.
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    for paths in (sysconfig.get_paths(), sysconfig.get_paths(vars=base)):
        for kind in ("purelib", "platlib"):
            yield Path(paths[kind]) / "torch"
    if site.ENABLE_USER_SITE:
        yield Path(site.getusersitepackages()) / "torch"


def _assigned(source: str, name: str) -> str | None:
    found = re.search(rf"^{name}\b[^=\n]*=\s*'([^']*)'", source, re.MULTILINE)
    return found.group(1) if found else None


def find_cxx() -> list[str]:
    """The C++ compiler as a command: $CXX, else the first of c++, g++ and clang++ on PATH.

    On Windows it must be clang++: the kernels use vector types that cl.exe lacks.
    """
    windows = sys.platform == "win32"
    command = shlex.split(os.environ.get("CXX", ""), posix=not windows)
    if command:
        program = re.split(r"[/\\]", command[0].strip('"'))[-1].lower().removesuffix(".exe")
        if program in ("cl", "clang-cl"):
            raise NotFound(
                f"CXX={command[0]}: cl.exe cannot compile the vector types of the kernels, and "
                "clang-cl takes other options: set CXX=clang++, which LLVM and Visual Studio's "
                'component "C++ Clang tools for Windows" install'
            )
        return command
    names = ("clang++",) if windows else ("c++", "g++", "clang++")
    for name in names:
        if shutil.which(name):
            return [name]
    hint = (
        'install LLVM, or Visual Studio\'s component "C++ Clang tools for Windows" '
        "(cl.exe alone cannot compile the kernels)"
    )
    raise NotFound(
        f"no C++ compiler: $CXX is not set, and {', '.join(names)} "
        + (f"is not on PATH: {hint}" if windows else "are not on PATH")
    )


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA toolkit on disk."""

    home: Path
    version: str

    @property
    def nvcc(self) -> str:
        """The compiler's path."""
        return str(self.home / "bin" / "nvcc")

    @property
    def include_folders(self) -> list[Path]:
        """Include folders for a C++ compiler; cuda_fp16.h includes nv/target, in the second."""
        include = self.home / "include"
        return [include, include / "cccl"]

    @property
    def library_folder(self) -> Path:
        """Where libcudart_static.a is."""
        folders = [self.home / name for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
        with_cudart = [folder for folder in folders if list(folder.glob("libcudart_static.a"))]
        return with_cudart[0] if with_cudart else folders[0]

    def architectures(self) -> list[str]:
        """The architectures that this nvcc compiles for, such as "9.0"."""
        listed = _output([self.nvcc, "--list-gpu-arch"])
        return [f"{n[:-1]}.{n[-1]}" for n in re.findall(r"compute_(\d+)\b", listed)]


def find_cuda() -> CudaToolkit:
    """$CUDA_HOME or $CUDA_PATH, nvcc on PATH, /usr/local/cuda, NVIDIA's wheels, in this order."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            toolkit = _toolkit_of(Path(os.environ[name]) / "bin" / "nvcc")
            if toolkit is None:
                raise NotFound(f"{name}={os.environ[name]}: expected a bin/nvcc there that runs")
            return toolkit
    candidates = [Path(nvcc) for nvcc in [shutil.which("nvcc")] if nvcc]
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for kind in ("purelib", "platlib"):
        candidates += sorted(Path(sysconfig.get_path(kind)).glob("nvidia/cu*/bin/nvcc"))
    for nvcc in candidates:
        toolkit = _toolkit_of(nvcc)
        if toolkit is not None:
            return toolkit
    raise NotFound(
        "no CUDA toolkit: no nvcc in $CUDA_HOME, on PATH or in /usr/local/cuda; "
        "pip install 'deform_attn[cuda]' installs one"
    )


def _toolkit_of(nvcc: Path) -> CudaToolkit | None:
    # nvcc prints where its toolkit is: on PATH it is often a link or a wrapper script.
    if not nvcc.is_file():
        return None
    plan = _output([str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull])
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    version = re.search(r"release (\d+\.\d+)", _output([str(nvcc), "--version"]))
    if top is None or version is None:
        return None
    return CudaToolkit(Path(top.group(1).strip()).resolve(), version.group(1))


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout + done.stderr


def cuda_architectures(toolkit: CudaToolkit, environ: Mapping[str, str] = os.environ) -> list[str]:
    """$TORCH_CUDA_ARCH_LIST ("8.0 9.0+PTX"), else the default ones that this nvcc supports."""
    asked = environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for name in asked:
        if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", name):
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0 or 9.0+PTX, got {name!r}"
            )
    if asked:
        return asked
    supported = toolkit.architectures()
    usable = [a for a in DEFAULT_CUDA_ARCHITECTURES if a.removesuffix("+PTX") in supported]
    if usable and not usable[-1].endswith("+PTX"):
        usable[-1] += "+PTX"
    return usable


def gencode_flags(architectures: list[str]) -> list[str]:
    """Options of nvcc for ["8.0", "9.0+PTX"]: machine code for each, PTX where "+PTX"."""
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


if __name__ == "__main__":
    for find in (find_torch, find_cxx, find_cuda):
        try:
            print(find())
        except NotFound as error:
            sys.exit(str(error))
