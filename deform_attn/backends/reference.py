"""MSDA with grid_sample, as frameworks ship it: the backend that runs wherever PyTorch does.

Sums are float32 at least. Close to a pixel's centre a location gradient may come from the wrong
side, because grid_sample maps locations to [-1, 1] and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deform_attn.checks import acc_dtype, check_gradient, check_operands, if_wanted
from deform_attn.levels import host_level_sizes, points_per_level

__all__ = ["backward", "forward", "why_not"]


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """The reference runs wherever PyTorch does."""
    return None


def forward(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    level_sizes: Sequence[int] | None,
    num_points: Sequence[int] | None,
) -> Tensor:
    """The formula of Deformable DETR (arXiv 2010.04159, section 4.1) with ``grid_sample``."""
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    check_operands(*inputs, level_sizes, num_points)
    B, _, M, D = value.shape
    Q = sampling_locations.shape[1]
    output = value.new_zeros((B * M, D, Q), dtype=acc_dtype(value.dtype))
    for _, level, grid, weights in _levels(*inputs, level_sizes, num_points):
        output += (_sample(level, grid) * weights).sum(-1)
    return output.view(B, M * D, Q).transpose(1, 2).to(value.dtype).contiguous()


def backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    level_sizes: Sequence[int] | None,
    num_points: Sequence[int] | None,
    deterministic: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of value, sampling_locations and attention_weights, as far as they are wanted."""
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    check_operands(*inputs, level_sizes, num_points)
    check_gradient(grad_output, value, sampling_locations, wanted, 3)
    B, S, M, D = value.shape
    Q = sampling_locations.shape[1]
    real = acc_dtype(value.dtype)
    grad = grad_output.to(real).transpose(1, 2).reshape(B * M, D, Q, 1)
    grad_value = value.new_zeros((B, M, D, S), dtype=real) if wanted[0] else None
    grad_grids, grad_weights = [], []
    for start, level, grid, weights in _levels(*inputs, level_sizes, num_points):
        rows = level.shape[2] * level.shape[3]
        grad_weights.append((_sample(level, grid) * grad).sum(1))
        grad_level, grad_grid = torch.zeros_like(level), torch.zeros_like(grid)
        if grid.numel() > 0:
            grad_level, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
                grad * weights, level, grid, 0, 0, False, (wanted[0], True)
            )
        if grad_value is not None:
            grad_value[..., start : start + rows] += grad_level.view(B, M, D, rows)
        grad_grids.append(grad_grid)
    # grid = 2 * location - 1; a location that is nowhere near has no gradient
    grad_locations = 2 * torch.cat(grad_grids, 2).unflatten(0, (B, M)).transpose(1, 2)
    grad_locations = grad_locations.reshape(sampling_locations.shape).contiguous()
    of_weights = torch.cat(grad_weights, 2).unflatten(0, (B, M)).transpose(1, 2)
    of_weights = of_weights.reshape(attention_weights.shape).to(attention_weights.dtype)
    return if_wanted(
        wanted,
        None if grad_value is None else grad_value.permute(0, 3, 1, 2).to(value.dtype).contiguous(),
        grad_locations.masked_fill(~_near(sampling_locations), 0),
        of_weights.contiguous(),
    )


def _near(sampling_locations: Tensor) -> Tensor:
    """Whether a point may have a pixel: beyond [-1, 2] none is; NaN fails both comparisons."""
    near = (sampling_locations >= -1) & (sampling_locations <= 2)
    return near.all(-1, keepdim=True)


def _levels(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    level_sizes: Sequence[int] | None,
    num_points: Sequence[int] | None,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """For each level: first row, map ``[B*M, D, h, w]``, grid ``[B*M, Q, P, 2]``, weights."""
    real = acc_dtype(value.dtype)
    B, _, M, D = value.shape
    Q = sampling_locations.shape[1]
    levels = host_level_sizes(spatial_shapes, level_start_index, level_sizes)
    counts = points_per_level(sampling_locations, len(levels), num_points)
    grids = 2 * sampling_locations.masked_fill(~_near(sampling_locations), -1) - 1
    grids = grids.reshape(B, Q, M, sum(counts), 2)
    weights = attention_weights.to(real).reshape(B, Q, M, sum(counts))
    for (height, width, start), grid, weight in zip(
        levels, grids.split(counts, dim=3), weights.split(counts, dim=3)
    ):
        level = value[:, start : start + height * width].to(real)
        yield (
            start,
            level.permute(0, 2, 3, 1).reshape(B * M, D, height, width),
            grid.transpose(1, 2).flatten(0, 1),
            weight.transpose(1, 2).flatten(0, 1).unsqueeze(1),  # [B * M, 1, Q, P]
        )


def _sample(level: Tensor, grid: Tensor) -> Tensor:
    """``[B*M, D, Q, P]``; grid_sample refuses empty grids."""
    if grid.numel() == 0:
        return level.new_zeros(*level.shape[:2], *grid.shape[1:3])
    return F.grid_sample(level, grid, padding_mode="zeros", align_corners=False)
