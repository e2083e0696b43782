"""The comparison that tests and benchmarks share: a call's results against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import deform_attn

from . import oracle
from .cases import OpInputs
from .tolerances import TIMES_REFERENCE, error_of, roundings

RESULTS = ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights")
Call = Callable[[OpInputs], Tensor]  # differentiable


def reference(inputs: OpInputs) -> Tensor:
    """The reference backend, whose error is the measure of all others."""
    return deform_attn.ms_deform_attn(
        *inputs.arguments, num_points=inputs.num_points, backend="reference"
    )


def grad_output_for(inputs: OpInputs) -> Tensor:
    """A fixed gradient of the output, in its dtype."""
    B, _, M, D = inputs.value.shape
    shape = (B, inputs.sampling_locations.shape[1], M * D)
    generator = torch.Generator().manual_seed(7)
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    return numbers.to(inputs.value.device, inputs.value.dtype)


def exact_results(inputs: OpInputs, grad_output: Tensor) -> tuple[Tensor, ...]:
    """The four RESULTS in float64."""
    with torch.no_grad():
        output = oracle.ms_deform_attn(inputs)
    return output, *oracle.gradients(inputs, grad_output)


def results(call: Call, inputs: OpInputs, grad_output: Tensor) -> tuple[Tensor, ...]:
    """The four RESULTS of a call; shapes and dtypes are checked here, once for all tests."""
    with torch.no_grad():
        output = call(inputs)
    leaves = inputs.leaves()
    grads = torch.autograd.grad(call(leaves), leaves.tensors, grad_output)
    B, _, M, D = inputs.value.shape
    assert output.shape == (B, inputs.sampling_locations.shape[1], M * D)
    assert output.dtype == inputs.value.dtype
    assert output.device == inputs.value.device
    assert output.is_contiguous()
    for name, grad, tensor in zip(RESULTS[1:], grads, inputs.tensors):
        assert grad.shape == tensor.shape, name
        assert grad.dtype == tensor.dtype, name
        assert grad.device == tensor.device, name
    return output, *grads


def check(
    call: Call, inputs: OpInputs, *, at_knots: bool = False, names: tuple[str, ...] = RESULTS
) -> None:
    """Output and gradients of a call against the oracle, by the rule above."""
    grad_output = grad_output_for(inputs)
    check_results(
        results(call, inputs, grad_output), inputs, grad_output, at_knots=at_knots, names=names
    )


def check_results(
    found: tuple[Tensor, ...],
    inputs: OpInputs,
    grad_output: Tensor,
    *,
    at_knots: bool = False,
    names: tuple[str, ...] = RESULTS,
) -> None:
    """`check` for results that are there already."""
    inputs, grad_output = inputs.to("cpu"), grad_output.cpu()
    exact = exact_results(inputs, grad_output)
    limits = list(roundings(inputs, grad_output, exact))
    if not at_knots:
        found_by_reference = results(reference, inputs, grad_output)
        for i, (r, e) in enumerate(zip(found_by_reference, exact)):
            limits[i] = max(limits[i], TIMES_REFERENCE * error_of(r, e))
    faults = []
    for name, result, e, limit in zip(RESULTS, found, exact, limits):
        error = error_of(result, e)
        if name in names and not error <= limit:
            faults.append(f"{name}: error {error:.3g}, at most {limit:.3g} is right")
    assert not faults, "; ".join(faults)
