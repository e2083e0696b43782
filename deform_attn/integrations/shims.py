"""Stand-ins for the compiled extensions that older repositories import, under their names.

Deformable DETR, DINO, Mask2Former, GroundingDINO, detrex and mmcv each build the operator as an
extension of their own. With the names below in ``sys.modules``, an unmodified checkout runs without
building anything, on CPUs and GPUs.
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

from deform_attn.functional import gradients, ms_deform_attn

__all__ = ["MSDeformAttnFunction", "Shims", "install_shims"]


class MSDeformAttnFunction:
    """What repositories call ``MSDeformAttnFunction`` or ``MultiScaleDeformableAttnFunction``.

    No autograd.Function of its own: the operator is differentiable, any number of times.
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
        """As :func:`deform_attn.ms_deform_attn`; there is no limit that im2col_step would lift."""
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
    found = gradients(grad_output, value, *levels, sampling_locations, attention_weights)
    for gradient, wanted in zip(found, (grad_value, grad_sampling_loc, grad_attn_weight)):
        wanted.copy_(gradient)


class _Shim(types.ModuleType):
    """A stand-in; ``partial``: for an extension of many operators, of which this is one."""

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
    """mmcv looks all its operators up when it is imported: the others fail when they are called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(
                f"{self.__name__}.{name}: deform_attn stands in for this extension and has "
                "deformable attention alone; install the full package for this operator"
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
    """What :func:`install_shims` did; leaving a ``with`` block undoes it."""

    installed: tuple[str, ...]
    left: dict[str, str]  # a name that was not taken, and why
    _before: dict[str, types.ModuleType | None] = field(repr=False)

    def remove(self) -> None:
        """Take the stand-ins out of ``sys.modules`` again; what was there before comes back."""
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
    """Let repositories that import a compiled extension get this package in its place.

    To be called before the repository is imported: what it looked up before stays as it is.

    - ``MultiScaleDeformableAttention``: Deformable DETR, DINO, Mask2Former and most others
    - ``groundingdino._C``: GroundingDINO
    - ``detrex._C``: detrex
    - ``mmcv._ext``: mmcv; its other operators can be imported and raise when they are called

    Args:
        names: which of them; all where none is named.
        override: take the place of an extension that is really installed, too.

    Returns:
        What was installed and what was left, to be printed, or to be undone by ``with`` or
        ``remove()``.

    Raises:
        ValueError: there is no stand-in of that name.

    Example:
        >>> from deform_attn.integrations import install_shims
        >>> with install_shims("MultiScaleDeformableAttention") as shims:
        ...     import MultiScaleDeformableAttention as MSDA  # what its users do
        >>> shims.installed
        ('MultiScaleDeformableAttention',)
    """
    for name in names:
        if name not in _SHIMS:
            raise ValueError(f"names: expected some of {', '.join(_SHIMS)}, got {name!r}")
    left, before = {}, {}
    for name in names or _SHIMS:
        present = sys.modules.get(name)
        if isinstance(present, _Shim):
            left[name] = "installed before"
        elif not override and (where := _really_installed(name)) is not None:
            left[name] = f"it is really installed: {where}"
        else:
            before[name] = present
            sys.modules[name] = _SHIMS[name](name)
    return Shims(tuple(before), left, before)


def _really_installed(name: str) -> str | None:
    """Where an extension lies, found without importing its package."""
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
