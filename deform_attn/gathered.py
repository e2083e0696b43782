"""The operators as gathers and products in plain PyTorch, for exporters.

Tensors have at most five dimensions and coordinates are float32, unlike those of ``composite.py``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from deform_attn.composite import discrete, filled, unfused
from deform_attn.levels import count_points, level_pairs
from deform_attn.operands import AnyOperands, DiscreteOperands, FusedOperands, Operands, acc_dtype


def standard(operands: AnyOperands) -> Tensor:
    """A call of any operator in standard nodes, for PyTorch's TorchScript exporter.

    That exporter (``torch.onnx.export(..., dynamo=False)``) has no table of decompositions, so this
    package's functions call this one while it traces. Pixels are gathered, which supports level
    sizes that the model computes. Needs opset 11, or 12 for discrete sampling.
    """
    if isinstance(operands, DiscreteOperands):
        return discrete(operands)
    return gathered(unfused(operands) if isinstance(operands, FusedOperands) else operands)


def gathered(operands: Operands) -> Tensor:
    """Gathers rows of D channels from one list of all pixels and multiplies them by their weights.

    Pixel coordinates are float32, since TensorRT has no float64. At a knot the pixel may be the
    wrong neighbour, which does not change the output, because it is continuous there. Core ML's
    converter has no rule for ``&``, ``~`` and ``where`` with a number, which are avoided.
    """
    operands = filled(operands)
    value, starts = operands.value, operands.level_start_index
    dtype = acc_dtype(value.dtype)
    S, M, D = value.shape[1:]
    B, Q = operands.sampling_locations.shape[:2]
    sizes = level_pairs(operands)
    counts = count_points(operands.sampling_locations, len(sizes), operands.num_points)
    nothing = B * S * M  # a row of zeros for pixels outside the map: a NaN in value is not read
    rows = value.to(dtype).reshape(nothing, D)
    rows = torch.cat((rows, rows.new_zeros((1, D))))
    image = torch.arange(B, device=value.device)[:, None, None, None] * S
    head = torch.arange(M, device=value.device)[:, None]
    locations = operands.sampling_locations.reshape(B, Q, M, sum(counts), 2).split(counts, 3)
    weights = operands.attention_weights.to(dtype).reshape(B, Q, M, sum(counts)).split(counts, 3)
    output = rows.new_zeros((B, Q, M, 1, D))
    end: Any = 0
    for level, (location, weight) in enumerate(zip(locations, weights)):
        count = 4 * counts[level]
        height, width = sizes[level]
        start = end if starts is None else starts[level].to(value.device)
        end = start + height * width
        near = _all(location >= -1, location <= 2).all(-1, keepdim=True)
        # [B, Q, M, P]; NaN is outside
        x, y = location.masked_fill(near.logical_not(), -1).unbind(-1)
        x, y = x * width - 0.5, y * height - 0.5
        left, upper = x.floor(), y.floor()
        right_share, lower_share = x - left, y - upper
        columns = torch.stack((left, left + 1, left, left + 1), -1)  # [B, Q, M, P, 4]
        lines = torch.stack((upper, upper, upper + 1, upper + 1), -1)
        share = torch.stack((1 - right_share, right_share) * 2, -1)
        share = share * torch.stack((*(1 - lower_share,) * 2, *(lower_share,) * 2), -1)
        on_map = _all(columns >= 0, columns < width, lines >= 0, lines < height)
        pixel = start + lines.long() * width + columns.long()
        row = (image[..., None] + pixel) * M + head[..., None]
        row = row.masked_fill(on_map.logical_not(), nothing)
        pixels = rows.index_select(0, row.reshape(-1)).reshape(B, Q, M, count, D)
        share = (share * weight[..., None]).reshape(B, Q, M, 1, count)
        output = output + share @ pixels
    return output.reshape(B, Q, M * D).to(value.dtype)


def _all(*flags: Tensor) -> Tensor:
    """Where all are true."""
    return functools.reduce(torch.logical_and, flags)
