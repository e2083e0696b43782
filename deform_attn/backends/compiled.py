"""The compiled kernels: C++ for the CPU, CUDA C++ for GPUs, each a library of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

__all__ = ["build_facts", "load", "why_not"]

_FOLDER = Path(__file__).resolve().parent.parent
_LIBRARIES = {"cpu": _FOLDER / "_C_cpu.abi3.so", "cuda": _FOLDER / "_C_cuda.abi3.so"}
LOWEST_TORCH = (2, 10)


def _load(device_type: str) -> str | None:
    """Load the library of a device; the reason where that cannot be."""
    library = _LIBRARIES[device_type]
    if device_type == "cuda" and torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) was built without CUDA"
    if not library.exists():
        return f"{library.name} was not built: {_why_not_built(device_type)}"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < LOWEST_TORCH:
        lowest = ".".join(map(str, LOWEST_TORCH))
        return f"{library.name} needs PyTorch {lowest} or newer, this is {torch.__version__}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} could not be loaded: {error}"
    return None


def _why_not_built(device_type: str) -> str:
    """What the build recorded beside the libraries."""
    record = _FOLDER / "_libraries.json"
    if not record.exists():
        return "nothing was compiled in this folder yet (pip install . does)"
    reasons: dict[str, str | None] = json.loads(record.read_text(encoding="utf-8"))
    return reasons[device_type] or "it was, but the file is gone; install again"


# Why a device's library is not there, None where it is; tracing ("meta") needs the schema alone.
_REASONS: dict[str, str | None] = {"meta": None}


def load() -> None:
    """Load the libraries, once, when the operators' schemas are defined."""
    for device_type in _LIBRARIES:
        _REASONS[device_type] = _load(device_type)


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels cannot run on a device, or None."""
    try:
        return _REASONS[device_type]
    except KeyError:
        return f"compiled kernels exist for cpu and cuda, not for {device_type}"


def build_facts(device_type: str) -> dict[str, Any] | None:
    """What the library of ``"cpu"`` or ``"cuda"`` was built with; None where it is not loaded."""
    if _REASONS[device_type] is not None:
        return None
    facts: dict[str, Any] = json.loads(getattr(torch.ops.deform_attn, f"{device_type}_build")())
    return facts
