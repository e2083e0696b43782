"""Compiles every CUDA kernel for every architecture, and shows what it takes of each.

    python -m benchmarks.gates.kernels [--architectures 75 90] [--json kernels.json]

Needs no GPU and no torch: nvcc compiles csrc/cuda/dispatch.cuh, which launches every kernel with
every dtype. Fails where a kernel spills registers, takes more of them than its limit, or leaves a
multiprocessor less than half full.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from build_tools.toolchain import NotFound, find_cuda

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
DTYPES = {"double": "f64", "float": "f32", "__half": "f16", "__nv_bfloat16": "bf16"}
JOBS = 2
LEAST_OCCUPANCY = 50  # percent

# A call of each launcher makes nvcc compile whatever it launches.
SOURCE = """
#include "cuda/dispatch.cuh"
void all(const deform_attn::KernelCall& in, const deform_attn::Outputs& out) {
  deform_attn::forward_call(in, nullptr, {});
  deform_attn::backward_call(in, nullptr, out, {}, {});
}
"""

# Reads lines "architecture registers shared threads"; prints the share of a multiprocessor's
# threads that run at a time in blocks of so many.
OCCUPANCY_SOURCE = """
#include <climits>
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int arch, registers, shared, threads;
  while (std::scanf("%d %d %d %d", &arch, &registers, &shared, &threads) == 4) {
    const bool server = arch == 90 || arch == 100;
    const int kilobytes = arch == 75 ? 64 : arch == 80 ? 164 : server ? 228 : 100;
    cudaOccDeviceProp device;
    device.computeMajor = arch / 10;
    device.computeMinor = arch % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = arch == 75 ? 1024 : kilobytes == 100 ? 1536 : 2048;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = kilobytes * 1024;
    device.numSms = 1;
    device.reservedSharedMemPerBlock = arch == 75 ? 0 : 1024;
    device.sharedMemPerBlockOptin =
        device.sharedMemPerMultiprocessor - device.reservedSharedMemPerBlock;
    cudaOccFuncAttributes function;
    function.maxThreadsPerBlock = 1024;
    function.numRegs = registers;
    function.sharedSizeBytes = shared;
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, threads, 0) !=
        CUDA_OCC_SUCCESS) {
      return 1;
    }
    std::printf("%d\\n", 100 * result.activeBlocksPerMultiprocessor * threads /
                             device.maxThreadsPerMultiprocessor);
  }
}
"""


class KernelResources:
    """What a kernel takes of a multiprocessor, and what it may take."""

    architecture: int
    registers: int  # of a thread
    limit: int  # of registers
    spills: int  # bytes
    shared: int  # bytes
    threads: int  # of a block
    occupancy: int  # percent; see fill_occupancy

    @property
    def fails(self) -> bool:
        """Whether it spills, passes its limit or fills too little."""
        full = self.occupancy >= LEAST_OCCUPANCY
        return self.spills > 0 or self.registers > self.limit or not full


@dataclasses.dataclass
class Kernel(KernelResources):
    """What ptxas says of one kernel on one architecture."""

    architecture: int
    name: str
    dtype: str
    variant: str  # what its other template arguments mean
    registers: int = 0
    spills: int = 0  # bytes stored and loaded
    shared: int = 0  # static, bytes
    threads: int = 256  # of a block, as every kernel has for a large problem
    occupancy: int = 0  # percent

    @property
    def limit(self) -> int:
        """Registers of a thread."""
        return 64 if self.name.startswith("forward") else 96


def parse(demangled: str, architecture: int) -> Kernel:
    """`void deform_attn::forward_teams<float, 4, int, ...>(...)` as a Kernel."""
    match = re.search(r"deform_attn::(\w+)<([^>(]*)", demangled)
    if match is None:
        raise RuntimeError(f"a kernel of another name than expected: {demangled}")
    name, arguments = match[1], [part.strip() for part in match[2].split(",")]
    dtype = DTYPES[arguments[0]]
    variant = []
    if name in ("forward_teams", "backward_teams"):
        variant.append("16 bytes" if arguments[1] != "1" else "any D")
        variant.append("uint32" if arguments[2].startswith("unsigned") else "int64")
    if re.search(r", long( long)?>\(", demangled):
        variant.append("fixed point")
    if "FusedPoints" in demangled:
        variant.append("fused")
    return Kernel(architecture, name, dtype, ", ".join(variant))


def run(command: list[str], text: str | None = None) -> str:
    """The command's output and messages; an error shows them."""
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_for(architecture: int, toolkit: Path, folder: Path) -> list[Kernel]:
    """Every kernel on one architecture."""
    target = folder / f"{architecture}.cubin"
    messages = run(
        [
            str(toolkit / "bin" / "nvcc"),
            *("-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", f"-arch=sm_{architecture}"),
            *(f"-I{path}" for path in (CSRC, *find_cuda().include_folders)),
            *("-o", str(target), str(folder / "all.cu")),
        ]
    )
    messages = run(["c++filt"], messages)
    kernels: list[Kernel] = []
    for line in messages.splitlines():
        if match := re.search(r"Compiling entry function '(.*)' for", line):
            kernels.append(parse(match[1], architecture))
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[-1].spills = int(match[1]) + int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                kernels[-1].shared = int(shared[1])
    if not kernels:
        raise RuntimeError(f"nvcc reported no kernel for sm_{architecture}:\n{messages}")
    return kernels


def fill_occupancy(kernels: Sequence[KernelResources]) -> None:
    """Asks CUDA's own occupancy calculator, on the host."""
    includes = [f"-I{path}" for path in find_cuda().include_folders]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "occupancy"
        command = ["c++", "-std=c++17", *includes, "-o", str(program), "-xc++", "-"]
        run(command, OCCUPANCY_SOURCE)
        lines = [f"{k.architecture} {k.registers} {k.shared} {k.threads}" for k in kernels]
        found = run([str(program)], "\n".join(lines)).split()
    for kernel, percent in zip(kernels, found, strict=True):
        kernel.occupancy = int(percent)


def table_of(kernels: list[Kernel]) -> Table:
    """A row for each kernel and dtype, a column for each architecture: registers and occupancy."""
    architectures = sorted({kernel.architecture for kernel in kernels})
    table = Table(title="registers, spilled bytes (where any), occupancy")
    for heading in ("kernel", "dtype", "variant", "shared"):
        table.add_column(heading)
    for architecture in architectures:
        table.add_column(f"sm_{architecture}", justify="right")
    rows: dict[tuple[str, str, str], dict[int, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault((kernel.name, kernel.dtype, kernel.variant), {})[kernel.architecture] = (
            kernel
        )
    for key in sorted(rows):
        cells = []
        for architecture in architectures:
            kernel = rows[key][architecture]
            spills = f" {kernel.spills} B" if kernel.spills else ""
            cell = f"{kernel.registers}{spills} {kernel.occupancy:3}%"
            cells.append(f"[red]{cell}[/red]" if kernel.fails else cell)
        table.add_row(*key, str(max(k.shared for k in rows[key].values())), *cells)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        toolkit = find_cuda().home
    except NotFound as error:
        console.print(f"[red]{error}[/red]")
        return 2
    version = run([str(toolkit / "bin" / "nvcc"), "--version"]).split("release ")[-1].split(",")[0]
    console.print(f"nvcc {version} in {toolkit}")

    kernels: list[Kernel] = []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(JOBS) as pool:
        folder = Path(name)
        (folder / "all.cu").write_text(SOURCE)
        with Progress(console=console) as progress:
            task = progress.add_task("compiling", total=len(options.architectures))
            jobs = [
                pool.submit(compile_for, architecture, toolkit, folder)
                for architecture in options.architectures
            ]
            for job in as_completed(jobs):
                kernels += job.result()
                progress.advance(task)
    fill_occupancy(kernels)
    kernels.sort(key=lambda k: (k.architecture, k.name, k.dtype, k.variant))
    console.print(table_of(kernels))
    failed = [kernel for kernel in kernels if kernel.fails]
    for kernel in failed:
        console.print(
            f"[red]sm_{kernel.architecture} {kernel.name} {kernel.dtype} ({kernel.variant}): "
            f"{kernel.registers} registers of {kernel.limit}, {kernel.spills} bytes spilled, "
            f"{kernel.occupancy} % full[/red]"
        )
    console.print(
        f"{len(kernels)} kernels, {len(failed)} that spill, pass their limit or fill too little"
    )
    if options.json:
        figures = [dataclasses.asdict(kernel) for kernel in kernels]
        options.json.write_text(json.dumps({"nvcc": version, "kernels": figures}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
