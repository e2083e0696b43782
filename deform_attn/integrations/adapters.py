"""The adapters: how each library calls its operator, and the same call of this package's.

An implementation of the operator is recognised by its kind and its signature, then by what it
computes (:func:`recognise`): a probe compares it with :func:`deform_attn.ms_deform_attn` on a few
random numbers, which also finds out the layout of its ``value``. Names and versions of libraries
play no part.

=================== ============================================================ ================
kind                signature                                                    found in
=================== ============================================================ ================
a function          ``(value, <shapes>, sampling_locations, attention_weights)``  mmcv, onedl-mmcv,
                    and any of :data:`OPTIONS`. ``value`` is ``[B, S, M, D]``,    GroundingDINO,
                    ``[B, M, D, S]`` or a list of ``[B, M, D, H * W]``,           ultralytics,
                    ``[B * M, D, H * W]`` or ``[B * M, D, H, W]``; locations      rfdetr, LW-DETR,
                    have levels and points apart or joined, and weights too.      RT-DETR, D-FINE,
                    It may return None (a provider slot without a provider).      DEIM, LibreYOLO,
                                                                                  transformers
an autograd         ``(ctx, value, value_spatial_shapes,                          mmcv, detrex,
Function            value_level_start_index, sampling_locations,                  Deformable DETR,
                    attention_weights, im2col_step)``                             Mask2Former, DINO
a module without    ``(self, value, value_spatial_shapes,                         transformers
parameters          value_spatial_shapes_list, level_start_index,
                    sampling_locations, attention_weights, im2col_step)``
=================== ============================================================ ================

To add a library whose function takes one more parameter, add its name to :data:`OPTIONS` and its
meaning to :func:`attend`; for another kind of callable, add a row to :data:`KINDS`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd import forward_ad

from deform_attn.functional import ms_deform_attn

__all__ = ["KINDS", "METER", "OPTIONS", "Core", "attend", "join_levels", "recognise"]

_LOGGER = logging.getLogger("deform_attn")

#: Parameters that a function may have after the four operands, and what they mean.
OPTIONS = {
    "num_points_list": "points in each level",
    "method": "'default' or 'discrete'; other values are left to the library",
    "value_shape": "which form value has; visible from value itself",
    "allow_acceleration": "False: left to the library",
    "value_spatial_shapes_hw": "level sizes as host numbers, or None",
}


@dataclass(frozen=True)
class Core:
    """A library's implementation of the operator."""

    name: str  #: of the function or class
    stock: Any  #: the implementation itself
    kind: str  #: a key of :data:`KINDS`
    options: tuple[str, ...] = ()  #: parameters of a function after the four operands
    rows_last: bool = False  #: a value that is one tensor is ``[B, M, D, S]``, not ``[B, S, M, D]``
    #: whether discrete sampling clamps both coordinates by the height; None: some other sampling
    discrete: bool | None = None

    @property
    def replacement(self) -> Any:
        """What is called in place of ``stock``, in the same way."""
        return KINDS[self.kind].replacement(self)


# ---------------------------------------------------------------------------------------- the calls


class Meter:
    """Times the operator while a model's forward pass is measured; off otherwise."""

    def __init__(self) -> None:
        self.on = False
        self.stock = False  # call the library's implementation
        self.seconds = 0.0
        self.clock = time.perf_counter  # time.process_time where other processes share the CPU

    def timed(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        synchronize()
        start = self.clock()
        output = function(*args, **kwargs)
        synchronize()
        self.seconds += self.clock() - start
        return output


METER = Meter()


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _metered(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        if METER.on:
            return METER.timed(function, *args, **kwargs)
        return function(*args, **kwargs)

    return metered


def _use_stock(core: Core, value: Any) -> bool:
    """Whether the library's own implementation must run.

    It does while ``torch.jit.trace`` or an ONNX exporter records: the graph is then that of the
    stock model. Elsewhere (eager, ``torch.compile``, ``torch.export``) the operator is called.
    """
    if METER.stock:
        return True
    first = value if isinstance(value, Tensor) else value[0]
    if torch.jit.is_tracing() or (  # type: ignore[attr-defined, no-untyped-call]
        type(first) is not Tensor  # the dynamo-based exporter's fake tensors
        and torch.onnx.is_in_onnx_export()
    ):
        _say_once(f"{core.name}: a model is traced or exported; its graph holds the library's code")
        return True
    return False


@functools.cache
def _say_once(message: str) -> None:
    _LOGGER.info(message)


@_metered
def attend(
    core: Core,
    value: Any,
    value_spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *options: Any,
    **named: Any,
) -> Any:
    """Call this package's operator with the operands of a library's function."""
    given = dict(zip(core.options, options))
    given.update(named)
    method = given.get("method", "default")
    if (
        _use_stock(core, value)
        or not (method == "default" or (method == "discrete" and core.discrete is not None))
        or not given.get("allow_acceleration", True)
    ):
        operands = (value, value_spatial_shapes, sampling_locations, attention_weights)
        return core.stock(*operands, *options, **named)
    sizes = given.get("value_spatial_shapes_hw")
    if sizes is None:
        sizes = value_spatial_shapes
    counts = given.get("num_points_list")
    if sampling_locations.dim() == 6:
        counts = None
        if attention_weights.dim() == 4:
            attention_weights = attention_weights.unflatten(3, sampling_locations.shape[3:5])
    elif counts is None:
        counts = [sampling_locations.shape[3] // len(sizes)] * len(sizes)
    if not isinstance(value, Tensor):
        value = join_levels(value, sampling_locations.shape[0], sampling_locations.shape[2])
    elif core.rows_last:
        value = value.permute(0, 3, 1, 2)
    return ms_deform_attn(
        *(value, sizes, None, sampling_locations, attention_weights),
        num_points=counts,
        method=method,
        official_clamp=method == "discrete" and bool(core.discrete),
    )


class _Apply:
    """Replaces an autograd Function: an object with its ``apply``."""

    def __init__(self, core: Core) -> None:
        self.core = core

    def apply(self, *operands: Any) -> Tensor:
        return _apply(self.core, *operands)  # type: ignore[no-any-return]


@_metered
def _apply(
    core: Core,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
) -> Any:
    levels = value_spatial_shapes, value_level_start_index
    # An autograd Function written in Python cannot be saved with a trace; the operator can.
    if METER.stock:
        return core.stock.apply(value, *levels, sampling_locations, attention_weights, im2col_step)
    return ms_deform_attn(value, *levels, sampling_locations, attention_weights)


@_metered
def _forward(
    core: Core,
    module: nn.Module,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: Sequence[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Any:
    if _use_stock(core, value):
        return core.stock(
            *(module, value, value_spatial_shapes, value_spatial_shapes_list, level_start_index),
            *(sampling_locations, attention_weights, im2col_step),
        )
    return ms_deform_attn(
        value, value_spatial_shapes_list, None, sampling_locations, attention_weights
    )


def _method(core: Core) -> Callable[..., Any]:
    @functools.wraps(core.stock)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _forward(core, self, *args, **kwargs)

    return forward


# ------------------------------------------------------------------------------------ lists of maps


def join_levels(maps: Sequence[Tensor], batch: int, num_heads: int) -> Tensor:
    """One value ``[B, S, M, D]`` of a list of maps, one a level.

    Args:
        maps: ``[B, M, D, H * W]``, ``[B * M, D, H * W]`` or ``[B * M, D, H, W]``.
        batch: B.
        num_heads: M.

    Maps that are views of one tensor, as ``split`` makes them, are not copied. Their gradients are
    views of the gradient of the value.
    """
    if maps[0].dim() == 3 or maps[0].shape[:2] != (batch, num_heads):
        maps = [x.flatten(2).unflatten(0, (batch, num_heads)) for x in maps]
    if torch.compiler.is_compiling() or not _are_rows_of_one(maps):
        return torch.cat([x.permute(0, 3, 1, 2) for x in maps], 1)
    if torch.is_grad_enabled() and any(x.requires_grad for x in maps):
        whole: Tensor = _Join.apply(*maps)  # type: ignore[no-untyped-call]
        return whole
    return _joined(maps)


def _are_rows_of_one(maps: Sequence[Tensor]) -> bool:
    """Whether the maps lie in memory as ``split(..., dim=-1)`` of one tensor leaves them."""
    if forward_ad._current_level >= 0 or any(
        type(x) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(x) for x in maps
    ):
        return False
    first = maps[0]
    address = first.data_ptr()
    for x in maps:
        if (
            x.shape[:3] != first.shape[:3]
            or x.stride() != first.stride()
            or x.dtype != first.dtype
            or x.data_ptr() != address
            or x.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return False
        address += x.shape[3] * x.stride(3) * x.element_size()
    return True


def _joined(maps: Sequence[Tensor]) -> Tensor:
    B, M, D, _ = maps[0].shape
    of_batch, of_head, of_channel, of_row = maps[0].stride()
    return maps[0].as_strided(
        (B, sum(x.shape[3] for x in maps), M, D), (of_batch, of_row, of_head, of_channel)
    )


class _Join(torch.autograd.Function):
    """The joined maps as one view.

    A view of the tensor that the maps are views of would save one concatenation in the backward
    pass, but its gradient would reach the layers before it in other strides than the stock
    model's, and BatchNorm2d on CPUs (torch 2.13, evaluation mode) returns wrong gradients for some.
    """

    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        ctx.rows = [x.shape[3] for x in maps]
        return _joined([x.detach() for x in maps])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].permute(0, 2, 3, 1).split(ctx.rows, 3)


# ------------------------------------------------------------------------------------- recognition


def recognise(thing: Any, module: nn.Module | None = None) -> Core | str | None:
    """The adapter of a function or class, the reason why there is none, or None for other things.

    Args:
        thing: a global of a library's code, an attribute of a layer, or the class of a layer.
        module: an instance of ``thing`` where that is a class of modules.
    """
    for name, kind in KINDS.items():
        target = kind.target(thing)
        if target is None:
            continue
        parameters = _parameters(target)
        if kind.fits(parameters):
            options = parameters[len(kind.expected) :]
            stock = thing if kind.replaces_class else target
            return _proven(Core(thing.__name__, stock, name, options), module)
        if kind.resembles(thing, parameters):
            expected = ", ".join(kind.expected)
            return f"{thing.__name__} takes ({', '.join(parameters)}), expected ({expected})"
    return None


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


@dataclass(frozen=True)
class Kind:
    """A kind of callable that holds the operator in some library."""

    target: Callable[[Any], Any]  #: the function whose signature counts; None: not of this kind
    expected: tuple[str, ...]  #: its parameters; those of a function may be followed by OPTIONS
    replacement: Callable[[Core], Any]
    probe: Callable[[Core, nn.Module | None], Core | str]
    replaces_class: bool = False  #: the class itself is replaced, not the function of ``target``

    def fits(self, parameters: tuple[str, ...]) -> bool:
        """Whether the names are those of this kind; the name of the shapes may differ."""
        count = len(self.expected)
        head, options = parameters[:count], parameters[count:]
        return (
            len(head) == count
            and all(_same_name(*names) for names in zip(head, self.expected))
            and set(options) <= OPTIONS.keys()
        )

    def resembles(self, thing: Any, parameters: tuple[str, ...]) -> bool:
        """Whether a signature that does not fit is worth a line in the report."""
        lead = self.expected.index("value") + 1
        return "deform" in thing.__name__.lower() and parameters[:lead] == self.expected[:lead]


def _same_name(one: str, other: str) -> bool:
    return one == other or ("shapes" in one and "shapes" in other)


_PROVEN: weakref.WeakKeyDictionary[Any, Core | str] = weakref.WeakKeyDictionary()


def _proven(core: Core, module: nn.Module | None) -> Core | str:
    """The result of the probe of a core; a function is probed once."""
    if core.stock not in _PROVEN:
        with contextlib.ExitStack() as stack:  # numbers, whatever mode the caller is in
            stack.enter_context(unset_fake_temporarily())
            stack.enter_context(torch.device("cpu"))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast("cpu", enabled=False))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            _PROVEN[core.stock] = KINDS[core.kind].probe(core, module)
    return _PROVEN[core.stock]


class _Sample:
    """Operands of a small call, in float64; every size differs from the others."""

    shapes = ((2, 5), (1, 3))  # wide: the official discrete sampling fails on tall maps
    starts = (0, 10)
    B, S, M, D, Q = 2, 13, 3, 4, 6

    def __init__(self, num_points: Sequence[int] | None) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        points = (2, 2) if num_points is None else (sum(num_points),)

        def random(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        self.num_points = num_points
        self.value = random(self.B, self.S, self.M, self.D) - 0.5
        self.locations = 1.4 * random(self.B, self.Q, self.M, *points, 2) - 0.2
        self.weights = random(self.B, self.Q, self.M, *points)

    def expected(self, **options: Any) -> Tensor:
        operands = (self.value, self.shapes, None, self.locations, self.weights)
        return ms_deform_attn(*operands, num_points=self.num_points, backend="reference", **options)

    def values(self) -> dict[str, Any]:
        """The forms that libraries have ``value`` in."""
        rows_last = self.value.permute(0, 2, 3, 1)
        maps = rows_last.split([height * width for height, width in self.shapes], 3)
        folded = [x.flatten(0, 1) for x in maps]
        return {
            "[B, S, M, D]": self.value,
            "[B, M, D, S]": rows_last.contiguous(),
            "list of [B, M, D, H * W]": maps,
            "list of [B * M, D, H * W]": folded,
            "list of [B * M, D, H, W]": [
                x.unflatten(2, size) for x, size in zip(folded, self.shapes)
            ],
        }


def _agrees(found: Any, expected: Tensor) -> bool:
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found.to(expected.dtype), expected, rtol=1e-4, atol=1e-5)
    )


def _probe_function(core: Core, module: nn.Module | None) -> Core | str:
    if "num_points_list" in core.options:
        samples, named = [_Sample([2, 1])], {"num_points_list": [2, 1]}
    else:
        samples, named = [_Sample(None), _Sample([2, 2])], {}
    accepted: list[tuple[str, Callable[..., Any], _Sample]] = []
    raised, differs, empty = "", False, False
    for sample in samples:
        for form, value in sample.values().items():
            for shapes in (list(sample.shapes), torch.tensor(sample.shapes)):
                operands = (value, shapes, sample.locations, sample.weights)
                call = functools.partial(core.stock, *operands, **named)
                try:
                    found = call()
                except Exception as error:
                    raised = f"it raised {type(error).__name__}: {error}"
                    continue
                empty, differs = empty or found is None, differs or found is not None
                if _agrees(found, sample.expected()):
                    accepted.append((form, call, sample))
    if not accepted:
        if empty:  # a slot without a provider
            return core
        fault = "its results differ" if differs else raised
        return f"{core.name} does not compute deformable attention on a probe: {fault}"
    discrete = None
    if "method" in core.options:
        _, again, sample = accepted[0]
        for clamp in (True, False):
            with contextlib.suppress(Exception):
                expected = sample.expected(method="discrete", official_clamp=clamp)
                if _agrees(again(method="discrete"), expected):
                    discrete = clamp
    rows_last = any(form == "[B, M, D, S]" for form, *_ in accepted)
    return replace(core, rows_last=rows_last, discrete=discrete)


def _probe_module(core: Core, module: nn.Module | None) -> Core | str:
    sample = _Sample(None)
    try:
        found = core.stock(
            *(module, sample.value, torch.tensor(sample.shapes), list(sample.shapes)),
            *(torch.tensor(sample.starts), sample.locations, sample.weights, 64),
        )
    except Exception as raised:
        return f"{core.name} raised on a probe: {type(raised).__name__}: {raised}"
    if not _agrees(found, sample.expected()):
        return f"{core.name} does not compute deformable attention on a probe"
    return core


def _function(thing: Any) -> Any:
    return thing if isinstance(thing, FunctionType) else None


def _forward_of(base: type) -> Callable[[Any], Any]:
    def forward(thing: Any) -> Any:
        is_one = isinstance(thing, type) and issubclass(thing, base) and thing is not base
        return getattr(thing, "forward", None) if is_one else None

    return forward


_OPERANDS = ("sampling_locations", "attention_weights")
_FUNCTION = ("ctx", "value", "value_spatial_shapes", "value_level_start_index")
_MODULE = ("self", "value", "value_spatial_shapes", "value_spatial_shapes_list")
_START = "level_start_index"

#: The kinds of callables that libraries have the operator in.
KINDS = {
    "function": Kind(
        _function,
        ("value", "value_spatial_shapes", *_OPERANDS),
        lambda core: functools.partial(attend, core),
        _probe_function,
    ),
    "autograd Function": Kind(
        _forward_of(torch.autograd.Function),
        (*_FUNCTION, *_OPERANDS, "im2col_step"),
        _Apply,
        lambda core, module: core,  # no probe: it needs a GPU
        replaces_class=True,
    ),
    "module": Kind(
        _forward_of(nn.Module),
        (*_MODULE, _START, *_OPERANDS, "im2col_step"),
        _method,
        _probe_module,
    ),
}
