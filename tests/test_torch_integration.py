"""Operator and modules inside PyTorch: opcheck, compile, export, replicas, choice of a backend."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import deform_attn
from deform_attn import MSDeformAttn
from deform_attn.backends import BACKENDS
from deform_attn.testing import (
    CASES,
    DTYPES,
    Case,
    Dtypes,
    OpInputs,
    check_results,
    grad_output_for,
    results,
)
from tests.conftest import separate_compiled_code
from tests.family import FAMILY, lively, tensors_of, with_tensors
from tests.runners import Recorder, Runner, operators, package

FORMS = ["non_square", "listed_points", "list_metadata", "starts_omitted", "masked"]


def op_arguments(inputs: OpInputs) -> tuple[Any, ...]:
    """As the package calls its operator: list shapes become level_sizes."""
    shapes, starts, sizes = inputs.spatial_shapes, inputs.level_start_index, None
    if not isinstance(shapes, torch.Tensor):
        sizes = [side for pair in shapes for side in pair]
        shapes = None
    if isinstance(starts, list):
        starts = torch.tensor(starts)
    return (inputs.value, shapes, starts, *inputs.tensors[1:], sizes, inputs.num_points)


@pytest.mark.only(
    runners=package,
    dtypes=["bf16_weights_f32"],
    cases=FORMS,
    slow={"cases": ["listed_points"]},
)
@pytest.mark.parametrize("with_gradients", [False, True], ids=["", "with_gradients"])
def test_opcheck(runner: Runner, dtypes: Dtypes, case: Case, with_gradients: bool) -> None:
    """Schema, fake kernel, autograd registration and AOT dispatch with symbolic sizes."""
    inputs = case.make(dtypes, runner.device)
    grad_output = grad_output_for(inputs)
    if with_gradients:
        inputs, grad_output = inputs.leaves(), grad_output.requires_grad_()
    forward, backward = operators(runner)
    arguments = op_arguments(inputs)
    mask = () if inputs.value_mask is None else (inputs.value_mask,)
    torch.library.opcheck(forward.default, (*arguments, *mask))
    torch.library.opcheck(backward.default, (grad_output, *arguments, False, [True] * 3, *mask))


# ------------------------------------------------------------------------------------ compile


class Compiled:
    """torch.compile without graph breaks, counting the graphs and the operator's nodes in them."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
            self.graphs.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

        torch._dynamo.reset()
        self.call = torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.mark.only(
    runners=package,
    dtypes=["f32", "bf16"],
    cases=FORMS,
    slow={"dtypes": ["f32"], "cases": ["listed_points"]},
)
def test_compile_full_graph(runner: Runner, dtypes: Dtypes, case: Case) -> None:
    """Forward and gradients in one graph each, with the bits of eager mode."""
    inputs = case.make(dtypes, runner.device)
    compiled = Compiled(lambda *tensors: runner.call(inputs.replace_tensors(*tensors)))
    with torch.no_grad():
        assert torch.equal(compiled.call(*inputs.tensors), runner.forward(inputs))
    leaves = inputs.leaves()
    grad_output = grad_output_for(inputs)
    found = torch.autograd.grad(compiled.call(*leaves.tensors), leaves.tensors, grad_output)
    for one, other in zip(found, runner.gradients(inputs, grad_output)):
        torch.testing.assert_close(one, other)
    assert len(compiled.graphs) == 2  # without and with gradients


@pytest.mark.only(runners=package, dtypes=["f32"], slow=None)
@pytest.mark.parametrize("levels", ["tensor", "list"])
def test_compile_with_dynamic_sizes(runner: Runner, dtypes: Dtypes, levels: str) -> None:
    """One graph serves other batch sizes, numbers of queries and maps of another size."""

    def call(*arguments: Any) -> torch.Tensor:
        return deform_attn.ms_deform_attn(*arguments, backend=runner.backend)

    compiled = Compiled(call, dynamic=True)
    # no two sizes of the first call are alike: Dynamo would take them for one
    sizes = [(7, 5, ((5, 7), (3, 4))), (3, 4, ((6, 5), (4, 2))), (4, 9, ((3, 9), (2, 5)))]
    for batch, queries, maps in sizes:
        case = Case("dynamic", levels=maps, batch=batch, queries=queries, heads=6, head_dim=8)
        inputs = case.make(dtypes, runner.device).leaves()
        if levels == "list":
            inputs = inputs.replace(
                spatial_shapes=[tuple(pair) for pair in maps], level_start_index=None
            )
        grad_output = grad_output_for(inputs)
        output = compiled.call(*inputs.arguments)
        grads = torch.autograd.grad(output, inputs.tensors, grad_output)
        check_results((output.detach(), *grads), inputs, grad_output)
    assert len(compiled.graphs) == 1


@pytest.mark.only(
    runners=lambda runner: package(runner) and runner.device == "cpu", dtypes=["f32"], slow=None
)
def test_compile_with_inductor(runner: Runner, dtypes: Dtypes) -> None:
    """The whole way to generated code, softmax before and projection behind, training."""
    module = MSDeformAttn(32, 3, 4, 2)
    arguments = module_arguments(module)
    torch._dynamo.reset()
    with deform_attn.use_backend(str(runner.backend)):
        expected = module(*arguments)
        expected_grads = torch.autograd.grad(expected.sum(), list(module.parameters()))
        found = torch.compile(module, fullgraph=True)(*arguments)
        grads = torch.autograd.grad(found.sum(), list(module.parameters()))
    torch.testing.assert_close(found, expected)
    for one, other in zip(grads, expected_grads):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_compiled_autograd() -> None:
    """A backward pass that Dynamo compiles, of a forward pass that ran eagerly."""
    inputs = CASES["non_square"].make(DTYPES["f32"]).leaves()
    grad_output = grad_output_for(inputs)
    output = deform_attn.ms_deform_attn(*inputs.arguments)
    torch._dynamo.reset()
    compiler = torch.compile(backend="eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        output.backward(grad_output)
    gradients = [tensor.grad for tensor in inputs.tensors]
    check_results((output.detach(), *gradients), inputs, grad_output)


def test_a_forced_instruction_set_has_compiled_code_of_its_own() -> None:
    forced = {"ATEN_CPU_CAPABILITY": "avx2"}
    separate_compiled_code(forced)
    assert forced["TORCHINDUCTOR_CACHE_DIR"].endswith("_avx2")
    chosen = {"ATEN_CPU_CAPABILITY": "avx2", "TORCHINDUCTOR_CACHE_DIR": "chosen"}
    for environment in ({}, chosen):
        before = dict(environment)
        separate_compiled_code(environment)
        assert environment == before


def module_arguments(module: MSDeformAttn, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """query, reference_points, input_flatten, shapes, starts."""
    shapes = torch.tensor([(5, 7), (3, 4), (2, 1)][: module.n_levels], device=device)
    areas = shapes.prod(-1)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.2)
    torch.nn.init.normal_(module.attention_weights.weight, std=0.2)
    return (
        torch.randn(2, 5, module.d_model, device=device),
        torch.rand(2, 5, module.n_levels, 2, device=device),
        torch.randn(2, int(areas.sum()), module.d_model, device=device),
        shapes,
        areas.cumsum(0) - areas,
    )


# ------------------------------------------------------------------------------------- export


@pytest.mark.only(runners=package, dtypes=["f32"], slow=None)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export_keeps_one_node(runner: Runner, dtypes: Dtypes, dynamic: bool) -> None:
    module = MSDeformAttn(32, 3, 4, 2).to(runner.device).eval()
    arguments = module_arguments(module, runner.device)
    queries = torch.export.Dim("queries", min=2, max=1000)
    shapes = ({1: queries}, {1: queries}, None, None, None) if dynamic else None
    with deform_attn.use_backend(str(runner.backend)):
        program = torch.export.export(module, arguments, dynamic_shapes=shapes)
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert sum(target.startswith("deform_attn.") for target in targets) == 1
        assert not any("grid" in target or "index" in target for target in targets)
        expected = module(*arguments)
    torch.testing.assert_close(program.module()(*arguments), expected)
    if dynamic:
        more = (*(t.repeat(1, 3, *[1] * (t.dim() - 2)) for t in arguments[:2]), *arguments[2:])
        with deform_attn.use_backend(str(runner.backend)):
            torch.testing.assert_close(program.module()(*more), module(*more))
    decomposed = program.run_decompositions()
    nodes = [str(node.target) for node in decomposed.graph.nodes]
    assert sum(node.startswith("deform_attn.") for node in nodes) == 1
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    torch.testing.assert_close(torch.export.load(saved).module()(*arguments), expected)


@pytest.mark.only(runners=package)
def test_meta_and_fake_tensors(runner: Runner, dtypes: Dtypes) -> None:
    """Shapes without numbers: nothing of the metadata is read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = CASES["listed_points"].make(dtypes)
    forward, backward = operators(runner)
    meta = inputs.to("meta")
    assert forward(*meta.arguments, None, meta.num_points).shape == (2, 5, 16)
    with FakeTensorMode() as mode:
        fake = inputs.replace_tensors(*(mode.from_tensor(t) for t in inputs.tensors)).replace(
            spatial_shapes=mode.from_tensor(inputs.spatial_shapes),
            level_start_index=mode.from_tensor(inputs.level_start_index),
        )
        output = forward(*fake.arguments, None, fake.num_points)
        grads = backward(output, *fake.arguments, None, fake.num_points, False, [True] * 3)
    assert (output.shape, output.dtype) == ((2, 5, 16), dtypes.value)
    for grad, tensor in zip(grads, inputs.tensors):
        assert (grad.shape, grad.dtype) == (tensor.shape, tensor.dtype)


# ----------------------------------------------------------------------------------- autocast


@pytest.mark.only(runners=package, dtypes=["f32", "bf16", "f64"], slow=None)
def test_autocast_leaves_the_operator_alone(runner: Runner, dtypes: Dtypes) -> None:
    inputs = CASES["non_square"].make(dtypes, runner.device)
    grad_output = grad_output_for(inputs)
    expected = results(runner, inputs, grad_output)
    with torch.autocast(runner.device, torch.bfloat16):
        found = results(runner, inputs, grad_output)
    for one, other in zip(found, expected):
        assert torch.equal(one, other)


@pytest.mark.only(runners=package, dtypes=["bf16", "f16"], slow={"dtypes": ["bf16"]})
@pytest.mark.parametrize("reference_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_module_keeps_locations_in_float32(
    runner: Runner, dtypes: Dtypes, reference_dtype: torch.dtype
) -> None:
    module = MSDeformAttn(32, 3, 4, 2).to(runner.device)
    query, reference, *rest = module_arguments(module, runner.device)
    with (
        deform_attn.use_backend(str(runner.backend)),
        torch.autocast(runner.device, dtypes.value),
        Recorder() as recorder,
    ):
        output = module(query, reference.to(reference_dtype), *rest)
    output.sum().backward()
    assert output.dtype == dtypes.value
    name, arguments = next(call for call in recorder.calls if not call[0].endswith("_backward"))
    assert arguments[0].dtype == dtypes.value
    assert arguments[3].dtype == torch.float32  # locations, or reference points where fused
    if "fused" not in name:
        # the offsets are predicted in 16 bits, but the reference point is added in 32
        assert not torch.equal(arguments[3], arguments[3].to(dtypes.value).float())
    for parameter in module.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


# ------------------------------------------------------------------------- copies and pickles


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_module_copies(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    module = lively(FAMILY[name].make())
    call = FAMILY[name].arguments()
    other = copied(module)
    assert torch.equal(other(**call), module(**call))
    with torch.no_grad():
        other.attention_weights.weight.zero_()
    assert not torch.equal(other(**call), module(**call))


# ------------------------------------------------------------------- each module of the family

each_module = pytest.mark.parametrize("name", FAMILY)


def leaves_of(module: nn.Module, call: dict[str, Any]) -> list[torch.Tensor]:
    """What has gradients: the tensors of a call, and the parameters that are trained."""
    inputs = [tensor.requires_grad_() for tensor in tensors_of(call).values()]
    return [*inputs, *(p for p in module.parameters() if p.requires_grad)]


@each_module
def test_compiled_modules_train(name: str) -> None:
    """One graph each way for other batches, numbers of queries and maps."""
    module = lively(FAMILY[name].make())
    compiled = Compiled(module, dynamic=True)
    graphs = []  # Dynamo may start a graph anew, with a number that it took for symbolic
    # no two sizes of the first call are alike: Dynamo would take them for one
    for batch, queries, maps in (
        (7, 5, ((6, 9), (3, 4), (2, 1))),
        (3, 4, ((8, 5), (4, 2), (2, 3))),
    ):
        call = FAMILY[name].arguments(batch, queries, maps)
        leaves = leaves_of(module, call)
        expected, found = module(**call), compiled.call(**call)
        torch.testing.assert_close(found, expected)
        weights = torch.randn_like(expected)
        for one, other in zip(
            torch.autograd.grad(found, leaves, weights, allow_unused=True),
            torch.autograd.grad(expected, leaves, weights, allow_unused=True),
        ):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        graphs.append(len(compiled.graphs))
    assert graphs[0] == graphs[1]


@each_module
def test_exported_modules(name: str) -> None:
    module = lively(FAMILY[name].make()).eval()
    call = FAMILY[name].arguments()
    program = torch.export.export(module, (), call)
    targets = [str(node.target) for node in program.graph.nodes]
    kernels = sum(target.startswith("deform_attn.ms_deform_attn") for target in targets)
    assert kernels == 1
    assert not any("grid" in target for target in targets)
    torch.testing.assert_close(program.module()(**call), module(**call))


@each_module
def test_autocast_modules(name: str) -> None:
    """Close to float32, with gradients of the parameters in theirs."""
    module = lively(FAMILY[name].make())
    call = FAMILY[name].arguments()
    expected = module(**call)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(**call)
    found.sum().backward()
    if name != "discrete":  # a location rounded to 16 bits may lie on another pixel
        assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
    for parameter in module.parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()


@each_module
def test_gradients_per_sample(name: str) -> None:
    """torch.func over a module: vmap of grad of a functional call, as a loop over the batch."""
    module = lively(FAMILY[name].make())
    calls = [FAMILY[name].arguments(batch=1) for _ in range(3)]
    parameters = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        call = with_tensors(calls[0], tensors)
        return (torch.func.functional_call(module, parameters, kwargs=call) ** 2).sum()

    samples = [tensors_of(call) for call in calls]
    stacked = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, stacked)
    for i, sample in enumerate(samples):
        for key, gradient in torch.func.grad(loss)(parameters, sample).items():
            torch.testing.assert_close(found[key][i], gradient, rtol=1e-4, atol=1e-4)


class OnOneDevice(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what a CUDA graph cannot record: numbers read back, and copies to another device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number is read back"
        output = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, output)) if isinstance(x, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        assert len(devices) <= 1, f"{func}: between {devices}"
        return output


@each_module
def test_a_call_stays_on_its_device(name: str) -> None:
    """Forward and backward on a device whose numbers cannot be read: as a CUDA graph records it."""
    module = FAMILY[name].make().to("meta")
    call = FAMILY[name].arguments(device="meta")
    if name != "dfine":
        mask = {"official": "input_padding_mask", "mmcv": "key_padding_mask"}.get(
            name, "value_mask"
        )
        call[mask] = torch.empty(2, 49, dtype=torch.bool, device="meta")
    leaves = leaves_of(module, call)
    with OnOneDevice():
        grads = torch.autograd.grad(module(**call).sum(), leaves, allow_unused=True)
    names = [*tensors_of(call), *(n for n, p in module.named_parameters() if p.requires_grad)]
    without = [n for n, grad in zip(names, grads, strict=True) if grad is None]
    assert without == (["reference_points"] if name == "discrete" else [])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("levels", ["tensor", "list"])
def test_triton_launches_stay_on_the_device(
    levels: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's part of the Triton backend, with the launches themselves left out."""
    from deform_attn.backends import triton_launcher

    launches = []
    monkeypatch.setattr(triton_launcher, "_run", lambda kernel, *_, **__: launches.append(kernel))
    inputs = CASES["non_square"].make(DTYPES["f32"]).to("meta")
    shapes, starts, sizes = inputs.spatial_shapes, inputs.level_start_index, None
    if levels == "list":
        shapes, starts, sizes = None, None, [5, 7, 3, 4, 2, 1]
    value, locations, weights = inputs.tensors
    reference = torch.empty(2, 5, 1, 4, device="meta")
    attention = (value, shapes, starts, locations, weights, sizes, None)
    layer = (value, shapes, starts, reference, locations, weights, sizes, None, 0.5)
    with OnOneDevice():
        output = triton_launcher.forward(*attention)
        triton_launcher.backward(output, *attention, deterministic, [True] * 3)
        triton_launcher.fused_forward(*layer)
        triton_launcher.fused_backward(output, *layer, deterministic, [True] * 4)
    assert launches.count("forward") == 2
    assert launches.count("backward") == (4 if deterministic else 2)  # one for each of the batch


def test_the_guard_sees_what_it_refuses() -> None:
    number = torch.ones(2)
    with OnOneDevice():
        number.sum()
        with pytest.raises(AssertionError, match="read back"):
            number.sum().item()
        with pytest.raises(AssertionError, match="read back"):
            bool(number.sum() > 1)
        with pytest.raises(AssertionError, match="between"):
            number.to("meta")


# ------------------------------------------------------------- several replicas or processes


def replica_of(module: nn.Module) -> nn.Module:
    """What DataParallel makes for a device: modules that share all but their parameters."""
    replicas = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for original, replica in replicas.items():
        for key, child in original._modules.items():
            replica._modules[key] = replicas[child]
        for key, parameter in original._parameters.items():
            setattr(replica, key, parameter.view_as(parameter))  # as a broadcast: not a leaf
    return replicas[module]


@each_module
def test_replicas_in_threads(name: str) -> None:
    """As DataParallel runs them: outputs of their own, gradients that meet in the module."""
    module = lively(FAMILY[name].make())
    calls = [FAMILY[name].arguments() for _ in range(2)]
    outputs = [module(**call) for call in calls]
    sum(output.sum() for output in outputs).backward()
    expected = {key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda call: replica_of(module)(**call), calls))
    # a Python thread has its own number of threads, and matrix products round by it
    for one, other in zip(found, outputs):
        torch.testing.assert_close(one, other)
    sum(output.sum() for output in found).backward()
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[key])


DISTRIBUTED = """
import copy, gc, sys
import torch
import torch.distributed as dist
from tests.family import FAMILY, lively

rank, store = int(sys.argv[1]), sys.argv[2]

def compare(member):
    torch.manual_seed(0)
    module = lively(member.make())
    calls = [member.arguments() for _ in range(2)]
    alone = copy.deepcopy(module)
    for call in calls:
        (alone(**call).square().sum() / 2).backward()
    together = torch.nn.parallel.DistributedDataParallel(module)
    for step in range(2):  # a parameter without a gradient is an error in the second
        module.zero_grad()
        together(**calls[rank]).square().sum().backward()
        for (key, one), other in zip(module.named_parameters(), alone.parameters()):
            assert (one.grad is None) == (other.grad is None) == (not one.requires_grad), key
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)

dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
for name, member in FAMILY.items():
    compare(member)
    print(name)
dist.barrier()
gc.collect()  # modules hold the group, whose threads must end before the interpreter does
dist.destroy_process_group()
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """DistributedDataParallel: no parameter is left out, gradients are those of the whole batch."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, str(rank), str(tmp_path / "store")],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            output, errors = process.communicate(timeout=1800)
            assert process.returncode == 0, errors
            # gloo of torch 2.10 logs to the standard output
            lines = [line for line in output.splitlines() if not line.startswith("[Gloo]")]
            assert lines == list(FAMILY)
    finally:
        for process in processes:
            process.kill()


# --------------------------------------------------------------------------------- TorchScript


class OfTensors(nn.Module):
    """A call of a module as a function of its tensors: a trace takes no other inputs."""

    def __init__(self, module: nn.Module, call: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.module(**with_tensors(self.call, dict(zip(tensors_of(self.call), tensors))))


@each_module
@pytest.mark.parametrize("gradients", [False, True], ids=["", "with_gradients"])
def test_traced_modules(name: str, gradients: bool, tmp_path: Path) -> None:
    """A saved trace holds the operator, and serves other sizes; its gradients are the module's."""
    module = OfTensors(lively(FAMILY[name].make()).eval(), FAMILY[name].arguments())
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(module, tuple(tensors_of(module.call).values()))
    torch.jit.save(traced, tmp_path / "traced.pt")
    traced = torch.jit.load(tmp_path / "traced.pt")
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert sum(kind.startswith("deform_attn::ms_deform_attn") for kind in kinds) == 1
    other = tensors_of(FAMILY[name].arguments(batch=3, queries=7)).values()
    expected, found = module(*other), traced(*other)
    torch.testing.assert_close(found, expected)
    parameters = [p for p in module.parameters() if p.requires_grad]
    others = [p for p in traced.parameters() if p.requires_grad]
    grads = torch.autograd.grad(expected.square().sum(), parameters)
    for one, other in zip(torch.autograd.grad(found.square().sum(), others), grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


class FromMaps(nn.Module):
    """A layer on feature maps, whose sizes are those of the maps."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = lively(MSDeformAttn(32, 2, 4, 3))

    def forward(
        self, query: torch.Tensor, reference: torch.Tensor, *maps: torch.Tensor
    ) -> torch.Tensor:
        rows = torch.cat([x.flatten(2) for x in maps], 2).transpose(1, 2)
        return self.attention(query, reference, rows, [x.shape[-2:] for x in maps])

    @staticmethod
    def arguments(batch: int, *sizes: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        maps = [torch.randn(batch, 32, *size) for size in sizes]
        return (torch.randn(batch, 5, 32), torch.rand(batch, 5, 2, 2), *maps)


def test_traced_sizes_are_not_constants() -> None:
    layer = FromMaps()
    traced = torch.jit.trace(layer, layer.arguments(2, (8, 6), (4, 3)))
    other = layer.arguments(3, (5, 7), (2, 9))
    torch.testing.assert_close(traced(*other), layer(*other))


@each_module
def test_script_says_what_to_use_instead(name: str) -> None:
    with pytest.raises(TypeError, match=r"torch\.jit\.script .* use torch\.jit\.trace"):
        torch.jit.script(nn.Sequential(FAMILY[name].make()))


@each_module
def test_symbolic_trace_says_what_to_use_instead(name: str) -> None:
    step = r": expected a tensor, got Proxy of torch\.fx, .* use torch\.export\.export or .*_module"
    with pytest.raises(TypeError, match=step):
        torch.fx.symbolic_trace(FAMILY[name].make())


def test_symbolic_trace_of_the_function_says_what_to_use_instead() -> None:
    def call(value: Any, locations: Any, weights: Any) -> Any:
        return deform_attn.ms_deform_attn(value, [(4, 3)], None, locations, weights)

    with pytest.raises(TypeError, match=r"^value: .* Proxy .*torch\.fx\.wrap keeps functions "):
        torch.fx.symbolic_trace(call)


def test_symbolic_trace_keeps_modules_whole() -> None:
    """As the error says."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = lively(MSDeformAttn(32, 2, 4, 3))

        def forward(self, query: Any, reference: Any, rows: Any) -> Any:
            return self.attention(query, reference, rows, [(8, 6), (4, 3)]).relu()

    tracer = torch.fx.Tracer()
    tracer.is_leaf_module = lambda module, _: isinstance(module, MSDeformAttn)
    model = Model()
    traced = torch.fx.GraphModule(model, tracer.trace(model))
    tensors = torch.randn(2, 5, 32), torch.rand(2, 5, 2, 2), torch.randn(2, 60, 32)
    torch.testing.assert_close(traced(*tensors), model(*tensors))


# ---------------------------------------------------------------------- torch.func and counting


@pytest.mark.parametrize("method", ["default", "discrete"])
def test_compiled_functional_gradients(method: str) -> None:
    """No tensor inside torch.func.grad says that it needs a gradient."""
    inputs = CASES["non_square"].make(DTYPES["f32"])
    tensors = tuple(tensor.nan_to_num(0.5) for tensor in inputs.tensors)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        call = inputs.replace_tensors(*tensors).arguments
        return deform_attn.ms_deform_attn(*call, method=method).square().sum()

    gradient = torch.func.grad(loss, (0, 2))
    compiled = Compiled(gradient)
    for one, other in zip(compiled.call(*tensors), gradient(*tensors), strict=True):
        torch.testing.assert_close(one, other)
    assert len(compiled.graphs) == 1


def test_registered_operators_under_torch_func() -> None:
    """The operator itself, not only the functions that call it."""
    inputs = CASES["non_square"].make(DTYPES["f64"])
    value, locations, weights = (tensor.nan_to_num(0.5) for tensor in inputs.tensors)

    def loss(value: torch.Tensor) -> torch.Tensor:
        call = inputs.replace_tensors(value, locations, weights)
        return torch.ops.deform_attn.ms_deform_attn(*op_arguments(call)).square().sum()

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(loss)(value).square().sum()

    leaf = value.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(torch.func.grad(loss)(value), expected.detach())
    (second,) = torch.autograd.grad(expected.square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(gradient)(value), second)


def test_operations_are_counted() -> None:
    """A multiplication and an addition for each pixel and channel; also by an older counter."""
    from torch.utils.flop_counter import FlopCounterMode

    shapes, points = [(8, 6), (4, 3)], 2 * 5 * 4 * 2 * 3
    value = torch.rand(2, 60, 4, 8, requires_grad=True)
    offsets, logits = torch.rand(2, 5, 4, 2, 3, 2), torch.rand(2, 5, 4, 2, 3)
    reference = torch.rand(2, 5, 2, 2)
    for method, pixels in (("default", 4), ("discrete", 1)):
        with FlopCounterMode(display=False) as counter:
            output = deform_attn.ms_deform_attn_fused(
                value, shapes, None, reference, offsets, logits, method=method
            )
            forward = counter.get_total_flops()
            output.sum().backward()
        assert forward == 2 * pixels * 8 * points
        assert counter.get_total_flops() - forward == 2 * pixels * 8 * points  # of value alone


# ------------------------------------------------------------------------- without the module

PACKAGED = """
import sys
import torch
import torch._inductor.codecache  # torch 2.10 does not import it for itself
import deform_attn

given, expected = torch.load(sys.argv[2])
model = torch._inductor.aoti_load_package(sys.argv[1])
for arguments, output in zip(given, expected):
    torch.testing.assert_close(model(*arguments), output)
print(len(given))
"""


def test_aot_inductor_package_in_a_fresh_process(tmp_path: Path) -> None:
    """Compiled ahead of time with a dynamic number of queries; the operator is called by it."""
    module = lively(FAMILY["official"].make()).eval()
    calls = [tuple(FAMILY["official"].arguments(queries=n).values()) for n in (5, 8)]
    queries = torch.export.Dim("queries", min=2, max=1000)
    shapes = ({1: queries}, {1: queries}, None, None, None)
    with torch.no_grad():
        expected = [module(*call) for call in calls]
        program = torch.export.export(module, calls[0], dynamic_shapes=shapes)
        package_file = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "layer.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
        )
    torch.save((calls, expected), tmp_path / "calls.pt")
    done = run_python(PACKAGED, arguments=(package_file, str(tmp_path / "calls.pt")))
    assert (done.returncode, done.stdout.strip()) == (0, "2"), done.stderr


# -------------------------------------------------------------------------- choice of a backend


def called(function: Callable[[], Any]) -> list[str]:
    with Recorder() as recorder:
        function()
    return [name for name, _ in recorder.calls]


@pytest.mark.only(runners=lambda runner: package(runner) and runner.device == "cpu")
def test_backend_is_forced(runner: Runner) -> None:
    """By argument and by context manager; the argument wins, and blocks end."""
    inputs = CASES["one_of_each"].make(DTYPES["f32"])
    name = operators(runner)[0].__name__
    plain = called(lambda: deform_attn.ms_deform_attn(*inputs.arguments))
    assert called(lambda: runner.forward(inputs)) == [name]
    with deform_attn.use_backend(str(runner.backend)):
        assert called(lambda: deform_attn.ms_deform_attn(*inputs.arguments)) == [name]
        argument = lambda: deform_attn.ms_deform_attn(  # noqa: E731
            *inputs.arguments, backend="reference"
        )
        assert called(argument) == ["ms_deform_attn_reference"]
        with deform_attn.use_backend("reference"):
            assert called(lambda: deform_attn.ms_deform_attn(*inputs.arguments)) == [
                "ms_deform_attn_reference"
            ]
        with pytest.raises(ZeroDivisionError), deform_attn.use_backend("reference"):
            raise ZeroDivisionError
        assert called(lambda: deform_attn.ms_deform_attn(*inputs.arguments)) == [name]
    assert called(lambda: deform_attn.ms_deform_attn(*inputs.arguments)) == plain


def test_first_backend_that_runs_is_chosen() -> None:
    for dtypes in DTYPES.values():
        able = [n for n, b in BACKENDS.items() if b.why_not("cpu", dtypes.value) is None]
        assert able
        assert deform_attn.choose_backend("cpu", dtypes.value).name == able[0]
    assert list(BACKENDS) == ["compiled", "triton", "reference"]


def test_unknown_backend() -> None:
    inputs = CASES["one_of_each"].make(DTYPES["f32"])
    for force in (
        lambda: deform_attn.ms_deform_attn(*inputs.arguments, backend="fastest"),
        lambda: deform_attn.use_backend("fastest").__enter__(),
        lambda: deform_attn.choose_backend("cpu", backend="fastest"),
    ):
        with pytest.raises(ValueError, match="compiled, triton, reference.*fastest"):
            force()
    with pytest.raises(TypeError, match="^device_type: expected a name such as 'cpu', got dev"):
        deform_attn.choose_backend(torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["argument", "block"])
def test_forced_backend_that_cannot_run_says_why(way: str) -> None:
    """Float64 is not for Triton, on any device."""
    inputs = CASES["one_of_each"].make(DTYPES["f64"])
    reason = BACKENDS["triton"].why_not("cpu", torch.float64)
    assert reason
    forced = deform_attn.use_backend("triton") if way == "block" else contextlib.nullcontext()
    backend = "triton" if way == "argument" else None
    with forced, pytest.raises(RuntimeError) as caught:
        deform_attn.ms_deform_attn(*inputs.arguments, backend=backend)
    for words in ("triton", "cpu", "float64", reason):
        assert words in str(caught.value)


def run_python(
    code: str, arguments: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def test_environment_variable_forces_a_backend() -> None:
    code = "import deform_attn; print(deform_attn.choose_backend('cpu').name)"
    done = run_python(code, DEFORM_ATTN_BACKEND="reference")
    assert (done.returncode, done.stdout.strip()) == (0, "reference"), done.stderr
    done = run_python(code, DEFORM_ATTN_BACKEND="fastest")
    assert done.returncode != 0
    assert "DEFORM_ATTN_BACKEND: expected one of compiled, triton, reference" in done.stderr
    code = (
        "import torch, deform_attn\n"
        "try: deform_attn.choose_backend('cpu', torch.float64)\n"
        "except RuntimeError as error: print(error)"
    )
    done = run_python(code, DEFORM_ATTN_BACKEND="triton")
    assert "triton" in done.stdout, done.stderr
    assert "float64" in done.stdout


def test_fallback_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line under the logger deform_attn, with the reason."""
    from deform_attn import backends

    reasons = {"compiled": "not built", "triton": "no GPU"}
    broken = BACKENDS | {
        name: dataclasses.replace(BACKENDS[name], why_not=lambda *_, why=why: why)
        for name, why in reasons.items()
    }
    monkeypatch.setattr(backends, "BACKENDS", broken)
    monkeypatch.setattr(backends, "_announced", set())
    with caplog.at_level(logging.DEBUG, logger="deform_attn"):
        for _ in range(3):
            assert deform_attn.choose_backend("cpu").name == "reference"
    assert len(caplog.records) == 1
    assert "not built" in caplog.text
    assert "no GPU" in caplog.text
    assert caplog.records[0].name == "deform_attn"
