"""The module family: each member made small, and a call of it as its peer makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deform_attn import MSDeformableAttention, MSDeformAttn, MultiScaleDeformableAttention

CHANNELS, HEADS = 32, 4
LEVELS = ((5, 7), (3, 4), (2, 1))


@dataclass(frozen=True)
class Member:
    name: str
    make: Callable[[], nn.Module]
    reference_size: int  # 2: points, 4: boxes

    def arguments(
        self,
        batch: int = 2,
        queries: int = 5,
        levels: tuple[tuple[int, int], ...] = LEVELS,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        """A call, by keyword; the first three tensors of it have gradients."""
        rows = sum(height * width for height, width in levels)
        query, value = (
            torch.randn(batch, n, CHANNELS, device=device, dtype=dtype) for n in (queries, rows)
        )
        boxes = self.reference_size == 4
        shape = (batch, queries, 1 if boxes else len(levels), self.reference_size)
        call: dict[str, Any] = {
            "query": query,
            "reference_points": torch.rand(shape, device=device, dtype=dtype),
        }
        if boxes:
            call["value"] = value
            if self.name == "dfine":
                by_head = value.unflatten(-1, (HEADS, -1)).permute(0, 2, 3, 1)
                call["value"] = by_head.split([height * width for height, width in levels], -1)
            return call | {"value_spatial_shapes": list(levels)}
        shapes = torch.tensor(levels, device=device)
        starts = shapes.prod(-1).cumsum(0) - shapes.prod(-1)
        if self.name == "mmcv":
            call |= {"value": value, "spatial_shapes": shapes, "level_start_index": starts}
            return {
                key: tensor.transpose(0, 1) if key in ("query", "value") else tensor
                for key, tensor in call.items()
            }
        return call | {
            "input_flatten": value,
            "input_spatial_shapes": shapes,
            "input_level_start_index": starts,
        }


def lively(module: nn.Module) -> nn.Module:
    """With weights under which offsets and attention differ from query to query."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def tensors_of(call: dict[str, Any]) -> dict[str, Tensor]:
    """What of a call may have gradients, by a name for each tensor."""
    found = {}
    for name, given in call.items():
        for i, tensor in enumerate(given if isinstance(given, tuple) else [given]):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                found[f"{name}[{i}]" if isinstance(given, tuple) else name] = tensor
    return found


def with_tensors(call: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The call with other tensors in the place of those that `tensors_of` names."""
    changed = dict(call)
    for name, tensor in tensors.items():
        key, _, i = name.partition("[")
        if i:
            parts = list(changed[key])
            parts[int(i[:-1])] = tensor
            changed[key] = tuple(parts)
        else:
            changed[key] = tensor
    return changed


FAMILY = {
    member.name: member
    for member in (
        Member("official", lambda: MSDeformAttn(CHANNELS, 3, HEADS, 2), 2),
        Member("mmcv", lambda: MultiScaleDeformableAttention(CHANNELS, HEADS, 3, 2, dropout=0), 2),
        Member("rtdetr", lambda: MSDeformableAttention(CHANNELS, HEADS, 3, 2, variant="rtdetr"), 4),
        Member("rtdetrv2", lambda: MSDeformableAttention(CHANNELS, HEADS, 3, [3, 1, 2]), 4),
        Member("discrete", lambda: MSDeformableAttention(CHANNELS, HEADS, 3, 2, "discrete"), 4),
        Member(
            "dfine",
            lambda: MSDeformableAttention(CHANNELS, HEADS, 3, [3, 1, 2], variant="dfine"),
            4,
        ),
    )
}
