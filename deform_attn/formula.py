"""MSDA as one formula of gathered pixels, differentiable any number of times, forward and backward.

The kernels have first derivatives; all others are derived from here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deform_attn.inputs import location_dtype, points_per_level

__all__ = ["attention", "layer", "layer_points"]


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
    real = location_dtype(value.dtype)
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

    by_head = value.to(real).transpose(1, 2)  # [B, M, S, D]
    output = by_head.new_zeros((B, Q, M, D))
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = left_x + dx, upper_y + dy
            on_map = fits & (x >= 0) & (x < width) & (y >= 0) & (y < height)
            row = torch.where(on_map, start + y * width + x, 0)
            index = row.transpose(1, 2).reshape(B, M, Q * K, 1).expand(B, M, Q * K, D)
            pixels = by_head.gather(2, index).reshape(B, M, Q, K, D).transpose(1, 2)
            share = (right if dx else 1 - right) * (down if dy else 1 - down) * weights
            # where, not a product: what lies off the map must not pass on a NaN
            share = torch.where(on_map, share, 0)
            pixels = torch.where(on_map[..., None], pixels, 0)
            output = output + (share[..., None] * pixels).sum(3)
    return output.flatten(2).to(value.dtype)


def layer(
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
    locations, weights = layer_points(
        sizes, reference_points, sampling_offsets, attention_logits, num_points, offset_scale
    )
    return attention(
        *(value, spatial_shapes, level_start_index, locations, weights),
        *(level_sizes, num_points),
    )


def layer_points(
    sizes: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    num_points: Sequence[int] | None,
    offset_scale: float,
) -> tuple[Tensor, Tensor]:
    """Locations and weights from what a layer projects; ``sizes`` is ``[L, 2]`` (height, width)."""
    real = reference_points.dtype
    L = sizes.shape[0]
    offsets, logits = sampling_offsets.to(real), attention_logits.to(real)
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    counts = points_per_level(offsets, L, num_points)
    reference = reference_points.expand(-1, -1, L, -1)  # [B, Q, L, 2 or 4]
    extent = sizes.flip(-1).to(real)  # (width, height)
    portion = torch.tensor(
        [offset_scale / max(count, 1) for count in counts], dtype=real, device=offsets.device
    )
    if num_points is None:
        reference = reference[:, :, None, :, None]  # [B, Q, 1, L, 1, .]
        extent, portion = extent[:, None], portion[:, None, None]
    else:
        level = [index for index, count in enumerate(counts) for _ in range(count)]
        of_point = torch.tensor(level, dtype=torch.int64, device=offsets.device)
        reference = reference.index_select(2, of_point)[:, :, None]  # [B, Q, 1, K, .]
        extent, portion = extent[of_point], portion[of_point, None]
    if reference.shape[-1] == 2:
        return reference + offsets / extent, weights
    return reference[..., :2] + offsets * portion * reference[..., 2:], weights


def _sizes(
    spatial_shapes: Tensor | None, level_sizes: Sequence[int] | None, device: torch.device
) -> Tensor:
    if spatial_shapes is None:
        spatial_shapes = torch.tensor(level_sizes).view(-1, 2)
    return spatial_shapes.to(device, torch.int64)
