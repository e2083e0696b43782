"""The levels of a call as operands: tensors on a device, or numbers on the host."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from operator import index
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deform_attn.operands import AnyOperands

__all__ = [
    "LARGEST_SIDE",
    "METADATA_DTYPES",
    "Levels",
    "count_points",
    "first_rows",
    "is_integer",
    "level_operands",
    "level_pairs",
    "level_tensor",
    "read_levels",
    "readable",
]

Levels: TypeAlias = Tensor | Sequence[Sequence[int]]

LARGEST_SIDE = 2**31 - 1
METADATA_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def level_operands(
    spatial_shapes: Levels, level_start_index: Tensor | Sequence[int] | None
) -> tuple[Tensor | None, Tensor | None, list[int] | None]:
    """``spatial_shapes``, ``level_start_index`` and ``level_sizes`` as the operators take them."""
    starts = level_start_index
    if starts is not None and not isinstance(starts, Tensor):
        starts = _as_tensor(starts)
    if isinstance(spatial_shapes, Tensor):
        return spatial_shapes, starts, None
    sizes = [side for height, width in spatial_shapes for side in (height, width)]
    for side in sizes:
        if type(side) is not int:
            if any(isinstance(side, Tensor) for side in sizes):
                return _as_tensor(sizes).view(-1, 2), starts, None
            sizes = [side if isinstance(side, torch.SymInt) else index(side) for side in sizes]
            break
    return None, starts, sizes


def is_integer(number: object) -> bool:
    """Whether this can be a size: a Python, NumPy or symbolic integer, or a 0-d integer tensor."""
    if isinstance(number, Tensor):
        return number.dim() == 0 and number.dtype in METADATA_DTYPES
    return isinstance(number, (Integral, torch.SymInt)) and not isinstance(number, bool)


def _as_tensor(numbers: Sequence[Any]) -> Tensor:
    """An int64 tensor of numbers. Sizes that ``torch.jit.trace`` made 0-d tensors are kept."""
    tensors = [number for number in numbers if isinstance(number, Tensor)]
    if not tensors:
        return torch.tensor([index(number) for number in numbers], device="cpu")
    new: Any = {"dtype": torch.int64, "device": tensors[0].device}
    return torch.stack(
        [x.to(**new) if isinstance(x, Tensor) else torch.tensor(x, **new) for x in numbers]
    )


def level_pairs(operands: AnyOperands) -> Any:
    """``(height, width)`` of each level: numbers, or an int64 tensor on value's device.

    The tensor is not read: reading waits for the GPU, and a traced tensor has no numbers.
    """
    if operands.level_sizes is None:
        return level_tensor(operands)
    return list(zip(operands.level_sizes[0::2], operands.level_sizes[1::2]))


def level_tensor(operands: AnyOperands) -> Tensor:
    """``[num_levels, 2]`` of ``(height, width)`` in int64 on value's device."""
    shapes = operands.spatial_shapes
    if shapes is None:
        shapes = torch.tensor(operands.level_sizes, device="cpu").view(-1, 2)
    assert isinstance(shapes, Tensor)
    # in a narrower dtype, height * width would overflow
    return shapes.to(operands.value.device, torch.int64)


def read_levels(operands: AnyOperands) -> list[tuple[int, int, int]]:
    """``(height, width, start)`` of each level as numbers; waits for a GPU that holds them."""
    sizes: Any = operands.spatial_shapes
    sizes = level_pairs(operands) if sizes is None else sizes.tolist()
    starts: Any = operands.level_start_index
    starts = first_rows(sizes) if starts is None else starts.tolist()
    return [(height, width, start) for (height, width), start in zip(sizes, starts)]


def first_rows(sizes: Sequence[Sequence[int]]) -> list[int]:
    """Row of each level's first pixel where the levels follow one another."""
    starts = [0]
    for height, width in sizes[:-1]:
        starts.append(starts[-1] + height * width)
    return starts


def count_points(points: Tensor, num_levels: int, num_points: Sequence[int] | None) -> list[int]:
    """Number of points per query and head in each level; ``points`` are locations or offsets."""
    if num_points is not None:
        return list(num_points)
    return [points.shape[4]] * num_levels


def readable(tensor: Tensor, *, wait: bool = False) -> bool:
    """Whether the numbers of a tensor can be read without waiting for another device.

    Args:
        tensor: level sizes, a mask, ...
        wait: reading them from another device is allowed.
    """
    if torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return False  # traced: there are no numbers yet
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False  # mapped: many numbers at once
    return tensor.device.type == "cpu" or (wait and not tensor.is_meta)
