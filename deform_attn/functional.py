"""Multi-scale deformable attention as functions: what a call means, on every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deform_attn.backends import choose_backend
from deform_attn.checks import check, check_method, converted, explained
from deform_attn.composite import unfused
from deform_attn.levels import Levels, level_operands
from deform_attn.operands import FusedOperands, Operands, acc_dtype
from deform_attn.operator import call_discrete

__all__ = ["gradients", "ms_deform_attn", "ms_deform_attn_fused"]


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
    operands = Operands(
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations,
        attention_weights,
        None,
        num_points,
    )
    return explained(_attention, check, operands, method, official_clamp, backend)


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
    operands = FusedOperands(
        value,
        spatial_shapes,
        level_start_index,
        reference_points,
        sampling_offsets,
        attention_logits,
        None,
        num_points,
        offset_scale,
    )
    return explained(_fused, check, operands, method, official_clamp, backend)


def gradients(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, sampling_locations and attention_weights of :func:`ms_deform_attn`.

    For callers with an ``autograd.Function`` of their own; arguments as in :func:`ms_deform_attn`.
    """
    operands = Operands(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )
    return explained(_gradients, check, operands, grad_output)


def _attention(
    operands: Operands, method: str, official_clamp: bool, backend: str | None
) -> Tensor:
    value = operands.value
    chosen = choose_backend(value.device.type, value.dtype, backend)
    check_method(method)
    operands = _as_operators_take_them(operands)
    if method == "discrete":
        return call_discrete(*operands, official_clamp)
    return chosen.call(*operands)


def _fused(
    operands: FusedOperands, method: str, official_clamp: bool, backend: str | None
) -> Tensor:
    value, shapes, starts, reference, offsets, logits, _, num_points, offset_scale = operands
    chosen = choose_backend(value.device.type, value.dtype, backend)
    check_method(method)
    dtype = acc_dtype(value.dtype)
    composed = chosen.call_fused is None or method == "discrete"
    if composed and not torch.compiler.is_compiling():
        check(operands)  # broadcasting would accept operands that do not fit
    if reference.dtype is not dtype:
        reference = converted("reference_points", reference, dtype)
    if offsets.dtype is not logits.dtype or offsets.dtype is not value.dtype:
        offsets = converted("sampling_offsets", offsets, dtype)
        logits = converted("attention_logits", logits, dtype)
    shapes, starts, sizes = level_operands(shapes, starts)
    counts = None if num_points is None else list(num_points)
    operands = FusedOperands(
        value, shapes, starts, reference, offsets, logits, sizes, counts, offset_scale
    )
    if not composed:
        return chosen.call_fused(*operands)
    if method == "discrete":
        return call_discrete(*unfused(operands), official_clamp)
    return chosen.call(*unfused(operands))


def _gradients(operands: Operands, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = operands.value
    chosen = choose_backend(value.device.type, value.dtype)
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_value, grad_locations, grad_weights = chosen.backward(
        grad_output.contiguous(), *_as_operators_take_them(operands), deterministic, [True] * 3
    )
    return (
        grad_value,
        grad_locations.to(operands.sampling_locations.dtype),
        grad_weights.to(operands.attention_weights.dtype),
    )


def _as_operators_take_them(operands: Operands) -> Operands:
    """The operands of a caller in the dtypes and types of the schema."""
    value, shapes, starts, locations, weights, _, num_points = operands
    dtype = acc_dtype(value.dtype)
    if locations.dtype is not dtype:
        locations = converted("sampling_locations", locations, dtype)
    if weights.dtype is not dtype and weights.dtype is not value.dtype:
        weights = converted("attention_weights", weights, dtype)
    shapes, starts, sizes = level_operands(shapes, starts)
    counts = None if num_points is None else list(num_points)
    return Operands(value, shapes, starts, locations, weights, sizes, counts)
