"""Multi-scale deformable attention as a function: the contract, whichever backend serves it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from deform_attn.backends import choose_backend
from deform_attn.inputs import Levels, check, location_dtype

__all__ = ["ms_deform_attn"]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    num_points: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sample feature maps of several scales at a few points a query and sum them, weighted.

    For every query and head, ``output = sum over points of attention_weight * bilinear(value,
    sampling_location)``. A location is a fraction of its map: ``x = location_x * width - 1/2`` in
    pixels, pixels outside are zero. Deformable DETR (arXiv 2010.04159), equation 3.

    Args:
        value: feature maps of all levels, one row a pixel: ``[batch, rows, num_heads, head_dim]``
            in float64, float32, float16 or bfloat16.
        spatial_shapes: ``(height, width)`` of each level: an integer tensor ``[num_levels, 2]`` on
            value's device or the CPU, or a list of pairs.
        level_start_index: row of each level's first pixel: ``[num_levels]`` as a tensor or a list;
            None where the levels follow one another. Levels may overlap or leave gaps.
        sampling_locations: ``(x, y)`` as fractions of the map,
            ``[batch, queries, num_heads, num_levels, points, 2]``, or with ``num_points``
            ``[batch, queries, num_heads, sum(num_points), 2]``. float32 (float64 for float64
            values); other dtypes are converted. NaN and infinity sample zero.
        attention_weights: shape of ``sampling_locations`` without its last dimension; in value's
            or the locations' dtype, others are converted.
        num_points: number of points in each level where they differ.
        backend: ``"compiled"``, ``"triton"`` or ``"reference"``; None chooses the first that runs
            on value's device (see :func:`deform_attn.choose_backend`).

    Returns:
        ``[batch, queries, num_heads * head_dim]`` in value's dtype. Sums are float32 at least.

    Raises:
        TypeError: an argument that must be a tensor is not.
        ValueError: a rank, shape, dtype, device or level size does not fit; the message names the
            argument, what was expected and what came.
        RuntimeError: the backend that was asked for cannot run.

    Example:
        >>> import torch
        >>> from deform_attn import ms_deform_attn
        >>> shapes = [(8, 6), (4, 3)]
        >>> value = torch.rand(2, 8 * 6 + 4 * 3, 4, 16)
        >>> locations = torch.rand(2, 5, 4, len(shapes), 3, 2)
        >>> weights = torch.rand(2, 5, 4, len(shapes) * 3).softmax(-1).view(2, 5, 4, 2, 3)
        >>> ms_deform_attn(value, shapes, None, locations, weights).shape
        torch.Size([2, 5, 64])
    """
    if torch.compiler.is_compiling():
        return _call(
            value,
            spatial_shapes,
            level_start_index,
            sampling_locations,
            attention_weights,
            num_points,
            backend,
        )
    try:
        return _call(
            value,
            spatial_shapes,
            level_start_index,
            sampling_locations,
            attention_weights,
            num_points,
            backend,
        )
    except (RuntimeError, ValueError, TypeError, AttributeError):
        # Kernels refuse what does not fit; which argument is at fault is looked for only then,
        # because looking costs as much as a small call.
        check(
            value,
            spatial_shapes,
            level_start_index,
            sampling_locations,
            attention_weights,
            num_points,
        )
        raise


def _call(
    value: Tensor,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int] | None,
    backend: str | None,
) -> Tensor:
    chosen = choose_backend(value.device.type, value.dtype, backend)
    real = location_dtype(value.dtype)
    if sampling_locations.dtype is not real:
        sampling_locations = _converted("sampling_locations", sampling_locations, real)
    weight_dtype = attention_weights.dtype
    if weight_dtype is not real and weight_dtype is not value.dtype:
        attention_weights = _converted("attention_weights", attention_weights, real)

    shapes, sizes = None, None
    if isinstance(spatial_shapes, Tensor):
        shapes = spatial_shapes
    else:
        sizes = [side for height, width in spatial_shapes for side in (height, width)]
    if level_start_index is not None and not isinstance(level_start_index, Tensor):
        level_start_index = torch.tensor([index(start) for start in level_start_index])
    return chosen.call(
        value,
        shapes,
        level_start_index,
        sampling_locations,
        attention_weights,
        sizes,
        None if num_points is None else list(num_points),
    )


def _converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    return tensor.to(dtype)
