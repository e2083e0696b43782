"""Calls the operators on two emulated GPUs; a program, for the GPUs must be there before torch is.

    python -m tests.simt.two_gpus LIBRARY

Prints a line for each call that ran where its tensors are; the first that did not ends it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    _torch = importlib.util.find_spec("torch")
    assert _torch is not None
    assert _torch.origin is not None
    for _name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(Path(_torch.origin).parent / "lib" / _name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(sys.argv[1])

import torch
from torch import Tensor

import deform_attn  # noqa: F401 - defines the operators
from deform_attn.testing import CASES, DTYPES, OpInputs, check_results, grad_output_for

GPUS = torch.ops.two_gpus
OPS = torch.ops.deform_attn


def placed(thing: Any, device: int) -> Any:
    return GPUS.on(thing, device) if isinstance(thing, Tensor) else thing


def differentiated(op: Any, device: int, tensors: list[Any], grad: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of an operator on that GPU, brought to the CPU.

    Where another GPU is current, sizes and starts of levels stay with the host.
    """
    own = GPUS.current() == device
    tensors = [placed(t, device) if own or i not in (1, 2) else t for i, t in enumerate(tensors)]
    leaves = [
        t.requires_grad_() for t in tensors if isinstance(t, Tensor) and t.dtype.is_floating_point
    ]
    output = op(*tensors)
    found = (output, *torch.autograd.grad(output, leaves, placed(grad, device)))
    assert all(str(tensor.device) == f"cuda:{device}" for tensor in found)
    return tuple(GPUS.back(tensor) for tensor in found)


def ran_on(device: int, current: int) -> list[str]:
    """The kernels since the last call, all on that GPU and its stream; the current GPU stays."""
    launches = [launch.split() for launch in GPUS.launches()]
    assert launches, "nothing was launched"
    where = {(int(now), int(stream)) for _, now, stream in launches}
    assert where == {(device, device)}, f"expected launches on GPU {device}, got {where}"
    assert GPUS.current() == current, f"expected the current GPU {current}, got {GPUS.current()}"
    return [name for name, _, _ in launches]


def try_case(name: str, dtypes: str, device: int, current: int) -> None:
    inputs: OpInputs = CASES[name].make(DTYPES[dtypes])
    grad = grad_output_for(inputs)
    tensors = [*inputs.arguments, None, inputs.num_points]
    found = differentiated(OPS.ms_deform_attn, device, tensors, grad)
    kernels = ran_on(device, current)
    check_results(found, inputs, grad)
    print(name, dtypes, f"cuda:{device}", *dict.fromkeys(kernels))


def try_fused(device: int, current: int) -> None:
    torch.manual_seed(0)
    shapes = torch.tensor([[5, 6], [3, 2]])
    value, reference = torch.randn(2, 36, 2, 8), torch.rand(2, 7, 2, 4)
    offsets, logits = torch.randn(2, 7, 2, 6, 2), torch.randn(2, 7, 2, 6)
    tensors = [value, shapes, None, reference, offsets, logits, None, [3, 3], 0.5]
    grad = torch.randn(2, 7, 16)
    found = differentiated(OPS.ms_deform_attn_fused, device, tensors, grad)
    kernels = ran_on(device, current)
    leaves = [t.clone().requires_grad_() for t in (value, reference, offsets, logits)]
    output = OPS.ms_deform_attn_fused(leaves[0], shapes, None, *leaves[1:], None, [3, 3], 0.5)
    for got, expected in zip(found, (output, *torch.autograd.grad(output, leaves, grad))):
        torch.testing.assert_close(got, expected)
    print("fused", "f32", f"cuda:{device}", *dict.fromkeys(kernels))


def try_mixed() -> None:
    inputs = CASES["non_square"].make(DTYPES["f32"])
    arguments = [placed(tensor, 1) for tensor in inputs.arguments]
    for at, name in ((3, "sampling_locations"), (4, "attention_weights")):
        mixed = [*arguments[:at], placed(inputs.arguments[at], 0), *arguments[at + 1 :]]
        try:
            OPS.ms_deform_attn(*mixed, None, inputs.num_points)
        except RuntimeError as error:
            assert f"{name}: expected on value's device" in str(error), error
            print("refused:", name)
        else:
            raise AssertionError(f"{name} of another GPU was taken")
    assert not GPUS.launches()


def main() -> None:
    for current in (0, 1):
        GPUS.set_current(current)
        for device in (0, 1):
            for dtypes in ("f32", "f16"):
                for name in ("non_square", "listed_points"):
                    try_case(name, dtypes, device, current)
            try_fused(device, current)
    try_mixed()
    sys.stdout.flush()
    # Autograd has a thread for each GPU, which may need Python while that ends: no such end.
    os._exit(0)


if __name__ == "__main__":
    main()
