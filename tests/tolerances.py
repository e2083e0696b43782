"""The one rule by which every result is judged, and the check that applies it.

Truth is the float64 oracle, on the very numbers that the kernel was given. An error may be twice
that of the reference backend in the same dtypes, or what few roundings come to, whichever is more:
half a unit in the last place of the result's largest number, and one unit of the dtype of the sums
(float32 or float64) in the largest sum of absolute terms. At pixel knots, where the reference is
wrong, its error is no measure and the second bound stands alone.
"""

from __future__ import annotations

import oracle
import torch
from cases import Inputs
from runners import Runner, package_runner
from torch import Tensor

RESULTS = ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights")
TIMES_REFERENCE = 2.0
ROUNDINGS_OF_SUMS = 1.0

REFERENCE = package_runner("reference", "cpu")


def grad_output_for(inputs: Inputs) -> Tensor:
    """A fixed gradient of the output, in its dtype."""
    B, _, M, D = inputs.value.shape
    shape = (B, inputs.sampling_locations.shape[1], M * D)
    generator = torch.Generator().manual_seed(7)
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    return numbers.to(inputs.value.device, inputs.value.dtype)


def truth(inputs: Inputs, grad_output: Tensor) -> tuple[Tensor, ...]:
    """The four RESULTS in float64."""
    with torch.no_grad():
        output = oracle.ms_deform_attn(inputs)
    return output, *oracle.gradients(inputs, grad_output)


def results(runner: Runner, inputs: Inputs, grad_output: Tensor) -> tuple[Tensor, ...]:
    """The four RESULTS of a runner; shapes and dtypes are checked here, once for all tests."""
    output = runner.forward(inputs)
    grads = runner.gradients(inputs, grad_output)
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


def error_of(result: Tensor, exact: Tensor) -> float:
    """Largest absolute error; infinite for a NaN."""
    if result.numel() == 0:
        return 0.0
    return (result.double().cpu() - exact.cpu()).abs().nan_to_num(nan=float("inf")).max().item()


def roundings(inputs: Inputs, grad_output: Tensor, exact: tuple[Tensor, ...]) -> tuple[float, ...]:
    """The error that few roundings make, for each of the four RESULTS."""
    real = torch.float64 if inputs.value.dtype is torch.float64 else torch.float32
    dtypes = (inputs.value.dtype, *(tensor.dtype for tensor in inputs.tensors))
    terms = oracle.sums_of_absolute_terms(inputs, grad_output)
    return tuple(
        torch.finfo(dtype).eps / 2 * largest(e) + ROUNDINGS_OF_SUMS * torch.finfo(real).eps * size
        for dtype, e, size in zip(dtypes, exact, map(largest, terms))
    )


def largest(tensor: Tensor) -> float:
    """Its largest absolute number; 0 where there is none or a NaN."""
    return tensor.double().abs().nan_to_num(0, 0).max().item() if tensor.numel() else 0.0


def check(
    runner: Runner, inputs: Inputs, *, at_knots: bool = False, names: tuple[str, ...] = RESULTS
) -> None:
    """Output and gradients of a runner against the oracle, by the rule above."""
    grad_output = grad_output_for(inputs)
    check_results(
        results(runner, inputs, grad_output), inputs, grad_output, at_knots=at_knots, names=names
    )


def check_results(
    found: tuple[Tensor, ...],
    inputs: Inputs,
    grad_output: Tensor,
    *,
    at_knots: bool = False,
    names: tuple[str, ...] = RESULTS,
) -> None:
    inputs, grad_output = inputs.to("cpu"), grad_output.cpu()
    exact = truth(inputs, grad_output)
    limits = list(roundings(inputs, grad_output, exact))
    if not at_knots:
        reference = results(REFERENCE, inputs, grad_output)
        for i, (r, e) in enumerate(zip(reference, exact)):
            limits[i] = max(limits[i], TIMES_REFERENCE * error_of(r, e))
    faults = []
    for name, result, e, limit in zip(RESULTS, found, exact, limits):
        error = error_of(result, e)
        if name in names and not error <= limit:
            faults.append(f"{name}: error {error:.3g}, at most {limit:.3g} is right")
    assert not faults, "; ".join(faults)
