"""Presents results: tables on the terminal, Markdown for README and docs, a chart, a comparison.

The results are those of rows.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.op.measure import AGAIN, PHASES, ratio, summary
from benchmarks.op.peers import BASELINE, BASELINE_KERNEL, OURS
from benchmarks.op.rows import KEY, Row, find, seconds

RIVAL = "torch-ms-deform-attn"


def speedup(rows: Sequence[Row], row: Row, phase: str, contestant: str = BASELINE) -> float | None:
    """Speed-up over a contestant in float32 with the same number of threads; median of pairs."""
    base = find(
        rows,
        contestant=contestant,
        dtype="f32",
        **{key: row[key] for key in ("workload", "batch", "device", "threads")},
    )
    if base is None or phase not in row.get("times", {}):
        return None
    return ratio(base["times"][phase], row["times"][phase])["median"]


# The phases that the tables show, in this order.
HEADINGS = {"forward": "forward", AGAIN: "forward again", "forward_backward": "forward + backward"}


def phases_of(row: Row) -> list[str]:
    """The phases of a row that the tables show."""
    return [phase for phase in HEADINGS if phase in row["times"]]


def _spread(times: Sequence[float]) -> str:
    found = summary(times)
    low, high = (100 * (found[edge] / found["median"] - 1) for edge in ("min", "max"))
    return f"{seconds(found['median'])} [dim]{low:+.0f}{high:+.0f}%[/dim]"


def _times(factor: float | None) -> str:
    return "" if factor is None else f"{factor:.1f}x" if factor < 100 else f"{factor:.0f}x"


def _mebibytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


def print_results(console: Console, results: dict[str, Any]) -> None:
    """All tables."""
    print_environment(console, results)
    for workload, batch in dict.fromkeys(
        (row["workload"], row["batch"]) for row in results["rows"]
    ):
        print_workload(console, results["rows"], workload, batch)
    print_cost(console, results["cost"])
    for model in results["models"]:
        print_model(console, model)
    print_missing(console, results["rows"])


def print_environment(console: Console, results: dict[str, Any]) -> None:
    """The machine and the software."""
    facts = results["environment"]
    where = facts["gpu"]["name"] if results["device"] == "cuda" else facts["cpu"]
    console.print(
        f"[bold]{where}[/bold], {facts['cores']} cores, {facts['instruction_set']}, load "
        f"{facts['load']}; torch {facts['torch']}, Python {facts['python']}, "
        f"commit {facts['commit']}"
    )


def print_workload(console: Console, rows: Sequence[Row], workload: str, batch: int) -> None:
    """The table of one workload."""
    rows = [row for row in rows if (row["workload"], row["batch"]) == (workload, batch)]
    table = Table(title=f"{workload}, batch {batch}", title_justify="left", title_style="bold")
    table.add_column("contestant", min_width=20)
    table.add_column("dtype")
    table.add_column("threads", justify="right")
    for heading in ("forward", "fwd again", "backward", "fwd + bwd"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=15)
    table.add_column("fwd / again / both\nvs grid_sample", justify="right", no_wrap=True)
    table.add_column("peak MiB\nfwd / both", justify="right", no_wrap=True)
    for row in rows:
        name = [row["contestant"], row["dtype"], str(row["threads"])]
        if row["status"] == "wrong":
            table.add_row(*name, "WRONG", "no time", style="bold red")
        elif row["status"] == "ok":
            table.add_row(
                *name,
                *(
                    _spread(row["times"][phase]) if phase in row["times"] else "-"
                    for phase in ("forward", AGAIN, *PHASES[1:])
                ),
                " / ".join(filter(None, (_times(speedup(rows, row, p)) for p in phases_of(row)))),
                " / ".join(_mebibytes(row["memory"][part]) for part in PHASES[::2]),
                style="green" if row["contestant"] in OURS[:2] else None,
            )
    console.print(table)
    for row in rows:
        if row["status"] == "wrong":
            name = f"{row['contestant']} {row['dtype']}"
            console.print(f"{name} is wrong: {row['reason']}", style="bold red", markup=False)
    for line in _scaling(rows):
        console.print(line)
    busy = [row["busy"] for row in rows if "times" in row and row["threads"] == 1]
    if busy and rows[0]["device"] == "cpu" and min(busy) < 0.95:
        console.print(
            f"something else took up to {100 * (1 - min(busy)):.0f} % of the core meanwhile",
            style="yellow",
        )


def _scaling(rows: Sequence[Row]) -> list[str]:
    """Threads against one thread, for the backends of deform_attn."""
    lines = []
    for row in rows:
        if "scaling" in row:
            gains = (
                f"{phase.replace('_', ' + ')} {statistics.median(ratios):.2f}x"
                for phase, ratios in row["scaling"].items()
            )
            lines.append(
                f"{row['contestant']} {row['dtype']}, {row['threads']} threads against 1: "
                + ", ".join(gains)
                + _apart(row.get("handover"))
            )
    return lines


def _apart(handover: Sequence[float] | None) -> str:
    """How far apart the cores are: the time grows if they share no cache."""
    if not handover:
        return ""
    return f" (a cache line takes {max(handover):.0f} ns to the other core and back)"


def print_cost(console: Console, costs: Sequence[Row]) -> None:
    """Overhead: microseconds of a call on a tiny problem."""
    table = Table(title="cost of a call (tiny problem)", title_justify="left", title_style="bold")
    table.add_column("contestant")
    for heading in ("no_grad", "recording gradients", "with its backward"):
        table.add_column(heading, justify="right")
    for row in costs:
        times = (row["times"][kind] for kind in ("no_grad", "grad", "grad_backward"))
        table.add_row(row["contestant"], *(_spread(taken) for taken in times))
    console.print(table)


def print_model(console: Console, model: Row) -> None:
    """A whole model, before and after."""
    if model["status"] == "missing":
        console.print(f"{model['model']}: missing ({model['reason']})")
        return
    if model["status"] == "wrong":
        console.print(f"[bold red]{model['model']}: WRONG: {model['reason']}")
        return
    gain = ratio(model["times"]["stock"], model["times"]["deform_attn"])
    console.print(
        f"[bold]{model['model']}[/bold], {model['image']}, {model['threads']} threads: "
        f"{_spread(model['times']['stock'])} as shipped, "
        f"[green]{_spread(model['times']['deform_attn'])}[/green] with deform_attn: "
        f"[green]{gain['median']:.2f}x[/green] ({gain['min']:.2f} to {gain['max']:.2f}); "
        f"the op was {100 * model['share']:.0f} % of the whole; "
        f"outputs differ by {model['difference']:.1e}"
    )


def print_missing(console: Console, rows: Sequence[Row]) -> None:
    """The contestants that could not take part, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] == "missing":
            where = reasons.setdefault((row["contestant"], row["reason"]), [])
            if row["workload"] not in where:
                where.append(row["workload"])
    if not reasons:
        return
    total = len({row["workload"] for row in rows})
    table = Table(title="missing", title_justify="left", title_style="bold")
    for heading in ("contestant", "reason", "workloads"):
        table.add_column(heading)
    for (name, reason), where in reasons.items():
        table.add_row(name, reason, "all" if len(where) == total else ", ".join(where))
    console.print(table)


def print_comparison(console: Console, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Speed-up of the second run over the first, row by row."""
    for name, results in (("A", before), ("B", after)):
        facts = results["environment"]
        console.print(
            f"{name}: {facts['date']}, commit {facts['commit']}, {facts['cpu']}, "
            f"torch {facts['torch']}"
        )
    table = Table(title="A / B: above 1 is faster in B", title_justify="left")
    for heading in KEY:
        table.add_column(heading)
    for heading in ("forward", "backward", "fwd + bwd", "peak memory"):
        table.add_column(heading, justify="right")
    others = {tuple(row[key] for key in KEY): row for row in after["rows"]}
    for row in before["rows"]:
        key = tuple(row[key] for key in KEY)
        other = others.pop(key, None)
        cells = [str(part) for part in key]
        if other is None:
            table.add_row(*cells, "only in A", style="dim")
        elif "times" in row and "times" in other:
            pairs = [_between(row["times"][phase], other["times"][phase]) for phase in PHASES]
            table.add_row(*cells, *pairs, _memory_ratio(row, other))
        elif row["status"] != other["status"]:
            table.add_row(*cells, f"{row['status']} -> {other['status']}", style="red")
    for key in others:
        table.add_row(*(str(part) for part in key), "only in B", style="dim")
    console.print(table)
    console.print("[dim]dim: the ranges of the two runs overlap[/dim]")


def _between(before: Sequence[float], after: Sequence[float]) -> str:
    factor = statistics.median(before) / statistics.median(after)
    if min(before) <= max(after) and min(after) <= max(before):
        return f"[dim]{factor:.2f}[/dim]"
    return f"[{'green' if factor > 1 else 'red'}]{factor:.2f}[/]"


def _memory_ratio(row: Row, other: Row) -> str:
    before, after = (found["memory"]["forward_backward"] for found in (row, other))
    return f"{before / after:.2f}" if before and after else "-"


# Markdown ----------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    """The tables of README and docs/benchmarks.md: one per phase, then threads and whole models."""
    facts, rows = results["environment"], results["rows"]
    cuda = results["device"] == "cuda"
    kernels = facts["builds"].get("cpu", {}).get("instruction_set", "no compiled kernels")
    machine = facts["gpu"]["name"] if cuda else f"{facts['cpu']}, {kernels}"
    lines = [
        f"{machine}, torch {facts['torch']}, Python {facts['python']}, commit {facts['commit']}, "
        f"{facts['date'][:10]}. float32, batch 1{'' if cuda else ', one thread'}; medians of "
        "paired rounds. In brackets: how many times as fast deform_attn is.",
    ]
    for phase, heading in HEADINGS.items():
        table = _markdown_phase(rows, phase)
        if table:
            lines += [
                "",
                f"| {heading} | deform_attn | {BASELINE} | {RIVAL} |",
                "|---|---|---|---|",
            ]
            lines += table
    lines += _markdown_scaling(rows) + _markdown_models(results["models"])
    return "\n".join(lines)


def _markdown_phase(rows: Sequence[Row], phase: str) -> list[str]:
    """A line per workload: our time, and those of the others with our speed-up over them."""
    lines = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        same = [row for row in rows if (row["workload"], row["batch"]) == (workload, 1)]
        threads = min((row["threads"] for row in same), default=1)
        fields = {"dtype": "f32", "threads": threads}
        found = (find(same, contestant=name, **fields) for name in OURS)
        ours = next((row for row in found if row is not None), None)
        if ours is None or phase not in ours["times"]:
            continue
        cells = [_cell_of(ours, phase)]
        for name in (BASELINE, RIVAL):
            row = find(same, contestant=name, **fields)
            factor = speedup(same, ours, phase, name)
            cells.append(f"{_cell_of(row, phase)} ({_times(factor)})" if row and factor else "-")
        lines.append(" | ".join(["| " + workload, *cells]) + " |")
    return lines


def _markdown_scaling(rows: Sequence[Row]) -> list[str]:
    lines = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        found = _scaling([row for row in rows if (row["workload"], row["batch"]) == (workload, 1)])
        lines += [f"{workload}: {line}." for line in found]
    return ["", *lines] if lines else []


def _markdown_models(models: Sequence[Row]) -> list[str]:
    measured = [model for model in models if model["status"] == "ok"]
    if not measured:
        return []
    lines = [
        "",
        "| whole model | input | threads | as shipped | with deform_attn | speed-up | op's share |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in measured:
        stock, ours = model["times"]["stock"], model["times"]["deform_attn"]
        lines.append(
            f"| {model['model']} | {model['image']} | {model['threads']} "
            f"| {seconds(statistics.median(stock))} | {seconds(statistics.median(ours))} "
            f"| {ratio(stock, ours)['median']:.2f}x | {100 * model['share']:.0f} % |"
        )
    return lines


# Chart -------------------------------------------------------------------------------------------

COLORS = {  # of the contestants, in the order of their bars
    "compiled": "#0072b2",
    "triton": "#56b4e9",
    RIVAL: "#e69f00",
    "mmcv": "#009e73",
    "original extension": "#cc79a7",
    "deformops": "#d55e00",
    "msda-triton": "#f0e442",
    "hub kernel": "#000000",
    BASELINE_KERNEL: "#882255",
    "reference": "#999999",
}


def chart(results: dict[str, Any], file: Path) -> None:
    """Speed-up over grid_sample as bars, forward and forward + backward; below, whole models."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = _bars(results["rows"])
    models = [model for model in results["models"] if model["status"] == "ok"]
    lowest = max((bar["y"] for bar in bars), default=0)
    heights = [1 + 0.26 * lowest, 0.6 + 0.6 * len(models)] if models else [1 + 0.26 * lowest]
    figure = plt.figure(figsize=(12, 1 + sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]

    panels = parts[0].subplots(1, 2, sharey=True)
    for panel, phase, title in zip(panels, PHASES[::2], ("forward", "forward + backward")):
        for bar in bars:
            row, factor = bar["row"], bar[phase]
            panel.barh(bar["y"], factor, 0.88, color=COLORS[row["contestant"]])
            _annotate(panel, factor, bar["y"], f"{_times(factor)}  ({_cell_of(row, phase)})")
        panel.axvline(1, color="black", linewidth=0.8, linestyle=":")
        _style(panel, title, "times as fast as the grid_sample formula in PyTorch (dotted: 1x)")
    middles: dict[str, list[float]] = {}
    for bar in bars:
        middles.setdefault(_group_label(bar["row"]), []).append(bar["y"])
    panels[0].set_yticks([statistics.mean(ys) for ys in middles.values()], list(middles))
    panels[0].set_ylim(lowest + 0.8, -0.8)
    panels[0].tick_params(axis="y", length=0)
    panels[1].tick_params(axis="y", length=0)
    names = [name for name in COLORS if any(bar["row"]["contestant"] == name for bar in bars)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in names]
    shown = [f"deform_attn, {name}" if name in OURS else name for name in names]
    parts[0].legend(handles, shown, loc="outside upper center", ncols=len(shown), frameon=False)

    if models:
        panel = parts[1].subplots()
        labels = []
        for i, model in enumerate(models):
            stock = statistics.median(model["times"]["stock"])
            ours = statistics.median(model["times"]["deform_attn"])
            gain = ratio(model["times"]["stock"], model["times"]["deform_attn"])["median"]
            for y, time, color in ((2 * i, stock, "#999999"), (2 * i + 1, ours, COLORS[OURS[0]])):
                panel.barh(y + i * 0.4, time, 0.88, color=color)
            _annotate(panel, stock, 2 * i + i * 0.4, f"{seconds(stock)} as shipped")
            text = f"{seconds(ours)} with deform_attn: {_times(gain)}"
            _annotate(panel, ours, 2 * i + 1 + i * 0.4, text)
            labels.append(f"{model['model']}, {model['image']}\n{_threads(model)}")
        panel.set_yticks([2.4 * i + 0.5 for i in range(len(models))], labels)
        panel.set_ylim(2.4 * len(models) - 0.5, -0.9)
        panel.tick_params(axis="y", length=0)
        _style(panel, "whole model, inference on a photograph", "seconds an image")

    facts = results["environment"]
    machine = facts["gpu"]["name"] if results["device"] == "cuda" else facts["cpu"]
    software = f"float32, torch {facts['torch']}"
    figure.suptitle(f"Multi-scale deformable attention: {machine}, {software}", fontsize=11)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _bars(rows: Sequence[Row]) -> list[Row]:
    """A bar per float32 row that has a baseline: its position and length."""
    bars: list[Row] = []
    y, group = 0.0, None
    order = list(COLORS)
    shown = [
        row
        for row in rows
        if "times" in row and row["dtype"] == "f32" and row["contestant"] in COLORS
    ]
    groups = list(dict.fromkeys(_group_label(row) for row in shown))
    shown.sort(key=lambda r: (groups.index(_group_label(r)), order.index(r["contestant"])))
    for row in shown:
        factors = {phase: speedup(rows, row, phase) for phase in PHASES[::2]}
        if None in factors.values():
            continue
        y += 0 if group is None else 1 if _group_label(row) == group else 1.8
        group = _group_label(row)
        bars.append({"row": row, "y": y, **factors})
    return bars


def _annotate(panel: Any, x: float, y: float, text: str) -> None:
    panel.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)


def _style(panel: Any, title: str, label: str) -> None:
    panel.set_title(title, loc="left", fontweight="bold", fontsize=10)
    panel.set_xlabel(label, fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.25)
    panel.set_xlim(left=0)


def _cell_of(row: Row, phase: str) -> str:
    return seconds(summary(row["times"][phase])["median"])


def _threads(row: Row) -> str:
    return f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"


def _group_label(row: Row) -> str:
    details = [f"batch {row['batch']}"] if row["batch"] > 1 else []
    details += [_threads(row)] if row["device"] == "cpu" else []
    return "\n".join([row["workload"], ", ".join(details)]) if details else str(row["workload"])
