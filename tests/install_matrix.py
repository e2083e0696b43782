"""Installs the package beside several versions of torch and Python, and tests the operator there.

    python tests/install_matrix.py --torch 2.10.0 2.13.0 newest --python python3.10 python3.13
    python tests/install_matrix.py --torch 2.10.0 newest --wheel dist/deform_attn-0.1.0-....whl

Each pair gets an empty environment with that torch, where pip builds the package from source, or
installs the wheel. The tests run there on the compiled backend, against the installed package; then
the environment is removed. Downloads up to 3 GB for each torch.
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


def try_install(package: Path, python: str, torch: str, files: list[str], scratch: Path) -> dict:
    """Installs torch and the package (a source tree or a wheel), and runs the tests."""
    environment, work = scratch / "environment", scratch / "work"
    for folder in (environment, work):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(TESTS, work / "tests", ignore=shutil.ignore_patterns("__pycache__", "simt"))
    run([python, "-m", "venv", str(environment)])
    bin_python = str(environment / "bin" / "python")
    install = [bin_python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    requirement = "torch" if torch == "newest" else f"torch=={torch}"
    run([*install, "--cache-dir", str(scratch / "cache"), requirement])
    run([*install, "numpy", "pytest", "hypothesis"])
    run([*install, str(package)], DEFORM_ATTN_REQUIRE_EXT="1")
    facts = json.loads(run([bin_python, "-c", FACTS], cwd=work).splitlines()[-1])
    assert Path(facts["where"]).is_relative_to(environment), f"tested {facts['where']} instead"

    command = [bin_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--runners"]
    command += ["compiled/cpu", *(f"tests/{file}" for file in files)]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    printed = done.stdout.strip().splitlines() or [done.stderr.strip()]
    if done.returncode != 0:
        print(done.stdout[-6000:], done.stderr[-2000:], sep="\n")
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", printed[-1])
    counts = {word: int(number) for number, word in found}
    shutil.rmtree(environment)
    return facts | {
        "passed": done.returncode == 0 and facts["libraries"]["cpu"] == "loaded",
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
    parser.add_argument("--torch", nargs="+", required=True, metavar="VERSION")
    parser.add_argument("--python", nargs="+", default=[sys.executable])
    parser.add_argument("--tests", nargs="+", default=["test_op.py", "test_autograd.py"])
    parser.add_argument("--wheel", type=Path, help="install this instead of building from source")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    arguments = parser.parse_args()
    package = arguments.wheel.resolve() if arguments.wheel else TESTS.parent

    rows = []
    with tempfile.TemporaryDirectory(prefix="install-matrix-") as scratch:
        for torch in arguments.torch:
            for python in arguments.python:
                row = try_install(package, python, torch, arguments.tests, Path(scratch))
                rows.append(row)
                counts = ", ".join(f"{n} {word}" for word, n in row["tests"].items())
                print(
                    f"{'ok  ' if row['passed'] else 'FAIL'} torch {row['torch']:14} "
                    f"Python {row['python']:8} {counts} in {row['seconds']} s; "
                    + ", ".join(f"{name}: {state}" for name, state in row["libraries"].items()),
                    flush=True,
                )
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"package": arguments.wheel.name if arguments.wheel else "source", "rows": rows}
    (arguments.out / "versions.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
