"""Thousands of random calls, valid and invalid: the result is the oracle's, or an error is raised.

Tensors have NaN on both sides in memory, so that a read outside one shows in the result. The
examples are the same in every run; `--hypothesis-profile=explore` draws new ones, and more of them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deform_attn.testing import (
    CASES,
    DTYPES,
    MIXED_DTYPES,
    Case,
    Dtypes,
    OpInputs,
    check,
    check_results,
    grad_output_for,
)
from deform_attn.testing.cases import INF, NAN, chosen_from, far_outside, lay_out
from tests.runners import Runner, operators, package

ALL_DTYPES = DTYPES | MIXED_DTYPES
ARGUMENTS = (
    "value",
    "spatial_shapes",
    "level_start_index",
    "sampling_locations",
    "attention_weights",
    "num_points",
    "level_sizes",
    "grad_output",
)


def examples(runner: Runner, count: int) -> int:
    """Fewer for interpreted and emulated kernels; ten times as many to explore."""
    if settings.get_current_profile_name() == "explore":
        count *= 10
    return count if runner.largest_work is None else max(count // 100, 5)


side = st.integers(1, 8)
LOCATIONS = (
    far_outside,
    chosen_from(0.0, 1.0, -0.0, 0.31, 2.0, -1.0),
    chosen_from(NAN, INF, -INF, 0.37, 0.61, 3e38),
)


@st.composite
def honest_cases(draw: Any) -> Case:
    levels = tuple(draw(st.lists(st.tuples(side, side), min_size=1, max_size=4)))
    count = st.integers(0, 4)
    rows = sum(h * w for h, w in levels) + draw(st.integers(0, 20))
    tight = draw(st.booleans())
    starts = None if tight else tuple(draw(st.integers(0, rows - h * w)) for h, w in levels)
    return Case(
        f"case_{draw(st.integers(0, 999))}",  # the name seeds the numbers
        levels=levels,
        batch=draw(st.sampled_from([0, 1, 1, 2, 3])),
        queries=draw(st.sampled_from([0, 1, 2, 3, 7])),
        heads=draw(st.integers(1, 4)),
        head_dim=draw(st.integers(1, 70)),
        points=draw(st.one_of(count, st.tuples(*[count] * len(levels)))),
        starts=starts,
        rows=rows,
        metadata=draw(
            st.sampled_from(
                ["int64", "int32", "list"] + (["shapes_only", "list_only"] if tight else [])
            )
        ),
        layout=draw(st.sampled_from(["plain", "offset", "strided", "transposed"])),
        locations=draw(st.sampled_from(LOCATIONS)),
        masked=draw(st.sampled_from([0, 0, 0.1, 0.6, 1])),
    )


def test_honest_calls(runner: Runner) -> None:
    """Every combination of sizes, layouts, dtypes and locations: value and gradients."""
    able = [dtypes for dtypes in ALL_DTYPES.values() if runner.takes(None, dtypes)]

    @settings(max_examples=examples(runner, 250))
    @given(case=honest_cases(), dtypes=st.sampled_from(able))
    def body(case: Case, dtypes: Dtypes) -> None:
        if runner.takes(case, dtypes):
            check(runner, runner.fitted(case).make(dtypes, runner.device))

    body()


# ------------------------------------------------------------------------------ invalid metadata

hostile = st.one_of(
    st.integers(-3, 12),
    st.sampled_from(
        [0, -1, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1, -(2**63)]
    ),
    st.integers(-(2**63), 2**63 - 1),
)


def outcome(call: Any) -> Any:
    """What a call returned, or None where it raised an error that names an argument."""
    try:
        return call()
    except (RuntimeError, ValueError, TypeError) as error:
        message = str(error)
        assert any(name in message for name in ARGUMENTS), f"{type(error).__name__}: {message}"
        return None


@pytest.mark.only(runners=package)
def test_invalid_levels(runner: Runner) -> None:
    """Random level sizes and starts, passed directly to the operators.

    A level that does not fit raises an error, or is empty and contributes zero.
    """
    inputs = CASES["offset"].make(DTYPES["f32"], runner.device)
    if runner.largest_work is not None:
        inputs = runner.fitted(CASES["offset"]).make(DTYPES["f32"])
    grad_output = grad_output_for(inputs)
    forward, backward = operators(runner)
    computed = 0

    @settings(max_examples=examples(runner, 700))
    @given(
        shapes=st.lists(st.tuples(hostile, hostile), min_size=3, max_size=3),
        starts=st.none() | st.lists(hostile, min_size=3, max_size=3),
        valid=st.lists(st.booleans(), min_size=3, max_size=3),
        as_numbers=st.booleans(),
    )
    @example(shapes=[(1, 1)] * 3, starts=None, valid=[True] * 3, as_numbers=False)
    def body(shapes: Any, starts: Any, valid: Any, as_numbers: bool) -> None:
        nonlocal computed
        true = inputs.spatial_shapes.tolist()
        shapes = [list(t) if h else list(s) for s, t, h in zip(shapes, true, valid)]
        changed = inputs.replace(
            spatial_shapes=torch.tensor(shapes, device=runner.device),
            level_start_index=None
            if starts is None
            else torch.tensor(starts, device=runner.device),
        )
        sizes = [number for pair in shapes for number in pair] if as_numbers else None
        given_shapes = None if as_numbers else changed.spatial_shapes
        arguments = (changed.value, given_shapes, *changed.arguments[2:], sizes, None)
        output = outcome(lambda: forward(*arguments))
        grads = outcome(lambda: backward(grad_output, *arguments, False, [True] * 3))
        assert (output is None) == (grads is None)
        if output is not None:
            computed += 1
            check_results(
                (output, *grads), wrapped(changed), grad_output, at_knots=runner.exact_at_knots
            )

    body()
    assert computed > 0  # the example above at least


def wrapped(inputs: OpInputs) -> OpInputs:
    """Starts as the operators count them: sums of products that may pass 2**63 hold no level."""
    if inputs.level_start_index is not None:
        return inputs
    starts, row = [], 0
    for height, width in inputs.spatial_shapes.tolist():
        starts.append(min(row, 2**62))
        row += max(height, 0) * max(width, 0)
    return inputs.replace(level_start_index=starts)


# ------------------------------------------------------------------------- operands that do not fit


@st.composite
def broken_arguments(draw: Any) -> tuple[int, str, int, int]:
    """(which argument, what happens to it, a dimension, a size)."""
    return (
        draw(st.integers(0, 4)),
        draw(
            st.sampled_from(
                ["narrow", "widen", "squeeze", "unsqueeze", "dtype", "meta", "transpose", "empty"]
            )
        ),
        draw(st.integers(0, 5)),
        draw(st.integers(0, 3)),
    )


OTHER_DTYPES = (torch.int64, torch.float64, torch.float16, torch.complex64, torch.bool, torch.int32)


def broken(tensor: torch.Tensor, how: str, dim: int, size: int) -> torch.Tensor:
    if tensor.numel() == 0 or tensor.dim() == 0:
        return tensor  # nothing left to break
    dim = dim % tensor.dim()
    if how == "narrow":
        return tensor.narrow(dim, 0, min(size, tensor.shape[dim]))
    if how == "widen":
        return torch.cat([tensor] * 2, dim)
    if how == "squeeze":
        return tensor.select(dim, 0)
    if how == "unsqueeze":
        return tensor.unsqueeze(dim)
    if how == "dtype":
        return tensor.to(OTHER_DTYPES[dim])
    if how == "meta":
        return tensor.to("meta")
    if how == "transpose":
        return tensor.transpose(dim, size % tensor.dim())
    return tensor.new_empty(0)


@pytest.mark.only(runners=package)
@pytest.mark.parametrize("direct", [False, True], ids=["function", "operator"])
def test_operands_that_do_not_fit(runner: Runner, direct: bool) -> None:
    """One or two operands cut, turned or converted: the oracle's numbers if they still fit."""
    forward, backward = operators(runner)
    refused = 0

    @settings(max_examples=examples(runner, 600))
    @given(
        name=st.sampled_from(["non_square", "listed_points", "one_of_each", "gaps_between_levels"]),
        damages=st.lists(broken_arguments(), min_size=1, max_size=2),
        grad_shape=st.sampled_from(["right", "right", "narrow", "double", "flat"]),
    )
    def body(name: str, damages: Any, grad_shape: str) -> None:
        nonlocal refused
        inputs = runner.fitted(CASES[name]).make(DTYPES["f32"], runner.device)
        # turned levels may reach rows that were between levels: numbers there, not NaN
        tensors = [lay_out(tensor.nan_to_num(), "offset") for tensor in inputs.arguments]
        grad_output = grad_output_for(inputs)
        for which, *damage in damages:
            tensors[which] = broken(tensors[which], *damage)
        damaged = OpInputs(*tensors, inputs.num_points)
        if direct:
            output = outcome(lambda: forward(*damaged.arguments, None, damaged.num_points))
        else:
            output = outcome(lambda: runner.forward(damaged))
        if output is None:
            refused += 1
            if direct:
                wrong = lambda: backward(  # noqa: E731
                    grad_output, *damaged.arguments, None, damaged.num_points, False, [True] * 3
                )
                assert outcome(wrong) is None
        elif not output.is_meta:
            fresh = grad_output_for(damaged)
            if grad_shape == "right" or not direct:
                check(runner, damaged)
                return
            bad = {
                "narrow": lambda g: g[..., 1:],
                "double": torch.Tensor.double,
                "flat": torch.Tensor.flatten,
            }[grad_shape](fresh)
            wrong = lambda: backward(  # noqa: E731
                bad, *damaged.arguments, None, damaged.num_points, False, [True] * 3
            )
            assert outcome(wrong) is None

    body()
    assert refused > 0
