"""Compiles the emulated kernels in every form that a test uses, several at a time.

    python -m tests.simt

A test compiles what is missing, but the other test processes wait meanwhile.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from rich.progress import track

from tests.simt import build, test_emulator, test_two_gpus
from tests.simt.emulated import Emulated


def main() -> int:
    if (why := build.why_not()) is not None:
        print(f"the CUDA kernels cannot be emulated: {why}")
        return 1
    forms: list[Callable[[], Any]] = [
        partial(test_emulator.program, name) for name in test_emulator.SANITIZERS
    ]
    for kernels in (Emulated(), Emulated(atomic_floats=1), Emulated(counting=True)):
        forms.append(partial(getattr, kernels, "module"))
    if not torch.backends.cuda.is_built():
        forms.append(test_two_gpus.library)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = [pool.submit(form) for form in forms]
        for compiled in track(work, "compiling the emulated kernels"):
            compiled.result()
    return 0


if __name__ == "__main__":
    sys.exit(main())
