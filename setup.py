"""Builds the package: Python files, and two libraries that are compiled where that is possible.

A library that cannot be compiled is left out, and the package says why: below, and later in
`python -m deform_attn.info`. What steers a build:

    FORCE_CUDA=1 / 0          build the CUDA library in any case, or fail / never build it. Without
                              it: where nvcc is found and torch is a CUDA build. A GPU is not needed
    TORCH_CUDA_ARCH_LIST      default "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX", as far as nvcc knows them
    CUDA_HOME, CXX, CXXFLAGS, LDFLAGS, NVCC_APPEND_FLAGS
    MAX_JOBS, NVCC_THREADS    files, and architectures of a file, compiled at a time
    DEFORM_ATTN_REQUIRE_EXT=1 an error of a compiler fails the build
    DEFORM_ATTN_SKIP_EXT=1    Python alone, nothing is compiled
"""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))

import libraries  # noqa: E402
from toolchain import NotFound  # noqa: E402

LIBRARIES = {"cpu": "deform_attn._C_cpu", "cuda": "deform_attn._C_cuda"}
RECORD = Path("deform_attn") / "_libraries.json"  # library -> None, or why it is not there


class BuildLibraries(build_ext):
    """Compiles each library, or leaves it out and records why."""

    def run(self) -> None:
        """Builds both, says loudly what is missing, and writes the record into the package."""
        why_not: dict[str, str | None] = {}
        for name, module in LIBRARIES.items():
            why_not[name] = self.build_library(name, Path(self.get_ext_fullpath(module)))
        record = ROOT / RECORD if self.inplace else Path(self.build_lib) / RECORD
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(why_not, indent=2) + "\n", encoding="utf-8")

    def build_library(self, name: str, library: Path) -> str | None:
        """None where the library was built, else why it was not."""
        print(f"deform_attn: compiling the {name} library", flush=True)
        try:
            version = self.distribution.get_version()
            how = libraries.build(name, library, Path(self.build_temp), version)
        except (NotFound, libraries.BuildError) as error:
            library.unlink(missing_ok=True)  # one of an earlier build would be taken for this one
            failed = isinstance(error, libraries.BuildError)
            if libraries.is_forced(name, failed=failed):
                raise CompileError(f"deform_attn: no {name} library: {error}") from error
            frame = "=" * 99 + "\n" if failed or name == "cpu" else ""
            print(f"{frame}deform_attn: no {name} library: {error}\n{frame}", file=sys.stderr)
            return error.summary() if failed else str(error)
        print(f"deform_attn: built {library.name} ({how})", flush=True)
        return None

    def get_outputs(self) -> list[str]:
        """The libraries that are there, for setuptools' own bookkeeping."""
        paths = (self.get_ext_fullpath(module) for module in LIBRARIES.values())
        return [path for path in paths if Path(path).exists()]


class Wheel(bdist_wheel):
    """One wheel for every Python from 3.10 on; a pure one where no library was built."""

    def finalize_options(self) -> None:
        """The libraries use no Python API at all, so any limited one does."""
        if not sysconfig.get_config_var("Py_GIL_DISABLED"):  # those have no abi3
            self.py_limited_api = "cp310"
        super().finalize_options()

    def run(self) -> None:
        """Starts from an empty folder: a library or file of an earlier build must not slip in."""
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def run_command(self, command: str) -> None:
        """Only after the build is it known whether the wheel is pure."""
        super().run_command(command)
        if command == "build" and not self.get_finalized_command("build_ext").get_outputs():
            self.root_is_pure = True
            self.distribution.ext_modules = []


setup(
    # What they are compiled from and how is in build_tools/libraries.py.
    ext_modules=[Extension(name, [], py_limited_api=True) for name in LIBRARIES.values()],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
