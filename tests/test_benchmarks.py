"""The benchmark: its workloads, its check, its pairs of times and its file format; no clock."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gates import kernels
from benchmarks.machine import roofline
from benchmarks.op import check, measure, models, peers, report, run
from benchmarks.op.rows import KEY, failures
from benchmarks.op.workloads import WORKLOADS, Workload, WorkloadInputs, draw, scaled

SMALL = scaled(WORKLOADS["rtdetr_decoder_640"], 0.1)


@pytest.mark.parametrize(
    ("name", "rows", "queries", "heads", "head_dim", "points"),
    [
        ("rtdetr_decoder_640", 8400, 300, 8, 32, (4, 4, 4)),
        ("deformable_detr_encoder_800x1333", 22223, 22223, 8, 32, (4, 4, 4, 4)),
        ("deformable_detr_decoder_800x1333", 22223, 300, 8, 32, (4, 4, 4, 4)),
        ("dino_decoder_900q", 22223, 900, 8, 32, (4, 4, 4, 4)),
        ("mask2former_pixel_decoder_1024", 21504, 21504, 8, 32, (4, 4, 4)),
        ("rfdetr_decoder_560", 1600, 300, 16, 16, (2,)),
        ("rfdetr_train", 1600, 3900, 16, 16, (2,)),
        ("dfine_decoder_640", 8400, 300, 8, 32, (3, 6, 3)),
    ],
)
def test_workload_table(
    name: str, rows: int, queries: int, heads: int, head_dim: int, points: tuple[int, ...]
) -> None:
    workload = WORKLOADS[name]
    assert (workload.rows, workload.queries, workload.points) == (rows, queries, points)
    assert (workload.heads, workload.head_dim) == (heads, head_dim)


@pytest.mark.parametrize("name", WORKLOADS)
def test_drawn_inputs(name: str) -> None:
    workload = scaled(WORKLOADS[name], 0.25)
    x = draw(workload, batch=2, dtype=torch.bfloat16, seed=3)
    points = (sum(workload.points),) if x.num_points else (len(workload.levels), workload.points[0])
    per_query = (2, workload.queries, workload.heads, *points)
    assert x.value.shape == (2, workload.rows, workload.heads, workload.head_dim)
    assert x.sampling_locations.shape == (*per_query, 2)
    assert x.attention_weights.shape == per_query
    assert x.sampling_locations.dtype == torch.float32
    assert x.value.dtype == x.attention_weights.dtype == torch.bfloat16
    sums = x.attention_weights.float().flatten(3).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=2e-2, rtol=0)
    again = draw(workload, batch=2, dtype=torch.bfloat16, seed=3)
    assert torch.equal(x.sampling_locations, again.sampling_locations)
    other = draw(workload, batch=2, dtype=torch.bfloat16, seed=4)
    assert not torch.equal(x.sampling_locations, other.sampling_locations)
    inside = ((x.sampling_locations > 0) & (x.sampling_locations < 1)).all(-1)
    assert inside.float().mean() > 0.5  # on the map for the most part, as in a model


def test_encoder_queries_sample_round_their_own_pixel() -> None:
    workload = scaled(WORKLOADS["deformable_detr_encoder_800x1333"], 0.25)
    x = draw(workload)
    height, width = workload.levels[0]
    query = (height // 2) * width + width // 2  # the pixel in the middle of the first map
    pixels = x.sampling_locations[0, query, :, 0] * torch.tensor([width, height]) - 0.5
    middle = torch.tensor([width // 2, height // 2])
    assert (pixels - middle).abs().max() < 4 + 5  # steps of the ring, and five deviations


def test_a_scaled_encoder_keeps_a_query_for_each_pixel() -> None:
    small = scaled(WORKLOADS["mask2former_pixel_decoder_1024"], 1 / 8)
    assert small.levels == ((16, 16), (8, 8), (4, 4))
    assert small.queries == small.rows == 336


# The check -----------------------------------------------------------------------------------


def right(workload: Workload, device: str) -> peers.Op:
    return peers.PEERS[peers.BASELINE](workload, device)


def faulty(fault: str) -> peers.Loader:
    """grid_sample with one fault."""

    def load(workload: Workload, device: str) -> peers.Op:
        op = right(workload, device)

        def wrong(x: WorkloadInputs) -> torch.Tensor:
            if fault == "output":
                return op(x) * 1.001
            if fault == "shifted":  # half a pixel of the finest level
                height, width = workload.levels[0]
                moved = x.sampling_locations + 0.5 / torch.tensor([width, height])
                value, _, weights = x.differentiable
                return op(x.map(lambda t: moved if t is x.sampling_locations else t))
            if fault == "grad_value":
                return op(x.map(lambda t: _scale_gradient(t, 0.99) if t is x.value else t))
            if fault == "grad_sampling_locations":
                locations = x.sampling_locations
                return op(x.map(lambda t: _scale_gradient(t, 0.99) if t is locations else t))
            if fault == "grad_attention_weights":
                weights = x.attention_weights
                return op(x.map(lambda t: t.detach() * 1.0 + 0 * t if t is weights else t))
            if fault == "nan":
                return op(x) + float("nan")
            raise RuntimeError("planted")

        return wrong

    return load


def _scale_gradient(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return tensor * factor + tensor.detach() * (1 - factor)


@pytest.mark.parametrize(
    "fault",
    [
        *("output", "shifted", "nan", "raises"),
        *("grad_value", "grad_sampling_locations", "grad_attention_weights"),
    ],
)
def test_a_wrong_contestant_gets_no_time(fault: str) -> None:
    rows = run.measure_workload(
        SMALL,
        1,
        [run.Entry("faulty", "f32", 1), run.Entry("right", "f32", 1)],
        seconds=0.0,
        rounds=(1, 1),
        peers={"faulty": faulty(fault), "right": right},
    )
    assert [row["status"] for row in rows] == ["wrong", "ok"]
    assert "times" not in rows[0]
    assert "times" in rows[1]
    if fault.startswith("grad"):
        assert fault in rows[0]["reason"]
    if fault == "raises":
        assert "planted" in rows[0]["reason"]


def test_threads_are_raced_against_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of the test: one thread takes 2 s a phase, two threads take 1 s."""
    raced: list[list[int]] = []

    def race(entrants: list[run.measure.Entrant], *rest: Any) -> None:
        raced.append([entrant.threads for entrant in entrants])
        for entrant in entrants:
            entrant.times = {phase: [2 / entrant.threads] * 3 for phase in measure.PHASES}
            entrant.busy = [1.0]

    handover = iter([57.0, 93.0])
    monkeypatch.setattr(run.measure, "race", race)
    monkeypatch.setattr(run.probe, "handover", lambda: next(handover))
    entries = [run.Entry("grid_sample", "f32", 1), run.Entry("compiled", "f32", 2)]
    rows = run.measure_workload(SMALL, 1, entries)
    assert raced == [[1, 2], [1, 2]]  # both contestants, then ours with one thread and with two
    assert "scaling" not in rows[0]
    assert rows[1]["scaling"] == dict.fromkeys(measure.PHASES, [2.0] * 3)
    line = report._scaling(rows)[0]
    assert line.startswith("compiled f32, 2 threads against 1: forward 2.00")
    assert line.endswith("(a cache line takes 93 ns to the other core and back)")


def test_a_gradient_that_is_lost_outside_the_subset_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The value gradient of a query outside the subset that the oracle computes."""
    monkeypatch.setattr(check, "SUBSET_POINTS", 8 * 12 * 4)
    x = draw(SMALL)
    expected = check.expected_of(x)
    assert len(expected.queries) == 4 < SMALL.queries
    unseen = next(q for q in range(SMALL.queries) if q not in expected.queries)
    op = right(SMALL, "cpu")
    keep = torch.ones(1, SMALL.queries, 1)
    keep[:, unseen] = 0

    def loses(x: WorkloadInputs) -> torch.Tensor:
        through = op(x.map(lambda t: t.detach() if t is x.value else t))
        full = op(x)
        return torch.where(keep.bool(), full, through)

    assert check.verdict(check.errors_of(op, x, expected), torch.float32) is None
    assert "grad_value, all queries" in (
        check.verdict(check.errors_of(loses, x, expected), torch.float32) or ""
    )


@pytest.mark.parametrize("name", ["rfdetr_decoder_560", "dfine_decoder_640"])
@pytest.mark.parametrize("dtype", check.TOLERANCES, ids=str)
def test_the_baseline_is_right(name: str, dtype: torch.dtype) -> None:
    workload = scaled(WORKLOADS[name], 0.2)
    x = draw(workload, batch=2, dtype=dtype)
    errors = check.errors_of(right(workload, "cpu"), x, check.expected_of(x))
    assert check.verdict(errors, dtype) is None


# Measuring -----------------------------------------------------------------------------------


def test_a_race_is_interleaved_and_paired() -> None:
    order: list[str] = []
    x = draw(SMALL)
    op = right(SMALL, "cpu")

    def named(name: str) -> peers.Op:
        def call(x: WorkloadInputs) -> torch.Tensor:
            order.append(name)
            return op(x)

        return call

    entrants = [measure.Entrant(named(name), [x]) for name in "ab"]
    measure.race(entrants, seconds=0.0, rounds=(4, 4))
    for entrant in entrants:
        assert {phase: len(times) for phase, times in entrant.times.items()} == dict.fromkeys(
            (measure.AGAIN, *measure.PHASES), 4
        )
    # a round calls each op twice without gradients, once with; every other round starts with b
    assert "".join(order) == "aaabbb" + "bbbaaa" + "aaabbb" + "bbbaaa"


def test_times_are_of_the_right_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the op moves: 1 s in forward, 10 s in backward."""
    now = 0.0

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
            pass_time(1)
            return tensor.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            pass_time(10)
            return grad

    clock = SimpleNamespace(perf_counter=lambda: now, process_time=lambda: now)
    monkeypatch.setattr(measure, "time", clock)
    op = right(SMALL, "cpu")
    entrant = measure.Entrant(lambda x: Slow.apply(op(x)), [draw(SMALL)])
    measure.race([entrant], seconds=0.0, rounds=(3, 3))
    assert entrant.times == {
        measure.AGAIN: [1.0] * 3,
        "forward": [1.0] * 3,
        "backward": [10.0] * 3,
        "forward_backward": [11.0] * 3,
    }
    assert entrant.busy == [1.0] * 3


def test_ratios_are_taken_round_by_round() -> None:
    assert measure.ratio([2.0, 40.0, 6.0], [1.0, 10.0, 3.0]) == {"median": 2, "min": 2, "max": 4}


def test_peak_memory_sees_what_was_freed_again() -> None:
    x = draw(SMALL)

    def hungry(x: WorkloadInputs) -> torch.Tensor:
        scratch = torch.ones(8 << 20)  # 32 MiB
        return right(SMALL, "cpu")(x) + 0 * scratch[0]

    modest = measure.peaks(right(SMALL, "cpu"), x)["forward"]
    if modest is None:
        pytest.skip("this system has no high-water mark of memory")
    for _ in range(2):  # the second time the allocator could reuse what it kept
        greedy = measure.peaks(hungry, x)["forward"]
        assert greedy is not None
        assert 31 * 2**20 < greedy - modest < 36 * 2**20


# The command ---------------------------------------------------------------------------------


def test_end_to_end(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "--workloads rfdetr_decoder_560 --contestants reference,grid_sample,mmcv --dtypes f32 "
        f"--threads 1 --models none --seconds 0.1 --device cpu --out {tmp_path}"
    )
    assert run.main(command.split()) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["format"] == 1
    for fact in ("cpu", "cores", "torch", "python", "commit", "threads", "instruction_set"):
        assert fact in results["environment"]
    statuses = {row["contestant"]: row["status"] for row in results["rows"]}
    assert statuses == {"reference": "ok", "grid_sample": "ok", "mmcv": "missing"}
    for row in results["rows"]:
        assert {*KEY, "status"} <= row.keys()
        if row["status"] == "ok":
            assert row["times"].keys() == {measure.AGAIN, *measure.PHASES}
            assert min(map(min, row["times"].values())) > 0
            assert max(row["errors"].values()) <= check.TOLERANCES[torch.float32]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "does not run on cpu" in (tmp_path / "bench.txt").read_text()

    capsys.readouterr()
    assert run.main(["table", str(tmp_path / "bench.json")]) == 0
    assert "| rfdetr_decoder_560 | " in capsys.readouterr().out

    for row in results["rows"]:
        for times in row.get("times", {}).values():
            times[:] = [seconds / 2 for seconds in times]
    (tmp_path / "half.json").write_text(json.dumps(results))
    files = [str(tmp_path / name) for name in ("bench.json", "half.json")]
    assert run.main(["compare", *files]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "rfdetr" in line]
    assert len(lines) == 2
    assert sum(line.count(" 2.00 ") for line in lines) == 6


def test_a_wrong_backend_fails_the_run() -> None:
    row = {"contestant": "compiled", "dtype": "f32", "workload": "w", "status": "wrong"}
    results = {"rows": [{**row, "reason": "output is off by 1"}], "models": []}
    assert len(failures(results)) == 1
    results["rows"][0]["contestant"] = "mmcv"  # a peer's fault is shown, and is not ours
    assert failures(results) == []


def test_default_plan() -> None:
    preset = run.PRESETS["default"]
    encoder = run.plan(preset, WORKLOADS["deformable_detr_encoder_800x1333"], "cpu")
    assert run.Entry("compiled", "bf16", 1) in encoder
    assert run.Entry("grid_sample", "f32", 1) in encoder
    assert run.Entry("compiled", "f32", torch.get_num_threads()) in encoder
    assert not any(entry.contestant == "reference" for entry in encoder)
    decoder = run.plan(preset, WORKLOADS["dino_decoder_900q"], "cpu")
    assert run.Entry("reference", "f32", 1) in decoder
    assert {entry.threads for entry in decoder} == {1}


@pytest.mark.parametrize("name", ["rfdetr_decoder_560", "dfine_decoder_640"])
def test_roofline_counts_the_rows_that_have_a_gradient(name: str) -> None:
    workload = scaled(WORKLOADS[name], 0.3)
    x = draw(workload, batch=2, dtype=torch.float64)  # float32 may round onto the next pixel
    value = x.value.clone().requires_grad_()
    right(workload, "cpu")(x.map(lambda t: value if t is x.value else t)).abs().sum().backward()
    assert value.grad is not None
    assert roofline._rows_touched(x) == int(value.grad.ne(0).any(-1).sum())


def test_roofline_bounds() -> None:
    sizes = roofline.SETS.values()
    machine = roofline.Machine(
        lanes=8,
        multiply_add=0.25,
        row={size: 1.0 + i for i, size in enumerate(sizes)},
        stream=dict.fromkeys(sizes, 10.0),
    )
    assert machine.row_of(2**21) == machine.row[2**20]  # never more than such a set can cost
    workload = WORKLOADS["rtdetr_decoder_640"]
    found = roofline.bounds(machine, workload, draw(workload))
    assert found["loads"] == 4 * 32 / 8
    assert found["arithmetic"] == found["loads"] * 0.25
    assert found["L1"] == 4
    assert found["bound"] == max(found[name] for name in ("arithmetic", "L1", "far"))
    passing = (12 + 128 / 12) / 10  # location and weight, and a twelfth of an output row
    assert found["memory"] == pytest.approx(found["touched"] * max(machine.row.values()) + passing)


# Whole models --------------------------------------------------------------------------------


def test_a_model_keeps_its_outputs_and_a_wrong_op_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build("deformable_detr")
    monkeypatch.setattr(models, "build", lambda name, seed: model)
    row = models.measure_model("deformable_detr", size=64, rounds=1)
    assert row["status"] == "ok"
    assert row["difference"] <= models.LARGEST_DIFFERENCE
    assert 0 < row["share"] < 1
    exact = models.adapters.ms_deform_attn

    def swapped(*inputs: Any, **options: Any) -> torch.Tensor:
        return exact(*inputs[:-1], inputs[-1].flip(-1), **options)  # the points in a wrong order

    monkeypatch.setattr(models.adapters, "ms_deform_attn", swapped)
    assert models.measure_model("deformable_detr", size=64, rounds=1)["status"] == "wrong"


@pytest.mark.parametrize(
    ("figures", "fails"),
    [
        ({"registers": 64, "occupancy": 50}, False),
        ({"registers": 65, "occupancy": 50}, True),
        ({"registers": 64, "occupancy": 49}, True),
        ({"registers": 64, "occupancy": 50, "spills": 4}, True),
    ],
)
def test_kernel_limits(figures: dict[str, int], fails: bool) -> None:
    assert kernels.Kernel(90, "forward_teams", "f32", "", **figures).fails == fails
    backward = {**figures, "registers": figures["registers"] + 32}
    assert kernels.Kernel(90, "backward_teams", "f32", "", **backward).fails == fails


def test_kernel_names_are_parsed() -> None:
    signature = (
        "void deform_attn::backward_teams<__half, 8, unsigned int, deform_attn::FusedPoints<"
    )
    kernel = kernels.parse(f"{signature}__half> >(deform_attn::Problem)", 90)
    assert (kernel.name, kernel.dtype) == ("backward_teams", "f16")
    assert kernel.variant == "16 bytes, uint32, fused"
