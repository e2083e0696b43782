"""MSDA with grid_sample, as frameworks ship it: the backend that runs wherever PyTorch does.

Sums are float32 at least. Close to a pixel's centre a location gradient may come from the wrong
side, because grid_sample maps locations to [-1, 1] and back. On devices of ``GATHERING`` pixels are
gathered instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deform_attn import composite
from deform_attn.checks import check_gradient, check_operands, masked
from deform_attn.levels import count_points, read_levels
from deform_attn.operands import Operands, acc_dtype, of_backward

__all__ = ["backward", "forward", "sample", "why_not"]

# Device types on which grid_sample's backward is slow or missing.
GATHERING = {"mps"}


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """The reference runs wherever PyTorch does."""
    return None


def forward(*inputs: Any) -> Tensor:
    """The kernel of ``ms_deform_attn_reference``."""
    operands = Operands(*inputs)
    check_operands(operands)
    if operands.value.device.type in GATHERING:
        return composite.attention(operands)
    return sample(operands)


def sample(operands: Operands) -> Tensor:
    """Deformable DETR (arXiv 2010.04159), section 4.1, with ``grid_sample``."""
    operands = composite.filled(operands)
    value = operands.value
    M, D = value.shape[2:]
    B, Q = operands.sampling_locations.shape[:2]
    output = value.new_zeros((B * M, D, Q), dtype=acc_dtype(value.dtype))
    for _, level, grid, weights in _levels(operands):
        # not in place: this is exported to ONNX, too
        output = output + (_sample(level, grid) * weights).sum(-1)
    return output.view(B, M * D, Q).transpose(1, 2).to(value.dtype).contiguous()


def backward(grad_output: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    """The kernel of ``ms_deform_attn_reference_backward``: of value, locations and weights."""
    operands, _, output_mask = of_backward(Operands, inputs)
    check_operands(operands)
    check_gradient(grad_output, operands, output_mask, 3)
    if operands.value.device.type in GATHERING:
        return composite.attention_backward(grad_output, operands, output_mask)
    mask, operands = operands.value_mask, composite.filled(operands)
    value, locations, weights = (
        operands.value,
        operands.sampling_locations,
        operands.attention_weights,
    )
    B, S, M, D = value.shape
    Q = locations.shape[1]
    dtype = acc_dtype(value.dtype)
    grad = grad_output.to(dtype).transpose(1, 2).reshape(B * M, D, Q, 1)
    grad_value = value.new_zeros((B, M, D, S), dtype=dtype) if output_mask[0] else None
    grad_grids, grads_weight = [], []
    for start, level, grid, weight in _levels(operands):
        rows = level.shape[2] * level.shape[3]
        grads_weight.append((_sample(level, grid) * grad).sum(1))
        grad_level, grad_grid = torch.zeros_like(level), torch.zeros_like(grid)
        if grid.numel() > 0:
            grad_level, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
                grad * weight, level, grid, 0, 0, False, (output_mask[0], True)
            )
        if grad_value is not None:
            grad_value[..., start : start + rows] += grad_level.view(B, M, D, rows)
        grad_grids.append(grad_grid)
    # grid = 2 * location - 1; a location without a pixel near has no gradient
    grad_locations = 2 * torch.cat(grad_grids, 2).unflatten(0, (B, M)).transpose(1, 2)
    grad_locations = grad_locations.reshape(locations.shape).contiguous()
    grad_weights = torch.cat(grads_weight, 2).unflatten(0, (B, M)).transpose(1, 2)
    grad_weights = grad_weights.reshape(weights.shape).to(weights.dtype)
    if grad_value is not None:
        grad_value = grad_value.permute(0, 3, 1, 2).to(value.dtype).contiguous()
        if mask is not None:
            grad_value = grad_value.masked_fill(mask[..., None, None], 0)
    return masked(
        output_mask,
        grad_value,
        grad_locations.masked_fill(~_near(locations), 0),
        grad_weights.contiguous(),
    )


def _near(sampling_locations: Tensor) -> Tensor:
    """Whether a point may have a pixel: beyond [-1, 2] none is; NaN fails both comparisons."""
    near = (sampling_locations >= -1) & (sampling_locations <= 2)
    return near.all(-1, keepdim=True)


def _levels(operands: Operands) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """For each level: first row, map ``[B*M, D, h, w]``, grid ``[B*M, Q, P, 2]``, weights."""
    value, locations = operands.value, operands.sampling_locations
    dtype = acc_dtype(value.dtype)
    M, D = value.shape[2:]
    B, Q = locations.shape[:2]
    levels = read_levels(operands)
    counts = count_points(locations, len(levels), operands.num_points)
    grids = 2 * locations.masked_fill(~_near(locations), -1) - 1
    grids = grids.reshape(B, Q, M, sum(counts), 2)
    weights = operands.attention_weights.to(dtype).reshape(B, Q, M, sum(counts))
    for (height, width, start), grid, weight in zip(
        levels, grids.split(counts, dim=3), weights.split(counts, dim=3)
    ):
        level = value[:, start : start + height * width].to(dtype)
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
