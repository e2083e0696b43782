"""``python -m deform_attn.check``: right results pass, planted faults are found, exit statuses."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from deform_attn import check
from deform_attn.backends import BACKENDS


@pytest.fixture(autouse=True)
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "QUICK", ("non_square", "listed_points"))
    monkeypatch.setattr(check, "LARGE", dataclasses.replace(check.LARGE, queries=20))
    monkeypatch.setattr(check, "INTERPRETED", ())  # the Triton kernels have tests of their own


def test_right_results_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--device", "cpu", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    assert found["info"]["versions"]["torch"] == torch.__version__
    seen = {(row["backend"], row["dtype"], row["form"]) for row in found["worst"]}
    for backend in ("compiled", "reference"):
        if BACKENDS[backend].why_not("cpu", torch.float32) is None:
            forms = set(check.FORMS) - ({"deterministic"} if backend == "reference" else set())
            dtypes = ("f64", "f32", "f16", "bf16")
            assert {(backend, d, f) for d in dtypes for f in forms} <= seen


def test_planted_faults_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong output in one dtype, and a call that raises in another."""
    right = BACKENDS["reference"]

    def call(*operands: Any) -> torch.Tensor:
        output = right.call(*operands)
        if output.dtype is torch.float16:
            raise RuntimeError("no kernel image")
        return output * 1.0001 if output.dtype is torch.float32 else output

    monkeypatch.setitem(BACKENDS, "reference", dataclasses.replace(right, call=call))
    report = check.run(["cpu"], quick=True)
    wrong = {(o.backend, o.dtype) for o in report.failures}
    assert wrong == {("reference", "f32"), ("reference", "f16")}
    assert {o.failure for o in report.failures if o.dtype == "f16"} == {
        "RuntimeError: no kernel image"
    }
    monkeypatch.setattr(check, "run", lambda *_, **__: report)
    assert check.main([]) == 1
    printed = capsys.readouterr().out
    assert "WRONG reference on cpu, f32, forward, case non_square: output: error" in printed
    assert "python -m deform_attn.check --json" in printed


def test_an_interrupted_check_has_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "run", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as ended:
        check.main([])
    assert ended.value.code == 130


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_device_where_nothing_runs_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--device", "cuda"]) == 1
    assert logging.getLogger("deform_attn").level == logging.NOTSET  # only for the report
    printed = capsys.readouterr().out
    assert "NOTHING RAN on cuda" in printed
    assert "open an issue" not in printed  # nothing is wrong
