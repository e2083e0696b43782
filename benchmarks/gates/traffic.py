"""Counts what the CUDA kernels move, without a GPU: sectors, instructions, atomics and bytes.

    python -m benchmarks.gates.traffic [--json traffic.json] [--check tests/simt/traffic.json]

Every named workload runs at its full size under the emulator of tests/simt, on some multiprocessors
of an H100; each access is counted and scaled up to all of them. Beside our kernels stands the
one-thread-per-channel design of 2020, and beside the fused layer what PyTorch moves without it.
Counts bound a kernel whose time goes into memory; they are not times.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.op.workloads import WORKLOADS, Workload, WorkloadInputs, draw, scaled
from tests.simt.emulated import Emulated

KERNELS = Emulated(counting=True)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SECTOR = 32
FUSED = "deformable_detr_encoder_800x1333"  # where the bytes of a whole layer are held to a bar
DETERMINISTIC = "fixed"  # the algorithm, of every workload
FIXED = "fixed reference"  # reference points without a gradient
MASKED = "masked"  # with a value_mask; counted for FUSED
Counts = dict[str, float]


# What tests/simt/test_traffic.py counts: one of each kind, small
SMALL = tuple(scaled(WORKLOADS[name], 0.5) for name in (FUSED, "rtdetr_decoder_640"))


def cases() -> Iterator[tuple[Workload, str]]:
    """Each workload in f32, one of each kind in bf16, and the small ones of the tests."""
    for workload in WORKLOADS.values():
        yield workload, "f32"
    for name in (FUSED, "dino_decoder_900q"):
        yield WORKLOADS[name], "bf16"
    for workload in SMALL:
        yield workload, "f32"


@dataclasses.dataclass
class Counter:
    """Runs calls of a workload on some of the multiprocessors."""

    points: int
    processors: list[int]

    def run(self, tensors: dict[str, Tensor], call: Callable[[], Any]) -> Counts:
        """Counts per sampling point.

        loads           numbers and vectors that lanes read
        read, written   32-byte sectors, of a warp's instruction each once
        l1_missed       sectors read that miss the modelled L1
        atomics         numbers and vectors that lanes add to memory
        atomic_sectors  as above
        l2_bytes        what goes to L2: l1_missed, written and atomic_sectors
        least_bytes     what a kernel must get from memory and bring back there: each sector it
                        reads or writes once, those it adds to twice
        """
        ranges = [(n, t.data_ptr(), t.numel() * t.element_size()) for n, t in tensors.items()]
        KERNELS.module.watch(ranges, KERNELS.processors, self.processors)
        call()
        figures: Counts = dict.fromkeys(
            ("loads", "read", "l1_missed", "written", "atomics", "atomic_sectors"), 0.0
        )
        least = 0.0
        for (_, _, kind), counted in KERNELS.module.counts().items():
            _, accesses, sectors, misses, distinct = counted
            least += distinct * (2 if kind == "atomic" else 1)
            if kind == "read":
                figures["loads"] += accesses
                figures["read"] += sectors
                figures["l1_missed"] += misses
            elif kind == "write":
                figures["written"] += sectors
            else:
                figures["atomics"] += accesses
                figures["atomic_sectors"] += sectors
        moved = sum(figures[name] for name in ("l1_missed", "written", "atomic_sectors"))
        figures |= {"l2_bytes": SECTOR * moved, "least_bytes": SECTOR * least}
        return {name: figure / self.points for name, figure in figures.items()}


def count(workload: Workload, dtype: str) -> dict[str, Counts]:
    """Counts of the forward kernels and of each backward algorithm."""
    inputs = draw(workload, dtype=DTYPES[dtype])
    # of an encoder's two, which have half of the heads: looking along an axis, and not; of a
    # decoder's all, as the queries of its blocks have nothing in common
    processors = [0, 33] if workload.encoder else list(range(KERNELS.processors))
    counter = Counter(inputs.attention_weights.numel(), processors)
    given, layer = _arguments(inputs), _layer_arguments(inputs)
    names = ("value", "shapes", "starts")
    sources = dict(zip((*names, "locations", "weights"), given))
    layer_sources = dict(zip((*names, "reference", "offsets", "logits"), layer))
    found: dict[str, Counts] = {}

    def forward(name: str, tensors: dict[str, Tensor], call: Callable[[Tensor], Any]) -> None:
        output = torch.empty_like(inputs.grad_output)
        tensors = tensors | {"output": output}
        found[f"forward {name}"] = counter.run(tensors, lambda: call(output))

    forward("baseline", sources, lambda to: KERNELS.forward(*given, baseline=True, output=to))
    forward("teams", sources, lambda to: KERNELS.forward(*given, output=to))
    forward("fused", layer_sources, lambda to: KERNELS.fused_forward(*layer, output=to))
    mask = padding(inputs)
    if workload.name.startswith(FUSED) and dtype == "f32":
        forward(
            f"fused, {MASKED}",
            layer_sources | {"mask": mask},
            lambda to: KERNELS.fused_forward(*layer, output=to, value_mask=mask),
        )

    def backward(
        algorithm: str, fused: bool = False, reference: bool = True, **options: Any
    ) -> Counts:
        arguments: tuple[Any, ...] = given
        if fused:
            value, shapes, starts, anchors, *rest = layer
            arguments = (value, shapes, starts, *rest[:3], anchors, rest[3])
        targets = KERNELS.targets(*arguments, algorithm=algorithm, output_mask=(True, reference))
        filled = [targets[4]]  # with zeros, by PyTorch
        if targets[4].numel() == 0:
            filled.append(targets[0])
        written = {f"target {i}": target for i, target in enumerate(targets)}
        tensors = (layer_sources if fused else sources) | {"grad": inputs.grad_output} | written
        if options:
            tensors["mask"] = mask
        run = KERNELS.fused_backward if fused else KERNELS.backward
        call = layer if fused else given

        def once() -> None:
            run(inputs.grad_output, *call, algorithm=algorithm, targets=targets, **options)

        figures = counter.run(tensors, once)
        zeros = sum(t.numel() * t.element_size() for t in filled) / counter.points
        figures["l2_bytes"] += zeros
        figures["least_bytes"] += zeros
        return figures

    algorithm = KERNELS.chosen_algorithm(*given)
    for name in dict.fromkeys(("baseline", "scatter", algorithm, DETERMINISTIC)):
        found[f"backward {name}"] = backward(name)
    found[f"backward {algorithm} fused"] = backward(algorithm, fused=True)
    found[f"backward {algorithm} fused, {FIXED}"] = backward(algorithm, fused=True, reference=False)
    if workload.name.startswith(FUSED) and dtype == "f32":
        which = f"backward {algorithm} fused, {MASKED}"
        found[which] = backward(algorithm, fused=True, value_mask=mask)
    found = {
        kernel: {name: round(figure, 4) for name, figure in figures.items()}
        for kernel, figures in found.items()
    }
    found["chosen"] = {algorithm: 1.0}
    return found


def _arguments(inputs: WorkloadInputs) -> tuple[Any, ...]:
    return (
        *(inputs.value, inputs.spatial_shapes, inputs.level_start_index),
        *(inputs.sampling_locations, inputs.attention_weights, inputs.num_points),
    )


def _layer_arguments(inputs: WorkloadInputs) -> tuple[Any, ...]:
    """A layer that samples at the same points: offsets in pixels from their mean."""
    shapes = inputs.spatial_shapes
    locations = inputs.sampling_locations
    if inputs.num_points is None:
        locations = locations.flatten(3, 4)
        counts = [inputs.sampling_locations.shape[4]] * len(shapes)
    else:
        counts = inputs.num_points
    reference = locations.mean((2, 3))  # [B, Q, 2]
    sizes = shapes.flip(-1).repeat_interleave(torch.tensor(counts), 0)  # [K, 2]: width, height
    offsets = (locations - reference[:, :, None, None]) * sizes
    return (
        *(inputs.value, shapes, inputs.level_start_index),
        reference[:, :, None].expand(-1, -1, len(shapes), -1).contiguous(),
        offsets.to(inputs.value.dtype).contiguous(),
        inputs.attention_weights.flatten(3).log()
        if inputs.num_points is None
        else inputs.attention_weights.log(),
        *(counts, 1.0),
    )


def padding(inputs: WorkloadInputs) -> Tensor:
    """A mask ``[B, S]`` of images that fill three quarters of the width of their batch."""
    rows = [
        (torch.arange(width) >= 0.75 * width).expand(height, width).flatten()
        for height, width in inputs.spatial_shapes.tolist()
    ]
    return torch.cat(rows).expand(inputs.value.shape[0], -1).contiguous()


def torch_bytes(workload: Workload) -> dict[str, Counts]:
    """Bytes per point that PyTorch moves in a layer of float32 that is not fused.

    As Deformable DETR writes it: a softmax, offsets / sizes, reference points + that; each is a
    kernel that reads its inputs from memory and writes its output there. Backward: the gradients of
    the division and of the softmax, and the sum over heads and points that reference points get
    where they want a gradient. A mask: ``masked_fill`` of value, and of its gradient.
    """
    reference = 8 * len(workload.levels) / (workload.heads * sum(workload.points))
    softmax, divided, added = 4 + 4, 8 + 8, 8 + 8 + reference
    pixels = workload.rows * workload.heads * workload.head_dim
    points = workload.queries * workload.heads * sum(workload.points)
    fill = (2 * 4 * pixels + workload.rows) / points
    return {
        "forward": {"softmax": softmax, "divide": divided, "add": added},
        "backward": {"softmax": 4 + 4 + 4, "divide": divided},
        "reference": {"sum": 8 + reference},
        MASKED: {"masked_fill": fill},
    }


def layer_table(counts: dict[str, Counts]) -> dict[str, tuple[float, float]]:
    """Bytes per point of the layer of FUSED: {what: (fused, not fused)}."""
    torch_moves = {name: sum(b.values()) for name, b in torch_bytes(WORKLOADS[FUSED]).items()}
    (algorithm,) = counts["chosen"]
    rows = {}
    for measure in ("least_bytes", "l2_bytes"):
        fused, plain = counts["forward fused"][measure], counts["forward teams"][measure]
        plain += torch_moves["forward"]
        rows[f"forward, {measure}"] = (fused, plain)
        plain += counts[f"backward {algorithm}"][measure] + torch_moves["backward"]
        for which, summed in (("", torch_moves["reference"]), (f", {FIXED}", 0.0)):
            moved = fused + counts[f"backward {algorithm} fused{which}"][measure]
            rows[f"forward + backward{which}, {measure}"] = (moved, plain + summed)
        masked = counts[f"forward fused, {MASKED}"][measure]
        fill = torch_moves[MASKED]
        unmasked = counts["forward teams"][measure] + torch_moves["forward"] + fill
        rows[f"forward, {MASKED}, {measure}"] = (masked, unmasked)
        masked += counts[f"backward {algorithm} fused, {MASKED}"][measure]
        plain += torch_moves["reference"] + 2 * fill
        rows[f"forward + backward, {MASKED}, {measure}"] = (masked, plain)
    return rows


@dataclasses.dataclass
class Bar:
    """What the kernels are held to: the worst figure of all that it is about."""

    text: str
    limit: float
    figure: float = 0.0
    where: str = "-"

    @property
    def met(self) -> bool:
        return self.figure <= self.limit + 1e-4  # figures are rounded

    def add(self, figure: float, where: str) -> None:
        if figure > self.figure or self.where == "-":
            self.figure, self.where = figure, where


def bars(counts: dict[str, dict[str, Counts]]) -> list[Bar]:
    """The bars, each with its worst figure."""
    loads = Bar("forward: loads, of one thread per channel", 1 / 4)
    read = Bar("forward: sectors read, of one thread per channel", 0.92)
    narrow = Bar("forward: sectors read in bf16, of f32", 0.6)
    missed = Bar("forward, encoder: sectors that miss the modelled L1", 0.5)
    atomics = Bar("backward: atomics, of one thread per channel", 1 / 4)
    encoder = Bar("backward, encoder: atomic sectors", 0.6)
    others = Bar("backward, elsewhere: atomic sectors", 1)
    gathered = Bar("deterministic backward: sectors, of the atomic one", 3)
    small = {workload.name for workload in SMALL}
    for case, found in counts.items():
        if case.split()[0] in small:
            continue
        plain, ours = found["forward baseline"], found["forward teams"]
        loads.add(ours["loads"] / plain["loads"], case)
        if case.endswith("f32"):
            if WORKLOADS[case.split()[0]].head_dim == 32:
                read.add(ours["read"] / plain["read"], case)
        else:
            wide = counts[case.replace("bf16", "f32")]["forward teams"]
            narrow.add(ours["read"] / wide["read"], case)
        if "encoder" in case:
            missed.add(ours["l1_missed"] / plain["l1_missed"], case)
        plain = found["backward baseline"]
        (algorithm,) = found["chosen"]
        ours = found[f"backward {algorithm}"]
        atomics.add(ours["atomics"] / plain["atomics"], case)
        sectors = ours["atomic_sectors"] / plain["atomic_sectors"]
        (encoder if "encoder" in case else others).add(sectors, case)
        # files of counts from before fixed point have gather
        deterministic = DETERMINISTIC if f"backward {DETERMINISTIC}" in found else "gather"
        moved = [
            sum(found[f"backward {name}"][kind] for kind in ("read", "written", "atomic_sectors"))
            for name in (deterministic, "scatter")
        ]
        gathered.add(moved[0] / moved[1], case)
    found_bars = [loads, read, narrow, missed, atomics, encoder, others, gathered]
    for what, (fused, unfused) in layer_table(counts[f"{FUSED} f32"]).items():
        limit = 0.5 if what.startswith("forward,") else 0.6
        found_bars.append(Bar(f"layer fused: {what}", limit, fused / unfused, FUSED))
    return found_bars


def bars_table(found: list[Bar]) -> Table:
    """A row for each bar."""
    table = Table(title="bars")
    for heading in ("at most", "worst", "", "what", "where"):
        table.add_column(heading, no_wrap=heading != "what")
    for bar in found:
        verdict = "met" if bar.met else "[red]not met[/red]"
        table.add_row(f"{bar.limit:.2f}x", f"{bar.figure:.3f}x", verdict, bar.text, bar.where)
    return table


def table_of(all_counts: dict[str, dict[str, Counts]]) -> Table:
    """A row for each kernel of a workload; figures per sampling point, and as a share of plain."""
    table = Table(title="per sampling point (share of one thread per channel)")
    table.add_column("workload, dtype, kernel", no_wrap=True)
    columns = ("loads", "read", "l1_missed", "written", "atomics", "atomic_sectors")
    columns += ("l2_bytes", "least_bytes")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for case, counts in all_counts.items():
        table.add_section()
        table.add_row(f"[bold]{case}[/bold] (chosen: {min(counts['chosen'])})")
        for kernel, figures in counts.items():
            if kernel == "chosen":
                continue
            plain = counts[kernel.split()[0] + " baseline"]
            cells = []
            for column in columns:
                share = f" {figures[column] / plain[column]:4.2f}x" if plain[column] else ""
                cells.append(f"{figures[column]:.1f}{share}" if figures[column] else "-")
            table.add_row(f"  {kernel}", *cells)
    return table


def raised(now: dict[str, dict[str, Counts]], before: dict[str, dict[str, Counts]]) -> list[str]:
    """What is counted more often than before, beyond a thousandth, or was never counted."""
    faults = []
    for case, counts in now.items():
        for kernel, figures in counts.items():
            known = before.get(case, {}).get(kernel)
            if known is None:
                faults.append(f"{case}, {kernel}: not counted before; --json writes a new file")
                continue
            for name, figure in figures.items():
                old = known.get(name, 0.0)
                if figure > old * 1.001 + 1e-3:
                    faults.append(f"{case}, {kernel}: {name} {old} -> {figure}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--check", type=Path, help="fail where a count is above those of this file")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 190)
    every = list(cases())
    counts = {
        f"{workload.name} {dtype}": count(workload, dtype)
        for workload, dtype in track(every, "counting", console=console)
    }
    if options.json:
        options.json.write_text(json.dumps(counts, indent=1) + "\n")
    console.print(table_of(counts))
    console.print(bars_table(bars(counts)))
    faults = raised(counts, json.loads(options.check.read_text())) if options.check else []
    for fault in faults:
        console.print(f"[red]{fault}[/red]")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
