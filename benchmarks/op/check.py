"""Compares the output and gradients of an op with the float64 oracle of `deform_attn.testing`.

For an encoder the oracle needs seconds and gigabytes, so it computes a random subset of the
queries. Output, location gradients and weight gradients of a query depend on that query alone:
these rows of the full call are compared. The value gradient sums over all queries: it is compared
for a grad_output that is zero outside the subset. For the full grad_output, the value gradient g
must satisfy <g, g> = <op(g), grad_output>, because the op is linear in value.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from benchmarks.op.peers import Op
from benchmarks.op.workloads import WorkloadInputs
from deform_attn.testing import OpInputs, oracle

# Largest difference over largest magnitude. A float32 location on a map 167 pixels wide has a
# precision of 1e-5 pixel; 16-bit outputs and gradients are rounded to 11 or 8 bits.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 3e-5,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}
SUBSET_POINTS = 2**16  # the oracle keeps about 1 kB a point and channel pair
# At a pixel centre the slope jumps, and peers that round the location may take the other side. The
# tests cover this; the benchmark compares away from there.
KNOT = 1e-4  # pixel


@dataclasses.dataclass(frozen=True)
class Expected:
    """The oracle's results for a subset of the queries."""

    queries: Tensor  # [N] indices
    output: Tensor  # [B, N, M * D]
    gradients: tuple[Tensor, Tensor, Tensor]  # of value, locations [B, N, ...], weights [B, N, ...]
    smooth: Tensor  # [B, N, ..., 1] locations away from knots


def expected_of(x: WorkloadInputs, seed: int = 0, points: int = 0) -> Expected:
    """Run the oracle, on the CPU, for about so many points (0: SUBSET_POINTS)."""
    batch, queries = x.sampling_locations.shape[:2]
    of_query = x.attention_weights[0, 0].numel() * batch
    count = min(queries, max(1, (points or SUBSET_POINTS) // of_query))
    generator = torch.Generator().manual_seed(seed)
    subset = torch.randperm(queries, generator=generator)[:count].sort().values
    locations, weights, grad_output = (
        tensor.cpu()[:, subset]
        for tensor in (x.sampling_locations, x.attention_weights, x.grad_output)
    )
    call = OpInputs(
        x.value.cpu(),
        x.spatial_shapes.cpu(),
        x.level_start_index.cpu(),
        locations,
        weights,
        x.num_points,
    )
    output, *grads = oracle.output_and_gradients(call, grad_output)
    gradients = (grads[0], grads[1], grads[2])
    return Expected(subset, output, gradients, _away_from_knots(x, locations))


def errors_of(op: Op, x: WorkloadInputs, expected: Expected) -> dict[str, float]:
    """Largest difference over largest magnitude, for the output and each gradient."""
    leaves = x.map(lambda tensor: tensor.detach().requires_grad_())
    output = op(leaves)
    subset = expected.queries.to(output.device)
    grads = torch.autograd.grad(output, leaves.differentiable, x.grad_output, retain_graph=True)
    masked = torch.zeros_like(x.grad_output)
    masked[:, subset] = x.grad_output[:, subset]
    (subset_grad_value,) = torch.autograd.grad(output, leaves.value, masked)
    smooth = expected.smooth.to(output.device)
    return {
        "output": _error(output[:, subset], expected.output),
        "grad_value": _error(subset_grad_value, expected.gradients[0]),
        "grad_value, all queries": _linearity_error(op, x, grads[0]),
        "grad_sampling_locations": _error(
            grads[1][:, subset] * smooth, expected.gradients[1] * expected.smooth
        ),
        "grad_attention_weights": _error(grads[2][:, subset], expected.gradients[2]),
    }


def verdict(errors: dict[str, float], dtype: torch.dtype) -> str | None:
    """What is wrong, or None."""
    limit = TOLERANCES[dtype]
    wrong = [
        f"{name} is off by {error:.1e}" for name, error in errors.items() if not error <= limit
    ]
    return f"{', '.join(wrong)} (at most {limit:.1e})" if wrong else None


def _error(got: Tensor, exact: Tensor) -> float:
    difference = (got.detach().cpu().double() - exact).abs().max()
    return float(difference / exact.abs().max())  # NaN if either holds a NaN


def _linearity_error(op: Op, x: WorkloadInputs, grad_value: Tensor) -> float:
    with torch.no_grad():
        output = op(dataclasses.replace(x, value=grad_value))
    square = grad_value.double().square().sum()
    product = (output.double() * x.grad_output.double()).sum()
    return float((product - square).abs() / square)


def _away_from_knots(x: WorkloadInputs, locations: Tensor) -> Tensor:
    counts = x.num_points or [locations.shape[4]] * len(x.spatial_shapes)
    sizes = x.spatial_shapes.cpu().flip(-1).repeat_interleave(torch.tensor(counts), 0)  # [K, 2]
    sizes = sizes.view(*locations.shape[3:])
    pixels = locations.double() * sizes - 0.5
    return ((pixels - pixels.round()).abs() > KNOT).all(-1, keepdim=True)
