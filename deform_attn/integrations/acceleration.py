"""accelerate(): make a model of another library call this package's operator."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deform_attn.checks import check_module
from deform_attn.integrations.adapters import METER, Core, attend, recognise, synchronize

__all__ = ["Measurement", "Report", "accelerate", "restore"]

Model = TypeVar("Model", bound=nn.Module)

# ------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Measurement:
    """Forward passes of a model before and after :func:`accelerate`; times in seconds."""

    before: tuple[float, ...]  #: each pass of the stock model
    after: tuple[float, ...]  #: each pass of the accelerated model
    operator_before: float  #: time in the operator in one pass of the stock model
    operator_after: float  #: the same in the accelerated model

    @property
    def gain(self) -> float:
        """Median time before over median time after."""
        return statistics.median(self.before) / statistics.median(self.after)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest gain of a pair of passes."""
        gains = [before / after for before, after in zip(self.before, self.after)]
        return min(gains), max(gains)

    @property
    def shares(self) -> tuple[float, float]:
        """The operator's share of a pass, before and after."""
        return (
            self.operator_before / statistics.median(self.before),
            self.operator_after / statistics.median(self.after),
        )

    def __str__(self) -> str:
        before, after = (1e3 * statistics.median(times) for times in (self.before, self.after))
        low, high = self.spread
        shares = " -> ".join(f"{100 * min(share, 1):.1f} %" for share in self.shares)
        return (
            f"forward pass {before:.1f} -> {after:.1f} ms: {self.gain:.2f}x ({low:.2f}-{high:.2f} "
            f"in {len(self.before)} pairs); the operator's share {shares}"
        )


@dataclass(frozen=True)
class Report:
    """What a call replaced, and what it did not and why.

    Places are names of submodules or of Python modules. ``str(report)`` has a line for each place.
    """

    subject: str  #: the model's class, or "transformers" and its version
    replaced: tuple[tuple[str, str], ...]  #: (place, name of the class or function)
    left: tuple[tuple[str, str], ...]  #: deformable attention that was not changed: (place, reason)
    measurement: Measurement | None = field(default=None, compare=False)  #: with ``example``

    def __str__(self) -> str:
        if not self.replaced and not self.left:
            return f"{self.subject}: no deformable attention found"
        lines = [f"{self.subject}: {len(self.replaced)} replaced, {len(self.left)} left"]
        lines += [f"  replaced {place}: {name}" for place, name in self.replaced]
        lines += [f"  left     {place}: {reason}" for place, reason in self.left]
        if self.measurement is not None:
            lines.append(f"  {self.measurement}")
        return "\n".join(lines)


# --------------------------------------------------------------------------------------- one model


def accelerate(model: Model, example: Any = None) -> tuple[Model, Report]:
    """Make a model of another library call this package's kernels, in training and inference.

    Libraries: transformers, mmdet (with mmcv, mmcv-lite or the onedl packages), GroundingDINO,
    D-FINE, DEIM, RT-DETR and RT-DETRv2, ultralytics, rfdetr, LibreYOLO, LightlyTrain, and others
    whose implementation of the operator has one of the signatures in
    :mod:`deform_attn.integrations.adapters`. An implementation is replaced after a probe has shown
    that it computes the same. Projections, softmax and sampling locations remain the model's.

    The model is changed in place; its parameters, state dict and submodule names do not change.
    Copies and pickles of it are accelerated too. Call it again after adding layers: layers that
    are accelerated already do not change. Call it before ``kernels`` or accelerate's hooks replace
    ``forward`` methods.

    ``torch.jit.trace`` and ``torch.onnx.export`` record the library's own implementation, so that
    an exported model is that of the stock model and needs no deform_attn. ``torch.compile`` and
    ``torch.export`` keep the operator as one node.

    Args:
        model: any module that contains deformable attention.
        example: inputs of one forward pass, to measure it before and after: a dict of keyword
            arguments, a tuple of positional arguments, or one argument. The model is run in
            evaluation mode without gradients.

    Returns:
        The model itself and a report. A model without deformable attention is not changed.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> from torch import nn
        >>> import deform_attn
        >>> model, report = deform_attn.accelerate(nn.Linear(3, 3))
        >>> print(report)
        Linear: no deformable attention found
    """
    check_module("model", model)
    subject = type(model).__name__  # before the class of the model itself changes
    replaced: dict[str, str] = {}
    left: dict[str, str] = {}
    for path, module in model.named_modules():
        found = _find(module)
        if isinstance(found, str):
            left[path] = found
        elif found is not None:
            found.apply()
            replaced[path] = found.name
    for path, module in model.named_modules():
        if _is_attention(module) and not any(_within(place, path) for place in replaced | left):
            cls = type(module)
            left[path] = f"{cls.__module__}.{cls.__qualname__} calls no known operator"
            if cls.__module__.startswith("deform_attn."):
                left[path] = "deform_attn's own module"
    return model, Report(
        subject,
        tuple((path or subject, name) for path, name in replaced.items()),
        tuple((path or subject, reason) for path, reason in left.items()),
        None if example is None else _measure(model, example),
    )


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`, in place; a model that is not accelerated does not change.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> from torch import nn
        >>> import deform_attn
        >>> model = deform_attn.restore(deform_attn.accelerate(nn.Linear(3, 3))[0])
    """
    check_module("model", model)
    for module in model.modules():
        if type(module) in _STOCK:
            module.__class__ = _STOCK[type(module)]
        for name, core in list(_replaced_attributes(module)):
            setattr(module, name, core.stock)
    return model


@dataclass(frozen=True)
class _Found:
    name: str
    apply: Callable[[], None]


def _find(module: nn.Module) -> _Found | str | None:
    """How to replace the operator of a module, why not, or None if it has none."""
    cls = type(module)
    if cls in _STOCK or any(True for _ in _replaced_attributes(module)):
        return "accelerated already"
    for name, attribute in vars(module).items():
        found = _find_attribute(module, name, attribute)
        if found is not None:
            return found
    uses = _uses(cls, module)
    if isinstance(uses, str):
        return uses
    if not uses:
        return None
    if any(use.method in vars(module) for use in uses):
        return "the forward of this instance was replaced, by `kernels` or a hook"

    def apply() -> None:
        module.__class__ = _accelerated(cls, uses)

    return _Found(uses[0].core.name, apply)


def _is_attention(module: nn.Module) -> bool:
    """Every deformable attention layer has projections of these names."""
    return all(
        isinstance(getattr(module, name, None), nn.Module)
        for name in ("sampling_offsets", "attention_weights")
    )


def _within(path: str, ancestor: str) -> bool:
    return not ancestor or path == ancestor or path.startswith(f"{ancestor}.")


# -------------------------------------------------------------- the operator as a layer's attribute

_ATTRIBUTE = "ms_deformable_attn_core"  # its usual name


def _find_attribute(module: nn.Module, name: str, attribute: Any) -> _Found | str | None:
    function = attribute.func if isinstance(attribute, functools.partial) else attribute
    core = recognise(function) if isinstance(function, FunctionType) else None
    if core is None or isinstance(core, str):
        if name != _ATTRIBUTE:
            return None
        label = getattr(function, "__name__", type(function).__name__)
        return core or f"its {_ATTRIBUTE} is {label}, which is not known"
    keywords: Mapping[str, Any] = {}
    if isinstance(attribute, functools.partial):
        keywords = attribute.keywords
        if attribute.args or not set(keywords) <= set(core.options):
            return f"its {name} binds other arguments than {', '.join(core.options)}"
    ours = functools.partial(attend, _with_stock(core, attribute), **keywords)
    return _Found(core.name, lambda: setattr(module, name, ours))


def _with_stock(core: Core, stock: Any) -> Core:
    return Core(core.name, stock, core.kind, core.options, core.rows_last, core.discrete)


def _replaced_attributes(module: nn.Module) -> Iterator[tuple[str, Core]]:
    for name, attribute in vars(module).items():
        if isinstance(attribute, functools.partial) and attribute.func is attend:
            yield name, attribute.args[0]


# ------------------------------------------------------------ the operator as a global, or a module


@dataclass(frozen=True)
class _Use:
    """A method that calls the operator by a global name, or a class that is the operator."""

    owner: type[nn.Module]
    method: str
    name: str | None  # of the global; None: the method itself is the operator
    core: Core


def _uses(cls: type[nn.Module], module: nn.Module) -> tuple[_Use, ...] | str | None:
    """The uses of the operator in a class and its bases, or the reason not to replace them."""
    if cls.__module__.startswith(("torch.", "deform_attn.")):
        return None
    core = None if any(True for _ in module.parameters()) else recognise(cls, module)
    if isinstance(core, str):
        return core
    if core is not None:
        owner = next(base for base in cls.__mro__ if "forward" in vars(base))
        return (_Use(owner, "forward", None, core),)
    uses: list[_Use] = []
    for owner in cls.__mro__:
        if owner.__module__.startswith("torch.") or not issubclass(owner, nn.Module):
            continue
        for method, function in vars(owner).items():
            if not isinstance(function, FunctionType) or method == "__init__":
                continue
            inner = _innermost(function)
            for name in sorted(_names_in(inner.__code__)):
                core = recognise(_unpatched(inner.__globals__.get(name)))
                if isinstance(core, str):
                    return core
                if core is not None:
                    if _rebound(function, {}) is None:
                        return f"a decorator hides the {method} that calls {name}"
                    uses.append(_Use(owner, method, name, core))
    # the function that every device can call comes first: it names the layer in the report
    return tuple(sorted(uses, key=lambda use: use.core.kind != "function"))


def _unpatched(thing: Any) -> Any:
    """The library's function where ``patch_transformers()`` has replaced it for now."""
    if isinstance(thing, functools.partial) and thing.func is attend:
        return thing.args[0].stock
    return thing


def _innermost(function: Any) -> Any:
    while isinstance(getattr(function, "__wrapped__", None), FunctionType):
        function = function.__wrapped__
    return function


def _names_in(code: CodeType) -> set[str]:
    """The global names that a function's code and the functions inside it use."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_in(constant)
    return names


_ACCELERATED: dict[tuple[type, tuple[_Use, ...]], type[nn.Module]] = {}
_STOCK: dict[type, type[nn.Module]] = {}  # accelerated class -> class of the library


def _accelerated(cls: type[nn.Module], uses: tuple[_Use, ...]) -> type[nn.Module]:
    """A subclass of ``cls`` whose methods call this package's operator.

    A ``forward`` set on the instance would be lost in pickles and break Dynamo's guards.
    """
    if (cls, uses) in _ACCELERATED:
        return _ACCELERATED[cls, uses]
    bases: list[type] = []
    for owner in cls.__mro__:
        body: dict[str, Any] = {}
        for method in dict.fromkeys(use.method for use in uses if use.owner is owner):
            mine = [use for use in uses if use.owner is owner and use.method == method]
            if mine[0].name is None:
                body[method] = mine[0].core.replacement
            else:
                names = {use.name: use.core.replacement for use in mine}
                body[method] = _rebound(vars(owner)[method], names)
        if body:  # right before the owner in the order of resolution, so that super() works
            bases.append(type(owner)(owner.__name__, (owner,), body | {"__module__": __name__}))
    if all(use.owner is not cls for use in uses):
        bases.insert(0, cls)
    body = {"__reduce_ex__": _reduce, "__module__": __name__, "__doc__": cls.__doc__}
    metaclass: Any = type(cls)
    subclass: type[nn.Module] = metaclass(f"Accelerated{cls.__name__}", tuple(bases), body)
    _ACCELERATED[cls, uses] = subclass
    _STOCK[subclass] = cls
    return subclass


def _rebound(function: Any, names: Mapping[str | None, Any]) -> Any:
    """A copy of a function, with its decorators, and other globals; None if it cannot be made."""
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        scope = {**function.__globals__, **names}
        # Dynamo resolves globals through __name__ and would find the stock function
        scope.pop("__name__", None)
        closure = function.__closure__
    else:
        if not isinstance(inner, FunctionType):
            return None
        rebound = _rebound(inner, names)
        cells = function.__closure__ or ()
        closure = tuple(CellType(rebound) if _holds(cell, inner) else cell for cell in cells)
        if rebound is None or not any(_holds(cell, inner) for cell in cells):
            return None
        scope = function.__globals__
    # Code of its own: Dynamo keeps compiled code by this object, and its names in these globals
    code = function.__code__.replace()
    clone = FunctionType(code, scope, function.__name__, function.__defaults__, closure)
    clone.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(clone, function)
    if inner is not None:
        clone.__wrapped__ = rebound  # type: ignore[attr-defined]
    return clone


def _holds(cell: CellType, thing: Any) -> bool:
    try:
        return cell.cell_contents is thing
    except ValueError:  # empty
        return False


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle by the class of the library; unpickling creates the subclass again."""
    reduced: Any = object.__reduce_ex__(self, protocol)
    return (_new, (_STOCK[type(self)],), *reduced[2:])


def _new(stock: type[nn.Module]) -> nn.Module:
    module = stock.__new__(stock)
    nn.Module.__init__(module)
    uses = _uses(stock, module)
    cls = _accelerated(stock, uses) if isinstance(uses, tuple) and uses else stock
    return cls.__new__(cls)


# -------------------------------------------------------------------------------------- measurement

_SECONDS = 2.0  # of measuring, at most about this for each side


def _measure(model: nn.Module, example: Any) -> Measurement:
    """Time forward passes with the library's implementation and with this package's, in turn."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        kwargs = dict(example)
    elif isinstance(example, (tuple, list)) and not isinstance(example, Tensor):
        args = tuple(example)
    else:
        args = (example,)

    def seconds(stock: bool, metered: bool = False) -> float:
        METER.stock, METER.on, METER.seconds = stock, metered, 0.0
        try:
            synchronize()
            start = METER.clock()
            model(*args, **kwargs)
            synchronize()
            elapsed = METER.clock() - start
        finally:
            METER.stock = METER.on = False
        return METER.seconds if metered else elapsed

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            slowest = max(seconds(stock) for stock in (True, False, True, False))
            repeats = int(min(9, max(3, _SECONDS / slowest)))
            pairs = [(seconds(True), seconds(False)) for _ in range(repeats)]
            operator = [min(seconds(stock, True) for _ in range(2)) for stock in (True, False)]
    finally:
        for module in training:
            module.training = True
    before, after = zip(*pairs)
    return Measurement(before, after, *operator)
