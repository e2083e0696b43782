"""The oracle: the operator in float64 from gathered pixels, exact at pixel knots.

Differentiable any number of times, slow, on the CPU. It shares no code with the operator, so that
an error of the operator is not repeated here; ``tests/test_oracle.py`` compares it with rational
arithmetic.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .cases import FusedInputs, OpInputs, acc_dtype

SPLITTER = 2.0**27 + 1  # splits a float64 into two halves whose products are exact (Veltkamp)
LARGEST_SIDE = 2**26  # beyond it those products are not


def operands(inputs: OpInputs) -> OpInputs:
    """The inputs in the dtypes that the operator reads: locations and other weights are cast."""
    value, weights = inputs.value, inputs.attention_weights
    acc = acc_dtype(value.dtype)
    if weights.dtype not in (value.dtype, acc):
        weights = weights.to(acc)
    return inputs.replace(
        sampling_locations=inputs.sampling_locations.to(acc), attention_weights=weights
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
    """The pixel left of (or at) a location, the fraction to the next one, is either sampled?

    ``x = location * size - 1/2`` is not rounded before its floor is taken.

    Args:
        location: float64, one coordinate, as a fraction of the map.
        size: width or height of the map, less than ``LARGEST_SIDE``.

    Returns:
        int64 pixel (0 where not sampled), float64 fraction with the gradient of ``x``, bool.
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
    """The output in float64, ``[B, Q, M * D]``; gradients reach the tensors of `inputs`.

    Args:
        inputs: on the CPU; any floating dtypes.
        all_rising: falling slopes become rising ones, for `sums_of_absolute_terms`.

    Example:
        >>> from deform_attn.testing import CASES, DTYPES, oracle
        >>> oracle.ms_deform_attn(CASES["non_square"].make(DTYPES["f16"])).dtype
        torch.float64
    """
    inputs = operands(inputs)
    value = inputs.value.double().transpose(1, 2)  # [B, M, S, D]
    B, M, S, D = value.shape
    levels = level_table(inputs)
    counts = inputs.points_per_level
    Q = inputs.sampling_locations.shape[1]
    locations = inputs.sampling_locations.double().reshape(B, Q, M, sum(counts), 2)
    weights = inputs.attention_weights.double().reshape(B, Q, M, sum(counts))

    # a zero that depends on the weights: without samples, too, the output has a gradient
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
                if inputs.value_mask is not None:
                    on_map &= ~inputs.value_mask[torch.arange(B)[:, None, None, None], row]
                index = row.transpose(1, 2).reshape(B, M, -1, 1).expand(-1, -1, -1, D)
                pixel = value.gather(2, index).reshape(B, M, Q, -1, D).transpose(1, 2)
                share = torch.where(on_map, along * across * weight, 0)
                pixel = torch.where(on_map[..., None], pixel, 0)  # an off-map NaN is not read
                output = output + (share[..., None] * pixel).sum(3)
    return output.reshape(B, Q, M * D)


def discrete(inputs: OpInputs, *, official_clamp: bool = False) -> Tensor:
    """``method="discrete"`` in float64, ``[B, Q, M * D]``: one pixel per point.

    The pixel is computed in the dtype of the locations, as the operator defines it; nothing else
    is rounded.
    """
    inputs = operands(inputs)
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
    if inputs.value_mask is not None:
        picked = torch.where(inputs.value_mask[batch, rows, None], 0, picked)
    return (picked * weights.reshape(*rows.shape, 1)).sum(3).reshape(B, Q, M * D)


def ms_deform_attn_fused(inputs: FusedInputs) -> Tensor:
    """The fused operator in float64, ``[B, Q, M * D]``: softmax, locations, attention."""
    return ms_deform_attn(unfused(inputs))


def unfused(inputs: FusedInputs) -> OpInputs:
    """Softmax and locations of the fused operator in float64: what it attends with."""
    x = inputs.double()
    B, Q, M = x.sampling_offsets.shape[:3]
    counts = x.points_per_level
    offsets = x.sampling_offsets.reshape(B, Q, M, sum(counts), 2)
    weights = x.attention_logits.reshape(B, Q, M, sum(counts)).softmax(-1)
    reference = x.reference_points.expand(-1, -1, len(counts), -1)
    locations = []
    for level, offset in enumerate(offsets.split(counts, 3)):
        height, width = x.spatial_shapes[level]
        point = reference[:, :, None, level, None]  # [B, Q, 1, 1, 2, 4 or 5]
        if point.shape[-1] == 2:
            locations.append(point + offset / offset.new_tensor([width, height]))
        else:
            step = offset * point[..., 2:4] * x.offset_scale / max(1, counts[level])
            if point.shape[-1] == 5:  # as complex numbers, turned by exp(i angle)
                turn = torch.polar(torch.ones_like(point[..., 4]), point[..., 4])
                step = torch.view_as_real(torch.view_as_complex(step) * turn)
            locations.append(point[..., :2] + step)
    return OpInputs(
        *(x.value, x.spatial_shapes, None, torch.cat(locations, 3), weights, counts),
        x.value_mask,
    )


def gradients(inputs: OpInputs, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, sampling_locations and attention_weights in float64.

    Args:
        inputs: on the CPU; any floating dtypes.
        grad_output: ``[B, Q, M * D]``.
    """
    _, *grads = output_and_gradients(inputs, grad_output)
    return grads[0], grads[1], grads[2]


def output_and_gradients(
    inputs: OpInputs, grad_output: Tensor, *, all_rising: bool = False
) -> tuple[Tensor, ...]:
    """The output and the three `gradients`, from one pass.

    Args:
        inputs: on the CPU; any floating dtypes.
        grad_output: ``[B, Q, M * D]``.
        all_rising: see `ms_deform_attn`.
    """
    leaves = [tensor.detach().double().requires_grad_() for tensor in operands(inputs).tensors]
    with torch.enable_grad():
        output = ms_deform_attn(inputs.replace_tensors(*leaves), all_rising=all_rising)
    grads = torch.autograd.grad(
        output, leaves, grad_output.double(), allow_unused=True, materialize_grads=True
    )
    return output.detach(), *grads


def sums_of_absolute_terms(inputs: OpInputs, grad_output: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients with all terms made positive: the scale of their rounding errors."""
    value, locations, weights = operands(inputs).tensors
    inputs = inputs.replace_tensors(
        value.double().abs(), locations.double(), weights.double().abs()
    )
    return output_and_gradients(inputs, grad_output.abs(), all_rising=True)


def absolute_terms_of_logits(inputs: FusedInputs, grad_output: Tensor) -> Tensor:
    """The gradient of attention_logits with all terms made positive.

    The gradient is ``w (g - sum(w g))`` of weights w and their gradients g: where one weight is
    close to 1 it is far smaller than its terms, whose roundings remain.
    """
    attended = unfused(inputs)
    weights = attended.attention_weights.detach()
    grads = sums_of_absolute_terms(attended, grad_output)[3].reshape(weights.shape)
    return weights * (grads + (weights * grads).sum(-1, keepdim=True))
