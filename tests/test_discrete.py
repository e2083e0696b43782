"""method="discrete": one pixel a point, on every device and dtype, against the oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deform_attn import composite, ms_deform_attn, ms_deform_attn_fused
from deform_attn.operands import DiscreteOperands, FusedOperands
from deform_attn.testing import (
    CASES,
    Case,
    Dtypes,
    OpInputs,
    discrete_results,
    expected_discrete,
    grad_output_for,
)
from tests.runners import Runner

# the same code whichever backend is chosen: one for each device
each_device = pytest.mark.only(runners=lambda runner: runner.backend == "reference")
clamps = pytest.mark.parametrize("official", [False, True], ids=["", "official_clamp"])


def call(inputs: OpInputs, official: bool = False, backend: str | None = None) -> Tensor:
    return ms_deform_attn(
        *inputs.arguments,
        num_points=inputs.num_points,
        method="discrete",
        official_clamp=official,
        backend=backend,
        value_mask=inputs.value_mask,
    )


@each_device
@clamps
def test_value_and_gradients(runner: Runner, dtypes: Dtypes, case: Case, official: bool) -> None:
    inputs = case.make(dtypes, runner.device)
    grad_output = grad_output_for(inputs)
    found = discrete_results(lambda x: call(x, official, runner.backend), inputs, grad_output)
    expected = expected_discrete(inputs, grad_output, official_clamp=official)
    assert [str(error) for error in expected.errors(found) if not error.passed] == []


def one_point(shape: tuple[int, int], x: float, y: float) -> OpInputs:
    """Value holds each pixel's row."""
    height, width = shape
    value = torch.arange(float(height * width)).view(1, -1, 1, 1)
    location = torch.tensor([x, y]).view(1, 1, 1, 1, 1, 2)
    return OpInputs(value, torch.tensor([shape]), None, location, torch.ones(1, 1, 1, 1, 1))


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("shape", "location", "pixel", "official"),  # pixels as (x, y)
    [
        ((3, 5), (0.0, 0.0), (0, 0), (0, 0)),
        ((3, 5), (0.25, 0.4), (1, 1), (1, 1)),  # 1.75 and 1.7, truncated
        ((3, 5), (0.31, 0.51), (2, 2), (2, 2)),
        ((3, 5), (0.99, 0.99), (4, 2), (2, 2)),
        ((3, 5), (0.75, 0.1), (4, 0), (2, 0)),
        ((5, 3), (0.99, 0.99), (2, 4), (2, 4)),  # the official code reads past the row, or fails
        ((3, 5), (-0.05, -0.4), (0, 0), (0, 0)),
        ((3, 5), (-1e30, 1e30), (0, 2), (0, 2)),
        ((3, 5), (INF, -INF), (4, 0), (2, 0)),
        ((3, 5), (NAN, NAN), (0, 0), (0, 0)),
    ],
)
def test_which_pixel(
    shape: tuple[int, int],
    location: tuple[float, float],
    pixel: tuple[int, int],
    official: tuple[int, int],
) -> None:
    for expected, clamp in ((pixel, False), (official, True)):
        assert (
            call(one_point(shape, *location), clamp).item() == expected[1] * shape[1] + expected[0]
        )


def test_neighbours_have_no_part_in_a_point() -> None:
    """Sides that no power of two divides, NaN in every other pixel."""
    shape = (7, 13)
    for row in range(7 * 13):
        y, x = divmod(row, 13)
        inputs = one_point(shape, x / 13, y / 7)
        value = torch.full_like(inputs.value, NAN)
        value[0, row] = 3.7
        assert call(inputs.replace(value=value)).item() == value[0, row].item()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_fused_is_the_composition(size: int, backend: str) -> None:
    from tests.test_fused import SHAPES, draw

    inputs = [t.requires_grad_() for t in draw(torch.float32, size=size, num_points=[3, 0, 2])]
    value, *rest = inputs
    sizes = torch.tensor(SHAPES)
    points = composite.unfused(FusedOperands(value, sizes, None, *rest, None, [3, 0, 2]))[3:5]
    options = {"num_points": [3, 0, 2], "method": "discrete", "backend": backend}
    expected = ms_deform_attn(value, SHAPES, None, *points, **options)
    got = ms_deform_attn_fused(value, SHAPES, None, *rest, **options)
    assert torch.equal(got, expected)
    grads = torch.autograd.grad(got.sum(), inputs, allow_unused=True)
    assert [grad is not None for grad in grads] == [True, False, False, True]
    assert not torch.equal(
        got, ms_deform_attn_fused(value, SHAPES, None, *rest, num_points=[3, 0, 2])
    )


def test_level_sizes_are_not_read() -> None:
    """Levels on a device stay there: here on one that has no numbers."""
    inputs = CASES["listed_points"].make(Dtypes("f32", *[torch.float32] * 3)).to("meta")
    assert call(inputs, official=True).shape == (2, 5, 16)


def test_levels_that_do_not_fit_sample_zero() -> None:
    """On a GPU the sizes are not read, so such levels cannot be refused."""

    def unchecked(shape: tuple[int, int], dtype: torch.dtype) -> float:
        inputs = one_point((3, 5), 0.5, 0.5).replace(
            spatial_shapes=torch.tensor([shape], dtype=dtype)
        )
        return composite.discrete(DiscreteOperands(*inputs.arguments)).item()

    for dtype in (torch.int64, torch.int8):
        assert unchecked((3, 5), dtype) == 13
        for shape in ((3, 50), (0, 5), (-3, -5)):
            assert unchecked(shape, dtype) == 0


@pytest.mark.parametrize("method", ["default", "discrete"])
def test_level_sizes_in_any_integer(method: str) -> None:
    """Rows are counted in int64: height * width overflows int16 and uint8."""

    def sample(side: int, sizes: Any) -> Tensor:
        torch.manual_seed(0)
        value = torch.randn(1, side * side, 1, 1)
        locations, weights = torch.rand(1, 9, 1, 1, 2, 2), torch.rand(1, 9, 1, 1, 2)
        return ms_deform_attn(value, sizes, None, locations, weights, method=method)

    for side, dtype in ((200, torch.int16), (20, torch.uint8), (12, torch.int8)):
        expected = sample(side, [(side, side)])
        for sizes in (
            torch.tensor([(side, side)], dtype=dtype),
            np.array([(side, side)], dtype=str(dtype).removeprefix("torch.")),
            [(np.int64(side), torch.tensor(side, dtype=dtype))],
        ):
            assert torch.equal(sample(side, sizes), expected)


class Sampling(torch.nn.Module):
    """The call as a function of what has gradients, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = CASES["listed_points"].make(Dtypes("f64", *[torch.float64] * 3))

    def forward(self, value: Tensor, weights: Tensor) -> Tensor:
        return call(self.inputs.replace(value=value, attention_weights=weights))

    def arguments(self) -> tuple[Tensor, Tensor]:
        return self.inputs.value.requires_grad_(), self.inputs.attention_weights.requires_grad_()


def test_derivatives() -> None:
    sampling = Sampling()
    assert torch.autograd.gradcheck(sampling, sampling.arguments(), fast_mode=True)
    assert torch.autograd.gradgradcheck(sampling, sampling.arguments(), fast_mode=True)


def test_compile_vmap_and_export() -> None:
    sampling = Sampling()
    arguments = sampling.arguments()
    expected = sampling(*arguments)
    torch._dynamo.reset()
    compiled = torch.compile(sampling, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*arguments), expected)
    mapped = torch.func.vmap(sampling)(*(torch.stack([t, 2 * t]) for t in arguments))
    torch.testing.assert_close(mapped, torch.stack([expected, 4 * expected]))
    program = torch.export.export(sampling, arguments)
    torch.testing.assert_close(program.module()(*arguments), expected)
    targets = {str(node.target) for node in program.graph.nodes}
    assert "deform_attn.ms_deform_attn_discrete.default" in targets
