"""MSDA as one formula of gathered pixels, differentiable any number of times, forward and backward.

The kernels have first derivatives; all others are derived from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deform_attn.checks import acc_dtype
from deform_attn.levels import LARGEST_SIDE, Levels, points_per_level

__all__ = ["attention", "discrete", "fused", "fused_points", "on_device"]


def attention(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    level_sizes: Sequence[int] | None,
    num_points: Sequence[int] | None,
) -> Tensor:
    """The attention operator; exact at pixel knots, never waits for a GPU."""
    real = acc_dtype(value.dtype)
    B, S, M, D = value.shape
    Q = sampling_locations.shape[1]
    sizes = _sizes(spatial_shapes, level_sizes, value.device)  # [L, 2]
    rows = sizes.prod(-1)
    if level_start_index is None:
        starts = rows.cumsum(0) - rows
    else:
        starts = level_start_index.to(value.device, torch.int64)
    fits = (sizes > 0).all(-1) & (starts >= 0) & (starts + rows <= S)

    counts = points_per_level(sampling_locations, sizes.shape[0], num_points)
    K = sum(counts)
    level = [index for index, count in enumerate(counts) for _ in range(count)]
    of_point = torch.tensor(level, dtype=torch.int64, device=value.device)
    height, width = sizes[of_point].unbind(-1)  # [K]
    start, fits = starts[of_point], fits[of_point]

    locations = sampling_locations.reshape(B, Q, M, K, 2)
    weights = attention_weights.to(real).reshape(B, Q, M, K)
    # beyond [-1, 2] no pixel is near; NaN fails both comparisons
    near = ((locations >= -1) & (locations <= 2)).all(-1, keepdim=True)
    # float64 holds the product exactly, so the pixel and the side of a knot are right
    pixel = locations.masked_fill(~near, -1).double() * sizes[of_point].flip(-1) - 0.5
    corner = pixel.detach().floor()
    right, down = (pixel - corner).to(real).unbind(-1)  # [B, Q, M, K]
    left_x, upper_y = corner.long().unbind(-1)

    rows_of_value = value.to(real)
    output = rows_of_value.new_zeros((B, Q, M, D))
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = left_x + dx, upper_y + dy
            on_map = fits & (x >= 0) & (x < width) & (y >= 0) & (y < height)
            pixels = _gather(rows_of_value, torch.where(on_map, start + y * width + x, 0))
            share = (right if dx else 1 - right) * (down if dy else 1 - down) * weights
            # where, not a product: what lies off the map must not pass on a NaN
            share = torch.where(on_map, share, 0)
            pixels = torch.where(on_map[..., None], pixels, 0)
            output = output + (share[..., None] * pixels).sum(3)
    return output.flatten(2).to(value.dtype)


def discrete(
    value: Tensor,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int] | None,
    official_clamp: bool,
) -> Tensor:
    """The operator with one pixel a point instead of four: RT-DETRv2's ``method="discrete"``.

    Pixels are picked, not interpolated: neighbours have no part in a point, not even a rounding
    error's. Level sizes on a GPU stay there; listed ones are copied nowhere.
    """
    real = acc_dtype(value.dtype)
    B, S, M, D = value.shape
    Q = sampling_locations.shape[1]
    counts = points_per_level(sampling_locations, len(spatial_shapes), num_points)
    locations = sampling_locations.detach().reshape(B, Q, M, sum(counts), 2)
    weights = attention_weights.to(real).reshape(B, Q, M, sum(counts))
    sizes: Any = on_device(spatial_shapes, value.device)
    starts: Any = on_device(level_start_index, value.device)
    rows_of_value = value.to(real)
    output = rows_of_value.new_zeros((B, Q, M, D))
    end: Any = 0
    for level, (location, weight) in enumerate(
        zip(locations.split(counts, 3), weights.split(counts, 3))
    ):
        height, width = sizes[level]
        start = end if starts is None else starts[level]
        end = start + height * width
        x = _nearest(location[..., 0], width)
        if official_clamp:
            x = x.clamp(max=height - 1)
        row = start + _nearest(location[..., 1], height) * width + x
        if isinstance(end, Tensor):  # its numbers are not known: a level that does not fit is empty
            fits = (height > 0) & (width > 0) & (start >= 0) & (end <= S)
            row, weight = torch.where(fits, row, 0), torch.where(fits, weight, 0)
        output = output + (weight[..., None] * _gather(rows_of_value, row)).sum(3)
    return output.flatten(2).to(value.dtype)


def on_device(levels: Any, device: torch.device) -> Any:
    """Level sizes or starts: a tensor where it is needed, a list as it is."""
    return levels.to(device) if isinstance(levels, Tensor) else levels


def _nearest(location: Tensor, size: Tensor | int) -> Tensor:
    """``trunc(location * size + 1/2)``, or the nearest on the map; 0 for NaN."""
    index = (location * size + 0.5).nan_to_num(0.0)
    # first of all to what int64 holds, for a cast makes anything of the rest
    return index.clamp(0, LARGEST_SIDE).long().clamp(max=size - 1)


def _gather(value: Tensor, row: Tensor) -> Tensor:
    """Rows ``[B, Q, M, K]`` of value ``[B, S, M, D]``: ``[B, Q, M, K, D]``."""
    B, S, M, D = value.shape
    batch = torch.arange(B, device=value.device).view(B, 1, 1, 1)
    head = torch.arange(M, device=value.device).view(M, 1)
    index = (batch * S + row) * M + head
    # whole vectors of channels at a time: several times faster than gather, number by number
    return value.reshape(B * S * M, D).index_select(0, index.flatten()).view(*row.shape, D)


def fused(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    level_sizes: Sequence[int] | None,
    num_points: Sequence[int] | None,
    offset_scale: float,
) -> Tensor:
    """The fused operator: softmax, offsets to locations, attention."""
    sizes = _sizes(spatial_shapes, level_sizes, value.device)
    locations, weights = fused_points(
        sizes, reference_points, sampling_offsets, attention_logits, num_points, offset_scale
    )
    return attention(
        *(value, spatial_shapes, level_start_index, locations, weights),
        *(level_sizes, num_points),
    )


def fused_points(
    sizes: Levels,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    num_points: Sequence[int] | None,
    offset_scale: float,
) -> tuple[Tensor, Tensor]:
    """Locations and weights from what a layer projects; ``sizes`` is (height, width) by level."""
    real = reference_points.dtype
    offsets, logits = sampling_offsets.to(real), attention_logits.to(real)
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    counts = points_per_level(offsets, len(sizes), num_points)
    anchors = reference_points.expand(-1, -1, len(sizes), -1)[:, :, None, :, None]
    locations = []
    for level, offset in enumerate(offsets.flatten(3, -2).split(counts, 3)):  # [B, Q, M, P, 2]
        anchor = anchors[:, :, :, level]
        if anchor.shape[-1] == 2:
            height, width = sizes[level]
            pixels = torch.stack((offset[..., 0] / width, offset[..., 1] / height), -1)
            locations.append(anchor + pixels)
        else:
            portion = offset_scale / max(counts[level], 1)
            locations.append(anchor[..., :2] + offset * portion * anchor[..., 2:])
    return torch.cat(locations, 3).view(offsets.shape), weights


def _sizes(
    spatial_shapes: Tensor | None, level_sizes: Sequence[int] | None, device: torch.device
) -> Tensor:
    if spatial_shapes is None:
        spatial_shapes = torch.tensor(level_sizes).view(-1, 2)
    return spatial_shapes.to(device, torch.int64)
