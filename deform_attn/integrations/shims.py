"""Stand-ins for the compiled extensions of older repositories, under the names they import.

Deformable DETR, DINO, Mask2Former, GroundingDINO, detrex and mmcv each compile their own extension
of the operator. With the stand-ins in ``sys.modules``, an unmodified checkout imports and runs
without compiling one. mmcv, GroundingDINO and detrex call theirs for tensors on GPUs alone, and a
function of their own elsewhere; :func:`deform_attn.accelerate` replaces both.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deform_attn.checks import check_choice
from deform_attn.functional import gradients, ms_deform_attn

__all__ = ["MSDeformAttnFunction", "Shims", "install_shims"]


class MSDeformAttnFunction:
    """Replaces ``MSDeformAttnFunction`` and ``MultiScaleDeformableAttnFunction``.

    Not an autograd.Function: the operator that ``apply`` calls is differentiable itself.
    """

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """Call :func:`deform_attn.ms_deform_attn`; ``im2col_step`` is ignored."""
        levels = value_spatial_shapes, value_level_start_index
        return ms_deform_attn(value, *levels, sampling_locations, attention_weights)


def _forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    return ms_deform_attn(value, spatial_shapes, level_start_index, sampling_loc, attn_weight)


def _backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> list[Tensor]:
    inputs = (value, spatial_shapes, level_start_index, sampling_loc, attn_weight)
    return list(gradients(grad_output, *inputs))


def _mmcv_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    levels = value_spatial_shapes, value_level_start_index
    return ms_deform_attn(value, *levels, sampling_locations, attention_weights)


def _mmcv_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    levels = value_spatial_shapes, value_level_start_index
    grads = gradients(grad_output, value, *levels, sampling_locations, attention_weights)
    for output, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads):
        output.copy_(grad)


class _Shim(types.ModuleType):
    """A stand-in for an extension that holds deformable attention alone."""

    def __init__(
        self, name: str, forward: Callable[..., Any], backward: Callable[..., Any]
    ) -> None:
        super().__init__(name, f"deform_attn in place of the extension {name}")
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="deform_attn")
        self.ms_deform_attn_forward = forward
        self.ms_deform_attn_backward = backward
        self.MSDeformAttnFunction = MSDeformAttnFunction
        self.MultiScaleDeformableAttnFunction = MSDeformAttnFunction


class _PartialShim(_Shim):
    """A stand-in for mmcv's extension: operators other than deformable attention raise when called.

    mmcv looks up every operator while it is imported, so the attributes must exist.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(
                f"{self.__name__}.{name}: deform_attn replaces this extension and implements "
                "deformable attention only; install the full package for this operator"
            )

        return missing


_SHIMS: dict[str, Callable[[str], _Shim]] = {
    "MultiScaleDeformableAttention": lambda name: _Shim(name, _forward, _backward),
    "groundingdino._C": lambda name: _Shim(name, _forward, _backward),
    "detrex._C": lambda name: _Shim(name, _forward, _backward),
    "mmcv._ext": lambda name: _PartialShim(name, _mmcv_forward, _mmcv_backward),
}


@dataclass(frozen=True)
class Shims:
    """The result of :func:`install_shims`; leaving a ``with`` block undoes it."""

    installed: tuple[str, ...]
    left: dict[str, str]  # name that was not replaced: reason
    _before: dict[str, types.ModuleType | None] = field(repr=False)

    def remove(self) -> None:
        """Remove the stand-ins from ``sys.modules`` and put back the modules they replaced."""
        for name, module in self._before.items():
            if isinstance(sys.modules.get(name), _Shim):
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module

    def __enter__(self) -> Shims:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __str__(self) -> str:
        lines = [f"{name}: deform_attn" for name in self.installed]
        return "\n".join(lines + [f"{name}: left, {why}" for name, why in self.left.items()])


def install_shims(*names: str, override: bool = False) -> Shims:
    """Register stand-ins for compiled extensions in ``sys.modules``.

    Call it before the repository is imported: names that it has looked up already do not change.

    - ``MultiScaleDeformableAttention``: Deformable DETR, DINO, Mask2Former and most others
    - ``groundingdino._C``: GroundingDINO
    - ``detrex._C``: detrex
    - ``mmcv._ext``: mmcv; its other operators can be imported and raise when called

    Args:
        names: the stand-ins to register; all of them if none is given.
        override: also replace extensions that are installed.

    Returns:
        The names that were registered and those that were not, with reasons. Can be printed; a
        ``with`` block or ``remove()`` undoes the call.

    Raises:
        ValueError: no stand-in has that name.

    Example:
        >>> from deform_attn.integrations import install_shims
        >>> with install_shims("MultiScaleDeformableAttention") as shims:
        ...     import MultiScaleDeformableAttention as MSDA  # as the repository does
        >>> shims.installed
        ('MultiScaleDeformableAttention',)
    """
    for name in names:
        check_choice("names", name, _SHIMS)
    left, before = {}, {}
    for name in names or _SHIMS:
        present = sys.modules.get(name)
        if isinstance(present, _Shim):
            left[name] = "deform_attn is registered already"
        elif not override and (where := _installed_at(name)) is not None:
            left[name] = f"the extension is installed: {where}"
        else:
            before[name] = present
            sys.modules[name] = _SHIMS[name](name)
    return Shims(tuple(before), left, before)


def _installed_at(name: str) -> str | None:
    """The file of an installed extension, found without importing its package; None if absent."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None) or "imported"
    package = name.rpartition(".")[0]
    if not package:
        spec = importlib.util.find_spec(name)
    else:
        outer = sys.modules.get(package) or importlib.util.find_spec(package)
        if outer is None:
            return None
        folders = getattr(outer, "__path__", None) or outer.submodule_search_locations
        spec = importlib.machinery.PathFinder.find_spec(name, folders)
    return None if spec is None else spec.origin or "found"
