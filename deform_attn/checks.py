"""Checks of arguments and of the operands of a call, with the error messages for callers."""

from __future__ import annotations

import difflib
import functools
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.fx import Proxy

from deform_attn.levels import (
    LARGEST_SIDE,
    METADATA_DTYPES,
    Levels,
    first_rows,
    is_integer,
    readable,
)
from deform_attn.operands import AnyOperands, FusedOperands, acc_dtype

__all__ = [
    "LevelNames",
    "as_path",
    "check",
    "check_choice",
    "check_counts",
    "check_flag",
    "check_gradient",
    "check_integer",
    "check_keywords",
    "check_level_sizes",
    "check_levels",
    "check_method",
    "check_module",
    "check_number",
    "check_operands",
    "check_positive",
    "check_scale",
    "check_sizes",
    "check_spatial_shapes",
    "check_tensor",
    "check_threshold",
    "converted",
    "explained",
    "masked",
]

Result = TypeVar("Result")

VALUE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Whether level sizes on a GPU are read back and checked: every call then waits for the GPU.
CHECK_DEVICE_METADATA = os.environ.get("DEFORM_ATTN_CHECK_METADATA", "0") == "1"


class LevelNames(NamedTuple):
    """What a function calls the value and its levels, for errors."""

    value: str = "value"
    spatial_shapes: str = "spatial_shapes"
    level_start_index: str = "level_start_index"


NAMES = LevelNames()  # of the operator


def check_integer(name: str, value: object, low: int | None = None, high: int = 2**63 - 1) -> None:
    """Check an integer.

    Args:
        name: of the argument.
        value: given.
        low: lowest valid value; None: any integer is valid.
        high: highest valid value.

    Raises:
        TypeError: no integer.
        ValueError: below ``low`` or above ``high``.

    Example:
        >>> from deform_attn.checks import check_integer
        >>> check_integer("batch", 1.5, 1)
        Traceback (most recent call last):
            ...
        TypeError: batch: expected an integer, got 1.5
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if low is not None and value < low:
        expected = "at least 1" if low == 1 else f"a number from {low}"
        raise ValueError(f"{name}: expected {expected}, got {value}")
    if low is not None and not value <= high:
        limit = "below 2**63" if high == 2**63 - 1 else f"up to {high}"
        raise ValueError(f"{name}: expected a number {limit}, got {value}")


def check_sizes(channels: str, heads: str, **sizes: int) -> list[int]:
    """The sizes of an attention module, checked, as Python's integers.

    NumPy's integers have few bits: the products of sizes would overflow.

    Args:
        channels: the name of the number of channels, among those of ``sizes``.
        heads: likewise, of the number of heads.
        sizes: by the names of the arguments.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is less than 1, or the heads do not divide the channels.

    Example:
        >>> from deform_attn.checks import check_sizes
        >>> check_sizes("d_model", "n_heads", d_model=100, n_heads=8)
        Traceback (most recent call last):
            ...
        ValueError: d_model: expected a multiple of n_heads (8), got 100
    """
    for name, size in sizes.items():
        check_integer(name, size, 1)
    if sizes[channels] % sizes[heads]:
        raise ValueError(
            f"{channels}: expected a multiple of {heads} ({sizes[heads]}), got {sizes[channels]}"
        )
    return [int(size) for size in sizes.values()]


def check_counts(num_points: int | Sequence[int], num_levels: int) -> list[int]:
    """The number of points in each level.

    Args:
        num_points: of every level, or a list.
        num_levels: valid.

    Raises:
        TypeError: no integers.
        ValueError: a count is below 0, all are 0, or there is another number of levels.
    """
    counts: list[Any]
    try:
        counts = [num_points] * num_levels if is_integer(num_points) else list(num_points)  # type: ignore[arg-type]
    except TypeError:
        counts = [num_points]
    expected = f"num_points: expected a count, or one for each of {num_levels} levels"
    if not all(is_integer(count) and not isinstance(count, Tensor) for count in counts):
        raise TypeError(f"{expected}, got {num_points!r}")
    if len(counts) != num_levels or min(counts) < 0 or sum(counts) == 0:
        raise ValueError(f"{expected}, got {num_points}")
    return [int(count) for count in counts]


def check_keywords(given: Iterable[str], known: tuple[str, ...]) -> None:
    """Raise a TypeError for a keyword that is a known one misspelt; others are ignored.

    For functions that ignore further keywords, as those of mmcv do.

    Example:
        >>> from deform_attn.checks import check_keywords
        >>> check_keywords(["key_pos", "key_padding_masks"], ("query_pos", "key_padding_mask"))
        Traceback (most recent call last):
            ...
        TypeError: key_padding_masks: unknown argument, expected key_padding_mask
    """
    for name in given:
        if near := _near(name, known):
            raise TypeError(f"{name}: unknown argument, expected {near[0]}")


@functools.cache
def _near(name: str, known: tuple[str, ...]) -> list[str]:
    """The known name that this one is meant for, if any.

    0.9: mmcv's ``query_key_padding_mask`` is no misspelt ``key_padding_mask``.
    """
    return difflib.get_close_matches(name, known, 1, 0.9)


def check_number(name: str, value: object) -> float:
    """A number; NaN and infinity are numbers.

    Args:
        name: of the argument.
        value: given.

    Raises:
        TypeError: no number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return float(value)


def check_positive(name: str, value: object) -> None:
    """Check a finite number above 0.

    Raises:
        TypeError: no number.
        ValueError: not above 0, infinite or NaN.
    """
    if not 0 < check_number(name, value) < math.inf:
        raise ValueError(f"{name}: expected a number above 0, got {value}")


def as_path(name: str, path: object) -> Path:
    """A path, whose start ``~`` is the user's folder.

    Raises:
        TypeError: no text or path.
        ValueError: empty text, which ``pathlib.Path`` takes for the current folder.
    """
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"{name}: expected a path, got {path!r}")
    if not os.fspath(path):
        raise ValueError(f"{name}: expected a path, got {path!r}; '.' is the current folder")
    return Path(os.path.expanduser(path))  # of an unknown user: as it is


def check_module(name: str, module: object) -> None:
    """Raise a TypeError for anything but a module."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{name}: expected a torch.nn.Module, got {type(module).__name__}; pass the module "
            "that the library's object holds"
        )


def check_choice(name: str, value: object, known: Iterable[object]) -> None:
    """Raise a ValueError for anything but one of the known names or numbers.

    Example:
        >>> from deform_attn.checks import check_choice
        >>> check_choice("resize", "strech", ["stretch", "fit"])
        Traceback (most recent call last):
            ...
        ValueError: resize: expected one of stretch, fit; got 'strech', similar: stretch
    """
    known = list(known)
    if value not in known:
        names = [str(one) for one in known]
        near = difflib.get_close_matches(str(value), names)
        similar = f", similar: {', '.join(near)}" if near else ""
        raise ValueError(f"{name}: expected one of {', '.join(names)}; got {value!r}{similar}")


def check_flag(name: str, value: object) -> None:
    """Raise a TypeError for anything but True and False (of NumPy too), or 0 and 1 as in
    configuration files.
    """
    if value is True or value is False:  # the tests below take longer
        return
    if (numpy := sys.modules.get("numpy")) and isinstance(value, numpy.bool_):
        return
    if not isinstance(value, Integral) or value not in (0, 1):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_threshold(name: str, value: object) -> None:
    """Check a number from 0 to 1.

    Args:
        name: of the argument.
        value: given.

    Raises:
        TypeError: no number.
        ValueError: outside of that range, or NaN.
    """
    number = check_number(name, value)
    if not 0 <= number <= 1:  # true of NaN too
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")


def check_scale(offset_scale: object) -> None:
    """Check an ``offset_scale``: a finite number, or what stands for one in a traced call."""
    if isinstance(offset_scale, Tensor | torch.SymFloat):
        return
    if not math.isfinite(check_number("offset_scale", offset_scale)):
        raise ValueError(f"offset_scale: expected a finite number, got {offset_scale}")


def check(operands: AnyOperands) -> None:
    """Raise a ValueError (TypeError for a wrong type) that names the first argument at fault.

    Levels may be tensors or lists, as callers of :func:`deform_attn.ms_deform_attn` pass them,
    although the record declares tensors. Level sizes are checked if they are numbers or CPU
    tensors. On other devices they are read and checked only with ``DEFORM_ATTN_CHECK_METADATA=1``,
    because reading waits for the device; without it the kernels treat a level that does not fit
    into ``value`` as empty.
    """
    value: Tensor = operands.value
    levels: Any = operands.spatial_shapes
    starts: Any = operands.level_start_index
    fused = isinstance(operands, FusedOperands)
    first = 4 if fused else 3  # locations or offsets, then weights or logits
    tensors: Any = operands[first : first + 2]
    points: dict[str, Tensor] = dict(zip(operands._fields[first:], tensors))
    for name, tensor in {"value": value, **points}.items():
        check_tensor(name, tensor)
    _check_value(value)
    devices = {tensor.device for tensor in points.values()}
    if len(devices) == 1 and value.device not in devices:
        raise ValueError(
            f"value: expected on the device of {' and '.join(points)} ({devices.pop()}), "
            f"got {value.device}"
        )
    num_levels = check_levels(value, levels, starts)
    _check_points(value, points, num_levels, operands.num_points)
    check_level_sizes(value.shape[1], levels, starts)
    if isinstance(operands, FusedOperands):
        _check_reference_points(operands, num_levels)
    if operands.value_mask is not None:
        _check_value_mask(operands.value_mask, value)


def explained(
    call: Callable[..., Result], check: Callable[[Any], None], arguments: Any, *options: Any
) -> Result:
    """``call(arguments, *options)``; after a failure, ``check(arguments)`` names the argument.

    The messages of the kernels are short. The checks take as long as a small call, so they run only
    after a failure.
    """
    if is_compiling():
        return call(arguments, *options)
    try:
        return call(arguments, *options)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        check(arguments)
        raise


def check_operands(operands: AnyOperands) -> None:
    """As :func:`check`, for operands as an operator takes them: converted to its dtypes."""
    levels: Any = _levels_of(operands)
    check(operands._replace(spatial_shapes=levels))
    value, dtype = operands.value, acc_dtype(operands.value.dtype)
    if isinstance(operands, FusedOperands):
        _check_dtype("reference_points", operands.reference_points, dtype)
        _check_dtype("attention_logits", operands.attention_logits, value.dtype, dtype)
        _check_dtype("sampling_offsets", operands.sampling_offsets, operands.attention_logits.dtype)
    else:
        _check_dtype("sampling_locations", operands.sampling_locations, dtype)
        _check_dtype("attention_weights", operands.attention_weights, value.dtype, dtype)


def check_gradient(
    grad_output: Tensor, operands: AnyOperands, output_mask: Sequence[bool], gradients: int
) -> None:
    """Raise a ValueError where the output's gradient does not fit checked operands, or where
    ``output_mask`` has not one flag for each of the ``gradients``.
    """
    if len(output_mask) != gradients:
        raise ValueError(f"output_mask: expected {gradients} flags, got {len(output_mask)}")
    value, points = operands.value, operands[3]
    shape = (value.shape[0], points.shape[1], value.shape[2] * value.shape[3])
    if tuple(grad_output.shape) != shape:
        raise ValueError(
            f"grad_output: expected the output's shape {shape}, got {tuple(grad_output.shape)}"
        )
    if grad_output.dtype != value.dtype or grad_output.device != value.device:
        raise ValueError(
            f"grad_output: expected {value.dtype} on {value.device} as value, "
            f"got {grad_output.dtype} on {grad_output.device}"
        )


def check_method(method: str, official_clamp: bool) -> None:
    """Check a sampling method and its option.

    Raises:
        TypeError: ``official_clamp`` is no flag.
        ValueError: an unknown method.
    """
    if method == "default" and official_clamp is False:
        return
    if method not in ("default", "discrete"):
        raise ValueError(f"method: expected 'default' or 'discrete', got {method!r}")
    check_flag("official_clamp", official_clamp)


def converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor in another dtype."""
    _check_floating(name, tensor)
    return tensor.to(dtype)


def masked(output_mask: Sequence[bool], *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients whose flag is set; None for the others."""
    return tuple(gradient if flag else None for gradient, flag in zip(gradients, output_mask))


def _levels_of(operands: AnyOperands) -> Levels:
    """The levels of an operator's operands in the form of a caller: a tensor or pairs."""
    shapes, sizes = operands.spatial_shapes, operands.level_sizes
    if (shapes is None) == (sizes is None):
        raise ValueError(
            "spatial_shapes: expected either a tensor or level_sizes, got "
            + ("neither" if sizes is None else "both")
        )
    if sizes is None:
        assert shapes is not None
        return shapes
    if len(sizes) % 2:
        raise ValueError(
            f"level_sizes: expected a height and a width for each level, got {len(sizes)} numbers"
        )
    return list(zip(sizes[0::2], sizes[1::2]))


def check_tensor(name: str, tensor: object) -> None:
    """Raise a TypeError for anything but a tensor, a ValueError for one that is not dense."""
    if not isinstance(tensor, Tensor):
        step = ""
        if isinstance(tensor, Proxy):
            step = (
                " of torch.fx, which cannot trace the choice of kernels; use torch.export.export "
                "or torch.compile, or a torch.fx.Tracer whose is_leaf_module keeps modules of "
                "deform_attn whole; torch.fx.wrap keeps functions whole"
            )
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}{step}")
    if tensor.is_nested:
        kind, step = "a nested tensor", "to_padded_tensor()"
    elif tensor.layout is not torch.strided:
        kind, step = f"the layout {tensor.layout}", "to_dense()"
    elif tensor.is_quantized:
        kind, step = "a quantized tensor", "dequantize()"
    else:
        return
    raise ValueError(f"{name}: expected a dense tensor, got {kind}; convert it with {step}")


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")


def _check_device(name: str, tensor: Tensor, value: Tensor) -> None:
    if tensor.device != value.device:
        raise ValueError(
            f"{name}: expected on value's device ({value.device}), got {tensor.device}"
        )


def _check_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(dict.fromkeys(str(dtype) for dtype in dtypes))
        raise ValueError(f"{name}: expected {expected}, got {tensor.dtype}")


def _check_reference_points(operands: FusedOperands, num_levels: int) -> None:
    reference = operands.reference_points
    check_tensor("reference_points", reference)
    B, Q = operands.sampling_offsets.shape[:2]
    shape = tuple(reference.shape)
    if (
        len(shape) != 4
        or shape[:2] != (B, Q)
        or shape[2] not in (1, num_levels)
        or shape[3] not in (2, 4, 5)
    ):
        raise ValueError(
            f"reference_points: expected shape [{B}, {Q}, {num_levels} or 1, size] with size 2 for "
            "points (x, y), 4 for boxes (cx, cy, w, h) or 5 for rotated boxes (cx, cy, w, h, "
            f"angle in radians), got {shape}"
        )
    _check_floating("reference_points", reference)
    _check_device("reference_points", reference, operands.value)


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


def _check_value_mask(mask: Tensor, value: Tensor) -> None:
    check_tensor("value_mask", mask)
    shape = tuple(value.shape[:2])
    if mask.dtype is not torch.bool or tuple(mask.shape) != shape:
        raise ValueError(
            f"value_mask: expected a bool tensor of shape [batch, rows] = {list(shape)}, True for "
            f"padding, got {mask.dtype} {tuple(mask.shape)}"
        )
    _check_device("value_mask", mask, value)


def _check_metadata_tensor(name: str, tensor: Tensor, value: Tensor, names: LevelNames) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in METADATA_DTYPES:
        raise ValueError(f"{name}: expected an integer dtype, got {tensor.dtype}")
    if tensor.device != value.device and tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: expected on {names.value}'s device ({value.device}) or the CPU, "
            f"got {tensor.device}"
        )


def check_spatial_shapes(spatial_shapes: Levels, value: Tensor, names: LevelNames = NAMES) -> int:
    """Check the types and the layout of level sizes; their number.

    Args:
        spatial_shapes: given.
        value: for its device.
        names: of the arguments.

    Raises:
        TypeError: no tensor or list of pairs.
        ValueError: another shape, dtype or device.
    """
    name = names.spatial_shapes
    if isinstance(spatial_shapes, Tensor):
        _check_metadata_tensor(name, spatial_shapes, value, names)
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
            raise ValueError(
                f"{name}: expected shape [num_levels, 2] of (height, width), "
                f"got {tuple(spatial_shapes.shape)}"
            )
    else:
        try:
            pairs = [tuple(pair) for pair in spatial_shapes]
        except TypeError:
            raise TypeError(
                f"{name}: expected a tensor [num_levels, 2] or a list of (height, width), "
                f"got {type(spatial_shapes).__name__} {str(spatial_shapes)[:80]}"
            ) from None
        for pair in pairs:
            if len(pair) != 2 or not all(is_integer(side) for side in pair):
                raise ValueError(f"{name}: expected pairs of integers (height, width), got {pair}")
    num_levels = len(spatial_shapes)
    if num_levels == 0:
        raise ValueError(f"{name}: expected at least one level, got none")
    return num_levels


def check_levels(
    value: Tensor,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
    names: LevelNames = NAMES,
) -> int:
    """As :func:`check_spatial_shapes`, and likewise of the first row of each level.

    Args:
        value: for its device.
        spatial_shapes: given.
        level_start_index: given.
        names: of the arguments.

    Raises:
        TypeError: another type.
        ValueError: another shape, dtype or device.
    """
    num_levels = check_spatial_shapes(spatial_shapes, value, names)
    name = names.level_start_index
    if isinstance(level_start_index, Tensor):
        _check_metadata_tensor(name, level_start_index, value, names)
        if level_start_index.dim() != 1:
            raise ValueError(
                f"{name}: expected shape [num_levels], got {tuple(level_start_index.shape)}"
            )
    elif level_start_index is not None and not (
        isinstance(level_start_index, Sequence) and all(map(is_integer, level_start_index))
    ):
        raise TypeError(
            f"{name}: expected a tensor [num_levels], a list of integers or None, "
            f"got {level_start_index!r}"
        )
    if level_start_index is not None and len(level_start_index) != num_levels:
        raise ValueError(
            f"{name}: expected {num_levels} entries, one for each level of "
            f"{names.spatial_shapes}, got {len(level_start_index)}"
        )
    return num_levels


def _check_points(
    value: Tensor,
    points: dict[str, Tensor],
    num_levels: int,
    num_points: Sequence[int] | None,
) -> None:
    for name, tensor in points.items():
        _check_floating(name, tensor)
        _check_device(name, tensor, value)

    (name, locations), (weights_name, weights) = points.items()
    shape = tuple(locations.shape)
    if num_points is None:
        layout = "[batch, queries, num_heads, num_levels, num_points, 2]"
        if len(shape) == 5:
            layout += " (or five dimensions and num_points, the list of points in each level)"
        rank = 6
    else:
        if not isinstance(num_points, Sequence) or not all(is_integer(n) for n in num_points):
            raise ValueError(
                f"num_points: expected a list with the points of each level, got {num_points!r}"
            )
        if len(num_points) != num_levels or min(num_points) < 0:
            raise ValueError(
                f"num_points: expected {num_levels} counts of at least 0, one for each level of "
                f"spatial_shapes, got {list(num_points)}"
            )
        layout = "[batch, queries, num_heads, sum of num_points, 2]"
        rank = 5
    if len(shape) != rank or shape[-1] != 2:
        raise ValueError(f"{name}: expected shape {layout}, got {shape}")

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


def check_level_sizes(
    rows: int,
    spatial_shapes: Levels,
    level_start_index: Tensor | Sequence[int] | None,
    names: LevelNames = NAMES,
) -> None:
    """Check that levels are inside the rows of a value; their types are valid.

    Sizes on another device are read only with ``DEFORM_ATTN_CHECK_METADATA=1``.

    Args:
        rows: of value.
        spatial_shapes: given.
        level_start_index: given.
        names: of the arguments.

    Raises:
        ValueError: a side is below 1, or a level is not inside the rows.
    """

    def known(metadata: object) -> bool:
        return not isinstance(metadata, Tensor) or readable(metadata, wait=CHECK_DEVICE_METADATA)

    if not known(spatial_shapes):
        return
    sizes = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    for level, (height, width) in enumerate(sizes):
        if not (1 <= height <= LARGEST_SIDE and 1 <= width <= LARGEST_SIDE):
            raise ValueError(
                f"{names.spatial_shapes}: expected sides from 1 to 2**31 - 1, got (height, width) "
                f"= ({height}, {width}) for level {level}"
            )
    if not known(level_start_index):
        return
    if level_start_index is None:
        starts = first_rows(sizes)
    elif isinstance(level_start_index, Tensor):
        starts = level_start_index.tolist()
    else:
        starts = list(level_start_index)
    at_fault = names.spatial_shapes if level_start_index is None else names.level_start_index
    for level, ((height, width), start) in enumerate(zip(sizes, starts)):
        if start < 0:
            raise ValueError(f"{at_fault}: expected at least 0, got {start} for level {level}")
        if start + height * width > rows:
            raise ValueError(
                f"{at_fault}: level {level} of {height} x {width} pixels from row {start} ends at "
                f"row {start + height * width}, but {names.value} has {rows} rows (dimension 1)"
            )
