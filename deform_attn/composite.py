"""The operators in plain PyTorch: pixels are gathered by index, then weighted and summed.

PyTorch can differentiate this any number of times, in reverse and forward mode. The kernels compute
first derivatives only; higher derivatives and forward-mode derivatives are computed here. Discrete
sampling is implemented here for every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deform_attn.checks import check_gradient, check_operands
from deform_attn.levels import LARGEST_SIDE, count_points, level_pairs, level_tensor
from deform_attn.operands import DiscreteOperands, FusedOperands, Operands, acc_dtype

__all__ = ["attention", "discrete", "discrete_backward", "discrete_forward", "fused", "unfused"]


def attention(operands: Operands) -> Tensor:
    """``ms_deform_attn``; exact where a point lies on a pixel's centre. Never waits for a GPU."""
    value, locations = operands.value, operands.sampling_locations
    dtype = acc_dtype(value.dtype)
    B, S, M, D = value.shape
    Q = locations.shape[1]
    sizes = level_tensor(operands)  # [L, 2]
    rows = sizes.prod(-1)
    if operands.level_start_index is None:
        starts = rows.cumsum(0) - rows
    else:
        assert isinstance(operands.level_start_index, Tensor)
        starts = operands.level_start_index.to(value.device, torch.int64)
    fits = (sizes > 0).all(-1) & (starts >= 0) & (starts + rows <= S)

    counts = count_points(locations, sizes.shape[0], operands.num_points)
    K = sum(counts)
    level = [index for index, count in enumerate(counts) for _ in range(count)]
    level_of_point = torch.tensor(level, dtype=torch.int64, device=value.device)
    height, width = sizes[level_of_point].unbind(-1)  # [K]
    start, fits = starts[level_of_point], fits[level_of_point]

    locations = locations.reshape(B, Q, M, K, 2)
    weights = operands.attention_weights.to(dtype).reshape(B, Q, M, K)
    # outside [-1, 2] a point touches no pixel of any map; NaN fails both comparisons
    near = ((locations >= -1) & (locations <= 2)).all(-1, keepdim=True)
    # float64 holds the product of a float32 location exactly: pixel and side of a knot are right
    pixel = locations.masked_fill(~near, -1).double() * sizes[level_of_point].flip(-1) - 0.5
    corner = pixel.detach().floor()
    right, down = (pixel - corner).to(dtype).unbind(-1)  # [B, Q, M, K]
    left_x, upper_y = corner.long().unbind(-1)

    pixels = value.to(dtype).reshape(B * S * M, D)
    output = pixels.new_zeros((B, Q, M, D))
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = left_x + dx, upper_y + dy
            on_map = fits & (x >= 0) & (x < width) & (y >= 0) & (y < height)
            row = torch.where(on_map, start + y * width + x, 0)
            share = (right if dx else 1 - right) * (down if dy else 1 - down) * weights
            # not a product with 0: a NaN outside the map would remain
            share = torch.where(on_map, share, 0)[..., None]
            corner_pixels = _gather(pixels, _positions(value, row))
            output = output + (share * torch.where(on_map[..., None], corner_pixels, 0)).sum(3)
    return output.flatten(2).to(value.dtype)


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
    anchors = reference.expand(-1, -1, len(sizes), -1)[:, :, None, :, None]
    locations = []
    for level, offset in enumerate(offsets.flatten(3, -2).split(counts, 3)):  # [B, Q, M, P, 2]
        anchor = anchors[:, :, :, level]
        if anchor.shape[-1] == 2:
            height, width = sizes[level]
            pixels = torch.stack((offset[..., 0] / width, offset[..., 1] / height), -1)
            locations.append(anchor + pixels)
        else:
            portion = operands.offset_scale / max(counts[level], 1)
            locations.append(anchor[..., :2] + offset * portion * anchor[..., 2:])
    return Operands(
        operands.value,
        operands.spatial_shapes,
        operands.level_start_index,
        torch.cat(locations, 3).view(offsets.shape),
        weights,
        operands.level_sizes,
        operands.num_points,
    )


def discrete(operands: DiscreteOperands) -> Tensor:
    """``ms_deform_attn_discrete``: one pixel per point, RT-DETRv2's ``method="discrete"``.

    Each point reads exactly one pixel, so that its neighbours have no influence. Level sizes on a
    GPU are not read, and level sizes on the host are not copied to the GPU.
    """
    value = operands.value
    B, S, M, D = value.shape
    pixels = value.to(acc_dtype(value.dtype)).reshape(B * S * M, D)
    output = pixels.new_zeros((B, operands.sampling_locations.shape[1], M, D))
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
    *call, _, output_mask = inputs
    operands = DiscreteOperands(*call)
    check_operands(operands)
    check_gradient(grad_output, operands, output_mask, 2)
    value, weights = operands.value, operands.attention_weights
    dtype = acc_dtype(value.dtype)
    B, S, M, D = value.shape
    grad = grad_output.to(dtype).view(B, grad_output.shape[1], M, 1, D)
    pixels = value.to(dtype).reshape(B * S * M, D)
    grad_pixels = torch.zeros_like(pixels) if output_mask[0] else None
    grad_weights = []
    for index, weight in _picked(operands):
        if grad_pixels is not None:
            grad_pixels.index_add_(0, index.flatten(), (weight[..., None] * grad).reshape(-1, D))
        if output_mask[1]:
            grad_weights.append((grad * _gather(pixels, index)).sum(-1))
    return (
        None if grad_pixels is None else grad_pixels.view(value.shape).to(value.dtype),
        torch.cat(grad_weights, 3).view(weights.shape).to(weights.dtype) if grad_weights else None,
    )


def _picked(operands: DiscreteOperands) -> Iterator[tuple[Tensor, Tensor]]:
    """For each level, of its points: positions of the pixels in ``[B * S * M, D]``, and weights."""
    value, dtype = operands.value, acc_dtype(operands.value.dtype)
    B, S, M, _ = value.shape
    Q, sizes = operands.sampling_locations.shape[1], level_pairs(operands)
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
        if isinstance(end, Tensor):  # not checked on the host: a level that does not fit is empty
            fits = (height > 0) & (width > 0) & (start >= 0) & (end <= S)
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
    """``[*index.shape, D]``: whole vectors of channels, several times as fast as ``gather``."""
    return pixels.index_select(0, index.flatten()).view(*index.shape, pixels.shape[1])
