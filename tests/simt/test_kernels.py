"""The CUDA kernels beyond the operator: algorithms, orders of threads, invalid levels.

test_op.py tests what they compute, through runner.py.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from deform_attn.testing import (
    CASES,
    DTYPES,
    RESULTS,
    Case,
    OpInputs,
    check_results,
    grad_output_for,
    oracle,
)
from tests.simt import build
from tests.simt.emulated import ALGORITHMS, Emulated

KERNELS = Emulated()
OLD = Emulated(atomic_floats=1)
ENCODER = Case("encoder", levels=((9, 12), (5, 6), (3, 3)), batch=1, queries=147, head_dim=32)


@pytest.fixture(autouse=True)
def usual_order() -> Iterator[None]:
    yield
    for kernels in (KERNELS, OLD):
        kernels.set_order("forward")


def run(
    inputs: OpInputs, grad_output: Tensor, kernels: Emulated, algorithm: str
) -> tuple[Tensor, ...]:
    """The four RESULTS."""
    arguments = (*inputs.arguments, inputs.num_points)
    output = kernels.forward(*arguments, baseline=algorithm == "baseline")
    return output, *kernels.backward(grad_output, *arguments, algorithm=algorithm)


def check_call(inputs: OpInputs, kernels: Emulated = KERNELS, algorithm: str = "planned") -> None:
    grad_output = grad_output_for(inputs)
    check_results(run(inputs, grad_output, kernels, algorithm), inputs, grad_output)


@pytest.mark.parametrize("head_dim", [1, 4, 8, 16, 30, 32, 64, 71, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ["scatter", "tiles", "fixed", "gather"])
def test_head_dims(head_dim: int, dtype: str, algorithm: str) -> None:
    """Queries that are the pixels, so that tiles, bands and shared pixels occur."""
    case = Case("pixels", levels=((5, 7), (3, 4)), batch=1, queries=47, head_dim=head_dim)
    check_call(case.make(DTYPES[dtype]), algorithm=algorithm)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("points", [(4, 4), (13, 12), (8, 20)])
@pytest.mark.parametrize("algorithm", ["scatter", "tiles"])
def test_two_points_a_lane(algorithm: str, points: tuple[int, ...], dtype: str) -> None:
    """Four queries of a warp at a time, 16 points each: one round, or more with other levels."""
    case = Case("rounds", ((5, 7), (3, 4)), batch=1, queries=47, head_dim=32, points=points)
    check_call(case.make(DTYPES[dtype]), Emulated(processors=1), algorithm)


@pytest.mark.parametrize(
    ("changes", "dtype", "processors", "expected"),
    [
        ({}, "f32", 1, "tiles"),
        ({}, "bf16", 1, "tiles"),
        ({}, "f64", 1, "scatter"),
        ({}, "f32", 132, "scatter"),  # too few blocks
        ({"queries": 146}, "f32", 1, "scatter"),  # the queries are not the pixels
        ({"head_dim": 30}, "f32", 1, "scatter"),
        ({"points": 2}, "f32", 1, "scatter"),  # half of the threads would have no point
        ({"points": (8, 1, 4)}, "f32", 1, "tiles"),
    ],
)
def test_choice(changes: dict[str, Any], dtype: str, processors: int, expected: str) -> None:
    """Which algorithm a backward pass takes; test_encoder runs each of them."""
    inputs = dataclasses.replace(ENCODER, **{"points": 3, **changes}).make(DTYPES[dtype])
    kernels = Emulated(processors=processors)
    arguments = (*inputs.arguments, inputs.num_points)
    assert kernels.chosen_algorithm(*arguments) == expected
    fixed = dtype != "f64"
    repeatable = kernels.chosen_algorithm(*arguments, deterministic=True)
    assert repeatable == ("fixed" if fixed else "gather")


def test_far_points_of_a_tile() -> None:
    """Points of a block further apart than its window of slots; a map of one pixel too."""
    case = Case("far", levels=((3, 150), (90, 2), (1, 1)), batch=1, queries=631, head_dim=8)
    for kernels in (KERNELS, OLD):
        for algorithm in ("tiles", "fixed"):
            check_call(case.make(DTYPES["f32"]), kernels, algorithm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_encoder(dtype: str, algorithm: str) -> None:
    check_call(ENCODER.make(DTYPES[dtype]), algorithm=algorithm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ["scatter", "gather"])
def test_long_offsets(dtype: str, algorithm: str) -> None:
    """The kernels for tensors of 2**31 elements and more, on small ones."""
    check_call(ENCODER.make(DTYPES[dtype]), Emulated(long_offsets=True), algorithm)


def untouched(*shape: int) -> Tensor:
    """Zeros in float16 that take memory only where they are written to."""
    memory = mmap.mmap(-1, 2 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.float16).view(shape)


def test_tensor_of_more_than_2_31_elements() -> None:
    heads, head_dim = 2, 8
    start = 2**31 // (heads * head_dim) + 5
    case = Case("end", levels=((5, 7), (3, 4)), batch=1, heads=heads, queries=9, head_dim=head_dim)
    small = case.make(DTYPES["f16"])
    rows = small.value.shape[1]
    large, grad_value = (untouched(1, start + rows, heads, head_dim) for _ in range(2))
    assert large.numel() > 2**31
    large[:, start:] = small.value
    starts = torch.tensor([start, start + 35])
    grad_output = grad_output_for(small)
    # level sizes from the host: few tiles
    arguments = (large, case.levels, starts, *small.tensors[1:])
    _, *targets = KERNELS.targets(*small.arguments, algorithm="gather")
    found = (
        KERNELS.forward(*arguments),
        *KERNELS.backward(
            grad_output, *arguments, algorithm="gather", targets=(grad_value, *targets)
        ),
    )
    expected = run(small, grad_output, KERNELS, "gather")
    assert torch.equal(found[1][:, start:], expected[1])
    for i in (0, 2, 3):
        assert torch.equal(found[i], expected[i])


@pytest.mark.parametrize("processors", [1, 1000])
@pytest.mark.parametrize("algorithm", ["scatter", "gather"])
def test_block_sizes(processors: int, algorithm: str) -> None:
    """With one multiprocessor the blocks are the largest, with a thousand the smallest."""
    for name in ("shared_among_threads", "listed_points", "head_dim_64"):
        case = CASES[name].smaller(400)
        check_call(case.make(DTYPES["f32"]), Emulated(processors=processors), algorithm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ["fixed", "gather"])
@pytest.mark.parametrize("metadata", ["tensor", "list"])
def test_deterministic(dtype: str, algorithm: str, metadata: str) -> None:
    """The same bits in every run, each with the threads in another order."""
    inputs = ENCODER.make(DTYPES[dtype])
    if metadata == "list":  # and the queries are not the pixels
        inputs = dataclasses.replace(ENCODER, queries=90).make(DTYPES[dtype])
        inputs = inputs.replace(spatial_shapes=list(ENCODER.levels), level_start_index=None)
    grad_output = grad_output_for(inputs)
    first = run(inputs, grad_output, KERNELS, algorithm)
    for seed in range(10 if metadata == "list" else 3):
        KERNELS.set_order("reversed" if seed == 0 else "shuffled", seed)
        for name, one, again in zip(RESULTS, first, run(inputs, grad_output, KERNELS, algorithm)):
            assert torch.equal(one, again), f"{name}, order {seed}"


def test_scattered_sums_depend_on_the_order() -> None:
    """With atomics the bits change: test_deterministic can fail."""
    inputs = CASES["same_point"].make(DTYPES["f32"])
    inputs = inputs.replace_tensors(*(tensor.contiguous() for tensor in inputs.tensors))
    grad_output = grad_output_for(inputs)
    found = set()
    for seed in range(10):
        KERNELS.set_order("shuffled", seed)
        grad_value = run(inputs, grad_output, KERNELS, "scatter")[1]
        found.add(grad_value.numpy().tobytes())
    assert len(found) > 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kernels", [KERNELS, OLD], ids=["sm_90", "before_sm_90"])
def test_orders_of_threads(kernels: Emulated, algorithm: str) -> None:
    inputs = ENCODER.make(DTYPES["f32"])
    for order in ("reversed", "shuffled"):
        kernels.set_order(order, seed=3)
        check_call(inputs, kernels, algorithm)


def test_small_gradients_are_not_lost() -> None:
    """A thousand terms of 2**-12 beside one of 1: a bfloat16 sum would stay at 1."""
    B, Q, M, D = 1, 1024, 1, 8
    value = torch.zeros(B, 4, M, D, dtype=torch.bfloat16)
    locations = torch.full((B, Q, M, 1, 1, 2), 0.25)  # the centre of pixel (0, 0) of 2 x 2
    weights = torch.full((B, Q, M, 1, 1), 2.0**-12)
    weights[:, 0] = 1
    grad_output = torch.ones(B, Q, M * D, dtype=torch.bfloat16)
    for algorithm in ("scatter", "fixed", "gather", "baseline"):
        grad = KERNELS.backward(
            grad_output, value, [(2, 2)], None, locations, weights, algorithm=algorithm
        )[0]
        assert torch.equal(grad[:, 0].float(), torch.full((B, M, D), 1.25)), algorithm


@pytest.mark.parametrize("factor", [2.0**-80, 2.0**-30, 2.0**90])
def test_fixed_point_has_the_scale_of_its_terms(factor: float) -> None:
    """Gradients that are `factor` times as large are `factor` times the same numbers."""
    inputs = ENCODER.make(DTYPES["f32"])
    grad_output = grad_output_for(inputs)
    arguments = (*inputs.arguments, inputs.num_points)
    expected = KERNELS.backward(grad_output, *arguments, algorithm="fixed")[0]
    found = KERNELS.backward(grad_output * factor, *arguments, algorithm="fixed")[0]
    error = (found.double() / factor - expected.double()).abs().max()
    assert error <= 1e-6 * expected.abs().max()
    assert not KERNELS.backward(grad_output * 0, *arguments, algorithm="fixed")[0].any()


def test_fixed_point_of_infinite_terms() -> None:
    """The gradient of value is NaN in the image and head of an infinite term, and only there."""
    case = dataclasses.replace(ENCODER, batch=2, head_dim=4)
    inputs = case.make(DTYPES["f32"])
    arguments = (*inputs.arguments, inputs.num_points)
    grad_output = grad_output_for(inputs)
    expected = KERNELS.backward(grad_output, *arguments, algorithm="fixed")[0]
    grad_output[1, 5, 4:8] = math.inf  # of the second head
    found = KERNELS.backward(grad_output, *arguments, algorithm="fixed")[0]
    assert found[1, :, 1].isnan().all()
    found[1, :, 1] = expected[1, :, 1]
    assert torch.equal(found, expected)


INVALID = {
    "huge": [(2**40, 2**40), (4, 5), (3, 3)],
    "negative": [(-4, -5), (4, 5), (3, 3)],
    "zero": [(0, 5), (4, 0), (3, 3)],
    "beyond_the_end": [(4, 5), (100, 100), (3, 3)],
    "products_that_overflow": [(2**32, 2**32), (2**31, 2), (2**62, 4)],
    "one_row_too_many": [(4, 5), (5, 6), (1, 1)],
}


@pytest.mark.parametrize("invalid", INVALID)
@pytest.mark.parametrize("starts", [None, (0, 20, 40), (-1, 2**62, 49), (2**63 - 1, -(2**63), 7)])
def test_invalid_levels(invalid: str, starts: tuple[int, ...] | None) -> None:
    """Such a level is empty, as in the oracle; nothing is read or written out of bounds."""
    case = Case("invalid", levels=((1, 1), (1, 1), (1, 1)), rows=49, batch=1, head_dim=4, queries=7)
    shapes = torch.tensor(INVALID[invalid])
    inputs = case.make(DTYPES["f32"]).replace(spatial_shapes=shapes)
    inputs = inputs.replace_tensors(inputs.value.nan_to_num(0.5), *inputs.tensors[1:])
    if starts is None:  # the rule of the kernels: an invalid level has no rows
        areas = [h * w if h > 0 and w > 0 and h * w <= 49 else 0 for h, w in INVALID[invalid]]
        starts = tuple(sum(areas[:i]) for i in range(3))
        given = None
    else:
        given = torch.tensor(starts)
    explicit = inputs.replace(level_start_index=torch.tensor(starts))
    grad_output = grad_output_for(inputs)
    exact = (oracle.ms_deform_attn(explicit), *oracle.gradients(explicit, grad_output))
    for algorithm in ALGORITHMS:
        found = run(inputs.replace(level_start_index=given), grad_output, KERNELS, algorithm)
        for name, one, true in zip(RESULTS, found, exact):
            error = (one.double() - true).abs().max().item()
            assert error <= 1e-4 * true.abs().max().clamp(min=1).item(), f"{algorithm}: {name}"


def test_errors_name_the_kernel() -> None:
    inputs = CASES["non_square"].make(DTYPES["f32"])
    arguments = (*inputs.arguments, inputs.num_points)
    KERNELS.module.plant_error(700)
    with pytest.raises(RuntimeError, match="CUDA kernel forward_teams was not launched: planted"):
        KERNELS.forward(*arguments)
    KERNELS.module.plant_error(209)  # cudaErrorNoKernelImageForDevice
    with pytest.raises(RuntimeError) as caught:
        KERNELS.backward(grad_output_for(inputs), *arguments, algorithm="scatter")
    text = str(caught.value)
    assert "backward_teams was not built for this GPU, which has compute capability 9.0" in text
    assert 'TORCH_CUDA_ARCH_LIST="9.0" pip install --no-build-isolation --no-binary=' in text


def run_fused(inputs: OpInputs, kernels: Emulated, algorithm: str) -> None:
    """The fused kernels on the same maps; test_fused_kernels.py tests what they compute."""
    B, Q = inputs.sampling_locations.shape[:2]
    size = 5 if kernels.long_offsets else 2  # rotated boxes, points
    reference = inputs.sampling_locations.new_full((B, Q, 1, size), 0.5)
    arguments = (
        *(inputs.value, inputs.spatial_shapes, inputs.level_start_index, reference),
        inputs.sampling_locations.to(inputs.attention_weights.dtype),
        *(inputs.attention_weights, inputs.num_points, 1.0),
    )
    kernels.fused_forward(*arguments)
    kernels.fused_backward(grad_output_for(inputs), *arguments, algorithm=algorithm)


def test_every_kernel_is_reached(record_property: Any) -> None:
    """Each __global__ function, in each dtype; with -s, the number of cases that reach it."""
    cases: Counter[str] = Counter()
    reached: dict[str, set[str]] = {}

    def launched() -> Counter[str]:
        return Counter(KERNELS.module.launches())

    for dtype in DTYPES:
        for name in ("non_square", "head_dim_32", "head_dim_71"):
            inputs = CASES[name].make(DTYPES[dtype])
            before = launched()
            for algorithm in ALGORITHMS:
                for kernels in (KERNELS, Emulated(long_offsets=True)):
                    run(inputs, grad_output_for(inputs), kernels, algorithm)
                    if algorithm in ("scatter", "fixed", "gather"):
                        run_fused(inputs, kernels, algorithm)
            if name == "head_dim_32":
                inputs = ENCODER.make(DTYPES[dtype])
                run(inputs, grad_output_for(inputs), KERNELS, "tiles")
            here = [re.search(r"deform_attn::(\w+)<(\w+)", name) for name in launched() - before]
            cases.update({match[1] for match in here})
            for match in here:
                reached.setdefault(match[1], set()).add(match[2])
    for name in sorted(build.declared_kernels()):
        record_property(name, cases[name])
        print(f"{name}: {cases[name]} cases, as {', '.join(sorted(reached.get(name, ())))}")
    assert set(cases) == build.declared_kernels()
    narrow = {"__half", "__nv_bfloat16"}
    wide = {"double", "float"}
    for name, types in reached.items():
        expected = {
            "round_sums": narrow,
            **dict.fromkeys(("sum_heads", "frame_boxes", "sum_frames"), wide),
            **dict.fromkeys(
                ("backward_tiles", "bound_terms", "scatter_fixed", "round_fixed"),
                {"float"} | narrow,
            ),
        }
        assert types == expected.get(name, wide | narrow), name
