"""Compares the CPU's forward kernel with lower bounds that are measured on this machine.

    python -m benchmarks.machine.roofline [--out results]

A sampling point reads four rows of head_dim numbers and does four multiply-adds per channel. A
probe (probe.cpp, compiled for this processor) measures on one core the time of a multiply-add, and
the time to read a row from sets of several sizes, in random order with prefetching. A kernel takes
at least the largest of

    arithmetic  the time of the multiply-adds
    L1          the time of four rows from a set that fits into the first-level cache
    far         the time to fetch each row that the workload touches once, from a set of the size
                of all of them, plus one pass over locations, weights and output

`L2` is the time of four rows from the second-level cache. It is not a bound: a kernel takes this
time if neighbouring queries do not find each other's rows in L1.

The inputs of a call may be in no cache, as in a benchmark where other ops ran before: `memory` is
then the time to fetch the touched rows in random order from memory, plus the pass over locations,
weights and output; `cold` is the measured time of the kernel after a sweep through a large array.

Two columns compare all cores with one: the speed-up of the kernel, and (in the table of the
machine) that of the probe, where each core reads rows of its own; it is an upper bound.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import probe
from benchmarks.op import measure
from benchmarks.op.environment import all_cores, environment
from benchmarks.op.peers import PEERS, Op
from benchmarks.op.workloads import WORKLOADS, Workload, WorkloadInputs, draw

ROW = 32  # floats in a row of the probe
REPEATS = 5  # the fastest counts: a bound is what the machine can do at best


SETS = {  # bytes that the probe reads
    "16 kB": 2**14,
    "256 kB": 2**18,
    "1 MB": 2**20,
    "4 MB": 2**22,
    "16 MB": 2**24,
    "64 MB": 2**26,
    "512 MB": 2**29,
}
LARGEST_SHARED = 2**24  # bytes of the largest set that each core gets a copy of, to measure scaling
L1, L2 = 2**14, 2**18  # sets that fit into these caches of any processor of the last ten years


@dataclasses.dataclass(frozen=True)
class Machine:
    """One core: nanoseconds of a vector multiply-add and of a 128 byte row, GB/s of a stream."""

    lanes: int  # floats in a vector
    multiply_add: float
    row: dict[int, float]  # by bytes of the set that is read
    stream: dict[int, float]
    scaling: dict[int, float] = dataclasses.field(default_factory=dict)  # of rows: all cores
    multiply_add_scaling: float = 1.0

    def row_of(self, size: float) -> float:
        """Cost of a row in a set of at least the greatest measured size that `size` reaches."""
        return self.row[max((known for known in self.row if known <= size), default=L1)]


def probed() -> Machine:
    """Run the probe; takes a few seconds."""
    functions = probe.functions()
    count = 12_000_000
    multiply_add = min(functions.multiply_add(ctypes.c_int64(count)) for _ in range(REPEATS))
    row, stream, scaling = {}, {}, {}
    generator = np.random.default_rng(0)
    for size in SETS.values():
        floats = size // 4
        data = np.ones(floats, np.float32)
        reads = max(1, 2**27 // size)
        best = min(
            functions.stream(_pointer(data), ctypes.c_int64(floats), ctypes.c_int64(reads))
            for _ in range(REPEATS)
        )
        stream[size] = size * reads / best / 1e9
        order = generator.permutation(floats // ROW).astype(np.int32)[: 2**20]
        order = order[: len(order) // 2 * 2]
        weights = generator.random(len(order), np.float32)
        rounds = max(1, 2**21 // len(order))

        best, way = min(
            (_gather(functions, order, weights, rounds, way, data), way)
            for way in range(3)
            for _ in range(REPEATS)
        )
        row[size] = best / (len(order) * rounds) * 1e9
        if size <= LARGEST_SHARED:
            own = [data, *(data.copy() for _ in range(all_cores() - 1))]
            call = partial(_gather, functions, order, weights, rounds, way)
            scaling[size] = _scaling([partial(call, data) for data in own])
    # a larger set is not faster to read: if it seems so, the smaller measurement was disturbed
    row = {size: min(ns for other, ns in row.items() if other >= size) for size in row}
    work = [partial(functions.multiply_add, ctypes.c_int64(10 * count))] * all_cores()
    return Machine(
        functions.lanes(), multiply_add / count * 1e9, row, stream, scaling, _scaling(work)
    )


def _gather(
    functions: ctypes.CDLL, order: Any, weights: Any, rounds: int, way: int, data: Any
) -> float:
    """Seconds to read the rows of `data` in this order, so many times."""
    arrays = (_pointer(data), _pointer(order), _pointer(weights))
    seconds: float = functions.gather(
        *arrays, ctypes.c_int64(len(order)), ctypes.c_int64(rounds), way
    )
    return seconds


def _scaling(work: Sequence[Callable[[], float]]) -> float:
    """Speed-up of the calls side by side over one after the other: the median."""
    found = []
    with ThreadPoolExecutor(len(work)) as pool:
        for _ in range(REPEATS):
            alone = sum(call() for call in work)
            found.append(alone / max(pool.map(lambda call: call(), work)))
    return statistics.median(found)


def _pointer(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def bounds(machine: Machine, workload: Workload, x: WorkloadInputs) -> dict[str, float]:
    """Nanoseconds per point, and rows per point that come from memory."""
    row_bytes = 4 * workload.head_dim
    share = workload.head_dim / ROW  # of the probe's row
    loads = 4 * workload.head_dim / machine.lanes
    touched = _rows_touched(x)
    largest = max(machine.row)
    passing = 12 + row_bytes / sum(workload.points)  # location, weight, output: bytes a point
    passing /= machine.stream[largest]
    rows = touched / workload.samples * share
    found = {
        "arithmetic": loads * machine.multiply_add,
        "L1": 4 * share * machine.row[L1],
        "far": rows * machine.row_of(touched * row_bytes) + passing,
    }
    return {
        "loads": loads,
        "touched": touched / workload.samples,
        **found,
        "L2": 4 * share * machine.row[L2],
        "bound": max(found.values()),
        "memory": max(*found.values(), rows * machine.row[largest] + passing),
    }


def _rows_touched(x: WorkloadInputs) -> int:
    """Different rows (pixel and head) that a call reads."""
    batch, queries, heads = x.sampling_locations.shape[:3]
    locations = x.sampling_locations.reshape(batch, queries, heads, -1, 2)
    levels = x.spatial_shapes.tolist()
    counts = x.num_points or [locations.shape[3] // len(levels)] * len(levels)
    touched = torch.zeros(batch, x.value.shape[1], heads, dtype=torch.bool)
    image = torch.arange(batch)[:, None, None, None]
    head = torch.arange(heads)[:, None]
    for (height, width), start, xy in zip(
        levels, x.level_start_index.tolist(), locations.split(counts, 3)
    ):
        left, top = (xy * torch.tensor([width, height]) - 0.5).floor().long().unbind(-1)
        for y in (top, top + 1):
            for column in (left, left + 1):
                inside = (y >= 0) & (y < height) & (column >= 0) & (column < width)
                row = start + y.clamp(0, height - 1) * width + column.clamp(0, width - 1)
                where = torch.broadcast_tensors(image, row, head)
                touched[tuple(part[inside] for part in where)] = True
    return int(touched.sum())


def measure_workload(machine: Machine, workload: Workload, seconds: float) -> dict[str, Any]:
    """Forward of the compiled backend on one thread and on all, and the bounds of one."""
    x = draw(workload)
    op = PEERS["compiled"](workload, "cpu")
    entrants = [measure.Entrant(op, [x], threads) for threads in (1, all_cores())]
    for entrant in entrants:  # apart: threads that wait for work disturb a single one
        measure.race([entrant], seconds, rounds=(5, 200))
    found = bounds(machine, workload, x)
    taken = [statistics.median(entrant.times["forward"]) for entrant in entrants]
    both = [statistics.median(entrant.times["forward_backward"]) for entrant in entrants]
    ns, cold = (t / workload.samples * 1e9 for t in (taken[0], _cold(op, x, seconds)))
    return {
        "workload": workload.name,
        "ns": ns,
        "cold": cold,
        **found,
        "ratio": ns / found["bound"],
        "cold_ratio": cold / found["memory"],
        "scaling": taken[0] / taken[1],
        "scaling_with_backward": both[0] / both[1],
    }


def _cold(op: Op, x: WorkloadInputs, seconds: float) -> float:
    """Seconds of forward on one thread, with inputs and output in no cache."""
    taken: list[float] = []
    everything = torch.zeros(max(SETS.values()) // 4)
    start = time.perf_counter()
    with measure.one_thread(), torch.no_grad():
        while len(taken) < 5 or time.perf_counter() - start < seconds:
            everything.add_(1)
            taken.append(measure.cpu_clock(lambda: op(x))[0])
    return statistics.median(taken)


def print_results(console: Console, machine: Machine, rows: Sequence[dict[str, Any]]) -> None:
    """Two tables: the machine, and the workloads."""
    table = Table(title="one core of this machine", title_justify="left", title_style="bold")
    for heading in ("in a set of", *SETS):
        table.add_column(heading, justify="right")
    table.add_row("ns a row of 128 bytes", *(f"{ns:.2f}" for ns in machine.row.values()))
    table.add_row("GB/s of a stream", *(f"{speed:.0f}" for speed in machine.stream.values()))
    gains = (f"{gain:.2f}x" for gain in machine.scaling.values())
    table.add_row(f"rows: {all_cores()} cores against 1", *gains)
    console.print(table)
    console.print(
        f"a multiply-add of {machine.lanes} floats: {machine.multiply_add:.3f} ns "
        f"({2 * machine.lanes / machine.multiply_add:.0f} GFLOP/s), "
        f"{all_cores()} cores {machine.multiply_add_scaling:.2f}x"
    )
    title = "forward, float32, one thread: ns, vector loads and rows touched a point"
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in (
        *("workload", "measured", "loads, FMAs", "rows touched"),
        *("arithmetic", "L1", "far", "bound", "measured / bound", "L2"),
        *("memory", "cold", "cold / memory", "all cores", "with backward"),
    ):
        table.add_column(heading, justify="left" if heading == "workload" else "right")
    for row in rows:
        table.add_row(
            row["workload"],
            f"{row['ns']:.1f}",
            f"{row['loads']:.0f}",
            f"{row['touched']:.2f}",
            *(f"{row[name]:.1f}" for name in ("arithmetic", "L1", "far", "bound")),
            f"{row['ratio']:.1f}x",
            *(f"{row[name]:.1f}" for name in ("L2", "memory", "cold")),
            f"{row['cold_ratio']:.1f}x",
            *(f"{row[name]:.2f}x" for name in ("scaling", "scaling_with_backward")),
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="results", type=Path, help="folder of the results")
    parser.add_argument("--seconds", default=1.5, type=float, help="timing of a workload")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    machine = probed()
    rows = [measure_workload(machine, workload, args.seconds) for workload in WORKLOADS.values()]
    print_results(console, machine, rows)
    args.out.mkdir(parents=True, exist_ok=True)
    results = {
        "environment": environment(),
        "machine": dataclasses.asdict(machine),
        "rows": rows,
    }
    (args.out / "roofline.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
