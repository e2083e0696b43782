"""The Triton backend on the host: when it can run, the block sizes, the launches.

This backend is used if no CUDA library was built. If one was, the compiled kernels are preferred
for every shape: they issue fewer loads per point (here each thread loads the location and weight),
visit an encoder's queries in tiles, use fewer atomic additions, and have a cheaper launch. This is
an estimate from counts, not a measurement: `make gpu` times both on every workload and reports
which is faster.

The kernels are in _triton_kernels.py, which is imported at the first call, because importing triton
takes longer than importing the rest of this package.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from deform_attn.checks import check_gradient, check_operands, masked
from deform_attn.levels import count_points
from deform_attn.operands import FusedOperands, Operands, of_backward

__all__ = [
    "DEVICES",
    "Blocks",
    "Target",
    "backward",
    "blocks_for",
    "constants",
    "forward",
    "fused_backward",
    "fused_forward",
    "launch_options",
    "target_of",
    "why_not",
]

_SPEC = importlib.util.find_spec("triton")
_INSTALLED = _SPEC is not None and _SPEC.origin is not None  # not just a folder of that name
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton reads it at import, so do we
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# NVIDIA and AMD (PyTorch calls both "cuda"), and Intel.
DEVICES = ("cuda", "xpu")
_WHY_NOT_LAUNCHED: dict[str, str | None] = {}  # by device type, filled at the first question


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on a device, or None."""
    if not _INSTALLED:
        return "triton is not installed"
    if dtype not in _DTYPES:
        return f"there are Triton kernels for float32, float16 and bfloat16, not for {dtype}"
    if device_type == "meta" or (device_type == "cpu" and _INTERPRETED):
        return None
    if device_type not in DEVICES:
        reason = f"Triton kernels run on {' and '.join(DEVICES)}, not on {device_type}"
        if device_type == "cpu":
            reason += " (TRITON_INTERPRET=1 in the environment interprets them, slowly, for tests)"
        return reason
    if device_type not in _WHY_NOT_LAUNCHED and not torch.compiler.is_compiling():
        _WHY_NOT_LAUNCHED[device_type] = _why_not_launched(device_type)
    return _WHY_NOT_LAUNCHED.get(device_type)


def _why_not_launched(device_type: str) -> str | None:
    """Why Triton cannot launch on this machine's devices of a type; None also without a device."""
    if not torch.get_device_module(device_type).is_available():
        return None
    expected = "hip" if device_type == "cuda" and torch.version.hip else device_type
    try:
        found = _target().name
    except Exception as error:  # drivers raise errors of many types
        return f"Triton finds no driver for {device_type}: {error}"
    if found != expected:
        return f"Triton's driver is for {found}, expected {expected} for PyTorch's {device_type}"
    return None


@dataclass(frozen=True)
class Target:
    """What Triton compiles for: its backend, threads in a warp, options that a launch may have."""

    name: str  # "cuda", "hip" or "xpu"
    lanes: int
    wide_additions: bool  # four floats in one atomic addition
    options: frozenset[str]


@cache
def _target() -> Target:
    """Of the current device, asked of Triton."""
    from triton.compiler.compiler import make_backend
    from triton.runtime import driver

    return target_of(make_backend, driver.active.get_current_target())


def target_of(make_backend: Callable[[Any], Any], target: Any) -> Target:
    """A Target from one of Triton's and Triton's function that makes a backend for it."""
    options = make_backend(target).parse_options({})
    wide_additions = target.backend == "cuda" and target.arch >= 90
    return Target(target.backend, target.warp_size, wide_additions, frozenset(vars(options)))


def launch_options(blocks: Blocks, known: frozenset[str]) -> dict[str, int]:
    """The options of a launch that Triton's backend accepts; any other is an error there."""
    options = {"num_warps": blocks.warps, "maxnreg": blocks.registers}
    return {k: v for k, v in options.items() if k in known and v is not None}


@dataclass(frozen=True)
class Blocks:
    """How the work is cut, and how many registers a thread may take (None: as it comes)."""

    queries: int  # of a program
    channels: int  # at a time
    warps: int  # of a program
    registers: int | None = None


@dataclass(frozen=True)
class _Setting:
    """A row of the table below: what a thread takes side by side, as far as both go."""

    load: int  # bytes
    channels: int
    warps: int


# Chosen by shape, without trials on the device. With 64 registers a thread, a multiprocessor is
# half full at least on every architecture from 7.5 to 12.0, and no kernel spills; a program of one
# warp would not do, as 8.6 has no more than 16 programs at a time. `make kernels` shows it.
#
# Many queries, enough to fill a GPU: 16 bytes a thread, the widest load (8 in the fused kernel in
# 16 bits, which spills otherwise); four warps, which share what they read in the L1 cache. Few
# queries: half of that, so more threads; small programs, to reach every multiprocessor.
#
# Backward: four channels a thread, the widest atomic addition in float32, also where it could load
# more: one layout for all that a program holds keeps it out of shared memory. Where a point takes
# more registers, for the softmax or the list of rows, two. Where a GPU adds single floats, one
# channel a thread, so that a warp adds to one row at a time; from Triton 3.9 on its compiler gives
# such additions this layout anyway, and converts to it through shared memory, with spills.
_SETTINGS = {
    ("forward", "many"): _Setting(load=16, channels=8, warps=4),
    ("forward", "few"): _Setting(load=8, channels=4, warps=2),
    ("forward, fused", "many"): _Setting(load=16, channels=4, warps=4),
    ("forward, fused", "few"): _Setting(load=8, channels=4, warps=2),
    ("backward", "any"): _Setting(load=16, channels=4, warps=2),
    ("backward, deterministic", "any"): _Setting(load=16, channels=2, warps=2),
    ("backward, fused", "any"): _Setting(load=16, channels=2, warps=2),
}
_REGISTERS = 64
_MORE_REGISTERS = {"forward": 80, "backward": 96}  # with a mask or rotated boxes: no spills
_MANY = 2**22  # channels of all queries and heads
_SEVERAL_LOADS = 128  # registers where a warp's threads do not reach across a head's channels


def blocks_for(
    element_size: int,
    head_dim: int,
    queries: int,
    vectors: int,
    *,
    backward: bool = False,
    deterministic: bool = False,
    fused: bool = False,
    masked: bool = False,
    rotated: bool = False,
    interpreted: bool = False,
    target: Target | None = None,
) -> Blocks:
    """Block sizes by the shape of the problem: a row of the table above, fitted to the head.

    A program's threads lie side by side along the channels of as many queries as fit.

    Args:
        element_size: bytes of an element of value.
        head_dim: D.
        queries: Q.
        vectors: batch x queries x heads.
        backward: for the backward kernel.
        deterministic: without atomic additions.
        fused: with the softmax and the locations inside.
        masked: with a value_mask.
        rotated: with reference boxes that have an angle.
        interpreted: for the interpreter, whose time is the number of programs.
        target: what is compiled for; None for the interpreter. With warps of 64 threads (AMD CDNA),
            half as many warps.
    """
    lanes = target.lanes if target else 32
    channels = min(_power_of_two(head_dim), 256 if backward else 128)
    kernel = "backward" if backward else "forward"
    kernel += ", fused" if fused else ", deterministic" if deterministic else ""
    size = "any" if backward else "many" if vectors * channels >= _MANY else "few"
    setting = _SETTINGS[kernel, size]
    # as a head is aligned
    by_thread = math.gcd(head_dim, min(setting.load // element_size, setting.channels))
    if backward and not deterministic and target and not target.wide_additions:
        by_thread = 1
    warps = max(1, setting.warps * 32 // lanes)
    side_by_side = max(1, lanes * by_thread // channels)
    registers = _REGISTERS
    if masked or rotated:
        registers = _MORE_REGISTERS["backward" if backward else "forward"]
    return Blocks(
        min(128, _power_of_two(queries)) if interpreted else warps * side_by_side,
        channels,
        warps,
        registers if channels <= lanes * by_thread else _SEVERAL_LOADS,
    )


def constants(
    head_dim: int,
    counts: tuple[int, ...],
    blocks: Blocks,
    *,
    wide: bool,
    reference: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """What the kernels are compiled for.

    Args:
        head_dim: D.
        counts: points in each level.
        blocks: from :func:`blocks_for`.
        wide: int64 offsets, for 2**31 elements of value and more.
        reference: how many reference points a query has, and how many coordinates each.
    """
    from triton import language

    return {
        "HEAD_DIM": head_dim,
        "COUNTS": counts,
        "POINTS": sum(counts),
        "ANCHORS": reference[0],
        "REFERENCE": reference[1],
        "INDEX": language.int64 if wide else language.int32,
        "BLOCK_Q": blocks.queries,
        "BLOCK_D": blocks.channels,
        "BLOCK_K": _power_of_two(sum(counts)),
    }


def forward(*inputs: Any) -> Tensor:
    """The kernel of ``ms_deform_attn_triton``."""
    return _Call(Operands(*inputs)).forward()


def backward(grad_output: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    """The kernel of ``ms_deform_attn_triton_backward``.

    The gradient of value is summed in float32 by atomic additions, in an order that differs from
    run to run. ``deterministic``: each row sums what the points add to it in a fixed order, after
    a stable sort; it takes about 100 bytes of memory per point, for one batch element at a time.
    """
    operands, deterministic, output_mask = of_backward(Operands, inputs)
    return _Call(operands).backward(grad_output, deterministic, output_mask)


def fused_forward(*inputs: Any) -> Tensor:
    """The kernel of ``ms_deform_attn_fused_triton``."""
    return _Call(FusedOperands(*inputs)).forward()


def fused_backward(grad_output: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    """The kernel of ``ms_deform_attn_fused_triton_backward``; see :func:`backward`."""
    operands, deterministic, output_mask = of_backward(FusedOperands, inputs)
    return _Call(operands).backward(grad_output, deterministic, output_mask)


class _Call:
    """A call's operands as the kernels take them, checked and contiguous, and the launches."""

    def __init__(self, operands: Operands | FusedOperands) -> None:
        check_operands(operands)
        self.operands = operands
        value, shapes, starts, sizes = operands.value, *operands[1:3], operands.level_sizes
        reference, offset_scale = None, 0.0
        if isinstance(operands, FusedOperands):
            reference, offset_scale = operands.reference_points, operands.offset_scale
            locations, weights = operands.sampling_offsets, operands.attention_logits
        else:
            locations, weights = operands.sampling_locations, operands.attention_weights
        reason = why_not(value.device.type, value.dtype)
        if reason is not None:
            raise RuntimeError(f"value: {reason}")

        num_levels = len(sizes or ()) // 2 if shapes is None else len(shapes)
        self.counts = tuple(count_points(locations, num_levels, operands.num_points))
        self.queries = locations.shape[1]
        self.value = value.contiguous()
        self.locations = locations.contiguous()
        self.weights = weights.contiguous()
        mask = operands.value_mask
        self.boxes = None  # rotated
        if reference is not None and reference.shape[3] == 5:
            self.boxes, reference = reference, _frames(reference)
        self.reference = None if reference is None else reference.contiguous()
        self.reference_shape = (0, 0)
        if reference is not None:
            self.reference_shape = (reference.shape[2], reference.shape[3])

        # The kernels read levels that lie on the device; host numbers are passed by value.
        sizes_by_value: tuple[int, ...] = ()
        starts_by_value: tuple[int, ...] | None = None
        if shapes is None:
            sizes_by_value = _by_value(sizes or ())
        elif shapes.device != value.device:
            sizes_by_value, shapes = _by_value(shapes.flatten().tolist()), None
        if starts is not None and starts.device != value.device:
            starts_by_value, starts = _by_value(starts.tolist()), None
        self.inputs = (
            self.value,
            None if shapes is None else shapes.contiguous(),
            None if starts is None else starts.contiguous(),
            sizes_by_value,
            starts_by_value,
            self.reference,
            float(offset_scale),
            self.locations,
            self.weights,
            None if mask is None else mask.contiguous().view(torch.uint8),
        )

    def forward(self) -> Tensor:
        B, _, M, D = self.value.shape
        output = self.value.new_empty((B, self.queries, M * D), dtype=_stored(self.value.dtype))
        if output.numel():
            blocks = self.blocks()
            programs = B * M * _ceil(D, blocks.channels) * _ceil(self.queries, blocks.queries)
            self.launch("forward", programs, blocks, *self.inputs, output)
        return output.to(self.value.dtype)

    def backward(
        self, grad_output: Tensor, deterministic: bool, output_mask: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of value, of reference points if any, of locations or offsets, of weights or
        logits; None for those whose flag is not set.
        """
        fused = self.reference is not None
        check_gradient(grad_output, self.operands, output_mask, 4 if fused else 3)
        B, S, M, D = self.value.shape
        Q = self.queries
        grad_output = grad_output.contiguous()
        grad_locations = torch.empty_like(self.locations, dtype=_stored(self.locations.dtype))
        grad_weights = torch.empty_like(self.weights, dtype=_stored(self.weights.dtype))
        grad_value = grad_reference = None
        if self.reference is not None and output_mask[1]:  # one of each head, added up below
            grad_reference = self.reference.new_zeros((B, Q, M, *self.reference_shape))
        blocks = self.blocks(backward=True, deterministic=deterministic)
        programs = M * _ceil(Q, blocks.queries)

        def launch(batch: int, programs: int, *grad_value: Tensor | None) -> None:
            gradients = (*grad_value, grad_reference, grad_locations, grad_weights)
            self.launch("backward", programs, blocks, grad_output, *self.inputs, *gradients, batch)

        if not output_mask[0]:
            if grad_weights.numel():
                launch(0, B * programs, None, None, None)
        elif not deterministic or grad_weights.numel() == 0:
            # 16-bit sums would lose small gradients
            grad_value = torch.zeros_like(self.value, dtype=torch.float32)
            if grad_weights.numel():
                launch(0, B * programs, grad_value, None, None)
        else:
            grad_value = torch.empty_like(self.value, dtype=_stored(self.value.dtype))
            shape = (Q, M, sum(self.counts), 4)
            targets = torch.empty(
                shape,
                dtype=torch.int64 if S * M >= 2**31 else torch.int32,
                device=self.value.device,
            )
            shares = torch.empty(shape, dtype=torch.float32, device=self.value.device)
            rows = torch.arange(M * S + 1, dtype=targets.dtype, device=self.value.device)
            for batch in range(B):
                launch(batch, programs, None, targets, shares)
                by_row, order = targets.flatten().sort(stable=True)
                begins = torch.searchsorted(by_row, rows)
                self.add_up_rows(grad_output[batch], order, begins, shares, grad_value[batch])
        if grad_reference is not None:
            grad_reference = grad_reference.sum(2)
            if self.boxes is not None:
                grad_reference = _grad_boxes(self.boxes, grad_reference)
        return masked(
            output_mask,
            None if grad_value is None else grad_value.to(self.value.dtype),
            *([grad_reference] if fused else []),
            grad_locations.to(self.locations.dtype),
            grad_weights.to(self.weights.dtype),
        )

    def blocks(self, *, backward: bool = False, deterministic: bool = False) -> Blocks:
        B, _, M, D = self.value.shape
        return blocks_for(
            self.value.element_size(),
            D,
            self.queries,
            B * self.queries * M,
            backward=backward,
            deterministic=deterministic,
            fused=self.reference is not None,
            masked=self.operands.value_mask is not None,
            rotated=self.boxes is not None,
            interpreted=_INTERPRETED,
            target=_target() if self.value.device.type in DEVICES else None,
        )

    def launch(self, kernel: str, programs: int, blocks: Blocks, *arguments: Any) -> None:
        _, S, M, D = self.value.shape
        _run(
            kernel,
            programs,
            self.value.device,
            *arguments,
            *(S, self.queries, M),
            blocks=blocks,
            **constants(
                D,
                self.counts,
                blocks,
                wide=S * M * D >= 2**31,
                reference=self.reference_shape,
            ),
        )

    def add_up_rows(self, *arguments: Tensor) -> None:
        _, S, M, D = self.value.shape
        blocks = self.blocks(backward=True)
        _run(
            "add_up_rows",
            _ceil(S * M, blocks.queries) * _ceil(D, blocks.channels),
            self.value.device,
            *arguments,
            *(S, M, sum(self.counts)),
            blocks=blocks,
            HEAD_DIM=D,
            BLOCK_Q=blocks.queries,
            BLOCK_D=blocks.channels,
        )


def _frames(boxes: Tensor) -> Tensor:
    """Rotated boxes ``[..., 5]`` as the kernels read them, ``[..., 6]``; see _triton_kernels.py."""
    cx, cy, w, h, angle = boxes.unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((cx, cy, w * cos, h * cos, -h * sin, w * sin), -1)


def _grad_boxes(boxes: Tensor, grad_frames: Tensor) -> Tensor:
    """The gradient of rotated boxes from that of their frames."""
    _, _, w, h, angle = boxes.unbind(-1)
    grad_cx, grad_cy, a_x, b_y, b_x, a_y = grad_frames.unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    grad_w, grad_h = cos * a_x + sin * a_y, cos * b_y - sin * b_x
    grad_angle = w * (cos * a_y - sin * a_x) - h * (cos * b_x + sin * b_y)
    return torch.stack((grad_cx, grad_cy, grad_w, grad_h, grad_angle), -1)


def _run(
    kernel: str,
    programs: int,
    device: torch.device,
    *arguments: Any,
    blocks: Blocks,
    **constants: Any,
) -> None:
    from deform_attn.backends import _triton_kernels

    if programs >= 2**31:
        raise RuntimeError(
            f"triton {kernel}: {programs} programs exceed the largest grid, 2**31 - 1"
        )
    launcher = getattr(_triton_kernels, kernel)[(programs,)]
    if device.type == "cpu":
        import numpy

        with numpy.errstate(all="ignore"):  # NaN and infinity are valid
            launcher(*arguments, **constants)
    else:
        with torch.get_device_module(device).device(device):  # triton launches on the current one
            launcher(*arguments, **constants, **launch_options(blocks, _target().options))


def _stored(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels store for a dtype: Triton's interpreter does not round to bfloat16."""
    return torch.float32 if _INTERPRETED and dtype is torch.bfloat16 else dtype


def _by_value(numbers: Iterable[int]) -> tuple[int, ...]:
    """Host numbers for a kernel, n as 2 n + 3.

    Triton compiles anew for a number that is 1 or divisible by 16; none of these is.
    """
    return tuple(2 * number + 3 for number in numbers)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _ceil(number: int, block: int) -> int:
    return -(-number // block)
