"""Derivatives of any order, torch.func transforms, and what autograd promises about a call."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deform_attn import ms_deform_attn
from deform_attn.testing import (
    CASES,
    RESULTS,
    Case,
    Dtypes,
    OpInputs,
    check,
    check_results,
    error_of,
    exact_results,
    grad_output_for,
    oracle,
    results,
)
from tests.runners import Recorder, Runner, operators, package

TINY = [
    Case("uniform", levels=((3, 4), (2, 1)), batch=1, queries=2, heads=2, head_dim=3, points=2),
    Case("listed", levels=((2, 3), (1, 1)), batch=2, queries=1, heads=1, points=(2, 1), head_dim=4),
    Case("gaps", levels=((2, 2), (2, 3)), batch=1, queries=2, starts=(1, 7), rows=14, head_dim=2),
    Case(
        "outside",
        levels=((3, 2),),
        batch=1,
        queries=4,
        heads=1,
        head_dim=2,
        locations=CASES["far_outside"].locations,
    ),
]
tiny = pytest.mark.parametrize("small", TINY, ids=lambda case: case.name)
f64_only = pytest.mark.only(dtypes=["f64"])


def without_nan(inputs: OpInputs) -> OpInputs:
    """Rows between levels are NaN elsewhere; gradcheck would take differences of them."""
    return inputs.replace(value=inputs.value.nan_to_num())


def as_function(runner: Runner, inputs: OpInputs) -> Callable[..., Tensor]:
    return lambda *tensors: runner.call(inputs.replace_tensors(*tensors))


# ------------------------------------------------------------------------------ finite differences


@f64_only
@tiny
@pytest.mark.parametrize("fast_mode", [True, False], ids=["fast", "full"])
def test_gradcheck(runner: Runner, dtypes: Dtypes, small: Case, fast_mode: bool) -> None:
    inputs = without_nan(small.make(dtypes, runner.device)).leaves()
    assert torch.autograd.gradcheck(
        as_function(runner, inputs), inputs.tensors, fast_mode=fast_mode
    )


@f64_only
@pytest.mark.parametrize("head_dim", [1, 4, 8, 16, 30, 32, 64, 71, 128, 256])
def test_gradcheck_head_dim(runner: Runner, dtypes: Dtypes, head_dim: int) -> None:
    case = Case("d", levels=((3, 4),), batch=1, queries=2, heads=1, head_dim=head_dim)
    inputs = case.make(dtypes, runner.device).leaves()
    assert torch.autograd.gradcheck(as_function(runner, inputs), inputs.tensors, fast_mode=True)


@pytest.mark.only(runners=package, dtypes=["f64"])
@tiny
@pytest.mark.parametrize("fast_mode", [True, False], ids=["fast", "full"])
def test_gradgradcheck(runner: Runner, dtypes: Dtypes, small: Case, fast_mode: bool) -> None:
    inputs = without_nan(small.make(dtypes, runner.device)).leaves()
    assert torch.autograd.gradgradcheck(
        as_function(runner, inputs), inputs.tensors, fast_mode=fast_mode
    )


# --------------------------------------------------------------------------- higher derivatives


def penalty(call: Callable[..., Tensor], tensors: tuple[Tensor, ...], order: int) -> Tensor:
    """A scalar of all derivatives of one order."""
    result = (call(*tensors) ** 2).sum()
    for _ in range(order):
        grads = torch.autograd.grad(result, tensors, create_graph=True)
        result = sum((grad**2).sum() for grad in grads)  # type: ignore[assignment]
    return result


class Float64Recorder(TorchDispatchMode):
    """Names the operators that return float64."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.dtype is torch.float64 for x in tree_leaves(result)):
            self.operators.add(str(function))
        return result


@pytest.mark.only(runners=package, dtypes=["f32"], slow=None)
def test_derivatives_of_float32_need_no_float64(runner: Runner, dtypes: Dtypes) -> None:
    """Apple's GPUs have none."""
    inputs = TINY[0].make(dtypes, runner.device).leaves()
    call = as_function(runner, inputs)
    with Float64Recorder() as found:
        penalty(call, inputs.tensors, 1).backward()
        torch.func.jvp(call, inputs.tensors, inputs.tensors)
    assert found.operators == set()


@pytest.mark.only(runners=package, dtypes=["f64", "f32"], slow=None)
@pytest.mark.parametrize("order", [1, 2])
@tiny
def test_higher_derivatives(runner: Runner, dtypes: Dtypes, small: Case, order: int) -> None:
    """Of order + 1, against the oracle's; none of them zero."""
    inputs = without_nan(small.make(dtypes, runner.device)).leaves()
    exact_inputs = inputs.replace_tensors(
        *(t.detach().double().cpu().requires_grad_() for t in inputs.tensors)
    ).to("cpu")
    found = torch.autograd.grad(
        penalty(as_function(runner, inputs), inputs.tensors, order), inputs.tensors
    )
    exact = torch.autograd.grad(
        penalty(
            lambda *tensors: oracle.ms_deform_attn(exact_inputs.replace_tensors(*tensors)),
            exact_inputs.tensors,
            order,
        ),
        exact_inputs.tensors,
    )
    for name, one, other in zip(RESULTS[1:], found, exact):
        assert other.abs().max() > 0
        # three and more derivatives deep: a hundred roundings
        limit = 128 * torch.finfo(one.dtype).eps * other.abs().max()
        assert (one.double().cpu() - other).abs().max() <= limit, name


@pytest.mark.only(runners=package, dtypes=["f32"], slow=None)
@pytest.mark.parametrize("position", range(4))
def test_second_derivatives_of_the_operators_themselves(
    runner: Runner, dtypes: Dtypes, position: int
) -> None:
    """Who calls torch.ops directly gets no silent zeros either."""
    inputs = CASES["non_square"].make(dtypes, runner.device).leaves()
    forward, backward = operators(runner)
    grad_output = grad_output_for(inputs).requires_grad_()
    output = forward(*inputs.arguments, None, None)
    assert output.requires_grad
    first = torch.autograd.grad(output, inputs.tensors, grad_output, create_graph=True)
    direct = backward(grad_output, *inputs.arguments, None, None, False, [True] * 3)
    leaves = (grad_output, *inputs.tensors)
    exact_leaves = tuple(t.detach().double().requires_grad_() for t in leaves)
    exact_inputs = inputs.replace_tensors(*exact_leaves[1:])
    exact = torch.autograd.grad(
        oracle.ms_deform_attn(exact_inputs), exact_leaves[1:], exact_leaves[0], create_graph=True
    )

    def second(grads: tuple[Tensor, ...], with_respect_to: tuple[Tensor, ...]) -> Tensor:
        return torch.autograd.grad(
            sum((grad**2).sum() for grad in grads), with_respect_to[position], retain_graph=True
        )[0]

    expected = second(exact, exact_leaves)
    assert expected.abs().max() > 0
    for grads in (first, direct):
        assert all(grad.requires_grad for grad in grads)
        error = (second(grads, leaves).double() - expected).abs().max()
        assert error <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()


# --------------------------------------------------------------------------------- torch.func


@pytest.mark.only(runners=package, dtypes=["f32"], slow=None)
def test_func_grad(runner: Runner, dtypes: Dtypes) -> None:
    inputs = CASES["non_square"].make(dtypes, runner.device)
    call = as_function(runner, inputs)
    grad_output = grad_output_for(inputs)
    grads = torch.func.grad(lambda *t: (call(*t) * grad_output).sum(), argnums=(0, 1, 2))(
        *inputs.tensors
    )
    for one, other in zip(grads, runner.gradients(inputs, grad_output)):
        assert torch.equal(one, other)


@pytest.mark.only(runners=package, dtypes=["f64"])
def test_func_jacobian_and_hessian(runner: Runner, dtypes: Dtypes) -> None:
    inputs = without_nan(TINY[0].make(dtypes, runner.device))
    call = as_function(runner, inputs)
    exact = lambda *t: oracle.ms_deform_attn(inputs.replace_tensors(*t))  # noqa: E731
    for argument in range(3):
        found = torch.func.jacrev(call, argument)(*inputs.tensors)
        torch.testing.assert_close(found, torch.func.jacrev(exact, argument)(*inputs.tensors))
    curvature = [
        torch.func.jacrev(torch.func.grad(lambda *t, f=f: (f(*t) ** 2).sum(), 1), 1)(
            *inputs.tensors
        )
        for f in (call, exact)
    ]
    assert curvature[1].abs().max() > 0
    torch.testing.assert_close(*curvature)


@pytest.mark.only(runners=package, dtypes=["f32", "bf16"], slow=None)
@pytest.mark.parametrize(
    "mapped",
    [m for m in itertools.product([None, 0, 1], repeat=3) if any(dim is not None for dim in m)],
    ids=str,
)
def test_vmap(runner: Runner, dtypes: Dtypes, mapped: tuple[int | None, ...]) -> None:
    """Over every combination of inputs and dimensions, forward and gradients: as a loop."""
    inputs = CASES["listed_points"].make(dtypes, runner.device)
    many = [
        torch.stack([tensor * factor for factor in (1.0, 0.5, 0.75)], dim)
        if dim is not None
        else tensor
        for tensor, dim in zip(inputs.tensors, mapped)
    ]
    grad_output = grad_output_for(inputs)

    def value_and_grads(*tensors: Tensor) -> tuple[Tensor, ...]:
        output, pull = torch.func.vjp(as_function(runner, inputs), *tensors)
        return output, *pull(grad_output)

    found = torch.func.vmap(value_and_grads, in_dims=tuple(mapped))(*many)
    for i in range(3):
        one = [t if dim is None else t.select(dim, i) for t, dim in zip(many, mapped)]
        alone = results(runner, inputs.replace_tensors(*one), grad_output)
        for name, together, apart in zip(RESULTS, found, alone):
            assert together[i].shape == apart.shape
            assert together[i].dtype == apart.dtype
            torch.testing.assert_close(together[i], apart, msg=name)


@pytest.mark.only(runners=package, dtypes=["f32"], slow=None)
def test_vmap_twice(runner: Runner, dtypes: Dtypes) -> None:
    inputs = CASES["non_square"].make(dtypes, runner.device)
    value = torch.stack([inputs.value, 2 * inputs.value])
    weights = torch.stack([inputs.attention_weights * factor for factor in (1, 3, 5)])
    call = as_function(runner, inputs)
    per_weight = torch.func.vmap(call, (None, None, 0))
    found = torch.func.vmap(per_weight, (0, None, None))(value, inputs.sampling_locations, weights)
    one = runner.forward(inputs)
    scale = torch.tensor([[1, 3, 5], [2, 6, 10]], device=one.device)[..., None, None, None]
    torch.testing.assert_close(found, scale * one)


@pytest.mark.only(runners=package, dtypes=["f32"])
def test_vmap_over_levels_is_refused(runner: Runner, dtypes: Dtypes) -> None:
    inputs = CASES["non_square"].make(dtypes, runner.device)
    shapes = torch.stack([inputs.spatial_shapes] * 2)
    with pytest.raises(Exception, match="spatial_shapes"):
        torch.func.vmap(lambda s: runner.call(inputs.replace(spatial_shapes=s)))(shapes)


@pytest.mark.only(runners=package, dtypes=["f64", "f32"])
def test_forward_mode(runner: Runner, dtypes: Dtypes) -> None:
    """A tangent is never lost: it is that of the oracle, and torch.ops without one refuses."""
    inputs = CASES["listed_points"].make(dtypes, runner.device)
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs.tensors)
    output, found = torch.func.jvp(as_function(runner, inputs), inputs.tensors, tangents)
    exact_inputs = inputs.to("cpu")
    exact_output, exact = torch.func.jvp(
        lambda *tensors: oracle.ms_deform_attn(exact_inputs.replace_tensors(*tensors)),
        tuple(tensor.double().cpu() for tensor in inputs.tensors),
        tuple(tensor.double().cpu() for tensor in tangents),
    )
    for one, other in ((output, exact_output), (found, exact)):
        assert error_of(one, other) <= 64 * torch.finfo(one.dtype).eps * other.abs().max()
    op = operators(runner)[0]
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(
            lambda *tensors: op(
                *inputs.replace_tensors(*tensors).arguments, None, inputs.num_points
            ),
            inputs.tensors,
            tangents,
        )


# ------------------------------------------------------------------- which gradients, and of what


@pytest.mark.only(dtypes=["f32"], slow=None)
@pytest.mark.parametrize(
    "needed", [n for n in itertools.product([False, True], repeat=3) if any(n)], ids=str
)
def test_gradients_of_some_inputs(runner: Runner, dtypes: Dtypes, needed: tuple[bool, ...]) -> None:
    inputs = CASES["non_square"].make(dtypes, runner.device)
    grad_output = grad_output_for(inputs)
    every = runner.gradients(inputs, grad_output)
    some = inputs.replace_tensors(
        *(tensor.detach().requires_grad_(need) for tensor, need in zip(inputs.tensors, needed))
    )
    runner.call(some).backward(grad_output)
    for tensor, need, grad in zip(some.tensors, needed, every):
        if need:
            assert torch.equal(tensor.grad, grad)
        else:
            assert tensor.grad is None


@pytest.mark.only(dtypes=["f32"])
def test_no_graph_without_gradients(runner: Runner, dtypes: Dtypes) -> None:
    inputs = CASES["non_square"].make(dtypes, runner.device)
    expected = runner.forward(inputs)
    plain = runner.call(inputs)
    assert not plain.requires_grad
    with torch.no_grad():
        no_grad = runner.call(inputs.leaves())
    assert not no_grad.requires_grad
    with torch.inference_mode():
        inference = runner.call(inputs.leaves())
    assert inference.is_inference()
    assert runner.call(inputs.leaves()).requires_grad
    for output in (plain, no_grad, inference):
        assert torch.equal(output, expected)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided", "offset"])
@pytest.mark.only(dtypes=["f32", "bf16"], slow={"dtypes": ["f32"]})
def test_grad_output_layout(runner: Runner, dtypes: Dtypes, layout: str) -> None:
    inputs = CASES["head_dim_30"].make(dtypes, runner.device)
    grad_output = grad_output_for(inputs)
    if layout == "transposed":
        grad_output = grad_output.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "expanded":
        grad_output = grad_output[..., :1].expand_as(grad_output)
    elif layout == "strided":
        wide = torch.full((*grad_output.shape[:2], 2 * grad_output.shape[2]), torch.nan)
        grad_output = wide.to(grad_output)[..., ::2].copy_(grad_output)
    else:
        wide = torch.full((grad_output.numel() + 2,), torch.nan).to(grad_output)
        grad_output = wide[1:-1].view(grad_output.shape).copy_(grad_output)
    check_results(results(runner, inputs, grad_output), inputs, grad_output)


@pytest.mark.only(dtypes=["f32"], slow=None)
def test_sum_and_accumulation(runner: Runner, dtypes: Dtypes) -> None:
    """A gradient of stride 0 from sum(), gradients added up over two calls."""
    inputs = CASES["non_square"].make(dtypes, runner.device).leaves()
    ones = torch.ones_like(runner.forward(inputs))
    once = runner.gradients(inputs, ones)
    for _ in range(2):
        runner.call(inputs).sum().backward()
    for tensor, grad in zip(inputs.tensors, once):
        torch.testing.assert_close(tensor.grad, 2 * grad)


@pytest.mark.only(runners=package, dtypes=["f32"], slow=None)
@pytest.mark.parametrize("changed", range(3))
def test_changing_an_input_before_backward_is_noticed(
    runner: Runner, dtypes: Dtypes, changed: int
) -> None:
    inputs = CASES["non_square"].make(dtypes, runner.device).leaves()
    tensors = [tensor * 1 for tensor in inputs.tensors]
    output = runner.call(inputs.replace_tensors(*tensors))
    tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.only(runners=package, dtypes=["f32"], slow=None)
def test_graph_is_freed_and_retained(runner: Runner, dtypes: Dtypes) -> None:
    inputs = CASES["non_square"].make(dtypes, runner.device).leaves()
    output = runner.call(inputs).sum()
    first = torch.autograd.grad(output, inputs.tensors, retain_graph=True)
    again = torch.autograd.grad(output, inputs.tensors)
    for one, other in zip(first, again):
        torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, inputs.tensors)


# ------------------------------------------------------------------------- threads, determinism

# value is larger than the caches of a core: queries are sorted, and encoders, which have a query
# for each pixel, are computed a few heads at a time.
LARGE = (
    Case("decoder", ((40, 50), (20, 25)), batch=3, queries=90, heads=4, head_dim=32, points=4),
    Case("encoder", ((28, 36), (14, 18)), 2, queries=1260, heads=4, head_dim=64, points=4),
    Case(
        "masked_encoder", ((62, 20),), 2, queries=1240, heads=8, head_dim=30, points=8, masked=0.2
    ),
)
# 9 MB of gradients of points: they are written past the caches. In 16 bits one thread computes two
# heads together, three threads do not.
PAST_CACHES = Case(
    "past_caches", ((72, 80), (30, 40)), 1, queries=6960, heads=8, head_dim=32, points=8
)


@pytest.mark.only(runners=lambda runner: runner.backend == "compiled", slow=None)
@pytest.mark.parametrize("large", LARGE, ids=lambda case: case.name)
def test_large_calls_are_right(runner: Runner, dtypes: Dtypes, large: Case) -> None:
    case = dataclasses.replace(large, batch=1)
    check(runner, case.make(dtypes, runner.device))


@pytest.mark.only(
    runners=lambda runner: runner.backend == "compiled" and runner.device == "cpu", slow=None
)
@pytest.mark.parametrize("large", [*LARGE, PAST_CACHES], ids=lambda case: case.name)
def test_same_bits_for_any_number_of_threads_and_images(
    runner: Runner, dtypes: Dtypes, large: Case, set_threads: Callable[[int], None]
) -> None:
    inputs = large.make(dtypes)
    grad_output = grad_output_for(inputs)
    set_threads(1)
    first = results(runner, inputs, grad_output)
    for count in (2, 3, 5, 40):
        set_threads(count)
        for name, one, other in zip(RESULTS, first, results(runner, inputs, grad_output)):
            assert torch.equal(one, other), (name, count)
    for image in range(large.batch):
        part = slice(image, image + 1)
        alone = inputs.replace_tensors(*(tensor[part] for tensor in inputs.tensors))
        if inputs.value_mask is not None:
            alone = alone.replace(value_mask=inputs.value_mask[part])
        for name, one, other in zip(RESULTS, first, results(runner, alone, grad_output[part])):
            assert torch.equal(one[part], other), (name, image)


@pytest.mark.only(
    runners=lambda runner: package(runner) and runner.device == "cpu",
    cases=["shared_among_threads", "same_point", "head_dim_256"],
    slow=None,
)
def test_same_bits_for_any_number_of_threads(
    runner: Runner, dtypes: Dtypes, case: Case, set_threads: Callable[[int], None]
) -> None:
    inputs = case.make(dtypes)
    grad_output = grad_output_for(inputs)
    found = []
    for count in (1, 2, 3):
        set_threads(count)
        found.append(results(runner, inputs, grad_output))
    for other in found[1:]:
        for name, one, two in zip(RESULTS, found[0], other):
            assert torch.equal(one, two), name


@pytest.mark.parametrize("points", [16, 15])
def test_gradients_too_large_for_the_caches(points: int) -> None:
    """The CPU kernels write them past the caches, where a query's are whole cache lines."""
    queries = 24_000  # 9 MB of gradients of points
    torch.manual_seed(0)
    value, locations = torch.randn(1, 20, 2, 4), torch.rand(1, queries, 2, 1, points, 2)
    weights, grad_output = torch.rand(1, queries, 2, 1, points), torch.randn(1, queries, 8)
    shapes = torch.tensor([[4, 5]])

    def gradients(*parts: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in (value, *parts[:2])]
        output = ms_deform_attn(leaves[0], shapes, None, *leaves[1:], backend="compiled")
        return torch.autograd.grad(output, leaves, parts[2])[1:]

    whole = gradients(locations, weights, grad_output)
    halves = zip(*(tensor.split(queries // 2, 1) for tensor in (locations, weights, grad_output)))
    for got, *parts in zip(whole, *(gradients(*half) for half in halves)):
        assert torch.equal(got, torch.cat(parts, 1))


@pytest.mark.only(runners=lambda r: package(r) and r.deterministic, dtypes=["f32"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_mode_reaches_the_kernel(
    runner: Runner, dtypes: Dtypes, deterministic: bool
) -> None:
    inputs = CASES["non_square"].make(dtypes, runner.device).leaves()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with Recorder() as recorder:
            runner.call(inputs).sum().backward()
    finally:
        torch.use_deterministic_algorithms(before)
    backward = [args for name, args in recorder.calls if name.endswith("_backward")]
    assert len(backward) == 1
    assert backward[0][-2] is deterministic


@pytest.mark.only(runners=package, dtypes=["f32", "bf16"], slow={"dtypes": ["f32"]})
@pytest.mark.parametrize("missing", ["value", "sampling_locations", "attention_weights"])
def test_an_input_without_a_gradient(
    runner: Runner, dtypes: Dtypes, missing: str, poisoned: None
) -> None:
    """The kernel gets the mask, and the others' gradients are the same."""
    inputs = CASES["non_square"].make(dtypes, runner.device)
    grad_output = grad_output_for(inputs)
    full = runner.gradients(inputs, grad_output)
    output_mask = [name != missing for name in ("value", "sampling_locations", "attention_weights")]
    leaves = [t.clone().requires_grad_(flag) for t, flag in zip(inputs.tensors, output_mask)]
    with Recorder() as recorder:
        runner.call(inputs.replace_tensors(*leaves)).backward(grad_output)
    assert [args[-1] for name, args in recorder.calls if name.endswith("_backward")] == [
        output_mask
    ]
    for leaf, flag, same in zip(leaves, output_mask, full):
        assert (leaf.grad is not None) == flag
        if flag:
            torch.testing.assert_close(leaf.grad, same)


def test_exact_results_are_not_trivial(dtypes: Dtypes, case: Case) -> None:
    """The cases try something: the result is not zero wherever there is something to sample."""
    inputs = case.make(dtypes)
    exact = exact_results(inputs, grad_output_for(inputs))
    assert all(e.isfinite().all() for e in exact)
    empty = {"no_batch", "no_queries", "no_points", "listed_points_all_zero", "nothing_on_the_map"}
    empty.add("masked_throughout")
    for name, e in zip(RESULTS, exact):
        assert (e.numel() > 0 and e.abs().max() > 0) == (case.name not in empty), name
