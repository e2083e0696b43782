"""The oracle against rational arithmetic: nothing below is rounded until the end."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from deform_attn.testing import CASES, DTYPES, Case, Dtypes, OpInputs, oracle
from deform_attn.testing.cases import on_pixels


def rational(inputs: OpInputs) -> torch.Tensor:
    """The definition, point by point, in fractions."""
    inputs = oracle.operands(inputs)
    B, S, M, D = inputs.value.shape
    counts = inputs.points_per_level
    Q = inputs.sampling_locations.shape[1]
    locations = inputs.sampling_locations.reshape(B, Q, M, sum(counts), 2).tolist()
    weights = inputs.attention_weights.reshape(B, Q, M, sum(counts)).tolist()
    value = inputs.value.tolist()
    output = torch.zeros(B, Q, M, D, dtype=torch.float64)
    for b in range(B):
        for q in range(Q):
            for m in range(M):
                for d in range(D):
                    total, k = Fraction(0), 0
                    for (height, width, start), count in zip(oracle.level_table(inputs), counts):
                        for _ in range(count):
                            total += Fraction(weights[b][q][m][k]) * _sample(
                                lambda y, x, start=start, width=width: value[b][
                                    start + y * width + x
                                ][m][d],
                                height,
                                width,
                                locations[b][q][m][k],
                            )
                            k += 1
                    output[b, q, m, d] = float(total)
    return output.reshape(B, Q, M * D)


def _sample(pixel, height: int, width: int, location: list[float]) -> Fraction:
    if not all(math.isfinite(number) for number in location):
        return Fraction(0)
    x = Fraction(location[0]) * width - Fraction(1, 2)
    y = Fraction(location[1]) * height - Fraction(1, 2)
    total = Fraction(0)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(x - column)) * (1 - abs(y - row))
                total += share * Fraction(pixel(row, column))
    return total


SMALL = [
    Case("small", levels=((3, 4), (2, 1)), batch=1, queries=3, head_dim=2),
    Case("small_on_pixels", levels=((4, 2), (2, 2)), queries=4, head_dim=1, locations=on_pixels),
    Case("small_listed", levels=((3, 4), (2, 1)), points=(3, 1), batch=1, heads=1, head_dim=2),
    Case("small_outside", locations=CASES["far_outside"].locations, queries=8, head_dim=1),
    Case("small_not_finite", locations=CASES["not_finite"].locations, queries=8, head_dim=1),
    Case("small_borders", locations=CASES["on_borders"].locations, queries=8, head_dim=1),
    Case("small_overlap", levels=((2, 3), (3, 2)), starts=(4, 1), head_dim=1),
]


@pytest.mark.only(dtypes=["f64", "f32", "bf16", "bf16_throughout", "f32_weights_f64"])
@pytest.mark.parametrize("small", SMALL, ids=lambda case: case.name)
def test_oracle_is_the_definition(small: Case, dtypes: Dtypes) -> None:
    inputs = small.make(dtypes)
    torch.testing.assert_close(
        oracle.ms_deform_attn(inputs), rational(inputs), rtol=1e-14, atol=1e-14
    )


@pytest.mark.only(dtypes=["f64", "f32"])
def test_oracle_is_exact_round_every_pixel(dtypes: Dtypes) -> None:
    """One and two steps of the dtype to either side of each pixel centre: floor and fraction."""
    for size in (1, 3, 7, 64, 100, 167, 1333):
        centres = (torch.arange(-1, size + 1, dtype=torch.float64) + 0.5) / size
        location = centres.to(dtypes.locations)
        steps = [location]
        for toward in (-10.0, 10.0):
            step = location
            for _ in range(2):
                step = torch.nextafter(step, torch.full_like(step, toward))
                steps.append(step)
        near = torch.cat(steps)
        left, share, hit = oracle.pixel_of(near.double(), size)
        for number, pixel, fraction, on in zip(near.tolist(), left, share, hit):
            x = Fraction(number) * size - Fraction(1, 2)
            assert on.item() == (-1 <= math.floor(x) < size)
            if on:
                assert pixel.item() == math.floor(x)
                assert abs(Fraction(fraction.item()) - (x - math.floor(x))) <= Fraction(1, 2**52)


def test_oracle_gradients() -> None:
    inputs = SMALL[0].make(DTYPES["f64"])
    leaves = inputs.leaves()

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return oracle.ms_deform_attn(inputs.replace_tensors(*tensors))

    assert torch.autograd.gradcheck(call, leaves.tensors)
    assert torch.autograd.gradgradcheck(call, leaves.tensors)


def test_a_level_that_does_not_fit_is_empty() -> None:
    inputs = CASES["non_square"].make(DTYPES["f64"])
    alone = oracle.ms_deform_attn(inputs)
    for size in ([7, 8], [-5, 7], [0, 7], [2**40, 2**40]):
        shapes = inputs.spatial_shapes.clone()
        shapes[0] = torch.tensor(size)
        output = oracle.ms_deform_attn(inputs.replace(spatial_shapes=shapes))
        weights = inputs.attention_weights.clone()
        weights[:, :, :, 0] = 0
        without = oracle.ms_deform_attn(inputs.replace(attention_weights=weights))
        torch.testing.assert_close(output, without, rtol=0, atol=0)
        assert (output - alone).abs().max() > 0.1
