"""ONNX: each form of the operator against the oracle, then whole graphs in onnxruntime."""

from __future__ import annotations

import collections
import io
import resource
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor, nn

import deform_attn
from deform_attn import MSDeformableAttention, MSDeformAttn, ms_deform_attn
from deform_attn.integrations.onnx import FORMS, OPSET, _save, decompose, decompositions, export
from deform_attn.testing import (
    Case,
    Dtypes,
    OpInputs,
    check_results,
    exact_results,
    grad_output_for,
)
from tests.family import FAMILY, lively

LARGEST_DIFFERENCE = 2e-6  # of a layer's float32 outputs, over their largest number
LEVELS = [(5, 7), (3, 4), (2, 1)]
PLUGIN = "MultiscaleDeformableAttnPlugin_TRT"

# The forms as functions ----------------------------------------------------------------------


def plugin(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """TensorRT's plugin as its README and its checks of types and shapes tell it."""
    B, S, M, D = value.shape
    L = shapes.shape[0]
    _, Q, _, _, P, _ = locations.shape
    assert {value.dtype, locations.dtype, weights.dtype} == {torch.float32}
    assert {shapes.dtype, starts.dtype} == {torch.int32}
    assert (shapes.shape, starts.shape) == ((L, 2), (L,))
    assert (locations.shape, weights.shape) == ((B, Q, M, L, P, 2), (B, Q, M, L, P))
    return ms_deform_attn(value, shapes, starts, locations, weights).view(B, Q, M, D)


def symbolic(name: str, inputs: Any, attributes: Any, *, shape: Any, **options: Any) -> Tensor:
    assert name == f"trt.plugins::{PLUGIN}"
    assert attributes == {"plugin_version": "2", "plugin_namespace": ""}
    output = plugin(*inputs)
    assert output.shape == tuple(shape)
    return output


def arguments(inputs: OpInputs, form: str) -> tuple[Any, ...]:
    """Of the operator; "grid_sample" needs level sizes as numbers."""
    shapes, starts, sizes = inputs.spatial_shapes, inputs.level_start_index, None
    if form == "grid_sample" or not isinstance(shapes, Tensor):
        sizes = [int(side) for pair in shapes for side in pair]
        shapes = None
    if starts is not None:
        starts = torch.as_tensor(starts)
        areas = torch.tensor([int(h) * int(w) for h, w in inputs.spatial_shapes])
        if form == "grid_sample" and torch.equal(starts.long(), areas.cumsum(0) - areas):
            starts = None
    numbers = sizes, inputs.num_points
    return (inputs.value, shapes, starts, *inputs.tensors[1:], *numbers, inputs.value_mask)


def samples_something(case: Case) -> bool:
    """No GridSample and no plugin has an empty shape."""
    points = sum(case.points) if isinstance(case.points, tuple) else case.points
    return 0 not in (case.batch, case.queries, points)


@pytest.mark.only(dtypes=["f32", "bf16"], cases=samples_something)
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_the_operator(
    form: str, dtypes: Dtypes, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the rule for kernels: values at knots, off the map, not finite, points by level."""
    monkeypatch.setattr(torch.onnx.ops, "symbolic", symbolic)
    inputs = case.make(dtypes)
    decomposed = decompositions(form)[torch.ops.deform_attn.ms_deform_attn.default]
    given = arguments(inputs, form)
    if form == "grid_sample" and given[2] is not None:
        with pytest.raises(ValueError, match="level_start_index: expected None for form"):
            decomposed(*given)
        return
    output = decomposed(*given)
    assert output.dtype == dtypes.value
    grad_output = grad_output_for(inputs)
    exact = exact_results(inputs, grad_output)
    check_results((output, *exact[1:]), inputs, grad_output, names=("output",))


def test_a_form_that_is_none() -> None:
    with pytest.raises(ValueError, match="form: expected one of grid_sample, gather"):
        decompositions("gridsample")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_package_that_is_missing(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"^{package}: .*: pip install onnx onnxscript"):
        export(torch.nn.Identity().eval(), (torch.zeros(1),))


def test_arguments_of_another_type_are_named() -> None:
    model = torch.nn.Identity().eval()
    for call, message in (
        (lambda: export(None, ()), "model: expected a torch.nn.Module, got NoneType"),
        (lambda: export(model, torch.zeros(1)), "args: expected a tuple of example inputs, got Te"),
        (lambda: decompose(model), "program: expected what torch.export.export makes .*Identity$"),
    ):
        with pytest.raises(TypeError, match=f"^{message}"):
            call()
    with pytest.raises(ValueError, match="^path: expected a path, got ''"):
        export(model, (torch.zeros(1),), "")


def test_a_model_in_training() -> None:
    with pytest.raises(ValueError, match="model: expected one in evaluation mode"):
        export(nn.Linear(2, 2), (torch.rand(1, 2),))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic_axes": {"x": {0: "batch"}}}, "dynamic_axes: .*pass dynamic_shapes"),
        ({"dynamo": False}, r"dynamo: .*call torch\.onnx\.export"),
        ({"f": "model.onnx"}, "f: .*pass path"),
        ({"plugin_version": 2}, "plugin_version: expected '1' or '2', got 2"),
    ],
)
def test_options_that_would_be_ignored(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export(nn.Linear(2, 2).eval(), (torch.rand(1, 2),), verbose=False, **options)


def test_what_is_no_model_and_no_path() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        export(lambda x: x, (torch.rand(1, 2),))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path: expected a path, got 5"):
        export(nn.Linear(2, 2).eval(), (torch.rand(1, 2),), 5)  # type: ignore[arg-type]


def test_an_opset_that_the_exporter_did_not_reach(tmp_path: Path) -> None:
    """It writes another one and only logs this."""
    with pytest.raises(RuntimeError, match="opset_version: expected 99, got a model of 18"):
        export(
            nn.Linear(2, 2).eval(),
            (torch.rand(1, 2),),
            tmp_path / "m.onnx",
            verbose=False,
            opset_version=99,
        )
    assert not list(tmp_path.iterdir())


def test_two_clamps_of_one_tensor() -> None:
    """Their bounds are constants of their own; NaN stays NaN."""

    class Clamps(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x.sin()
            return x.clamp(-0.5, 0.25) + 1, x.clamp(-0.1, 0.5) * 2

    x = torch.tensor([-2.0, -0.2, 0.1, 0.4, 1.5, torch.nan])
    program = export(Clamps().eval(), (x,), verbose=False)
    for one, other in zip(run(program.model_proto, (x,)), Clamps()(x), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_an_invalid_model_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise onnx.checker.ValidationError("not sorted")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(RuntimeError, match=r"not valid ONNX.*optimize=False.*not sorted"):
        export(nn.Linear(2, 2).eval(), (torch.rand(1, 2),), tmp_path / "m.onnx", verbose=False)
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that may not grow fails like a full disk. Weights in a file of their own are moved."""
    file = tmp_path / "m.onnx"
    file.write_bytes(b"old")
    program = export(nn.Linear(64, 64).eval(), (torch.rand(1, 64),), verbose=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"m\.onnx: cannot be written: File too large"):
            _save(program, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.onnx.ONNXProgram, "save", Mock(side_effect=KeyboardInterrupt))
        _save(program, file)
    with pytest.raises(OSError, match=r"no/m\.onnx: cannot be written: No such file"):
        _save(program, tmp_path / "no/m.onnx")
    assert [one.name for one in tmp_path.iterdir()] == ["m.onnx"]
    assert file.read_bytes() == b"old"
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(
        torch.onnx.ONNXProgram, "save", lambda one, path: save(one, path, external_data=True)
    )
    _save(program, file)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    feed = torch.rand(1, 64)
    (found,) = onnxruntime.InferenceSession(str(file)).run(
        None, {program.model_proto.graph.input[0].name: feed.numpy()}
    )
    assert found.shape == (1, 64)


# Graphs --------------------------------------------------------------------------------------


class Plugin(OpRun):
    """The plugin for onnx's own evaluator."""

    op_domain = "trt.plugins"

    def _run(self, *inputs: Any, plugin_version: str, plugin_namespace: str) -> tuple[Any, ...]:
        assert (plugin_version, plugin_namespace) == ("2", "")
        return (plugin(*map(torch.from_numpy, inputs)).numpy(),)


Plugin.__name__ = PLUGIN


def run(model: onnx.ModelProto, feed: tuple[Tensor, ...]) -> list[Tensor]:
    """In onnxruntime; what it has no kernel for, in onnx's evaluator."""
    onnx.checker.check_model(model, full_check=True)
    inputs = {put.name: tensor.numpy() for put, tensor in zip(model.graph.input, feed)}
    if counts(model)[PLUGIN]:
        outputs = ReferenceEvaluator(model, new_ops=[Plugin]).run(None, inputs)
    else:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        outputs = session.run(None, inputs)
    return [torch.from_numpy(np.asarray(output)) for output in outputs]


def counts(model: onnx.ModelProto) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph.node)


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


class Layer(nn.Module):
    """A layer between its neighbours: maps that the graph cannot know before it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MSDeformAttn(32, len(LEVELS), 4, 2)
        nn.init.normal_(self.attention.sampling_offsets.weight, std=0.3)
        nn.init.normal_(self.attention.attention_weights.weight, std=0.3)

    def forward(self, query: Tensor, reference_points: Tensor, features: Tensor) -> Tensor:
        output: Tensor = self.attention(query, reference_points, features, LEVELS)
        return output


def layer_inputs(batch: int, queries: int) -> tuple[Tensor, ...]:
    rows = sum(h * w for h, w in LEVELS)
    return (
        torch.randn(batch, queries, 32),
        torch.rand(batch, queries, len(LEVELS), 2),
        torch.randn(batch, rows, 32),
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_with_dynamic_batch_and_queries(form: str, tmp_path: Path) -> None:
    layer = Layer().eval()
    batch, queries = torch.export.Dim("batch", max=64), torch.export.Dim("queries", max=1000)
    program = export(
        layer,
        layer_inputs(2, 5),
        tmp_path / "layer.onnx",
        form=form,
        dynamic_shapes=({0: batch, 1: queries}, {0: batch, 1: queries}, {0: batch}),
        verbose=False,
    )
    model = onnx.load(tmp_path / "layer.onnx")
    assert model.SerializeToString() == program.model_proto.SerializeToString()
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    assert opsets[""] == OPSET
    found = counts(model)
    assert found["GridSample"] == (len(LEVELS) if form == "grid_sample" else 0)
    assert found[PLUGIN] == (form == "tensorrt")
    if form == "tensorrt":
        assert opsets["trt.plugins"] == 1
        (node,) = (node for node in model.graph.node if node.op_type == PLUGIN)
        assert node.domain == "trt.plugins"
        assert (len(node.input), len(node.output)) == (5, 1)
    with torch.no_grad():
        for inputs in (layer_inputs(2, 5), layer_inputs(1, 1), layer_inputs(3, 9)):
            (output,) = run(model, inputs)
            assert difference(output, layer(*inputs)) <= LARGEST_DIFFERENCE


def test_the_plugin_in_an_older_opset() -> None:
    layer, inputs = Layer().eval(), layer_inputs(2, 5)
    model = export(layer, inputs, form="tensorrt", verbose=False, opset_version=17).model_proto
    assert [entry.version for entry in model.opset_import if not entry.domain] == [17]
    with torch.no_grad():
        assert difference(run(model, inputs)[0], layer(*inputs)) <= LARGEST_DIFFERENCE


def test_level_sizes_in_a_tensor(tmp_path: Path) -> None:
    """An input of the graph for "gather"; "grid_sample" says what to do."""

    class Levels(nn.Module):
        def forward(
            self, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
        ) -> Tensor:
            return ms_deform_attn(value, shapes, None, locations, weights, num_points=[3, 6, 3])

    shapes = torch.tensor(LEVELS)
    rows = int(shapes.prod(-1).sum())
    weights = torch.rand(2, 5, 4, 12).softmax(-1)
    inputs = (torch.randn(2, rows, 4, 8), shapes, torch.rand(2, 5, 4, 12, 2), weights)
    with pytest.raises(ValueError, match=r"spatial_shapes: expected a list of \(height, width\)"):
        export(Levels().eval(), inputs, form="grid_sample", verbose=False)
    model = export(Levels().eval(), inputs, form="gather", verbose=False).model_proto
    for sizes in (shapes, shapes.flip(-1)):
        changed = (inputs[0], sizes, *inputs[2:])
        (output,) = run(model, changed)
        assert difference(output, Levels()(*changed)) <= LARGEST_DIFFERENCE


# A whole RT-DETR: two decoder layers behind an encoder and the choice of queries. What differs is
# the rounding of all its layers.
@pytest.mark.parametrize("form", ["grid_sample", "gather"])
def test_rt_detr_of_transformers(form: str) -> None:
    pytest.importorskip("transformers")
    from deform_attn.integrations.transformers import accelerate
    from tests.transformers_models import SMALL, build, inputs_of

    class Detector(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            output = self.model(pixel_values=pixels)
            return output.logits, output.pred_boxes

    small = SMALL["rt_detr"]
    stock = build(small, torch.float32)
    pixels = inputs_of(small, torch.float32)["pixel_values"]
    with torch.no_grad():
        expected = Detector(stock)(pixels)
    detector = Detector(accelerate(stock)[0]).eval()
    model = export(detector, (pixels,), form=form, verbose=False).model_proto
    assert counts(model)["GridSample"] == (6 if form == "grid_sample" else 0)
    for output, other in zip(run(model, (pixels,)), expected, strict=True):
        assert difference(output, other) <= 5e-5


def test_what_is_exported_already() -> None:
    """A program, of any backend."""
    layer, inputs = Layer().eval(), layer_inputs(2, 5)
    program = torch.export.export(layer, inputs)
    with pytest.raises(ValueError, match="dynamic_shapes: an exported program has its own"):
        export(program, inputs, dynamic_shapes=({}, {}, {}))
    with deform_attn.use_backend("reference"):
        program = torch.export.export(layer, inputs)
    model = export(program, inputs, form="gather", verbose=False).model_proto
    with torch.no_grad():
        assert difference(run(model, inputs)[0], layer(*inputs)) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("name", ["mmcv", "rtdetrv2", "dfine"])
def test_gathers_have_at_most_five_dimensions(name: str) -> None:
    """Core ML takes no more."""
    module, call = lively(FAMILY[name].make()).eval(), FAMILY[name].arguments()
    program = decompose(torch.export.export(module, (), call))
    values = [node.meta.get("val") for node in program.graph.nodes]
    assert max(value.dim() for value in values if isinstance(value, Tensor)) <= 5
    assert not [node for node in program.graph.nodes if "deform_attn" in str(node.target)]
    torch.testing.assert_close(program.module()(**call), module(**call), rtol=1e-5, atol=1e-5)


def test_decompose_has_no_nodes_of_plugins() -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.rand(1, 2),))
    with pytest.raises(ValueError, match="form: expected gather or grid_sample, got 'tensorrt'"):
        decompose(program, "tensorrt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["default", "discrete"])
def test_the_exporter_that_traces(method: str) -> None:
    """``dynamo=False``: standard nodes, which take the sizes of the inputs."""

    class FromMaps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = lively(MSDeformableAttention(32, 4, 2, [3, 2], method))

        def forward(self, query: Tensor, boxes: Tensor, high: Tensor, low: Tensor) -> Tensor:
            rows = torch.cat([high.flatten(2), low.flatten(2)], 2).transpose(1, 2)
            return self.attention(query, boxes, rows, [high.shape[-2:], low.shape[-2:]])

    def inputs(batch: int, queries: int, *sizes: tuple[int, int]) -> tuple[Tensor, ...]:
        maps = [torch.randn(batch, 32, *size) for size in sizes]
        return (torch.randn(batch, queries, 32), torch.rand(batch, queries, 1, 4), *maps)

    layer, names = FromMaps().eval(), ["query", "boxes", "high", "low"]
    sides: dict[str, dict[int, str]] = {name: {0: "batch"} for name in names}
    for name in names[:2]:
        sides[name][1] = "queries"
    for name in names[2:]:
        sides[name] |= {2: name + "_height", 3: name + "_width"}
    file = io.BytesIO()
    torch.onnx.export(
        layer,
        inputs(2, 5, (8, 6), (4, 3)),
        file,
        dynamo=False,
        opset_version=12,
        input_names=names,
        dynamic_axes=sides,
    )
    model = onnx.load_from_string(file.getvalue())
    assert counts(model)["Gather"] > 0
    other = inputs(3, 7, (5, 9), (2, 4))
    (output,) = run(model, other)
    assert difference(output, layer(*other)) <= LARGEST_DIFFERENCE
