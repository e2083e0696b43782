"""Tests of the tests: the shared check must refuse kernels with a known fault, and pass without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deform_attn.testing import CASES, DTYPES, Dtypes, OpInputs, check, oracle
from tests.runners import Gradients, Runner
from tests.test_op import knot_inputs

Fault = tuple[Callable[[OpInputs], torch.Tensor], Callable[[OpInputs, torch.Tensor], Gradients]]


def forward(inputs: OpInputs) -> torch.Tensor:
    return oracle.ms_deform_attn(inputs).to(inputs.value.dtype)


def backward(inputs: OpInputs, grad_output: torch.Tensor) -> Gradients:
    grads = oracle.gradients(inputs, grad_output)
    value, locations, weights = (g.to(t.dtype) for g, t in zip(grads, inputs.tensors))
    return value, locations, weights


def with_levels_of(change: Callable[[OpInputs], OpInputs]) -> Fault:
    return lambda i: forward(change(i)), lambda i, g: backward(change(i), g)


def swapped_sides(inputs: OpInputs) -> OpInputs:
    return inputs.replace(spatial_shapes=inputs.spatial_shapes.flip(-1))


def swapped_coordinates(inputs: OpInputs) -> OpInputs:
    return inputs.replace(sampling_locations=inputs.sampling_locations.flip(-1))


def moved_by(step: float) -> Callable[[OpInputs], OpInputs]:
    return lambda i: i.replace(sampling_locations=i.sampling_locations + step)


def rounded_locations(inputs: OpInputs) -> OpInputs:
    return inputs.replace(
        sampling_locations=inputs.sampling_locations.bfloat16().to(inputs.sampling_locations.dtype)
    )


def edit(which: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    """One gradient changed; the rest is right."""

    def faulty(inputs: OpInputs, grad_output: torch.Tensor) -> Gradients:
        grads = list(backward(inputs, grad_output))
        grads[which] = change(grads[which])
        return grads[0], grads[1], grads[2]

    return forward, faulty


def one_lost(grad: torch.Tensor) -> torch.Tensor:
    """One element of thousands."""
    flat = grad.flatten().clone()
    flat[flat.abs().argmax()] = 0
    return flat.view(grad.shape)


def last_query_unwritten(inputs: OpInputs) -> torch.Tensor:
    output = forward(inputs)
    output[-1, -1, -1] = torch.nan
    return output


def wrong_by_eight_roundings(inputs: OpInputs) -> torch.Tensor:
    output = forward(inputs)
    return output + 8 * torch.finfo(output.dtype).eps * output.abs().max()


FAULTS: dict[str, Fault] = {
    "sides swapped": with_levels_of(swapped_sides),
    "x and y swapped": with_levels_of(swapped_coordinates),
    "half a pixel off": with_levels_of(moved_by(0.5 / 7)),
    "a hundred roundings off": with_levels_of(moved_by(1e-5)),
    "locations in bfloat16": with_levels_of(rounded_locations),
    "value gradient lost": edit(0, torch.zeros_like),
    "location gradient lost": edit(1, torch.zeros_like),
    "weight gradient lost": edit(2, torch.zeros_like),
    "one value gradient lost": edit(0, one_lost),
    "one location gradient lost": edit(1, one_lost),
    "one weight gradient lost": edit(2, one_lost),
    "location gradient in pixels": edit(1, lambda grad: grad / 7),
    "location gradient swapped": edit(1, lambda grad: grad.flip(-1)),
    "an element never written": (last_query_unwritten, backward),
    "eight roundings off": (wrong_by_eight_roundings, backward),
}


def runner_of(fault: Fault) -> Runner:
    return Runner.from_kernels("faulty", *fault, why_not=lambda dtypes: None)


@pytest.mark.only(dtypes=list(DTYPES), cases=["non_square", "listed_points", "head_dim_30"])
def test_no_fault_passes(dtypes: Dtypes, case: object) -> None:
    check(runner_of((forward, backward)), case.make(dtypes))  # type: ignore[attr-defined]


@pytest.mark.only(dtypes=["f32", "bf16"])
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str, dtypes: Dtypes) -> None:
    if name == "a hundred roundings off" and dtypes.name == "bf16":
        name = "half a pixel off"  # 1e-5 is nothing to bfloat16
    with pytest.raises(AssertionError, match="is right"):
        check(runner_of(FAULTS[name]), CASES["non_square"].make(dtypes))


def rounded_pixel(inputs: OpInputs) -> OpInputs:
    """location * size - 1/2 rounded in float32 before its floor, as a plain kernel does."""
    sizes = inputs.spatial_shapes.flip(-1).float()
    pixel = inputs.sampling_locations * sizes - 0.5
    return as_float64(inputs, (pixel.double() + 0.5) / sizes)


def mapped_location(inputs: OpInputs) -> OpInputs:
    """The location mapped to [-1, 1] and back in float32, as grid_sample has it."""
    sizes = inputs.spatial_shapes.flip(-1).float()
    pixel = ((2 * inputs.sampling_locations - 1 + 1) * sizes - 1) / 2
    return as_float64(inputs, (pixel.double() + 0.5) / sizes)


def as_float64(inputs: OpInputs, locations: torch.Tensor) -> OpInputs:
    return inputs.replace_tensors(
        inputs.value.double(), locations, inputs.attention_weights.double()
    )


@pytest.mark.only(dtypes=["f32", "bf16"])
@pytest.mark.parametrize(
    ("fault", "size"), [(rounded_pixel, (100, 167)), (mapped_location, (64, 64))]
)
def test_wrong_side_of_a_knot_is_found(
    fault: Callable[[OpInputs], OpInputs], size: tuple[int, int], dtypes: Dtypes
) -> None:
    def faulty_forward(inputs: OpInputs) -> torch.Tensor:
        return forward(fault(inputs)).to(inputs.value.dtype)

    def faulty_backward(inputs: OpInputs, grad_output: torch.Tensor) -> Gradients:
        grads = oracle.gradients(fault(inputs), grad_output)
        value, locations, weights = (g.to(t.dtype) for g, t in zip(grads, inputs.tensors))
        return value, locations, weights

    knots = knot_inputs(size, dtypes)
    check(runner_of((forward, backward)), knots, at_knots=True)
    with pytest.raises(AssertionError, match="grad_sampling_locations"):
        check(runner_of((faulty_forward, faulty_backward)), knots, at_knots=True)
