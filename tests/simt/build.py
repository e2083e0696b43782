"""Compiles the emulated kernels with this machine's C++ compiler, once for each source text."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import sysconfig
from pathlib import Path
from types import ModuleType

from build_tools.made import made, run
from build_tools.toolchain import NotFound, find_cuda

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FOLDER = ROOT / "build" / "simt"

COMPILER = os.environ.get("CXX", "g++")
FLAGS = ("-std=c++17", "-Wall", "-Wno-unknown-pragmas", "-Wno-class-memaccess", "-pthread")


@functools.cache
def why_not() -> str | None:
    """Why nothing can be built here, or None."""
    if shutil.which(COMPILER) is None:
        return f"no C++ compiler ({COMPILER}) on PATH"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    try:
        find_cuda()
    except NotFound as error:
        return str(error)
    return None


def declared_kernels() -> set[str]:
    """The names of all __global__ functions of csrc/cuda."""
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    text = re.sub(r"//.*", "", text)
    text = re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)", "", text)
    return set(re.findall(r"__global__\s+void\s+(\w+)\(", text))


@functools.cache
def _sources_digest() -> str:
    digest = hashlib.sha256()
    for folder, patterns in ((HERE, ("*.h", "*.cpp")), (ROOT / "csrc", ("*.h", "cuda/*.cu*"))):
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def compiled(source: str, output: str, *flags: str, link: tuple[str, ...] | None = None) -> Path:
    """The file made of a source of this folder; compiled only where it is not there yet.

    Linked with the same flags, or only with those of `link`.
    """
    includes = [f"-I{path}" for path in (*find_cuda().include_folders, ROOT / "csrc", HERE)]
    command = [COMPILER, *FLAGS, *flags, *includes]
    key = hashlib.sha256((_sources_digest() + " ".join(command)).encode()).hexdigest()[:16]
    target = FOLDER / key / output

    def make(unfinished: Path) -> None:
        if link is None:
            run([*command, str(HERE / source), "-o", str(unfinished), "-ldl"])
            return
        objects = unfinished.with_suffix(".o")
        run([*command, "-c", str(HERE / source), "-o", str(objects)])
        run([COMPILER, *link, str(objects), "-o", str(unfinished), "-ldl"])
        objects.unlink()

    return made(target, make)


@functools.cache
def module(name: str, *flags: str, link: tuple[str, ...] | None = None) -> ModuleType:
    """module.cpp as a Python module of this name."""
    import pybind11

    includes = (pybind11.get_include(), sysconfig.get_paths()["include"])
    path = compiled(
        "module.cpp",
        f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}",
        *("-O2", "-fPIC", "-shared", f"-DSIMT_MODULE={name}"),
        *(f"-isystem{folder}" for folder in includes),
        *flags,
        link=link,
    )
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
