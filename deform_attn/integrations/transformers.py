"""Models of Hugging Face transformers: one model, all models in a block, or through `kernels`.

transformers has three copies of the operator, each used by several models: a module without
parameters (Deformable DETR, RT-DETR, LW-DETR, RF-DETR, Grounding DINO, OmDet-Turbo, PP-DocLayout),
a function with a list of points per level (RT-DETRv2; D-FINE and DEIMv2 keep it as an attribute),
and a function without one (Mask2Former, OneFormer). They are recognised by name and signature, not
by the model's type. Deformable attention that is not recognised is reported and not changed.

Only the operator is replaced. Projections, softmax and locations remain those of the model, which
returns the attention weights.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn

from deform_attn.functional import ms_deform_attn
from deform_attn.levels import Levels

__all__ = [
    "MODEL_TYPES",
    "Report",
    "accelerate",
    "patch_transformers",
    "register_kernels",
    "restore",
]

#: Model types of transformers that have the operator.
MODEL_TYPES = (
    *("d_fine", "deformable_detr", "deimv2", "grounding_dino", "lw_detr", "mask2former"),
    *("mm_grounding_dino", "omdet_turbo", "oneformer", "pp_doclayout_v2", "pp_doclayout_v3"),
    *("pp_doclayout_v4", "rf_detr", "rt_detr", "rt_detr_v2"),
)

Model = TypeVar("Model", bound=nn.Module)

# ------------------------------------------------------------------------------- replacements


class MultiScaleDeformableAttention(nn.Module):
    """Replaces transformers' module of that name, which has no parameters.

    `kernels` requires that it has neither ``__init__`` nor state.
    """

    has_backward = True
    can_torch_compile = True

    # The same signature as in transformers: `kernels` compares them.
    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Call :func:`deform_attn.ms_deform_attn` with the level sizes as host numbers.

        ``level_start_index`` follows from the levels and ``im2col_step`` is not needed.
        """
        return ms_deform_attn(
            value, value_spatial_shapes_list, None, sampling_locations, attention_weights
        )


def multi_scale_deformable_attention(
    value: Tensor,
    value_spatial_shapes: Levels,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Replaces the function of that name."""
    return ms_deform_attn(value, value_spatial_shapes, None, sampling_locations, attention_weights)


def multi_scale_deformable_attention_v2(
    value: Tensor,
    value_spatial_shapes: Levels,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: list[int],
    method: str = "default",
) -> Tensor:
    """Replaces the function of that name."""
    return ms_deform_attn(
        value,
        value_spatial_shapes,
        None,
        sampling_locations,
        attention_weights,
        num_points=num_points_list,
        method=method,
    )


_LAYER = MultiScaleDeformableAttention.__name__
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "multi_scale_deformable_attention": multi_scale_deformable_attention,
    "multi_scale_deformable_attention_v2": multi_scale_deformable_attention_v2,
}
_ATTRIBUTE = "ms_deformable_attn_core"


def _misfit(stock: Callable[..., Any], ours: Callable[..., Any]) -> str | None:
    """Why the signatures differ, or None."""
    theirs, expected = (list(inspect.signature(f).parameters) for f in (stock, ours))
    if theirs == expected:
        return None
    return f"it takes ({', '.join(theirs)}), expected ({', '.join(expected)})"


# ------------------------------------------------------------------------------------------ report


@dataclass(frozen=True)
class Report:
    """What a call replaced, and what it did not and why.

    Places are names of submodules or of Python modules. ``str(report)`` has a line for each place.
    """

    subject: str  #: the model's class, or "transformers" and its version
    replaced: tuple[tuple[str, str], ...]  #: (place, name of the class or function)
    left: tuple[tuple[str, str], ...]  #: deformable attention that was not changed: (place, reason)

    def __str__(self) -> str:
        if not self.replaced and not self.left:
            return f"{self.subject}: no deformable attention found"
        lines = [f"{self.subject}: {len(self.replaced)} replaced, {len(self.left)} left"]
        lines += [f"  replaced {place}: {name}" for place, name in self.replaced]
        lines += [f"  left     {place}: {reason}" for place, reason in self.left]
        return "\n".join(lines)


# --------------------------------------------------------------------------------------- one model


def accelerate(model: Model) -> tuple[Model, Report]:
    """Make a model of transformers call this package's kernels, in training and inference.

    The model is changed in place; its parameters, state dict and submodule names do not change.
    Copies and pickles of it are accelerated too. Call it again after adding layers: layers that
    are accelerated already do not change. Call it before ``kernels`` or accelerate's hooks replace
    ``forward`` methods.

    Args:
        model: any module; usually a model of transformers, or one that contains such a model.

    Returns:
        The model itself and a report. A model without deformable attention is not changed.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> from torch import nn
        >>> from deform_attn.integrations.transformers import accelerate
        >>> model, report = accelerate(nn.Linear(3, 3))
        >>> print(report)
        Linear: no deformable attention found
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
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
    subject = type(model).__name__
    return model, Report(
        subject,
        tuple((path or subject, name) for path, name in replaced.items()),
        tuple((path or subject, reason) for path, reason in left.items()),
    )


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`, in place; a model that is not accelerated does not change.

    Example:
        >>> from torch import nn
        >>> from deform_attn.integrations.transformers import accelerate, restore
        >>> model = restore(accelerate(nn.Linear(3, 3))[0])
    """
    for module in model.modules():
        if type(module) in _STOCK:
            module.__class__ = _STOCK[type(module)][0]
        elif vars(module).get(_ATTRIBUTE) in _FUNCTIONS.values():
            stock = vars(sys.modules[type(module).__module__])
            setattr(module, _ATTRIBUTE, stock[vars(module)[_ATTRIBUTE].__name__])
    return model


@dataclass(frozen=True)
class _Found:
    name: str
    apply: Callable[[], None]


def _find(module: nn.Module) -> _Found | str | None:
    """How to replace the operator of a module, why not, or None if it has none."""
    cls = type(module)
    core = vars(module).get(_ATTRIBUTE)
    if cls in _STOCK or (core is not None and core in _FUNCTIONS.values()):
        return "accelerated already"
    if core is not None:
        name = getattr(core, "__name__", type(core).__name__)
        if name not in _FUNCTIONS:
            return f"its {_ATTRIBUTE} is {name}, which is not known"
        ours = _FUNCTIONS[name]
        return _misfit(core, ours) or _Found(name, lambda: setattr(module, _ATTRIBUTE, ours))
    if cls.__name__ == _LAYER and cls.__module__.startswith("transformers."):
        name, reason = _LAYER, _misfit(cls.forward, MultiScaleDeformableAttention.forward)
    else:
        forward: Any = inspect.unwrap(cls.forward)
        called = [name for name in _FUNCTIONS if _calls(forward, name)]
        if not called:
            return None
        name = called[0]
        reason = _misfit(forward.__globals__[name], _FUNCTIONS[name])
        if forward is not cls.forward:
            reason = f"a decorator hides the forward that calls {name}"
    if "forward" in vars(module):
        reason = "the forward of this instance was replaced, by `kernels` or a hook"
    if reason is not None:
        return reason

    def swap() -> None:
        module.__class__ = _accelerated(cls, name)

    return _Found(name, swap)


def _calls(function: Any, name: str) -> bool:
    """Whether a function's code uses the global function of that name."""
    return name in _names_in(function) and isinstance(function.__globals__.get(name), FunctionType)


def _names_in(function: Any) -> tuple[str, ...]:
    return function.__code__.co_names if isinstance(function, FunctionType) else ()


# Subclass that calls this package -> (class of transformers, name of the operator it calls).
_STOCK: dict[type[nn.Module], tuple[type[nn.Module], str]] = {}


def _accelerated(stock: type[nn.Module], name: str) -> type[nn.Module]:
    """A subclass of ``stock`` that calls this package's operator.

    A ``forward`` set on the instance would be lost in pickles and break Dynamo's guards.
    """
    for subclass, known in _STOCK.items():
        if known == (stock, name):
            return subclass
    ours = MultiScaleDeformableAttention.forward
    body = {
        "forward": ours if name == _LAYER else _rebound(stock.forward, name),
        "__reduce_ex__": _reduce,
        "__module__": __name__,
    }
    subclass = type(f"Accelerated{stock.__name__}", (stock,), body)
    _STOCK[subclass] = (stock, name)
    return subclass


def _rebound(function: Any, name: str) -> Any:
    """The same code, calling this package's function of that name."""
    names = {**function.__globals__, name: _FUNCTIONS[name]}
    # Dynamo resolves globals through __name__ and would find the stock function
    names.pop("__name__")
    clone = FunctionType(
        *(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    )
    clone.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(clone, function)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle by the class of transformers; unpickling creates the subclass again."""
    reduced: Any = object.__reduce_ex__(self, protocol)
    return (_new, _STOCK[type(self)], *reduced[2:])


def _new(stock: type[nn.Module], name: str) -> nn.Module:
    subclass = _accelerated(stock, name)
    return subclass.__new__(subclass)


def _is_attention(module: nn.Module) -> bool:
    """Every deformable attention layer has projections of these names."""
    return all(
        isinstance(getattr(module, name, None), nn.Module)
        for name in ("sampling_offsets", "attention_weights")
    )


def _within(path: str, ancestor: str) -> bool:
    return not ancestor or path == ancestor or path.startswith(f"{ancestor}.")


# --------------------------------------------------------------------------- all models, in a block


@contextmanager
def patch_transformers() -> Iterator[Report]:
    """Make every model of transformers call this package's kernels inside a ``with`` block.

    This includes models that exist already; everything is undone at the end. Yields a report of the
    classes and functions replaced. Imports the modules of the models, which takes some seconds.

    Raises:
        ImportError: transformers is not installed.

    Example:
        >>> from deform_attn.integrations.transformers import patch_transformers
        >>> with patch_transformers() as report:  # doctest: +SKIP
        ...     print(report)
    """
    version = importlib.import_module("transformers").__version__
    replaced: list[tuple[str, str]] = []
    left: list[tuple[str, str]] = []
    with ExitStack() as stack:
        for model_type in MODEL_TYPES:
            path = f"transformers.models.{model_type}.modeling_{model_type}"
            try:
                module = importlib.import_module(path)
            except ModuleNotFoundError as error:
                left.append((path, f"not in transformers {version} ({error})"))
                continue
            for target, attribute, ours, reason in _patches(module):
                if reason is not None:
                    left.append((path, f"{attribute}: {reason}"))
                    continue
                stack.enter_context(_set(target, attribute, ours))
                name = attribute if target is module else f"{target.__name__}.{attribute}"
                replaced.append((path, name))
        yield Report(f"transformers {version}", tuple(replaced), tuple(left))


@contextmanager
def _set(target: Any, attribute: str, value: Any) -> Iterator[None]:
    """Set an attribute of a class or a module until the block ends."""
    missing = object()
    before = vars(target).get(attribute, missing)
    setattr(target, attribute, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(target, attribute)
        else:
            setattr(target, attribute, before)


def _patches(module: ModuleType) -> Iterator[tuple[Any, str, Any, str | None]]:
    """(target, attribute, replacement, reason not to) for a modeling module."""
    names = vars(module)
    classes = [
        thing
        for thing in names.values()
        if isinstance(thing, type) and thing.__module__ == module.__name__
    ]
    holders = [cls for cls in classes if _ATTRIBUTE in _names_in(vars(cls).get("__init__"))]
    for name, ours in _FUNCTIONS.items():
        if name not in names:
            continue
        reason = _misfit(names[name], ours)
        for cls in holders:  # so that models built inside the block store the stock function
            yield cls, _ATTRIBUTE, property(_core, _keep_core), reason
        if not holders:
            yield module, name, ours, reason
    for cls in classes:
        if cls.__name__ == _LAYER:
            forward = MultiScaleDeformableAttention.forward
            yield cls, "forward", forward, _misfit(vars(cls)["forward"], forward)


def _core(self: nn.Module) -> Callable[..., Tensor]:
    """A property of the class, which takes precedence over the attribute of existing instances."""
    kept: Callable[..., Tensor] = vars(self)[_ATTRIBUTE]
    return _FUNCTIONS.get(getattr(kept, "__name__", ""), kept)


def _keep_core(self: nn.Module, value: Any) -> None:
    vars(self)[_ATTRIBUTE] = value


# ----------------------------------------------------------------------------------------- kernels


class _Repository:
    """A repository as `kernels` expects it: it returns the layer's class."""

    layer_name = _LAYER

    def load(self) -> type[nn.Module]:
        return MultiScaleDeformableAttention

    def __str__(self) -> str:
        return f"deform_attn, layer {_LAYER}"


_REPOSITORY = _Repository()


def register_kernels() -> None:
    """Make ``from_pretrained(..., use_kernels=True)`` use this package's kernels, on CPU and CUDA.

    This works for models whose operator is a module (see above); in the others ``kernels`` has
    nothing to replace: use :func:`accelerate`. On CUDA this registration takes precedence over the
    Hub's, because it names a range of devices.

    Raises:
        ImportError: ``kernels`` or transformers is not installed, or transformers does not support
            the installed version of ``kernels``.

    Example:
        >>> from deform_attn.integrations.transformers import register_kernels
        >>> register_kernels()  # doctest: +SKIP
    """
    try:
        kernels: Any = importlib.import_module("kernels")
    except ModuleNotFoundError as error:
        raise ImportError(f"register_kernels: `kernels` is not installed ({error})") from None
    utils: Any = importlib.import_module("transformers.utils.import_utils")
    if not utils.is_kernels_available():
        lowest, end = (getattr(utils, f"KERNELS_{bound}_VERSION", "?") for bound in ("MIN", "MAX"))
        raise ImportError(
            f"register_kernels: this transformers needs kernels >= {lowest}, < {end}, got "
            f"{kernels.__version__}; install such a version, or use accelerate(), which needs none"
        )
    every_gpu = kernels.CUDAProperties(min_capability=0, max_capability=10**6)
    devices = (kernels.Device("cpu"), kernels.Device("cuda", properties=every_gpu))
    kernels.register_kernel_mapping({_LAYER: dict.fromkeys(devices, _REPOSITORY)})
