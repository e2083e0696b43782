"""The backends in order of preference, and how one is chosen."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from deform_attn import operator
from deform_attn.backends import compiled, reference, triton_launcher
from deform_attn.console import without_traceback

__all__ = ["BACKENDS", "Backend", "choose_backend", "use_backend"]

logger = logging.getLogger("deform_attn")


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    Attributes:
        name: its name for ``backend=``, ``use_backend`` and ``DEFORM_ATTN_BACKEND``.
        why_not: ``(device_type, dtype)`` to the reason why it cannot run there; None if it can.
        call: ``ms_deform_attn``, differentiable; takes the fields of ``Operands`` by position.
        backward: its backward operator, for callers with an autograd of their own.
        call_fused: ``ms_deform_attn_fused``; None if the backend has no kernel for it, and
            locations and weights are computed first.
    """

    name: str
    why_not: Callable[[str, torch.dtype], str | None]
    call: operator.Operator
    backward: Callable[..., Any]
    call_fused: operator.Operator | None = None


def _define_backends() -> dict[str, Backend]:
    attention, fused = "ms_deform_attn", "ms_deform_attn_fused"
    backends = {}
    for name, module, suffix, has_fused in (
        ("compiled", compiled, "", True),
        ("triton", triton_launcher, "_triton", True),
        ("reference", reference, "_reference", False),
    ):
        calls = operator.define(attention + suffix, operator.ATTENTION)
        call_fused = None
        if has_fused:
            call_fused, _ = operator.define(fused + suffix, operator.FUSED)
        backends[name] = Backend(name, module.why_not, *calls, call_fused)
    for device in ("cpu", "cuda"):
        operator.LIBRARY.define(f"{device}_build() -> str")
    # after the schemas: loading a library registers its kernels (csrc/*/ops.*)
    compiled.load()
    kernels: list[tuple[str, Any, str, str]] = [
        (f"{attention}_reference", reference, "CompositeExplicitAutograd", "")
    ]
    for key in ("CUDA", "XPU", "CPU"):  # the CPU's are interpreted, for tests
        kernels.append((f"{attention}_triton", triton_launcher, key, ""))
        kernels.append((f"{fused}_triton", triton_launcher, key, "fused_"))
    for name, module, key, prefix in kernels:
        operator.LIBRARY.impl(name, getattr(module, f"{prefix}forward"), key)
        operator.LIBRARY.impl(f"{name}_backward", getattr(module, f"{prefix}backward"), key)
    return backends


BACKENDS = _define_backends()

_forced: str | None = None
_announced: set[str] = set()


def _check_name(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")


if os.environ.get("DEFORM_ATTN_BACKEND"):
    _forced = os.environ["DEFORM_ATTN_BACKEND"]
    with without_traceback():
        _check_name(_forced, "DEFORM_ATTN_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend for all calls of this process inside a ``with`` block.

    Args:
        name: ``"compiled"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: for any other name. A backend that cannot run raises RuntimeError at the call.

    Example:
        >>> import deform_attn
        >>> with deform_attn.use_backend("reference"):
        ...     pass
    """
    global _forced
    _check_name(name, "backend")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose_backend(
    device_type: str, dtype: torch.dtype = torch.float32, backend: str | None = None
) -> Backend:
    """The backend for a device: the forced one, else the first that can run.

    Args:
        device_type: ``"cpu"``, ``"cuda"``, ...
        dtype: dtype of value.
        backend: force this one; None: the one of ``use_backend`` or ``DEFORM_ATTN_BACKEND``, if
            set.

    Raises:
        TypeError: ``device_type`` is no name.
        ValueError: no backend has that name.
        RuntimeError: the forced backend cannot run; the message says why.

    Example:
        >>> import deform_attn
        >>> deform_attn.choose_backend("cpu", backend="reference").name
        'reference'
    """
    name = backend or _forced
    if name is not None:
        _check_name(name, "backend")
        candidate = BACKENDS[name]
        reason = candidate.why_not(device_type, dtype)
        if reason is not None:
            raise RuntimeError(
                f"backend {name!r} was requested but cannot run on {device_type} with {dtype}: "
                f"{reason}. `python -m deform_attn.info` shows every backend."
            )
        return candidate
    reasons = []
    for candidate in BACKENDS.values():
        reason = candidate.why_not(device_type, dtype)
        if reason is None:
            break
        reasons.append(f"{candidate.name}: {reason}")
    if reasons and not torch.compiler.is_compiling():
        if not isinstance(device_type, str):
            raise TypeError(
                f"device_type: expected a name such as 'cpu', got {device_type!r}; pass device.type"
            )
        _announce(candidate.name, device_type, reasons)
    return candidate


@contextmanager
def unannounced() -> Iterator[None]:
    """Log no fallback inside a ``with`` block: for reports, which list the reasons themselves."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _announce(name: str, device_type: str, reasons: list[str]) -> None:
    """Log once that a slower backend is used on a device, and why."""
    message = f"using the {name} backend on {device_type} ({'; '.join(reasons)})"
    if message not in _announced:
        _announced.add(message)
        logger.warning(message)
