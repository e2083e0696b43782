"""The emulator finds planted faults, and none in the shipped kernels."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.simt import build

SANITIZERS = {
    "plain": ("-Og",),
    "asan_ubsan": ("-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "tsan": ("-O1", "-g1", "-fsanitize=thread"),
}
# fault -> the build that finds it, and parts of its report
FAULTS = {
    "missing_barrier": ("tsan", "data race", "in selftest::missing_barrier"),
    "missing_warp_barrier": ("tsan", "data race", "in selftest::missing_warp_barrier"),
    "non_atomic_add": ("tsan", "data race", "in selftest::non_atomic_add"),
    "non_atomic_add_of_blocks": ("tsan", "data race", "in selftest::non_atomic_add"),
    "out_of_bounds_read": ("asan_ubsan", "heap-buffer-overflow", "in selftest::out_of_bounds_read"),
    "out_of_bounds_shared": ("asan_ubsan", "selftest.h", "index 64 out of bounds"),
    "divergent_barrier": ("plain", "selftest::divergent_barrier", "waits at __syncthreads"),
    "divergent_lanes": ("plain", "selftest::divergent_lanes", "wait at __ballot_sync"),
    "lane_left_early": ("plain", "selftest::lane_left_early", "waits at __shfl_xor_sync"),
    "lane_outside_its_mask": ("plain", "selftest::lane_outside_its_mask", "not in its own mask"),
}


@cache
def program(sanitizer: str) -> Path:
    return build.compiled("sanitized.cpp", f"{sanitizer}", "-rdynamic", *SANITIZERS[sanitizer])


def run(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, ASAN_OPTIONS="detect_leaks=0")
    return subprocess.run(
        [str(program(sanitizer)), *arguments],
        capture_output=True,
        text=True,
        timeout=1800,
        env=environment,
    )


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("order", [(), ("--reversed",)], ids=["forward", "reversed"])
def test_abilities(sanitizer: str, order: tuple[str, ...]) -> None:
    done = run(sanitizer, *order, "able")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault: str) -> None:
    sanitizer, *words = FAULTS[fault]
    sound = run(sanitizer, f"ok:{fault}")
    assert sound.returncode == 0, sound.stderr
    assert sound.stderr == ""
    faulty = run(sanitizer, fault)
    assert faulty.returncode != 0
    for word in words:
        assert word in faulty.stderr, faulty.stderr


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_have_no_fault(sanitizer: str) -> None:
    """Every kernel on hostile calls: no report, and the results of the baseline kernels."""
    done = run(sanitizer, "kernels")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, *rest = done.stdout.splitlines()
    assert first == "10 cases"
    reached = {name: int(count) for count, name in (line.split() for line in rest)}
    assert set(reached) == build.declared_kernels()
    print(f"{sanitizer}: cases that reach each kernel: {reached}")
