"""The compiled kernels: C++ for the CPU, CUDA C++ for GPUs, each a library of its own."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["build_facts", "load", "why_not"]

_FOLDER = Path(__file__).resolve().parent.parent
_RECORD = _FOLDER / "_libraries.json"  # written by the build: files, reasons, the lowest torch
_DEVICES = ("cpu", "cuda")


def _load(device_type: str) -> str | None:
    """Load the library of a device; returns the reason where that fails."""
    if device_type == "cuda" and torch.version.cuda is None:
        built = "for ROCm" if torch.version.hip else "without CUDA"
        return f"this PyTorch ({torch.__version__}) was built {built}"
    if not _RECORD.exists():
        return (
            "nothing was compiled in this clone (python setup.py build_ext --inplace does; an "
            "installed deform_attn is used when Python is started in another folder)"
        )
    record: dict[str, Any] = json.loads(_RECORD.read_text(encoding="utf-8"))
    if "libraries" not in record:  # an editable install of an earlier revision
        return f"{_RECORD.name} is of an older deform_attn: compile again (pip install -e .)"
    built = record["libraries"][device_type]
    if "missing" in built:
        return f"the {device_type} library was not built: {built['missing']}"
    library, lowest = _FOLDER / built["file"], record["lowest_torch"]
    if not library.exists():
        return (
            f"{library.name} was built, but is no longer in {_FOLDER}: install deform_attn again "
            "(pip install --force-reinstall --no-deps)"
        )
    if [int(part) for part in torch.__version__.split(".")[:2]] < lowest:
        needed = ".".join(map(str, lowest))
        return (
            f"{library.name} needs PyTorch {needed} or newer, this is {torch.__version__}: "
            f"pip install --upgrade 'torch>={needed}'"
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} could not be loaded: {error.__cause__ or error}"
    return _why_not_driver(library.name) if device_type == "cuda" else None


def _why_not_driver(library: str) -> str | None:
    """The runtime inside the library needs a driver of its major CUDA version or a later one."""
    built = str(json.loads(torch.ops.deform_attn.cuda_build())["nvcc"])
    driver = _driver_version()
    if driver is None or driver // 1000 >= int(built.split(".")[0]):
        return None
    return (
        f"{library} was built with CUDA {built} and needs a driver of CUDA "
        f"{built.split('.')[0]}.0 or newer, this one is of CUDA {driver // 1000}."
        f"{driver % 1000 // 10}: update the driver, or compile deform_attn here with the CUDA "
        "toolkit of this PyTorch (pip install --no-build-isolation --no-binary=deform_attn "
        "deform_attn)"
    )


def _driver_version() -> int | None:
    """Such as 12080 for CUDA 12.8; None without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


# Why a device's library is not there, None where it is; tracing ("meta") needs the schema alone.
_REASONS: dict[str, str | None] = {"meta": None}


def load() -> None:
    """Load the libraries, once, when the operators' schemas are defined."""
    for device_type in _DEVICES:
        _REASONS[device_type] = _load(device_type)


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels cannot run on a device, or None; they exist for every dtype."""
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
