"""The operators in plain PyTorch: pixels are gathered by index, then weighted and summed.

PyTorch can differentiate this any number of times, in reverse and forward mode. The kernels compute
first derivatives only; higher derivatives and forward-mode derivatives are computed here. Discrete
sampling is implemented here for every device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from deform_attn.checks import check_gradient, check_operands, masked
from deform_attn.levels import LARGEST_SIDE, count_points, level_pairs, level_tensor
from deform_attn.operands import (
    DiscreteOperands,
    FusedOperands,
    Operands,
    acc_dtype,
    of_backward,
)

__all__ = [
    "attention",
    "attention_backward",
    "discrete",
    "discrete_backward",
    "discrete_forward",
    "filled",
    "fused",
    "unfused",
]


Masked = TypeVar("Masked", Operands, DiscreteOperands, FusedOperands)


def filled(operands: Masked) -> Masked:
    """The same call without ``value_mask``: the masked rows of value are zeros."""
    mask = operands.value_mask
    if mask is None:
        return operands
    return operands._replace(value=_zero_where(mask, operands.value), value_mask=None)


def _zero_where(mask: Tensor | None, value: Tensor) -> Tensor:
    """Zeros in the masked rows ``[B, S]`` of value, or of its gradient, ``[B, S, M, D]``."""
    return value if mask is None else value.masked_fill(mask[..., None, None], 0)


def attention(operands: Operands) -> Tensor:
    """``ms_deform_attn``; exact where a point lies on a pixel's centre. Never waits for a GPU."""
    operands = filled(operands)
    value, locations = operands.value, operands.sampling_locations
    dtype = acc_dtype(value.dtype)
    B, Q, M = locations.shape[:3]
    weights = operands.attention_weights.to(dtype).reshape(B, Q, M, -1)
    pixels = value.to(dtype).flatten(0, 2)
    output = pixels.new_zeros((B, Q, M, value.shape[3]))
    for corner in _corners(operands):
        # where, not a product: what lies off the map must not pass on a NaN
        share = torch.where(corner.on_map, corner.across * corner.along * weights, 0)[..., None]
        corner_pixels = _gather(pixels, corner.position)
        output = output + (share * torch.where(corner.on_map[..., None], corner_pixels, 0)).sum(3)
    return output.flatten(2).to(value.dtype)


def attention_backward(
    grad_output: Tensor, operands: Operands, output_mask: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """First derivatives of :func:`attention`, for where autograd records nothing.

    Returns:
        Gradients of value, locations and weights; None for those whose flag is not set.
    """
    mask, operands = operands.value_mask, filled(operands)
    value, locations = operands.value, operands.sampling_locations
    dtype = acc_dtype(value.dtype)
    B, Q, M = locations.shape[:3]
    D = value.shape[3]
    weights = operands.attention_weights.to(dtype).reshape(B, Q, M, -1)
    grad = grad_output.to(dtype).reshape(B, Q, M, 1, D)
    pixels = value.to(dtype).flatten(0, 2)
    grad_pixels = torch.zeros_like(pixels) if output_mask[0] else None
    grad_x, grad_y, grad_weights = (torch.zeros_like(weights) for _ in range(3))
    for corner in _corners(operands):
        share = corner.across * corner.along
        if grad_pixels is not None:
            shares = torch.where(corner.on_map[..., None], (share * weights)[..., None] * grad, 0)
            grad_pixels.index_add_(0, corner.position.flatten(), shares.reshape(-1, D))
        product = (grad * _gather(pixels, corner.position)).sum(-1)
        product = torch.where(corner.on_map, product, 0)
        weighted = torch.where(corner.on_map, product * weights, 0)
        grad_weights += share * product
        grad_x += (corner.along if corner.dx else -corner.along) * weighted * corner.width
        grad_y += (corner.across if corner.dy else -corner.across) * weighted * corner.height
    grad_locations = torch.stack((grad_x, grad_y), -1).reshape(locations.shape)
    shape = operands.attention_weights.shape
    return masked(
        output_mask,
        None if grad_pixels is None else _zero_where(mask, _as_gradient(grad_pixels, value)),
        grad_locations,
        grad_weights.reshape(shape).to(operands.attention_weights.dtype),
    )


def _as_gradient(grad_pixels: Tensor, value: Tensor) -> Tensor:
    """The gradient of value from that of its pixels ``[B * S * M, D]``."""
    return grad_pixels.view(value.shape).to(value.dtype)


class _Corner(NamedTuple):
    """One of the four pixels of each point, ``[B, Q, M, K]``: (y + dy, x + dx)."""

    position: Tensor  # in value's pixels of all batch elements and heads; 0 where off the map
    on_map: Tensor
    across: Tensor  # share of the pixel in x
    along: Tensor  # and in y; the pixel weighs across * along
    dx: int
    dy: int
    height: Tensor  # of each point's level, [K]
    width: Tensor


def _corners(operands: Operands) -> Iterator[_Corner]:
    value, locations = operands.value, operands.sampling_locations
    S = value.shape[1]
    B, Q, M = locations.shape[:3]
    sizes = level_tensor(operands)  # [L, 2]
    rows = sizes.prod(-1)
    if operands.level_start_index is None:
        starts = rows.cumsum(0) - rows
    else:
        starts = operands.level_start_index.to(value.device, torch.int64)
    fits = (sizes > 0).all(-1) & (starts >= 0) & (starts + rows <= S)

    counts = count_points(locations, sizes.shape[0], operands.num_points)
    level = [index for index, count in enumerate(counts) for _ in range(count)]
    level_of_point = torch.tensor(level, dtype=torch.int64, device=value.device)
    height, width = sizes[level_of_point].unbind(-1)  # [K]
    start, fits = starts[level_of_point], fits[level_of_point]

    locations = locations.reshape(B, Q, M, len(level), 2)
    # beyond [-1, 2] no pixel is near; NaN fails both comparisons
    near = ((locations >= -1) & (locations <= 2)).all(-1, keepdim=True)
    x_location, y_location = locations.masked_fill(~near, -1).unbind(-1)
    left, right = _pixel_of(x_location, width)
    upper, down = _pixel_of(y_location, height)
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = left + dx, upper + dy
            on_map = fits & (x >= 0) & (x < width) & (y >= 0) & (y < height)
            row = torch.where(on_map, start + y * width + x, 0)
            across, along = right if dx else 1 - right, down if dy else 1 - down
            yield _Corner(_positions(value, row), on_map, across, along, dx, dy, height, width)


def _pixel_of(location: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The pixel left of (or at) a location, and the distance from it to the point, in [0, 1].

    Exact where a point lies on a pixel's centre, as the kernels are (csrc/bilinear.h): there,
    ``location * size`` may round onto a pixel that the point lies left of, and slopes would be
    taken from the wrong side. The error of the product has the true sign. No wider dtype is
    needed, which MPS does not have.
    """
    extent = size.to(location.dtype)
    product = location * extent
    error = _product_error(location.detach(), extent, product.detach())
    left = (product.detach() - 0.5).floor()
    past = (product - (left + 0.5)) + error
    before = past.detach() < 0
    left, past = torch.where(before, left - 1, left), torch.where(before, past + 1, past)
    return left.long(), past


def _product_error(a: Tensor, b: Tensor, product: Tensor) -> Tensor:
    """``a * b - product``, exactly (Dekker 1971): both are split into halves of their digits."""

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        scaled = x * (2**27 + 1 if x.dtype is torch.float64 else 2**12 + 1)
        high = scaled - (scaled - x)
        return high, x - high

    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def fused(operands: FusedOperands) -> Tensor:
    """``ms_deform_attn_fused``: softmax, offsets to locations, attention."""
    return attention(unfused(operands))


def unfused(operands: FusedOperands) -> Operands:
    """The operands of ``ms_deform_attn`` that compute the same: locations and weights."""
    reference, offsets = operands.reference_points, operands.sampling_offsets
    dtype, sizes = reference.dtype, level_pairs(operands)
    offsets, logits = offsets.to(dtype), operands.attention_logits.to(dtype)
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    counts = count_points(offsets, len(sizes), operands.num_points)
    one_for_all = reference.shape[2] == 1
    locations = []
    for level, offset in enumerate(offsets.flatten(3, -2).split(counts, 3)):  # [B, Q, M, P, 2]
        anchor = reference[:, :, 0 if one_for_all else level, None, None]
        if anchor.shape[-1] == 2:
            height, width = sizes[level]
            pixels = torch.stack((offset[..., 0] / width, offset[..., 1] / height), -1)
            locations.append(anchor + pixels)
        else:
            portion = operands.offset_scale / max(counts[level], 1)
            moved = offset * portion * anchor[..., 2:4]
            if anchor.shape[-1] == 5:
                moved = _turned(moved, anchor[..., 4])
            locations.append(anchor[..., :2] + moved)
    return Operands(
        operands.value,
        operands.spatial_shapes,
        operands.level_start_index,
        torch.cat(locations, 3).view(offsets.shape),
        weights,
        operands.level_sizes,
        operands.num_points,
        operands.value_mask,
    )


def _turned(vectors: Tensor, angle: Tensor) -> Tensor:
    """Vectors ``(x, y)``, turned by an angle in radians from the x axis towards the y axis."""
    x, y = vectors.unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((cos * x - sin * y, sin * x + cos * y), -1)


def discrete(operands: DiscreteOperands) -> Tensor:
    """``ms_deform_attn_discrete``: one pixel per point, RT-DETRv2's ``method="discrete"``.

    Each point reads exactly one pixel, so that its neighbours have no influence. Level sizes on a
    GPU are not read, and level sizes on the host are not copied to the GPU.
    """
    operands = filled(operands)
    value = operands.value
    M, D = value.shape[2:]
    B, Q = operands.sampling_locations.shape[:2]
    pixels = value.to(acc_dtype(value.dtype)).flatten(0, 2)
    output = pixels.new_zeros((B, Q, M, D))
    for index, weight in _picked(operands):
        output = output + (weight[..., None] * _gather(pixels, index)).sum(3)
    return output.flatten(2).to(value.dtype)


def discrete_forward(*inputs: Any) -> Tensor:
    """The kernel of ``ms_deform_attn_discrete`` on every device."""
    operands = DiscreteOperands(*inputs)
    check_operands(operands)  # broadcasting would accept operands that do not fit
    return discrete(operands)


def discrete_backward(grad_output: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    """The kernel of ``ms_deform_attn_discrete_backward``: gradients of value and weights.

    On a GPU ``index_add`` is deterministic under ``torch.use_deterministic_algorithms``.
    """
    operands, _, output_mask = of_backward(DiscreteOperands, inputs)
    check_operands(operands)
    check_gradient(grad_output, operands, output_mask, 2)
    mask, operands = operands.value_mask, filled(operands)
    value, weights = operands.value, operands.attention_weights
    dtype = acc_dtype(value.dtype)
    B, S, M, D = value.shape
    grad = grad_output.to(dtype).view(B, grad_output.shape[1], M, 1, D)
    pixels = value.to(dtype).flatten(0, 2)
    grad_pixels = torch.zeros_like(pixels) if output_mask[0] else None
    grad_weights = []
    for index, weight in _picked(operands):
        if grad_pixels is not None:
            grad_pixels.index_add_(0, index.flatten(), (weight[..., None] * grad).reshape(-1, D))
        if output_mask[1]:
            grad_weights.append((grad * _gather(pixels, index)).sum(-1))
    return (
        None if grad_pixels is None else _zero_where(mask, _as_gradient(grad_pixels, value)),
        torch.cat(grad_weights, 3).view(weights.shape).to(weights.dtype) if grad_weights else None,
    )


def _picked(operands: DiscreteOperands) -> Iterator[tuple[Tensor, Tensor]]:
    """For each level, of its points: positions of the pixels in ``[B * S * M, D]``, and weights."""
    value, dtype = operands.value, acc_dtype(operands.value.dtype)
    S, M = value.shape[1:3]
    B, Q = operands.sampling_locations.shape[:2]
    sizes = level_pairs(operands)
    starts: Any = operands.level_start_index
    starts = None if starts is None else starts.to(value.device, torch.int64)
    counts = count_points(operands.sampling_locations, len(sizes), operands.num_points)
    locations = operands.sampling_locations.detach().reshape(B, Q, M, sum(counts), 2)
    weights = operands.attention_weights.to(dtype).reshape(B, Q, M, sum(counts))
    end: Any = 0
    for level, (location, weight) in enumerate(
        zip(locations.split(counts, 3), weights.split(counts, 3))
    ):
        height, width = sizes[level]
        start = end if starts is None else starts[level]
        end = start + height * width
        x = _nearest(location[..., 0], width)
        if operands.official_clamp:
            x = x.clamp(max=height - 1)
        row = start + _nearest(location[..., 1], height) * width + x
        if isinstance(end, Tensor):  # its number is not read: a level that does not fit is empty
            fits = (height > 0) & (width > 0) & (end <= S)
            if starts is not None:
                fits = fits & (start >= 0)
            row, weight = torch.where(fits, row, 0), torch.where(fits, weight, 0)
        yield _positions(value, row), weight


def _nearest(location: Tensor, size: Tensor | int) -> Tensor:
    """``trunc(location * size + 1/2)``, clamped to the map; 0 for NaN."""
    index = (location * size + 0.5).nan_to_num(0.0)
    # clamped before the cast too: the cast of a number outside int64 is undefined
    return index.clamp(0, LARGEST_SIDE).long().clamp(max=size - 1)


def _positions(value: Tensor, row: Tensor) -> Tensor:
    """Rows ``[B, Q, M, K]`` of value ``[B, S, M, D]`` as positions in ``[B * S * M, D]``."""
    B, S, M, _ = value.shape
    batch = torch.arange(B, device=value.device).view(B, 1, 1, 1)
    head = torch.arange(M, device=value.device).view(M, 1)
    return (batch * S + row) * M + head


def _gather(pixels: Tensor, index: Tensor) -> Tensor:
    """``[*index.shape, D]``: whole vectors of channels.

    ``embedding`` is several times as fast as indexing, but until torch 2.11 its second derivative
    refuses symbolic sizes, as the derivative of ``index_select`` does.
    """
    if pixels.requires_grad:
        return pixels[index]
    return torch.nn.functional.embedding(index, pixels)
