"""The CUDA library with its host code, torch's dispatcher and torch's guards, on two GPUs.

They are emulated: see two_gpus.cpp. Of the first one's tensors nothing runs on the second, and the
other way round; launches depend on the GPU that the tensors are on, not on the current one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.simt import build

pytestmark = [
    pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not())),
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has CUDA of its own"),
]


@cache
def library() -> Path:
    include = Path(torch.__file__).parent / "include"
    return build.compiled(
        "two_gpus.cpp",
        "two_gpus.so",
        *("-O1", "-fPIC", "-shared", "-Wno-attributes"),
        *('-DDEFORM_ATTN_VERSION=""', '-DDEFORM_ATTN_TORCH=""'),
        *(f"-isystem{path}" for path in (include, include / "torch/csrc/api/include")),
    )


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.simt.two_gpus", str(library())]
    return subprocess.run(
        command,
        cwd=build.ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )


def test_tensors_run_on_their_own_gpu() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    ran = [line for line in lines if line[0] != "refused:"]
    assert len(ran) == 20
    assert [line[1] for line in lines if line[0] == "refused:"] == [
        "sampling_locations",
        "attention_weights",
    ]
    # the first GPU has capability 9.0, the second 8.0, where the gradient of value is gathered
    kernels = {
        device: {tuple(line[3:]) for line in ran if line[:3:2] == ["non_square", device]}
        for device in ("cuda:0", "cuda:1")
    }
    assert all(kernels.values())
    assert all("backward_gather" not in found for found in kernels["cuda:0"])
    assert all("backward_gather" in found for found in kernels["cuda:1"])


def test_a_forgotten_device_is_found() -> None:
    done = run(SIMT_STUCK="1")
    assert done.returncode != 0
    assert "expected launches on GPU 1, got {(0, 1)}" in done.stderr
