"""Test this installation: ``python -m deform_attn.check [--device cuda] [--quick] [--json]``.

Every backend that can run here, with every dtype: forward, backward, deterministic backward, the
fused operator and ``method="discrete"``, compared with a float64 oracle by the rule of
`deform_attn.testing.tolerances`. Exit status 0: all results are right; 1: a result is wrong, a call
failed, nothing could be run on a device that was asked for, or the report could not be written;
130: interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import deform_attn
from deform_attn.backends import BACKENDS, unannounced
from deform_attn.console import command
from deform_attn.info import report as info
from deform_attn.testing import (
    CASES,
    DTYPES,
    Case,
    Dtypes,
    Error,
    Expected,
    FusedInputs,
    OpInputs,
    discrete_results,
    expected,
    expected_discrete,
    expected_fused,
    fused_results,
    grad_output_for,
    results,
)

__all__ = ["Outcome", "Report", "run"]

FORMS = ("forward", "backward", "deterministic", "fused", "fused backward", "discrete")
# Vector widths and their remainders, both layouts of points, hostile numbers, several blocks.
QUICK = (
    *("non_square", "listed_points", "head_dim_30", "head_dim_32", "head_dim_71"),
    *("not_finite", "same_point", "strided", "offset_head_dim_32", "shared_among_threads"),
    "masked",
)
# Each other head_dim or number of points is another compilation of seconds for Triton.
TRITON = ("non_square", "listed_points", "head_dim_32", "not_finite", "masked")
INTERPRETED = ("non_square",)  # with TRITON_INTERPRET=1: seconds for each call
DISCRETE = ("non_square", "listed_points", "not_finite", "masked")
# More blocks than a GPU runs at once, and work for every core.
LARGE = Case(*("large", ((40, 50), (20, 25))), batch=1, queries=200, heads=8, head_dim=32, points=4)


@dataclass(frozen=True)
class Outcome:
    """The comparison of one call, or of one of its two passes, with the oracle."""

    device: str
    backend: str
    dtype: str
    form: str
    case: str
    errors: tuple[Error, ...] = ()
    failure: str | None = None  # the exception of a call that failed

    @property
    def passed(self) -> bool:
        """Whether the call ran and every result is within its limit."""
        return self.failure is None and all(error.passed for error in self.errors)

    @property
    def ratio(self) -> float:
        """The worst error over its limit; infinite for a failed call."""
        if self.failure is not None:
            return float("inf")
        return max(e.error / e.limit if e.limit else 2.0 * (e.error > 0) for e in self.errors)

    def __str__(self) -> str:
        call = f"{self.backend} on {self.device}, {self.dtype}, {self.form}, case {self.case}"
        wrong = [str(error) for error in self.errors if not error.passed]
        return f"{call}: {self.failure or '; '.join(wrong)}"


@dataclass
class Report:
    """All outcomes, and what did not run."""

    outcomes: list[Outcome] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)  # "backend device dtype" -> reason
    seconds: float = 0.0
    missing: list[str] = field(default_factory=list)  # devices asked for where nothing ran

    @property
    def failures(self) -> list[Outcome]:
        """The outcomes that are wrong."""
        return [outcome for outcome in self.outcomes if not outcome.passed]

    @property
    def passed(self) -> bool:
        """Whether there are outcomes, all right, on every device asked for."""
        return bool(self.outcomes) and not self.failures and not self.missing

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a bug report, with `deform_attn.info.report`."""
        worst = [
            {
                **{name: getattr(outcome, name) for name in ("device", "backend", "dtype", "form")},
                "case": outcome.case,
                "error_over_limit": outcome.ratio,
                "errors": {e.result: [e.error, e.limit] for e in outcome.errors},
                "failure": outcome.failure,
            }
            for outcome in (*_worst(self.outcomes).values(), *self.failures)
        ]
        return {
            "passed": self.passed,
            "calls": len(self.outcomes),
            "seconds": round(self.seconds, 1),
            "worst": worst,
            "not_run": self.not_run,
            "nothing_ran_on": self.missing,
            "info": info(),
        }


# numbers of a reference point, points of each level, whether rows are masked, and the case's name
_FUSED = (
    (2, None, False, "points"),
    (4, (3, 0, 2), False, "boxes, listed points"),
    (5, None, True, "rotated boxes, masked"),
)


def run(
    devices: Sequence[str] | None = None,
    *,
    quick: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Compare every backend with the oracle.

    Args:
        devices: ``"cpu"``, ``"cuda"``; None: both where torch has a GPU.
        quick: a tenth of the cases.
        progress: called with a short text before each dtype of each device.

    Example::

        report = deform_attn.check.run(["cpu"], quick=True)
        assert report.passed, report.failures
    """
    if isinstance(devices, str):
        raise TypeError(f"devices: expected a list such as ['cpu'] or None, got {devices!r}")
    start = time.perf_counter()
    report = Report()
    available = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices or available:
        before = len(report.outcomes)
        for dtypes in DTYPES.values():
            progress(f"{device} {dtypes.name}")
            able = list(_backends(device, dtypes, report))
            report.outcomes += _outcomes(device, dtypes, able, quick)
        if devices is not None and len(report.outcomes) == before:
            report.missing.append(device)
    for device in ("cpu", "cuda"):
        if device not in (devices or available):
            report.not_run[device] = "not asked for" if device in available else "torch has no GPU"
    report.seconds = time.perf_counter() - start
    return report


def _backends(device: str, dtypes: Dtypes, report: Report) -> Iterator[str]:
    for name, backend in BACKENDS.items():
        reason = backend.why_not(device, dtypes.value)
        if device == "cuda" and not torch.cuda.is_available():
            reason = "torch has no GPU"
        if reason is None:
            yield name
        else:
            report.not_run[f"{name} {device} {dtypes.name}"] = reason


def _outcomes(
    device: str, dtypes: Dtypes, backends: Sequence[str], quick: bool
) -> Iterator[Outcome]:
    """Each case of each form on every backend; the oracle computes it once for all of them."""
    cases = [CASES[name] for name in (QUICK if quick else CASES)] + [LARGE]
    for case in cases if backends else ():
        inputs = case.make(dtypes, device)
        grad_output = grad_output_for(inputs)
        try:
            right = expected(inputs, grad_output)
        except Exception:  # the reference backend fails: only roundings are allowed
            right = expected(inputs, grad_output, at_knots=True)
        discrete = None
        if case.name in DISCRETE:
            discrete = expected_discrete(inputs, grad_output)
        for backend in backends:
            if backend == "triton" and (case.name not in TRITON or device == "cpu"):
                continue
            where = (device, backend, dtypes.name)
            yield from _attention(where, case.name, inputs, grad_output, right)
            if discrete is not None:
                yield _discrete(where, case.name, inputs, grad_output, discrete)
    for size, num_points, masked, name in _FUSED if backends else ():
        points = None if num_points is None else list(num_points)
        fused = FusedInputs.draw(
            dtypes.value, size=size, num_points=points, masked=masked, device=device
        )
        grad_output = grad_output_for(fused)
        right = expected_fused(fused, grad_output)
        for backend in backends:
            where = (device, backend, dtypes.name)
            if backend != "triton" or device != "cpu":
                yield from _fused(where, name, fused, grad_output, right)
    if "triton" in backends and device == "cpu" and dtypes.name == "f32":
        for name in INTERPRETED:
            inputs = CASES[name].smaller(8, queries_at_once=True).make(dtypes)
            grad_output = grad_output_for(inputs)
            right = expected(inputs, grad_output)
            yield from _attention((device, "triton", "f32"), name, inputs, grad_output, right)


def _attention(
    where: tuple[str, str, str],
    case: str,
    inputs: OpInputs,
    grad_output: torch.Tensor,
    right: Expected,
) -> Iterator[Outcome]:
    call = _call(deform_attn.ms_deform_attn, where[1])
    # The reference has no deterministic backward on a GPU; interpreted kernels have one order.
    once = where[1] == "reference" or where[:2] == ("cpu", "triton")
    modes = (False,) if once else (False, True)
    for deterministic in modes:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(deterministic)
        try:
            errors = right.errors(results(call, inputs, grad_output))
        except Exception as error:  # of any kind: it belongs in the report
            form = "deterministic" if deterministic else "forward"
            yield Outcome(*where, form, case, failure=_line(error))
            continue
        finally:
            torch.use_deterministic_algorithms(before)
        if deterministic:
            yield Outcome(*where, "deterministic", case, tuple(errors))
        else:
            yield Outcome(*where, "forward", case, tuple(errors[:1]))
            yield Outcome(*where, "backward", case, tuple(errors[1:]))


def _discrete(
    where: tuple[str, str, str],
    case: str,
    inputs: OpInputs,
    grad_output: torch.Tensor,
    right: Expected,
) -> Outcome:
    call = _call(deform_attn.ms_deform_attn, where[1], method="discrete")
    try:
        errors = right.errors(discrete_results(call, inputs, grad_output))
    except Exception as error:
        return Outcome(*where, "discrete", case, failure=_line(error))
    return Outcome(*where, "discrete", case, tuple(errors))


def _fused(
    where: tuple[str, str, str],
    case: str,
    fused: FusedInputs,
    grad_output: torch.Tensor,
    right: Expected,
) -> Iterator[Outcome]:
    call = _call(deform_attn.ms_deform_attn_fused, where[1], offset_scale=fused.offset_scale)
    try:
        errors = right.errors(fused_results(call, fused, grad_output))
    except Exception as error:
        yield Outcome(*where, "fused", case, failure=_line(error))
        return
    yield Outcome(*where, "fused", case, tuple(errors[:1]))
    yield Outcome(*where, "fused backward", case, tuple(errors[1:]))


def _call(
    function: Callable[..., torch.Tensor], backend: str, **options: Any
) -> Callable[[Any], torch.Tensor]:
    """A call of a function on a backend, with inputs of a case."""
    return lambda inputs: function(
        *inputs.arguments,
        num_points=inputs.num_points,
        value_mask=inputs.value_mask,
        backend=backend,
        **options,
    )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _worst(outcomes: Sequence[Outcome]) -> dict[tuple[str, str, str, str], Outcome]:
    """The outcome nearest to its limit of each device, backend, dtype and form."""
    worst: dict[tuple[str, str, str, str], Outcome] = {}
    for outcome in outcomes:
        key = (outcome.device, outcome.backend, outcome.dtype, outcome.form)
        if key not in worst or not outcome.ratio <= worst[key].ratio:
            worst[key] = outcome
    return worst


def as_text(report: Report) -> str:
    """The table, what did not run, and what to report."""
    worst = _worst(report.outcomes)
    lines = ["Worst error over its limit (1 is the limit)", ""]
    lines.append(f"{'device':7}{'backend':10}{'dtype':6}" + "".join(f"{f:>15}" for f in FORMS))
    for device, backend, dtype in dict.fromkeys(key[:3] for key in worst):
        cells = []
        for form in FORMS:
            outcome = worst.get((device, backend, dtype, form))
            cell = "-" if outcome is None else f"{outcome.ratio:.2f}"
            cells.append(cell if outcome is None or outcome.passed else f"{cell} WRONG")
        lines.append(f"{device:7}{backend:10}{dtype:6}" + "".join(f"{c:>15}" for c in cells))
    if report.not_run:
        lines += ["", "Did not run"]
        by_reason: dict[str, list[str]] = {}
        for what, reason in report.not_run.items():
            by_reason.setdefault(reason, []).append(what)
        lines += [f"  {', '.join(what)}: {reason}" for reason, what in by_reason.items()]
    count = len(report.outcomes)
    lines += ["", f"{count} comparisons, {len(report.failures)} wrong, {report.seconds:.1f} s"]
    for outcome in report.failures[:20]:
        lines.append(f"WRONG {outcome}")
    for device in report.missing:
        lines.append(f"NOTHING RAN on {device}; the reasons are above")
    if report.failures:
        lines += [
            "",
            "Please open an issue with the output of `python -m deform_attn.check --json`. Until",
            "then, DEFORM_ATTN_BACKEND=reference (or another backend that is right above) avoids",
            "the faulty one.",
        ]
    return "\n".join(lines)


def _progress(text: str) -> None:
    """A line on a terminal that the next one replaces."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; the exit status is 0 where all results are right, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m deform_attn.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only this one")
    parser.add_argument("--quick", action="store_true", help="a tenth of the cases")
    parser.add_argument("--json", action="store_true", help="print JSON")
    with command():
        arguments = parser.parse_args(argv)
        devices = None if arguments.device is None else [arguments.device]
        try:
            with unannounced():
                report = run(
                    devices,
                    quick=arguments.quick,
                    progress=lambda text: _progress(f"checking {text}"),
                )
        finally:
            _progress("")
        print(json.dumps(report.as_dict(), indent=2) if arguments.json else as_text(report))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
