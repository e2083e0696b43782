"""The Triton kernels compiled for GPUs that are not here: no spills, the instructions they were
written for, and no compilation that a new image size brings about.

Compiling happens in processes of its own: where the other tests interpret Triton, this one cannot.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gates.triton_kernels import AMD, MOST_AMD_REGISTERS, MOST_REGISTERS
from deform_attn import backends
from deform_attn.backends import triton_launcher

pytest.importorskip("triton", reason="triton is not installed: there is nothing to compile")

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (75, 80, 86, 90, 100, 120)
ODD: dict[str, Any] = {"head_dim": 71, "counts": (3, 6, 0)}

# What is compiled: kernel, architecture, dtype, shape.
Kernel = tuple[str, int, str, dict[str, Any]]
EVERYWHERE: list[Kernel] = [
    (name, architecture, dtype, {})
    for architecture in ARCHITECTURES
    for name, dtype in (("forward", "f32"), ("backward", "f16"))
]
SHAPES: list[Kernel] = [
    ("forward", 75, "bf16", {"reference": (4, 2)}),
    ("forward", 100, "f16", {"reference": (4, 2)}),
    ("backward", 75, "bf16", {"reference": (4, 2)}),
    ("backward", 90, "f32", {"reference": (4, 2)}),
    ("forward", 90, "f16", {"queries": 300}),
    ("forward", 90, "f32", {"head_dim": 1}),
    ("forward", 90, "f16", {**ODD, "wide": True, "levels_on_device": True}),
    ("forward", 90, "f32", {"reference": (1, 4)}),
    ("backward", 90, "f32", {**ODD, "wide": True}),
    ("backward", 90, "f32", {"reference": (1, 4)}),
    ("forward", 90, "f32", {"reference": (1, 6), "masked": True}),
    ("backward", 90, "f32", {"reference": (4, 6), "masked": True}),
    ("backward", 86, "f16", {"deterministic": True}),
    ("backward", 90, "bf16", {"deterministic": True}),
    ("backward", 100, "f32", {"deterministic": True, "reference": (4, 2)}),
    ("add_up_rows", 90, "bf16", {}),
]
# AMD: wavefronts of 64 threads and of 32.
AMD_KERNELS: list[Any] = [
    (name, architecture, dtype, shape)
    for architecture in AMD
    for name, dtype, shape in (
        ("forward", "f16", {}),
        ("backward", "f32", {"reference": (4, 2)}),
        ("backward", "bf16", {"deterministic": True}),
    )
]
TOO_LARGE: Kernel = ("forward", 90, "f32", {"head_dim": 128, "blocks": (32, 128, 1)})

COMPILE = """
import dataclasses, json, multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from benchmarks.gates.triton_kernels import compile_kernel
from deform_attn.backends.triton_launcher import Blocks

def compile(kernel):
    name, architecture, dtype, shape = kernel
    for field in {"counts", "reference"} & set(shape):
        shape[field] = tuple(shape[field])
    if "blocks" in shape:
        shape["blocks"] = Blocks(*shape["blocks"])
    return dataclasses.asdict(compile_kernel(name, architecture, dtype, **shape))

if __name__ == "__main__":
    # forked: other processes cannot import a function of this text (the default from Python 3.14)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        json.dump(list(pool.map(compile, json.load(sys.stdin))), sys.stdout)
"""

# Every launch of the backend goes to the compiler of a GPU that only says what it is.
COUNT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from deform_attn.backends import _triton_kernels, triton_launcher

TARGET = GPUTarget(*TARGET)

class Device:
    def get_current_target(self): return TARGET
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

def compile(kernel, programs, device, *arguments, blocks, **constants):
    options = triton_launcher.launch_options(blocks, triton_launcher._target().options)
    getattr(_triton_kernels, kernel).warmup(*arguments, grid=(programs,), **constants, **options)

driver.set_active(Device())
triton_launcher._run = compile
triton_launcher.why_not = lambda device_type, dtype: None
for levels, queries, heads in (
    ([(8, 6), (4, 3)], 300, 8),
    ([(16, 1), (1, 1)], 1, 1),
    ([(32, 48), (3, 2)], 16, 7),
):
    B, S, D, P = 2, sum(h * w for h, w in levels), 32, 4
    value = torch.zeros(B, S, heads, D)
    locations = torch.zeros(B, queries, heads, len(levels), P, 2)
    levels = [side for level in levels for side in level]
    inputs = value, None, None, locations, locations[..., 0], levels, None
    output = triton_launcher.forward(*inputs)
    triton_launcher.backward(output, *inputs, False, [True] * 3)
for name in "forward", "backward":
    print(name, len(getattr(_triton_kernels, name).device_caches[0][0]))
"""


def python(script: str, stdin: str = "") -> str:
    """What a script prints that runs where Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=stdin,
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def label(kernel: Kernel) -> str:
    name, architecture, dtype, shape = kernel
    gpu = f"sm_{architecture}" if isinstance(architecture, int) else architecture
    return f"{name} {dtype} {gpu} {shape or ''}".strip()


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    kernels = [*EVERYWHERE, *SHAPES, TOO_LARGE, *AMD_KERNELS]
    figures = json.loads(python(COMPILE, json.dumps(kernels)))
    return dict(zip(map(label, kernels), figures, strict=True))


@pytest.mark.parametrize("kernel", EVERYWHERE + SHAPES, ids=label)
def test_no_spills(kernel: Kernel, compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled[label(kernel)]["spills"] == 0


@pytest.mark.parametrize(
    "kernel", [k for k in EVERYWHERE + SHAPES if "head_dim" not in k[3]], ids=label
)
def test_registers(kernel: Kernel, compiled: dict[str, dict[str, Any]]) -> None:
    most = MOST_REGISTERS[kernel[0]]
    if kernel[3].get("masked"):
        most = max(most, 80)
    assert compiled[label(kernel)]["registers"] <= most


@pytest.mark.parametrize("kernel", AMD_KERNELS, ids=label)
def test_amd(kernel: Kernel, compiled: dict[str, dict[str, Any]]) -> None:
    figures = compiled[label(kernel)]
    assert figures["spills"] == 0
    assert figures["registers"] <= MOST_AMD_REGISTERS
    assert figures["lanes"] == (64 if figures["architecture"].startswith("gfx9") else 32)


def test_spills_would_be_seen(compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled[label(TOO_LARGE)]["spills"] > 0


@pytest.mark.parametrize("kernel", EVERYWHERE + SHAPES, ids=label)
def test_no_float64(kernel: Kernel, compiled: dict[str, dict[str, Any]]) -> None:
    """It takes 32 or 64 times as long on most GPUs, and is what the interpreter has for fma."""
    assert ".f64" not in compiled[label(kernel)]["ptx"]


@pytest.mark.parametrize("kernel", EVERYWHERE, ids=label)
def test_loads_are_wide(kernel: Kernel, compiled: dict[str, dict[str, Any]]) -> None:
    name, architecture, dtype, _ = kernel
    if name == "backward" and architecture < 90:
        # a thread takes the one channel that it can add to
        assert compiled[label(kernel)]["ptx"].count("ld.global.b16") >= 4
        return
    four_channels = name == "backward" and dtype != "f32"
    load = "ld.global.v2.b32" if four_channels else "ld.global.v4.b32"
    assert compiled[label(kernel)]["ptx"].count(load) >= 4


@pytest.mark.parametrize("kernel", [k for k in EVERYWHERE if k[0] == "backward"], ids=label)
def test_additions_are_as_wide_as_they_get(
    kernel: Kernel, compiled: dict[str, dict[str, Any]]
) -> None:
    figures = compiled[label(kernel)]
    assert ("add.v4.f32" in figures["ptx"]) == (figures["architecture"] >= 90)
    assert figures["shared"] == 0


def test_deterministic_has_no_atomics(compiled: dict[str, dict[str, Any]]) -> None:
    for kernel in SHAPES:
        if kernel[0] == "add_up_rows" or "deterministic" in kernel[3]:
            ptx = compiled[label(kernel)]["ptx"]
            assert "atom." not in ptx
            assert "red." not in ptx


@pytest.mark.parametrize(
    "target", [("cuda", 90, 32), ("hip", "gfx942", 64)], ids=lambda target: target[0]
)
def test_sizes_do_not_compile_anew(target: tuple[str, int | str, int]) -> None:
    """With the options of a launch that the backend knows: one that it does not is an error."""
    assert python(f"TARGET = {target}" + COUNT).split() == ["forward", "1", "backward", "1"]


def test_unknown_options_are_left_out() -> None:
    blocks = triton_launcher.Blocks(queries=16, channels=32, warps=4, registers=64)
    known = frozenset({"num_warps", "maxnreg", "num_stages"})
    assert triton_launcher.launch_options(blocks, known) == {"num_warps": 4, "maxnreg": 64}
    assert triton_launcher.launch_options(blocks, known - {"maxnreg"}) == {"num_warps": 4}


class Driver:
    """What a device module and Triton tell of a machine."""

    def __init__(self, name: str | None) -> None:
        self.name = name

    def is_available(self) -> bool:
        return True

    def target(self) -> triton_launcher.Target:
        if self.name is None:
            raise RuntimeError("0 active drivers")
        return triton_launcher.Target(self.name, 64, False, frozenset({"num_warps"}))


@pytest.mark.parametrize(
    ("device", "hip", "driver", "reason"),
    [
        ("cuda", None, "cuda", None),
        ("cuda", "6.4", "hip", None),
        ("xpu", None, "xpu", None),
        ("cuda", "6.4", "cuda", "Triton's driver is for cuda, expected hip for PyTorch's cuda"),
        ("xpu", None, None, "Triton finds no driver for xpu: 0 active drivers"),
    ],
)
def test_where_it_launches(
    device: str,
    hip: str | None,
    driver: str | None,
    reason: str | None,
    monkeypatch: Any,
    caplog: Any,
) -> None:
    """ROCm calls its devices "cuda". A fallback to the reference is logged with its reason."""
    machine = Driver(driver)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch, "get_device_module", lambda _: machine)
    monkeypatch.setattr(triton_launcher, "_target", machine.target)
    monkeypatch.setattr(triton_launcher, "_WHY_NOT_LAUNCHED", {})
    monkeypatch.setitem(backends.compiled._REASONS, device, "not built")
    monkeypatch.setattr(backends, "_announced", set())
    chosen = backends.choose_backend(device)
    if reason is None:
        assert chosen.name == "triton"
    else:
        assert chosen.name == "reference"
        assert reason in caplog.text
        with pytest.raises(RuntimeError, match="requested but cannot run"):
            backends.choose_backend(device, backend="triton")
