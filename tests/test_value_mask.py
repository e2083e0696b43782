"""value_mask: masked rows read as zero and get no gradient, on every backend.

The cases "masked..." of `deform_attn.testing.CASES` try it with every runner and dtype; here are
derivatives, tracing, modules and errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import deform_attn
from deform_attn import ms_deform_attn, ms_deform_attn_fused
from deform_attn.functional import gradients
from deform_attn.testing import (
    CASES,
    DTYPES,
    Dtypes,
    FusedInputs,
    expected_fused,
    fused_results,
    grad_output_for,
)
from tests.family import CHANNELS, FAMILY, LEVELS, lively, tensors_of, with_tensors
from tests.runners import Runner, package

ROWS = sum(height * width for height, width in LEVELS)
# of each module: its argument, and whether True is a pixel there
MASKS = {"official": ("input_padding_mask", False), "mmcv": ("key_padding_mask", False)}


def drawn_mask(batch: int = 2, rows: int = ROWS) -> Tensor:
    return torch.rand((batch, rows), generator=torch.Generator().manual_seed(3)) < 0.4


def fused(inputs: FusedInputs, backend: str | None = None) -> Tensor:
    return ms_deform_attn_fused(
        *inputs.arguments,
        num_points=inputs.num_points,
        offset_scale=inputs.offset_scale,
        backend=backend,
        value_mask=inputs.value_mask,
    )


@pytest.mark.only(runners=package, slow={"dtypes": ["f32"]})
@pytest.mark.parametrize(("size", "num_points"), [(2, [3, 0, 2]), (5, None)], ids=str)
def test_fused(
    runner: Runner, dtypes: Dtypes, size: int, num_points: list[int] | None, poisoned: None
) -> None:
    """Against the oracle, with NaN under the mask; by the deterministic kernels, too."""
    sizes = {"batch": 1, "queries": 3, "heads": 2, "head_dim": 8} if runner.slow else {}
    inputs = FusedInputs.draw(
        dtypes.value, size=size, num_points=num_points, masked=True, device=runner.device, **sizes
    )
    grad_output = grad_output_for(inputs)
    found = fused_results(lambda x: fused(x, runner.backend), inputs, grad_output)
    errors = expected_fused(inputs, grad_output).errors(found)
    assert [str(error) for error in errors if not error.passed] == []
    assert (found[1][inputs.value_mask] == 0).all()


@pytest.mark.parametrize("method", ["default", "discrete", "fused"])
def test_derivatives_of_any_order(method: str) -> None:
    mask = drawn_mask()
    if method == "fused":
        drawn = FusedInputs.draw(torch.float64, size=4, queries=2, heads=2, head_dim=3)
        mask = drawn_mask(rows=drawn.value.shape[1])
        shapes, tensors = drawn.spatial_shapes, list(drawn.tensors)
        function: Callable[..., Tensor] = ms_deform_attn_fused
        options: dict[str, Any] = {}
    else:
        inputs = CASES["non_square"].make(DTYPES["f64"])
        shapes, tensors = inputs.spatial_shapes, list(inputs.tensors)
        function, options = ms_deform_attn, {"method": method}
    leaves = [t.requires_grad_(method != "discrete" or i != 1) for i, t in enumerate(tensors)]

    def call(value: Tensor, *rest: Tensor) -> Tensor:
        return function(value, shapes, None, *rest, value_mask=mask, **options)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.only(runners=package, dtypes=["f32"], slow=None)
def test_second_derivatives_are_those_of_masked_fill(runner: Runner, dtypes: Dtypes) -> None:
    inputs = CASES["non_square"].make(dtypes, runner.device)
    mask = drawn_mask().to(runner.device)
    grad_output = grad_output_for(inputs)

    def twice(filled: bool) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs.tensors]
        value, *rest = leaves
        how: dict[str, Any] = {"value_mask": mask}
        if filled:
            value, how = value.masked_fill(mask[..., None, None], 0), {}
        arguments = (value, *inputs.arguments[1:3], *rest)
        output = ms_deform_attn(*arguments, backend=runner.backend, **how)
        first = torch.autograd.grad(output, leaves, grad_output, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [output, *first, *second]

    for one, other in zip(twice(False), twice(True)):
        torch.testing.assert_close(one, other)


def test_gradients_for_callers_with_an_autograd_of_their_own() -> None:
    inputs = CASES["masked"].make(DTYPES["f32"])
    grad_output = grad_output_for(inputs)
    leaves = inputs.leaves()
    output = ms_deform_attn(*leaves.arguments, value_mask=inputs.value_mask)
    expected = torch.autograd.grad(output, leaves.tensors, grad_output)
    found = gradients(grad_output, *inputs.arguments, value_mask=inputs.value_mask)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_vmap_over_masks() -> None:
    inputs = FusedInputs.draw(torch.float32, masked=True)
    assert inputs.value_mask is not None
    value = inputs.value.nan_to_num()
    masks = torch.stack([inputs.value_mask, ~inputs.value_mask])

    def call(mask: Tensor) -> Tensor:
        return ms_deform_attn_fused(value, *inputs.arguments[1:], value_mask=mask)

    found = torch.func.vmap(call)(masks)
    for one, mask in zip(found, masks):
        torch.testing.assert_close(one, call(mask))


@pytest.mark.only(runners=package, dtypes=["f32"], slow=None)
def test_the_mask_is_an_operand_of_one_node(runner: Runner, dtypes: Dtypes) -> None:
    """In a compiled graph too: value is neither copied nor filled; under autocast as well."""
    inputs = FusedInputs.draw(dtypes.value, masked=True, device=runner.device)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def call(value: Tensor, mask: Tensor) -> Tensor:
        return ms_deform_attn_fused(
            *(value, *inputs.arguments[1:]), backend=runner.backend, value_mask=mask
        )

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    assert torch.equal(
        compiled(inputs.value, inputs.value_mask), call(inputs.value, inputs.value_mask)
    )
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert not [target for target in targets if "masked_fill" in target]


def module_mask(name: str, padding: Tensor) -> dict[str, Tensor]:
    argument, keeps = MASKS.get(name, ("value_mask", True))
    return {argument: ~padding if keeps else padding}


@pytest.mark.parametrize("name", FAMILY)
def test_modules_are_those_that_fill_the_projected_value(name: str) -> None:
    torch.manual_seed(0)
    module, call = lively(FAMILY[name].make()), FAMILY[name].arguments()
    padding = drawn_mask()

    def results(given: dict[str, Any]) -> list[Tensor]:
        tensors = {key: tensor.clone().requires_grad_() for key, tensor in tensors_of(call).items()}
        output = module(**with_tensors(call, tensors), **given)
        leaves = [*tensors.values(), *(p for p in module.parameters() if p.requires_grad)]
        grad = torch.linspace(-1, 1, output.numel()).view(output.shape)
        found = torch.autograd.grad(output, leaves, grad, allow_unused=True, materialize_grads=True)
        return [output, *found]

    found = results(module_mask(name, padding))
    handle = module.get_submodule("value_proj").register_forward_hook(
        lambda _, __, value: value.masked_fill(padding[..., None], 0)
    )
    try:
        for one, other in zip(found, results({}), strict=True):
            torch.testing.assert_close(one, other)
    finally:
        handle.remove()


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["official", "mmcv", "rtdetrv2", "dfine"])
def test_modules_do_not_copy_value(name: str) -> None:
    module, call = FAMILY[name].make(), FAMILY[name].arguments()
    given = module_mask(name, drawn_mask())
    with deform_attn.use_backend("compiled"), Operators() as seen:
        module(**call, **given).sum().backward()
    assert "ms_deform_attn_fused_backward" in seen.names
    assert not seen.names & {"masked_fill", "masked_fill_", "where"}


def test_exported_program() -> None:
    module, call = lively(FAMILY["official"].make()).eval(), FAMILY["official"].arguments()
    call["input_spatial_shapes"] = list(LEVELS)
    call["input_padding_mask"] = drawn_mask()
    program = torch.export.export(module, (), call)
    other = call | {"input_padding_mask": ~call["input_padding_mask"]}
    torch.testing.assert_close(program.module()(**other), module(**other))


@pytest.mark.parametrize("form", ["gather", "grid_sample"])
def test_onnx(form: str) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from deform_attn.integrations.onnx import export

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = lively(FAMILY["official"].make())

        def forward(self, query: Tensor, reference: Tensor, value: Tensor, mask: Tensor) -> Tensor:
            return self.layer(query, reference, value, list(LEVELS), None, mask)

    layer = Layer().eval()
    inputs = (torch.randn(2, 5, CHANNELS), torch.rand(2, 5, 3, 2), torch.randn(2, ROWS, CHANNELS))
    program = export(layer, (*inputs, drawn_mask()), form=form, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    given = (*inputs, ~drawn_mask())
    names = [x.name for x in session.get_inputs()]
    (found,) = session.run(None, {n: x.numpy() for n, x in zip(names, given, strict=True)})
    torch.testing.assert_close(torch.from_numpy(found), layer(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["compiled", "reference"])
@pytest.mark.parametrize("function", ["given", "fused", "discrete"])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 48), "a bool tensor of shape .*, True for padding, got torch.float32"),
        (torch.zeros(2, 48, dtype=torch.uint8), "a bool tensor .*, got torch.uint8"),
        (torch.zeros(2, 47, dtype=torch.bool), r".*= \[2, 48\], .* got torch.bool \(2, 47\)"),
        (torch.zeros(1, 48, dtype=torch.bool), r".*= \[2, 48\], .* got torch.bool \(1, 48\)"),
        (torch.zeros(2, 48, 1, dtype=torch.bool), r".*= \[2, 48\], .* got torch.bool \(2, 48, 1\)"),
        (torch.zeros(2, 48, dtype=torch.bool, device="meta"), "on value's device .*, got meta"),
        ([[False] * 48] * 2, "a tensor, got list"),
    ],
)
def test_bad_masks_are_named(backend: str, function: str, mask: Any, message: str) -> None:
    value, offsets, weights = torch.zeros(2, 48, 2, 4), torch.zeros(2, 3, 2, 1, 2, 2), None
    weights = torch.zeros(2, 3, 2, 1, 2)
    options = {"backend": backend, "value_mask": mask}
    error = TypeError if isinstance(mask, list) else ValueError
    with pytest.raises(error, match=f"^value_mask: expected {message}"):
        if function == "fused":
            reference = torch.zeros(2, 3, 1, 2)
            ms_deform_attn_fused(value, [(8, 6)], None, reference, offsets, weights, **options)
        else:
            method = "discrete" if function == "discrete" else "default"
            ms_deform_attn(value, [(8, 6)], None, offsets, weights, method=method, **options)


@pytest.mark.parametrize("masked", [torch.ones, torch.zeros])
def test_all_or_nothing(masked: Callable[..., Tensor]) -> None:
    """All rows masked: zeros. None masked: the bits of a call without a mask."""
    inputs = FusedInputs.draw(torch.float32)
    mask = masked(inputs.value.shape[:2], dtype=torch.bool)
    output = ms_deform_attn_fused(*inputs.arguments, value_mask=mask)
    expected = ms_deform_attn_fused(*inputs.arguments)
    assert torch.equal(output, torch.zeros_like(output) if mask.all() else expected)


def test_gradients_are_the_same_bits_on_any_number_of_threads(
    set_threads: Callable[[int], None],
) -> None:
    """Bands of rows: a dropped pixel adds to no other band."""
    inputs = FusedInputs.draw(torch.float32, masked=True, batch=1, queries=200)
    grad_output = grad_output_for(inputs)
    found = []
    for threads in (1, 3, 7, 16):
        set_threads(threads)
        found.append(fused_results(lambda x: fused(x, "compiled"), inputs, grad_output))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other))
