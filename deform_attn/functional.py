"""Multi-scale deformable attention as functions: what a call means, on every backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deform_attn.backends import choose_backend
from deform_attn.checks import (
    check,
    check_method,
    check_scale,
    converted,
    explained,
)
from deform_attn.composite import unfused
from deform_attn.levels import Levels, level_operands
from deform_attn.operands import FusedOperands, Operands, acc_dtype
from deform_attn.operator import call_discrete

__all__ = ["gradients", "ms_deform_attn", "ms_deform_attn_fused"]

_CPU = torch.device("cpu")


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
    value_mask: Tensor | None = None,
) -> Tensor:
    """Sample feature maps of several scales at a few points per query, and sum the samples.

    For every query and head, ``output = sum over points of attention_weight * bilinear(value,
    sampling_location)``. A location is a fraction of its map: ``x = location_x * width - 1/2`` in
    pixels; pixels outside the map are zero. Deformable DETR (arXiv 2010.04159), equation 3.

    Args:
        value: feature maps of all levels, one row per pixel: ``[batch, rows, num_heads,
            head_dim]`` in float64, float32, float16 or bfloat16.
        spatial_shapes: ``(height, width)`` of each level: an integer tensor ``[num_levels, 2]`` on
            value's device or the CPU, or a list of pairs.
        level_start_index: row of each level's first pixel: ``[num_levels]`` as a tensor or a list;
            None if the levels follow one another. Levels may overlap or leave gaps.
        sampling_locations: ``(x, y)`` as fractions of the map,
            ``[batch, queries, num_heads, num_levels, points, 2]``, or with ``num_points``
            ``[batch, queries, num_heads, sum(num_points), 2]``. float32 (float64 for float64
            values); other dtypes are converted. A location with NaN or infinity samples zero.
        attention_weights: shape of ``sampling_locations`` without its last dimension; in value's
            or the locations' dtype, other dtypes are converted.
        num_points: number of points in each level, if it differs between levels.
        method: ``"default"``: bilinear interpolation. ``"discrete"`` as in RT-DETRv2 (arXiv
            2407.17140): a point reads the one pixel ``trunc(location * size + 1/2)``, clamped to
            the map (pixel 0 for NaN), and locations get no gradient. It runs in plain PyTorch on
            every device.
        official_clamp: only for ``"discrete"``: clamp ``x`` to ``height - 1`` instead of
            ``width - 1``, as RT-DETRv2's official code does. Set it for weights that were trained
            with that code on maps that are wider than high; on square maps it changes nothing.
        backend: ``"compiled"``, ``"triton"`` or ``"reference"``; None chooses the first that runs
            on value's device (see :func:`deform_attn.choose_backend`).
        value_mask: ``[batch, rows]`` in bool, True for padding: such a row reads as zero, whatever
            it holds, and its gradient is zero. The kernels read the mask where they read pixels,
            which takes less memory and time than ``masked_fill`` of ``value``.

    Returns:
        ``[batch, queries, num_heads * head_dim]`` in value's dtype. Sums are computed in float32
        (float64 for float64 values).

    Raises:
        TypeError: an argument that must be a tensor is not.
        ValueError: a rank, shape, dtype, device or level size does not fit; the message names the
            argument, what was expected and what came.
        RuntimeError: ``backend`` cannot run on value's device and dtype.

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
        value_mask,
    )
    return explained(_attention, _check_attention, arguments, method, official_clamp, backend)


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
    value_mask: Tensor | None = None,
) -> Tensor:
    """Compute softmax, sampling locations and attention in one operator.

    :func:`ms_deform_attn` whose weights are the softmax of ``attention_logits`` over all points of
    a query and head, and whose locations are relative to ``reference_points``: ``(x, y) + offset /
    (width, height)`` for points, ``(cx, cy) + offset * (w, h) * offset_scale / points`` for boxes,
    where ``points`` is the number of points in the level. For rotated boxes the offsets turn with
    the box: ``(cx, cy) + R(angle) (offset * (w, h) * offset_scale / points)`` with ``R(angle) (x,
    y) = (x cos - y sin, x sin + y cos)``. The compiled and the Triton backend have one kernel for
    it, which writes neither locations nor weights to memory; the reference backend computes the
    steps one after the other.

    Args:
        value: as in :func:`ms_deform_attn`: ``[batch, rows, num_heads, head_dim]``.
        spatial_shapes: as in :func:`ms_deform_attn`.
        level_start_index: as in :func:`ms_deform_attn`.
        reference_points: as fractions of the map, ``[batch, queries, num_levels, 2]``, points
            ``(x, y)``; ``[batch, queries, num_levels, 4]``, boxes ``(cx, cy, w, h)``; or
            ``[batch, queries, num_levels, 5]``, rotated boxes ``(cx, cy, w, h, angle)``. The angle
            is in radians, from the x axis towards the y axis: clockwise in an image, whose y axis
            points down. Offsets turn in fractions of the map, as in the oriented head of
            GTR (LibreYOLO): on a map that is not square the box is sheared. Dimension 2 may be
            1: the same for all levels.
        sampling_offsets: ``[batch, queries, num_heads, num_levels, points, 2]``, or with
            ``num_points`` ``[batch, queries, num_heads, sum(num_points), 2]``; in pixels of the
            level for points, in ``(w, h) * offset_scale / points`` along the sides of the box for
            boxes.
        attention_logits: shape of ``sampling_offsets`` without its last dimension.
        num_points: number of points in each level, if it differs between levels.
        offset_scale: fraction of a box's side that ``points`` offsets of 1 add up to.
        method: as in :func:`ms_deform_attn`; with ``"discrete"`` reference points and offsets get
            no gradient.
        official_clamp: as in :func:`ms_deform_attn`.
        backend: as in :func:`ms_deform_attn`.
        value_mask: as in :func:`ms_deform_attn`.

    Returns:
        ``[batch, queries, num_heads * head_dim]`` in value's dtype. Locations, softmax and sums are
        computed in float32 (float64 for float64 values).

    Raises:
        TypeError: an argument that must be a tensor is not.
        ValueError: a rank, shape, dtype, device or level size does not fit.
        RuntimeError: ``backend`` cannot run on value's device and dtype.

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
        value,
        spatial_shapes,
        level_start_index,
        reference_points,
        sampling_offsets,
        attention_logits,
        num_points,
        offset_scale,
        value_mask,
    )
    return explained(_fused, _check_fused, arguments, method, official_clamp, backend)


def gradients(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    value_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, sampling_locations and attention_weights of :func:`ms_deform_attn`.

    For callers with an ``autograd.Function`` of their own; arguments as in :func:`ms_deform_attn`.

    Args:
        grad_output: ``[B, Q, M * D]``, in value's dtype.
        value: as in :func:`ms_deform_attn`, as are the others.
        spatial_shapes: likewise.
        level_start_index: likewise.
        sampling_locations: likewise.
        attention_weights: likewise.
        value_mask: likewise.

    Returns:
        Each in the shape and the dtype of its argument.

    Example:
        >>> import torch
        >>> from deform_attn.functional import gradients
        >>> value, locations = torch.rand(1, 12, 2, 4), torch.rand(1, 5, 2, 1, 3, 2)
        >>> weights, grad_output = torch.rand(1, 5, 2, 1, 3), torch.rand(1, 5, 8)
        >>> found = gradients(grad_output, value, [(4, 3)], None, locations, weights)
        >>> [gradient.shape == x.shape for gradient, x in zip(found, (value, locations, weights))]
        [True, True, True]
    """
    arguments = (
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations,
        attention_weights,
        None,
        value_mask,
    )
    return explained(_gradients, _check_attention, arguments, grad_output)


def _attention(
    arguments: tuple[Any, ...], method: str, official_clamp: bool, backend: str | None
) -> Tensor:
    value = arguments[0]
    chosen = choose_backend(_device_type(value), value.dtype, backend)
    check_method(method, official_clamp)
    operands = _as_operands(*arguments)
    if method == "discrete":
        return _discrete(operands, official_clamp)
    return chosen.call(*operands)


def _device_type(value: Tensor) -> str:
    """As ``value.device.type``, which takes four times as long for a CPU tensor."""
    device = value.device
    return "cpu" if device == _CPU else device.type


def _discrete(operands: tuple[Any, ...], official_clamp: bool) -> Tensor:
    *others, value_mask = operands
    return call_discrete(*others, official_clamp, value_mask)


def _gradients(arguments: tuple[Any, ...], grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value, _, _, locations, weights, *_ = arguments
    chosen = choose_backend(_device_type(value), value.dtype)
    deterministic = torch.are_deterministic_algorithms_enabled()
    *operands, value_mask = _as_operands(*arguments)
    grad_value, grad_locations, grad_weights = chosen.backward(
        grad_output.contiguous(), *operands, deterministic, [True] * 3, value_mask
    )
    return grad_value, grad_locations.to(locations.dtype), grad_weights.to(weights.dtype)


def _as_operands(
    value: Tensor,
    shapes: Levels,
    starts: Tensor | Sequence[int] | None,
    locations: Tensor,
    weights: Tensor,
    num_points: Sequence[int] | None,
    value_mask: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments as the operator takes them: a tuple, because building a record is slower."""
    dtype = acc_dtype(value.dtype)
    if locations.dtype is not dtype:
        locations = converted("sampling_locations", locations, dtype)
    if weights.dtype is not dtype and weights.dtype is not value.dtype:
        weights = converted("attention_weights", weights, dtype)
    spatial_shapes, level_start_index, level_sizes = level_operands(shapes, starts)
    counts = None if num_points is None else list(num_points)
    return (
        value,
        spatial_shapes,
        level_start_index,
        locations,
        weights,
        level_sizes,
        counts,
        value_mask,
    )


def _fused(
    arguments: tuple[Any, ...], method: str, official_clamp: bool, backend: str | None
) -> Tensor:
    value, shapes, starts, reference, offsets, logits, num_points, offset_scale, mask = arguments
    chosen = choose_backend(_device_type(value), value.dtype, backend)
    check_method(method, official_clamp)
    if not (type(offset_scale) is float and abs(offset_scale) < math.inf):
        check_scale(offset_scale)
    kernel = chosen.call_fused if method == "default" else None
    if kernel is None and not torch.compiler.is_compiling():
        _check_fused(arguments)  # broadcasting would accept operands that do not fit
    dtype = acc_dtype(value.dtype)
    if reference.dtype is not dtype:
        reference = converted("reference_points", reference, dtype)
    if offsets.dtype is not logits.dtype or offsets.dtype is not value.dtype:
        offsets = converted("sampling_offsets", offsets, dtype)
        logits = converted("attention_logits", logits, dtype)
    shapes, starts, level_sizes = level_operands(shapes, starts)
    counts = None if num_points is None else list(num_points)
    operands = (
        value,
        shapes,
        starts,
        reference,
        offsets,
        logits,
        level_sizes,
        counts,
        offset_scale,
        mask,
    )
    if kernel is not None:
        return kernel(*operands)
    composed = unfused(FusedOperands(*operands))
    if method == "discrete":
        return _discrete(composed, official_clamp)
    return chosen.call(*composed)


def _check_attention(arguments: tuple[Any, ...]) -> None:
    *tensors, num_points, value_mask = arguments
    check(Operands(*tensors)._replace(num_points=num_points, value_mask=value_mask))


def _check_fused(arguments: tuple[Any, ...]) -> None:
    *tensors, num_points, _, value_mask = arguments
    check(FusedOperands(*tensors)._replace(num_points=num_points, value_mask=value_mask))
