"""Builds the package: Python files, and two libraries that are compiled where that is possible.

A library that cannot be compiled is left out; the build prints the reason, and
`python -m deform_attn.info` shows it later. Environment variables of a build:

    FORCE_CUDA=1 / 0          build the CUDA library, or fail / do not build it. Default: build it
                              where nvcc is found and torch is a CUDA build. No GPU is needed
    TORCH_CUDA_ARCH_LIST      default "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX", those that nvcc supports
    CUDA_HOME, CXX, CXXFLAGS, LDFLAGS, NVCC_APPEND_FLAGS
    NVCC_CCBIN                nvcc's host compiler, g++, where CXX is another one that only links
    DEFORM_ATTN_TARGET        the platform to build for, such as "win32-x86_64"; CXX must do so too
    DEFORM_ATTN_TORCH_DIR     the folder "torch" of that platform; default: that of the environment
    MAX_JOBS, NVCC_THREADS    files, and architectures of a file, compiled at the same time
    DEFORM_ATTN_REQUIRE_EXT=1 an error of a compiler fails the build
    DEFORM_ATTN_SKIP_EXT=1    compile nothing
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))

from toolchain import NotFound, find_target, require_setuptools  # noqa: E402

require_setuptools()  # before anything that an older one lacks

import libraries  # noqa: E402
from setuptools import Extension, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.errors import CompileError  # noqa: E402

NAMES = ("cpu", "cuda")


class BuildLibraries(build_ext):
    """Compiles each library, or leaves it out and records why."""

    def run(self) -> None:
        """Builds both, prints what is missing, and writes the record into the package."""
        built = {}
        for name, file in self.files().items():
            missing = self.build_library(name, file)
            built[name] = {"missing": missing} if missing else {"file": file.name}
        libraries.write_record(ROOT if self.inplace else Path(self.build_lib), built)

    def files(self) -> dict[str, Path]:
        """Where each library goes."""
        folder = Path(self.get_ext_fullpath("deform_attn._C_cpu")).parent
        return {name: folder / find_target().library(name) for name in NAMES}

    def build_library(self, name: str, library: Path) -> str | None:
        """Returns None where the library was built, else the reason."""
        try:
            version = self.distribution.get_version()
            target = find_target()
            scratch = Path(self.build_temp) / f"{target.system}-{target.machine}"
            how = libraries.build(name, library, scratch, version)
        except (NotFound, libraries.BuildError) as error:
            library.unlink(missing_ok=True)  # a file of an earlier build must not be packed
            failed = isinstance(error, libraries.BuildError)
            if libraries.is_forced(name, failed=failed):
                raise CompileError(f"deform_attn: no {name} library: {error}") from error
            frame = "=" * 99 + "\n" if failed or name == "cpu" else ""
            print(f"{frame}deform_attn: no {name} library: {error}\n{frame}", file=sys.stderr)
            return error.summary() if failed else str(error)
        print(f"deform_attn: built {library.name} ({how})", flush=True)
        return None

    def get_outputs(self) -> list[str]:
        """The libraries that were built, for setuptools."""
        return [str(path) for path in self.files().values() if path.exists()]


class Wheel(bdist_wheel):
    """One wheel for every Python from 3.10 on; a pure one where no library was built."""

    def finalize_options(self) -> None:
        """The libraries use no Python API, so they satisfy the limited API of any version."""
        if not sysconfig.get_config_var("Py_GIL_DISABLED"):  # free-threaded Pythons have no abi3
            self.py_limited_api = "cp310"
        super().finalize_options()

    def run(self) -> None:
        """Starts from an empty folder: files of an earlier build must not be packed."""
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def run_command(self, command: str) -> None:
        """Only after the build is it known whether the wheel is pure."""
        super().run_command(command)
        if command == "build" and not self.get_finalized_command("build_ext").get_outputs():
            self.root_is_pure = True
            self.distribution.ext_modules = []


setup(
    # build_tools/libraries.py has their sources and flags.
    ext_modules=[Extension(f"deform_attn._C_{name}", [], py_limited_api=True) for name in NAMES],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
