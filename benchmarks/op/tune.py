"""The table that decides which kernels a call uses, and the constants that follow from it.

    python -m benchmarks.op.tune [--device cuda] [--out results]    measure, print, write tune.json
    python -m benchmarks.op.tune results/tune.json                  the choices of an earlier table

Needs torch and Triton alone. Each workload and dtype is a race of the 2020-style baseline, the
scatter and deterministic backward, Triton, and the fused operator of both; the table is written
after each of them. A contestant with wrong results gets no time. The last lines name the constant,
the file it belongs in, and how much slower the resulting choice is than the fastest contestant.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deform_attn
from benchmarks.op import check, measure
from benchmarks.op.environment import environment
from benchmarks.op.peers import BASELINE_KERNEL, PEERS, Missing
from benchmarks.op.rows import Row, seconds
from benchmarks.op.workloads import WORKLOADS, Workload, WorkloadInputs, draw, scaled
from deform_attn.testing import FusedInputs

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
NAMES = (
    *("deformable_detr_encoder_800x1333", "mask2former_pixel_decoder_1024"),
    *("rtdetr_decoder_640", "dino_decoder_900q", "rfdetr_train"),
)
SCATTER, FIXED = "compiled, scatter", "compiled, fixed"
CONTESTANTS = (BASELINE_KERNEL, SCATTER, FIXED, "compiled", "triton")
FUSED = ("compiled", "triton")
MARGIN = 1.03  # smaller differences are noise
SUBSET_POINTS = 2**13  # of the check; `deform_attn.check` compares every element of small calls


@dataclasses.dataclass(frozen=True)
class FusedCall:
    """A fused call with the attributes that `measure.race` reads of its inputs."""

    call: FusedInputs
    grad_output: Tensor

    @property
    def value(self) -> Tensor:
        return self.call.value

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        return self.call.tensors

    def map(self, change: Callable[[Tensor], Tensor]) -> FusedCall:
        return dataclasses.replace(self, call=self.call.map(change))


def fused_call(x: WorkloadInputs) -> FusedCall:
    """The fused call that samples the same points: offsets in pixels from their mean."""
    counts = x.num_points or [x.sampling_locations.shape[4]] * len(x.spatial_shapes)
    locations = x.sampling_locations.flatten(3, -2)  # [B, Q, M, K, 2]
    sizes = x.spatial_shapes.flip(-1).cpu().repeat_interleave(torch.tensor(counts), 0)
    reference = locations.mean((2, 3))  # [B, Q, 2]
    offsets = (locations - reference[:, :, None, None]) * sizes.to(locations)
    call = FusedInputs(
        x.value,
        [(height, width) for height, width in x.spatial_shapes.tolist()],
        reference[:, :, None].expand(-1, -1, len(counts), -1).contiguous(),
        offsets.to(x.value.dtype).contiguous(),
        x.attention_weights.flatten(3).float().log().to(x.value.dtype),
        counts,
        1.0,
    )
    return FusedCall(call, x.grad_output)


def fused_op(backend: str) -> Any:
    """``ms_deform_attn_fused`` of a backend, as an op of `measure.race`."""

    def op(x: FusedCall) -> Tensor:
        return deform_attn.ms_deform_attn_fused(
            *x.call.arguments,
            num_points=x.call.num_points,
            offset_scale=x.call.offset_scale,
            backend=backend,
        )

    return op


def points_per_row(workload: Workload) -> float:
    """Sampling points of a head per row of value: 16 for an encoder, less than 1 for decoders."""
    return workload.samples / workload.heads / workload.rows


def measure_row(workload: Workload, dtype: str, device: str, time: float) -> Iterator[Row]:
    """A row for each contestant of a workload: its median seconds, or why it has none."""
    x = draw(workload, dtype=DTYPES[dtype], device=device)
    expected = check.expected_of(x, points=SUBSET_POINTS)
    fused = fused_call(x)
    rows, entrants = [], []
    for name in CONTESTANTS:
        row = _row(workload, dtype, name)
        rows.append(row)
        try:
            op = PEERS[name](workload, device)
            _can_run(name, device, DTYPES[dtype])
            row["reason"] = check.verdict(check.errors_of(op, x, expected), x.value.dtype)
        except Missing as missing:
            row["reason"] = f"missing: {missing}"
        except Exception as error:  # of whatever kind: it belongs in the table
            row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0]
        if row["reason"] is None:
            entrants.append((row, measure.Entrant(op, [x])))
    for name in FUSED:
        row = _row(workload, dtype, f"{name} fused")
        rows.append(row)
        try:
            _can_run(name, device, DTYPES[dtype])
            row["reason"] = _fused_verdict(name, fused, x, expected)
        except Missing as missing:
            row["reason"] = f"missing: {missing}"
        except Exception as error:
            row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0]
        if row["reason"] is None:
            inputs: Any = [fused]
            entrants.append((row, measure.Entrant(fused_op(name), inputs)))
    measure.race([entrant for _, entrant in entrants], time)
    for row, entrant in entrants:
        row["seconds"] = {
            phase: statistics.median(entrant.times[phase]) for phase in measure.PHASES
        }
    yield from rows


def _row(workload: Workload, dtype: str, contestant: str) -> Row:
    density = points_per_row(workload)
    fields = {"workload": workload.name, "dtype": dtype, "contestant": contestant}
    return fields | {"points_per_row": density, "reason": None}


def _can_run(name: str, device: str, dtype: torch.dtype) -> None:
    if name in deform_attn.BACKENDS:
        reason = deform_attn.BACKENDS[name].why_not(device, dtype)
        if reason is not None:
            raise Missing(reason)


def _fused_verdict(
    name: str, fused: FusedCall, x: WorkloadInputs, expected: check.Expected
) -> str | None:
    """The output against the oracle of the same points; offsets in 16 bits move the points."""
    with torch.no_grad():
        output = fused_op(name)(fused)
    found = output[:, expected.queries.to(output.device)].cpu().double()
    error = float((found - expected.output).abs().max() / expected.output.abs().max())
    limit = 0.2 if x.value.dtype.itemsize == 2 else 1e-3
    return None if error <= limit else f"output is off by {error:.1e} (at most {limit:.0e})"


def line(rows: Sequence[Row]) -> str:
    """The rows of a workload and dtype in one line per phase."""
    first = rows[0]
    lines = []
    for phase in measure.PHASES:
        cells = [
            f"{row['contestant']} {seconds(row['seconds'][phase])}" for row in rows if _timed(row)
        ]
        lines.append(f"{first['workload']} {first['dtype']} {phase}: {'; '.join(cells) or 'none'}")
    wrong = [f"  {row['contestant']}: {row['reason']}" for row in rows if row["reason"]]
    return "\n".join(lines + wrong)


def _timed(row: Row) -> bool:
    return "seconds" in row


def _by_call(rows: Sequence[Row], phase: str) -> list[tuple[Row, dict[str, float]]]:
    """For each workload and dtype: one of its rows, and the seconds of each contestant."""
    found: dict[tuple[str, str], tuple[Row, dict[str, float]]] = {}
    for row in rows:
        if _timed(row):
            entry = found.setdefault((row["workload"], row["dtype"]), (row, {}))
            entry[1][row["contestant"]] = row["seconds"][phase]
    return list(found.values())


def choose_backward(rows: Sequence[Row]) -> list[str]:
    """What `choose_backward` in csrc/cuda/launch.cuh costs: other choices, and determinism."""
    calls = _by_call(rows, "backward")
    slower = [
        f"{row['workload']} {row['dtype']} ({times['compiled'] / times[SCATTER]:.2f}x)"
        for row, times in calls
        if {"compiled", SCATTER} <= times.keys() and times["compiled"] > MARGIN * times[SCATTER]
    ]
    ratios = {
        f"{row['workload']} {row['dtype']}": times[FIXED] / times["compiled"]
        for row, times in calls
        if {"compiled", FIXED} <= times.keys()
    }
    what = "csrc/cuda/launch.cuh, choose_backward"
    lines = [
        f"{what}: kScatter in place of the choice would be faster on: {', '.join(slower) or 'none'}"
    ]
    if not ratios:
        return [*lines, f"{what}: kFixed not measured"]
    worst = max(ratios, key=lambda call: ratios[call])
    lines.append(
        f"{what}: kFixed, where determinism is asked for, takes {min(ratios.values()):.2f}x to "
        f"{ratios[worst]:.2f}x the time of the choice (most: {worst})"
    )
    return lines


def choose_backend(rows: Sequence[Row]) -> list[str]:
    """Which backend comes first in deform_attn/backends/__init__.py, by forward + backward."""
    lines = []
    for suffix in ("", " fused"):
        ours, other = f"compiled{suffix}", f"triton{suffix}"
        ratios = {
            f"{row['workload']} {row['dtype']}": times[other] / times[ours]
            for row, times in _by_call(rows, "forward_backward")
            if {ours, other} <= times.keys()
        }
        what = f"deform_attn/backends/__init__.py, order of the backends{suffix and ',' + suffix}"
        if not ratios:
            lines.append(f"{what}: not measured")
            continue
        mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
        first = "compiled, triton" if mean > 1 / MARGIN else "triton, compiled"
        faster = [f"{call} ({1 / r:.2f}x)" for call, r in ratios.items() if r < 1 / MARGIN]
        lines.append(
            f"{what}: {first}; triton takes {mean:.2f}x the time of compiled (geometric mean), and "
            f"is faster on: {', '.join(faster) or 'none'}"
        )
    return lines


def against_baseline(rows: Sequence[Row]) -> list[str]:
    """Times of the chosen kernels over those of the 2020-style baseline, for each phase."""
    lines = []
    for phase in measure.PHASES:
        ratios = [
            times[BASELINE_KERNEL] / times["compiled"]
            for _, times in _by_call(rows, phase)
            if {BASELINE_KERNEL, "compiled"} <= times.keys()
        ]
        if ratios:
            low, high = min(ratios), max(ratios)
            lines.append(f"{phase}: compiled is {low:.2f}x to {high:.2f}x as fast as the baseline")
    return lines


def choices(rows: Sequence[Row]) -> list[str]:
    """Everything that the table decides, a line each."""
    return [*against_baseline(rows), *choose_backward(rows), *choose_backend(rows)]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where a contestant of ours was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", type=Path, help="tune.json of an earlier run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="results", type=Path, help="folder of the results")
    parser.add_argument("--seconds", default=0.6, type=float, help="timing of a line")
    parser.add_argument("--scale", default=1.0, type=float, help="of the sides of all maps")
    arguments = parser.parse_args(argv)
    if arguments.table is not None:
        rows = json.loads(arguments.table.read_text())["rows"]
    else:
        rows = []
        facts = environment()
        arguments.out.mkdir(parents=True, exist_ok=True)
        for dtype in DTYPES:
            for name in NAMES:
                workload = WORKLOADS[name]
                if arguments.scale != 1:
                    workload = scaled(workload, arguments.scale)
                found = list(measure_row(workload, dtype, arguments.device, arguments.seconds))
                print(line(found), flush=True)
                rows += found
                text = json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n"
                (arguments.out / "tune.json").write_text(text)
    print("", *choices(rows), sep="\n")
    return 1 if any(is_wrong(row) for row in rows) else 0


def is_wrong(row: Row) -> bool:
    """Whether a contestant ran with wrong results or failed."""
    return bool(row["reason"]) and not row["reason"].startswith("missing")


if __name__ == "__main__":
    sys.exit(main())
