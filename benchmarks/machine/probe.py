"""Measures the machine itself, with probe.cpp."""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import tempfile
from functools import cache
from pathlib import Path


@cache
def functions() -> ctypes.CDLL:
    """The functions of probe.cpp, compiled for this processor; RuntimeError without a compiler."""
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("the probe needs a C++ compiler: c++, g++ or clang++ on PATH")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "probe.so"
        source = Path(__file__).with_name("probe.cpp")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    for name in ("multiply_add", "stream", "gather", "handover"):
        getattr(loaded, name).restype = ctypes.c_double
    return loaded


def _compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def handover(rounds: int = 2000) -> float | None:
    """Nanoseconds until a cache line given to another core is back: the median of five attempts.
    None without a compiler.

    Some 50 where the cores share their last cache, several hundred where they do not. A virtual
    machine's cores may do either, from one second to the next.
    """
    if _compiler() is None:
        return None
    call = functions().handover
    return statistics.median(call(ctypes.c_int64(rounds)) / rounds * 1e9 for _ in range(5))
