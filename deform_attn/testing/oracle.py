"""The truth: the operator in float64 from gathered pixels, exact at pixel knots.

Differentiable any number of times. Written apart from the package, so that a fault of the package
is not a fault of its judge; `test_oracle.py` tries it against rational arithmetic.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .cases import OpInputs

SPLITTER = 2.0**27 + 1  # splits a float64 into two halves whose products are exact (Veltkamp)
LARGEST_SIDE = 2**26  # beyond it those products are not


def settle(inputs: OpInputs) -> OpInputs:
    """The inputs in the dtypes that the operator computes from; levels as numbers."""
    value, weights = inputs.value, inputs.attention_weights
    real = torch.float64 if value.dtype is torch.float64 else torch.float32
    if weights.dtype not in (value.dtype, real):
        weights = weights.to(real)
    return inputs.replace(
        sampling_locations=inputs.sampling_locations.to(real), attention_weights=weights
    )


def level_table(inputs: OpInputs) -> list[tuple[int, int, int]]:
    """(height, width, start) of every level; (0, 0, 0) for one that does not fit into value."""
    shapes, starts = inputs.spatial_shapes, inputs.level_start_index
    sizes = shapes.tolist() if isinstance(shapes, Tensor) else [tuple(pair) for pair in shapes]
    if starts is None:
        starts = [sum(h * w for h, w in sizes[:level]) for level in range(len(sizes))]
    elif isinstance(starts, Tensor):
        starts = starts.tolist()
    rows = inputs.value.shape[1]
    return [
        (h, w, start) if h > 0 and w > 0 and start >= 0 and start + h * w <= rows else (0, 0, 0)
        for (h, w), start in zip(sizes, starts)
    ]


def pixel_of(location: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel left of (or at) a location, the fraction towards the next one, is either on the map?

    x = location * size - 1/2 is never rounded before its floor is taken.
    """
    assert size < LARGEST_SIDE
    near = location.detach().abs() <= 2  # false for NaN; beyond it no pixel of any map is reached
    location = torch.where(near, location, 0)
    exact = location.detach()
    high = exact * SPLITTER - (exact * SPLITTER - exact)
    product = exact * size
    error = (high * size - product) + (exact - high) * size  # product + error is exact
    left = (product - 0.5).floor()
    past = product - (left + 0.5) + error
    left = torch.where(past < 0, left - 1, left)
    past = product - (left + 0.5) + error
    hit = near & (left >= -1) & (left < size)
    slope_carrier = (location - exact) * size  # zero, with the gradient of x
    return torch.where(hit, left, 0).long(), past + slope_carrier, hit


def ms_deform_attn(inputs: OpInputs, *, all_rising: bool = False) -> Tensor:
    """The output in float64, [B, Q, M * D]; gradients reach the tensors of `inputs`.

    ``all_rising`` turns falling slopes into rising ones, for `sums_of_absolute_terms`.
    """
    inputs = settle(inputs)
    value = inputs.value.double().transpose(1, 2)  # [B, M, S, D]
    B, M, S, D = value.shape
    levels = level_table(inputs)
    counts = inputs.points_per_level
    Q = inputs.sampling_locations.shape[1]
    locations = inputs.sampling_locations.double().reshape(B, Q, M, sum(counts), 2)
    weights = inputs.attention_weights.double().reshape(B, Q, M, sum(counts))

    # a term without pixels, so that the output hangs on every input even where nothing is sampled
    output = 0 * weights.sum(-1)[..., None].nan_to_num() + value.new_zeros(B, Q, M, D)
    for (height, width, start), xy, weight in zip(
        levels, locations.split(counts, dim=3), weights.split(counts, dim=3)
    ):
        if height == 0 or xy.numel() == 0:
            continue
        left, right_share, hit_x = pixel_of(xy[..., 0], width)
        top, lower_share, hit_y = pixel_of(xy[..., 1], height)
        left_share, upper_share = 1 - right_share, 1 - lower_share
        if all_rising:
            left_share = left_share.detach() + (right_share - right_share.detach())
            upper_share = upper_share.detach() + (lower_share - lower_share.detach())
        for y, along in ((top, upper_share), (top + 1, lower_share)):
            for x, across in ((left, left_share), (left + 1, right_share)):
                on_map = hit_x & hit_y & (x >= 0) & (x < width) & (y >= 0) & (y < height)
                row = torch.where(on_map, start + y * width + x, start)  # [B, Q, M, P]
                index = row.transpose(1, 2).reshape(B, M, -1, 1).expand(-1, -1, -1, D)
                pixel = value.gather(2, index).reshape(B, M, Q, -1, D).transpose(1, 2)
                share = torch.where(on_map, along * across * weight, 0)
                pixel = torch.where(on_map[..., None], pixel, 0)  # an off-map NaN is not read
                output = output + (share[..., None] * pixel).sum(3)
    return output.reshape(B, Q, M * D)


def discrete(inputs: OpInputs, *, official_clamp: bool = False) -> Tensor:
    """One pixel a point: ``method="discrete"``, in float64, point by point.

    The pixel is what comes out in the dtype of the locations; only that is rounded.
    """
    inputs = settle(inputs)
    value, locations, weights = inputs.tensors
    value, weights = value.double(), weights.double()
    B, _, M, D = value.shape
    Q, counts = locations.shape[1], inputs.points_per_level
    locations = locations.detach().reshape(B, Q, M, sum(counts), 2)
    level_of_point = [level for level, count in enumerate(counts) for _ in range(count)]
    table = level_table(inputs)

    def pixel(location: Tensor, size: int, last: int) -> int:
        x = (location * size + 0.5).item()
        return 0 if math.isnan(x) else int(min(max(x, 0), last))

    rows = torch.zeros(locations.shape[:-1], dtype=torch.long)
    for point in itertools.product(*map(range, rows.shape)):
        height, width, start = table[level_of_point[point[-1]]]
        x, y = locations[point]
        last = min(height, width) - 1 if official_clamp else width - 1
        rows[point] = start + pixel(y, height, height - 1) * width + pixel(x, width, last)
    batch = torch.arange(B).view(B, 1, 1, 1)
    head = torch.arange(M).view(1, 1, M, 1)
    picked = value[batch, rows, head]  # [B, Q, M, K, D]
    return (picked * weights.reshape(*rows.shape, 1)).sum(3).reshape(B, Q, M * D)


def gradients(
    inputs: OpInputs, grad_output: Tensor, *, all_rising: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, sampling_locations and attention_weights in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in settle(inputs).tensors]
    with torch.enable_grad():
        output = ms_deform_attn(inputs.replace_tensors(*leaves), all_rising=all_rising)
    grads = torch.autograd.grad(
        output, leaves, grad_output.double(), allow_unused=True, materialize_grads=True
    )
    return grads[0], grads[1], grads[2]


def sums_of_absolute_terms(inputs: OpInputs, grad_output: Tensor) -> tuple[Tensor, ...]:
    """Of the output and the three gradients: what the rounding errors of their sums grow with."""
    value, locations, weights = settle(inputs).tensors
    inputs = inputs.replace_tensors(
        value.double().abs(), locations.double(), weights.double().abs()
    )
    with torch.no_grad():
        output = ms_deform_attn(inputs)
    return output, *gradients(inputs, grad_output.abs(), all_rising=True)
