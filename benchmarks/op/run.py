"""Benchmarks of multi-scale deformable attention: compare with the oracle, then time.

    python -m benchmarks.op [--preset quick|default|full] [options]   measure; see --help
    python -m benchmarks.op compare A.json B.json                     ratio of each row
    python -m benchmarks.op table A.json                              the README's tables
    python -m benchmarks.op chart A.json                              draw the chart again

A contestant that is wrong is reported in red with its error, and is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import deform_attn
from benchmarks.machine import probe
from benchmarks.op import check, measure, report
from benchmarks.op.environment import all_cores, environment
from benchmarks.op.peers import BASELINE, KERNELS, OURS, PEERS, Loader, Missing, Op
from benchmarks.op.rows import failures
from benchmarks.op.workloads import WORKLOADS, Workload, WorkloadInputs, draw

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}
TINY = Workload("tiny", ((4, 4), (2, 2)), 4, 2, 8, (2, 2))  # for the cost of a call
SPARE_MEMORY = 0.5  # of what is available may go into one contestant


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is measured."""

    workloads: tuple[str, ...] = tuple(WORKLOADS)
    contestants: tuple[str, ...] = tuple(PEERS)
    dtypes: tuple[str, ...] = ("f32", "bf16", "f16")  # of the backends of deform_attn
    peer_dtypes: tuple[str, ...] = ("f32",)
    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1, 0)  # 0: all cores
    all_threads: tuple[str, ...] = tuple(WORKLOADS)  # workloads that use every entry of `threads`
    unguarded: tuple[str, ...] = ()  # workloads that leave the slow `reference` backend out
    seconds: float = 10.0  # for a workload, not counting the check
    models: tuple[str, ...] = ("deformable_detr", "mask2former")
    model_rounds: int = 5


ENCODERS = tuple(name for name, workload in WORKLOADS.items() if workload.encoder)
PRESETS = {
    "quick": Preset(
        workloads=("rtdetr_decoder_640", "dino_decoder_900q", "rfdetr_decoder_560"),
        dtypes=("f32",),
        threads=(1,),
        seconds=1.5,
        models=(),
    ),
    "default": Preset(
        all_threads=("deformable_detr_encoder_800x1333",),
        unguarded=ENCODERS,
        seconds=3.0,
        models=("deformable_detr",),
        model_rounds=3,
    ),
    "full": Preset(
        dtypes=("f32", "bf16", "f16", "f64"),
        peer_dtypes=("f32", "bf16", "f16", "f64"),
        batches=(1, 4, 16),
    ),
    "gpu": Preset(  # checks and compiling Triton take most of its time
        dtypes=("f32", "bf16", "f16", "f64"),
        peer_dtypes=("f32", "bf16", "f16", "f64"),
        unguarded=ENCODERS,
        seconds=2.0,
        models=(),
    ),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the results: a contestant, a dtype and a number of threads."""

    contestant: str
    dtype: str
    threads: int


def plan(preset: Preset, workload: Workload, device: str) -> list[Entry]:
    """The rows of a workload."""
    counts = [count or all_cores() for count in preset.threads] if device == "cpu" else [1]
    if workload.name not in preset.all_threads:
        counts = counts[:1]
    entries = []
    for threads in dict.fromkeys(counts):
        for name in preset.contestants:
            if name == "reference" and workload.name in preset.unguarded:
                continue
            own = name in OURS[:2] or name in KERNELS
            dtypes = preset.dtypes if own else preset.peer_dtypes
            extra = threads == counts[0]  # other dtypes with the first number of threads only
            entries += [Entry(name, dtype, threads) for dtype in (dtypes if extra else dtypes[:1])]
    return entries


def measure_workload(
    workload: Workload,
    batch: int,
    entries: Sequence[Entry],
    *,
    device: str = "cpu",
    seconds: float = 3.0,
    rounds: tuple[int, int] = (3, 100),
    seed: int = 0,
    peers: dict[str, Loader] = PEERS,
    tick: Any = lambda text=None: None,
) -> list[dict[str, Any]]:
    """Check each entry, measure its peak memory, then time those that are right."""
    rows: list[dict[str, Any]] = []
    inputs: dict[str, list[WorkloadInputs]] = {}
    expected: dict[str, check.Expected] = {}
    right: list[tuple[dict[str, Any], measure.Entrant]] = []
    checked: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        row: dict[str, Any] = {
            "workload": workload.name,
            "batch": batch,
            "device": device,
            "threads": entry.threads,
            "contestant": entry.contestant,
            "dtype": entry.dtype,
        }
        rows.append(row)
        try:
            op = peers[entry.contestant](workload, device)
            _takes_dtype(entry, device)
            _enough_memory(entry, workload, batch, device)
        except Missing as missing:
            row.update(status="missing", reason=str(missing))
            continue
        if entry.dtype not in inputs:
            inputs[entry.dtype] = _inputs(workload, batch, entry.dtype, device, seed)
            expected[entry.dtype] = check.expected_of(inputs[entry.dtype][0])
        first = inputs[entry.dtype][0]
        key = (entry.contestant, entry.dtype)
        if key not in checked:
            tick(f"checking {entry.contestant} {entry.dtype}")
            checked[key] = _examine(op, first, expected[entry.dtype])
        row.update(checked[key])
        if row["status"] == "ok":
            right.append((row, measure.Entrant(op, inputs[entry.dtype], entry.threads)))
    expected.clear()
    tick("timing")
    measure.race([entrant for _, entrant in right], seconds, rounds, tick)
    for row, entrant in right:
        row["times"] = entrant.times
        row["busy"] = statistics.median(entrant.busy)
        if entrant.threads > 1 and row["contestant"] in OURS[:2]:
            tick(f"timing {entrant.threads} threads against one")
            row.update(_scaling(entrant, seconds, rounds))
    return rows


def _scaling(entrant: measure.Entrant, seconds: float, rounds: tuple[int, int]) -> dict[str, Any]:
    """Times with one thread over times with several, in a race of its own, which has more rounds.

    `handover`: the core-to-core latency before and after. `page_faults` of the race: many of them
    mean that the process did not keep its memory, so that the times include mapping pages.
    """
    one, many = (measure.Entrant(entrant.op, entrant.inputs, n) for n in (1, entrant.threads))
    handover = [probe.handover()]
    with measure.kept_memory():
        faults = measure.page_faults()
        measure.race([one, many], seconds, rounds)
        faults = measure.page_faults() - faults
    handover.append(probe.handover())
    ratios = {
        phase: measure.ratios(one.times[phase], many.times[phase]) for phase in measure.PHASES
    }
    handover = [ns for ns in handover if ns is not None]
    return {"scaling": ratios, "handover": handover, "page_faults": faults}


def _inputs(
    workload: Workload, batch: int, dtype: str, device: str, seed: int
) -> list[WorkloadInputs]:
    first = draw(workload, batch, DTYPES[dtype], device, seed)
    if device == "cpu":
        return [first]
    tensors = [*first.differentiable, first.grad_output]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = min(64, 1 + math.ceil(2 * cache / size))
    return [first] + [
        draw(workload, batch, DTYPES[dtype], device, seed + i) for i in range(1, copies)
    ]


def _examine(op: Op, x: WorkloadInputs, expected: check.Expected) -> dict[str, Any]:
    """Status, errors and peak memory; an op that raises is wrong too."""
    try:
        errors = check.errors_of(op, x, expected)
        reason = check.verdict(errors, x.value.dtype)
        if reason is None:
            return {"status": "ok", "errors": errors, "memory": measure.peaks(op, x)}
        return {"status": "wrong", "errors": errors, "reason": reason}
    except Exception as error:  # any error of a contestant is a row of the table
        return {"status": "wrong", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}


def _takes_dtype(entry: Entry, device: str) -> None:
    if entry.contestant in OURS:
        backend = deform_attn.BACKENDS[entry.contestant]
        reason = backend.why_not(device, DTYPES[entry.dtype])
        if reason is not None:
            raise Missing(reason)


def _enough_memory(entry: Entry, workload: Workload, batch: int, device: str) -> None:
    """Raise Missing where the grid_sample formula, which stores every sample, would not fit."""
    if entry.contestant not in (BASELINE, "reference"):
        return
    size = 8 if entry.dtype == "f64" else 4
    needed = 6 * batch * workload.samples * workload.head_dim * size
    cuda = device == "cuda"
    free = torch.cuda.mem_get_info()[0] if cuda else measure.available_memory()
    if needed > SPARE_MEMORY * free:
        raise Missing(f"would need about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")


def measure_cost(device: str, contestants: Sequence[str]) -> list[dict[str, Any]]:
    """The cost of a call of each contestant that runs."""
    x = draw(TINY, device=device)
    expected = check.expected_of(x)
    ops = {}
    for name in contestants:
        with contextlib.suppress(Missing):
            op = PEERS[name](TINY, device)
            if _examine(op, x, expected)["status"] == "ok":
                ops[name] = op
    costs = measure.cost(list(ops.values()), x)
    return [{"contestant": name, "times": times} for name, times in zip(ops, costs)]


def run(preset: Preset, device: str, seed: int, out: Path, console: Console) -> dict[str, Any]:
    """Run a preset; results are written to `out` after each workload."""
    start = time.perf_counter()
    results: dict[str, Any] = {
        "format": 1,
        "environment": environment(),
        "preset": dataclasses.asdict(preset),
        "device": device,
        "seed": seed,
        "rows": [],
        "cost": [],
        "models": [],
    }
    report.print_environment(console, results)
    steps = [(WORKLOADS[name], batch) for name in preset.workloads for batch in preset.batches]
    with _progress(console, len(steps) + 1 + len(preset.models)) as tick:
        for workload, batch in steps:
            tick.begin(f"{workload.name}, batch {batch}")
            entries = plan(preset, workload, device)
            results["rows"] += measure_workload(
                workload,
                batch,
                entries,
                device=device,
                seconds=preset.seconds,
                seed=seed,
                tick=tick,
            )
            report.print_workload(console, results["rows"], workload.name, batch)
            _write(out, results)
            gc.collect()
        tick.begin("cost of a call")
        results["cost"] = measure_cost(device, preset.contestants)
        report.print_cost(console, results["cost"])
        for model in preset.models:
            tick.begin(model)
            from benchmarks.op import models  # transformers takes seconds to import

            results["models"].append(
                models.measure_model(model, device, rounds=preset.model_rounds, tick=tick)
            )
            report.print_model(console, results["models"][-1])
            _write(out, results)
    report.print_missing(console, results["rows"])
    results["seconds"] = round(time.perf_counter() - start, 1)
    _write(out, results)
    return results


class _Tick:
    """Moves the progress bar, where there is one."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress, self.task, self.name = progress, task, ""

    def begin(self, name: str) -> None:
        self.progress.advance(self.task, 1 if self.name else 0)
        self.name = name
        self.progress.update(self.task, description=name)

    def __call__(self, text: str | None = None) -> None:
        if text is not None:
            self.progress.update(self.task, description=f"{self.name}: {text}")


@contextlib.contextmanager
def _progress(console: Console, steps: int) -> Iterator[_Tick]:
    """A progress bar on a terminal, nothing elsewhere."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        yield _Tick(progress, progress.add_task("", total=steps))


def _write(out: Path, results: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(results, indent=1) + "\n")


def _names(known: Sequence[str]) -> Any:
    """An argument type: names from `known`, separated by commas; or none."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name for name in text.split(",") if name and name != "none")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; known: {', '.join(known)}"
            )
        return names

    return parse


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "action", nargs="?", default="run", choices=("run", "compare", "table", "chart")
    )
    parser.add_argument("files", nargs="*", type=Path, help="JSON of earlier runs")
    parser.add_argument("--preset", default="default", choices=PRESETS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="results", type=Path, help="folder of the results")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--seconds", type=float, help="timing of a workload")
    parser.add_argument("--workloads", type=_names(list(WORKLOADS)), help="names, by commas")
    parser.add_argument("--contestants", type=_names(list(PEERS)))
    parser.add_argument("--dtypes", type=_names(list(DTYPES)), help="of every contestant")
    parser.add_argument("--batches", type=_numbers, help="for example 1,4,16")
    parser.add_argument("--threads", type=_numbers, help="for example 1,0; 0 is all cores")
    parser.add_argument("--models", type=_names(("deformable_detr", "mask2former")), help="or none")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where a backend of deform_attn or a model with it was wrong."""
    args = arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if args.action != "run":
        loaded = [json.loads(file.read_text()) for file in args.files]
        needed = 2 if args.action == "compare" else 1
        if len(loaded) != needed:
            console.print(f"{args.action}: expected {needed} JSON file(s), got {len(loaded)}")
            return 2
        if args.action == "compare":
            report.print_comparison(console, *loaded)
        elif args.action == "table":
            print(report.markdown(loaded[0]))
        else:
            report.chart(loaded[0], args.files[0].with_suffix(".png"))
        return 0

    preset = PRESETS[args.preset]
    fields = [field.name for field in dataclasses.fields(Preset)]
    chosen = {name: given for name in fields if (given := getattr(args, name, None)) is not None}
    if args.dtypes is not None:
        chosen["peer_dtypes"] = args.dtypes
    if args.threads is not None:
        chosen["all_threads"] = tuple(WORKLOADS)
    preset = dataclasses.replace(preset, **chosen)
    results = run(preset, args.device, args.seed, args.out, console)
    report.chart(results, args.out / "bench.png")
    with open(args.out / "bench.txt", "w") as file:
        report.print_results(Console(file=file, width=160), results)
    console.print(
        f"{results['seconds']:.0f} s; written: {args.out}/bench.json, bench.png, bench.txt"
    )
    return 1 if failures(results) else 0
