"""The table of other libraries' models, from what is installed.

    python -m benchmarks.clients --environments results/clients

A system runs in the environment of its libraries (see environments.py) or, if there is none, in the
one that runs this; systems whose library is in neither are named at the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.clients.exports import EXPORTS
from benchmarks.clients.systems import SYSTEMS, System

DEFAULT_EXPORTS = ("trace", "trace, grad", "torch.export", "ONNX 17", "own ONNX")
ROOT = Path(__file__).resolve().parents[2]


def python_for(system: System, environments: Path | None) -> str | None:
    """The interpreter that can import a system's library."""
    if environments is not None and system.environment:
        python = environments / system.environment / "bin" / "python"
        if python.exists():
            return str(python.absolute())
    return sys.executable if importlib.util.find_spec(system.module) else None


def fails(stock: str, ours: str) -> bool:
    """Whether the accelerated model lacks an export that the stock model has."""
    return not stock.startswith("no:") and ours not in ("yes", "as stock")


def table(rows: list[dict[str, Any]], kinds: list[str]) -> str:
    """The rows in Markdown: agreement and gain, then exports."""
    lines = _header(
        *("model", "library", "layers", "outputs", "gradients", "restored"),
        *("whole model", "operator's share"),
    )
    for row in rows:
        cells = [row["system"], row.get("library", "")]
        if "outputs" in row:
            suffix = "" if row["dtype"] == "float64" else f" ({row['dtype']})"
            cells += [str(row["replaced"]), f"{row['outputs']:.0e}{suffix}"]
            cells += [f"{row['gradients']:.0e}{suffix}", "yes" if row["restored"] else "**no**"]
        else:
            cells += [row.get("errors", {}).get("agreement", "not run"), "", "", ""]
        if "gain" in row:
            low, high = row["spread"]
            before, after = (100 * share for share in row["shares"])
            cells += [f"{row['gain']:.2f}x ({low:.2f}-{high:.2f})"]
            cells += [f"{before:.1f} -> {after:.1f} %"]
        else:
            cells += [row.get("errors", {}).get("timing", "not run"), ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_header("stock -> accelerated", *kinds)]
    for row in rows:
        cells = [row["system"]]
        for kind in kinds:
            stock, ours = row.get("exports", {}).get(kind, ("", ""))
            cells.append(f"{stock.split(':')[0]} -> {ours.split(':')[0]}" if stock else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _header(*cells: str) -> list[str]:
    return ["| " + " | ".join(cells) + " |", "|" + "---|" * len(cells)]


def main() -> int:
    """Exit status 1 where a system fails or an export that the stock model allows does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environments", type=Path, help="folder made by environments.py")
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--parts", nargs="*", default=["agreement", "timing"])
    parser.add_argument("--exports", nargs="*", default=DEFAULT_EXPORTS, choices=EXPORTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "clients.json"
    # rows of an earlier run are kept, so that parts can be run apart
    rows = {row["system"]: row for row in json.loads(file.read_text())} if file.exists() else {}
    absent = []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for name in arguments.systems:
        python = python_for(SYSTEMS[name], arguments.environments)
        if python is None:
            absent.append(name)
            continue
        command = [python, "-m", "benchmarks.clients.one", name]
        command += ["--threads", str(arguments.threads), "--parts", *arguments.parts]
        command += ["--exports", *arguments.exports]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        lines = done.stdout.strip().splitlines()
        row = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {"system": name}
        if "system" in row and len(row) == 1:
            row["errors"] = {"run": f"exit status {done.returncode}"}
        kept = rows.get(name, {})
        row["exports"] = kept.get("exports", {}) | row.get("exports", {})
        rows[name] = kept | row
        if "errors" not in row:
            rows[name].pop("errors", None)
        print(json.dumps(row), file=sys.stderr, flush=True)
        file.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    ordered = [rows[name] for name in SYSTEMS if name in rows]
    kinds = [kind for kind in EXPORTS if any(kind in row.get("exports", {}) for row in ordered)]
    print(table(ordered, kinds))
    if absent:
        print(f"not installed: {', '.join(absent)}")
    broken = [
        row["system"]
        for row in ordered
        if "errors" in row or any(fails(*results) for results in row.get("exports", {}).values())
    ]
    if broken:
        print(f"failed: {', '.join(broken)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
