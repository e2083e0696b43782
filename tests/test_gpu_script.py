"""`.ci/gpu` without a GPU: its steps, limits and summary, with stand-ins for what a GPU would run.

Nothing here depends on time: where the test has to wait for the script, it reads from a pipe that a
stand-in opens.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import deform_attn
from benchmarks.op import check, measure, peers, summary, tune
from benchmarks.op.rows import Row
from benchmarks.op.workloads import WORKLOADS, draw, scaled
from tests.simt import build
from tests.simt.emulated import Emulated

ROOT = Path(__file__).resolve().parent.parent

PYTHON = """#!{python}
import os, shutil, subprocess, sys
from pathlib import Path
arguments = sys.argv[1:]
words = " ".join(arguments)
failing = os.environ["FAILING"].split()
def real(*arguments):
    sys.exit(subprocess.run([sys.executable, *arguments]).returncode)
def out():
    return Path(arguments[arguments.index("--out") + 1])
def stand_in(step, file=None):
    if step in failing:
        sys.exit("planted")
    print("stand-in for", step)
    if file:
        shutil.copy(Path(os.environ["STAND_INS"]) / file, out() / file)
if "get_device_capability" in words:
    print("9.0 12.0")
elif words == "build_tools/libraries.py":
    print("for", os.environ["TORCH_CUDA_ARCH_LIST"], os.environ["FORCE_CUDA"])
    stand_in("build")
elif "deform_attn.check" in words:
    assert words == "-m deform_attn.check --device cuda --quick"
    stand_in("check")
elif "benchmarks.op.tune" in words:
    stand_in("table", "tune.json")
elif "--runners compiled/cuda" in words or "-k cuda" in words:
    if "compute-sanitizer" not in os.environ.get("UNDER", ""):
        step = "first" if "first.xml" in words else "tests"
        if os.environ.get("PIPE"):
            Path(os.environ["PIPE"]).write_text(step)  # waits until the test reads it
            os.kill(os.getpid(), 19)  # and stops
        if step in failing:
            sys.exit("planted")
    if "-k cuda" in words:
        sys.exit(0)
    real(*(a.replace("compiled/cuda", "compiled/cpu") for a in arguments), "--collect-only")
elif "benchmarks.op.summary" in words or words.startswith(("-c", "-")) and "-m" not in words:
    real(*arguments)
elif "benchmarks.op" in words:
    assert "--device cuda --preset gpu" in words
    stand_in("bench", "bench.json")
else:
    real(*arguments)
"""

SANITIZER = """#!/bin/bash
[[ $1 == --tool && $3 == --kernel-name && $4 == kns=deform_attn ]] || exit 9
[[ $PYTORCH_NO_CUDA_MEMORY_CACHING == 1 ]] || exit 8
tool=$2
while [[ $1 != */python ]]; do shift; done
status=0
[[ $tool == memcheck ]] || UNDER=compute-sanitizer "$@" || status=$?  # both run the same tests
found=0
[[ " $FAILING " == *" $tool "* ]] && found=2 status=1
echo "========= ${tool^^} SUMMARY: $found errors"
exit $status
"""


def start(
    folder: Path, *steps: str, failing: str = "", **environment: str
) -> subprocess.Popen[str]:
    """The script, with a stand-in for python and for the sanitizer."""
    tools, stand_ins = folder / "bin", folder / "stand-ins"
    tools.mkdir()
    stand_ins.mkdir()
    for name, text in (
        ("python", PYTHON.replace("{python}", sys.executable)),
        ("compute-sanitizer", SANITIZER),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    facts = {"torch": "2", "python": "3", "commit": "c", "date": "d"}
    facts |= {"gpu": {"name": "a GPU", "capability": "9.0", "cuda": "13"}}
    rows = [row("compiled", 2e-3), row("mmcv", 6e-3)]
    for name, found in (
        ("tune.json", {"environment": facts, "rows": TUNED}),
        ("bench.json", {"environment": facts, "rows": rows, "models": []}),
    ):
        (stand_ins / name).write_text(json.dumps(found))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_CUDA_ARCH")}
    return subprocess.Popen(
        [str(ROOT / ".ci" / "gpu"), str(folder / "out"), *steps],
        env=inherited
        | {
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": str(tools / "python"),
            "STAND_INS": str(stand_ins),
            "FAILING": failing,
        }
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(folder: Path, *steps: str, failing: str = "") -> tuple[int, str, str]:
    """Exit status, output and summary of the script."""
    process = start(folder, *steps, failing=failing)
    printed, _ = process.communicate()
    return process.returncode, printed, (folder / "out" / "summary.md").read_text()


def test_every_step_runs_in_order(tmp_path: Path) -> None:
    status, printed, page = run(tmp_path)
    out = tmp_path / "out"
    assert status == 0, printed
    assert (out / "build.log").read_text() == "for 9.0 12.0 1\nstand-in for build\n"
    ran = re.findall(r"^\| (\w+) \| passed \| \d+ \| \d+ \|$", page, re.MULTILINE)
    assert ran == ["build", "check", "table", "first", "tests", "memcheck", "racecheck", "bench"]
    assert page.startswith("# a GPU\n")
    assert "stand-in for check" in page
    assert "| encoder f32 backward | 40.0 ms | 4.00 ms | 8.00 ms |" in page
    assert "- csrc/cuda/launch.cuh, choose_backward: kScatter in place of the choice" in page
    assert "- memcheck: MEMCHECK SUMMARY: 0 errors" in page
    assert "- racecheck: RACECHECK SUMMARY: 0 errors" in page
    assert "| w f32 |" in page
    # about 400 tests first; the sanitizers get both layouts of points and every kind of kernel
    found = re.search(r"(\d+)/\d+ tests collected", (out / "first.log").read_text())
    assert found is not None
    assert 350 < int(found[1]) < 500
    listed = (out / "racecheck.log").read_text()
    for test in (
        "test_op.py::test_value_and_gradients[compiled/cpu-bf16-listed_points]",
        "test_op.py::test_every_element_is_written[compiled/cpu-f32-head_dim_71]",
        "test_fused.py::test_values_and_gradients[compiled/cpu-f32-4-3-listed]",
        "test_fused.py::test_every_element_is_written[compiled/cpu-bf16]",
    ):
        assert test in listed
    assert 40 < listed.count("::test_") < 120


def test_a_step_that_fails_is_named_and_stops_nothing(tmp_path: Path) -> None:
    status, printed, page = run(
        tmp_path, "build", "check", "memcheck", "bench", failing="build memcheck bench"
    )
    assert status == 1
    assert "FAILED: build memcheck bench" in printed
    for step, result in (
        ("build", "**failed**"),
        ("check", "passed"),
        ("memcheck", "**failed**"),
        ("bench", "**failed**"),
    ):
        assert f"| {step} | {result} |" in page
    assert "| racecheck |" not in page
    assert "- memcheck: MEMCHECK SUMMARY: 2 errors" in page
    assert "- racecheck: **no verdict**" in page
    assert "first: no report." in page
    assert page.startswith("# Nothing was timed")


def test_a_killed_run_leaves_what_it_had(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = start(tmp_path, PIPE=str(pipe))
    assert pipe.read_text() == "first"  # the script has come to its fourth step
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    page = (tmp_path / "out" / "summary.md").read_text()
    assert re.findall(r"^\| (\w+) \| passed", page, re.MULTILINE) == ["build", "check", "table"]
    assert "| encoder f32 backward | 40.0 ms | 4.00 ms | 8.00 ms |" in page


def test_a_machine_without_a_gpu_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / ".ci" / "gpu"), str(tmp_path)],
        env=os.environ | {"PYTHON": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "sees no GPU" in done.stderr


def test_the_limits_add_up_to_eight_minutes() -> None:
    text = (ROOT / ".ci" / "gpu").read_text()
    limits = [int(limit) for limit in re.findall(r"^\s*step \w+ (\d+) ", text, re.MULTILINE)]
    sanitizers = len(re.findall(r"^sanitize \w+$", text, re.MULTILINE))
    summaries = len(re.findall(r"^summarize( |$)", text, re.MULTILINE))
    assert (len(limits), sanitizers, summaries) == (6, 2, 3)
    sanitizing = int(re.search(r'step "\$1" (\d+) ', text)[1])
    summarizing = int(re.search(r"timeout (\d+) ", text)[1])
    assert sum(limits) + sanitizers * sanitizing + summaries * summarizing <= 8 * 60


# The table and the choices that follow from it -----------------------------------------------


def tuned(
    workload: str, dtype: str, density: float, factor: float = 1.0, **milliseconds: float
) -> list[Row]:
    """Rows of one workload: the backward takes so many milliseconds, the forward `factor`."""
    names = {
        "baseline": peers.BASELINE_KERNEL,
        "scatter": tune.SCATTER,
        "fixed": tune.FIXED,
        "compiled": "compiled",
        "triton": "triton",
    }
    return [
        {
            "workload": workload,
            "dtype": dtype,
            "contestant": names[name],
            "points_per_row": density,
            "reason": None,
            "seconds": {
                "forward": factor * 1e-3,
                "backward": ms * 1e-3,
                "forward_backward": (ms + factor) * 1e-3,
            },
        }
        for name, ms in milliseconds.items()
    ]


TUNED = [
    *tuned("encoder", "f32", 16, baseline=40, scatter=4, fixed=8, compiled=5, triton=6),
    *tuned("decoder", "f32", 0.2, baseline=2, scatter=1, fixed=9, compiled=1, triton=1.5),
    *tuned("encoder", "bf16", 16, baseline=40, scatter=6, fixed=9, compiled=6, triton=3),
    *tuned("decoder", "bf16", 0.2, baseline=2, scatter=1, fixed=9, compiled=1, triton=0.5),
]


def test_the_table_gives_the_constants() -> None:
    scatter, fixed = tune.choose_backward(TUNED)
    assert scatter.endswith(
        "kScatter in place of the choice would be faster on: encoder f32 (1.25x)"
    )
    assert fixed.endswith("takes 1.50x to 9.00x the time of the choice (most: decoder f32)")
    backend, fused = tune.choose_backend(TUNED)
    mean = math.prod([7 / 6, 2.5 / 2, 4 / 7, 1.5 / 2]) ** 0.25
    assert f"triton, compiled; triton takes {mean:.2f}x the time of compiled" in backend
    assert "is faster on: encoder bf16 (1.75x), decoder bf16 (1.33x)" in backend
    assert fused.endswith("not measured")
    _, backward, _ = tune.against_baseline(TUNED)
    assert backward == "backward: compiled is 2.00x to 8.00x as fast as the baseline"


def test_the_table_is_measured_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU the contestants are the chosen kernels, without and with fusion; then a fault."""
    monkeypatch.setattr(tune, "NAMES", ("rfdetr_train",))
    monkeypatch.setattr(tune, "CONTESTANTS", (peers.BASELINE_KERNEL, "compiled"))
    monkeypatch.setattr(tune, "FUSED", ("compiled",))
    monkeypatch.setattr(tune, "DTYPES", {"f32": torch.float32, "bf16": torch.bfloat16})
    command = ["--device", "cpu", "--scale", "0.1", "--seconds", "0", "--out", str(tmp_path)]
    assert tune.main(command) == 0
    rows = json.loads((tmp_path / "tune.json").read_text())["rows"]
    assert [(row["contestant"], "seconds" in row) for row in rows] == 2 * [
        *((peers.BASELINE_KERNEL, False), ("compiled", True), ("compiled fused", True))
    ]
    assert "rfdetr_train*0.1 f32 forward: compiled " in capsys.readouterr().out
    assert tune.main([str(tmp_path / "tune.json")]) == 0

    right = peers.PEERS["compiled"]
    monkeypatch.setitem(peers.PEERS, "compiled", lambda *a: lambda x: right(*a)(x) * 1.01)
    assert tune.main(command) == 1
    assert "compiled: output is off by 1.0e-02" in capsys.readouterr().out


# The kernels by name -------------------------------------------------------------------------

INPUTS = (
    "Tensor value, Tensor? spatial_shapes, Tensor? level_start_index, Tensor sampling_locations, "
    "Tensor attention_weights, int[]? level_sizes, int[]? num_points"
)


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
@pytest.mark.skipif(hasattr(torch.ops.deform_attn, "ms_deform_attn_by"), reason="the real one is")
@pytest.mark.parametrize("name", peers.KERNELS)
def test_kernels_by_name_are_contestants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The private operators of the CUDA library, here computed by the emulated kernels."""
    used = []

    def forward(algorithm: str, *inputs: Any) -> torch.Tensor:
        used.append(algorithm)
        return Emulated().forward(*inputs[:5], inputs[6], baseline=algorithm == "baseline")

    def backward(
        algorithm: str, grad_output: torch.Tensor, *inputs: Any
    ) -> tuple[torch.Tensor, ...]:
        used.append(algorithm)
        return Emulated().backward(grad_output, *inputs[:5], inputs[6], algorithm=algorithm)

    library = torch.library.Library("deform_attn", "FRAGMENT")
    library.define(f"ms_deform_attn_by(str algorithm, {INPUTS}) -> Tensor")
    library.define(
        f"ms_deform_attn_by_backward(str algorithm, Tensor grad_output, {INPUTS}) -> "
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
        assert set(used) == {peers.KERNELS[name]}
        with pytest.raises(peers.Missing, match="does not run on cpu"):
            peers.PEERS[name](small, "cpu")
    finally:
        library._destroy()


def row(contestant: str, seconds: float, **fields: Any) -> Row:
    times = {phase: [seconds, 1.1 * seconds] for phase in measure.PHASES}
    call = {"workload": "w", "batch": 1, "device": "cuda", "threads": 1, "dtype": "f32"}
    return call | {"contestant": contestant, "status": "ok", "times": times} | fields


def test_the_page_compares_kernels_and_backends(tmp_path: Path) -> None:
    """With times that are easy to compare by hand."""
    rows = [
        row("compiled", 2e-3),
        row("triton", 1e-3),  # twice as fast as what is chosen
        row("baseline kernel", 8e-3),
        row("compiled, scatter", 2e-3),
        row("compiled, fixed", 4e-3),
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
    triton, scatter, fixed = summary.verdicts(rows)
    assert triton.endswith(": w f32 (2.00x)")
    assert scatter.endswith(": nowhere")
    assert fixed.endswith(": nowhere")

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
