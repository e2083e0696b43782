"""The command: see the package."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.gates.cycles import __doc__ as description
from benchmarks.gates.cycles import build
from benchmarks.gates.cycles.cases import CASES, Bar, Case, Result, bars, faults, raised, total
from build_tools.toolchain import NotFound

JOBS = 2


def commit_of_kernels() -> str:
    """The last commit that changed the kernels, marked where the tree differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(build.ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    paths = ("--", "csrc/cuda", ":(glob)csrc/*.h")
    changed = git("status", "--porcelain", *paths)
    return git("log", "-1", "--format=%h", *paths) + ("+changes" if changed else "")


def simulate(cases: list[Case], console: Console) -> dict[str, Result]:
    """The results of all cases, with a bar of progress."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(SpinnerColumn(), *columns, console=console) as progress,
        ThreadPoolExecutor(JOBS) as pool,
    ):
        flags = ("-O3", "-march=native")
        model = pool.submit(build.program, build.HERE / "model.cpp", *flags, cuda=True)
        sources = dict.fromkeys((case.source, case.capability) for case in cases)
        compiling = progress.add_task("compiling", total=len(sources) + 1)
        code = {key: pool.submit(build.machine_code, *key) for key in sources}
        waiting: list[Future[Path]] = [model, *code.values()]
        for compiled in waiting:
            compiled.result()
            progress.advance(compiling)
        simulating = progress.add_task("simulating", total=len(cases))

        def one(case: Case) -> Result:
            text = code[case.source, case.capability].result()
            result: Result = json.loads(build.simulated(model.result(), case.arguments(), text))
            progress.advance(simulating)
            return result

        jobs = [pool.submit(one, case) for case in cases]
        try:
            return {case.name: job.result() for case, job in zip(cases, jobs)}
        except RuntimeError:
            pool.shutdown(cancel_futures=True)
            raise


def table_of(results: dict[str, Result]) -> Table:
    """A row for each kernel of a call and cost of a reduced sector.

    a sector   cycles of the second level for a sector that an atomic reduces
    reduced    sectors that atomics reduce
    missed     sectors of loads that are not in the first-level cache
    cache      share of the cycles in which it, or shared memory, passes something
    warps      that are resident, on average
    """
    table = Table(title="simulated cycles of one multiprocessor; they are not times")
    table.add_column("call, kernel", no_wrap=True)
    columns = {
        "blocks": "blocks",
        "registers": "registers",
        "reduced_sector_cost": "a sector",
        "cycles": "cycles",
        "instructions": "instructions",
        "reduced_sectors": "reduced",
        "missed_sectors": "missed",
        "cache_busy": "cache",
        "warps": "warps",
    }
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        table.add_section()
        table.add_row(f"[bold]{name}[/bold] (error {max(result['errors'].values()):.1e})")
        for kernel in result["kernels"]:
            for report in kernel["reports"]:
                figures = kernel | report
                cells = [f"{figures[column]:,}" for column in columns]
                table.add_row(f"  {kernel['kernel'].split('<')[0]}", *cells)
        if len(result["kernels"]) > 1:
            for report in result["kernels"][0]["reports"]:
                cost = report["reduced_sector_cost"]
                sums = [f"{total(result, field, cost):,}" for field in ("cycles", "instructions")]
                table.add_row("  all", "", "", f"{cost}", *sums)
    return table


def bars_table(found: list[Bar]) -> Table:
    """A row for each bar."""
    table = Table(title="bars of docs/design-gpu.md")
    for heading in ("bar", "at most", "share", "", "simulated", "of"):
        table.add_column(heading, justify="left" if heading in ("bar", "") else "right")
    for bar in found:
        verdict = "met" if bar.met else "[red]not met[/red]"
        figures = " and ".join(f"{figure:,}" for figure in bar.figures)
        shares = (f"{bar.limit:g}x", f"{bar.share:.3f}x")
        table.add_row(bar.row, *shares, verdict, figures, f"{bar.of:,}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="calls whose names contain one of these words")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--check", type=Path, help="fail where cycles are above those of this file, or a bar fails"
    )
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 180)
    cases = [c for c in CASES if not options.only or any(word in c.name for word in options.only)]
    if not cases:
        parser.error(f"--only: no call has such a name: {', '.join(c.name for c in CASES)}")
    try:
        versions = build.versions()
        console.print(", ".join(f"{name} {version}" for name, version in versions.items()))
        results = simulate(cases, console)
    except NotFound as error:
        console.print(f"[red]{error}[/red]")
        return 2
    except RuntimeError as error:  # a message of nvcc, of the C++ compiler or of the model
        console.print(str(error), style="red", markup=False)
        return 1
    console.print(table_of(results))
    console.print(bars_table(bars(results)))
    if options.json:
        facts = {"simulated": "cycles of one multiprocessor of a model; not times"}
        facts |= versions | {"kernels": commit_of_kernels()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "calls": results}, indent=1) + "\n")
    wrong = [fault for case in cases for fault in faults(case, results[case.name])]
    if options.check:
        wrong += raised(results, json.loads(options.check.read_text())["calls"])
    for fault in wrong:
        console.print(f"[red]{fault}[/red]")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
