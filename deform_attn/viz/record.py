"""Records what deformable attention samples while a model runs.

A ``TorchDispatchMode`` sees every call of the package's operators, whichever module or function
made it: this package's modules, accelerated models, or repositories that import a compiled
extension. The operator's schema gives the names of its arguments. Outside a ``record``
block there is no cost, because no code on the way to a kernel is changed.

The operator does not receive everything: reference points and the padding of the images are
arguments of the modules around it. Forward hooks read these by name (``reference_points``,
``valid_ratios``). A module whose ``forward`` takes ``sampling_locations`` and ``attention_weights``
is recorded from its arguments, even if it never calls the operator.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deform_attn.checks import check_module
from deform_attn.composite import unfused
from deform_attn.levels import count_points
from deform_attn.operands import FusedOperands

__all__ = ["Recording", "Recordings", "record"]


@dataclass(frozen=True)
class Recording:
    """What one call of one attention layer sampled. Tensors are float32 copies on the CPU.

    ``K = sum(num_points)`` is the number of points per query and head, ordered by level.

    Attributes:
        layer: name of the attention layer in the recorded module, such as
            ``"decoder.layers.5.cross_attn"``; the class name where the module itself is the layer.
        spatial_shapes: ``(height, width)`` of each level.
        num_points: number of points in each level.
        sampling_locations: ``[batch, queries, num_heads, K, 2]``, ``(x, y)`` as fractions of the
            padded image.
        attention_weights: ``[batch, queries, num_heads, K]``.
        reference_points: ``[batch, queries, num_levels, 2]``, points ``(x, y)``,
            ``[batch, queries, num_levels, 4]``, boxes ``(cx, cy, w, h)``, or
            ``[batch, queries, num_levels, 5]``, rotated boxes ``(cx, cy, w, h, angle)``, as
            fractions of the padded image; None if no module around the operator took
            ``reference_points``.
        valid_ratios: ``[batch, num_levels, 2]``, the fraction ``(x, y)`` of each map that is image
            and not padding; None if no module around the operator took ``valid_ratios``. Encoders
            and decoders take it: record one of them, or a whole model, to have it.
    """

    layer: str
    spatial_shapes: tuple[tuple[int, int], ...]
    num_points: tuple[int, ...]
    sampling_locations: Tensor
    attention_weights: Tensor
    reference_points: Tensor | None
    valid_ratios: Tensor | None


class Recordings(Sequence[Recording]):
    """The recorded calls in order.

    Index by position, or by the name of a layer, or of a module around it, for its last call.
    """

    def __init__(self) -> None:
        self._calls: list[Recording] = []

    @property
    def layers(self) -> list[str]:
        """The layer name of each call, in order."""
        return [call.layer for call in self._calls]

    def __len__(self) -> int:
        return len(self._calls)

    @overload
    def __getitem__(self, key: int | str) -> Recording: ...

    @overload
    def __getitem__(self, key: slice) -> Sequence[Recording]: ...

    def __getitem__(self, key: int | str | slice) -> Recording | Sequence[Recording]:
        if not self._calls:
            raise LookupError("nothing recorded yet: call the module inside the `with` block")
        if not isinstance(key, str):
            return self._calls[key]
        for call in reversed(self._calls):
            if call.layer == key or call.layer.startswith(f"{key}."):
                return call
        raise LookupError(f"layer: expected one of {', '.join(self.layers)}, got {key!r}")


@contextmanager
def record(module: nn.Module) -> Iterator[Recordings]:
    """Record what the deformable attention inside a module samples, while the block runs.

    Outputs and gradients do not change. Compiled modules run eagerly inside the block.

    Args:
        module: an attention layer, or a model that contains any number of them. Recorded are the
            modules and functions of this package, accelerated models, and modules of other
            packages whose ``forward`` takes ``value_spatial_shapes``, ``sampling_locations`` and
            ``attention_weights`` (transformers).

    Yields:
        The calls in order: ``seen[-1]``, ``seen["decoder.layers.5.cross_attn"]``.

    Raises:
        TypeError: no module.
        RuntimeError: the module was not called in the block, or contains no deformable attention.

    Example:
        >>> import torch
        >>> from deform_attn import MSDeformAttn, viz
        >>> layer = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=3)
        >>> query, reference = torch.rand(1, 5, 32), torch.rand(1, 5, 2, 2)
        >>> with viz.record(layer) as seen:
        ...     output = layer(query, reference, torch.rand(1, 60, 32), [(8, 6), (4, 3)])
        >>> seen.layers, seen[-1].sampling_locations.shape
        (['MSDeformAttn'], torch.Size([1, 5, 4, 6, 2]))
    """
    check_module("module", module)
    recorder = _Recorder()
    with ExitStack() as stack:
        for name, child in module.named_modules():
            if child is not module and _NAMES.isdisjoint(_parameters(child.forward)):
                continue
            path = [part for part in name.split(".") if part != "_orig_mod"]  # from torch.compile
            layer = ".".join(path) or type(child).__name__
            enter = child.register_forward_pre_hook(
                partial(recorder.enter, layer), with_kwargs=True
            )
            leave = child.register_forward_hook(recorder.leave, always_call=True)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        if "torch._dynamo" in sys.modules:  # set_stance would import it, which takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(recorder)
        yield recorder.seen
    if not recorder.entered:
        raise RuntimeError(
            f"nothing recorded: {type(module).__name__} was not called inside the `with` block"
        )
    if not recorder.seen:
        raise RuntimeError(
            f"nothing recorded: found no call of deformable attention in {type(module).__name__}. "
            "Functions of other libraries are recorded only after deform_attn.accelerate(model)"
        )


# A module whose arguments have these names takes what the operator takes (transformers' naming).
_OPERANDS = {"value_spatial_shapes", "sampling_locations", "attention_weights"}
# Only modules with one of these arguments get hooks.
_NAMES = {"sampling_locations", "reference_points", "valid_ratios"}


class _Recorder(TorchDispatchMode):
    """Records calls of the operators, with the arguments of the modules around them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Recordings()
        self.entered = False
        # (name, arguments) of the modules that are running, outermost first
        self._stack: list[tuple[str, dict[str, Any]]] = []

    def enter(self, layer: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook."""
        self.entered = True
        self._stack.append((layer, dict(zip(_parameters(module.forward), args)) | kwargs))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook; after an exception it is called with ``output=None``."""
        _, arguments = self._stack[-1]
        if arguments.keys() >= _OPERANDS and output is not None:
            self._add(arguments)
        self._stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.namespace == "deform_attn":
            names = [argument.name for argument in func._schema.arguments]
            self._on_call(dict(zip(names, args)) | kwargs)
        return output

    def _on_call(self, arguments: dict[str, Any]) -> None:
        """Record an operator's call, unless it is a backward pass or ``leave`` will record it."""
        if not self._stack or "grad_output" in arguments:
            return
        if not self._stack[-1][1].keys() >= _OPERANDS:
            self._add(arguments)

    def _add(self, arguments: dict[str, Any]) -> None:
        """Append a recording, from the arguments of the operator or of the module."""
        shapes = _spatial_shapes(arguments)
        num_points = arguments.get("num_points")
        if "sampling_offsets" in arguments:
            operands = unfused(FusedOperands(**arguments))
            locations, weights = operands.sampling_locations, operands.attention_weights
        else:
            locations, weights = arguments["sampling_locations"], arguments["attention_weights"]
        B, Q, M = locations.shape[:3]
        L = len(shapes)
        # the attention layer is the innermost module that takes reference points
        layers = [layer for layer, others in self._stack if "reference_points" in others]
        self.seen._calls.append(
            Recording(
                layer=layers[-1] if layers else self._stack[-1][0],
                spatial_shapes=shapes,
                num_points=tuple(count_points(locations, L, num_points)),
                sampling_locations=_copy(locations).reshape(B, Q, M, -1, 2),
                attention_weights=_copy(weights).reshape(B, Q, M, -1),
                reference_points=self._find("reference_points", arguments, (B, Q), L, (2, 4, 5)),
                valid_ratios=self._find("valid_ratios", arguments, (B,), L, (2,)),
            )
        )

    def _find(
        self,
        name: str,
        arguments: dict[str, Any],
        leading: tuple[int, ...],
        num_levels: int,
        widths: tuple[int, ...],
    ) -> Tensor | None:
        """The innermost argument of that name, if its shape is ``[*leading, num_levels, width]``.

        Searched are the operator's arguments, then those of the modules around it.
        """
        for candidates in (arguments, *(others for _, others in reversed(self._stack))):
            x = candidates.get(name)
            if x is None:  # the layers of deform_attn.detr take it as a part of `memory`
                x = getattr(candidates.get("memory"), name, None)
            if x is None:
                continue
            fits = isinstance(x, Tensor) and x.shape[:-2] == leading and x.shape[-1] in widths
            if fits and x.shape[-2] in (1, num_levels):
                return _copy(x).expand(*leading, num_levels, -1)
            return None
        return None


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except ValueError:  # TorchScript's methods have none
        return []


def _spatial_shapes(arguments: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    level_sizes = arguments.get("level_sizes")  # [height, width, height, width, ...]
    if level_sizes is not None:
        return tuple(zip(level_sizes[::2], level_sizes[1::2]))
    named = "spatial_shapes" if "spatial_shapes" in arguments else "value_spatial_shapes"
    shapes = arguments[named]
    return tuple((int(height), int(width)) for height, width in shapes)


def _copy(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float32, copy=True)
