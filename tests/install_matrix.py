"""Installs the package beside several versions of torch and Python, and tests the operator there.

    python tests/install_matrix.py --torch 2.10.0 2.13.0 newest --python python3.10 python3.13
    python tests/install_matrix.py --torch 2.10.0 newest --package dist/deform_attn-0.1.0-....whl
    python tests/install_matrix.py --environment some/venv/bin/python --package dist/....whl

With --torch, each pair gets an empty environment with that torch, where pip installs the package
from source, a wheel or a source distribution. The tests run there on the compiled backend, against
the installed package; then the environment is removed. Downloads up to 3 GB for each torch.
--environment names Pythons that have torch, numpy, pytest and hypothesis: nothing is downloaded,
and the package goes into a folder of its own. With a wheel, no compiler is on PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
FACTS = """
import json, platform, torch, deform_attn
from deform_attn.backends import compiled
devices = ("cpu", "cuda")
print(json.dumps({
    "python": platform.python_version(),
    "torch": torch.__version__,
    "where": deform_attn.__file__,
    "libraries": {d: compiled.why_not(d, torch.float32) or "loaded" for d in devices},
}))
"""


def new_environment(python: str, torch: str, package: Path, scratch: Path) -> str:
    """Makes an environment with torch and the package; returns its Python."""
    environment = scratch / "environment"
    shutil.rmtree(environment, ignore_errors=True)
    run([python, "-m", "venv", str(environment)])
    installed = str(environment / ("Scripts" if os.name == "nt" else "bin") / "python")
    install = [installed, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    requirement = "torch" if torch == "newest" else f"torch=={torch}"
    run([*install, "--cache-dir", str(scratch / "cache"), requirement])
    run([*install, "numpy", "pytest", "hypothesis"])
    run([*install, str(package)], **variables(package))
    return installed


def beside(python: str, package: Path, scratch: Path) -> Path:
    """Installs the package for an environment that stays as it is; returns the folder."""
    folder = scratch / "site"
    shutil.rmtree(folder, ignore_errors=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["--no-deps", f"--target={folder}", str(package)]
    run(install, **variables(package))
    return folder


def variables(package: Path) -> dict[str, str]:
    """A build must succeed; a wheel needs no compiler, so there is none."""
    if package.suffix == ".whl":
        return {"PATH": os.devnull}
    return {"DEFORM_ATTN_REQUIRE_EXT": "1"}


def try_installed(
    python: str, folder: Path, package: Path, checks: list[str], tests: list[str], scratch: Path
) -> dict:
    """Runs `python -m deform_attn.check` and the tests outside the source tree."""
    work = scratch / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(TESTS, work / "tests", ignore=shutil.ignore_patterns("__pycache__", "simt"))
    environ = {**variables(package), "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    facts = json.loads(run([python, "-c", FACTS], cwd=work, **environ).splitlines()[-1])
    assert Path(facts["where"]).is_relative_to(folder), f"tested {facts['where']} instead"

    start = time.perf_counter()
    check = [python, "-m", "deform_attn.check", "--device", "cpu", *checks]
    done = subprocess.run(
        check, cwd=work, env=os.environ | environ, capture_output=True, text=True, check=False
    )
    checked = done.returncode == 0
    print(done.stdout[-3000:] if checked else done.stdout[-6000:] + done.stderr[-2000:])
    counts, passed = {}, True
    if tests:
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--runners"]
        command += ["compiled/cpu", *(f"tests/{argument}" for argument in tests)]
        done = subprocess.run(
            command, cwd=work, env=os.environ | environ, capture_output=True, text=True, check=False
        )
        printed = done.stdout.strip().splitlines() or [done.stderr.strip()]
        if done.returncode != 0:
            print(done.stdout[-6000:], done.stderr[-2000:], sep="\n")
        found = re.findall(r"(\d+) (passed|failed|skipped|error)", printed[-1])
        counts = {word: int(number) for number, word in found}
        passed = done.returncode == 0
    return facts | {
        "passed": passed and checked and facts["libraries"]["cpu"] == "loaded",
        "check": "passed" if checked else "FAILED",
        "tests": counts,
        "seconds": round(time.perf_counter() - start),
    }


def run(command: list[str], cwd: Path | None = None, **environ: str) -> str:
    """Returns the output of a command; exits with its errors where it fails."""
    environ = os.environ | environ
    done = subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def main() -> int:
    """Exit status 1 where any environment fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", nargs="+", default=[], metavar="VERSION")
    parser.add_argument("--python", nargs="+", default=[sys.executable])
    parser.add_argument("--environment", nargs="+", default=[], metavar="PYTHON")
    parser.add_argument("--check", nargs="+", default=[], metavar="ARGUMENT", help="e.g. quick")
    parser.add_argument("--tests", nargs="*", default=["test_op.py", "test_autograd.py"])
    parser.add_argument("--package", type=Path, default=TESTS.parent, help="default: this tree")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    arguments = parser.parse_args()
    package = arguments.package.resolve()
    checks = [f"--{argument}" for argument in arguments.check]

    rows = []
    with tempfile.TemporaryDirectory(prefix="install-matrix-") as name:
        scratch = Path(name)

        def one(python: str, folder: Path) -> None:
            row = try_installed(python, folder, package, checks, arguments.tests, scratch)
            rows.append(row)
            counts = ", ".join(f"{n} {word}" for word, n in row["tests"].items())
            print(
                f"{'ok  ' if row['passed'] else 'FAIL'} torch {row['torch']:14} "
                f"Python {row['python']:8} check {row['check']}; {counts} in {row['seconds']} s; "
                + ", ".join(f"{name}: {state}" for name, state in row["libraries"].items()),
                flush=True,
            )

        for python in arguments.environment:
            one(python, beside(python, package, scratch))
        for torch in arguments.torch:
            for python in arguments.python:
                one(new_environment(python, torch, package, scratch), scratch / "environment")
                shutil.rmtree(scratch / "environment")
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"package": package.name if package.is_file() else "source", "rows": rows}
    (arguments.out / "versions.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if rows and all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
