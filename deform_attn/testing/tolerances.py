"""The tolerance rule: how large an error may be.

The reference is the float64 oracle, applied to the same rounded inputs. The largest absolute error
of a result may be the larger of

- ``TIMES_REFERENCE`` times the error of the reference backend on the same inputs, and
- `roundings`: half a unit in the last place of the result's largest number, plus one unit of the
  dtype of the sums (float32 or float64) in the largest sum of absolute terms.

The first bound is capped, so that a faulty reference backend is found too: at ``LEAST_CAP`` times
the second, or the longest side of a level times the second (a rounding of a location moves the
sample by a share of a pixel that grows with the side).

At pixel knots (locations at a pixel centre, where the slope jumps) the reference backend may take
the wrong side; there the second bound applies alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import oracle
from .cases import OpInputs, acc_dtype

TIMES_REFERENCE = 2.0
ROUNDINGS_OF_SUMS = 1.0
LEAST_CAP = 8


def error_of(result: Tensor, exact: Tensor) -> float:
    """The largest absolute error of a result; infinite where it holds a NaN.

    Args:
        result: any shape, dtype and device.
        exact: float64, of the same shape.
    """
    if result.numel() == 0:
        return 0.0
    return (result.double().cpu() - exact.cpu()).abs().nan_to_num(nan=float("inf")).max().item()


def largest(tensor: Tensor) -> float:
    """The largest absolute number of a tensor; 0 if it is empty, and NaN counts as 0."""
    return tensor.double().abs().nan_to_num(0, 0).max().item() if tensor.numel() else 0.0


def rounding_limits(
    exact: Sequence[Tensor],
    terms: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    value_dtype: torch.dtype,
) -> tuple[float, ...]:
    """The error that a few roundings cause, for each result.

    Args:
        exact: the results in float64.
        terms: for each result, the sums of the absolute values of its terms.
        dtypes: dtype of each result.
        value_dtype: dtype of value, which determines the dtype of the sums.
    """
    sums = torch.finfo(acc_dtype(value_dtype)).eps
    return tuple(
        torch.finfo(dtype).eps / 2 * largest(e) + ROUNDINGS_OF_SUMS * sums * largest(term)
        for e, term, dtype in zip(exact, terms, dtypes)
    )


def roundings(
    inputs: OpInputs, grad_output: Tensor, exact: tuple[Tensor, ...]
) -> tuple[float, ...]:
    """`rounding_limits` of the four results of ``ms_deform_attn``.

    Args:
        inputs: on the CPU.
        grad_output: ``[B, Q, M * D]``.
        exact: `comparison.exact_results` of both.
    """
    dtypes = (inputs.value.dtype, *(tensor.dtype for tensor in inputs.tensors))
    terms = oracle.sums_of_absolute_terms(inputs, grad_output)
    return rounding_limits(exact, terms, dtypes, inputs.value.dtype)
