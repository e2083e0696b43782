"""The mistakes that are made silently are found by the recorded outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deform_attn.detr import boxes, decoder, dfine, losses, matching, memory, queries

from .table import errors, quantity


def graph_kept(forward: Callable[..., Any]) -> Callable[..., Any]:
    def faulty(self: Any, i: int, x: Any, state: Any) -> Any:
        prediction, following = forward(self, i, x, state)
        return prediction, following | {"reference_points": prediction["boxes"]}

    return faulty


Faults = list[tuple[str, str, Any, str, Any]]
FAULTS: Faults = [
    # (system, what is wrong, where, attribute, replacement)
    ("dino", "eps", decoder, "inverse_sigmoid", lambda x, eps: boxes.inverse_sigmoid(x, 1e-5)),
    ("dino", "x before y", queries, "sine_of_box", lambda box, d: boxes.sine(box, d // 2)),
    (
        "dab_deformable",
        "padding counts",
        memory,
        "valid_ratio",
        lambda mask, dtype: torch.ones(len(mask), 2, dtype=dtype),
    ),
    (
        "dab_deformable",
        "references keep their graph",
        decoder.Heads,
        "forward",
        graph_kept(decoder.Heads.forward),
    ),
    (
        "stewart",
        "distance before order",
        matching.Lexicographic,
        "cost",
        staticmethod(lambda predicted, objects: torch.cdist(predicted, objects, p=1)),
    ),
    ("rtdetr_v1", "corners for centres", boxes, "to_corners", boxes.from_corners),
    ("deim", "no union of pairs", losses, "union", lambda sets: sets[0]),
    ("deim", "bins", dfine.EdgeBins, "forward", lambda self: torch.linspace(-4, 4, 33)),
    (
        "matcher_losses",
        "no GIoU in the cost",
        matching,
        "overlap",
        lambda a, b: (torch.zeros(1),) * 2,
    ),
]


@pytest.mark.parametrize(("system", "what", "where", "name", "fault"), FAULTS)
def test_a_planted_fault_is_found(
    system: str,
    what: str,
    where: Any,
    name: str,
    fault: Any,
    goldens: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(where, name, fault)
    found = errors(system, goldens)
    assert any(error > quantity(system, key)[1] for key, error in found.items()), what
