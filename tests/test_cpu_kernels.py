"""The CPU kernels without torch: under sanitizers, and what the compiler makes of their loops."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "build_tools"))

from libraries import CXX_FLAGS, INSTRUCTION_SETS  # noqa: E402
from toolchain import find_cxx  # noqa: E402

FLAGS = INSTRUCTION_SETS.get(platform.machine(), INSTRUCTION_SETS["other"])
KERNELS = {
    "kernels_portable.cpp": "kPortable",
    "kernels_avx2.cpp": "kAvx2",
    "kernels_avx512.cpp": "kAvx512",
}
SANITIZERS = {
    # Left out is what takes the compiler minutes: stack arrays, which the bounds check sees, and
    # checks of each pointer, which AddressSanitizer makes by what lies there.
    "address,undefined": (
        "-fsanitize=address,undefined -fno-sanitize-recover=undefined --param asan-stack=0"
        " -fno-sanitize-address-use-after-scope"
        " -fno-sanitize=null,alignment,object-size,vptr,pointer-overflow"
    ),
    "thread": "-fsanitize=thread",
}


def can_run(file: str) -> bool:
    """Whether this processor has the instructions."""
    supported = {
        "kernels_avx2.cpp": torch.cpu._is_avx2_supported,
        "kernels_avx512.cpp": torch.cpu._is_avx512_supported,
    }
    return supported.get(file, lambda: True)()


# Threads share the same things whatever the instructions.
PROGRAMS = [("address,undefined", file) for file in FLAGS if can_run(file)]
PROGRAMS += [("thread", "kernels_portable.cpp")]


def compiled(*arguments: str) -> str:
    """Calls the compiler as a build of the package does; returns what it prints."""
    done = subprocess.run(
        [*find_cxx(), *CXX_FLAGS, "-Icsrc", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("sanitizer", "file"), PROGRAMS)
def test_kernels_run_clean(tmp_path: Path, sanitizer: str, file: str) -> None:
    program = tmp_path / "cpu_kernels"
    compiled(
        *("-O1", "-g1", "-pthread", f"-DDEFORM_ATTN_KERNELS={KERNELS[file]}", *FLAGS[file].split()),
        *SANITIZERS[sanitizer].split(),
        *("tests/cpu_kernels.cpp", f"csrc/cpu/{file}", "-o", str(program)),
    )
    done = subprocess.run([program], capture_output=True, text=True, timeout=1800)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("10 cases\n")

    # and would not, were there something to find
    fault, report = ("twice", "data race") if sanitizer == "thread" else ("short", "heap-buffer-")
    done = subprocess.run([program, fault], capture_output=True, text=True, timeout=1800)
    assert done.returncode != 0
    assert report in done.stderr


# Chosen by hand ----------------------------------------------------------------------------------

NAMES = {
    "kernels_portable.cpp": "portable",
    "kernels_avx2.cpp": "AVX2",
    "kernels_avx512.cpp": "AVX-512",
}
CALL = """
import sys, torch, deform_attn
from deform_attn.backends import compiled
torch.manual_seed(0)
value, locations = torch.randn(2, 50, 2, 20), torch.rand(2, 7, 2, 2, 3, 2)
weights = torch.rand(2, 7, 2, 2, 3)
inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
shapes, starts = torch.tensor([[5, 6], [4, 5]]), torch.tensor([0, 30])
output = deform_attn.ms_deform_attn(value, shapes, starts, locations, weights, backend="compiled")
output.square().sum().backward()
torch.save([output.detach(), *(tensor.grad for tensor in inputs)], sys.argv[1])
print(compiled.build_facts("cpu")["instruction_set"])
"""


def test_every_instruction_set_can_be_forced_and_agrees(tmp_path: Path) -> None:
    results = []
    for file in filter(can_run, FLAGS):
        command = [sys.executable, "-c", CALL, str(tmp_path / file)]
        done = subprocess.run(
            command,
            env=os.environ | {"DEFORM_ATTN_CPU": NAMES[file]},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (0, NAMES[file] + "\n"), done.stderr
        results.append(torch.load(tmp_path / file))
    for result in results[1:]:
        for tensor, first in zip(result, results[0]):
            assert (tensor - first).abs().max() <= 1e-5 * first.abs().max()


def test_an_instruction_set_that_is_not_here_is_refused() -> None:
    command = [sys.executable, "-c", CALL, "/dev/null"]
    done = subprocess.run(
        command, env=os.environ | {"DEFORM_ATTN_CPU": "AVX3"}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "DEFORM_ATTN_CPU: expected one of" in done.stderr


# The innermost loops ------------------------------------------------------------------------------

# Instructions of a sampling point with 32 channels, as GCC 12 makes them: with a third more, sums
# have moved to the stack, or a call has slipped in. (forward, backward)
INSTRUCTIONS = {
    "kernels_avx512.cpp": {"float": (44, 116), "Half": (44, 110), "BFloat16": (44, 109)},
    "kernels_avx2.cpp": {"float": (52, 151), "Half": (60, 150), "BFloat16": (68, 160)},
}
VECTORS = {"kernels_avx512.cpp": 2, "kernels_avx2.cpp": 4}  # of a row


@cache
def loops(file: str) -> dict[str, list[str]]:
    """The instructions of the longest loop of each function in cpu_loops.cpp."""
    text = compiled(*FLAGS[file].split(), "-S", "-o", "-", "tests/cpu_loops.cpp")
    found: dict[str, list[str]] = {}
    for name, body in re.findall(
        r"^((?:for|back)ward_\w+):\n(.*?)\.cfi_endproc", text, re.M | re.S
    ):
        lines = [line.strip() for line in body.splitlines()]
        labels = {line[:-1]: at for at, line in enumerate(lines) if re.match(r"\.L\w+:$", line)}
        jumps = [(at, re.match(r"j\w+\s+(\.L\w+)", line)) for at, line in enumerate(lines)]
        starts = [(labels.get(jump[1], at), at) for at, jump in jumps if jump]
        start, end = max(starts, key=lambda loop: loop[1] - loop[0])
        code = [line for line in lines[start : end + 1] if line and line[0] not in ".#"]
        found[name] = code
    return found


@pytest.mark.parametrize("dtype", ["float", "Half", "BFloat16"])
@pytest.mark.parametrize("file", [file for file in INSTRUCTIONS if file in FLAGS])
def test_instructions_of_a_point(file: str, dtype: str) -> None:
    for part, name in enumerate(("forward", "backward")):
        code = loops(file)[f"{name}_{dtype}"]
        multiply_adds = sum("fmadd" in line for line in code)
        assert multiply_adds == 4 * VECTORS[file] * (1 + part)  # nothing is computed twice
        assert len(code) <= 1.3 * INSTRUCTIONS[file][dtype][part], "\n".join(code)
        assert not [line for line in code if line.startswith("call")]
        stack = [line for line in code if re.search(r"\(%r[sb]p", line)]
        assert len(stack) <= 4, "\n".join(stack)  # a pointer or two
