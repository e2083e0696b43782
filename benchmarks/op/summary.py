"""One page on a run of `make gpu`: the device, each step, the choices, the tests, the times.

    python -m benchmarks.op.summary FOLDER     reads what .ci/gpu wrote there, writes summary.md

Needs neither rich nor matplotlib. What is not there yet is left out: the page of an unfinished run
holds what it had.
"""

from __future__ import annotations

import json
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.op.measure import PHASES, ratio
from benchmarks.op.peers import KERNELS, OURS, PEERS
from benchmarks.op.rows import KEY, Row, failures, find, seconds
from benchmarks.op.tune import choices, is_wrong

SANITIZERS = ("memcheck", "racecheck")
SHOWN = (PHASES[0], PHASES[2])  # forward, forward + backward


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def steps(folder: Path) -> list[str]:
    """A line for each step: its result, its seconds and its limit."""
    results = {"0": "passed", "124": "**timed out**", "137": "**timed out**"}
    results["missing"] = "**not run**: a module is missing"
    rows = []
    file = folder / "steps.tsv"
    for line in file.read_text().splitlines() if file.exists() else ():
        name, status, seconds, limit = line.split("\t")
        rows.append((name, results.get(status, "**failed**"), seconds, limit))
    return _table(("step", "result", "seconds", "at most"), rows)


def tests(report_file: Path) -> list[str]:
    """Counts of a JUnit report, and the first names of what did not pass."""
    name = report_file.stem
    if not report_file.exists():
        return [f"{name}: no report."]
    suite = next(ElementTree.parse(report_file).getroot().iter("testsuite"))
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    passed = count.pop("tests") - sum(count.values())
    others = ", ".join(f"{number} {key}" for key, number in count.items())
    lines = [f"{name}: {passed} passed, {others}."]
    for case in suite.iter("testcase"):
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                message = (child.get("message") or "").split("\n")[0][:150]
                lines.append(f"- {child.tag}: `{case.get('name')}`: {message}")
    return lines[:21]


def sanitizers(folder: Path) -> list[str]:
    """The verdict of each tool, or that it gave none."""
    lines = []
    for tool in SANITIZERS:
        log = folder / f"{tool}.log"
        printed = log.read_text().splitlines() if log.exists() else []
        verdicts = [line.strip("= ") for line in printed if "SUMMARY" in line]
        lines.append(f"- {tool}: {verdicts[-1] if verdicts else '**no verdict**'}")
    return lines


def faster(rows: Sequence[Row], row: Row, contestant: str, phase: str) -> float | None:
    """How many times as fast a row is as a contestant in the same call; median of pairs."""
    same = {key: row[key] for key in KEY if key != "contestant"}
    other = find(rows, contestant=contestant, **same)
    if other is None:
        return None
    return ratio(other["times"][phase], row["times"][phase])["median"]


def _factors(found: Sequence[float | None]) -> str:
    return " / ".join("-" if factor is None else f"{factor:.2f}x" for factor in found)


def times(rows: Sequence[Row]) -> list[str]:
    """Two tables: the times, and how many times as fast the compiled kernels are."""
    timed = [row for row in rows if "times" in row]
    names = [name for name in PEERS if any(row["contestant"] == name for row in timed)]
    absolute, relative = [], []
    for workload, dtype in dict.fromkeys((row["workload"], row["dtype"]) for row in timed):
        here = [row for row in timed if (row["workload"], row["dtype"]) == (workload, dtype)]
        found = {name: find(here, contestant=name) for name in names}
        absolute.append((f"{workload} {dtype}", *map(_cell, found.values())))
        ours = found.get(OURS[0])
        if ours is not None:
            against = {
                name: [faster(here, ours, name, phase) for phase in SHOWN]
                for name, row in found.items()
                if row is not None
            }
            cells = [_factors(against.get(name, (None, None))) for name in (*KERNELS, OURS[1])]
            rivals = [name for name in against if name not in (*OURS, *KERNELS)]
            best = min(rivals, key=lambda name: against[name][1], default=None)
            cells.append("-" if best is None else f"{_factors(against[best])} ({best})")
            relative.append((f"{workload} {dtype}", *cells))
    return [
        *_table(("forward / forward + backward", *names), absolute),
        "",
        *_table(("compiled is faster by", *KERNELS, OURS[1], "best peer"), relative),
    ]


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return " / ".join(seconds(statistics.median(row["times"][phase])) for phase in SHOWN)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Where another contestant was faster than the kernels that a call chooses."""
    lines = []
    for name, settles in (
        (OURS[1], "the order of the backends in deform_attn/backends/__init__.py"),
        ("compiled, scatter", "choose_backward in csrc/cuda/launch.cuh"),
        ("compiled, fixed", "choose_backward in csrc/cuda/launch.cuh"),
    ):
        slower = []
        for row in rows:
            if row["contestant"] == OURS[0] and "times" in row:
                factor = faster(rows, row, name, SHOWN[1])
                if factor is not None and factor < 0.97:  # 3 %: less is noise
                    slower.append(f"{row['workload']} {row['dtype']} ({1 / factor:.2f}x)")
        lines.append(
            f"- `{name}` is faster than the choice of {settles}: {', '.join(slower) or 'nowhere'}"
        )
    return lines


def kernels(rows: Sequence[Row]) -> list[str]:
    """The table of tune.py: seconds of each contestant, a line per workload, dtype and phase."""
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    lines = []
    for workload, dtype in dict.fromkeys((row["workload"], row["dtype"]) for row in rows):
        here = {
            row["contestant"]: row
            for row in rows
            if (row["workload"], row["dtype"]) == (workload, dtype)
        }
        for phase in PHASES:
            cells = [
                seconds(here[name]["seconds"][phase])
                if "seconds" in here[name]
                else ("**wrong**" if is_wrong(here[name]) else "-")
                for name in names
            ]
            lines.append((f"{workload} {dtype} {phase}", *cells))
    return _table(("", *names), lines)


def _loaded(file: Path) -> Any:
    """The JSON of a file; None where there is none, or half of one."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def page(folder: Path) -> str:
    """The whole page, of the files that exist."""
    results, tuned = _loaded(folder / "bench.json"), _loaded(folder / "tune.json")
    title = "# Nothing was timed"
    if results or tuned:
        facts = (results or tuned)["environment"]
        gpu = facts.get("gpu") or {"name": facts["cpu"], "capability": "-", "cuda": None}
        title = f"# {gpu['name']}"
        title += f"\n\nCompute capability {gpu['capability']}, CUDA {gpu['cuda']}, torch "
        title += (
            f"{facts['torch']}, Python {facts['python']}, commit {facts['commit']}, {facts['date']}"
        )
    lines = [title, "", *steps(folder)]
    check = folder / "check.log"
    if check.exists():
        lines += ["", "```", *check.read_text().splitlines()[-60:], "```"]
    if tuned:
        lines += ["", *kernels(tuned["rows"]), "", *(f"- {c}" for c in choices(tuned["rows"]))]
    for name in ("first", "tests"):
        lines += ["", *tests(folder / f"{name}.xml")]
    lines += ["", *sanitizers(folder)]
    if results:
        wrong = failures(results)
        lines += ["", f"Wrong results: {'; '.join(wrong) or 'none'}.", "", *times(results["rows"])]
        lines += ["", *verdicts(results["rows"])]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    folder = Path(argv[0])
    text = page(folder)
    (folder / "summary.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
