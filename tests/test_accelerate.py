"""accelerate() on layers with other libraries' signatures (client_layers.py)."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import deform_attn
from benchmarks.clients.__main__ import fails
from benchmarks.clients.exports import difference
from deform_attn.integrations import adapters
from tests import client_layers as clients

CLIENTS = {
    clients.GroundingDINO: "multi_scale_deformable_attn_pytorch",
    clients.MMCV: "multi_scale_deformable_attn_pytorch",
    clients.Derived: "multi_scale_deformable_attn_pytorch",
    clients.Official: "ms_deform_attn_core_pytorch",
    clients.Ultralytics: "ultralytics_core",
    clients.RFDETR: "rfdetr_core",
    clients.DFINE: "deformable_attention_core_func_v2",
    clients.RTDETRv2: "deformable_attention_core_func_v2",
    clients.Discrete: "deformable_attention_core_func_v2",
    clients.GTR: "gtr_core",
    clients.Slot: "maybe_ms_deform_attn",
}
EVERY_CLIENT = pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)


class Model(nn.Module):
    """A layer inside a model, with a query of its own."""

    def __init__(self, client: type[nn.Module]) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(5, clients.M * clients.D))
        self.layer = client()

    def forward(self, memory: Tensor) -> Tensor:
        return self.layer(self.query.expand(len(memory), -1, -1), memory)  # type: ignore[no-any-return]


def make(client: type[nn.Module]) -> tuple[Model, Tensor]:
    return Model(client).double(), torch.randn(2, clients.S, clients.M * clients.D).double()


def gradients(model: nn.Module, memory: Tensor) -> list[Tensor]:
    parameters = list(model.parameters())
    output = model(memory)
    weights = torch.linspace(1, 2, output.numel()).double().reshape(output.shape)
    found = torch.autograd.grad((output * weights).sum(), parameters, allow_unused=True)
    return [output, *(grad for grad in found if grad is not None)]


class counted:  # noqa: N801
    """Counts the calls of this package's operator inside a `with` block."""

    def __enter__(self) -> mock.Mock:
        spy = mock.Mock(wraps=deform_attn.ms_deform_attn)
        self.patch = mock.patch.object(adapters, "ms_deform_attn", spy)
        self.patch.__enter__()
        return spy

    def __exit__(self, *error: Any) -> None:
        self.patch.__exit__(*error)


@EVERY_CLIENT
def test_outputs_gradients_and_restore(client: type[nn.Module]) -> None:
    model, memory = make(client)
    types = [type(module) for module in model.modules()]
    attributes = dict(vars(model.layer))
    expected = gradients(model, memory)
    same, report = deform_attn.accelerate(model)
    assert same is model
    assert report.replaced == (("layer", CLIENTS[client]),)
    assert not report.left
    assert isinstance(model.layer, client)
    with counted() as calls:
        found = gradients(model, memory)
    assert calls.call_count == 1
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert deform_attn.accelerate(model)[1].left == (("layer", "accelerated already"),)
    assert deform_attn.restore(model) is model
    assert [type(module) for module in model.modules()] == types
    assert all(vars(model.layer)[name] is value for name, value in attributes.items())
    with counted() as calls:
        assert torch.equal(model(memory), expected[0])
    assert calls.call_count == 0


@EVERY_CLIENT
def test_copies_and_pickles_stay_accelerated(client: type[nn.Module]) -> None:
    model, memory = make(client)
    deform_attn.accelerate(model)
    expected = model(memory)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with counted() as calls:
            assert torch.equal(copied(memory), expected)
        assert calls.call_count == 1
        with counted() as calls:
            deform_attn.restore(copied)(memory)
        assert calls.call_count == 0


@EVERY_CLIENT
def test_traces_hold_the_librarys_code(client: type[nn.Module]) -> None:
    """With and without gradients; saved and loaded."""
    model, memory = make(client)
    deform_attn.accelerate(model)
    expected = model(memory)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(model, memory, check_trace=False)
        # an autograd Function cannot be saved with a trace, so the operator takes its place
        own = client is clients.Official
        assert ("deform_attn::" in str(traced.inlined_graph)) == own
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        found = torch.jit.load(file)(memory)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("client", [clients.MMCV, clients.DFINE, clients.Slot])
@pytest.mark.parametrize("options", [{"dynamo": False, "opset_version": 16}, {"dynamo": True}])
def test_onnx_holds_the_librarys_code(
    client: type[nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    if client is clients.MMCV and options["dynamo"]:
        client = clients.Ultralytics  # the stock layer reads sizes from a tensor and is refused
    if client is clients.Slot and options["dynamo"]:
        client = clients.RFDETR
    model, memory = make(client)
    model, memory = model.float().eval(), memory.float()
    deform_attn.accelerate(model)
    expected = model(memory)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (memory,), path, verbose=False, **options)
    onnxruntime = pytest.importorskip("onnxruntime", reason="of the extra 'dev'")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: memory.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("client", [clients.MMCV, clients.Derived, clients.DFINE, clients.RFDETR])
def test_compile_and_export_keep_the_operator(client: type[nn.Module]) -> None:
    model, memory = make(client)
    deform_attn.accelerate(model)
    expected = model(memory)
    targets: list[str] = []

    def record(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend=record)(memory)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert targets.count("deform_attn.ms_deform_attn.default") == 1
    with torch.no_grad():
        program = torch.export.export(model, (memory,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("deform_attn.ms_deform_attn.default") == 1
    torch.testing.assert_close(program.module()(memory), expected, rtol=1e-9, atol=1e-10)


def test_stock_and_accelerated_compiled_in_one_process() -> None:
    """Each has code of its own: Dynamo keeps what it compiled by the code of a function."""
    model, memory = make(clients.GroundingDINO)
    operands = model.layer.operands

    def broken(*inputs: Tensor) -> Any:
        torch._dynamo.graph_break()
        return operands(*inputs)

    model.layer.operands = broken
    expected = model(memory)
    torch._dynamo.reset()
    for change in 2 * (deform_attn.accelerate, deform_attn.restore):
        change(model)
        with torch.no_grad():
            found = torch.compile(model, backend="eager")(memory)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_what_differs_is_reported_and_kept() -> None:
    model = nn.ModuleDict({"differs": clients.Differs(), "hidden": clients.Hidden()})
    types = [type(module) for module in model.modules()]
    _, report = deform_attn.accelerate(model)
    assert not report.replaced
    reasons = dict(report.left)
    assert reasons["differs"] == (
        "deformable_core_that_differs does not compute deformable attention on a probe: "
        "its results differ"
    )
    assert reasons["hidden"].endswith("Hidden calls no known operator")
    assert [type(module) for module in model.modules()] == types


def test_other_methods_are_left_to_the_library() -> None:
    """A method that only the library has, as LightlyTrain's for TensorRT."""
    model, memory = make(clients.RTDETRv2)
    core = mock.Mock(wraps=clients.deformable_attention_core_func_v2)
    deform_attn.accelerate(model)
    ours = model.layer.ms_deformable_attn_core
    known = ours.args[0]
    stock = adapters.Core(known.name, core, known.kind, known.options)
    model.layer.ms_deformable_attn_core = type(ours)(adapters.attend, stock, method="gather")
    with counted() as calls:
        model(memory)
    assert (calls.call_count, core.call_count) == (0, 1)
    assert core.call_args.kwargs == {"method": "gather"}


@pytest.mark.parametrize("mode", ["fake", "meta", "inference"])
def test_models_without_numbers(mode: str) -> None:
    """The probe computes on the CPU whatever mode the caller is in."""
    adapters._PROVEN.clear()
    context: Any = {
        "fake": torch._subclasses.FakeTensorMode(),
        "meta": torch.device("meta"),
        "inference": torch.inference_mode(),
    }[mode]
    with context:
        model = Model(clients.DFINE)
        assert len(deform_attn.accelerate(model)[1].replaced) == 1


def test_a_layer_by_itself() -> None:
    """The report has the name of the library's class, not that of its replacement."""
    layer = clients.GroundingDINO()
    report = deform_attn.accelerate(layer)[1]
    assert report.subject == "GroundingDINO"
    assert report.replaced == (("GroundingDINO", CLIENTS[clients.GroundingDINO]),)


def test_example_is_measured() -> None:
    model, memory = make(clients.GroundingDINO)
    model.train()
    model.layer.eval()
    for example in (memory, (memory,), {"memory": memory}):
        deform_attn.restore(model)
        report = deform_attn.accelerate(model, example)[1]
        assert report.measurement is not None
        assert len(report.measurement.before) == len(report.measurement.after) >= 3
        assert all(0 < share <= 1 for share in report.measurement.shares)
        assert "the operator's share" in str(report).splitlines()[-1]
    assert model.training
    assert not model.layer.training
    assert not adapters.METER.on
    assert not adapters.METER.stock


# Lists of maps -------------------------------------------------------------------------------


def split_maps(value: Tensor) -> Any:
    return value.permute(0, 2, 3, 1).split([h * w for h, w in clients.SHAPES], -1)


def test_maps_of_one_tensor_are_not_copied() -> None:
    value = torch.randn(2, clients.S, clients.M, clients.D, requires_grad=True)
    for maps in (split_maps(value), split_maps(value.detach())):
        joined = adapters.join_levels(maps, 2, clients.M)
        assert joined.data_ptr() == value.data_ptr()
        assert torch.equal(joined, value)
    joined = adapters.join_levels(split_maps(value), 2, clients.M)
    weights = torch.randn_like(value)
    (grad,) = torch.autograd.grad((joined * weights).sum(), value)
    assert torch.equal(grad, weights)


def test_maps_of_several_tensors_are_joined() -> None:
    value = torch.randn(2, clients.S, clients.M, clients.D)
    maps = split_maps(value)
    for apart in (
        [x.clone() for x in maps],
        [x.flatten(0, 1).clone() for x in maps],
        [x.flatten(0, 1).unflatten(2, s).clone() for x, s in zip(maps, clients.SHAPES)],
    ):
        assert torch.equal(adapters.join_levels(apart, 2, clients.M), value)
    # of one tensor, but in another order
    square = torch.randn(2, 2, 3, 8)
    first, second = square.split(4, -1)
    swapped = adapters.join_levels([second, first], 2, 2)
    assert torch.equal(swapped, torch.cat([second, first], -1).permute(0, 3, 1, 2))


def test_derivatives_of_joined_maps() -> None:
    value = torch.randn(1, clients.S, 1, 2, dtype=torch.float64, requires_grad=True)

    def joined(value: Tensor) -> Tensor:
        return adapters.join_levels(split_maps(value), 1, 1).sin()

    assert torch.autograd.gradcheck(joined, value)
    assert torch.autograd.gradgradcheck(joined, value)
    grad = torch.func.grad(lambda x: joined(x).sum())(value.detach())
    torch.testing.assert_close(grad, value.detach().cos())
    mapped = torch.func.vmap(joined)(value.detach()[None])
    torch.testing.assert_close(mapped[0], value.detach().sin())
    tangent = torch.ones_like(value)
    _, derivative = torch.func.jvp(joined, (value.detach(),), (tangent,))
    torch.testing.assert_close(derivative, value.detach().cos())


# The table of libraries ----------------------------------------------------------------------


def test_rows_are_compared_as_sets() -> None:
    rows = torch.randn(2, 7, 4)
    rows[0, 0, 0] = torch.inf
    order = torch.randperm(7)
    assert difference([rows[:, order]], [rows]) == 0
    other = rows.clone()
    other[1, 3] += 1
    assert difference([other[:, order]], [rows]) > 0.01
    with pytest.raises(AssertionError, match="1 outputs instead of 2"):
        difference([rows], [rows, rows])


def test_an_export_that_the_stock_model_lacks_is_no_failure() -> None:
    assert fails("yes", "no: RuntimeError")
    assert fails("yes", "differs by 1e-02")
    assert fails("differs by 1e-02", "differs by 1e-02")
    assert not fails("differs by 1e-02", "as stock")
    assert not fails("no: RuntimeError", "no: RuntimeError")
