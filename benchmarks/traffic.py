"""Counts what the CUDA kernels move, without a GPU: sectors, instructions and atomics.

    python -m benchmarks.traffic [--json traffic.json] [--check tests/simt/traffic.json]

Every named workload, its maps scaled down and its pattern of access kept, runs under the emulator
of tests/simt; each access is counted. Beside our kernels stands the one-thread-per-channel design
of 2020. Counts bound a kernel whose time goes into memory; they are not times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.workloads import WORKLOADS, Inputs, Workload, draw, scaled

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from simt.emulated import Emulated

FACTOR = 0.12  # of each side of the maps
PROCESSORS = 4  # of the modelled GPU: as few for its blocks as 132 are for those of a full workload
KERNELS = Emulated(counting=True)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
Counts = dict[str, float]


def cases() -> Iterator[tuple[Workload, str]]:
    """Each workload in f32, and one of each kind in bf16."""
    for workload in WORKLOADS.values():
        yield workload, "f32"
    for name in ("deformable_detr_encoder_800x1333", "dino_decoder_900q"):
        yield WORKLOADS[name], "bf16"


def summed(counted: dict[tuple[str, str, str], tuple[int, int, int, int]], points: int) -> Counts:
    """Per sampling point: accesses of a lane, sectors, and sectors that miss the modelled L1."""
    figures = dict.fromkeys(
        ("loads", "read", "l1_missed", "written", "atomics", "atomic_sectors"), 0.0
    )
    for (_, _, kind), (_, accesses, sectors, misses) in counted.items():
        if kind == "read":
            figures["loads"] += accesses
            figures["read"] += sectors
            figures["l1_missed"] += misses
        elif kind == "write":
            figures["written"] += sectors
        else:
            figures["atomics"] += accesses
            figures["atomic_sectors"] += sectors
    return {name: round(figure / points, 4) for name, figure in figures.items()}


def count(workload: Workload, dtype: str) -> dict[str, Counts]:
    """Counts of the forward kernels and of each way to the gradients."""
    inputs = draw(scaled(workload, FACTOR), dtype=DTYPES[dtype])
    module = KERNELS.module
    points = inputs.attention_weights.numel()
    found: dict[str, Counts] = {}

    def watched(tensors: dict[str, torch.Tensor]) -> None:
        ranges = [(n, t.data_ptr(), t.numel() * t.element_size()) for n, t in tensors.items()]
        module.watch(ranges, PROCESSORS)

    arguments = _arguments(inputs)
    sources = dict(zip(("value", "shapes", "starts", "locations", "weights"), arguments))
    for way in ("plain", "teams"):
        output = torch.empty_like(inputs.grad_output)
        watched(sources | {"output": output})
        KERNELS.forward(*arguments, inputs.num_points, plain=way == "plain", output=output)
        found[f"forward {way}"] = summed(module.counts(), points)
    for way in ("plain", "scatter", "gather"):
        targets = KERNELS.targets(*arguments, inputs.num_points, way=way)
        names = ("grad_value", "grad_locations", "grad_weights", "sums", "bounds")
        watched(sources | {"grad_output": inputs.grad_output} | dict(zip(names, targets)))
        KERNELS.backward(
            inputs.grad_output, *arguments, inputs.num_points, way=way, targets=targets
        )
        found[f"backward {way}"] = summed(module.counts(), points)
    found["chosen"] = {_way_of(workload): 1.0}
    return found


def _way_of(full: Workload) -> str:
    """The way to the gradients that is chosen for the workload at its full size."""
    points = (1, full.queries, full.heads, sum(full.points))
    return KERNELS.way_of(
        *(torch.empty(1, full.rows, full.heads, full.head_dim), full.levels, None),
        *(torch.empty(*points, 2), torch.empty(points), full.points),
    )


def _arguments(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return (
        *(inputs.value, inputs.spatial_shapes, inputs.level_start_index),
        *(inputs.sampling_locations, inputs.attention_weights),
    )


def table_of(all_counts: dict[str, dict[str, Counts]]) -> Table:
    """A row for each kernel of a workload; figures per sampling point, and as a share of plain."""
    table = Table(title="per sampling point (share of one thread per channel)")
    table.add_column("workload, dtype, kernel", no_wrap=True)
    columns = ("loads", "read", "l1_missed", "written", "atomics", "atomic_sectors")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for case, counts in all_counts.items():
        table.add_section()
        table.add_row(f"[bold]{case}[/bold]")
        for kernel, figures in counts.items():
            if kernel == "chosen":
                continue
            plain = counts[kernel.split()[0] + " plain"]
            cells = []
            for column in columns:
                share = f" {figures[column] / plain[column]:5.2f}x" if plain[column] else ""
                cells.append(f"{figures[column]:.2f}{share}" if figures[column] else "-")
            chosen = " (chosen)" if kernel.split()[1] in counts["chosen"] else ""
            table.add_row(f"  {kernel}{chosen}", *cells)
    return table


def raised(now: dict[str, dict[str, Counts]], before: dict[str, dict[str, Counts]]) -> list[str]:
    """What is counted more often than before, beyond a thousandth."""
    faults = []
    for case, counts in now.items():
        for kernel, figures in counts.items():
            for name, figure in figures.items():
                old = before[case][kernel].get(name, 0.0)
                if figure > old * 1.001 + 1e-3:
                    faults.append(f"{case}, {kernel}: {name} {old} -> {figure}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--check", type=Path, help="fail where a count is above those of this file")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    every = list(cases())
    counts = {
        f"{workload.name} {dtype}": count(workload, dtype)
        for workload, dtype in track(every, "counting", console=console)
    }
    console.print(table_of(counts))
    if options.json:
        options.json.write_text(json.dumps(counts, indent=1) + "\n")
    faults = raised(counts, json.loads(options.check.read_text())) if options.check else []
    for fault in faults:
        console.print(f"[red]{fault}[/red]")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
