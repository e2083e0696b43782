"""The CPU kernels without torch: under sanitizers, on an emulated processor, and their inner loops.

Each test names the instruction sets that it needs. On a machine that cannot run or compile for one,
that test is skipped with the reason, so the same file passes on every processor:

    x86_64    AVX-512 and AVX2 are compiled for everywhere, and run where the processor has them
    aarch64   natively on ARM; elsewhere with aarch64-linux-gnu-g++ and qemu-aarch64, if they are on
              PATH (Debian: g++-aarch64-linux-gnu, qemu-user)
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

import deform_attn
from deform_attn.backends import compiled as backend

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "build_tools"))

from libraries import CXX_FLAGS, INSTRUCTION_SETS  # noqa: E402
from toolchain import find_cxx  # noqa: E402

MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}.get(
    platform.machine().lower(), platform.machine().lower()
)


@dataclass(frozen=True)
class InstructionSet:
    """The kernels of one instruction set."""

    name: str  # as DEFORM_ATTN_CPU takes it
    machine: str  # that it belongs to
    file: str  # in csrc/cpu
    symbol: str  # the object of type Kernels

    @property
    def flags(self) -> list[str]:
        """The compiler's options."""
        files = INSTRUCTION_SETS.get(self.machine, INSTRUCTION_SETS["other"])
        return files[self.file].split()

    def why_not(self) -> str | None:
        """Why this processor cannot run them, or None."""
        if self.machine != MACHINE:
            return f"{self.name} is an instruction set of {self.machine}, this is {MACHINE}"
        facts = backend.build_facts("cpu")
        assert facts is not None, backend.why_not("cpu", torch.float32)
        usable = facts["instruction_sets"].split(", ")
        return None if self.name in usable else f"this processor lacks {self.name}"


PORTABLE = InstructionSet("portable", MACHINE, "kernels_portable.cpp", "kPortable")
AVX2 = InstructionSet("AVX2", "x86_64", "kernels_avx2.cpp", "kAvx2")
AVX512 = InstructionSet("AVX-512", "x86_64", "kernels_avx512.cpp", "kAvx512")
NEON = InstructionSet("NEON", "aarch64", "kernels_portable.cpp", "kPortable")


def run_or_skip(instructions: InstructionSet) -> None:
    """Skips a test that runs the kernels of another processor."""
    if reason := instructions.why_not():
        pytest.skip(reason)


def compiler_for(machine: str) -> list[str]:
    """The C++ compiler for a machine; skips the test where there is none."""
    if machine == MACHINE:
        return find_cxx()
    name = f"{machine}-linux-gnu-g++"
    if shutil.which(name) is None:
        pytest.skip(f"no compiler for {machine} here: {name} is not on PATH")
    return [name]


def compile_with(cxx: Sequence[str], *arguments: str) -> str:
    """Calls a compiler as a build of the package does; returns what it prints."""
    done = subprocess.run(
        [*cxx, *CXX_FLAGS, "-Icsrc", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Values, without torch ----------------------------------------------------------------------------

SANITIZERS = {
    # Without the checks that take the compiler minutes: stack arrays, which the bounds check
    # covers, and each pointer, which AddressSanitizer covers.
    "address,undefined": (
        "-fsanitize=address,undefined -fno-sanitize-recover=undefined --param asan-stack=0"
        " -fno-sanitize-address-use-after-scope"
        " -fno-sanitize=null,alignment,object-size,vptr,pointer-overflow"
    ),
    "thread": "-fsanitize=thread",
}


def build_program(
    cxx: Sequence[str], instructions: InstructionSet, program: Path, *flags: str
) -> None:
    """Compiles tests/cpu_kernels.cpp with the kernels."""
    compile_with(
        cxx,
        *("-pthread", f"-DDEFORM_ATTN_KERNELS={instructions.symbol}", *instructions.flags, *flags),
        *("tests/cpu_kernels.cpp", f"csrc/cpu/{instructions.file}", "-o", str(program)),
    )


@pytest.mark.parametrize(
    ("sanitizer", "instructions"),
    [
        pytest.param("address,undefined", AVX512, id="address-AVX-512"),
        pytest.param("address,undefined", AVX2, id="address-AVX2"),
        pytest.param("address,undefined", PORTABLE, id="address-portable"),
        # what threads share does not depend on the instruction set
        pytest.param("thread", PORTABLE, id="thread-portable"),
    ],
)
def test_kernels_run_clean(tmp_path: Path, sanitizer: str, instructions: InstructionSet) -> None:
    run_or_skip(instructions)
    program = tmp_path / "cpu_kernels"
    flags = ("-Og", "-g1", *SANITIZERS[sanitizer].split())
    build_program(find_cxx(), instructions, program, *flags)
    done = subprocess.run([program], capture_output=True, text=True, timeout=1800)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("11 cases\n")

    # the sanitizer reports a fault where there is one
    fault, report = ("twice", "data race") if sanitizer == "thread" else ("short", "heap-buffer-")
    done = subprocess.run([program, fault], capture_output=True, text=True, timeout=1800)
    assert done.returncode != 0
    assert report in done.stderr


def test_kernels_on_an_emulated_arm_processor(tmp_path: Path) -> None:
    """The first ARMv8 processor, without any extension, and one with all that qemu has."""
    cxx = compiler_for("aarch64")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None and MACHINE != "aarch64":
        pytest.skip("no emulator for aarch64 here: qemu-aarch64 is not on PATH")
    program = tmp_path / "cpu_kernels"
    build_program(cxx, NEON, program, "-static")
    runs = [[emulator, "-cpu", cpu] for cpu in ("cortex-a53", "max")] if emulator else [[]]
    for command in runs:
        done = subprocess.run([*command, program], capture_output=True, text=True, timeout=1800)
        assert (done.returncode, done.stderr) == (0, ""), command
        assert done.stdout.endswith("11 cases\n")


# Kept memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kept_blocks_under_sanitizers(tmp_path: Path, sanitizer: str) -> None:
    program = tmp_path / "blocks"
    flags = (*SANITIZERS[sanitizer].split(), "-g", "-O1", "-pthread")
    compile_with(find_cxx(), *flags, "tests/cpu_blocks.cpp", "-o", str(program))
    environment = os.environ | {
        "ASAN_OPTIONS": "allocator_may_return_null=1",
        "TSAN_OPTIONS": "allocator_may_return_null=1",
    }
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_results_that_are_in_use_are_not_overwritten() -> None:
    """Large results are in blocks of memory that later calls get again; here all stay in use."""
    torch.manual_seed(0)
    sizes, starts = [(64, 80), (20, 30)], [0, 5120]
    value = torch.randn(1, 5720, 4, 16).requires_grad_()  # 1.4 MB
    locations = torch.rand(1, 5720, 4, 2, 1, 2)
    weights = torch.rand(1, 5720, 4, 2, 1)
    results, expected = [], []
    for scale in range(1, 5):
        output = deform_attn.ms_deform_attn(
            value, sizes, starts, locations, weights * scale, backend="compiled"
        )
        (gradient,) = torch.autograd.grad(output.sum(), value)
        if scale == 1:
            first = [output.detach().clone(), gradient.clone()]
        if scale < 4:
            results += [output.detach(), gradient]
            expected += [tensor * scale for tensor in first]
        del output, gradient  # the blocks of the last round are free
    for tensor, right in zip(results, expected, strict=True):
        torch.testing.assert_close(tensor, right)
    assert len({tensor.data_ptr() for tensor in results}) == len(results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_of_a_16_bit_gradient_larger_than_a_cache(
    dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    """They are those of float32, rounded once; a few heads at a time, or in bands of rows."""
    torch.manual_seed(0)
    value = torch.randn(1, 6000, 4, 32).to(dtype)  # 3 MB of sums
    locations = torch.rand(1, 50, 4, 1, 16, 2) * 1.2 - 0.1
    weights, grad_output = torch.rand(1, 50, 4, 1, 16).to(dtype), torch.randn(1, 50, 128).to(dtype)

    def gradients(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *inputs, grad = (tensor.detach().requires_grad_() for tensor in tensors)
        value, locations, weights = inputs
        output = deform_attn.ms_deform_attn(
            value, [(60, 100)], None, locations, weights, backend="compiled"
        )
        return torch.autograd.grad(output, inputs, grad)

    expected = gradients(value.float(), locations, weights.float(), grad_output.float())
    for count in (1, 2, 3, 5):
        set_threads(count)
        for _ in range(2):  # the second one gets the sums of the first
            got = gradients(value, locations, weights, grad_output)
            assert torch.equal(got[0], expected[0].to(dtype))


# Prints whether the second result has the memory of the first, which no other tensor got.
KEPT = """
import torch, deform_attn
value = torch.rand(1, 5720, 4, 16)
locations, weights = torch.rand(1, 5720, 4, 1, 1, 2), torch.ones(1, 5720, 4, 1, 1)

def call():
    arguments = value, [(65, 88)], [0], locations, weights
    return deform_attn.ms_deform_attn(*arguments, backend="compiled")

output = call()
place, part, expected = output.data_ptr(), output[0, 1], output[0, 1].clone()
del output
assert call().data_ptr() != place  # a view holds it
call().zero_()
assert torch.equal(part, expected)
del part
others = [torch.empty_like(value) for _ in range(4)]
print(call().data_ptr() == place)
"""


@pytest.mark.parametrize("megabytes", ["", "2", "0", "-1", "1 GB"])
def test_the_memory_of_a_freed_result_is_used_again(megabytes: str) -> None:
    """With torch 2.11 or later on Linux; elsewhere results are torch's allocations."""
    environment = os.environ | {"DEFORM_ATTN_KEEP_MB": megabytes}
    command = [sys.executable, "-c", KEPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    keeps = sys.platform == "linux" and TorchVersion(torch.__version__) >= "2.11"
    if keeps and megabytes in ("-1", "1 GB"):
        assert "DEFORM_ATTN_KEEP_MB: expected a number from 0" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{keeps and megabytes != '0'}\n"


# The second call sums in the block of the first, which is larger than the first one needed.
SUMS = """
import torch, deform_attn

def gradient(height, dtype):
    torch.manual_seed(0)
    value = torch.randn(1, height * 50, 2, 32).to(dtype).requires_grad_()
    locations, weights = torch.rand(1, 9, 2, 1, 4, 2), torch.rand(1, 9, 2, 1, 4).to(dtype)
    arguments = value, [(height, 50)], [0], locations, weights
    deform_attn.ms_deform_attn(*arguments, backend="compiled").sum().backward()
    return value.grad.float()

gradient(90, torch.float16)
found, expected = gradient(150, torch.float16), gradient(150, torch.float32)
torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
"""


def test_sums_are_zeros_where_a_block_is_larger_than_the_first_call_needs() -> None:
    # glibc fills new memory with 71: as float32, 51015.28
    environment = os.environ | {"MALLOC_PERTURB_": str(0xFF ^ 71)}
    done = subprocess.run(
        [sys.executable, "-c", SUMS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# The choice of the instruction set ----------------------------------------------------------------

# The second call is an encoder whose value is larger than a cache.
CALL = """
import sys, torch, deform_attn
from deform_attn.backends import compiled
torch.manual_seed(0)
results = []
for heads, head_dim, points, sizes, queries in (
    (2, 20, 3, [(5, 6), (4, 5)], 7),
    (8, 32, 4, [(32, 33), (9, 10)], 1146),
):
    starts = [0, sizes[0][0] * sizes[0][1]]
    rows = starts[1] + sizes[1][0] * sizes[1][1]
    inputs = [
        torch.randn(2, rows, heads, head_dim),
        torch.rand(2, queries, heads, 2, points, 2),
        torch.rand(2, queries, heads, 2, points),
    ]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    output = deform_attn.ms_deform_attn(leaves[0], sizes, starts, *leaves[1:], backend="compiled")
    output.square().sum().backward()
    results += [output.detach(), *(tensor.grad for tensor in leaves)]
torch.save(results, sys.argv[1])
print(compiled.build_facts("cpu")["instruction_set"])
"""


def call_with(name: str, results: str) -> subprocess.CompletedProcess[str]:
    """CALL in a process of its own, with DEFORM_ATTN_CPU set."""
    environment = os.environ | {"DEFORM_ATTN_CPU": name}
    command = [sys.executable, "-c", CALL, results]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def portable_results(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    file = tmp_path_factory.mktemp("cpu") / "portable"
    done = call_with("portable", str(file))
    assert (done.returncode, done.stdout) == (0, "portable\n"), done.stderr
    results: list[torch.Tensor] = torch.load(file)
    return results


@pytest.mark.parametrize("instructions", [AVX512, AVX2], ids=lambda it: it.name)
def test_an_instruction_set_can_be_forced_and_agrees_with_the_portable_one(
    tmp_path: Path, instructions: InstructionSet, portable_results: list[torch.Tensor]
) -> None:
    run_or_skip(instructions)
    done = call_with(instructions.name.lower().replace("-", ""), str(tmp_path / "results"))
    assert (done.returncode, done.stdout) == (0, instructions.name + "\n"), done.stderr
    for tensor, expected in zip(torch.load(tmp_path / "results"), portable_results, strict=True):
        assert (tensor - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_unknown_instruction_set_is_an_error() -> None:
    done = call_with("AVX3", os.devnull)
    assert done.returncode != 0
    assert "DEFORM_ATTN_CPU: expected one of" in done.stderr


# The inner loops ----------------------------------------------------------------------------------

# Instructions per sampling point of 32 channels: (forward, backward), of GCC 12, where every cache
# line is prefetched. Other compilers differ by a tenth. A third more means that sums have moved to
# the stack, or that channels are computed one by one.
INSTRUCTIONS: dict[InstructionSet, dict[str, tuple[int, int]]] = {
    AVX512: {"float": (45, 106), "Half": (45, 119), "BFloat16": (45, 119)},
    AVX2: {"float": (53, 139), "Half": (61, 156), "BFloat16": (65, 160)},
    NEON: {"float": (91, 223), "Half": (107, 245), "BFloat16": (114, 245)},
}
VECTOR_BYTES = {AVX512: 64, AVX2: 32, NEON: 16}
JUMP = r"(?:j\w+|b\.?\w*|cbn?z|tbn?z)\s+(?:.*,\s*)?(\.L\w+)$"  # x86, aarch64
STACK = r"\(%r[sb]p|\[sp"
ALWAYS = r"(?:jmp|b)\s"  # a jump without a condition
LEAVES = r"(?:ret|ud2|brk)\b"
CALL_INSTRUCTION = r"(?:call|bl|blr)\b"


@cache
def loops(instructions: InstructionSet, *flags: str) -> dict[str, list[str]]:
    """What a point takes in each function of cpu_loops.cpp: an iteration of its longest loop."""
    if sys.platform != "linux":
        pytest.skip("the loops are read from the assembly of an ELF platform")
    cxx = compiler_for(instructions.machine)
    source = "tests/cpu_loops.cpp"
    text = compile_with(cxx, *instructions.flags, *flags, "-g0", "-S", "-o", "-", source)
    functions = r"^((?:for|back)ward_\w+):.*?\n(.*?)\.cfi_endproc"
    return {name: iteration(body) for name, body in re.findall(functions, text, re.M | re.S)}


def iteration(function: str) -> list[str]:
    """The instructions of the longest iteration of a function's loops.

    A compiler can copy a loop's body, for example once for each outcome of a condition. An
    iteration goes through one of the copies, so their number does not change what is counted.
    """
    lines = [re.split(r"//|\s#", line)[0].strip() for line in function.splitlines()]
    lines = [
        line for line in lines if re.match(r"\.L\w+:$", line) or line[:1] not in ("", ".", "#")
    ]
    labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
    jumps = [(at, re.match(JUMP, line)) for at, line in enumerate(lines)]
    targets = {at: labels[jump[1]] for at, jump in jumps if jump and jump[1] in labels}

    def onwards(at: int, head: int, passed: frozenset[int]) -> list[list[str]]:
        """The paths from line `at` to line `head` that enter no block twice."""
        path: list[str] = []
        paths: list[list[str]] = []
        while at < len(lines) and at not in passed and not re.match(LEAVES, lines[at]):
            if lines[at].endswith(":"):
                passed |= {at}
            else:
                path.append(lines[at])
            if at in targets:
                paths += [path + rest for rest in onwards(targets[at], head, passed)]
                if re.match(ALWAYS, lines[at]):
                    return paths
            at += 1
        return [*paths, path] if at == head else paths

    # a jump back can also lead to a block that the compiler has moved: that is no loop
    heads = {to for at, to in targets.items() if to < at}
    return max((path for head in heads for path in onwards(head, head, frozenset())), key=len)


@pytest.mark.parametrize("dtype", ["float", "Half", "BFloat16"])
@pytest.mark.parametrize("instructions", INSTRUCTIONS, ids=lambda it: it.name)
def test_instructions_of_a_point(instructions: InstructionSet, dtype: str) -> None:
    vectors = 32 * 4 // VECTOR_BYTES[instructions]  # of a pixel
    for part, name in enumerate(("forward", "backward")):
        code = loops(instructions)[f"{name}_{dtype}"]
        multiply_adds = sum(bool(re.search("fmadd|fmla", line)) for line in code)
        assert multiply_adds == 4 * vectors * (1 + part)  # nothing is computed twice
        assert len(code) <= 1.3 * INSTRUCTIONS[instructions][dtype][part], "\n".join(code)
        assert not [line for line in code if re.match(CALL_INSTRUCTION, line)]
        stack = [line for line in code if re.search(STACK, line)]
        assert len(stack) <= 4, "\n".join(stack)  # a pointer or two


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float", "Half", "BFloat16"])
def test_neon_takes_at_most_half_as_many_instructions_again_as_avx2(dtype: str, name: str) -> None:
    """At the same width: AVX2's instructions on vectors of 16 bytes."""
    neon = loops(NEON)[f"{name}_{dtype}"]
    avx2 = loops(AVX2, "-DDEFORM_ATTN_VECTOR_BYTES=16")[f"{name}_{dtype}"]
    assert len(neon) <= 1.5 * len(avx2)
