"""ONNX through PyTorch's exporter, and exporters that take an ``ExportedProgram``.

PyTorch's exporter has no translation of this package's operators. :func:`export` traces a model, in
which each operator is one node, and replaces these nodes by one of three forms:

============= ================================ ==================================================
form          becomes                          for
============= ================================ ==================================================
"grid_sample" a GridSample per level           onnxruntime, OpenVINO, ...
"gather"      Gather and MatMul per level, on  TensorRT (NVIDIA/TensorRT #4813 reports wrong results
              tensors of at most five          of GridSample in such models); Core ML, ExecuTorch
              dimensions                       and LiteRT (:func:`decompose`); level sizes that are
                                               inputs of the graph
"tensorrt"    a MultiscaleDeformableAttn-      TensorRT with its plugins
              Plugin_TRT node
============= ================================ ==================================================

All three support levels with different numbers of points. Discrete sampling (RT-DETRv2) becomes
gathered pixels in every form.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deform_attn.backends import BACKENDS, reference
from deform_attn.checks import as_path, check_choice, check_module
from deform_attn.composite import discrete, filled, unfused
from deform_attn.extras import needs_packages
from deform_attn.gathered import gathered
from deform_attn.levels import level_pairs
from deform_attn.operands import AnyOperands, DiscreteOperands, FusedOperands, Operands

__all__ = ["FORMS", "decompose", "decompositions", "export"]

#: The forms that the operator can take, see above.
FORMS = ("grid_sample", "gather", "tensorrt")

OPSET = 18  # onnxruntime has no GridSample of opset 20 for CUDA

_LARGEST_PROTO = 2**31  # bytes that onnx can check without a file

# Arguments of torch.onnx.export that export() does not take, and what to do instead.
_OTHERS = {
    "dynamic_axes": "pass dynamic_shapes, as in torch.export.export",
    "dynamo": "for the exporter that traces, call torch.onnx.export(..., dynamo=False) itself",
    "f": "pass path",
}


def export(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    path: str | os.PathLike[str] | None = None,
    *,
    form: str = "grid_sample",
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    plugin_version: str = "2",
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """Export a model that calls this package's operators to ONNX, for inference.

    Needs the packages ``onnx`` and ``onnxscript``. The models of other libraries call these
    operators after :func:`deform_attn.accelerate`.

    Args:
        model: a module in evaluation mode, or the result of ``torch.export.export``.
        args: example inputs.
        path: where to write; None: only return the program.
        form: of the operator in the graph: ``"grid_sample"``, ``"gather"`` or ``"tensorrt"``.
        kwargs: example inputs by name.
        dynamic_shapes: as in ``torch.export.export``: sizes that may differ from those of the
            example, such as the batch.
        plugin_version: for ``"tensorrt"``: ``"1"`` for TensorRT before 10.11, which has no other.
        options: other arguments of ``torch.onnx.export``: ``input_names``, ``optimize``, ...
            ``opset_version`` is 18 if it is not given.

    Returns:
        The exported program; ``program.model_proto`` is the ONNX model.

    Raises:
        TypeError: ``model``, ``args`` or ``path`` has another type.
        ValueError: the model is in training mode; there is no such form, version of the plugin or
            option; or the form needs level sizes as numbers and the model has them in a tensor:
            pass ``spatial_shapes`` as a list, or choose ``"gather"`` or ``"tensorrt"``.
        RuntimeError: the exported model is not valid ONNX, or not of the requested opset.
        OSError: the file cannot be written; the message names it.
        ModuleNotFoundError: ``onnx`` or ``onnxscript`` is not installed.

    Example:
        >>> import torch
        >>> from deform_attn import MSDeformAttn
        >>> from deform_attn.integrations.onnx import export
        >>> layer = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=3).eval()
        >>> shapes = [(8, 6), (4, 3)]
        >>> inputs = torch.rand(2, 5, 32), torch.rand(2, 5, 2, 2), torch.rand(2, 60, 32), shapes
        >>> program = export(layer, inputs, form="gather", verbose=False)
        >>> any(node.op_type == "GridSample" for node in program.model_proto.graph.node)
        False
    """
    if not isinstance(args, tuple):
        raise TypeError(f"args: expected a tuple of example inputs, got {type(args).__name__}")
    file = None if path is None else as_path("path", path)
    with needs_packages("onnx", "onnxscript"):
        import onnx

    check_choice("form", form, FORMS)
    if plugin_version not in ("1", "2"):
        raise ValueError(f"plugin_version: expected '1' or '2', got {plugin_version!r}")
    for name, instead in _OTHERS.items():
        if name in options:
            raise ValueError(f"{name}: expected none, got {options[name]!r}; {instead}")
    if isinstance(model, torch.export.ExportedProgram):
        if dynamic_shapes is not None:
            raise ValueError("dynamic_shapes: an exported program has its own, expected None")
    else:
        check_module("model", model)
        if model.training:
            raise ValueError(
                "model: expected one in evaluation mode, got one in training: model.eval()"
            )
        model = torch.export.export(
            model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )
    model = _decomposed(model, form, plugin_version, {torch.ops.aten.clamp.default: _clamp})
    options = {"opset_version": OPSET} | options
    program = torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, **options)
    assert program is not None
    proto = program.model_proto
    try:
        if proto.ByteSize() < _LARGEST_PROTO:
            onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RuntimeError(
            "the exported model is not valid ONNX, which is a fault of the exporter or its "
            f"optimizer; try optimize=False, or another version of onnxscript: {error}"
        ) from error
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    opset = versions.get("", versions.get("ai.onnx"))
    if options["opset_version"] not in (opset, None):  # the exporter only logs it
        raise RuntimeError(
            f"opset_version: expected {options['opset_version']}, got a model of {opset}, which "
            f"the exporter could not convert (its log has the reason); pass {opset}"
        )
    if file is not None:
        _save(program, file)
    return program


def _save(program: torch.onnx.ONNXProgram, file: Path) -> None:
    """Write beside the file, then rename: what was there stays until all is written.

    Raises:
        OSError: it cannot be written; the message names it.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f"{file.name}.", dir=file.parent) as folder:
            program.save(Path(folder) / file.name)
            # Large weights are in another file, which must be there before the one that names it.
            for part in sorted(Path(folder).iterdir(), key=lambda part: part.name == file.name):
                os.replace(part, file.with_name(part.name))
    except OSError as error:
        raise OSError(f"{file}: cannot be written: {error.strerror or error}") from error


def decompose(
    program: torch.export.ExportedProgram, form: str = "gather"
) -> torch.export.ExportedProgram:
    """An exported program with this package's operators in PyTorch's own.

    For exporters that take an ``ExportedProgram``: ``coremltools.convert``, ExecuTorch's
    ``to_edge_transform_and_lower``, ``openvino.convert_model``. Their models take tensors alone:
    pass a module that holds the level sizes. In the form "gather" no tensor of bilinear sampling
    has more than five dimensions, the most that Core ML takes. Sampling locations that another
    library's layer makes with six remain.

    Args:
        program: what ``torch.export.export`` made of a model in evaluation mode.
        form: ``"gather"`` or ``"grid_sample"``.

    Raises:
        TypeError: no exported program.
        ValueError: no such form, or one that needs level sizes as numbers, see :func:`export`.

    Example:
        >>> import torch
        >>> from deform_attn import MSDeformAttn
        >>> from deform_attn.integrations.onnx import decompose
        >>> layer = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=3).eval()
        >>> shapes = [(8, 6), (4, 3)]
        >>> inputs = torch.rand(2, 5, 32), torch.rand(2, 5, 2, 2), torch.rand(2, 60, 32), shapes
        >>> program = decompose(torch.export.export(layer, inputs))
        >>> values = [node.meta.get("val") for node in program.graph.nodes]
        >>> max(value.dim() for value in values if isinstance(value, torch.Tensor))
        5
    """
    if not isinstance(program, torch.export.ExportedProgram):
        raise TypeError(
            "program: expected what torch.export.export makes of a model, "
            f"got {type(program).__name__}"
        )
    if form == "tensorrt":
        raise ValueError("form: expected gather or grid_sample, got 'tensorrt', a node of ONNX")
    return _decomposed(program, form, "", {})


def _decomposed(
    program: torch.export.ExportedProgram,
    form: str,
    plugin_version: str,
    more: dict[torch._ops.OperatorBase, Callable[..., Any]],
) -> torch.export.ExportedProgram:
    with torch.no_grad():
        table = decompositions(form, plugin_version=plugin_version) | more
        program = program.run_decompositions(table)
    _merge_views(program.graph_module)
    return program


def _merge_views(module: torch.fx.GraphModule) -> None:
    """Replace a view of a view by one: layers shape offsets and weights to six dimensions first."""
    view, detach = torch.ops.aten.view.default, torch.ops.aten.detach.default
    for node in module.graph.nodes:
        if node.target is detach:  # torch 2.15 keeps them, between two views
            node.replace_all_uses_with(node.args[0])
        elif node.target is view:
            while node.args[0].target is view:
                node.replace_input_with(node.args[0], node.args[0].args[0])
    module.graph.eliminate_dead_code()
    module.recompile()


def decompositions(
    form: str, *, plugin_version: str = "2"
) -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """The table that :func:`export` passes to ``torch.export.ExportedProgram.run_decompositions``.

    For other exporters. The functions compute the same as the operators; those of "tensorrt" only
    return the right shapes.

    Raises:
        ValueError: no such form.

    Example:
        >>> from deform_attn.integrations.onnx import decompositions
        >>> len(decompositions("gather"))
        6
    """
    check_choice("form", form, FORMS)

    def attention(operands: Operands) -> Tensor:
        if form == "gather":
            return gathered(operands)
        if form == "tensorrt":
            return _plugin(operands, plugin_version)
        return _grid_sampled(operands)

    def decomposed(
        record: type[AnyOperands], form: Callable[[Any], Tensor]
    ) -> Callable[..., Tensor]:
        return lambda *inputs, **kwargs: form(record(*inputs, **kwargs))

    forms = {
        "ms_deform_attn": decomposed(Operands, attention),
        "ms_deform_attn_fused": decomposed(FusedOperands, lambda call: attention(unfused(call))),
    }
    table: dict[torch._ops.OperatorBase, Callable[..., Any]] = {
        torch.ops.deform_attn.ms_deform_attn_discrete.default: decomposed(
            DiscreteOperands, discrete
        )
    }
    for backend in BACKENDS.values():
        suffix = "" if backend.name == "compiled" else f"_{backend.name}"
        for name, form_of_operator in forms.items():
            operator = getattr(torch.ops.deform_attn, name + suffix, None)
            if operator is not None:
                table[operator.default] = form_of_operator
    return table


def _clamp(x: Tensor, low: Any = None, high: Any = None) -> Any:
    """A clamp by comparisons. NaN stays NaN.

    The optimizer merges two bounds into a Clip and names their constants after ``x``. If the same
    tensor is clamped twice, both use the same names and the model is invalid.
    """
    if low is None or high is None:
        return NotImplemented
    x = torch.where(x < low, low, x)
    return torch.where(x > high, high, x)


def _grid_sampled(operands: Operands) -> Tensor:
    """The reference backend's computation, with level sizes as constants of the graph."""
    listed = operands.level_sizes is not None
    if not listed or operands.level_start_index is not None:
        name = "level_start_index" if listed else "spatial_shapes"
        raise ValueError(
            f"{name}: expected {'None' if listed else 'a list of (height, width)'} for form "
            "'grid_sample', which splits value into levels, got a tensor; the forms 'gather' "
            "and 'tensorrt' support it"
        )
    return reference.sample(operands)


def _plugin(operands: Operands, version: str) -> Tensor:
    """A node of TensorRT's plugin: no attributes, five inputs of these shapes.

    The plugin has one floating dtype, so all are float32, since locations must be; level sizes and
    starts are int32. TensorRT's parser finds a plugin by the node's type and the attributes below;
    onnxruntime's TensorRT provider has plugins in the domain "trt.plugins". Sources: the plugin's
    README in NVIDIA/TensorRT, FallbackPluginImporter in onnx/onnx-tensorrt.
    """
    value, shapes, starts, locations, weights, _, num_points, _ = filled(operands)
    B, _, M, D = value.shape
    Q, sizes = locations.shape[1], level_pairs(operands)
    if num_points is not None:  # equal numbers of points: the added ones have weight 0
        counts = list(num_points)
        most = max(counts)
        locations, weights = (
            torch.stack([F.pad(level, (*after, 0, most - level.shape[3])) for level in levels], 3)
            for levels, after in (
                (locations.split(counts, 3), (0, 0)),
                (weights.split(counts, 3), ()),
            )
        )
    if shapes is None:
        sides = [value.new_full((1,), side, dtype=torch.int64) for size in sizes for side in size]
        shapes = torch.cat(sides).reshape(-1, 2)
    if starts is None:
        rows = shapes[:, 0] * shapes[:, 1]  # ReduceProd differs between opsets
        starts = rows.cumsum(0) - rows
    output: Tensor = torch.onnx.ops.symbolic(
        "trt.plugins::MultiscaleDeformableAttnPlugin_TRT",
        (
            value.float(),
            shapes.to(value.device, torch.int32),
            starts.to(value.device, torch.int32),
            locations.float(),
            weights.float(),
        ),
        {"plugin_version": version, "plugin_namespace": ""},
        dtype=torch.float32,
        shape=(B, Q, M, D),
        version=1,
    )
    return output.reshape(B, Q, M * D).to(value.dtype)
