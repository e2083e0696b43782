"""The modules: the peers' names, initial weights, state dicts, masks and recorded numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runners import Runner, package
from test_torch_integration import module_arguments
from torch import Tensor, nn

import deform_attn
from deform_attn import MSDeformableAttention, MSDeformAttn

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


def test_state_dict() -> None:
    module = MSDeformAttn(64, 3, 8, 5)
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == {
        "sampling_offsets.weight": (8 * 3 * 5 * 2, 64),
        "sampling_offsets.bias": (8 * 3 * 5 * 2,),
        "attention_weights.weight": (8 * 3 * 5, 64),
        "attention_weights.bias": (8 * 3 * 5,),
        "value_proj.weight": (64, 64),
        "value_proj.bias": (64,),
        "output_proj.weight": (64, 64),
        "output_proj.bias": (64,),
    }
    default = MSDeformAttn()
    assert (default.d_model, default.n_levels, default.n_heads, default.n_points) == (256, 4, 8, 4)


@pytest.mark.parametrize(("heads", "levels", "points"), [(8, 4, 4), (4, 1, 3), (6, 2, 1)])
def test_initial_weights(heads: int, levels: int, points: int) -> None:
    """Offsets: head m looks in direction 2 pi m / M on the unit square, point k goes k + 1 far."""
    module = MSDeformAttn(12 * heads, levels, heads, points)
    bias = module.sampling_offsets.bias.view(heads, levels, points, 2)
    for m in range(heads):
        x, y = math.cos(2 * math.pi * m / heads), math.sin(2 * math.pi * m / heads)
        longest = max(abs(x), abs(y))
        for k in range(points):
            expected = torch.tensor([x, y]) / longest * (k + 1)
            for level in range(levels):
                torch.testing.assert_close(bias[m, level, k], expected, rtol=0, atol=2e-6 * points)
    for name in ("sampling_offsets.weight", "attention_weights.weight", "attention_weights.bias"):
        assert (module.get_parameter(name) == 0).all()
    for projection in (module.value_proj, module.output_proj):
        assert (projection.bias == 0).all()
        bound = math.sqrt(6 / (2 * module.d_model))  # Xavier, uniform
        assert projection.weight.abs().max() <= bound
        assert projection.weight.abs().max() > 0.95 * bound
        assert projection.weight.mean().abs() < 0.05 * bound
    assert not torch.equal(module.value_proj.weight, module.output_proj.weight)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_initial_weights_follow_the_seed() -> None:
    torch.manual_seed(5)
    one = MSDeformAttn(32, 2, 4, 2).state_dict()
    torch.manual_seed(5)
    other = MSDeformAttn(32, 2, 4, 2).state_dict()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name])


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


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 4, 8, 4), "d_model"),
        ((256, 0, 8, 4), "n_levels"),
        ((256, 4, 0, 4), "n_heads"),
        ((256, 4, 8, 0), "n_points"),
        ((256, 4, 7, 4), "d_model"),
    ],
)
def test_bad_sizes(arguments: tuple[int, int, int, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        MSDeformAttn(*arguments)


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
