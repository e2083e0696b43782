"""Multi-scale deformable attention as functions: the contract, whichever backend serves it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from deform_attn.backends import Backend, choose_backend
from deform_attn.checks import acc_dtype, check, check_fused, check_method
from deform_attn.composite import discrete, fused_points, on_device
from deform_attn.levels import Levels

__all__ = ["ms_deform_attn", "ms_deform_attn_fused"]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    num_points: Sequence[int] | None = None,
    method: str = "default",
    official_clamp: bool = False,
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
        method: ``"default"``, or ``"discrete"`` as in RT-DETRv2 (arXiv 2407.17140):
            a point samples the one pixel ``trunc(location * size + 1/2)``, or the nearest on the
            map (pixel 0 for NaN), and locations get no gradient. Pixels are gathered in plain
            PyTorch on every device: no kernel, and any order of derivatives.
        official_clamp: for ``"discrete"``, pixels as RT-DETRv2's official code picks them, which
            takes the height for the width: ``x`` is at most ``height - 1``. Needed for what was
            trained that way on wide maps; the same on square ones.
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
    arguments = (
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations,
        attention_weights,
        num_points,
        method,
        official_clamp,
        backend,
    )
    if torch.compiler.is_compiling():
        return _attention(*arguments)
    try:
        return _attention(*arguments)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        # Kernels refuse what does not fit; which argument is at fault is looked for only then,
        # because looking costs as much as a small call.
        check(*arguments[:6])
        raise


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    num_points: Sequence[int] | None = None,
    offset_scale: float = 0.5,
    method: str = "default",
    official_clamp: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The part of a layer between its projections: softmax, offsets to locations, attention.

    As :func:`ms_deform_attn` with the softmax of ``attention_logits`` over all points of a head as
    weights, and with locations relative to ``reference_points``: ``(x, y) + offset / (width,
    height)`` for points, ``(cx, cy) + offset * (w, h) * offset_scale / points`` for boxes, where
    ``points`` is the number of points in the level. One kernel that writes neither locations nor
    weights to memory; the reference backend composes it.

    Args:
        value: as in :func:`ms_deform_attn`: ``[batch, rows, num_heads, head_dim]``.
        spatial_shapes: as in :func:`ms_deform_attn`.
        level_start_index: as in :func:`ms_deform_attn`.
        reference_points: ``[batch, queries, num_levels, 2]``, points ``(x, y)``, or
            ``[batch, queries, num_levels, 4]``, boxes ``(cx, cy, w, h)``, as fractions of the map;
            with one level, the same for all.
        sampling_offsets: ``[batch, queries, num_heads, num_levels, points, 2]``, or with
            ``num_points`` ``[batch, queries, num_heads, sum(num_points), 2]``; in pixels of the
            level for points, in portions of the box for boxes.
        attention_logits: shape of ``sampling_offsets`` without its last dimension.
        num_points: number of points in each level where they differ.
        offset_scale: portion of a box's side that the offsets of a level span together.
        method: as in :func:`ms_deform_attn`; with ``"discrete"`` reference points and offsets get
            no gradient.
        official_clamp: as in :func:`ms_deform_attn`.
        backend: as in :func:`ms_deform_attn`.

    Returns:
        ``[batch, queries, num_heads * head_dim]`` in value's dtype. Locations, softmax and sums are
        float32 at least.

    Raises:
        TypeError: an argument that must be a tensor is not.
        ValueError: a rank, shape, dtype, device or level size does not fit.
        RuntimeError: the backend that was asked for cannot run.

    Example:
        >>> import torch
        >>> from deform_attn import ms_deform_attn_fused
        >>> shapes = [(8, 6), (4, 3)]
        >>> value = torch.rand(2, 8 * 6 + 4 * 3, 4, 16)
        >>> reference, offsets = torch.rand(2, 5, 2, 2), torch.randn(2, 5, 4, 2, 3, 2)
        >>> logits = torch.randn(2, 5, 4, 2, 3)
        >>> ms_deform_attn_fused(value, shapes, None, reference, offsets, logits).shape
        torch.Size([2, 5, 64])
    """
    arguments = (
        *(value, spatial_shapes, level_start_index, reference_points, sampling_offsets),
        *(attention_logits, num_points),
    )
    options = (offset_scale, method, official_clamp, backend)
    if torch.compiler.is_compiling():
        return _layer(*arguments, *options)
    try:
        return _layer(*arguments, *options)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        check_fused(*arguments)
        raise


def gradients(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of value, sampling_locations and attention_weights: for callers that have autograd's part."""
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    chosen, operands = _settled(*inputs, None, None)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        grads = chosen.backward(grad_output.contiguous(), *operands, deterministic, [True] * 3)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        check(*inputs, None)
        raise
    of_value, of_locations, of_weights = grads
    return (
        of_value,
        of_locations.to(sampling_locations.dtype),
        of_weights.to(attention_weights.dtype),
    )


def _attention(
    value: Tensor,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int] | None,
    method: str,
    official_clamp: bool,
    backend: str | None,
) -> Tensor:
    check_method(method)
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    chosen, operands = _settled(*inputs, num_points, backend)
    if method == "default":
        return chosen.call(*operands)
    if not torch.compiler.is_compiling():
        # composing broadcasts what does not fit, so what is at fault is looked for first
        check(*inputs, num_points)
    _, _, _, locations, weights, _, counts = operands
    return discrete(
        *(value, spatial_shapes, level_start_index, locations, weights, counts, official_clamp)
    )


def _settled(
    value: Tensor,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int] | None,
    backend: str | None,
) -> tuple[Backend, tuple[Any, ...]]:
    """The backend of a call, and the operands that it takes."""
    chosen = choose_backend(value.device.type, value.dtype, backend)
    dtype = value.dtype
    real = acc_dtype(dtype)
    if sampling_locations.dtype is not real:
        sampling_locations = _converted("sampling_locations", sampling_locations, real)
    if attention_weights.dtype is not real and attention_weights.dtype is not dtype:
        attention_weights = _converted("attention_weights", attention_weights, real)
    shapes, starts, sizes = _levels(spatial_shapes, level_start_index)
    counts = None if num_points is None else list(num_points)
    return chosen, (value, shapes, starts, sampling_locations, attention_weights, sizes, counts)


def _layer(
    value: Tensor,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    num_points: Sequence[int] | None,
    offset_scale: float,
    method: str,
    official_clamp: bool,
    backend: str | None,
) -> Tensor:
    chosen = choose_backend(value.device.type, value.dtype, backend)
    real = acc_dtype(value.dtype)
    reference_points = _converted("reference_points", reference_points, real)
    if sampling_offsets.dtype != attention_logits.dtype or sampling_offsets.dtype != value.dtype:
        sampling_offsets = _converted("sampling_offsets", sampling_offsets, real)
        attention_logits = _converted("attention_logits", attention_logits, real)
    check_method(method)
    if chosen.call_fused is not None and method == "default":
        shapes, starts, sizes = _levels(spatial_shapes, level_start_index)
        counts = None if num_points is None else list(num_points)
        return chosen.call_fused(
            *(value, shapes, starts, reference_points, sampling_offsets, attention_logits),
            *(sizes, counts, offset_scale),
        )
    if not torch.compiler.is_compiling():
        # composing broadcasts what does not fit, so what is at fault is looked for first
        check_fused(
            *(value, spatial_shapes, level_start_index, reference_points, sampling_offsets),
            *(attention_logits, num_points),
        )
    locations, weights = fused_points(
        on_device(spatial_shapes, value.device),
        *(reference_points, sampling_offsets, attention_logits, num_points, offset_scale),
    )
    return _attention(
        *(value, spatial_shapes, level_start_index, locations, weights, num_points),
        *(method, official_clamp, chosen.name),
    )


def _levels(
    spatial_shapes: Levels, level_start_index: Tensor | Sequence[int] | None
) -> tuple[Tensor | None, Tensor | None, list[int] | None]:
    """Levels as the operators take them: shapes and starts as tensors, or sizes as numbers."""
    starts = level_start_index
    if starts is not None and not isinstance(starts, Tensor):
        starts = torch.tensor([index(start) for start in starts])
    if isinstance(spatial_shapes, Tensor):
        return spatial_shapes, starts, None
    return None, starts, [side for height, width in spatial_shapes for side in (height, width)]


def _converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    return tensor.to(dtype)
