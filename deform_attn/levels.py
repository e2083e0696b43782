"""The levels of a call as operands: tensors on a device, or numbers on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "LARGEST_SIDE",
    "Levels",
    "as_levels",
    "host_level_sizes",
    "points_per_level",
    "readable",
]

Levels: TypeAlias = Tensor | Sequence[Sequence[int]]

LARGEST_SIDE = 2**31 - 1


def points_per_level(
    sampling_locations: Tensor, num_levels: int, num_points: Sequence[int] | None
) -> list[int]:
    """How many points of a query and head sample each level."""
    if num_points is not None:
        return list(num_points)
    return [sampling_locations.shape[4]] * num_levels


def readable(tensor: Tensor, *, wait: bool = False) -> bool:
    """Whether a tensor's numbers can be read here and now; ``wait``: from another device too."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return False  # traced: there are no numbers yet
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False  # mapped: many numbers at once
    return tensor.device.type == "cpu" or (wait and not tensor.is_meta)


def host_level_sizes(
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    level_sizes: Sequence[int] | None,
) -> list[tuple[int, int, int]]:
    """``(height, width, start)`` of each level as numbers; waits for a GPU that holds them."""
    if spatial_shapes is not None:
        sizes = spatial_shapes.tolist()
    else:
        assert level_sizes is not None
        sizes = [list(level_sizes[i : i + 2]) for i in range(0, len(level_sizes), 2)]
    if level_start_index is not None:
        starts = level_start_index.tolist()
    else:
        starts = [0]
        for height, width in sizes[:-1]:
            starts.append(starts[-1] + height * width)
    return [(height, width, start) for (height, width), start in zip(sizes, starts)]


def as_levels(spatial_shapes: Tensor | None, level_sizes: Sequence[int] | None) -> Levels:
    """The levels of an operator's call as its caller gave them: a tensor or pairs."""
    if (spatial_shapes is None) == (level_sizes is None):
        raise ValueError(
            "spatial_shapes: expected either a tensor or level_sizes, got "
            + ("neither" if level_sizes is None else "both")
        )
    if spatial_shapes is not None:
        return spatial_shapes
    assert level_sizes is not None
    if len(level_sizes) % 2:
        raise ValueError(
            "level_sizes: expected a height and a width for each level, got "
            f"{len(level_sizes)} numbers"
        )
    return list(zip(level_sizes[0::2], level_sizes[1::2]))
