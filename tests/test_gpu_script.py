"""`.ci/gpu` without a GPU: its steps, limits and summary, with stand-ins for what a GPU would run.

The stand-in for python keeps the script's own arguments wherever a CPU can follow them: tests run
on the emulated kernels, those for the sanitizers are collected, and the benchmark times the CPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import deform_attn
from benchmarks.op import check, measure, peers, report, summary
from benchmarks.op.workloads import WORKLOADS, draw, scaled
from tests.simt import build
from tests.simt.emulated import Emulated

ROOT = Path(__file__).resolve().parent.parent

PYTHON = """#!{python}
import os, subprocess, sys
arguments = sys.argv[1:]
words = " ".join(arguments)
failing = os.environ["FAILING"].split()
def real(*arguments):
    done = subprocess.run([sys.executable, *arguments])
    sys.exit(done.returncode)
if "get_device_capability" in words:
    print("9.0 12.0")
elif words == "-c import xdist":
    sys.exit(1)
elif words == "setup.py build_ext --inplace":
    print("for", os.environ["TORCH_CUDA_ARCH_LIST"], os.environ["FORCE_CUDA"])
    sys.exit("build" in failing)
elif "tests -k cuda" in words:
    some = "emulated/gather and f32 and (non_square or head_dim_32) and test_value"
    real(*("tests/test_op.py" if a == "tests" else some if a == "cuda" else a for a in arguments))
elif "--runners compiled/cuda" in words:
    assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    real(*(argument.replace("compiled/cuda", "compiled/cpu") for argument in arguments))
elif "benchmarks.op" in words:
    if "bench" in failing:
        sys.exit("planted")
    at = arguments.index("--device")
    assert arguments[at : at + 4] == ["--device", "cuda", "--preset", "gpu"]
    arguments[at : at + 4] = [
        *("--device", "cpu", "--preset", "quick", "--seconds", "0.1"),
        *("--workloads", "rfdetr_decoder_560", "--contestants", "compiled,grid_sample"),
    ]
    real(*arguments)
else:
    real(*arguments)
"""

SANITIZER = """#!/bin/bash
[[ $1 == --tool && $3 == --kernel-name && $4 == kns=deform_attn ]] || exit 9
tool=$2
while [[ $1 != */python ]]; do shift; done
"$@" --collect-only
status=$?
found=0
[[ " $FAILING " == *" $tool "* ]] && found=2 status=1
echo "========= ${tool^^} SUMMARY: $found errors"
exit $status
"""


def run(folder: Path, *steps: str, failing: str = "") -> tuple[int, str, str]:
    """Exit status, output and summary of the script."""
    tools = folder / "bin"
    tools.mkdir()
    for name, text in (
        ("python", PYTHON.replace("{python}", sys.executable)),
        ("compute-sanitizer", SANITIZER),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_CUDA_ARCH")}
    environment |= {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": str(tools / "python"),
        "FAILING": failing,
    }
    done = subprocess.run(
        [str(ROOT / ".ci" / "gpu"), str(folder / "out"), *steps],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    return done.returncode, done.stdout + done.stderr, (folder / "out" / "summary.md").read_text()


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
def test_every_step_is_run_and_told(tmp_path: Path) -> None:
    status, said, page = run(tmp_path)
    out = tmp_path / "out"
    assert status == 0, said
    assert (out / "build.log").read_text() == "for 9.0 12.0 1\n"
    for step in ("build", "info", "test", "memcheck", "racecheck", "bench"):
        assert re.search(rf"\| {step} \| passed \| \d+ \| \d+ \|", page), page
    assert "Tests on the GPU: 2 passed, 0 failures, 0 errors, 0 skipped." in page
    assert "- memcheck: MEMCHECK SUMMARY: 0 errors" in page
    assert "- racecheck: RACECHECK SUMMARY: 0 errors" in page
    assert "| rfdetr_decoder_560 f32 |" in page
    results = json.loads((out / "bench.json").read_text())
    assert {row["contestant"] for row in results["rows"]} == {"compiled", "grid_sample"}
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    # the sanitizers get both layouts of points, the deterministic kernels and the fused ones
    ran = (out / "racecheck.log").read_text()
    for test in (
        "test_op.py::test_value_and_gradients[compiled/cpu-bf16-listed_points]",
        "test_op.py::test_every_element_is_written[compiled/cpu-f32-head_dim_71]",
        "test_fused.py::test_values_and_gradients[compiled/cpu-f32-4-3-listed]",
        "test_fused.py::test_every_element_is_written[compiled/cpu-bf16]",
    ):
        assert test in ran
    assert 40 < ran.count("::test_") < 120


def test_a_step_that_fails_is_named_and_stops_nothing(tmp_path: Path) -> None:
    status, said, page = run(
        tmp_path, "build", "info", "racecheck", "bench", failing="build racecheck bench"
    )
    assert status == 1
    assert "FAILED: build racecheck bench" in said
    for step, result in (
        ("build", "**failed**"),
        ("info", "passed"),
        ("racecheck", "**failed**"),
        ("bench", "**failed**"),
    ):
        assert f"| {step} | {result} |" in page
    assert "| memcheck |" not in page
    assert "- racecheck: RACECHECK SUMMARY: 2 errors" in page
    assert "- memcheck: **no verdict**" in page
    assert "Tests: no report." in page
    assert page.startswith("# No benchmark ran")


def test_a_machine_without_a_gpu_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / ".ci" / "gpu"), str(tmp_path)],
        env=os.environ | {"PYTHON": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "sees no GPU" in done.stderr


def test_the_steps_fit_in_nine_minutes() -> None:
    text = (ROOT / ".ci" / "gpu").read_text()
    limits = [int(limit) for limit in re.findall(r"^\s*step \S+ (\d+) ", text, re.MULTILINE)]
    sanitizers = len(re.findall(r"^sanitize \w+$", text, re.MULTILINE))
    assert len(limits) == 5
    assert sanitizers == 2
    sanitizing = int(re.search(r'step "\$1" (\d+) ', text)[1])
    assert sum(limits) + (sanitizers - 1) * sanitizing <= 9 * 60 - 30  # detection, summary


INPUTS = (
    "Tensor value, Tensor? spatial_shapes, Tensor? level_start_index, Tensor sampling_locations, "
    "Tensor attention_weights, int[]? level_sizes, int[]? num_points"
)


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
@pytest.mark.skipif(hasattr(torch.ops.deform_attn, "ms_deform_attn_by"), reason="the real one is")
@pytest.mark.parametrize("name", peers.KERNELS)
def test_kernels_by_name_are_contestants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the CUDA library defines its private operators; here the emulated kernels answer."""
    ways = []

    def forward(way: str, *inputs: Any) -> torch.Tensor:
        ways.append(way)
        return Emulated().forward(*inputs[:5], inputs[6], baseline=way == "baseline")

    def backward(way: str, grad_output: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
        ways.append(way)
        return Emulated().backward(grad_output, *inputs[:5], inputs[6], way=way)

    library = torch.library.Library("deform_attn", "FRAGMENT")
    library.define(f"ms_deform_attn_by(str way, {INPUTS}) -> Tensor")
    library.define(
        f"ms_deform_attn_by_backward(str way, Tensor grad_output, {INPUTS}) -> "
        "(Tensor, Tensor, Tensor)"
    )
    library.impl("ms_deform_attn_by", forward, "CPU")
    library.impl("ms_deform_attn_by_backward", backward, "CPU")
    compiled = deform_attn.BACKENDS["compiled"]
    able = dataclasses.replace(compiled, why_not=lambda *_: None)
    monkeypatch.setitem(deform_attn.BACKENDS, "compiled", able)
    try:
        for workload, dtype in (("rfdetr_decoder_560", "f32"), ("dfine_decoder_640", "bf16")):
            small = scaled(WORKLOADS[workload], 0.05)
            x = draw(small, dtype={"f32": torch.float32, "bf16": torch.bfloat16}[dtype])
            op = peers.PEERS[name](small, "cuda")
            assert (
                check.verdict(check.errors_of(op, x, check.expected_of(x)), x.value.dtype) is None
            )
        assert set(ways) == {peers.KERNELS[name]}
        with pytest.raises(peers.Missing, match="does not run on cpu"):
            peers.PEERS[name](small, "cpu")
    finally:
        library._destroy()


def row(contestant: str, seconds: float, **fields: Any) -> report.Row:
    times = {phase: [seconds, 1.1 * seconds] for phase in measure.PHASES}
    call = {"workload": "w", "batch": 1, "device": "cuda", "threads": 1, "dtype": "f32"}
    return call | {"contestant": contestant, "status": "ok", "times": times} | fields


def test_the_page_compares_kernels_and_backends(tmp_path: Path) -> None:
    """Times that one can check by eye: who is faster than whom, and where a choice was wrong."""
    rows = [
        row("compiled", 2e-3),
        row("triton", 1e-3),  # twice as fast as what is chosen
        row("plain kernel", 8e-3),
        row("compiled, scatter", 2e-3),
        row("compiled, gather", 4e-3),
        row("mmcv", 6e-3),
        row("deformops", 5e-3),
        row("compiled", 3e-3, dtype="bf16"),
        row("triton", 6e-3, dtype="bf16"),
    ]
    text = "\n".join(summary.times(rows))
    assert "| w f32 | 2.10 ms / 2.10 ms | 1.05 ms / 1.05 ms | 8.40 ms / 8.40 ms |" in text
    factors = "4.00x / 4.00x | 1.00x / 1.00x | 2.00x / 2.00x | 0.50x / 0.50x"
    assert f"| w f32 | {factors} | 2.50x / 2.50x (deformops) |" in text
    assert "| w bf16 | - / - | - / - | - / - | 2.00x / 2.00x | - |" in text
    triton, scatter, gather = summary.verdicts(rows)
    assert triton.endswith(": w f32 (2.00x)")
    assert scatter.endswith(": nowhere")
    assert gather.endswith(": nowhere")

    (tmp_path / "steps.tsv").write_text("build\t0\t9\t100\nbench\t124\t165\t165\n")
    results = {"rows": rows, "models": [], "environment": None}
    facts = {"torch": "2", "python": "3", "commit": "c", "date": "d"}
    gpu = {"name": "a GPU", "capability": "9.0", "cuda": "13"}
    results["environment"] = facts | {"gpu": gpu}
    (tmp_path / "bench.json").write_text(json.dumps(results))
    page = summary.page(tmp_path)
    assert page.startswith("# a GPU\n\nCompute capability 9.0, CUDA 13, torch 2,")
    assert "| bench | **timed out** | 165 | 165 |" in page
    assert "Wrong results: none." in page
