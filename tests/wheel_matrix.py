"""Does one wheel serve every torch and Python? Builds it once, then tests it in fresh environments.

    python tests/wheel_matrix.py --torch 2.10.0 2.11.0 2.13.0 --python python3.11 python3.12

The wheel is built by this interpreter with its torch. Each pair of torch and Python then gets an
empty environment with that torch, the wheel, and no compiler or header of ours, runs the tests on
the compiled backend there, and is removed again. Downloads up to 3 GB for each torch.
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


def build_wheel(folder: Path) -> Path:
    """Both libraries where nvcc is found, the CPU's alone elsewhere."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(folder), str(TESTS.parent)]
    subprocess.run(command, env=os.environ | {"DEFORM_ATTN_REQUIRE_EXT": "1"}, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def try_wheel(wheel: Path, python: str, torch: str, files: list[str], scratch: Path) -> dict:
    """Install the wheel beside this torch, and run the tests against what was installed."""
    environment, work = scratch / "environment", scratch / "work"
    for folder in (environment, work):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(TESTS, work / "tests", ignore=shutil.ignore_patterns("__pycache__", "simt"))
    run([python, "-m", "venv", str(environment)])
    bin_python = str(environment / "bin" / "python")
    install = [bin_python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*install, "--cache-dir", str(scratch / "cache"), f"torch=={torch}"])
    run([*install, str(wheel), "numpy", "pytest", "hypothesis"])
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


def run(command: list[str], cwd: Path | None = None) -> str:
    """What a command prints; its own error where it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def main() -> int:
    """Exit status 1 where the wheel fails anywhere."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", nargs="+", default=["2.10.0", "2.11.0", "2.13.0"])
    parser.add_argument("--python", nargs="+", default=[sys.executable])
    parser.add_argument("--tests", nargs="+", default=["test_op.py", "test_autograd.py"])
    parser.add_argument("--wheel", type=Path, help="try this one instead of building one")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    arguments = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory(prefix="wheel-matrix-") as folder:
        scratch = Path(folder)
        wheel = (arguments.wheel or build_wheel(scratch / "wheel")).resolve()
        print(f"{wheel.name}, {wheel.stat().st_size / 1024:.0f} KB")
        for torch in arguments.torch:
            for python in arguments.python:
                row = try_wheel(wheel, python, torch, arguments.tests, scratch)
                rows.append(row)
                counts = ", ".join(f"{n} {word}" for word, n in row["tests"].items())
                print(
                    f"{'ok  ' if row['passed'] else 'FAIL'} torch {row['torch']:14} "
                    f"Python {row['python']:8} {counts} in {row['seconds']} s; "
                    + ", ".join(f"{name}: {state}" for name, state in row["libraries"].items()),
                    flush=True,
                )
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"wheel": wheel.name, "rows": rows}
    (arguments.out / "wheels.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
