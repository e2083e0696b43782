"""The calls whose figures docs/design-gpu.md states, and the bars that they are held to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

# Cycles of the second level for a sector that an atomic adds to: the cost is not known, so that the
# backward pass of an encoder is modelled for three.
COSTS = (0.66, 1.31, 2.62)
USUAL_COST = 1.31
SM_80_COST = 2.46

# The kernels of 2020, as the authors of Deformable DETR published them, with the same inputs on the
# same model. Their code is not part of this project, so that these are constants. The kernels of
# csrc/cuda/baseline.cuh have one thread per channel too, but are other code: see CASES.
OFFICIAL = {
    "forward, encoder": 800_261,
    "forward, 300 queries": 14_781,
    "backward, encoder": 1_630_000,
    "backward, 300 queries": 28_500,
    "backward, 300 queries, sm_80": 32_600,
}
FIRST_SCATTER_SECTORS = 316_756  # that the first design of scatter reduces

# The largest error of a result, as a share of its largest number. 16 bits: of their rounding.
TOLERANCE = {"float": 2e-6, "half": 1e-3, "bfloat16": 8e-3}

RAISED = 1.001  # cycles that grow by more are reported


@dataclasses.dataclass(frozen=True)
class Case:
    """A call. The fields are the arguments of model.cpp."""

    name: str
    work: str
    dtype: str
    direction: str  # "forward" or "backward"
    points: str = "given"
    algorithm: str = "planned"
    capability: int = 90
    costs: Sequence[float] = (USUAL_COST,)

    @property
    def source(self) -> str:
        """The file of csrc/cuda with its kernels."""
        return f"{self.direction}_{self.dtype}.cu"

    def arguments(self) -> list[str]:
        """As model.cpp takes them, without the machine code."""
        costs = ",".join(f"{cost:g}" for cost in self.costs)
        return [
            *(self.work, self.dtype, self.direction, self.points, self.algorithm),
            *(str(self.capability), costs),
        ]


def _cases() -> list[Case]:
    names = {"float": "f32", "half": "f16", "bfloat16": "bf16"}
    cases = []
    for work, where in (("encoder", "encoder"), ("queries", "300 queries")):
        for dtype in ("float", "half", "bfloat16"):
            cases.append(Case(f"forward {names[dtype]}, {where}", work, dtype, "forward"))
        for points, how in (("fused", "fused"), ("boxes", "fused with boxes")):
            for dtype in ("float", "half"):
                name = f"{how} forward {names[dtype]}, {where}"
                cases.append(Case(name, work, dtype, "forward", points))
        for dtype in ("float", "bfloat16"):
            costs = COSTS if dtype == "float" else (USUAL_COST,)
            name = f"backward {names[dtype]}, {where}"
            cases.append(Case(name, work, dtype, "backward", costs=costs))
        for points, how in (("fused", "fused"), ("boxes", "fused with boxes")):
            for dtype in ("float", "half"):
                name = f"{how} backward {names[dtype]}, {where}"
                cases.append(Case(name, work, dtype, "backward", points))
        name = f"deterministic backward f32, {where}"
        cases.append(Case(name, work, "float", "backward", algorithm="deterministic"))
    for direction in ("forward", "backward"):  # of an encoder they take too long
        name = f"baseline {direction} f32, 300 queries"
        cases.append(Case(name, "queries", "float", direction, algorithm="baseline"))
    name = "backward f32, 300 queries, sm_80"
    cases.append(Case(name, "queries", "float", "backward", capability=80, costs=(SM_80_COST,)))
    return cases


CASES = _cases()

# What the model prints of a call: errors, and a report for each kernel and cost.
Result = dict[str, Any]


def faults(case: Case, result: Result) -> list[str]:
    """What is wrong with the values of a call."""
    limit = TOLERANCE[case.dtype]
    return [
        f"{case.name}: {what} differs from float64 by {error:.1e} of its largest number, more than "
        f"{limit:.0e}"
        for what, error in result["errors"].items()
        if not error <= limit
    ]


def total(result: Result, field: str = "cycles", cost: float = USUAL_COST) -> int:
    """The sum over the kernels of a call."""
    found = 0
    for kernel in result["kernels"]:
        (report,) = (r for r in kernel["reports"] if r["reduced_sector_cost"] == cost)
        found += report[field]
    return found


@dataclasses.dataclass(frozen=True)
class Bar:
    """A row of the table "State" of docs/design-gpu.md."""

    row: str  # how its first cell starts
    limit: float
    figures: tuple[int, ...]
    of: int  # what the largest figure is a share of

    @property
    def share(self) -> float:
        return max(self.figures) / self.of

    @property
    def met(self) -> bool:
        return self.share <= self.limit


def bars(results: dict[str, Result]) -> list[Bar]:
    """The bars whose cases are among the results."""

    def cycles(name: str, **options: Any) -> int:
        return total(results[name], **options)

    found: list[Bar] = []

    def add(row: str, limit: float, case: str, of: int | str, **options: Any) -> None:
        if case not in results or (isinstance(of, str) and of not in results):
            return
        whole = of if isinstance(of, int) else cycles(of)
        found.append(Bar(row, limit, (cycles(case, **options),), whole))

    encoder, queries = OFFICIAL["forward, encoder"], OFFICIAL["forward, 300 queries"]
    add("forward f32, encoder", 0.19, "forward f32, encoder", encoder)
    add("forward f16, encoder", 0.15, "forward f16, encoder", encoder)
    add("forward bf16, encoder", 0.15, "forward bf16, encoder", encoder)
    add("fused forward f32, encoder", 0.22, "fused forward f32, encoder", encoder)
    add("fused forward f16, encoder", 0.18, "fused forward f16, encoder", encoder)
    add("forward f32, 300 queries", 0.45, "forward f32, 300 queries", queries)
    add("forward f16, 300 queries", 0.35, "forward f16, 300 queries", queries)
    encoder = OFFICIAL["backward, encoder"]
    backward = "backward f32, encoder"
    add("backward f32, encoder, all kernels", 0.28, backward, encoder)
    if backward in results:
        sectors = total(results[backward], "reduced_sectors")
        found.append(Bar("reduced sectors of it", 0.35, (sectors,), FIRST_SCATTER_SECTORS))
        others = tuple(cycles(backward, cost=cost) for cost in COSTS if cost != USUAL_COST)
        found.append(Bar("the same at 0.66 and 2.62", 1.0, others, encoder))
    add(
        *("backward f32, 300 queries, sm_90", 0.6, "backward f32, 300 queries"),
        OFFICIAL["backward, 300 queries"],
    )
    add(
        *("backward f32, 300 queries, sm_80", 0.7, "backward f32, 300 queries, sm_80"),
        OFFICIAL["backward, 300 queries, sm_80"],
        cost=SM_80_COST,
    )
    narrow = "backward bf16, encoder"
    add(f"{narrow}, all kernels, of f32", 0.8, narrow, backward)
    fixed = "deterministic backward f32"
    add(f"{fixed}, encoder, of the fast one", 3.0, f"{fixed}, encoder", backward)
    add("the same, 300 queries", 3.0, f"{fixed}, 300 queries", "backward f32, 300 queries")
    return found


def raised(now: dict[str, Result], before: dict[str, Result]) -> list[str]:
    """Bars that were met before, and cycles that have grown."""
    met = {bar.row for bar in bars(before) if bar.met}
    found = [f"bar not met: {bar.row}" for bar in bars(now) if bar.row in met and not bar.met]
    for name, result in now.items():
        if name not in before:
            found.append(f"{name}: not simulated before; --json writes a new file")
            continue
        for report in result["kernels"][0]["reports"]:
            cost = report["reduced_sector_cost"]
            old, new = (total(each, cost=cost) for each in (before[name], result))
            if new > old * RAISED:
                found.append(f"{name}, {cost} cycles a reduced sector: {old:,} -> {new:,}")
    return found
