"""ONNX through PyTorch's exporter: the operator as standard nodes, or as TensorRT's plugin.

The exporter knows nothing of this package's operators. :func:`export` traces a model, in which
each is one node, and replaces the nodes by one of three forms:

============= ================================ ==================================================
form          becomes                          for
============= ================================ ==================================================
"grid_sample" a GridSample a level (opset 20)  onnxruntime, OpenVINO, ...
"gather"      Gather and MatMul a level        TensorRT, which is reported to compile GridSample
                                               of such models wrongly (NVIDIA/TensorRT #4813);
                                               level sizes that are inputs of the graph
"tensorrt"    a MultiscaleDeformableAttn-      TensorRT with its plugins, the fastest there
              Plugin_TRT node
============= ================================ ==================================================

All three take points per level that differ. Discrete sampling (RT-DETRv2) is no operator of this
package: it is exported as gathered pixels in every form.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deform_attn.backends import BACKENDS
from deform_attn.checks import acc_dtype
from deform_attn.composite import fused_points
from deform_attn.levels import points_per_level

__all__ = ["FORMS", "decompositions", "export"]

#: The forms that the operator can take, see above.
FORMS = ("grid_sample", "gather", "tensorrt")

OPSET = 20  # the first with GridSample as PyTorch computes it


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

    Needs the packages ``onnx`` and ``onnxscript``. A model of transformers is made to call these
    operators by :func:`deform_attn.integrations.transformers.accelerate`.

    Args:
        model: a module in evaluation mode, or what ``torch.export.export`` made of one.
        args: example inputs.
        path: where to write; None: only return the program.
        form: what the operator becomes: ``"grid_sample"``, ``"gather"`` or ``"tensorrt"``.
        kwargs: example inputs by name.
        dynamic_shapes: as ``torch.export.export`` takes them: sizes that may differ from those of
            the example, say the batch.
        plugin_version: of ``"tensorrt"``: ``"1"`` for TensorRT before 10.11, which has no other.
        options: more for ``torch.onnx.export``: ``input_names``, ``optimize``, ...

    Returns:
        The exported program; ``program.model_proto`` is the ONNX model.

    Raises:
        ValueError: a model in training mode; no such form; or one that needs level sizes as
            numbers where the model has them in a tensor: pass ``spatial_shapes`` as a list, or take
            ``"gather"`` or ``"tensorrt"``.
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
    table = decompositions(form, plugin_version=plugin_version)
    if isinstance(model, torch.export.ExportedProgram):
        if dynamic_shapes is not None:
            raise ValueError("dynamic_shapes: an exported program has its own, expected None")
    elif model.training:
        raise ValueError(
            "model: expected one in evaluation mode, got one in training: model.eval()"
        )
    else:
        model = torch.export.export(
            model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )
    with torch.no_grad():
        model = model.run_decompositions(table)
    options = {"opset_version": OPSET} | options
    program = torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, **options)
    assert program is not None
    if path is not None:
        program.save(Path(path))
    return program


def decompositions(
    form: str, *, plugin_version: str = "2"
) -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """What :func:`export` gives to ``torch.export.ExportedProgram.run_decompositions``.

    For exporters of your own. The functions compute what the operators do, "tensorrt" but shapes.

    Raises:
        ValueError: no such form.

    Example:
        >>> from deform_attn.integrations.onnx import decompositions
        >>> len(decompositions("gather"))
        5
    """
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")

    def attention(
        value: Tensor,
        spatial_shapes: Tensor | None,
        level_start_index: Tensor | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        level_sizes: Sequence[int] | None,
        num_points: Sequence[int] | None,
    ) -> Tensor:
        inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
        if form == "gather":
            return _gathered(*inputs, level_sizes, num_points)
        if form == "tensorrt":
            return _plugin(*inputs, level_sizes, num_points, plugin_version)
        return _grid_sampled(*inputs, level_sizes, num_points)

    def layer(
        value: Tensor,
        spatial_shapes: Tensor | None,
        level_start_index: Tensor | None,
        reference_points: Tensor,
        sampling_offsets: Tensor,
        attention_logits: Tensor,
        level_sizes: Sequence[int] | None,
        num_points: Sequence[int] | None,
        offset_scale: float,
    ) -> Tensor:
        locations, weights = fused_points(
            _sizes(spatial_shapes, level_sizes),
            *(reference_points, sampling_offsets, attention_logits, num_points, offset_scale),
        )
        return attention(
            *(value, spatial_shapes, level_start_index, locations, weights),
            *(level_sizes, num_points),
        )

    table: dict[torch._ops.OperatorBase, Callable[..., Any]] = {}
    for backend in BACKENDS.values():
        suffix = "" if backend.name == "compiled" else f"_{backend.name}"
        table[getattr(torch.ops.deform_attn, f"ms_deform_attn{suffix}").default] = attention
        if backend.call_fused is not None:
            table[getattr(torch.ops.deform_attn, f"ms_deform_attn_fused{suffix}").default] = layer
    return table


def _grid_sampled(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    level_sizes: Sequence[int] | None,
    num_points: Sequence[int] | None,
) -> Tensor:
    """What the reference backend computes, without what a graph cannot hold: no sum in place."""
    if level_sizes is None or level_start_index is not None:
        name = "level_start_index" if level_sizes is not None else "spatial_shapes"
        expected = "None" if level_sizes is not None else "a list of (height, width)"
        raise ValueError(
            f"{name}: expected {expected} for form 'grid_sample', which cuts the levels apart, got "
            "a tensor; the forms 'gather' and 'tensorrt' take it"
        )
    real = acc_dtype(value.dtype)
    B, _, M, D = value.shape
    Q = sampling_locations.shape[1]
    sizes = _sizes(spatial_shapes, level_sizes)
    counts = points_per_level(sampling_locations, len(sizes), num_points)
    near = ((sampling_locations >= -1) & (sampling_locations <= 2)).all(-1, keepdim=True)
    grids = 2 * torch.where(near, sampling_locations, -1) - 1
    grids = grids.reshape(B, Q, M, sum(counts), 2).transpose(1, 2).split(counts, 3)
    weights = attention_weights.to(real).reshape(B, Q, M, sum(counts)).transpose(1, 2)
    rows = value.to(real).permute(0, 2, 3, 1)  # [B, M, D, S]
    output = rows.new_zeros((B, M, D, Q))
    start = 0
    for (height, width), grid, weight in zip(sizes, grids, weights.split(counts, 3)):
        image = rows[..., start : start + height * width].reshape(B * M, D, height, width)
        start = start + height * width
        pixels = F.grid_sample(image, grid.flatten(0, 1), align_corners=False)  # [B * M, D, Q, P]
        output = output + (pixels.unflatten(0, (B, M)) * weight[:, :, None]).sum(-1)
    return output.flatten(1, 2).transpose(1, 2).to(value.dtype)


def _gathered(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    level_sizes: Sequence[int] | None,
    num_points: Sequence[int] | None,
) -> Tensor:
    """Rows of D numbers from one list of all pixels, times their shares of the bilinear weights.

    In float32 where the formula that derivatives come from takes float64, which TensorRT has not:
    the side of a knot may be wrong, and makes no difference to a sum that is continuous there.
    """
    real = acc_dtype(value.dtype)
    B, S, M, D = value.shape
    Q = sampling_locations.shape[1]
    sizes = _sizes(spatial_shapes, level_sizes)
    counts = points_per_level(sampling_locations, len(sizes), num_points)
    nothing = B * S * M  # a row of zeros, for what is off the map: no pixel's NaN gets through
    rows = value.to(real).reshape(nothing, D)
    rows = torch.cat((rows, rows.new_zeros((1, D))))
    image = torch.arange(B, device=value.device)[:, None, None, None] * S
    head = torch.arange(M, device=value.device)[:, None]
    locations = sampling_locations.reshape(B, Q, M, sum(counts), 2).split(counts, 3)
    weights = attention_weights.to(real).reshape(B, Q, M, sum(counts)).split(counts, 3)
    output = rows.new_zeros((B, Q, M, 1, D))
    end: Any = 0
    for level, (location, weight) in enumerate(zip(locations, weights)):
        count = 4 * counts[level]
        height, width = sizes[level]
        start = end if level_start_index is None else level_start_index[level].to(value.device)
        end = start + height * width
        near = ((location >= -1) & (location <= 2)).all(-1, keepdim=True)
        x, y = torch.where(near, location, -1).unbind(-1)  # [B, Q, M, P]; NaN is nowhere
        x, y = x * width - 0.5, y * height - 0.5
        left, upper = x.floor(), y.floor()
        right_share, lower_share = x - left, y - upper
        columns = torch.stack((left, left + 1, left, left + 1), -1)  # [B, Q, M, P, 4]
        lines = torch.stack((upper, upper, upper + 1, upper + 1), -1)
        share = torch.stack((1 - right_share, right_share) * 2, -1)
        share = share * torch.stack((*(1 - lower_share,) * 2, *(lower_share,) * 2), -1)
        on_map = (columns >= 0) & (columns < width) & (lines >= 0) & (lines < height)
        pixel = start + lines.long() * width + columns.long()
        row = torch.where(on_map, (image[..., None] + pixel) * M + head[..., None], nothing)
        pixels = rows.index_select(0, row.reshape(-1)).reshape(B, Q, M, count, D)
        share = (share * weight[..., None]).reshape(B, Q, M, 1, count)
        output = output + share @ pixels
    return output.reshape(B, Q, M * D).to(value.dtype)


def _plugin(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    level_sizes: Sequence[int] | None,
    num_points: Sequence[int] | None,
    version: str,
) -> Tensor:
    """TensorRT's plugin of that name: no attributes, five inputs of these shapes.

    Its floats are all of one dtype, so all are float32, as locations have to be; level sizes and
    starts are int32. Its parser finds a plugin by the node's type and the attributes here;
    onnxruntime's TensorRT provider has plugins in the domain "trt.plugins". Sources: the plugin's
    README in NVIDIA/TensorRT, FallbackPluginImporter in onnx/onnx-tensorrt.
    """
    B, S, M, D = value.shape
    Q = sampling_locations.shape[1]
    sizes = _sizes(spatial_shapes, level_sizes)
    if num_points is not None:  # equal numbers of points: the missing ones weigh nothing
        counts = points_per_level(sampling_locations, len(sizes), num_points)
        most = max(counts)
        sampling_locations, attention_weights = (
            torch.stack([F.pad(level, (*after, 0, most - level.shape[3])) for level in levels], 3)
            for levels, after in (
                (sampling_locations.split(counts, 3), (0, 0)),
                (attention_weights.split(counts, 3), ()),
            )
        )
    shapes = spatial_shapes
    if shapes is None:
        sides = [value.new_full((1,), side, dtype=torch.int64) for size in sizes for side in size]
        shapes = torch.cat(sides).reshape(-1, 2)
    starts = level_start_index
    if starts is None:
        rows = shapes.prod(-1)
        starts = rows.cumsum(0) - rows
    output: Tensor = torch.onnx.ops.symbolic(
        "trt.plugins::MultiscaleDeformableAttnPlugin_TRT",
        (
            value.float(),
            shapes.to(value.device, torch.int32),
            starts.to(value.device, torch.int32),
            sampling_locations.float(),
            attention_weights.float(),
        ),
        {"plugin_version": version, "plugin_namespace": ""},
        dtype=torch.float32,
        shape=(B, Q, M, D),
        version=1,
    )
    return output.reshape(B, Q, M * D).to(value.dtype)


def _sizes(spatial_shapes: Tensor | None, level_sizes: Sequence[int] | None) -> Any:
    """(height, width) by level: numbers, or a tensor that the graph computes."""
    if level_sizes is None:
        return spatial_shapes
    return list(zip(level_sizes[::2], level_sizes[1::2]))
