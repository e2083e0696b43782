"""AP against training steps of every recipe, on drawn shapes: table and chart.

    python -m benchmarks.detectors --out results/detr --seeds 3

trains each recipe with each seed (hours on one core) and writes ``table.md``, ``chart.png`` and
``curves.json``. The same command resumes a run that was stopped; finished runs are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from deform_attn.detr.recipes import RECIPES
from deform_attn.detr.train import Settings, train

# AP50 that a recipe must reach; less where its paper reports slow convergence.
BARS = dict.fromkeys(RECIPES, 0.45) | {"dab_deformable_detr": 0.3, "stewart": 0.3}
# Dense attention converges many times more slowly, so these recipes train with larger batches. DETR
# does not correct its boxes layer by layer and also has one more layer.
OTHERWISE = {"detr": {"batch": 64, "layers": 3}, "dab_detr": {"batch": 64}}
Curves = dict[str, dict[str, Any]]  # recipe -> seed -> {"ap": [{"step", "AP", ...}], "cpu_seconds"}


def curves_of(folder: Path, steps: int) -> Curves:
    """The finished runs in a folder."""
    curves: Curves = {}
    for name in RECIPES:
        for file in sorted(folder.glob(f"{name}-[0-9]*/history.json")):
            history = json.loads(file.read_text())
            if len(history["loss"]) == steps:
                seed = file.parent.name.rpartition("-")[2]
                kept = {key: history[key] for key in ("ap", "cpu_seconds")}
                curves.setdefault(name, {})[seed] = kept
    return curves


def final(runs: dict[str, Any], number: str, step: int | None = None) -> list[float]:
    """A metric of each seed, at a step or at the end."""
    return [
        next(row[number] for row in reversed(run["ap"]) if step is None or row["step"] == step)
        for run in runs.values()
    ]


def spread(values: list[float]) -> str:
    """The median, and the range if there are several."""
    middle = f"{statistics.median(values):.2f}"
    return middle + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")


def table(curves: Curves, steps: int) -> str:
    """A Markdown table with a row per recipe."""
    early = steps // 4
    lines = [
        f"| recipe | seeds | AP50 after {early} steps | AP50 after {steps} | AP after {steps} "
        "| CPU seconds a run | bar |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in curves.items():
        reached = final(runs, "AP50")
        verdict = "met" if min(reached) >= BARS[name] else "NOT MET"
        otherwise = "".join(f", {key} {n}" for key, n in OTHERWISE.get(name, {}).items())
        cells = [name + otherwise, len(runs), spread(final(runs, "AP50", early)), spread(reached)]
        seconds = statistics.median(run["cpu_seconds"] for run in runs.values())
        cells += [spread(final(runs, "AP")), f"{seconds:.0f}", f"{BARS[name]}: {verdict}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def chart(curves: Curves, file: Path) -> None:
    """A small panel per recipe: its curve, over those of all others."""
    from matplotlib.figure import Figure

    columns = 5
    rows = -(-len(curves) // columns)
    figure = Figure((12, 0.6 + 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    lines = {
        name: [
            ([0] + [row["step"] for row in run["ap"]], [0] + [row["AP"] for row in run["ap"]])
            for run in runs.values()
        ]
        for name, runs in curves.items()
    }
    for panel, name in zip(panels, lines):
        for other in lines.values():
            for x, y in other:
                panel.plot(x, y, color="#dddddd", linewidth=0.8)
        for x, y in lines[name]:
            panel.plot(x, y, color="#08519c", linewidth=1.8)
        end = statistics.median(y[-1] for _, y in lines[name])
        panel.set_title(f"{name}  {end:.2f}", loc="left", fontsize=8, fontweight="bold")
        panel.set(ylim=(0, 1), xlim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
    for panel in panels[len(lines) :]:
        panel.set_axis_off()
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("AP", fontsize=9)
    figure.suptitle("AP on drawn shapes; gray: the other systems", fontsize=11)
    figure.savefig(file, dpi=130)


def main() -> None:
    """Train the runs that are not finished, then report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detectors", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/detr"), help="folder of the runs")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=1, help="runs of each recipe")
    parser.add_argument("--steps", type=int, default=800, help="a multiple of 8")
    parser.add_argument("--report", action="store_true", help="only report what is finished")
    parser.add_argument("--to", type=Path, help="folder of the report; default: OUT")
    given = parser.parse_args()
    torch.set_num_threads(1)  # which makes the CPU seconds mean something
    for seed in range(given.seeds):
        for recipe in given.recipes:
            done = str(seed) in curves_of(given.out, given.steps).get(recipe, {})
            if not done and not given.report:
                print(f"{recipe}, seed {seed}", flush=True)
                settings = Settings(
                    recipe=recipe,
                    data="shapes",
                    steps=given.steps,
                    seed=seed,
                    evaluate_every=given.steps // 8,
                    **OTHERWISE.get(recipe, {}),
                )
                train(settings, given.out / f"{recipe}-{seed}")
    curves = curves_of(given.out, given.steps)
    if not curves:
        parser.error(f"out: expected finished runs of {given.steps} steps in {given.out}")
    folder = given.to or given.out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "curves.json").write_text(json.dumps(curves, indent=1) + "\n")
    (folder / "table.md").write_text(table(curves, given.steps))
    chart(curves, folder / "chart.png")
    Console().print(Markdown(table(curves, given.steps)))
