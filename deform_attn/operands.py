"""The operands of each operator: one record per schema, its fields in the schema's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "AnyOperands",
    "DiscreteOperands",
    "FusedOperands",
    "Operands",
    "acc_dtype",
    "of_backward",
]


class Operands(NamedTuple):
    """The operands of ``ms_deform_attn``.

    The levels are ``spatial_shapes``, a tensor, or ``level_sizes``, numbers ``[h0, w0, h1, w1,
    ...]``. Without ``level_start_index`` the levels follow one another. Locations have six
    dimensions, or five with ``num_points``. ``value_mask`` is True for rows that read as zero.
    """

    value: Tensor
    spatial_shapes: Tensor | None
    level_start_index: Tensor | None
    sampling_locations: Tensor
    attention_weights: Tensor
    level_sizes: Sequence[int] | None = None
    num_points: Sequence[int] | None = None
    value_mask: Tensor | None = None


class DiscreteOperands(NamedTuple):
    """The operands of ``ms_deform_attn_discrete``: those of :class:`Operands` and the clamp."""

    value: Tensor
    spatial_shapes: Tensor | None
    level_start_index: Tensor | None
    sampling_locations: Tensor
    attention_weights: Tensor
    level_sizes: Sequence[int] | None = None
    num_points: Sequence[int] | None = None
    official_clamp: bool = False
    value_mask: Tensor | None = None


class FusedOperands(NamedTuple):
    """The operands of ``ms_deform_attn_fused``; levels as in :class:`Operands`."""

    value: Tensor
    spatial_shapes: Tensor | None
    level_start_index: Tensor | None
    reference_points: Tensor
    sampling_offsets: Tensor
    attention_logits: Tensor
    level_sizes: Sequence[int] | None = None
    num_points: Sequence[int] | None = None
    offset_scale: float = 0.5
    value_mask: Tensor | None = None


AnyOperands: TypeAlias = Operands | DiscreteOperands | FusedOperands


def of_backward(
    record: type[AnyOperands], inputs: Sequence[Any]
) -> tuple[Any, bool, Sequence[bool]]:
    """The operands of a backward operator's call, ``deterministic`` and ``output_mask``.

    Args:
        record: of the operands; ``value_mask``, its last field, comes last in the call.
        inputs: the arguments without the first, the output's gradient.
    """
    count = len(record._fields) - 1
    deterministic, output_mask, *mask = inputs[count:]
    return record(*inputs[:count], *mask), deterministic, output_mask


def acc_dtype(value_dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and locations: float64 for float64 values, else float32."""
    return torch.float64 if value_dtype is torch.float64 else torch.float32
