"""Tests of an installation: a float64 oracle, hostile cases, one tolerance rule, the comparison."""

from __future__ import annotations

from .cases import CASES, DTYPES, MIXED_DTYPES, Case, Dtypes, OpInputs
from .comparison import RESULTS, check, check_results, exact_results, grad_output_for, results
from .tolerances import ROUNDINGS_OF_SUMS, TIMES_REFERENCE, error_of, largest, roundings

__all__ = [
    "CASES",
    "DTYPES",
    "MIXED_DTYPES",
    "RESULTS",
    "ROUNDINGS_OF_SUMS",
    "TIMES_REFERENCE",
    "Case",
    "Dtypes",
    "OpInputs",
    "check",
    "check_results",
    "error_of",
    "exact_results",
    "grad_output_for",
    "largest",
    "results",
    "roundings",
]
