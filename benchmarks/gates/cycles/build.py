"""Compiles the kernels to machine code, and the model with this machine's C++ compiler; runs it.

What was compiled or simulated is kept in build/cycles until something that it is made of changes.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from build_tools.made import made, run
from build_tools.toolchain import NotFound, find_cuda, find_cxx

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
FOLDER = ROOT / "build" / "cycles"

# No contraction of a * b + c: it would change the inputs. See model.cpp for the emulator's folder.
CXX_FLAGS = ("-std=c++17", "-ffp-contract=off", "-frounding-math", "-Wall", "-Wextra")
NVCC_FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin")


def find_nvdisasm() -> Path:
    """The disassembler beside nvcc, on PATH, of NVIDIA's wheel or of Triton, in this order."""
    candidates = [find_cuda().home / "bin" / "nvdisasm"]
    candidates += [Path(found) for found in [shutil.which("nvdisasm")] if found]
    for kind in ("purelib", "platlib"):
        packages = Path(sysconfig.get_path(kind))
        candidates += sorted(packages.glob("nvidia/cu*/bin/nvdisasm"))
        candidates.append(packages / "triton" / "backends" / "nvidia" / "bin" / "nvdisasm")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise NotFound(
        "no nvdisasm beside nvcc, on PATH or in the packages nvidia-cuda-nvdisasm and triton: "
        "pip install nvidia-cuda-nvdisasm"
    )


@functools.cache
def versions() -> dict[str, str]:
    """Of the compiler and the disassembler, such as 13.0.88."""
    programs = {"nvcc": find_cuda().nvcc, "nvdisasm": str(find_nvdisasm())}
    return {
        name: run([program, "--version"]).split(", V")[-1].split()[0]
        for name, program in programs.items()
    }


def _digest(files: Iterable[Path], *texts: str) -> str:
    digest = hashlib.sha256("\0".join(texts).encode())
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _sources_of_kernels() -> list[Path]:
    return [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.cu*")]


def machine_code(source: str, capability: int) -> Path:
    """The text of nvdisasm for a source of csrc/cuda, such as forward_float.cu."""
    cuda = find_cuda()
    command = [cuda.nvcc, *NVCC_FLAGS, f"-arch=sm_{capability}"]
    key = _digest(_sources_of_kernels(), *command, *versions().values())
    target = FOLDER / key / f"{source}.{capability}.txt"

    def make(path: Path) -> None:
        cubin = target.with_suffix(".cubin")
        run([*command, "-o", str(cubin), str(ROOT / "csrc" / "cuda" / source)])
        path.write_text(run([str(find_nvdisasm()), "-hex", str(cubin)]))
        cubin.unlink()

    return made(target, make)


def program(source: Path, *flags: str, cuda: bool = False) -> Path:
    """The executable of `source` and of the model; `cuda`: with csrc's kernels."""
    names = ("code", "execute", "multiprocessor", *(["inputs"] if cuda else []))
    parts = [*(HERE / f"{name}.cpp" for name in names), source]
    includes = [f"-I{HERE}"]
    if cuda:
        includes += [f"-I{path}" for path in (ROOT / "csrc", ROOT / "tests" / "simt")]
        includes += [f"-isystem{path}" for path in find_cuda().include_folders]
    command = [*find_cxx(), *CXX_FLAGS, *flags, *includes, "-pthread"]
    files = [*HERE.glob("*.h"), *parts]
    if cuda:
        files += [*_sources_of_kernels(), *(ROOT / "tests" / "simt").glob("*.h")]
    target = FOLDER / _digest(files, *command) / source.stem

    def make(path: Path) -> None:
        run([*command, "-o", str(path), *map(str, parts), "-ldl"])

    return made(target, make)


def simulated(model: Path, arguments: list[str], code: Path) -> str:
    """What the model prints."""
    target = FOLDER / "calls" / f"{_digest([model, code], *arguments)}.json"

    def make(path: Path) -> None:
        path.write_text(run([str(model), *arguments, str(code)]))

    return made(target, make).read_text()
