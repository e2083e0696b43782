"""The one rule by which every result is judged, and the check that applies it.

Truth is the float64 oracle, on the very numbers that the kernel was given. An error may be twice
that of the reference backend in the same dtypes, or what few roundings come to, whichever is more:
half a unit in the last place of the result's largest number, and one unit of the dtype of the sums
(float32 or float64) in the largest sum of absolute terms. At pixel knots, where the reference is
wrong, its error is no measure and the second bound stands alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import oracle
from .cases import OpInputs

TIMES_REFERENCE = 2.0
ROUNDINGS_OF_SUMS = 1.0


def error_of(result: Tensor, exact: Tensor) -> float:
    """Largest absolute error; infinite for a NaN."""
    if result.numel() == 0:
        return 0.0
    return (result.double().cpu() - exact.cpu()).abs().nan_to_num(nan=float("inf")).max().item()


def roundings(
    inputs: OpInputs, grad_output: Tensor, exact: tuple[Tensor, ...]
) -> tuple[float, ...]:
    """The error that few roundings make, for each of the four RESULTS."""
    real = torch.float64 if inputs.value.dtype is torch.float64 else torch.float32
    dtypes = (inputs.value.dtype, *(tensor.dtype for tensor in inputs.tensors))
    terms = oracle.sums_of_absolute_terms(inputs, grad_output)
    return tuple(
        torch.finfo(dtype).eps / 2 * largest(e) + ROUNDINGS_OF_SUMS * torch.finfo(real).eps * size
        for dtype, e, size in zip(dtypes, exact, map(largest, terms))
    )


def largest(tensor: Tensor) -> float:
    """Its largest absolute number; 0 where there is none or a NaN."""
    return tensor.double().abs().nan_to_num(0, 0).max().item() if tensor.numel() else 0.0
