"""The CUDA library with its host code, torch's dispatcher and torch's guards, on two GPUs.

They are emulated: see two_gpus.cpp. A call runs on the GPU of its tensors, whichever is current.
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
    kernels = {
        device: {tuple(line[3:]) for line in ran if line[:3:2] == ["non_square", device]}
        for device in ("cuda:0", "cuda:1")
    }
    assert all(kernels.values())
    assert kernels["cuda:0"] == kernels["cuda:1"]
    assert all("backward_gather" not in found for found in kernels["cuda:0"])


def test_a_forgotten_device_is_found() -> None:
    done = run(SIMT_STUCK="1")
    assert done.returncode != 0
    assert "expected launches on GPU 1, got {(0, 1)}" in done.stderr
