"""Models of Hugging Face transformers: one model, all models in a block, or through `kernels`.

transformers has three copies of the operator, each used by several models: a module without
parameters (Deformable DETR, RT-DETR, LW-DETR, RF-DETR, Grounding DINO, OmDet-Turbo, PP-DocLayout),
a function with a list of points per level (RT-DETRv2; D-FINE and DEIMv2 keep it as an attribute),
and a function without one (Mask2Former, OneFormer). ``accelerate`` here is
:func:`deform_attn.accelerate`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from deform_attn.extras import needs, needs_packages
from deform_attn.functional import ms_deform_attn
from deform_attn.integrations.acceleration import Report, accelerate, restore
from deform_attn.integrations.adapters import Core, recognise

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

_LAYER = "MultiScaleDeformableAttention"
_ATTRIBUTE = "ms_deformable_attn_core"


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
    with needs("backbones"):
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
    things = [
        thing
        for thing in vars(module).values()
        if getattr(thing, "__module__", None) == module.__name__
    ]
    classes = [thing for thing in things if isinstance(thing, type)]
    for function in [thing for thing in things if isinstance(thing, FunctionType)]:
        core = recognise(function)
        if core is None:
            continue
        if isinstance(core, str):
            yield module, function.__name__, None, core
            continue
        holders = [cls for cls in classes if _stores(cls, function.__name__)]
        for cls in holders:
            yield cls, _ATTRIBUTE, _held(core), None
        if not holders:
            yield module, function.__name__, core.replacement, None
    for cls in classes:
        if cls.__name__ == _LAYER:
            core = recognise(cls, cls())
            reason = core if isinstance(core, str) else None
            yield cls, "forward", getattr(core, "replacement", None), reason


def _stores(cls: type, name: str) -> bool:
    """Whether instances store the function: then patching the module would miss them."""
    constructor = vars(cls).get("__init__")
    if not isinstance(constructor, FunctionType):
        return False
    return {_ATTRIBUTE, name} <= set(constructor.__code__.co_names)


def _held(core: Core) -> property:
    """A property of the class, which takes precedence over the attribute of existing instances."""
    ours = core.replacement

    def stored(self: nn.Module) -> Any:
        attribute = vars(self)[_ATTRIBUTE]
        return ours if attribute is core.stock else attribute

    def store(self: nn.Module, value: Any) -> None:
        vars(self)[_ATTRIBUTE] = value

    return property(stored, store)


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
    with needs_packages("kernels"):
        kernels: Any = importlib.import_module("kernels")
    with needs("backbones"):
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
