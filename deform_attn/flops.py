"""The operators' floating-point operations, for ``torch.utils.flop_counter.FlopCounterMode``.

PyTorch's counter imports triton, which takes longer than importing this package. So the formulas
are registered when both are imported, and at the first call inside a counter at the latest.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from deform_attn.operands import (
    AnyOperands,
    DiscreteOperands,
    FusedOperands,
    Operands,
    of_backward,
)

__all__ = ["register"]

_COUNTER = "torch.utils.flop_counter"
_OPERATORS: dict[str, type[AnyOperands]] = {
    "ms_deform_attn": Operands,
    "ms_deform_attn_triton": Operands,
    "ms_deform_attn_reference": Operands,
    "ms_deform_attn_fused": FusedOperands,
    "ms_deform_attn_fused_triton": FusedOperands,
    "ms_deform_attn_discrete": DiscreteOperands,
}
_registered = False


def register() -> None:
    """Register the formulas with PyTorch's counter, where that is imported."""
    global _registered
    if _COUNTER not in sys.modules:
        return
    counter = sys.modules[_COUNTER]
    if not _registered:
        _registered = True
        for name, record in _OPERATORS.items():
            for suffix, formula in (("", _forward), ("_backward", _backward)):
                packet = getattr(torch.ops.deform_attn, name + suffix)
                counter.register_flop_formula(packet)(formula(record))
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, counter._FlopCounterMode):  # entered before: it has a copy
            mode.counter.flop_registry = counter.flop_registry | mode.counter.flop_registry


def _forward(record: type[AnyOperands]) -> Callable[..., int]:
    """A multiplication and an addition for each pixel and channel; softmax is not counted."""

    def count(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
        operands: Any = record(*shapes)
        return 2 * _channels(operands)

    return count


def _backward(record: type[AnyOperands]) -> Callable[..., int]:
    """As much for the gradient of value, and as much for all others."""

    def count(grad_output: Any, *shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
        operands, _, output_mask = of_backward(record, shapes)
        return 2 * _channels(operands) * (bool(output_mask[0]) + any(output_mask[1:]))

    return count


def _channels(operands: Any) -> int:
    """Channels of all pixels that the points of a call sample; ``operands`` holds shapes."""
    discrete = isinstance(operands, DiscreteOperands)
    weights = operands[5] if isinstance(operands, FusedOperands) else operands[4]
    return (1 if discrete else 4) * math.prod(weights) * int(operands.value[3])
