"""The modules: the peers' names, initial weights, state dicts, masks and recorded numbers."""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deform_attn
from deform_attn import MSDeformableAttention, MSDeformAttn, MultiScaleDeformableAttention
from tests.family import CHANNELS, FAMILY, lively, tensors_of, with_tensors
from tests.runners import Runner, package
from tests.test_torch_integration import module_arguments

# max|a - b| / max|b|, as the recorded values were compared with a re-implementation
OUTPUT_LIMIT = 2e-6
GRADIENT_LIMIT = 4e-6

all_backends = pytest.mark.only(runners=package, slow=None)


def relative_error(found: Tensor, recorded: np.ndarray) -> float:
    recorded_tensor = torch.from_numpy(recorded)
    assert found.shape == recorded_tensor.shape
    return ((found.cpu() - recorded_tensor).abs().max() / recorded_tensor.abs().max()).item()


def recorded_form(gradient: Tensor, key: str) -> Tensor:
    """Large gradients are recorded as every 97th number, and as two norms."""
    if key.endswith("__every97"):
        return gradient.flatten()[::97]
    if key.endswith("__norms"):
        return torch.stack([gradient.abs().sum(), gradient.norm()])
    return gradient


def recorded_module(name: str, config: dict[str, Any]) -> nn.Module:
    case = config["cases"][name]
    channels, heads = config["d_model"], config["heads"]
    levels, points = case["levels"], case["points"]
    if name.startswith("deformable"):
        return MSDeformAttn(channels, levels, heads, points)
    system = name.removesuffix(name[name.index("_") :])
    variant = "rtdetrv2" if name.startswith("rtdetr_v2") else system
    return MSDeformableAttention(
        *(channels, heads, levels, points),
        method=case.get("sampling", "default"),
        offset_scale=case.get("offset_scale", 0.5),
        variant=variant,
    )


def call_as_the_peer(module: nn.Module, given: dict[str, Tensor], mask: Tensor | None) -> Tensor:
    """With the peer's arguments: start index, polarity of the mask, form of value."""
    shapes = given["shapes"]
    query, reference, value = given["query"], given["reference"], given["value"]
    if isinstance(module, MSDeformAttn):
        areas = shapes.prod(-1)
        return module(query, reference, value, shapes, areas.cumsum(0) - areas, mask)
    sizes = shapes.tolist()
    if module.variant == "dfine":
        by_head = value.unflatten(-1, (module.num_heads, -1)).permute(0, 2, 3, 1)
        value = by_head.split([height * width for height, width in sizes], -1)
    return module(query, reference, value, sizes, None if mask is None else ~mask)


@all_backends
def test_recorded_outputs_and_gradients(runner: Runner, golden_case: str, goldens: Path) -> None:
    name = golden_case
    arrays = np.load(goldens / "msda_modules.npz")
    facts = json.loads((goldens / "msda_modules.json").read_text())
    module = recorded_module(name, facts["config"])
    weights = {
        entry["name"]: torch.from_numpy(arrays[f"weight/{name}/{entry['name']}"])
        for entry in facts["state_dicts"][name]
    }
    assert list(module.state_dict()) == [entry["name"] for entry in facts["state_dicts"][name]]
    module.load_state_dict(weights, strict=True)
    module.to(runner.device)
    given = {
        key: torch.from_numpy(arrays[f"in/{name}/{key}"]).to(runner.device)
        for key in ("query", "reference", "value", "shapes", "grad_output")
    }
    mask = None
    if name.endswith("padded"):
        mask = torch.from_numpy(arrays[f"in/{name}/padding_mask"]).to(runner.device)
        assert mask.any()
    for key in ("query", "reference", "value"):
        given[key].requires_grad_()
    with deform_attn.use_backend(str(runner.backend)):
        output = call_as_the_peer(module, given, mask)
        output.backward(given["grad_output"])
    errors = {"output": relative_error(output.detach(), arrays[f"out/{name}/output"])}
    expected = {f"in/{key}" for key in ("query", "reference", "value")}
    expected |= {f"param/{key}" for key, p in module.named_parameters() if p.requires_grad}
    for key in facts["no_gradient"].get(f"{name}/grad", []):
        assert given[key].grad is None
        expected.remove(f"in/{key}")
    for key in arrays.files:
        if key.startswith(f"out/{name}/grad/"):
            kind, tensor_name = key.split("__")[0].split("/", 4)[3:]
            tensor = given[tensor_name] if kind == "in" else module.get_parameter(tensor_name)
            gradient = recorded_form(tensor.grad, key)
            errors[f"{kind}/{tensor_name}"] = relative_error(gradient, arrays[key])
    assert {*errors} - {"output"} == expected
    worst = max(errors, key=lambda key: errors[key])
    print(f"{name}: output {errors['output']:.1e}, worst {errors[worst]:.1e} ({worst})")
    for key, error in errors.items():
        assert error <= (OUTPUT_LIMIT if key == "output" else GRADIENT_LIMIT), key


# --------------------------------------------------------- state dicts and initial weights


def projections(channels: int, points: int, value_channels: int) -> dict[str, tuple[int, ...]]:
    return {
        "sampling_offsets.weight": (points * 2, channels),
        "sampling_offsets.bias": (points * 2,),
        "attention_weights.weight": (points, channels),
        "attention_weights.bias": (points,),
        "value_proj.weight": (value_channels, channels),
        "value_proj.bias": (value_channels,),
        "output_proj.weight": (channels, value_channels),
        "output_proj.bias": (channels,),
    }


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (MSDeformAttn(64, 3, 8, 5), projections(64, 8 * 15, 64)),
        (MultiScaleDeformableAttention(64, 8, 3, 5), projections(64, 8 * 15, 64)),
        (
            MultiScaleDeformableAttention(64, 8, 3, 5, value_proj_ratio=0.5),
            projections(64, 8 * 15, 32),
        ),
        (MSDeformableAttention(64, 8, 3, 5, variant="rtdetr"), projections(64, 8 * 15, 64)),
        (
            MSDeformableAttention(64, 8, 3, 5),
            {"num_points_scale": (15,)} | projections(64, 8 * 15, 64),
        ),
        (
            MSDeformableAttention(64, 8, 3, [3, 6, 3], variant="dfine"),
            {"num_points_scale": (12,)} | dict(list(projections(64, 8 * 12, 64).items())[:4]),
        ),
    ],
    ids=["official", "mmcv", "mmcv_ratio", "rtdetr", "rtdetrv2", "dfine"],
)
def test_state_dict(module: nn.Module, expected: dict[str, tuple[int, ...]]) -> None:
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == expected


def test_defaults() -> None:
    official = MSDeformAttn()
    assert (official.d_model, official.n_levels, official.n_heads, official.n_points) == (
        *(256, 4, 8, 4),
    )
    for module in (MultiScaleDeformableAttention(), MSDeformableAttention()):
        assert (module.num_heads, module.num_levels, module.num_points) == (8, 4, 4)
    assert MultiScaleDeformableAttention().embed_dims == MSDeformableAttention().embed_dim == 256
    by_detrex = MultiScaleDeformableAttention(embed_dim=32, num_heads=4, img2col_step=8)
    assert (by_detrex.embed_dims, by_detrex.im2col_step) == (32, 8)


@pytest.mark.parametrize("heads", [8, 4, 6])
@pytest.mark.parametrize("points", [[4, 4, 4, 4], [3], [1, 1], [3, 6, 3], [0, 2]], ids=str)
def test_initial_weights(heads: int, points: list[int]) -> None:
    """Offsets: head m looks in direction 2 pi m / M on the unit square, point k goes k + 1 far."""
    modules: list[Any] = [MSDeformableAttention(12 * heads, heads, len(points), points)]
    if len(set(points)) == 1:
        modules.append(MSDeformAttn(12 * heads, len(points), heads, points[0]))
        modules.append(
            MultiScaleDeformableAttention(12 * heads, heads, len(points), points[0], dropout=0.3)
        )
    for module in modules:
        bias = module.sampling_offsets.bias.view(heads, sum(points), 2)
        steps = [k + 1 for count in points for k in range(count)]
        for m in range(heads):
            x, y = math.cos(2 * math.pi * m / heads), math.sin(2 * math.pi * m / heads)
            for k, step in enumerate(steps):
                expected = torch.tensor([x, y]) / max(abs(x), abs(y)) * step
                torch.testing.assert_close(bias[m, k], expected, rtol=0, atol=2e-6 * max(points))
        for name in (
            "sampling_offsets.weight",
            "attention_weights.weight",
            "attention_weights.bias",
        ):
            assert (module.get_parameter(name) == 0).all()
        for projection in (module.value_proj, module.output_proj):
            assert (projection.bias == 0).all()
        assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("name", FAMILY)
def test_a_seed_gives_the_peers_weights(name: str) -> None:
    """The peers draw four linear layers, then Xavier weights for two of them."""
    torch.manual_seed(5)
    module = FAMILY[name].make()
    after = torch.rand(1)
    torch.manual_seed(5)
    points = module.attention_weights.out_features
    nn.Linear(CHANNELS, points * 2), nn.Linear(CHANNELS, points)
    if name != "dfine":
        drawn = [nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)]
        for linear, projection in zip(drawn, (module.value_proj, module.output_proj)):
            nn.init.xavier_uniform_(linear.weight)
            assert torch.equal(linear.weight, projection.weight)
    assert torch.equal(torch.rand(1), after)


def test_a_buffer_of_other_counts_is_refused() -> None:
    """Of as many points: by shape it fits."""
    module = MSDeformableAttention(32, 4, 3, [3, 6, 3])
    half = {name: tensor.half() for name, tensor in module.state_dict().items()}
    module.load_state_dict(half)
    other = MSDeformableAttention(32, 4, 3, [6, 3, 3]).state_dict()
    with pytest.raises(RuntimeError, match=r"num_points_scale: expected .* \[3, 6, 3\], got"):
        module.load_state_dict(other)
    del half["num_points_scale"]
    with pytest.raises(RuntimeError, match="Missing key.*num_points_scale"):
        module.load_state_dict(half)


# ------------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize("name", FAMILY)
def test_deferred_initialization(name: str) -> None:
    """Made on "meta", the weights are the official ones, whichever module is reset last."""
    expected = FAMILY[name].make().state_dict()
    for backwards in (False, True):
        with torch.device("meta"):
            module = FAMILY[name].make()
        module.to_empty(device="cpu")
        modules = [m for m in module.modules() if hasattr(m, "reset_parameters")]
        assert len(modules) > 1
        for child in reversed(modules) if backwards else modules:
            child.reset_parameters()
        for key, tensor in module.state_dict().items():
            if key.endswith("proj.weight"):  # random
                bound = (6 / (2 * CHANNELS)) ** 0.5
                assert tensor.abs().max() <= bound
                assert tensor.std() > bound / 3
            else:
                assert torch.equal(tensor, expected[key]), key
    copied = copy.deepcopy(module)
    with torch.no_grad():
        copied.sampling_offsets.bias.zero_()
        copied.sampling_offsets.reset_parameters()
    assert torch.equal(copied.sampling_offsets.bias, module.sampling_offsets.bias)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_reset_of_sharded_parameters() -> None:
    """FSDP2 from "meta": parameters are DTensors."""
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.fsdp import fully_shard

    expected = FAMILY["rtdetrv2"].make().state_dict()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            module = FAMILY["rtdetrv2"].make()
        fully_shard(module)
        module.to_empty(device="cpu")
        module.reset_parameters()
        for key, tensor in module.state_dict().items():
            if not key.endswith("proj.weight"):
                full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                assert torch.equal(full, expected[key]), key
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("name", FAMILY)
def test_wrapped_projections(name: str) -> None:
    """Nothing but a call is asked of the layers inside: not a weight, not a size."""

    class Wrapped(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.hidden = [layer]  # not a child: no parameter is found

        def forward(self, x: Tensor) -> Tensor:
            return self.hidden[0](x)

    module = lively(FAMILY[name].make()).eval()
    call = FAMILY[name].arguments()
    expected = module(**call)
    for child, layer in list(module.named_children()):
        setattr(module, child, Wrapped(layer))
    assert torch.equal(module(**call), expected)
    call["reference_points"] = call["reference_points"][:1]
    with pytest.raises(ValueError, match="reference_points: expected shape"):
        module(**call)


@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantized() -> None:
    from torch.ao.quantization import quantize_dynamic

    module = lively(FAMILY["official"].make()).eval()
    call = FAMILY["official"].arguments()
    quantized = quantize_dynamic(module, {nn.Linear}, torch.qint8)
    assert (quantized(**call) - module(**call)).abs().max() < 0.2


@pytest.mark.parametrize("name", FAMILY)
def test_another_default_device(name: str) -> None:
    """Level starts and buffers are made where they are needed."""
    module = lively(FAMILY[name].make())
    call = FAMILY[name].arguments()
    starts = next((key for key in call if key.endswith("start_index")), None)
    if starts is not None:
        call[starts] = call[starts].tolist()
    expected, state = module(**call), module.state_dict()
    torch.set_default_device("meta")
    try:
        found = module(**call)
        module.load_state_dict(state)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", FAMILY)
def test_arrays_are_named(name: str) -> None:
    """A NumPy array has a device, too, which is called "cpu"."""
    call = FAMILY[name].arguments()
    call["reference_points"] = call["reference_points"].numpy()
    with pytest.raises(TypeError, match="reference_points: expected a tensor, got ndarray"):
        FAMILY[name].make()(**call)


@all_backends
def test_padding_is_not_seen(runner: Runner) -> None:
    """Numbers in padded rows change nothing; without the mask they do."""
    module = MSDeformAttn(32, 3, 4, 2).to(runner.device)
    query, reference, features, shapes, starts = module_arguments(module, runner.device)
    mask = torch.zeros(features.shape[:2], dtype=torch.bool, device=runner.device)
    mask[:, ::3] = True
    other = features.masked_fill(mask[..., None], 1000.0)
    with deform_attn.use_backend(str(runner.backend)), torch.no_grad():
        one = module(query, reference, features, shapes, starts, mask)
        two = module(query, reference, other, shapes, starts, mask)
        unmasked = module(query, reference, other, shapes, starts)
        none = module(query, reference, features, shapes, starts, torch.zeros_like(mask))
        plain = module(query, reference, features, shapes, starts)
    assert torch.equal(one, two)
    assert not torch.allclose(one, unmasked)
    assert torch.equal(none, plain)


@all_backends
def test_start_index_and_list_shapes(runner: Runner) -> None:
    module = MSDeformAttn(32, 3, 4, 2).to(runner.device)
    query, reference, features, shapes, starts = module_arguments(module, runner.device)
    with deform_attn.use_backend(str(runner.backend)), torch.no_grad():
        expected = module(query, reference, features, shapes, starts)
        for other in (shapes.tolist(), [tuple(pair) for pair in shapes.tolist()], shapes):
            assert torch.equal(module(query, reference, features, other, None), expected)
            assert torch.equal(module(query, reference, features, other, starts), expected)


def test_points_and_boxes() -> None:
    """Offsets are pixels of a level beside a point, and half a side over n_points in a box."""
    module = MSDeformAttn(32, 3, 4, 2)
    query, reference, features, shapes, starts = module_arguments(module)
    sizes = shapes.flip(-1).float()  # (width, height)
    # with sides of 2 * n_points pixels, an offset in the box is one pixel too
    box = torch.cat([reference, (2 * module.n_points / sizes).expand_as(reference)], -1)
    with torch.no_grad():
        by_point = module(query, reference, features, shapes, starts)
        by_box = module(query, box, features, shapes, starts)
        wider = module(query, box * torch.tensor([1, 1, 1.5, 1]), features, shapes, starts)
    torch.testing.assert_close(by_point, by_box, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wider, by_box, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "argument", "says"),
    [
        ({"reference_points": torch.rand(2, 5, 3, 3)}, "reference_points", "(2, 5, 3, 3)"),
        ({"reference_points": torch.rand(2, 5, 2, 2)}, "reference_points", "(2, 5, 2, 2)"),
        ({"reference_points": torch.rand(2, 4, 3, 2)}, "reference_points", "(2, 4, 3, 2)"),
        ({"reference_points": torch.rand(2, 5, 2)}, "reference_points", "(2, 5, 2)"),
        ({"query": torch.rand(2, 5, 31)}, "query", "(2, 5, 31)"),
        ({"query": torch.rand(1, 5, 32)}, "query", "(1, 5, 32)"),
        ({"query": torch.rand(5, 32)}, "query", "(5, 32)"),
        ({"input_flatten": torch.rand(2, 49, 31)}, "input_flatten", "(2, 49, 31)"),
        ({"input_flatten": torch.rand(49, 32)}, "input_flatten", "(49, 32)"),
        ({"input_spatial_shapes": torch.tensor([[5, 7]])}, "input_spatial_shapes", "1"),
        ({"input_spatial_shapes": [(5, 7)] * 4}, "input_spatial_shapes", "4"),
        (
            {"input_padding_mask": torch.zeros(2, 48, dtype=torch.bool)},
            "input_padding_mask",
            "(2, 48)",
        ),
        (
            {"input_padding_mask": torch.zeros(2, 49, 1, dtype=torch.bool)},
            "input_padding_mask",
            "(2, 49, 1)",
        ),
        ({"input_padding_mask": torch.zeros(2, 49)}, "input_padding_mask", "float32"),
    ],
)
def test_bad_arguments(change: dict[str, object], argument: str, says: str) -> None:
    module = MSDeformAttn(32, 3, 4, 2)
    names = (
        "query",
        "reference_points",
        "input_flatten",
        "input_spatial_shapes",
        "input_level_start_index",
    )
    good = dict(zip(names, module_arguments(module)))
    assert module(**good).shape == (2, 5, 32)
    with pytest.raises(ValueError, match=f"^{argument}: expected") as caught:
        module(**(good | change))
    assert says in str(caught.value)


def test_mmcv_is_the_official_module_with_a_residual() -> None:
    official = lively(FAMILY["official"].make())
    call = FAMILY["official"].arguments()
    query, value = call["query"], call["input_flatten"]
    shapes, starts = call["input_spatial_shapes"], call["input_level_start_index"]
    position, identity = torch.randn_like(query), torch.randn_like(query)
    mask = torch.rand(value.shape[:2]) < 0.3
    rest = (call["reference_points"], value, shapes, starts, mask)
    levels = {"spatial_shapes": shapes, "level_start_index": starts}
    common = levels | {
        "reference_points": call["reference_points"],
        "key_padding_mask": mask,
        "attn_mask": None,  # mmcv's layers pass more than it takes
    }
    for batch_first in (True, False):
        module = MultiScaleDeformableAttention(32, 4, 3, 2, dropout=0, batch_first=batch_first)
        module.load_state_dict(official.state_dict())

        def called(batch_first: bool = batch_first, module: nn.Module = module, **given: Tensor):
            if batch_first:
                return module(**given, **common)
            given = {name: tensor.transpose(0, 1) for name, tensor in given.items()}
            return module(**given, **common).transpose(0, 1)

        plain = official(query, *rest)
        torch.testing.assert_close(called(query=query, value=value), plain + query)
        moved = official(query + position, *rest)
        torch.testing.assert_close(
            called(query=query, value=value, query_pos=position), moved + query
        )
        torch.testing.assert_close(
            called(query=query, key=value * torch.nan, value=value, identity=identity),
            plain + identity,
        )
        with pytest.warns(DeprecationWarning, match="identity"):
            named = called(query=query, value=value, residual=identity)
        torch.testing.assert_close(named, plain + identity)
        # an encoder: the rows are the queries, and value is the query without its position
        reference = torch.rand(*value.shape[:2], 3, 2)
        own = official(value * 2, reference, value, shapes, starts, mask)
        common["reference_points"] = reference
        torch.testing.assert_close(called(query=value, query_pos=value), own + value)
        common["reference_points"] = call["reference_points"]


def test_mmcv_drops_the_output_alone() -> None:
    module = lively(MultiScaleDeformableAttention(32, 4, 3, 2, dropout=1.0))
    call = FAMILY["mmcv"].arguments()
    assert torch.equal(module(**call), call["query"])
    assert not torch.equal(module.eval()(**call), call["query"])


def test_mmcv_draws_weights_again() -> None:
    module = lively(FAMILY["mmcv"].make())
    module.init_weights()
    assert (module.attention_weights.weight == 0).all()


@all_backends
def test_dfine_reads_memory_as_it_lies(runner: Runner) -> None:
    """The official form of value, level by level and head by head, is that of one memory."""
    module = lively(FAMILY["dfine"].make()).to(runner.device)
    call = FAMILY["dfine"].arguments(device=runner.device)
    memory = torch.cat([level.permute(0, 3, 1, 2) for level in call["value"]], 1).flatten(2)
    with deform_attn.use_backend(str(runner.backend)):
        assert torch.equal(module(**call), module(**(call | {"value": memory})))


@all_backends
def test_a_value_mask_keeps_what_is_true(runner: Runner) -> None:
    module = lively(FAMILY["rtdetrv2"].make()).to(runner.device)
    call = FAMILY["rtdetrv2"].arguments(device=runner.device)
    keep = torch.rand(call["value"].shape[:2], device=runner.device) < 0.6
    with deform_attn.use_backend(str(runner.backend)):
        one = module(**call, value_mask=keep)
        spoiled = call | {"value": call["value"].masked_fill(~keep[..., None], 1000.0)}
        assert torch.equal(module(**spoiled, value_mask=keep), one)
        assert not torch.allclose(module(**call), one)


def test_discrete_module_learns_no_offsets() -> None:
    module = lively(FAMILY["discrete"].make())
    call = FAMILY["discrete"].arguments()
    for tensor in tensors_of(call).values():
        tensor.requires_grad_()
    module(**call).sum().backward()
    trained = {name for name, p in module.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in module.named_parameters()} - {
        *("sampling_offsets.weight", "sampling_offsets.bias")
    }
    assert call["reference_points"].grad is None
    assert call["value"].grad is not None


@pytest.mark.parametrize("name", FAMILY)
def test_second_derivatives(name: str) -> None:
    """By finite differences, of the inputs and all parameters that are trained."""
    module = lively(FAMILY[name].make()).double()
    call = FAMILY[name].arguments(batch=1, queries=2, dtype=torch.float64)
    tensors = tensors_of(call) | {n: p for n, p in module.named_parameters() if p.requires_grad}
    names = list(tensors)

    def function(*leaves: Tensor) -> Tensor:
        given = dict(zip(names, leaves))
        inputs = {n: t for n, t in given.items() if n in tensors_of(call)}
        parameters = {n: t for n, t in given.items() if n not in inputs}
        return torch.func.functional_call(module, parameters, kwargs=with_tensors(call, inputs))

    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors.values()]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


# --------------------------------------------------------------------------------- bad use

SHAPE_NAMES = {"official": "input_spatial_shapes", "mmcv": "spatial_shapes"}
VALUE_NAMES = {"official": "input_flatten"}
MASK_NAMES = {"official": "input_padding_mask", "mmcv": "key_padding_mask"}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(
    ("argument", "change", "says"),
    [
        ("reference_points", lambda t: t[..., :1].expand(-1, -1, -1, 3), "3)"),
        ("reference_points", lambda t: t[:, :4], "(2, 4, "),
        ("reference_points", lambda t: t.to("meta"), "meta"),
        ("reference_points", lambda t: torch.cat([t, t, t, t], 2), "(2, 5, "),
        ("query", lambda t: t[..., :31], "31)"),
        ("query", lambda t: t.to("meta"), "meta"),
        ("query", lambda t: t.double(), "torch.float64"),
        ("query", lambda t: t.long(), "torch.int64"),
        ("query", lambda t: t.to_sparse(), "sparse"),
    ],
    ids=[
        "width",
        "queries",
        "device",
        "levels",
        "channels",
        "query_device",
        "query_dtype",
        "query_integers",
        "query_sparse",
    ],
)
def test_bad_tensors_are_named(
    name: str, argument: str, change: Callable[[Tensor], Tensor], says: str
) -> None:
    module, call = FAMILY[name].make(), FAMILY[name].arguments()
    assert module(**call).shape == call["query"].shape
    with pytest.raises(ValueError, match=f"^{argument}: expected") as caught:
        module(**(call | {argument: change(call[argument])}))
    assert says in str(caught.value)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("wrong", [3, "x", ["x"], None])
def test_arguments_of_another_type_are_named(name: str, wrong: Any) -> None:
    module, call = FAMILY[name].make(), FAMILY[name].arguments()
    names = [*call, MASK_NAMES.get(name, "value_mask")]
    names += ["query_pos", "identity"] if name == "mmcv" else []
    optional = {"mask", "start", "identity", "query_pos", *(["value"] if name == "mmcv" else [])}
    for argument in names:
        number = argument in ("query_pos", "identity") and wrong == 3  # is added
        if number or (wrong is None and any(part in argument for part in optional)):
            continue
        kinds = ValueError if "shapes" in argument and isinstance(wrong, str | list) else TypeError
        with pytest.raises(kinds, match=f"^(input_)?{argument.removeprefix('input_')}: expected"):
            module(**(call | {argument: wrong}))


@pytest.mark.parametrize("name", FAMILY)
def test_bad_levels_and_values_are_named(name: str) -> None:
    module, call = FAMILY[name].make(), FAMILY[name].arguments()
    shapes, value = (
        SHAPE_NAMES.get(name, "value_spatial_shapes"),
        VALUE_NAMES.get(name, "value"),
    )
    starts = next((key for key in call if key.endswith("start_index")), shapes)
    with pytest.raises(ValueError, match=f"^{shapes}: expected 3 levels.* got 2$"):
        module(**(call | {shapes: call[shapes][:2]}))
    if name != "dfine":  # of which each level is compared with its rows
        rows = call[value].narrow(0 if name == "mmcv" else 1, 0, 48)
        ends = rf"^{starts}: level 2 of 2 x 1 .* ends at row 49, but {value} has 48 rows"
        with pytest.raises(ValueError, match=ends):
            module(**(call | {value: rows}))
    if starts != shapes:
        for wrong, message in (
            (call[starts].float(), "expected an integer dtype"),
            (call[starts][:2], f"expected 3 entries, one for each level of {shapes}, got 2"),
        ):
            with pytest.raises(ValueError, match=f"^{starts}: {message}"):
                module(**(call | {starts: wrong}))
    bad = call[value]
    bad = (bad[0][:, :, :7], *bad[1:]) if name == "dfine" else bad[..., :31]
    with pytest.raises(ValueError, match=f"^{value}: expected"):
        module(**(call | {value: bad}))


def test_levels_of_other_sizes_are_named() -> None:
    """As many rows together, so that nothing else would tell."""
    module, call = FAMILY["dfine"].make(), FAMILY["dfine"].arguments()
    rows = torch.cat(call["value"], -1)
    with pytest.raises(ValueError, match=r"^value: expected .* level 1 .*is 12.*, got .* 7\)"):
        module(**(call | {"value": rows.split([35, 7, 7], -1)}))


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "dfine"])
def test_bad_masks_are_named(name: str) -> None:
    """Floats, another shape or device, and the polarity under which no pixel is left."""
    module, call = FAMILY[name].make(), FAMILY[name].arguments()
    mask_name = MASK_NAMES.get(name, "value_mask")
    keeps = mask_name == "value_mask"
    nothing = torch.full((2, 49), keeps)
    assert torch.equal(module(**call, **{mask_name: nothing}), module(**call))
    for bad, says in (
        (nothing.float(), "float32"),
        (nothing[:, :48], r"\(2, 48\)"),
        (nothing.to("meta"), "meta"),
        (~nothing, "opposite meaning"),
    ):
        with pytest.raises(ValueError, match=f"^{mask_name}: expected .*{says}"):
            module(**call, **{mask_name: bad})
    one_image = nothing.clone()
    one_image[1] = ~nothing[1]
    module(**call, **{mask_name: one_image})  # an image that fills a batch up is lawful


def test_mmcv_names_what_is_missing_and_says_what_is_first() -> None:
    module, call = FAMILY["mmcv"].make(), FAMILY["mmcv"].arguments()
    for name in ("reference_points", "spatial_shapes"):
        with pytest.raises(TypeError, match=f"^{name}: expected a tensor, got None"):
            module(**{key: given for key, given in call.items() if key != name})
    misspelt = "key_padding_masks: unknown argument, expected key_padding_mask"
    with pytest.raises(TypeError, match=f"^{misspelt}$"):
        module(**call, key_padding_masks=torch.zeros(2, 49, dtype=torch.bool))
    of_mmcv = {"key_pos": None, "query_key_padding_mask": None, "attn_masks": None}
    of_mmcv["reference_points_2d"] = None  # the name of one that is given is not misspelt
    assert torch.equal(module(**call, **of_mmcv), module(**call))
    batch_first = {key: call[key].transpose(0, 1) for key in ("query", "value")}
    with pytest.raises(ValueError, match="^query: .*batch_first is False"):
        module(**(call | batch_first))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: MSDeformAttn(0, 4, 8, 4), "d_model"),
        (lambda: MSDeformAttn(256, 0, 8, 4), "n_levels"),
        (lambda: MSDeformAttn(256, 4, 0, 4), "n_heads"),
        (lambda: MSDeformAttn(256, 4, 8, 0), "n_points"),
        (lambda: MSDeformAttn(256, 4, 7, 4), "d_model"),
        (lambda: MultiScaleDeformableAttention(embed_dim=30), "embed_dims"),
        (lambda: MultiScaleDeformableAttention(num_points=0), "num_points"),
        (
            lambda: MultiScaleDeformableAttention(value_proj_ratio=0.3),
            r"embed_dims \* value_proj_ratio",
        ),
        (lambda: MSDeformableAttention(30), "embed_dim"),
        (lambda: MSDeformableAttention(num_levels=0), "num_levels"),
        (lambda: MSDeformableAttention(num_points=0), "num_points"),
        (lambda: MSDeformableAttention(num_points=[4, 4]), "num_points"),
        (lambda: MSDeformableAttention(num_points=[4, 4, 4, -1]), "num_points"),
        (lambda: MSDeformableAttention(method="nearest"), "method"),
        (lambda: MSDeformableAttention(variant="deim"), "variant"),
    ],
)
def test_bad_sizes(make: Callable[[], nn.Module], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        make()


@pytest.mark.parametrize("wrong", ["4", 4.0, True, None, [4.0], torch.tensor(4)], ids=repr)
@pytest.mark.parametrize(
    "make", [MSDeformAttn, MultiScaleDeformableAttention, MSDeformableAttention]
)
def test_sizes_of_another_type_are_named(make: type[nn.Module], wrong: Any) -> None:
    for name, parameter in inspect.signature(make).parameters.items():
        if type(parameter.default) is int and "2col" not in name:
            with pytest.raises(
                TypeError, match=rf"^{name}: expected .*, got {re.escape(repr(wrong))}$"
            ):
                make(**{name: wrong})


@pytest.mark.parametrize("kind", [np.int64, np.int8])
@pytest.mark.filterwarnings("error")
def test_sizes_and_flags_of_numpy(kind: type) -> None:
    """128 offsets are not -128, as they are to an int8."""
    heads, levels, points = kind(8), kind(2), kind(4)
    official = MSDeformAttn(kind(32), levels, heads, points)
    mmcv = MultiScaleDeformableAttention(
        kind(32), heads, levels, points, batch_first=np.True_, embed_dim=kind(32)
    )
    counts = [points, kind(4)]
    listed = MSDeformableAttention(kind(32), heads, levels, counts, official_clamp=np.True_)
    for module in (official, mmcv, listed):
        assert module.sampling_offsets.out_features == 128
    numbers = (*vars(official).values(), *vars(mmcv).values(), *listed.num_points_list)
    assert not any(isinstance(number, np.generic) for number in numbers)
    assert (mmcv.batch_first, listed.official_clamp) == (True, True)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (MultiScaleDeformableAttention, {"dropout": "0.1"}, "dropout: expected a number, got '0"),
        (MultiScaleDeformableAttention, {"dropout": 2}, "dropout: expected a number from 0 to 1"),
        (MultiScaleDeformableAttention, {"batch_first": "no"}, "batch_first: expected True or F"),
        (
            MultiScaleDeformableAttention,
            {"batch_first": np.array([True])},
            r"batch_first: expected True or False, got array\(\[ True\]\)",
        ),
        (
            MultiScaleDeformableAttention,
            {"value_proj_ratio": math.nan},
            "value_proj_ratio: expected a number above 0, got nan",
        ),
        (MultiScaleDeformableAttention, {"embed_dim": "32"}, "embed_dim: expected an integer, got"),
        (
            MultiScaleDeformableAttention,
            {"embed_dims": 64, "embed_dim": 32},
            r"embed_dim: expected embed_dims \(64\), got 32",
        ),
        (MSDeformableAttention, {"offset_scale": "1"}, "offset_scale: expected a number, got '1'"),
        (MSDeformableAttention, {"offset_scale": math.inf}, "offset_scale: expected a finite"),
        (MSDeformableAttention, {"offset_scale": math.nan}, "offset_scale: expected a finite"),
        (MSDeformableAttention, {"official_clamp": 2}, "official_clamp: expected True or False"),
    ],
)
def test_options_of_another_type_are_named(
    make: type[nn.Module], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        make(**options)


@all_backends
def test_learns(runner: Runner) -> None:
    """A few steps of gradient descent towards a shifted map bring the loss down."""
    module = MSDeformAttn(16, 2, 2, 2).to(runner.device)
    query, reference, features, shapes, starts = module_arguments(module, runner.device)
    goal = torch.randn(2, 5, 16, device=runner.device)
    optimizer = torch.optim.Adam(module.parameters(), 0.02)
    losses = []
    with deform_attn.use_backend(str(runner.backend)):
        for _ in range(15):
            loss = ((module(query, reference, features, shapes, starts) - goal) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
