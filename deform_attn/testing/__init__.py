"""Tests of an installation: a float64 oracle, hostile cases, one tolerance rule, the comparison.

Needs torch alone. ``python -m deform_attn.check`` applies it to every backend of this machine.

Example:
    Compare a call of one's own, any function of `OpInputs` that autograd differentiates, with the
    oracle:

    >>> import deform_attn
    >>> from deform_attn.testing import CASES, DTYPES, check
    >>> def call(inputs):
    ...     return deform_attn.ms_deform_attn(*inputs.arguments, num_points=inputs.num_points)
    >>> check(call, CASES["non_square"].make(DTYPES["f32"]))
"""

from __future__ import annotations

from . import oracle
from .cases import CASES, DTYPES, MIXED_DTYPES, Case, Dtypes, FusedInputs, OpInputs
from .comparison import (
    FUSED_RESULTS,
    RESULTS,
    Error,
    Expected,
    check,
    check_results,
    discrete_results,
    exact_results,
    expected,
    expected_discrete,
    expected_fused,
    fused_results,
    grad_output_for,
    results,
)
from .tolerances import ROUNDINGS_OF_SUMS, TIMES_REFERENCE, error_of, largest, roundings

__all__ = [
    "CASES",
    "DTYPES",
    "FUSED_RESULTS",
    "MIXED_DTYPES",
    "RESULTS",
    "ROUNDINGS_OF_SUMS",
    "TIMES_REFERENCE",
    "Case",
    "Dtypes",
    "Error",
    "Expected",
    "FusedInputs",
    "OpInputs",
    "check",
    "check_results",
    "discrete_results",
    "error_of",
    "exact_results",
    "expected",
    "expected_discrete",
    "expected_fused",
    "fused_results",
    "grad_output_for",
    "largest",
    "oracle",
    "results",
    "roundings",
]
