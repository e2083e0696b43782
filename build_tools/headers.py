"""Compiles the sources against the headers of other versions of torch, without installing them.

    python build_tools/headers.py lowest newest

"lowest" is the lowest version that pyproject.toml accepts, "newest" the newest that pip finds;
"2.12" is a version too. torch's wheels for Linux hold a gigabyte; the headers
come from the wheel for macOS, of about 100 MB, and are the same. They are kept in build/headers.
Only csrc/cpu/ops.cpp and csrc/cuda/ops.cu include them; no code is generated.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import libraries
from toolchain import ROOT, TORCH_FLOOR, NotFound, Torch, find_cuda, find_cxx, torch_in

FOLDER = ROOT / "build" / "headers"
PLATFORMS = ("macosx_11_0_arm64", "macosx_14_0_arm64", "macosx_15_0_arm64")


def headers_of(version: str) -> Torch:
    """The headers of a version of torch, such as "2.12" (the last of its patches) or "newest"."""
    kept = FOLDER / version / "torch"
    if version != "newest" and (found := torch_in(kept)):
        return found
    shutil.rmtree(kept, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        requirement = "torch" if version == "newest" else f"torch=={version}.*"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary=:all:", "--python-version=3.11"]
        command += [f"--platform={name}" for name in PLATFORMS]
        subprocess.run([*command, f"--dest={scratch}", requirement], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            prefixes = ("torch/include/torch/", "torch/version.py")
            names = [name for name in archive.namelist() if name.startswith(prefixes)]
            archive.extractall(kept.parent, names)
    found = torch_in(kept)
    if found is None:
        raise NotFound(f"torch {version} has no headers of the stable ABI")
    return found


def check(torch: Torch) -> list[str]:
    """Compiles against these headers; returns the files that were checked."""
    scratch = FOLDER / torch.version
    cxx = find_cxx()
    steps = libraries.cpu_steps(torch, cxx, scratch, "0")
    steps = [step for step in steps if step.source.name == "ops.cpp"]
    commands = [(step.source, [*_without_output(step.command), "-fsyntax-only"]) for step in steps]
    try:
        cuda = find_cuda()
    except NotFound as error:
        print(f"  the CUDA library is not checked: {error}")
    else:
        # --cuda stops before any code is generated; an architecture only sets macros.
        steps = libraries.cuda_steps(torch, cuda, cxx, ["7.5"], scratch, "0")
        for step in (step for step in steps if step.source.name == "ops.cu"):
            output = str(scratch / step.source.with_suffix(".ii").name)
            commands.append((step.source, [*_without_output(step.command), "--cuda", "-o", output]))
    scratch.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: libraries.run(command[1]), commands))
    return [str(source) for source, _ in commands]


def _without_output(command: list[str]) -> list[str]:
    return [*command[: command.index("-MD")], command[command.index("-c") + 1]]


def main() -> int:
    """Exit status 1 where a file does not compile."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "versions", nargs="+", metavar="VERSION", help='"2.12", "lowest" or "newest"'
    )
    status = 0
    for version in parser.parse_args().versions:
        lowest = ".".join(map(str, TORCH_FLOOR))
        torch = headers_of(lowest if version == "lowest" else version)
        try:
            result = f"compiled {', '.join(check(torch))}"
        except libraries.BuildError as error:
            result, status = f"FAILED\n{error}", 1
        print(f"headers of torch {torch.version}: {result}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
