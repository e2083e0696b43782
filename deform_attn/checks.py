"""The inputs of a call and what must hold of them: every error message a caller sees is here."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from deform_attn.levels import LARGEST_SIDE, Levels, as_levels, readable

__all__ = [
    "acc_dtype",
    "check",
    "check_fused",
    "check_fused_operands",
    "check_gradient",
    "check_method",
    "check_operands",
    "if_wanted",
]

VALUE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
METADATA_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# Level sizes on a GPU are not read back (that would stop the stream), unless asked for.
CHECK_DEVICE_METADATA = os.environ.get("DEFORM_ATTN_CHECK_METADATA", "0") == "1"


def acc_dtype(value_dtype: torch.dtype) -> torch.dtype:
    """The dtype of locations and sums: float64 for float64 values, else float32."""
    return torch.float64 if value_dtype is torch.float64 else torch.float32


def check(
    value: Tensor,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int] | None,
) -> None:
    """Raise a ValueError (TypeError for a non-tensor) that names the first argument at fault.

    The arguments are those of :func:`deform_attn.ms_deform_attn`. Sizes of levels are checked where
    reading them is free: lists and CPU tensors. On other devices only with
    ``DEFORM_ATTN_CHECK_METADATA=1``; without it the kernels treat a level that does not fit into
    ``value`` as empty.
    """
    points = {"sampling_locations": sampling_locations, "attention_weights": attention_weights}
    _check(value, spatial_shapes, level_start_index, points, num_points)


def check_fused(
    value: Tensor,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    num_points: Sequence[int] | None,
) -> None:
    """As :func:`check`, for the arguments of :func:`deform_attn.ms_deform_attn_fused`."""
    points = {"sampling_offsets": sampling_offsets, "attention_logits": attention_logits}
    num_levels = _check(value, spatial_shapes, level_start_index, points, num_points)
    if not isinstance(reference_points, Tensor):
        raise TypeError(
            f"reference_points: expected a tensor, got {type(reference_points).__name__}"
        )
    B, Q = sampling_offsets.shape[:2]
    shape = tuple(reference_points.shape)
    if len(shape) != 4 or shape[:2] != (B, Q) or shape[2] not in (1, num_levels):
        raise ValueError(
            f"reference_points: expected shape [{B}, {Q}, {num_levels} or 1, 2 or 4], got {shape}"
        )
    if shape[3] not in (2, 4):
        raise ValueError(
            "reference_points: expected 2 numbers (x, y) or 4 (cx, cy, w, h) in the last "
            f"dimension, got shape {shape}"
        )
    if not reference_points.dtype.is_floating_point:
        raise ValueError(
            f"reference_points: expected a floating dtype, got {reference_points.dtype}"
        )
    if reference_points.device != value.device:
        raise ValueError(
            f"reference_points: expected on value's device ({value.device}), "
            f"got {reference_points.device}"
        )


def _check(
    value: Tensor,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
    points: dict[str, Tensor],
    num_points: Sequence[int] | None,
) -> int:
    """Check what both operators take; ``points`` are locations or offsets, then weights or logits.

    Returns the number of levels.
    """
    for name, tensor in {"value": value, **points}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    _check_value(value)
    num_levels = _check_levels(value, spatial_shapes, level_start_index)
    _check_points(value, points, num_levels, num_points)
    _check_level_sizes(value.shape[1], spatial_shapes, level_start_index)
    return num_levels


def check_method(method: str) -> None:
    """Raise a ValueError for a way of sampling that there is not."""
    if method not in ("default", "discrete"):
        raise ValueError(f"method: expected 'default' or 'discrete', got {method!r}")


def check_operands(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    level_sizes: Sequence[int] | None,
    num_points: Sequence[int] | None,
) -> None:
    """As :func:`check`, for the operands of an operator (see :mod:`deform_attn.operator`)."""
    levels = as_levels(spatial_shapes, level_sizes)
    check(value, levels, level_start_index, sampling_locations, attention_weights, num_points)
    real = acc_dtype(value.dtype)
    _check_dtype("sampling_locations", sampling_locations, real)
    _check_dtype("attention_weights", attention_weights, value.dtype, real)


def check_fused_operands(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    level_sizes: Sequence[int] | None,
    num_points: Sequence[int] | None,
    offset_scale: float,
) -> None:
    """As :func:`check_fused`, for the operands of an operator."""
    levels = as_levels(spatial_shapes, level_sizes)
    check_fused(
        *(value, levels, level_start_index, reference_points, sampling_offsets),
        *(attention_logits, num_points),
    )
    real = acc_dtype(value.dtype)
    _check_dtype("reference_points", reference_points, real)
    _check_dtype("attention_logits", attention_logits, value.dtype, real)
    _check_dtype("sampling_offsets", sampling_offsets, attention_logits.dtype)


def _check_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        wanted = " or ".join(dict.fromkeys(str(dtype) for dtype in dtypes))
        raise ValueError(f"{name}: expected {wanted}, got {tensor.dtype}")


def check_gradient(
    grad_output: Tensor,
    value: Tensor,
    sampling_locations: Tensor,
    wanted: Sequence[bool],
    gradients: int,
) -> None:
    """Raise a ValueError where the output's gradient does not fit a call that was checked, or where
    there is not a flag for each of the ``gradients``.
    """
    if len(wanted) != gradients:
        raise ValueError(f"wanted: expected {gradients} flags, got {len(wanted)}")
    shape = (value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])
    if tuple(grad_output.shape) != shape:
        raise ValueError(
            f"grad_output: expected the output's shape {shape}, got {tuple(grad_output.shape)}"
        )
    if grad_output.dtype != value.dtype or grad_output.device != value.device:
        raise ValueError(
            f"grad_output: expected {value.dtype} on {value.device} as value, "
            f"got {grad_output.dtype} on {grad_output.device}"
        )


def if_wanted(wanted: Sequence[bool], *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients, None for those that are not wanted."""
    return tuple(gradient if flag else None for gradient, flag in zip(gradients, wanted))


def _check_value(value: Tensor) -> None:
    if value.dtype not in VALUE_DTYPES:
        raise ValueError(
            f"value: expected dtype float64, float32, float16 or bfloat16, got {value.dtype}"
        )
    if value.dim() != 4:
        raise ValueError(
            "value: expected 4 dimensions [batch, rows, num_heads, head_dim], "
            f"got shape {tuple(value.shape)}"
        )
    if value.shape[2] == 0 or value.shape[3] == 0:
        raise ValueError(
            f"value: expected at least one head and one channel, got shape {tuple(value.shape)}"
        )


def _check_metadata_tensor(name: str, tensor: Tensor, value: Tensor) -> None:
    if tensor.dtype not in METADATA_DTYPES:
        raise ValueError(f"{name}: expected an integer dtype, got {tensor.dtype}")
    if tensor.device != value.device and tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: expected on value's device ({value.device}) or the CPU, got {tensor.device}"
        )


def _check_levels(
    value: Tensor,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
) -> int:
    if isinstance(spatial_shapes, Tensor):
        _check_metadata_tensor("spatial_shapes", spatial_shapes, value)
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
            raise ValueError(
                "spatial_shapes: expected shape [num_levels, 2] of (height, width), "
                f"got {tuple(spatial_shapes.shape)}"
            )
    else:
        try:
            pairs = [tuple(pair) for pair in spatial_shapes]
        except TypeError:
            raise TypeError(
                "spatial_shapes: expected a tensor [num_levels, 2] or a list of (height, width), "
                f"got {type(spatial_shapes).__name__}"
            ) from None
        for pair in pairs:
            if len(pair) != 2 or not all(_is_integer(side) for side in pair):
                raise ValueError(
                    f"spatial_shapes: expected pairs of integers (height, width), got {pair}"
                )
    num_levels = len(spatial_shapes)
    if num_levels == 0:
        raise ValueError("spatial_shapes: expected at least one level, got none")

    if isinstance(level_start_index, Tensor):
        _check_metadata_tensor("level_start_index", level_start_index, value)
        if level_start_index.dim() != 1:
            raise ValueError(
                "level_start_index: expected shape [num_levels], "
                f"got {tuple(level_start_index.shape)}"
            )
    elif level_start_index is not None and not (
        isinstance(level_start_index, Sequence) and all(map(_is_integer, level_start_index))
    ):
        raise TypeError(
            "level_start_index: expected a tensor [num_levels], a list of integers or None, "
            f"got {level_start_index!r}"
        )
    if level_start_index is not None and len(level_start_index) != num_levels:
        raise ValueError(
            f"level_start_index: expected {num_levels} entries, one for each level of "
            f"spatial_shapes, got {len(level_start_index)}"
        )
    return num_levels


def _is_integer(number: object) -> bool:
    return isinstance(number, (int, torch.SymInt)) and not isinstance(number, bool)


def _check_points(
    value: Tensor,
    points: dict[str, Tensor],
    num_levels: int,
    num_points: Sequence[int] | None,
) -> None:
    for name, tensor in points.items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(
                f"{name}: expected on value's device ({value.device}), got {tensor.device}"
            )

    (name, locations), (weights_name, weights) = points.items()
    shape = tuple(locations.shape)
    if num_points is None:
        wanted = "[batch, queries, num_heads, num_levels, num_points, 2]"
        if len(shape) == 5:
            wanted += " (or five dimensions and num_points, the list of points in each level)"
        rank = 6
    else:
        if isinstance(num_points, int) or not all(_is_integer(n) for n in num_points):
            raise ValueError(
                f"num_points: expected a list with the points of each level, got {num_points!r}"
            )
        if len(num_points) != num_levels or min(num_points) < 0:
            raise ValueError(
                f"num_points: expected {num_levels} counts of at least 0, one for each level of "
                f"spatial_shapes, got {list(num_points)}"
            )
        wanted = "[batch, queries, num_heads, sum of num_points, 2]"
        rank = 5
    if len(shape) != rank or shape[-1] != 2:
        raise ValueError(f"{name}: expected shape {wanted}, got {shape}")

    expected = [("batch", 0, value.shape[0], "value"), ("num_heads", 2, value.shape[2], "value")]
    if num_points is None:
        expected.append(("num_levels", 3, num_levels, "spatial_shapes"))
    else:
        expected.append(("points", 3, sum(num_points), "num_points"))
    for meaning, dim, size, source in expected:
        if shape[dim] != size:
            raise ValueError(
                f"{name}: expected {meaning} {size} (from {source}) in dimension "
                f"{dim}, got shape {shape}"
            )
    if tuple(weights.shape) != shape[:-1]:
        raise ValueError(
            f"{weights_name}: expected shape {shape[:-1]}, that of {name} without "
            f"its last dimension, got {tuple(weights.shape)}"
        )


def _check_level_sizes(
    rows: int, spatial_shapes: Levels, level_start_index: Tensor | Sequence[int] | None
) -> None:
    def known(metadata: object) -> bool:
        return not isinstance(metadata, Tensor) or readable(metadata, wait=CHECK_DEVICE_METADATA)

    if not known(spatial_shapes):
        return
    sizes = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    for level, (height, width) in enumerate(sizes):
        if not (1 <= height <= LARGEST_SIDE and 1 <= width <= LARGEST_SIDE):
            raise ValueError(
                f"spatial_shapes: expected sides from 1 to 2**31 - 1, got (height, width) = "
                f"({height}, {width}) for level {level}"
            )
    if not known(level_start_index):
        return
    if level_start_index is None:
        starts = [0]
        for height, width in sizes:
            starts.append(starts[-1] + height * width)
    elif isinstance(level_start_index, Tensor):
        starts = level_start_index.tolist()
    else:
        starts = list(level_start_index)
    for level, ((height, width), start) in enumerate(zip(sizes, starts)):
        if start < 0:
            raise ValueError(
                f"level_start_index: expected at least 0, got {start} for level {level}"
            )
        if start + height * width > rows:
            at_fault = "spatial_shapes" if level_start_index is None else "level_start_index"
            raise ValueError(
                f"{at_fault}: level {level} of {height} x {width} pixels from row {start} ends at "
                f"row {start + height * width}, but value has {rows} rows (dimension 1)"
            )
