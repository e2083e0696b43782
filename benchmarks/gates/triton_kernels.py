"""Compiles every Triton kernel for every architecture, and shows what it takes of each.

    python -m benchmarks.gates.triton_kernels [--architectures 75 90] [--json triton_kernels.json]

No GPU is needed: Triton brings ptxas. Kernels are compiled with the block sizes that the backend
launches for Deformable DETR's encoder and, with few queries, its decoder. Fails where one spills
registers, takes more of them than its limit, or leaves a multiprocessor less than half full.
For AMD's GPUs registers, spills and LDS are those in the metadata of the machine code.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.gates.kernels import KernelResources, fill_occupancy

ARCHITECTURES = (75, 80, 86, 90, 100, 120)
AMD = ("gfx90a", "gfx942", "gfx1100", "gfx1201")  # CDNA 2 and 3, RDNA 3 and 4
WIDE_WARPS = "gfx9"  # AMD's architectures with 64 threads in a warp; other GPUs have 32
MOST_AMD_REGISTERS = 128  # vector registers: half of the wavefronts that gfx90a can hold
DTYPES = {"f32": ("float32", "*fp32"), "f16": ("float16", "*fp16"), "bf16": ("bfloat16", "*bf16")}
MOST_REGISTERS = {"forward": 64, "backward": 96, "add_up_rows": 64}  # of a thread
JOBS = 2

FUSED = {"reference": (4, 2)}  # a reference point of two coordinates for each of four levels
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "many queries": ("forward", {}),
    "few queries": ("forward", {"queries": 300}),
    "softmax and locations inside": ("forward", FUSED),
    "few queries, softmax and locations inside": ("forward", {**FUSED, "queries": 300}),
    "atomic": ("backward", {}),
    "deterministic": ("backward", {"deterministic": True}),
    "atomic, softmax and locations inside": ("backward", FUSED),
    "deterministic, softmax and locations inside": (
        "backward",
        {**FUSED, "deterministic": True},
    ),
    "": ("add_up_rows", {}),
}


@dataclasses.dataclass
class Kernel(KernelResources):
    """What ptxas says of one kernel on one architecture."""

    architecture: int
    name: str
    dtype: str
    variant: str
    registers: int  # of a thread
    spills: int  # bytes stored and loaded
    shared: int  # bytes
    warps: int
    ptx: str = dataclasses.field(repr=False)
    occupancy: int = 0  # percent; see fill_occupancy

    @property
    def threads(self) -> int:
        """Of a program."""
        return 32 * self.warps

    @property
    def limit(self) -> int:
        """Registers of a thread."""
        return MOST_REGISTERS[self.name]


@dataclasses.dataclass
class AmdKernel:
    """What the compiler for AMD says of one kernel on one architecture."""

    architecture: str
    name: str
    dtype: str
    variant: str
    registers: int  # vector registers of a thread
    scalar_registers: int  # of a wavefront
    spills: int  # registers
    shared: int  # bytes (LDS)
    warps: int
    lanes: int  # threads in a wavefront

    @property
    def fails(self) -> bool:
        """Whether it spills, or takes more registers than half a full SIMD allows."""
        return self.spills > 0 or self.registers > MOST_AMD_REGISTERS


def compile_kernel(
    name: str,
    architecture: int | str,
    dtype: str,
    *,
    variant: str = "",
    head_dim: int = 32,
    counts: tuple[int, ...] = (4, 4, 4, 4),
    queries: int = 22223,
    heads: int = 8,
    levels_on_device: bool = False,
    wide: bool = False,
    deterministic: bool = False,
    reference: tuple[int, int] = (0, 0),
    masked: bool = False,
    blocks: Any = None,
) -> Kernel | AmdKernel:
    """Compile one kernel as the backend launches it for a shape.

    Args:
        name: a kernel of deform_attn/backends/_triton_kernels.py.
        architecture: 90 for sm_90, "gfx942" for AMD's of that name.
        dtype: of value, output and weights: f32, f16 or bf16.
        variant: what to call it.
        head_dim: D.
        counts: points in each level.
        queries: Q, at batch 1.
        heads: M.
        levels_on_device: sizes and starts in device tensors, else host numbers.
        wide: value of 2**31 elements and more.
        deterministic: the backward kernel without atomic additions.
        reference: number and coordinates of a query's reference points, for the fused kernels.
        masked: with a value_mask.
        blocks: other block sizes than the backend's.

    Raises:
        RuntimeError: triton was imported as an interpreter (TRITON_INTERPRET=1).
    """
    import torch
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    from deform_attn.backends import _triton_kernels
    from deform_attn.backends import triton_launcher as backend

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set: nothing can be compiled")
    torch_dtype, value = DTYPES[dtype]
    target = GPUTarget("cuda", architecture, 32)
    if isinstance(architecture, str):
        target = GPUTarget("hip", architecture, 64 if architecture.startswith(WIDE_WARPS) else 32)
    known = backend.target_of(make_backend, target)
    blocks = blocks or backend.blocks_for(
        getattr(torch, torch_dtype).itemsize,
        head_dim,
        queries,
        queries * heads,
        backward=name != "forward",
        deterministic=deterministic,
        fused=reference != (0, 0),
        masked=masked,
        rotated=reference[1] == 6,
        target=known,
    )
    options = backend.launch_options(blocks, known.options)
    constants = backend.constants(head_dim, counts, blocks, wide=wide, reference=reference)
    constants["starts_at"] = None
    types = {
        **dict.fromkeys(("rows", "queries", "heads", "points", "first_batch"), "i32"),
        **dict.fromkeys(("value", "weights", "output", "grad_output", "grad_weights"), value),
        **dict.fromkeys(("locations", "grad_locations", "shares"), "*fp32"),
        **dict.fromkeys(("reference", "grad_reference"), "*fp32"),
        **dict.fromkeys(("shapes", "starts", "order", "begins"), "*i64"),
        "targets": "*i32",
        "value_mask": "*u8",
        "offset_scale": "fp32",
        "grad_value": value if name == "add_up_rows" else "*fp32",
        "sizes": () if levels_on_device else ("i32",) * (2 * len(counts)),
    }
    absent = [] if levels_on_device else ["shapes", "starts"]
    if not masked:
        absent.append("value_mask")
    if name == "backward":
        absent += ["grad_value"] if deterministic else ["targets", "shares"]
    if reference == (0, 0):
        absent += ["reference", "grad_reference"]
    constants |= dict.fromkeys(absent)

    function = getattr(_triton_kernels, name)
    signature = {n: "constexpr" if n in constants else types[n] for n in function.arg_names}
    places = {name: (i,) for i, name in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        signature,
        {places[name]: constant for name, constant in constants.items() if name in places},
        # torch's allocations are aligned, and the launcher sees it
        {
            places[name]: [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind and kind[0] == "*"
        },
    )
    log = io.StringIO()
    before = knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(
                source,
                target=target,
                options=options,
            )
    finally:
        knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log = before
    if isinstance(architecture, str):

        def figure(field: str) -> int:
            return int(re.search(rf"\.{field}:\s+(\d+)", compiled.asm["amdgcn"])[1])

        return AmdKernel(
            architecture,
            name,
            dtype,
            variant,
            registers=figure("vgpr_count"),
            scalar_registers=figure("sgpr_count"),
            spills=figure("vgpr_spill_count") + figure("sgpr_spill_count"),
            shared=figure("group_segment_fixed_size"),
            warps=blocks.warps,
            lanes=target.warp_size,
        )
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    if spills is None or registers is None:
        raise RuntimeError(f"ptxas reported no registers of {name}:\n{log.getvalue()}")
    return Kernel(
        architecture,
        name,
        dtype,
        variant,
        registers=int(registers[1]),
        spills=int(spills[1]) + int(spills[2]),
        shared=compiled.metadata.shared,
        warps=blocks.warps,
        ptx=compiled.asm["ptx"],
    )


def compile_variant(variant: str, architecture: int | str, dtype: str) -> Kernel | AmdKernel:
    """One cell of the table."""
    name, shape = VARIANTS[variant]
    return compile_kernel(name, architecture, dtype, variant=variant, **shape)


def table_of(kernels: Iterable[Kernel]) -> Table:
    """A row for each kernel and dtype, a column for each architecture: registers and occupancy."""
    rows: dict[tuple[str, str, str], dict[int, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault((kernel.name, kernel.variant, kernel.dtype), {})[kernel.architecture] = (
            kernel
        )
    architectures = sorted({architecture for row in rows.values() for architecture in row})
    table = Table(title="registers, spilled bytes (where any), occupancy")
    for heading in ("kernel", "variant", "dtype", "warps", "shared"):
        table.add_column(heading)
    for architecture in architectures:
        table.add_column(f"sm_{architecture}", justify="right")
    for key, row in rows.items():
        cells = []
        for architecture in architectures:
            kernel = row[architecture]
            spilled = f" {kernel.spills} B" if kernel.spills else ""
            cell = f"{kernel.registers}{spilled} {kernel.occupancy:3}%"
            cells.append(f"[red]{cell}[/red]" if kernel.fails else cell)
        shared = max(kernel.shared for kernel in row.values())
        table.add_row(*key, str(kernel.warps), str(shared), *cells)
    return table


def amd_table_of(kernels: Iterable[AmdKernel]) -> Table:
    """A row for each kernel and dtype, a column for each architecture."""
    rows: dict[tuple[str, str, str], dict[str, AmdKernel]] = {}
    for kernel in kernels:
        key = kernel.name, kernel.variant, kernel.dtype
        rows.setdefault(key, {})[kernel.architecture] = kernel
    table = Table(title="AMD: vector + scalar registers, spilled registers (where any)")
    for heading in ("kernel", "variant", "dtype", "shared"):
        table.add_column(heading)
    for architecture in AMD:
        table.add_column(architecture, justify="right")
    for key, row in rows.items():
        cells = []
        for kernel in row.values():
            cell = f"{kernel.registers} + {kernel.scalar_registers}"
            cell += f" {kernel.spills} spilled" if kernel.spills else ""
            cells.append(f"[red]{cell}[/red]" if kernel.fails else cell)
        table.add_row(*key, str(max(kernel.shared for kernel in row.values())), *cells)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--no-amd", dest="amd", action="store_false", help="leave out AMD's GPUs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    cells = [
        (variant, architecture, dtype)
        for variant in VARIANTS
        for dtype in DTYPES
        for architecture in (*options.architectures, *(AMD if options.amd else ()))
    ]
    with ProcessPoolExecutor(JOBS) as pool:
        work = pool.map(compile_variant, *zip(*cells), chunksize=6)
        compiled = list(track(work, "compiling", total=len(cells), console=console))
    kernels = [kernel for kernel in compiled if isinstance(kernel, Kernel)]
    amd = [kernel for kernel in compiled if isinstance(kernel, AmdKernel)]
    fill_occupancy(kernels)
    console.print(table_of(kernels))
    if amd:
        console.print(amd_table_of(amd))
    failed = [kernel for kernel in compiled if kernel.fails]
    for kernel in failed:
        console.print(f"[red]{kernel}[/red]")
    console.print(
        f"{len(compiled)} kernels, {len(failed)} that spill, pass their limit or fill too little"
    )
    if options.json:
        figures = [dataclasses.asdict(kernel) for kernel in compiled]
        for row in figures:
            row.pop("ptx", None)
        options.json.write_text(json.dumps({"kernels": figures}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
