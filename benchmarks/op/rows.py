"""The results of a benchmark, as run.py writes them in JSON, and how rows are found in them.

- ``rows``: a workload, batch, device, threads, contestant and dtype each, with status, errors,
  memory and times
- ``cost``: seconds of a call on a tiny problem
- ``models``: whole models

Times are lists with one number per round; numbers with the same index in the lists of two rows were
measured in the same round.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.op.peers import KERNELS, OURS

Row = dict[str, Any]
KEY = ("workload", "batch", "device", "threads", "contestant", "dtype")


def failures(results: dict[str, Any]) -> list[str]:
    """Backends of deform_attn with wrong results, and models whose outputs differ with them."""
    wrong = [
        f"{row['contestant']} {row['dtype']} on {row['workload']}: {row['reason']}"
        for row in results["rows"]
        if row["contestant"] in (*OURS, *KERNELS) and row["status"] == "wrong"
    ]
    return wrong + [
        f"{model['model']}: {model['reason']}"
        for model in results["models"]
        if model["status"] == "wrong"
    ]


def find(rows: Iterable[Row], **fields: Any) -> Row | None:
    """The first row with times that has all of these fields."""
    for row in rows:
        if "times" in row and all(row[key] == value for key, value in fields.items()):
            return row
    return None


def seconds(value: float) -> str:
    """Three digits and a unit."""
    unit, scale = ("s", 1) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("us", 1e6)
    number = value * scale
    digits = 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:.{digits}f} {unit}"
