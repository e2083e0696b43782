"""The first day on a machine with a GPU, rehearsed without one: ``make rehearse``.

    python tests/rehearsal.py [--torch 2.11.0] [--keep FOLDER]

A fresh environment gets the software of such a machine and no more: torch (PyPI's, with CUDA), the
Triton that it requires, nvcc, numpy and pytest. There, in a copy of this tree: both libraries are
built and loaded, the tests of the operator are collected and run on the CPU, `.ci/gpu` goes to the
first launch, a few tests run under Triton's interpreter, and its compiler compiles every kernel for
sm_90 (this last step alone needs rich, which is installed for it). Downloads about 3 GB.

Triton 3.6.0's interpreter fails with numpy 2.4, so numpy is older than that here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMPY = "numpy<2.4"  # Triton 3.6.0 interprets wrongly with numpy 2.4
NVCC = ("cccl", "crt", "nvcc", "runtime")
OPERATOR = ["tests/test_op.py", "tests/test_fused.py", "tests/test_discrete.py"]
VERSIONS = """
import importlib.metadata, json, sys
names = ("torch", "triton", "numpy", "pytest", "nvidia-cuda-nvcc")
found = {name: importlib.metadata.version(name) for name in names}
print(json.dumps(found | {"python": sys.version.split()[0]}))
"""


class Rehearsal:
    """An environment, a copy of the tree, and the steps so far."""

    def __init__(self, folder: Path) -> None:
        self.environment, self.tree = folder / "venv", folder / "tree"
        self.python = str(self.environment / "bin" / "python")
        self.out = folder / "out"
        self.rows: list[dict[str, object]] = []

    def install(self, *packages: str) -> None:
        """With pip, into the environment."""
        pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *packages], check=True)

    def step(
        self, name: str, *command: str, expect: str = "", status: int = 0, **variables: str
    ) -> str:
        """Runs a command in the tree: its status must be as given, its output must match."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            command,
            cwd=self.tree,
            env=os.environ | {"PYTHONPATH": str(self.tree)} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        passed = done.returncode == status and re.search(expect, done.stdout) is not None
        lines = done.stdout.strip().splitlines() or ["no output"]
        found = re.search(expect, done.stdout)
        result = found[0] if found and expect else lines[-1]
        self.rows.append({"step": name, "passed": passed, "cpu_seconds": cpu, "result": result})
        print(f"{'ok  ' if passed else 'FAIL'} {name:28} {cpu:6.1f} CPU s  {result}", flush=True)
        if not passed:
            print(*lines[-40:], sep="\n", flush=True)
        return done.stdout


@contextlib.contextmanager
def folder_of(keep: Path | None) -> Iterator[Path]:
    """A folder that is kept, or a temporary one."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
    else:
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as name:
            yield Path(name)


def copy_tree(to: Path) -> None:
    """The files that git tracks, as they are now."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], check=True, capture_output=True, text=True
    )
    for name in listed.stdout.split("\0"):
        source, target = ROOT / name, to / name
        if name and source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
            target.chmod(source.stat().st_mode)


def rehearse(day: Rehearsal, torch: str) -> None:
    """Every step, in the order of the day."""
    if not day.environment.exists():
        subprocess.run([sys.executable, "-m", "venv", str(day.environment)], check=True)
    nvcc = [*(f"nvidia-cuda-{part}==13.0.*" for part in NVCC), "nvidia-nvvm==13.0.*"]
    day.install(f"torch=={torch}", NUMPY, "pytest", *nvcc)
    copy_tree(day.tree)
    print(day.step("versions", day.python, "-c", VERSIONS).strip())

    pytest = [day.python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    day.step(
        "build, both libraries",
        *(day.python, "build_tools/libraries.py"),
        expect="built _C_cuda.*",
        FORCE_CUDA="1",
        DEFORM_ATTN_REQUIRE_EXT="1",
        TORCH_CUDA_ARCH_LIST="9.0",
    )
    loaded = "from deform_attn.backends import compiled; print(compiled.build_facts('cuda'))"
    day.step("import: CUDA library", day.python, "-c", loaded, expect=r"\{.*9\.0.*\}")
    day.step("check on the CPU", day.python, "-m", "deform_attn.check", expect=r"\d+ compar.*")
    day.step("collect", *pytest, "--collect-only", *OPERATOR, expect=r"[\d/]+ tests? collected")
    day.step(
        "the operator's tests",
        *(*pytest, *OPERATOR, "--runners", "compiled/cpu,reference/cpu"),
        expect=r"\d+ passed.*",
    )
    day.step(
        "make gpu, to the first launch",
        *(".ci/gpu", str(day.out), "build", "check", "table"),
        expect="FAILED: check",  # and nothing else: no GPU
        status=1,
        PYTHON=day.python,
        TORCH_CUDA_ARCH_LIST="9.0",
    )
    day.step(
        "Triton's interpreter",
        *(*pytest, "tests/test_op.py", "--runners", "triton/cpu"),
        *("-k", "test_value_and_gradients and f32 and (non_square or listed_points)"),
        expect=r"\d+ passed.*",
    )
    day.install("rich")
    day.step(
        "Triton's compiler, sm_90",
        *(day.python, "-m", "benchmarks.gates.triton_kernels", "--architectures", "90"),
        expect=r"\d+ .*kernels.*",
    )


def main() -> int:
    """Exit status 1 where a step failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", default="2.11.0")
    parser.add_argument("--keep", type=Path, help="folder of the environment, which is kept")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    arguments = parser.parse_args()
    with folder_of(arguments.keep) as folder:
        day = Rehearsal(folder)
        rehearse(day, arguments.torch)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "rehearsal.json").write_text(json.dumps(day.rows, indent=1) + "\n")
    return 0 if all(row["passed"] for row in day.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
