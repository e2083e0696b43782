"""Values and gradients of every runner, dtype and hostile case against the oracle."""

from __future__ import annotations

import pytest
import torch

from deform_attn.testing import (
    CASES,
    DTYPES,
    MIXED_DTYPES,
    Case,
    Dtypes,
    OpInputs,
    check,
    error_of,
    exact_results,
    grad_output_for,
    largest,
    oracle,
    results,
    roundings,
)
from deform_attn.testing.comparison import reference
from tests.runners import Runner, operators, package

SOME_CASES = ["non_square", "listed_points", "not_finite", "head_dim_30", "strided"]


@pytest.mark.only(slow={"dtypes": ["f32"], "cases": lambda case: case.name != "many_listed_levels"})
def test_value_and_gradients(runner: Runner, dtypes: Dtypes, case: Case) -> None:
    check(runner, case.make(dtypes, runner.device))


@pytest.mark.only(runners=lambda runner: runner.slow, cases=[*SOME_CASES, "head_dim_32"])
def test_other_dtypes(runner: Runner, dtypes: Dtypes, case: Case) -> None:
    """What the test above leaves out for slow runners."""
    check(runner, case.make(dtypes, runner.device))


@pytest.mark.only(dtypes=list(MIXED_DTYPES), cases=SOME_CASES, slow={"cases": ["listed_points"]})
def test_mixed_dtypes(runner: Runner, dtypes: Dtypes, case: Case) -> None:
    check(runner, case.make(dtypes, runner.device))


@pytest.mark.only(
    runners=lambda runner: runner.deterministic, slow={"dtypes": ["f32"], "cases": SOME_CASES}
)
def test_every_element_is_written(
    runner: Runner, dtypes: Dtypes, case: Case, poisoned: None
) -> None:
    """As above from memory full of NaN, and by the deterministic kernels."""
    check(runner, case.make(dtypes, runner.device))


@pytest.mark.only(
    runners=lambda runner: runner.deterministic,
    cases=["shared_among_threads"],
    slow={"dtypes": ["f32"]},
)
def test_same_bits_every_time(runner: Runner, dtypes: Dtypes, case: Case, poisoned: None) -> None:
    inputs = case.make(dtypes, runner.device)
    grad_output = grad_output_for(inputs)
    first = results(runner, inputs, grad_output)
    for _ in range(3):
        for one, again in zip(first, results(runner, inputs, grad_output)):
            assert torch.equal(one, again)


def test_inputs_are_left_as_they_are(runner: Runner, dtypes: Dtypes) -> None:
    inputs = CASES["non_square"].make(dtypes, runner.device)
    before = [tensor.clone() for tensor in inputs.tensors]
    results(runner, inputs, grad_output_for(inputs))
    for tensor, copy in zip(inputs.tensors, before):
        assert torch.equal(tensor, copy)


# ---------------------------------------------------------------------------------------- knots


def knot_inputs(size: tuple[int, int], dtypes: Dtypes, count: int = 40) -> OpInputs:
    """One query a point: the locations nearest to pixel centres, and two steps to either side."""
    height, width = size
    generator = torch.Generator().manual_seed(height * width)

    def near_centres(side: int) -> torch.Tensor:
        pixels = torch.randint(-1, side + 1, (count,), generator=generator)
        centre = ((pixels + 0.5).double() / side).to(dtypes.locations)
        steps = [centre]
        for toward in (-9.0, 9.0):
            step = centre
            for _ in range(2):
                step = torch.nextafter(step, torch.full_like(step, toward))
                steps.append(step)
        return torch.cat(steps)

    xy = torch.stack((near_centres(width), near_centres(height)), -1)
    Q = xy.shape[0]
    value = torch.rand(1, height * width, 1, 8, generator=generator, dtype=torch.float64)
    return OpInputs(
        value.to(dtypes.value),
        torch.tensor([[height, width]]),
        torch.tensor([0]),
        xy.reshape(1, Q, 1, 1, 1, 2),
        torch.ones(1, Q, 1, 1, 1, dtype=dtypes.weights),
    )


KNOT_SIZES = [(64, 64), (7, 9), (100, 167), (3, 1333)]


@pytest.mark.only(
    runners=lambda runner: runner.exact_at_knots,
    dtypes=[*DTYPES, "bf16_weights_f32"],
    slow={"dtypes": ["f32", "bf16"]},
)
@pytest.mark.parametrize("size", KNOT_SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_round_pixel_centres(runner: Runner, dtypes: Dtypes, size: tuple[int, int]) -> None:
    count = 8 if runner.slow else 40
    check(runner, knot_inputs(size, dtypes, count).to(runner.device), at_knots=True)


@pytest.mark.only(dtypes=[*DTYPES, "bf16_weights_f32"])
def test_the_known_knot(runner: Runner, dtypes: Dtypes) -> None:
    """Pixel 7.99999904632 of 64, exact in float32: the slope is pixel 8 - pixel 7, not 9 - 8."""
    location = torch.tensor([0.1328124850988388, 0.5], dtype=dtypes.locations)
    assert location.double()[0].item() * 64 - 0.5 == 7.9999990463256836
    value = torch.zeros(1, 64, 1, 4, dtype=dtypes.value)
    value[0, 7], value[0, 8], value[0, 9] = 1, 3, -20
    inputs = OpInputs(
        value,
        torch.tensor([[1, 64]]),
        torch.tensor([0]),
        location.reshape(1, 1, 1, 1, 1, 2),
        torch.ones(1, 1, 1, 1, 1, dtype=dtypes.weights),
    ).to(runner.device)
    output, grad_value, grad_locations, _ = results(
        runner, inputs, torch.ones(1, 1, 4, dtype=dtypes.value, device=runner.device)
    )
    slope = grad_locations.flatten()[0].item()
    if runner.exact_at_knots:
        assert slope == 4 * 64 * (3 - 1)
        check(runner, inputs, at_knots=True)
    else:  # the formula of grid_sample may take either slope; the value is right
        assert slope in (4 * 64 * (3 - 1), 4 * 64 * (-20 - 3))
        exact = oracle.ms_deform_attn(inputs)
        moved = 64 * torch.finfo(dtypes.locations).eps * (20 + 3)
        assert error_of(output, exact) <= moved + 23 * torch.finfo(output.dtype).eps


@pytest.mark.only(dtypes=["f64", "f32"])
def test_right_hand_slope_on_a_pixel(runner: Runner, dtypes: Dtypes) -> None:
    """On pixel 2 of 4 the slope is pixel 3 - pixel 2; on the last pixel it is 0 - pixel 3."""
    for pixel, slope in ((2, 5 - 3), (3, 0 - 5), (-1, 1 - 0), (0, 2 - 1)):
        value = torch.tensor([1.0, 2, 3, 5], dtype=dtypes.value).reshape(1, 4, 1, 1)
        inputs = OpInputs(
            value,
            torch.tensor([[1, 4]]),
            torch.tensor([0]),
            torch.tensor([(pixel + 0.5) / 4, 0.5], dtype=dtypes.locations).reshape(
                1, 1, 1, 1, 1, 2
            ),
            torch.ones(1, 1, 1, 1, 1, dtype=dtypes.weights),
        ).to(runner.device)
        one = torch.ones(1, 1, 1, dtype=dtypes.value, device=runner.device)
        assert results(runner, inputs, one)[2].flatten()[0].item() == 4 * slope


# ------------------------------------------------------------------- the judge and its measure


def test_reference_error_is_small(dtypes: Dtypes, case: Case) -> None:
    """The error that others may have twice: a few roundings, more only where locations are mapped.

    Mapping a location to [-1, 1] and back moves it by up to a unit in the last place of the map's
    side, so sums over points move by that, times a slope.
    """
    inputs = case.make(dtypes)
    grad_output = grad_output_for(inputs)
    found, exact = results(reference, inputs, grad_output), exact_results(inputs, grad_output)
    side = max(max(pair) for pair in case.levels)
    moved = side * torch.finfo(oracle.operands(inputs).sampling_locations.dtype).eps
    for result, e, limit in zip(found, exact, roundings(inputs, grad_output, exact)):
        assert error_of(result, e) <= limit + 8 * moved * largest(e)


@pytest.mark.only(cases=["not_finite", "nothing_on_the_map"], slow={"dtypes": ["f32"]})
def test_points_that_are_not_finite(runner: Runner, dtypes: Dtypes, case: Case) -> None:
    """Zero, not merely close to it, and the finite points beside them unharmed."""
    inputs = case.make(dtypes, runner.device)
    output, grad_value, grad_locations, grad_weights = results(
        runner, inputs, grad_output_for(inputs)
    )
    lost = ~inputs.sampling_locations.isfinite().all(-1)
    assert lost.any()
    assert (grad_locations[lost] == 0).all()
    assert (grad_weights[lost] == 0).all()
    if case.name == "nothing_on_the_map":
        for result in (output, grad_value, grad_locations, grad_weights):
            assert (result == 0).all()
    else:
        for result in (output, grad_value, grad_locations, grad_weights):
            assert result.isfinite().all()
            assert (result != 0).any() or runner.slow  # few points, perhaps none on the map


@pytest.mark.only(runners=package, dtypes=["f32", "bf16"], slow=None)
def test_metadata_forms_agree(runner: Runner, dtypes: Dtypes) -> None:
    """Tensor, int32 tensor, list, with and without starts: the same bits."""
    inputs = CASES["non_square"].make(dtypes, runner.device)
    expected = results(runner, inputs, grad_output_for(inputs))
    shapes, starts = inputs.spatial_shapes, inputs.level_start_index
    for other_shapes in (shapes.int(), shapes.tolist(), shapes.cpu(), tuple(shapes.tolist())):
        for other_starts in (None, starts, starts.int(), starts.tolist(), starts.cpu()):
            other = inputs.replace(spatial_shapes=other_shapes, level_start_index=other_starts)
            for one, again in zip(expected, results(runner, other, grad_output_for(inputs))):
                assert torch.equal(one, again)


@pytest.mark.only(runners=package, dtypes=["f32"], slow=None)
def test_flat_and_uniform_layouts_agree(runner: Runner, dtypes: Dtypes) -> None:
    inputs = CASES["non_square"].make(dtypes, runner.device)
    grad_output = grad_output_for(inputs)
    flat = inputs.replace(
        sampling_locations=inputs.sampling_locations.flatten(3, 4),
        attention_weights=inputs.attention_weights.flatten(3, 4),
        num_points=[2, 2, 2],
    )
    for one, other in zip(results(runner, inputs, grad_output), results(runner, flat, grad_output)):
        assert torch.equal(one.flatten(), other.flatten())


@pytest.mark.only(runners=package)
def test_two_to_the_31_elements_on_meta(runner: Runner, dtypes: Dtypes) -> None:
    """Sizes are 64-bit: a call whose value and locations pass 2^31 elements has the right shape."""
    rows = 2**20
    value = torch.empty(4, rows, 8, 64, dtype=dtypes.value, device="meta")
    locations = torch.empty(4, 2**22, 8, 1, 8, 2, dtype=dtypes.locations, device="meta")
    weights = torch.empty(4, 2**22, 8, 1, 8, dtype=dtypes.weights, device="meta")
    forward, backward = operators(runner)
    output = forward(value, None, None, locations, weights, [2**10, 2**10], None)
    assert output.shape == (4, 2**22, 512)
    assert output.dtype == dtypes.value
    assert output.is_meta
    levels = [2**10, 2**10]
    grads = backward(output, value, None, None, locations, weights, levels, None, False, [True] * 3)
    for grad, tensor in zip(grads, (value, locations, weights)):
        assert (grad.shape, grad.dtype, grad.device) == (tensor.shape, tensor.dtype, tensor.device)
