"""The model of a multiprocessor behind `make cycles`, and the figures that it has produced.

Machine code is written here as nvdisasm prints it, and executed by the model; what it computes is
compared with numpy. The kernels themselves are not compiled: that takes nvcc and minutes.

After a change of the kernels:

    python -m benchmarks.gates.cycles --json benchmarks/results/simulated-h100/cycles.json
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gates.cycles import build
from benchmarks.gates.cycles.cases import CASES, Bar, bars, faults, raised
from build_tools.toolchain import CudaToolkit, NotFound, find_cxx

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "benchmarks" / "results" / "simulated-h100" / "cycles.json"
NOTEBOOK = ROOT / "docs" / "design-gpu.md"
LANES = 32

# The kernel's two parameters at R2 (input) and R4 (output), its thread at R0.
PROLOGUE = ("LDC.64 R2, c[0x0][0x210]", "LDC.64 R4, c[0x0][0x218]", "S2R R0, SR_TID.X")


def listing(code: Sequence[str], shared: int = 0, stalls: int = 1) -> str:
    """A kernel "k" as nvdisasm prints it. `code`: instructions and labels ("name:")."""
    lines = [
        '\t.section\t.nv.info,"",@"SHT_CUDA_INFO"',
        "\t//----- nvinfo : EIATTR_REGCOUNT",
        "        /*0004*/ \t.word\tindex@(k)",
        "        /*0008*/ \t.word\t0x00000020",
        '\t.section\t.nv.info.k,"",@"SHT_CUDA_INFO"',
        '\t.sectionflags\t@""',
        "\t//----- nvinfo : EIATTR_PARAM_CBANK",
        "        /*0010*/ \t.word\tindex@(.nv.constant0.k)",
        "        /*0014*/ \t.short\t0x0210",
        "        /*0016*/ \t.short\t0x0010",
        '\t.section\t.text.k,"ax",@progbits',
        ".text.k:",
    ]
    address = 0
    for text in code:
        if text.endswith(":"):
            lines.append(text)
            continue
        lines.append(f"        /*{address:04x}*/   {text} ;   /* 0x0000000000000000 */")
        # stall cycles; no barriers to set (7) or to wait for
        control = stalls | 7 << 5 | 7 << 8
        lines.append(f"                 /* 0x{control << 41:016x} */")
        address += 16
    lines += ['\t.section\t.nv.shared.k,"aw",@nobits', f"\t.zero\t\t{1024 + shared}"]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def program() -> Path:
    try:
        find_cxx()
    except NotFound as error:
        pytest.skip(str(error))
    return build.program(ROOT / "tests" / "cycles_code.cpp", "-O0")


class Failed(Exception):
    """The program's message."""


@pytest.fixture
def execute(program: Path, tmp_path: Path) -> Callable[..., tuple[np.ndarray, int]]:
    """Runs code between PROLOGUE and EXIT; returns the output as uint32, and the cycles."""

    def run(
        code: Sequence[str],
        given: np.ndarray | None = None,
        words: int = 0,
        threads: int = LANES,
        shared: int = 0,
        stalls: int = 1,
    ) -> tuple[np.ndarray, int]:
        path = tmp_path / "k.txt"
        path.write_text(listing([*PROLOGUE, *code, "EXIT"], shared, stalls))
        done = subprocess.run(
            [str(program), str(path), str(threads), str(4 * words)],
            input=b"" if given is None else given.tobytes(),
            capture_output=True,
            check=False,
        )
        if done.returncode != 0:
            raise Failed(done.stderr.decode())
        return np.frombuffer(done.stdout, np.uint32), int(done.stderr)

    return run


Words = np.ndarray
I32 = np.int32


def signed(a: Words) -> Words:
    return a.astype(I32).astype(np.int64)


def wide(a: Words) -> Words:
    return a.astype(np.uint64)


def low(a: Words) -> Words:
    return (a.astype(np.int64) if a.dtype != np.uint64 else a).astype(np.uint32)


# Of words a, b, c in R8, R9, R10: the code, and what it leaves in R12
INTEGERS: list[tuple[str, Callable[[Words, Words, Words], Words]]] = [
    ("IADD3 R12, R8, -R9, R10", lambda a, b, c: a - b + c),
    ("VIADD R12, R8, 0xfffffff0", lambda a, b, c: a - np.uint32(16)),
    ("IMAD R12, R8, R9, -R10", lambda a, b, c: a * b - c),
    ("IMAD.HI.U32 R12, R8, R9, RZ", lambda a, b, c: low(wide(a) * wide(b) >> np.uint64(32))),
    ("IMAD.MOV.U32 R12, RZ, RZ, R10", lambda a, b, c: c),
    ("LEA R12, R8, R9, 0x3", lambda a, b, c: (a << np.uint32(3)) + b),
    (
        "LEA.HI R12, R8, R9, R10, 0x5",
        lambda a, b, c: (
            low(((wide(a) | wide(c) << np.uint64(32)) << np.uint64(5)) >> np.uint64(32)) + b
        ),
    ),
    ("LOP3.LUT R12, R8, R9, R10, 0xc0, !PT", lambda a, b, c: a & b),
    ("LOP3.LUT R12, R8, R9, R10, 0x96, !PT", lambda a, b, c: a ^ b ^ c),
    ("SHF.L.U32 R12, R8, 0x7, RZ", lambda a, b, c: a << np.uint32(7)),
    ("SHF.R.U32.HI R12, RZ, 0x7, R8", lambda a, b, c: a >> np.uint32(7)),
    ("SHF.R.S32.HI R12, RZ, 0x1f, R8", lambda a, b, c: low(signed(a) >> 31)),
    ("SHF.L.U64.HI R12, R8, 0x4, R9", lambda a, b, c: b << np.uint32(4) | a >> np.uint32(28)),
    ("VIMNMX R12, R8, R9, PT", lambda a, b, c: low(np.minimum(signed(a), signed(b)))),
    ("VIMNMX.U32 R12, R8, R9, !PT", lambda a, b, c: np.maximum(a, b)),
    (
        "VIADDMNMX R12, R8, 0x5, R9, PT",
        lambda a, b, c: low(np.minimum(signed(a + np.uint32(5)), signed(b))),
    ),
    ("PRMT R12, R8, 0x7610, R9", lambda a, b, c: a & np.uint32(0xFFFF) | b & np.uint32(0xFFFF0000)),
    (
        "PRMT R12, R8, 0x3, RZ",
        lambda a, b, c: a >> np.uint32(24) | (a & np.uint32(255)) * np.uint32(0x01010100),
    ),
    ("IABS R12, R8", lambda a, b, c: low(np.abs(signed(a)))),
    ("POPC R12, R8", lambda a, b, c: np.array([bin(x).count("1") for x in a], np.uint32)),
    ("FLO.U32 R12, R8", lambda a, b, c: np.array([int(x).bit_length() - 1 for x in a], I32)),
]
FLOATS: list[tuple[str, Callable[[Words, Words, Words], Words]]] = [
    ("FADD R12, |R8|, -R9", lambda a, b, c: np.abs(a) - b),
    ("FMUL R12, R8, 0.25", lambda a, b, c: a * np.float32(0.25)),
    (
        "FFMA R12, R8, R9, R10",
        lambda a, b, c: (a.astype(np.longdouble) * b + c).astype(np.float32),
    ),
    ("FMNMX R12, R8, R9, !PT", lambda a, b, c: np.maximum(a, b)),
    ("FRND.FLOOR R12, R8", lambda a, b, c: np.floor(a)),
    ("MUFU.RCP R12, R8", lambda a, b, c: 1 / a),
    (
        "F2FP.F16.F32.PACK_AB R12, R8, R9",
        lambda a, b, c: np.stack([b, a], 1).astype(np.float16).reshape(-1).view(np.float32),
    ),
    ("HADD2.F32 R12, -RZ, R8.H1_H1", lambda a, b, c: a.view(np.float16)[1::2].astype(np.float32)),
    ("F2I.TRUNC.NTZ R12, R8", lambda a, b, c: np.trunc(a).astype(I32).view(np.float32)),
    ("I2FP.F32.S32 R12, R8", lambda a, b, c: a.view(I32).astype(np.float32)),
]


@pytest.mark.parametrize("floats", [False, True], ids=["integers", "floats"])
def test_instructions(execute: Callable[..., tuple[np.ndarray, int]], floats: bool) -> None:
    random = np.random.default_rng(0)
    if floats:
        given = (8 * random.standard_normal((3, LANES))).astype(np.float32)
        given[0, :4] = [1 + 2**-11, 1 + 3 * 2**-11, 3 * 2**-25, 65519]  # roundings to 16 bits
    else:
        given = random.integers(0, 2**32, (3, LANES), np.uint32)
        given[:, :4] = [0, 1, 2**31 + 1, 2**32 - 1]
    table = FLOATS if floats else INTEGERS
    code = ["IMAD.WIDE.U32 R2, R0, 0x4, R2", "IMAD.WIDE.U32 R4, R0, 0x4, R4"]
    code += [f"LDG.E R{8 + i}, desc[UR4][R2.64+{hex(128 * i)}]" for i in range(3)]
    for i, (text, _) in enumerate(table):
        code += [text, f"STG.E desc[UR4][R4.64+{hex(128 * i)}], R12"]
    found = execute(code, given, LANES * len(table))[0].reshape(len(table), LANES)
    for row, (text, expected) in zip(found, table):
        with np.errstate(over="ignore"):
            words = np.ascontiguousarray(expected(*given)).view(np.uint32)
        np.testing.assert_array_equal(row, words, err_msg=text)


def test_carries_and_comparisons(execute: Callable[..., tuple[np.ndarray, int]]) -> None:
    """64-bit sums and comparisons are made of pairs of instructions."""
    random = np.random.default_rng(1)
    given = random.integers(0, 2**63, (LANES, 2), np.int64)
    given[0] = given[1, ::-1] = 2**32 - 1, 1
    given[2] = -5, 3
    given[3, 1] = given[3, 0]
    code = [
        "IMAD.WIDE.U32 R2, R0, 0x10, R2",
        "IMAD.WIDE.U32 R4, R0, 0x10, R4",
        "LDG.E.128 R8, desc[UR4][R2.64]",
        "IADD3 R12, P0, R8, R10, RZ",
        "IMAD.X R13, R9, 0x1, R11, P0",
        "ISETP.GE.U32.AND P1, PT, R8, R10, PT",
        "ISETP.GE.AND.EX P2, PT, R9, R11, PT, P1",
        "SEL R14, RZ, 0x1, !P2",
        "PLOP3.LUT P3, PT, P2, P1, PT, 0x3c, 0x0",
        "SEL R15, RZ, 0x1, !P3",
        "STG.E.128 desc[UR4][R4.64], R12",
    ]
    found = execute(code, given, 4 * LANES)[0].reshape(LANES, 4)
    sums = given[:, 0].astype(np.uint64) + given[:, 1].astype(np.uint64)
    np.testing.assert_array_equal(found[:, :2].copy().view(np.uint64)[:, 0], sums)
    greater = given[:, 0] >= given[:, 1]
    np.testing.assert_array_equal(found[:, 2], greater)
    low_greater = given[:, 0].astype(np.uint32) >= given[:, 1].astype(np.uint32)
    np.testing.assert_array_equal(found[:, 3], greater ^ low_greater)


def test_paths_meet_and_warps_wait(execute: Callable[..., tuple[np.ndarray, int]]) -> None:
    """Lanes loop as often as their number says and join; warps add in shared memory."""
    code = [
        "IMAD.WIDE.U32 R4, R0, 0x8, R4",
        "LOP3.LUT R6, R0, 0x1f, RZ, 0xc0, !PT",  # the lane
        "IMAD.MOV.U32 R7, RZ, RZ, RZ",
        "BSSY B0, `(.L_end)",
        ".L_loop:",
        "ISETP.GE.AND P0, PT, R7, R6, PT",
        "@P0 BRA `(.L_end)",
        "VIADD R7, R7, 0x1",
        "BRA `(.L_loop)",
        ".L_end:",
        "BSYNC B0",
        "VOTE.ANY R8, PT, PT",  # the lanes that are here together
        "ATOMS.ADD R9, [RZ+0x400], R7",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "LDS R9, [0x400]",
        "SHFL.BFLY PT, R10, R7, 0x1, 0x1f",
        "IADD3 R8, R8, R10, RZ",
        "STG.E.64 desc[UR4][R4.64], R8",
    ]
    found = execute(code, words=4 * LANES, threads=2 * LANES, shared=4)[0].reshape(-1, 2)
    lanes = np.arange(2 * LANES) % LANES
    np.testing.assert_array_equal(found[:, 0], (2**32 - 1 + (lanes ^ 1)) % 2**32)
    np.testing.assert_array_equal(found[:, 1], np.full(2 * LANES, 2 * 31 * 16))


def test_products_of_matrices(execute: Callable[..., tuple[np.ndarray, int]]) -> None:
    random = np.random.default_rng(2)
    a, b = random.standard_normal((16, 16)), random.standard_normal((16, 8))
    a, b = a.astype(np.float16), b.astype(np.float16)
    g, t = np.arange(LANES) // 4, 2 * (np.arange(LANES) % 4)
    pairs = [
        *(
            a[g + row][np.arange(LANES)[:, None], t[:, None] + column + [0, 1]]
            for column in (0, 8)
            for row in (0, 8)
        ),
        *(b.T[g][np.arange(LANES)[:, None], t[:, None] + row + [0, 1]] for row in (0, 8)),
    ]
    given = np.stack([np.ascontiguousarray(pair).view(np.uint32)[:, 0] for pair in pairs])
    code = ["IMAD.WIDE.U32 R2, R0, 0x4, R2", "IMAD.WIDE.U32 R4, R0, 0x10, R4"]
    code += [f"LDG.E R{8 + i}, desc[UR4][R2.64+{hex(128 * i)}]" for i in range(6)]
    code += ["HMMA.16816.F32 R16, R8, R12, RZ", "STG.E.128 desc[UR4][R4.64], R16"]
    found = execute(code, given, 4 * LANES)[0].view(np.float32).reshape(LANES, 2, 2)
    product = a.astype(np.float64) @ b.astype(np.float64)
    for half, row in enumerate((0, 8)):
        expected = product[g + row][np.arange(LANES)[:, None], t[:, None] + [0, 1]]
        np.testing.assert_allclose(found[:, half], expected, rtol=1e-6, atol=1e-6)


def test_cycles(execute: Callable[..., tuple[np.ndarray, int]]) -> None:
    """Stalls, busy units, banks and sectors take the cycles that the constants state."""
    few, many = (["VIADD R8, R0, 0x1"] * count for count in (10, 20))
    assert execute(many)[1] - execute(few)[1] == 10 * 2  # the unit's interval
    assert execute(many, stalls=5)[1] - execute(few, stalls=5)[1] == 10 * 5
    functions = [["MUFU.EX2 R8, R0"] * count for count in (10, 20)]
    assert execute(functions[1])[1] - execute(functions[0])[1] == 10 * 8

    def loads(address: str) -> int:
        """Cycles of 20 loads from shared memory."""
        few, many = (
            execute([f"LDS R8, [{address}]"] * count, shared=32 * 128)[1] for count in (20, 40)
        )
        return many - few

    # one word, or each lane its own bank: the unit's interval; or four lanes share a bank
    assert loads("RZ+0x400") == loads("R0.X4+0x400") == 20 * 2
    assert loads("R0.X16+0x400") == 20 * 4
    code = ["IMAD.WIDE.U32 R4, R0, 0x4, R4"]
    code += ["REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R4.64], R0"] * 200
    assert execute(code, words=LANES)[1] == pytest.approx(200 * 4 * 1.31, rel=0.05)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("FROB R8, R0", "the opcode FROB"),
        ("IADD3.SAT R8, R0, R0, RZ", "the modifier SAT of IADD3"),
        ("IADD3 R8, R0, foo, RZ", "the operand foo"),
        ("LDG.E R8, desc[UR4][RZ]", "an access outside of every tensor"),
        ("STS [RZ+0x1000], R0", "an access outside of shared memory"),
        ("LDS.128 R8, [RZ+0x408]", "a misaligned access"),
        ("S2R R8, SR_CLOCKLO", "no model of the special register"),
    ],
)
def test_what_is_not_modelled_is_an_error(
    execute: Callable[..., tuple[np.ndarray, int]], instruction: str, message: str
) -> None:
    with pytest.raises(Failed) as failure:
        execute([instruction])
    assert "kernel k: " in str(failure.value)
    assert message in str(failure.value)
    assert f"in the instruction `{instruction}`" in str(failure.value)


def test_missing_nvdisasm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "find_cuda", lambda: CudaToolkit(tmp_path, "13.0"))
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda kind: str(tmp_path))
    with pytest.raises(NotFound, match="pip install nvidia-cuda-nvdisasm"):
        build.find_nvdisasm()
    wheel = tmp_path / "nvidia" / "cu13" / "bin" / "nvdisasm"
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    assert build.find_nvdisasm() == wheel


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    calls: dict[str, Any] = json.loads(COMMITTED.read_text())["calls"]
    return calls


def test_committed_values_and_bars(committed: dict[str, Any]) -> None:
    assert set(committed) == {case.name for case in CASES}
    assert not [fault for case in CASES for fault in faults(case, committed[case.name])]
    assert [bar.row for bar in bars(committed) if not bar.met] == []


def state_table() -> list[list[str]]:
    """The cells of each row of the notebook's table "State", without its two headings."""
    section = NOTEBOOK.read_text().split("## State\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_notebook_states_the_committed_figures(committed: dict[str, Any]) -> None:
    table, found = state_table(), bars(committed)
    assert len(table) == len(found)
    for cells, bar in zip(table, found):
        assert cells[0].startswith(bar.row)
        assert cells[-1] == ("met" if bar.met else "not met"), bar.row
        now = cells[-2]
        figures = [int(text.replace(",", "")) for text in re.findall(r"\d+(?:,\d{3})+", now)]
        assert tuple(figures[: len(bar.figures)]) == bar.figures, bar.row
        for share in re.findall(r"([\d.]+)x", now):
            digits = len(share.split(".")[1])
            assert float(share) == pytest.approx(bar.share, abs=0.51 * 10**-digits), bar.row


def test_growth_and_missed_bars_are_reported(committed: dict[str, Any]) -> None:
    assert not raised(committed, committed)
    name = "forward f32, encoder"
    slower = copy.deepcopy({name: committed[name]})
    (report,) = slower[name]["kernels"][0]["reports"]
    report["cycles"] *= 2
    assert raised(slower, committed) == [
        f"bar not met: {name}",
        f"{name}, 1.31 cycles a reduced sector: {report['cycles'] // 2:,} -> {report['cycles']:,}",
    ]
    slower[name]["errors"]["output"] = 1e-3
    (fault,) = (
        fault for case in CASES if case.name == name for fault in faults(case, slower[name])
    )
    assert "output differs from float64 by 1.0e-03" in fault
    assert raised({"new": committed[name]}, committed) == [
        "new: not simulated before; --json writes a new file"
    ]
    assert Bar("", 0.5, (1, 3), 4).share == 0.75
