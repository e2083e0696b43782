"""The fused layer: the same as its parts, on every backend, with all gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import deform_attn
from deform_attn import composite, ms_deform_attn_fused
from deform_attn.operands import FusedOperands
from deform_attn.testing import Dtypes
from tests.runners import Recorder, Runner, package

SHAPES = [(7, 5), (3, 4), (1, 1)]
SIZES = [side for shape in SHAPES for side in shape]
ROWS = sum(height * width for height, width in SHAPES)
BATCH, QUERIES, HEADS = 2, 9, 3


def draw(
    dtype: torch.dtype,
    *,
    size: int,
    levels: int = len(SHAPES),
    num_points: list[int] | None = None,
    head_dim: int = 20,
    queries: int = QUERIES,
) -> tuple[Tensor, ...]:
    """value, reference_points, sampling_offsets, attention_logits."""
    generator = torch.Generator().manual_seed(size + levels + head_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    acc_dtype = torch.promote_types(dtype, torch.float32)
    points = [sum(num_points)] if num_points else [len(SHAPES), 4]
    reference = torch.rand((BATCH, queries, levels, size), generator=generator, dtype=torch.float64)
    reference[..., 4:] *= 2 * math.pi  # the angle of a rotated box
    return (
        normal(BATCH, ROWS, HEADS, head_dim).to(dtype),
        reference.to(acc_dtype),
        normal(BATCH, queries, HEADS, *points, 2).to(dtype),
        (3 * normal(BATCH, queries, HEADS, *points)).to(dtype),
    )


def exact_output(inputs: tuple[Tensor, ...], num_points: list[int] | None, scale: float) -> Tensor:
    value, reference, offsets, logits = inputs
    return composite.fused(
        FusedOperands(value, None, None, reference, offsets, logits, SIZES, num_points, scale)
    )


def with_gradients(function, inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def tried(
    runner: Runner,
    dtypes: Dtypes,
    *,
    size: int = 2,
    levels: int = len(SHAPES),
    num_points: list[int] | None = None,
    head_dim: int = 20,
) -> None:
    """Output and gradients against the formula in float64."""
    drawn = draw(dtypes.value, size=size, levels=levels, num_points=num_points, head_dim=head_dim)
    if runner.slow:
        drawn = tuple(tensor[:1] for tensor in drawn)
    inputs = tuple(tensor.to(runner.device) for tensor in drawn)
    grad = torch.randn(*inputs[1].shape[:2], HEADS * head_dim, dtype=torch.float64)
    grad = grad.to(runner.device, dtypes.value)

    def call(*inputs: Tensor) -> Tensor:
        return ms_deform_attn_fused(
            inputs[0],
            SHAPES,
            None,
            *inputs[1:],
            num_points=num_points,
            offset_scale=0.7,
            backend=runner.backend,
        )

    exact = tuple(tensor.cpu().double() for tensor in inputs)
    expected = with_gradients(
        lambda *x: exact_output(x, num_points, 0.7), exact, grad.cpu().double()
    )
    got = with_gradients(call, inputs, grad)
    for name, a, b, like in zip(
        ["output", "value", "reference_points", "sampling_offsets", "attention_logits"],
        got,
        expected,
        [inputs[0], *inputs],
    ):
        assert a.dtype == like.dtype, name
        assert a.shape == b.shape, name
        # sums of a few dozen terms in float32 at least, rounded once to the dtype of the result
        limit = (
            4 * torch.finfo(a.dtype).eps
            + 20 * torch.finfo(torch.promote_types(dtypes.value, torch.float32)).eps
        )
        error = (a.cpu().double() - b).abs().max() / b.abs().max()
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"


@pytest.mark.only(runners=package, slow={"dtypes": ["f32"]})
@pytest.mark.parametrize("num_points", [None, [3, 0, 2]], ids=["uniform", "listed"])
@pytest.mark.parametrize("levels", [1, len(SHAPES)])
@pytest.mark.parametrize("size", [2, 4, 5])
def test_values_and_gradients(
    runner: Runner, dtypes: Dtypes, size: int, levels: int, num_points: list[int] | None
) -> None:
    tried(runner, dtypes, size=size, levels=levels, num_points=num_points)


@pytest.mark.only(runners=package, dtypes=["f16", "bf16"])
def test_listed_points_in_16_bits(runner: Runner, dtypes: Dtypes) -> None:
    tried(runner, dtypes, num_points=[1, 0, 2])


@pytest.mark.only(runners=package, dtypes=["f32"])
@pytest.mark.parametrize("head_dim", [1, 4, 16, 30, 71, 128, 256])
def test_head_dims(runner: Runner, dtypes: Dtypes, head_dim: int) -> None:
    tried(runner, dtypes, num_points=[2, 0, 1], head_dim=head_dim)


@pytest.mark.only(
    runners=lambda runner: package(runner) and runner.deterministic, slow={"dtypes": ["f32"]}
)
def test_every_element_is_written(runner: Runner, dtypes: Dtypes, poisoned: None) -> None:
    """From memory full of NaN, and by the deterministic kernels."""
    tried(runner, dtypes, size=4, num_points=[3, 0, 2])


def subsets(gradients: int) -> list[list[bool]]:
    """Flags: each alone, each missing, none."""
    alone = [[i == only for i in range(gradients)] for only in range(gradients)]
    return [*alone, *([not flag for flag in flags] for flags in alone), [False] * gradients]


@pytest.mark.only(
    runners=lambda runner: package(runner) and runner.backend != "reference",
    dtypes=["f32", "bf16"],
    slow={"dtypes": ["f32"]},
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_output_mask(runner: Runner, dtypes: Dtypes, deterministic: bool, poisoned: None) -> None:
    """The same as all from the CPU's kernels, and None for the others."""
    drawn = draw(dtypes.value, size=4, num_points=[1, 0, 2], head_dim=4, queries=3)
    grad = torch.randn(BATCH, 3, HEADS * 4).to(dtypes.value)
    suffix = "" if runner.backend == "compiled" else "_triton"
    ops = torch.ops.deform_attn
    backward = getattr(ops, f"ms_deform_attn_fused{suffix}_backward")

    def arguments(device: str) -> tuple[object, ...]:
        tensors = [tensor.to(device) for tensor in (grad, *drawn)]
        numbers = (SIZES, [1, 0, 2], 0.7, deterministic)
        return (*tensors[:2], None, None, *tensors[2:], *numbers)

    full = ops.ms_deform_attn_fused_backward(*arguments("cpu"), [True] * 4)
    for output_mask in [[True] * 4, *subsets(4)]:
        for flag, gradient, same in zip(
            output_mask, backward(*arguments(runner.device), output_mask), full
        ):
            assert (gradient is not None) == flag, output_mask
            if flag:
                torch.testing.assert_close(gradient.cpu(), same)


@pytest.mark.only(runners=package, dtypes=["f32"], slow=None)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "torch.compile"])
@pytest.mark.parametrize("output_mask", subsets(4)[:-1], ids=str)
def test_no_gradient_is_made_that_autograd_does_not_need(
    runner: Runner, dtypes: Dtypes, output_mask: list[bool], compiled: bool
) -> None:
    drawn = [tensor.to(runner.device) for tensor in draw(dtypes.value, size=2, queries=3)]
    grad = torch.randn(BATCH, 3, HEADS * 20).to(runner.device)

    def call(value: Tensor, *rest: Tensor) -> Tensor:
        return ms_deform_attn_fused(value, SHAPES, None, *rest, backend=runner.backend)

    full = with_gradients(call, drawn, grad)[1:]
    leaves = [t.clone().requires_grad_(flag) for t, flag in zip(drawn, output_mask)]
    if compiled:
        torch._dynamo.reset()  # other tests have compiled the same code for other shapes
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    output = call(*leaves)
    with Recorder() as recorder:
        output.backward(grad)
    (flags,) = [args[-1] for name, args in recorder.calls if name.endswith("_backward")]
    if runner.backend == "reference":  # composed: locations come from reference points and offsets
        assert flags == [output_mask[0], output_mask[1] or output_mask[2], output_mask[3]]
    else:
        assert flags == output_mask
    for leaf, flag, same in zip(leaves, output_mask, full):
        assert (leaf.grad is not None) == flag
        if flag:
            torch.testing.assert_close(leaf.grad, same)


@pytest.mark.parametrize("fixed", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("size", [2, 4, 5])
def test_gradcheck(size: int, fixed: int | None) -> None:
    inputs = draw(torch.float64, size=size, head_dim=3, queries=2)
    leaves = [tensor.requires_grad_(i != fixed) for i, tensor in enumerate(inputs)]

    def call(value: Tensor, *rest: Tensor) -> Tensor:
        return ms_deform_attn_fused(value, SHAPES, None, *rest)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("size", "num_points"), [(4, None), (5, [3, 0, 2])], ids=["uniform", "rotated, listed"]
)
def test_operator_checks(size: int, num_points: list[int] | None) -> None:
    """Forward and backward; sizes as a tensor, and as numbers."""
    value, *rest = (
        t.requires_grad_() for t in draw(torch.float64, size=size, queries=2, num_points=num_points)
    )
    levels = (torch.tensor(SHAPES), None) if num_points is None else (None, SIZES)
    operands = (value, levels[0], None, *rest, levels[1], num_points, 0.5)
    torch.library.opcheck(torch.ops.deform_attn.ms_deform_attn_fused.default, operands)
    grad = torch.randn(BATCH, 2, HEADS * 20, dtype=torch.float64, requires_grad=True)
    backward = torch.ops.deform_attn.ms_deform_attn_fused_backward.default
    torch.library.opcheck(backward, (grad, *operands, False, [True] * 4))
    torch.library.opcheck(backward, (grad, *operands, False, [True, False, True, True]))


def test_compiles_to_one_node() -> None:
    inputs = draw(torch.float32, size=4)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def call(value: Tensor, *rest: Tensor) -> Tensor:
        return ms_deform_attn_fused(value, SHAPES, None, *rest)

    got = torch.compile(call, fullgraph=True, backend=backend)(*inputs)
    assert torch.equal(got, call(*inputs))
    nodes = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert nodes == ["deform_attn.ms_deform_attn_fused.default"]


def oriented_head(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """Rotation-aware deformable attention as oriented heads compose it (GTR's in LibreYOLO).

    Offsets are scaled by the sides of the box, turned by its angle in fractions of the map, and
    added to its centre. The head itself predicts ``angle / pi``.
    """
    cx, cy, w, h, angle = reference[:, :, None, :, None].unbind(-1)  # [B, Q, 1, L, 1]
    x, y = (offsets / offsets.shape[4]).unbind(-1)
    x, y = x * w * 0.5, y * h * 0.5
    cos, sin = angle.cos(), angle.sin()
    locations = torch.stack((cx + cos * x - sin * y, cy + sin * x + cos * y), -1)
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    return deform_attn.ms_deform_attn(value, SHAPES, None, locations, weights)


def test_rotated_boxes_as_oriented_heads_compose_them() -> None:
    inputs = draw(torch.float64, size=5)
    grad = torch.randn(BATCH, QUERIES, HEADS * 20, dtype=torch.float64)

    def call(value: Tensor, *rest: Tensor) -> Tensor:
        return ms_deform_attn_fused(value, SHAPES, None, *rest)

    got = with_gradients(call, inputs, grad)
    for a, b in zip(got, with_gradients(oriented_head, inputs, grad)):
        torch.testing.assert_close(a, b)


@pytest.mark.only(runners=package, dtypes=["f32"])
@pytest.mark.parametrize(
    ("quarters", "offset", "pixel"),
    [
        (0, (2, 0), (2, 4)),  # (row, column), from the centre (2, 2)
        (1, (2, 0), (4, 2)),  # a quarter turn: what was to the right is below
        (1, (0, 1), (2, 0)),
        (2, (2, 0), (2, 0)),
        (-1, (2, 0), (0, 2)),
    ],
)
def test_direction_of_the_angle(
    runner: Runner,
    dtypes: Dtypes,
    quarters: int,
    offset: tuple[int, int],
    pixel: tuple[int, int],
) -> None:
    """A box of (w, h) = (2, 4) pixels on a map of 5 x 5: an offset of 1 is half a side."""
    value = torch.zeros(1, 5, 5, 1, 1)
    value[0, pixel[0], pixel[1]] = 1
    reference = torch.tensor([0.5, 0.5, 0.4, 0.8, quarters * math.pi / 2]).view(1, 1, 1, 5)
    offsets = torch.tensor(offset, dtype=torch.float32).view(1, 1, 1, 1, 1, 2)
    inputs = (value.view(1, 25, 1, 1), reference, offsets, torch.zeros(1, 1, 1, 1, 1))
    value, *rest = (tensor.to(runner.device) for tensor in inputs)
    output = ms_deform_attn_fused(value, [(5, 5)], None, *rest, backend=runner.backend)
    torch.testing.assert_close(output.cpu(), torch.ones(1, 1, 1))


def test_vmap_over_queries_of_two_models() -> None:
    value, *rest = draw(torch.float32, size=2)
    stacked = [torch.stack([tensor, tensor + 0.1]) for tensor in rest]

    def call(*rest: Tensor) -> Tensor:
        return ms_deform_attn_fused(value, SHAPES, None, *rest)

    got = torch.func.vmap(call)(*stacked)
    for i in range(2):
        torch.testing.assert_close(got[i], call(*(tensor[i] for tensor in stacked)))


def test_gradients_are_the_same_bits_on_any_number_of_threads(
    set_threads: Callable[[int], None],
) -> None:
    inputs = draw(torch.float32, size=4, queries=200)
    grad = torch.randn(BATCH, 200, HEADS * 20)

    def call(value: Tensor, *rest: Tensor) -> Tensor:
        return ms_deform_attn_fused(value, SHAPES, None, *rest, backend="compiled")

    results = []
    for threads in (1, 2, 3, 7, 16):
        set_threads(threads)
        results.append(with_gradients(call, inputs, grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_a_nan_logit_spoils_its_own_head_alone() -> None:
    value, reference, offsets, logits = draw(torch.float32, size=2)
    logits[0, 3, 1, 0, 0] = math.nan
    output = ms_deform_attn_fused(value, SHAPES, None, reference, offsets, logits)
    spoiled = output.view(BATCH, QUERIES, HEADS, -1).isnan()
    assert spoiled[0, 3, 1].all()
    assert spoiled.sum() == spoiled[0, 3, 1].numel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"reference_points": torch.zeros(BATCH, QUERIES, 3, 3)},
            "reference_points: expected shape",
        ),
        ({"reference_points": torch.zeros(BATCH, QUERIES, 2, 2)}, "reference_points: expected sh"),
        ({"reference_points": torch.zeros(BATCH, 1, 3, 2)}, "reference_points: expected shape"),
        ({"reference_points": torch.zeros(BATCH, QUERIES, 3, 2).int()}, "reference_points: expec"),
        ({"sampling_offsets": torch.zeros(BATCH, QUERIES, HEADS, 12, 2)}, "sampling_offsets: exp"),
        ({"attention_logits": torch.zeros(BATCH, QUERIES, HEADS, 12)}, "attention_logits: expect"),
        ({"spatial_shapes": [(70, 50), (3, 4), (1, 1)]}, "spatial_shapes: level 0"),
    ],
)
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_bad_input_is_named(backend: str, change: dict[str, object], message: str) -> None:
    value, reference, offsets, logits = draw(torch.float32, size=2)
    arguments = {
        "value": value,
        "spatial_shapes": SHAPES,
        "level_start_index": None,
        "reference_points": reference,
        "sampling_offsets": offsets,
        "attention_logits": logits,
    }
    with pytest.raises(ValueError, match=message):
        ms_deform_attn_fused(**(arguments | change), backend=backend)


def test_module_is_the_composition_of_its_parts() -> None:
    torch.manual_seed(0)
    module = deform_attn.MSDeformAttn(d_model=24, n_levels=3, n_heads=3, n_points=2)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    query, features = torch.randn(2, 5, 24), torch.randn(2, ROWS, 24)
    reference = torch.rand(2, 5, 3, 4)
    with deform_attn.use_backend("reference"):
        expected = module(query, reference, features, torch.tensor(SHAPES))
    got = module(query, reference, features, torch.tensor(SHAPES))
    torch.testing.assert_close(got, expected)


def test_an_encoders_first_locations_stay_on_their_knots() -> None:
    """Whole offsets from pixel centres: fused and composed take the same side of each knot."""
    height, width = 9, 13
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = torch.stack([(x + 0.5) / width, (y + 0.5) / height], -1)
    reference = centres.view(1, height * width, 1, 2)
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, height * width, 2, 8, generator=generator)
    offsets = torch.randint(-2, 3, (1, height * width, 2, 1, 4, 2), generator=generator).float()
    logits = torch.randn(1, height * width, 2, 1, 4, generator=generator)
    grad = torch.randn(1, height * width, 16, generator=generator)

    def call(value: Tensor, *rest: Tensor) -> Tensor:
        return ms_deform_attn_fused(value, [(height, width)], None, *rest, backend="compiled")

    def composed(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        sizes = torch.tensor([[height, width]])
        fused = FusedOperands(value, sizes, None, reference, offsets, logits)
        points = composite.unfused(fused)[3:5]
        return deform_attn.ms_deform_attn(
            value, [(height, width)], None, *points, backend="compiled"
        )

    inputs = (value, reference, offsets, logits)
    for a, b in zip(with_gradients(call, inputs, grad), with_gradients(composed, inputs, grad)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
