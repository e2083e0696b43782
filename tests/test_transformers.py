"""Accelerated models of transformers: outputs, gradients, torch.compile, restore, pickling."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pickle
import sys
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import nn

import deform_attn
from deform_attn.integrations import adapters
from deform_attn.integrations import transformers as integration
from deform_attn.integrations.transformers import (
    MODEL_TYPES,
    accelerate,
    patch_transformers,
    register_kernels,
    restore,
)
from tests.transformers_matrix import (
    LIMIT,
    OneGraph,
    compare,
    difference,
    kernelized,
)
from tests.transformers_models import (
    SMALL,
    Small,
    build,
    default_dtype,
    inputs_of,
    tensors_of,
    without_labels,
)


def installed(small: Small) -> Any:
    """A parameter of a test; skipped with a reason where this transformers lacks the model."""
    reason = f"transformers {transformers.__version__} has no {small.model_type}"
    absent = not hasattr(transformers.models, small.model_type)
    return pytest.param(small, id=small.name, marks=[pytest.mark.skip(reason)] if absent else [])


EVERY_MODEL = [installed(small) for small in SMALL.values()]
# One of each kind: a module, a function of the module, an attribute.
KINDS = [SMALL[name] for name in ("rt_detr", "rt_detr_v2", "d_fine")]


def name_of(small: Small) -> str:
    return small.name


def logits_of(model: nn.Module, small: Small) -> torch.Tensor:
    with torch.no_grad(), default_dtype(torch.float64):
        output = model(**without_labels(inputs_of(small)))
    return torch.cat([tensor.flatten() for tensor in tensors_of(output)])


# Outputs and gradients -----------------------------------------------------------------------


def test_every_model_type_has_a_test_model() -> None:
    assert {small.model_type for small in SMALL.values()} == set(MODEL_TYPES)


@pytest.mark.parametrize("small", EVERY_MODEL)
def test_outputs_loss_and_every_gradient(small: Small) -> None:
    values, gradients, report = compare(small, torch.float64)
    assert values <= LIMIT
    assert gradients <= LIMIT
    assert len(report.replaced) >= 2
    assert not report.left


@pytest.mark.parametrize("small", [p for p in EVERY_MODEL if "discrete" not in p.id])
def test_a_wrong_operator_is_detected(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the attention weights in the wrong order, outputs and gradients differ."""
    accelerate(build(small))  # the probe comes before the fault
    right = adapters.ms_deform_attn

    def wrong(*inputs: Any, **options: Any) -> torch.Tensor:
        return right(*inputs[:-1], inputs[-1].flip(-1), **options)

    monkeypatch.setattr(adapters, "ms_deform_attn", wrong)
    values, gradients, _ = compare(small, torch.float64)
    assert values > 1e-3
    assert gradients > 1e-1


# Compiling a whole model takes up to 40 s: transformers_matrix.py does it, here it is one layer.
@pytest.mark.parametrize("name", ["rt_detr", "rt_detr_v2", "d_fine", "mask2former"])
def test_one_graph(name: str) -> None:
    """torch.compile(fullgraph=True) of an attention layer: forward, backward, one operator each."""
    small = SMALL[name]
    stock = build(small)
    model, report = accelerate(copy.deepcopy(stock))
    place = report.replaced[0][0].removesuffix(".attn")  # the layer that holds the module `attn`
    layer = model.get_submodule(place)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    layer.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    logits_of(model, small)
    layer._forward_pre_hooks.clear()
    arguments, named = calls[0]
    try:  # torch 2.10 cannot compile some of these layers
        OneGraph(stock.get_submodule(place), "eager").call(*arguments, **named)
    except torch._dynamo.exc.InternalTorchDynamoError as error:
        reason = str(error).splitlines()[0]
        pytest.skip(f"this torch does not compile the layer as shipped: {reason}")
    outputs, gradients = [], []
    graph = OneGraph(layer, "aot_eager")
    with default_dtype(torch.float64):
        for call in (layer, graph.call):
            outputs.append(tensors_of(call(*arguments, **named))[0])
            layer.zero_grad()
            outputs[-1].sum().backward()
            gradients.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    assert (graph.count("ms_deform_attn"), graph.count("ms_deform_attn_backward")) == (1, 1)
    assert difference(*outputs) <= LIMIT
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert max(difference(a, b) for a, b in zip(*gradients)) <= LIMIT


@pytest.mark.parametrize("name", ["lw_detr", "d_fine"])
def test_autocast(name: str) -> None:
    """The operator gets values and weights in bfloat16 and its result is close to the model's."""
    small = SMALL[name]
    model, inputs = build(small, torch.float32), inputs_of(small, torch.float32)
    accelerated, _ = accelerate(copy.deepcopy(model))
    seen: list[tuple[torch.dtype, ...]] = []

    def spy(*inputs: Any, **options: Any) -> torch.Tensor:
        seen.append((inputs[0].dtype, inputs[4].dtype))
        return deform_attn.ms_deform_attn(*inputs, **options)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with mock.patch.object(adapters, "ms_deform_attn", spy):
            found = accelerated(**without_labels(inputs))
        expected = model(**without_labels(inputs))
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    # rounding may make a layer choose another query, so only the median is compared
    assert (found.logits - expected.logits).abs().median() <= 0.05 * expected.logits.std()


# The accelerated model -----------------------------------------------------------------------


@pytest.mark.parametrize("small", KINDS, ids=name_of)
def test_restore_undoes_everything(small: Small) -> None:
    model = build(small)
    before = [(name, type(module)) for name, module in model.named_modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    expected = logits_of(model, small)
    same, report = accelerate(model)
    assert same is model
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before]
    assert isinstance(model, type(build(small)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert restore(model) is model
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert [set(vars(module)) for module in model.modules()] == attributes
    with mock.patch.object(adapters, "ms_deform_attn", None):  # not called
        assert torch.equal(logits_of(model, small), expected)
    assert len(accelerate(model)[1].replaced) == len(report.replaced)


@pytest.mark.parametrize("small", KINDS, ids=name_of)
def test_copies_and_pickles_stay_accelerated(small: Small) -> None:
    model, report = accelerate(build(small))
    expected = logits_of(model, small)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with counted() as calls:
            assert torch.equal(logits_of(copied, small), expected)
        assert len(calls) == len(report.replaced)
        again = accelerate(copied)[1]
        assert not again.replaced
        assert {reason for _, reason in again.left} == {"accelerated already"}
        with counted() as calls:
            logits_of(restore(copied), small)
        assert not calls


class counted:  # noqa: N801
    """Counts the calls of this package's operator inside a `with` block."""

    def __enter__(self) -> list[Any]:
        calls: list[Any] = []

        def spy(*inputs: Any, **options: Any) -> torch.Tensor:
            calls.append(inputs)
            return deform_attn.ms_deform_attn(*inputs, **options)

        self.patch = mock.patch.object(adapters, "ms_deform_attn", spy)
        self.patch.__enter__()
        return calls

    def __exit__(self, *error: Any) -> None:
        self.patch.__exit__(*error)


def test_attentions_are_still_recorded() -> None:
    """transformers records attention weights by the class of the layers."""
    for name in ("deformable_detr", "rt_detr_v2"):
        small = SMALL[name]
        model, inputs = build(small), without_labels(inputs_of(small))
        with torch.no_grad(), default_dtype(torch.float64):
            expected = model(**inputs, output_attentions=True)
            found = accelerate(model)[0](**inputs, output_attentions=True)
        for field in ("cross_attentions", "encoder_attentions"):
            one, other = (tensors_of(output.get(field)) for output in (found, expected))
            assert len(one) == len(other)
            for a, b in zip(one, other):
                torch.testing.assert_close(a, b)
        assert tensors_of(expected.cross_attentions)


def test_the_report_names_each_replacement() -> None:
    _, report = accelerate(build(SMALL["rt_detr"]))
    assert str(report).splitlines() == [
        "RTDetrForObjectDetection: 2 replaced, 0 left",
        "  replaced model.decoder.layers.0.encoder_attn.attn: MultiScaleDeformableAttention",
        "  replaced model.decoder.layers.1.encoder_attn.attn: MultiScaleDeformableAttention",
    ]


def test_no_deformable_attention() -> None:
    model, report = accelerate(nn.Sequential(nn.Linear(2, 2)))
    assert isinstance(model, nn.Sequential)
    assert (report.replaced, report.left) == ((), ())
    assert str(report) == "Sequential: no deformable attention found"
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        accelerate({})  # type: ignore[type-var]


class Unknown(nn.Module):
    """Deformable attention with an unknown operator."""

    def __init__(self) -> None:
        super().__init__()
        self.sampling_offsets = nn.Linear(8, 8)
        self.attention_weights = nn.Linear(8, 4)


def other_core(value: torch.Tensor) -> torch.Tensor:
    return value


def renamed(value: Any, shapes: Any, *rest: Any) -> Any:
    raise AssertionError("never called")


renamed.__name__ = "multi_scale_deformable_attention_v2"


def test_unknown_operators_are_reported() -> None:
    model = nn.ModuleDict(
        {
            "unknown": Unknown(),
            "ours": deform_attn.MSDeformAttn(32, 2, 4, 2),
            "other": Unknown(),
            "changed": Unknown(),
        }
    )
    model["other"].ms_deformable_attn_core = other_core
    model["changed"].ms_deformable_attn_core = renamed
    _, report = accelerate(model)
    assert not report.replaced
    reasons = dict(report.left)
    assert reasons.keys() == {"unknown", "ours", "other", "changed"}
    assert reasons["unknown"].endswith("Unknown calls no known operator")
    assert reasons["ours"] == "deform_attn's own module"
    assert reasons["other"] == "its ms_deformable_attn_core is other_core, which is not known"
    assert (
        "multi_scale_deformable_attention_v2 takes (value, shapes, rest), expected (value, value_s"
        in reasons["changed"]
    )
    assert model["other"].ms_deformable_attn_core is other_core


def test_a_changed_forward_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(SMALL["rt_detr"])
    first, second = (
        module for name, module in model.named_modules() if name.endswith("encoder_attn.attn")
    )
    first.forward = lambda *inputs: inputs[0]
    _, report = accelerate(model)
    assert len(report.replaced) == 1
    assert [reason for _, reason in report.left] == [
        "the forward of this instance was replaced, by `kernels` or a hook"
    ]
    model = restore(model)

    def shorter(self: Any, value: Any, value_spatial_shapes: Any) -> None:
        raise AssertionError("never called")

    monkeypatch.setattr(type(second), "forward", shorter)
    _, report = accelerate(model)
    assert not report.replaced
    assert "takes (self, value, value_spatial_shapes), expected" in report.left[1][1]


# patch_transformers --------------------------------------------------------------------------


def test_patch_applies_to_old_and_new_models() -> None:
    models = [(small, build(small)) for small in KINDS]
    expected = {small.name: logits_of(model, small) for small, model in models}
    with patch_transformers() as report:
        models += [(small, build(small)) for small in KINDS]
        for small, model in models:
            with counted() as calls:
                found = logits_of(model, small)
            assert len(calls) == 2
            torch.testing.assert_close(found, expected[small.name], rtol=1e-9, atol=1e-9)
    for small, model in models:
        with counted() as calls:
            found = logits_of(model, small)
        assert not calls
        torch.testing.assert_close(found, expected[small.name], rtol=1e-9, atol=1e-9)
    paths = [path for path, _ in report.replaced]
    for model_type in MODEL_TYPES:
        if hasattr(transformers.models, model_type):
            assert any(f".{model_type}." in path for path in paths), model_type
    assert all("not in transformers" in reason for _, reason in report.left)


@pytest.mark.parametrize("small", KINDS, ids=name_of)
def test_a_model_accelerated_in_the_block_stays_so(small: Small) -> None:
    model = build(small)
    expected = logits_of(model, small)
    with patch_transformers():
        report = accelerate(model)[1]
        assert len(report.replaced) == 2
        assert not report.left
    with counted() as calls:
        found = logits_of(model, small)
    assert len(calls) == 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with counted() as calls:
        assert torch.equal(logits_of(restore(model), small), expected)
    assert not calls


def test_patch_is_undone_after_an_error() -> None:
    from transformers.models.d_fine import modeling_d_fine as d_fine
    from transformers.models.mask2former import modeling_mask2former as mask2former
    from transformers.models.rt_detr import modeling_rt_detr as rt_detr

    def now() -> list[Any]:
        return [
            vars(d_fine.DFineMultiscaleDeformableAttention).get("ms_deformable_attn_core"),
            vars(mask2former)["multi_scale_deformable_attention"],
            vars(rt_detr.MultiScaleDeformableAttention)["forward"],
        ]

    before = now()
    with pytest.raises(KeyError, match="inside"), patch_transformers():
        assert all(one is not other for one, other in zip(now(), before))
        raise KeyError("inside")
    assert now() == before


# kernels -------------------------------------------------------------------------------------


def test_register_kernels_or_a_clear_reason() -> None:
    """It works with the version of `kernels` that transformers accepts, else says why not."""
    from transformers.utils.import_utils import is_kernels_available

    if is_kernels_available():
        assert max(kernelized(SMALL["rt_detr"])) <= LIMIT
        return
    installed = importlib.util.find_spec("kernels") is not None
    reason = "register_kernels: .*needs kernels >= .*accelerate"
    if not installed:
        reason = "kernels: .* to be installed: pip install kernels"
    with pytest.raises(ImportError, match=reason):
        register_kernels()


def test_the_layer_meets_the_rules_of_kernels() -> None:
    """`kernels` refuses a layer with a constructor, other members or another signature."""
    from transformers.models.rt_detr.modeling_rt_detr import MultiScaleDeformableAttention

    layer = integration.MultiScaleDeformableAttention
    assert "__init__" not in vars(layer)
    public = {name for name in vars(layer) if not name.startswith("_")}
    assert public == {"forward", "has_backward", "can_torch_compile"}
    ours, theirs = (inspect.signature(c.forward) for c in (layer, MultiScaleDeformableAttention))
    assert [(p.name, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.kind) for p in theirs.parameters.values()
    ]


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate works; the other functions raise an ImportError."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert not accelerate(nn.Linear(2, 2))[1].replaced
    with pytest.raises(ImportError, match="transformers"), patch_transformers():
        pass
