"""The fused kernels, compared with the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deform_attn.testing import DTYPES
from deform_attn.testing.cases import FusedInputs
from deform_attn.testing.comparison import expected_fused
from tests.simt.emulated import Emulated

LEVELS = ((9, 12), (5, 6), (3, 3))
ROWS = sum(height * width for height, width in LEVELS)
SCALE = 0.75


def draw(
    dtype: torch.dtype, queries: int, head_dim: int, counts: list[int], levels: int, size: int
) -> tuple[Tensor, ...]:
    """value, reference_points, sampling_offsets, attention_logits, grad_output."""
    generator = torch.Generator().manual_seed(queries + head_dim + levels + size)
    acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    B, M, K = 2, 3, sum(counts)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    reference = 0.5 + 0.3 * normal(B, queries, levels, size)
    return (
        normal(B, ROWS, M, head_dim).to(dtype),
        reference.to(acc_dtype),
        (2 * normal(B, queries, M, K, 2)).to(dtype),
        (3 * normal(B, queries, M, K)).to(dtype),
        normal(B, queries, M * head_dim).to(dtype),
    )


def check(found: tuple[Tensor, ...], tensors: tuple[Tensor, ...], counts: list[int]) -> None:
    """The rule of every fused result: `deform_attn.testing.comparison.expected_fused`."""
    *inputs, grad_output = tensors
    errors = expected_fused(
        FusedInputs(inputs[0], [*LEVELS], *inputs[1:], counts, SCALE), grad_output
    )
    faults = [str(error) for error in errors.errors(found) if not error.passed]
    assert not faults, "; ".join(faults)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ["scatter", "tiles", "deterministic"])
@pytest.mark.parametrize("size", [2, 4, 5])
@pytest.mark.parametrize("levels", [1, 3], ids=["shared_reference", "reference_a_level"])
@pytest.mark.parametrize(
    ("queries", "head_dim", "counts"),
    [(ROWS, 32, [2, 2, 2]), (7, 8, [3, 6, 3]), (5, 30, [0, 40, 1])],
    ids=["pixels", "counts", "many_points"],
)
def test_fused(
    dtype: str,
    algorithm: str,
    size: int,
    levels: int,
    queries: int,
    head_dim: int,
    counts: list[int],
) -> None:
    value_dtype = DTYPES[dtype].value
    if queries == ROWS and (levels, size) != (3, 2):
        queries = 31  # one large case is enough
    tensors = draw(value_dtype, queries, head_dim, counts, levels, size)
    value, reference, offsets, logits, grad_output = tensors
    kernels = Emulated(long_offsets=size == 4)
    arguments = (value, torch.tensor(LEVELS), None, reference, offsets, logits, counts, SCALE)
    found = (
        kernels.fused_forward(*arguments),
        *kernels.fused_backward(grad_output, *arguments, algorithm=algorithm),
    )
    check(found, tensors, counts)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_wide_projections(dtype: str) -> None:
    """Offsets and logits in float32 beside a 16-bit value."""
    counts = [2, 1, 3]
    value, reference, offsets, logits, grad_output = draw(torch.float32, 9, 16, counts, 3, 4)
    value, grad_output = (t.to(DTYPES[dtype].value) for t in (value, grad_output))
    arguments = (value, list(LEVELS), None, reference, offsets, logits, counts, SCALE)
    kernels = Emulated()
    found = kernels.fused_forward(*arguments)
    grads = kernels.fused_backward(grad_output, *arguments)
    check((found, *grads), (value, reference, offsets, logits, grad_output), counts)
    assert grads[2].dtype == grads[3].dtype == torch.float32


@pytest.mark.parametrize("algorithm", ["fixed", "gather"])
def test_deterministic(algorithm: str) -> None:
    counts = [2, 2, 2]
    value, reference, offsets, logits, grad_output = draw(torch.float32, ROWS, 32, counts, 3, 2)
    arguments = (value, torch.tensor(LEVELS), None, reference, offsets, logits, counts, SCALE)
    kernels = Emulated()
    first = kernels.fused_backward(grad_output, *arguments, algorithm=algorithm)
    try:
        for seed in range(3):
            kernels.set_order("shuffled", seed)
            again = kernels.fused_backward(grad_output, *arguments, algorithm=algorithm)
            assert all(torch.equal(one, two) for one, two in zip(first, again))
    finally:
        kernels.set_order("forward")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("algorithm", ["scatter", "fixed", "gather"])
@pytest.mark.parametrize("output_mask", [(True, False), (False, True), (False, False)], ids=str)
def test_output_mask(dtype: str, algorithm: str, output_mask: tuple[bool, bool]) -> None:
    """Gradients that are not requested take no memory, and the others stay the same."""
    counts = [3, 0, 2]
    value, reference, offsets, logits, grad_output = draw(DTYPES[dtype].value, 9, 32, counts, 3, 2)
    levels = torch.tensor(LEVELS)
    arguments = (value, levels, None, reference, offsets, logits, counts, SCALE)
    kernels = Emulated()
    full = kernels.fused_backward(grad_output, *arguments, algorithm=algorithm)
    found = kernels.fused_backward(
        grad_output, *arguments, algorithm=algorithm, output_mask=output_mask
    )
    for flag, one, other in zip((*output_mask, True, True), found, full):
        torch.testing.assert_close(one, other if flag else torch.empty(0))
    planned = kernels.targets(
        *(value, levels, None, offsets, logits, counts, reference, SCALE),
        algorithm=algorithm,
        output_mask=output_mask,
    )
    sums, bounds, statistics, _, parts = (tensor.numel() for tensor in planned[4:])
    assert (parts > 0) == output_mask[1]
    assert (bounds > 0) == (output_mask[0] and algorithm == "gather")
    assert (statistics > 0) == (output_mask[0] and algorithm != "scatter")
    summed = algorithm == "fixed" or (algorithm == "scatter" and dtype == "bf16")
    assert (sums > 0) == (output_mask[0] and summed)


def test_invalid_level() -> None:
    """It is treated as empty, and no gradient is NaN."""
    counts = [2, 2, 2]
    value, reference, offsets, logits, grad_output = draw(torch.float32, 9, 8, counts, 3, 2)
    shapes = torch.tensor([(9, 12), (500, 600), (3, 3)])
    starts = torch.tensor([0, 108, 138])
    kernels = Emulated()
    arguments = (value, shapes, starts, reference, offsets, logits, counts, SCALE)
    output = kernels.fused_forward(*arguments)
    grads = kernels.fused_backward(grad_output, *arguments)
    assert all(tensor.isfinite().all() for tensor in (output, *grads))
    assert (grads[2][..., 2:4, :] == 0).all()
    assert (grads[1][:, :, 1] == 0).all()
