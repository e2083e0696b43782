"""Results of a call compared with the float64 oracle, for each form of the operator.

===================  ===========================  ==========================
form                 results of a call            the oracle's, with limits
===================  ===========================  ==========================
ms_deform_attn       `results`                    `expected`
method="discrete"    `discrete_results`           `expected_discrete`
fused                `fused_results`              `expected_fused`
===================  ===========================  ==========================

`check` and `check_results` do both steps for ``ms_deform_attn``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import deform_attn

from . import oracle
from .cases import FusedInputs, OpInputs, acc_dtype
from .tolerances import (
    LEAST_CAP,
    ROUNDINGS_OF_SUMS,
    TIMES_REFERENCE,
    error_of,
    largest,
    rounding_limits,
    roundings,
)

RESULTS = ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights")
DISCRETE_RESULTS = ("output", "grad_value", "grad_attention_weights")
FUSED_RESULTS = (
    *("output", "grad_value", "grad_reference_points"),
    *("grad_sampling_offsets", "grad_attention_logits"),
)
Call = Callable[[OpInputs], Tensor]  # differentiable
FusedCall = Callable[[FusedInputs], Tensor]


@dataclass(frozen=True)
class Error:
    """The error of one result and the largest one allowed."""

    result: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit; a NaN is not."""
        return self.error <= self.limit

    def __str__(self) -> str:
        return f"{self.result}: error {self.error:.3g}, at most {self.limit:.3g} is right"


@dataclass(frozen=True)
class Expected:
    """What the oracle computes for a call, and the largest error allowed of each result."""

    names: Sequence[str]
    exact: Sequence[Tensor]  # float64, on the CPU
    limits: Sequence[float]

    def errors(self, found: Sequence[Tensor]) -> list[Error]:
        """The error of each result of a call, in the order of `names`."""
        return [
            Error(name, error_of(result, exact), limit)
            for name, result, exact, limit in zip(self.names, found, self.exact, self.limits)
        ]


def reference(inputs: OpInputs) -> Tensor:
    """A call of the reference backend, whose error the rule takes as a measure."""
    return deform_attn.ms_deform_attn(
        *inputs.arguments,
        num_points=inputs.num_points,
        backend="reference",
        value_mask=inputs.value_mask,
    )


def grad_output_for(inputs: OpInputs | FusedInputs) -> Tensor:
    """A gradient of the output, ``[B, Q, M * D]``, in value's dtype; the same numbers each time."""
    B, _, M, D = inputs.value.shape
    generator = torch.Generator().manual_seed(7)
    shape = (B, inputs.num_queries, M * D)
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    return numbers.to(inputs.value.device, inputs.value.dtype)


def exact_results(inputs: OpInputs, grad_output: Tensor) -> tuple[Tensor, ...]:
    """The four RESULTS of the oracle, in float64."""
    return oracle.output_and_gradients(inputs, grad_output)


def results(call: Call, inputs: OpInputs, grad_output: Tensor) -> tuple[Tensor, ...]:
    """The four RESULTS of a call.

    Args:
        call: a differentiable function of `OpInputs`.
        inputs: on any device.
        grad_output: ``[B, Q, M * D]`` in value's dtype, on its device.

    Raises:
        AssertionError: a shape, dtype, device or memory layout is not as documented.
    """
    with torch.no_grad():
        output = call(inputs)
    leaves = inputs.leaves()
    grads = torch.autograd.grad(call(leaves), leaves.tensors, grad_output)
    B, _, M, D = inputs.value.shape
    _match("output", output, (B, inputs.num_queries, M * D), inputs.value)
    assert output.is_contiguous(), "output: expected contiguous memory"
    for name, grad, tensor in zip(RESULTS[1:], grads, inputs.tensors):
        _match(name, grad, tensor.shape, tensor)
    return output, *grads


def expected(inputs: OpInputs, grad_output: Tensor, *, at_knots: bool = False) -> Expected:
    """What `results` of a call should be.

    Args:
        inputs: of the call, on any device.
        grad_output: of the call.
        at_knots: locations lie at pixel centres: the reference backend's error is not used.
    """
    inputs, grad_output = inputs.to("cpu"), grad_output.cpu()
    exact = exact_results(inputs, grad_output)
    limits = list(roundings(inputs, grad_output, exact))
    if not at_knots:
        of_reference = results(reference, inputs, grad_output)
        sides = [side for level in oracle.level_table(inputs) for side in level[:2]]
        most = max([LEAST_CAP, *sides])
        for i, (r, e) in enumerate(zip(of_reference, exact)):
            measure = min(TIMES_REFERENCE * error_of(r, e), most * limits[i])
            limits[i] = max(limits[i], measure)
    return Expected(RESULTS, exact, limits)


def check(
    call: Call, inputs: OpInputs, *, at_knots: bool = False, names: Sequence[str] = RESULTS
) -> None:
    """Run a call forward and backward, and compare it with the oracle.

    Args:
        call: a differentiable function of `OpInputs`.
        inputs: on the device to test.
        at_knots: see `expected`.
        names: the results that are compared.

    Raises:
        AssertionError: a result is wrong; names it, its error and the limit.
    """
    grad_output = grad_output_for(inputs)
    found = results(call, inputs, grad_output)
    check_results(found, inputs, grad_output, at_knots=at_knots, names=names)


def check_results(
    found: Sequence[Tensor],
    inputs: OpInputs,
    grad_output: Tensor,
    *,
    at_knots: bool = False,
    names: Sequence[str] = RESULTS,
) -> None:
    """As `check`, for results that were computed before.

    Raises:
        AssertionError: a result is wrong; names it, its error and the limit.
    """
    errors = expected(inputs, grad_output, at_knots=at_knots).errors(found)
    faults = [str(error) for error in errors if error.result in names and not error.passed]
    assert not faults, "; ".join(faults)


def discrete_results(call: Call, inputs: OpInputs, grad_output: Tensor) -> tuple[Tensor, ...]:
    """The DISCRETE_RESULTS of a call of ``method="discrete"``.

    Raises:
        AssertionError: sampling_locations get a gradient, or a shape, dtype or device is not as
            documented.
    """
    leaves = inputs.leaves()
    output = call(leaves)
    grads = torch.autograd.grad(output, leaves.tensors, grad_output, allow_unused=True)
    assert grads[1] is None, "sampling_locations: expected no gradient of method='discrete'"
    B, _, M, D = inputs.value.shape
    _match("output", output, (B, inputs.num_queries, M * D), inputs.value)
    _match("grad_value", grads[0], inputs.value.shape, inputs.value)
    weights = inputs.attention_weights
    _match("grad_attention_weights", grads[2], weights.shape, weights)
    return output.detach(), grads[0], grads[2]


def expected_discrete(
    inputs: OpInputs, grad_output: Tensor, *, official_clamp: bool = False
) -> Expected:
    """What `discrete_results` of a call should be; only roundings are allowed."""
    inputs, grad_output = inputs.to("cpu"), grad_output.cpu()
    absolute = inputs.replace_tensors(
        inputs.value.abs(), inputs.sampling_locations, inputs.attention_weights.abs()
    )
    exact = _exact_discrete(inputs, grad_output, official_clamp)
    terms = _exact_discrete(absolute, grad_output.abs(), official_clamp)
    value, _, weights = (tensor.dtype for tensor in inputs.tensors)
    limits = rounding_limits(exact, terms, (value, value, weights), value)
    return Expected(DISCRETE_RESULTS, exact, limits)


def fused_results(call: FusedCall, inputs: FusedInputs, grad_output: Tensor) -> tuple[Tensor, ...]:
    """The five FUSED_RESULTS of a call.

    Raises:
        AssertionError: a shape, dtype or device is not as documented.
    """
    leaves = inputs.leaves()
    output = call(leaves)
    grads = torch.autograd.grad(output, leaves.tensors, grad_output)
    B, _, M, D = inputs.value.shape
    _match("output", output, (B, inputs.num_queries, M * D), inputs.value)
    for name, grad, tensor in zip(FUSED_RESULTS[1:], grads, inputs.tensors):
        _match(name, grad, tensor.shape, tensor)
    return output.detach(), *grads


def expected_fused(inputs: FusedInputs, grad_output: Tensor) -> Expected:
    """What `fused_results` of a call should be.

    An error may be 4 units of the result's dtype plus 20 of the dtype of the sums, relative to the
    largest number of the result: sums of a few dozen terms, rounded once to the result's dtype.
    Where the terms of attention_logits' gradient cancel, it may be one unit of the dtype of the
    sums, relative to the largest sum of their absolute values.
    """
    inputs, grad_output = inputs.to("cpu"), grad_output.cpu()
    leaves = inputs.double().leaves()
    output = oracle.ms_deform_attn_fused(leaves)
    grads = torch.autograd.grad(output, leaves.tensors, grad_output.double())
    exact = (output.detach(), *grads)
    sums = torch.finfo(acc_dtype(inputs.value.dtype)).eps
    limits = [
        (4 * torch.finfo(tensor.dtype).eps + 20 * sums) * largest(e)
        for tensor, e in zip((inputs.value, *inputs.tensors), exact)
    ]
    terms = oracle.absolute_terms_of_logits(inputs, grad_output)
    limits[-1] = max(limits[-1], ROUNDINGS_OF_SUMS * sums * largest(terms))
    return Expected(FUSED_RESULTS, exact, limits)


def _exact_discrete(inputs: OpInputs, grad_output: Tensor, clamp: bool) -> tuple[Tensor, ...]:
    value, locations, weights = oracle.operands(inputs).tensors
    leaves = [tensor.double().requires_grad_() for tensor in (value, weights)]
    output = oracle.discrete(
        inputs.replace_tensors(leaves[0], locations, leaves[1]), official_clamp=clamp
    )
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output.double())


def _match(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> None:
    for what, got, expected in (
        ("shape", tuple(tensor.shape), tuple(shape)),
        ("dtype", tensor.dtype, like.dtype),
        ("device", tensor.device, like.device),
    ):
        assert got == expected, f"{name}: expected {what} {expected}, got {got}"
