"""The contestants of a benchmark: backends of deform_attn and other implementations of the op.

PEERS maps a name to a loader. `loader(workload, device)` returns `op(inputs) -> output`, or raises
Missing with the reason why the contestant cannot take part. Implementations that take one dtype for
all tensors get 16-bit inputs converted to float32, and their output is converted back: rounding the
locations to 16 bits instead would move the samples.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import deform_attn
from benchmarks.op.workloads import Workload, WorkloadInputs

Op = Callable[[WorkloadInputs], Tensor]
Loader = Callable[[Workload, str], Op]

BASELINE = "grid_sample"
OURS = ("compiled", "triton", "reference")
BASELINE_KERNEL = "baseline kernel"  # CUDA, one thread per channel as in 2020, written here
# The CUDA kernels by name, with their BackwardAlgorithm; a call without a name chooses one.
KERNELS = {
    BASELINE_KERNEL: "baseline",
    "compiled, scatter": "scatter",
    "compiled, fixed": "fixed",
}


class Missing(Exception):
    """Why a contestant cannot take part."""


def _backend(name: str) -> Loader:
    def load(workload: Workload, device: str) -> Op:
        reason = deform_attn.BACKENDS[name].why_not(device, torch.float32)
        if reason is not None:
            raise Missing(reason)

        def op(x: WorkloadInputs) -> Tensor:
            return deform_attn.ms_deform_attn(
                x.value,
                x.spatial_shapes,
                x.level_start_index,
                x.sampling_locations,
                x.attention_weights,
                num_points=x.num_points,
                backend=name,
            )

        return op

    return load


def _kernels(algorithm: str) -> Loader:
    def load(workload: Workload, device: str) -> Op:
        _only_cuda(device, "CUDA kernels")
        reason = deform_attn.BACKENDS["compiled"].why_not(device, torch.float32)
        if reason is not None:
            raise Missing(reason)
        ops = torch.ops.deform_attn

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, num_points: list[int] | None, *tensors: Tensor) -> Tensor:
                ctx.num_points = num_points
                ctx.save_for_backward(*tensors)
                output: Tensor = ops.ms_deform_attn_by(algorithm, *tensors, None, num_points)
                return output

            @staticmethod
            def backward(ctx: Any, grad_output: Tensor) -> Any:
                grad_value, grad_locations, grad_weights = ops.ms_deform_attn_by_backward(
                    algorithm, grad_output.contiguous(), *ctx.saved_tensors, None, ctx.num_points
                )
                return None, grad_value, None, None, grad_locations, grad_weights

        def op(x: WorkloadInputs) -> Tensor:
            levels = x.spatial_shapes, x.level_start_index
            output: Tensor = Function.apply(
                x.num_points, x.value, *levels, x.sampling_locations, x.attention_weights
            )
            return output

        return op

    return load


def _grid_sample(workload: Workload, device: str) -> Op:
    """What frameworks ship in pure PyTorch, under PyTorch's own autograd.

    The `reference` backend is the same formula with guards for bad input, and computes its forward
    again in backward; this one does neither, so that it is a fair baseline.
    """
    levels, counts = list(workload.levels), list(workload.points)
    heads, dim = workload.heads, workload.head_dim

    def op(x: WorkloadInputs) -> Tensor:
        value, locations, weights = _in_one_dtype(x)
        batch, queries = locations.shape[:2]
        grids = (2 * locations.reshape(batch, queries, heads, -1, 2) - 1).split(counts, 3)
        maps = value.split([height * width for height, width in levels], 1)
        samples = [
            F.grid_sample(
                level.permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width),
                grid.transpose(1, 2).flatten(0, 1),
                align_corners=False,
            )
            for level, grid, (height, width) in zip(maps, grids, levels)
        ]  # a level each: [B * M, D, Q, P]
        weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
        output = (torch.cat(samples, -1) * weights).sum(-1)  # [B * M, D, Q]
        return output.view(batch, -1, queries).transpose(1, 2).contiguous().to(x.value.dtype)

    return op


def _torch_ms_deform_attn(workload: Workload, device: str) -> Op:
    module = _import("torch_ms_deform_attn")
    _equal_points(workload)

    def op(x: WorkloadInputs) -> Tensor:
        value, locations, weights = _in_one_dtype(x)
        output = module.ms_deform_attn(
            value, x.spatial_shapes, x.level_start_index, locations, weights
        )
        return _like(output, x)

    return op


def _mmcv(workload: Workload, device: str) -> Op:
    _only_cuda(device, "its CPU path is the grid_sample formula")
    module = _import("mmcv.ops.multi_scale_deform_attn")
    _equal_points(workload)
    return _steps(module.MultiScaleDeformableAttnFunction.apply)


def _original_extension(workload: Workload, device: str) -> Op:
    _only_cuda(device, "its CPU functions only raise 'Not implemented'")
    module = _import("MultiScaleDeformableAttention")
    _equal_points(workload)
    return _steps(_differentiable(module))


def _deformops(workload: Workload, device: str) -> Op:
    _only_cuda(device, "its CPU path is the grid_sample formula")
    function = _attribute(_import("deformops"), "deform2d_multiscale")
    _equal_points(workload)

    def op(x: WorkloadInputs) -> Tensor:
        value, locations, weights = _in_one_dtype(x)
        output = function(value, x.spatial_shapes, x.level_start_index, locations, weights)
        return _like(output, x)

    return op


def _msda_triton(workload: Workload, device: str) -> Op:
    _only_cuda(device, "Triton kernels")
    function = _attribute(_import("msda_triton"), "multi_scale_deformable_attention")
    _equal_points(workload)

    def op(x: WorkloadInputs) -> Tensor:
        value, locations, weights = _in_one_dtype(x)
        return _like(function(value, x.spatial_shapes, None, locations, weights), x)

    return op


def _hub_kernel(workload: Workload, device: str) -> Op:
    _only_cuda(device, "the hub has no build for it")
    kernels = _import("kernels")
    try:
        module = kernels.get_kernel("kernels-community/deformable-detr")
    except Exception as error:  # a failed download raises many types
        raise Missing(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    _equal_points(workload)
    return _steps(_differentiable(module))


PEERS: dict[str, Loader] = {
    **{name: _backend(name) for name in OURS},
    **{name: _kernels(algorithm) for name, algorithm in KERNELS.items()},
    BASELINE: _grid_sample,
    "torch-ms-deform-attn": _torch_ms_deform_attn,
    "mmcv": _mmcv,
    "original extension": _original_extension,
    "deformops": _deformops,
    "msda-triton": _msda_triton,
    "hub kernel": _hub_kernel,
}


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"not installed ({error})") from error
    except Exception as error:  # a binary for another PyTorch, a missing driver, ...
        raise Missing(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _attribute(module: ModuleType, name: str) -> Callable[..., Tensor]:
    function = getattr(module, name, None)
    if function is None:
        raise Missing(f"this {module.__name__} has no {name}")
    return function


def _only_cuda(device: str, reason: str) -> None:
    if device != "cuda":
        raise Missing(f"does not run on {device}: {reason}")


def _equal_points(workload: Workload) -> None:
    if workload.num_points is not None:
        raise Missing("requires the same number of points in each level")


def _in_one_dtype(x: WorkloadInputs) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.sampling_locations.dtype
    return x.value.to(dtype), x.sampling_locations, x.attention_weights.to(dtype)


def _like(output: Tensor, x: WorkloadInputs) -> Tensor:
    return output.flatten(2).to(x.value.dtype) if output.dim() > 3 else output.to(x.value.dtype)


def _steps(function: Callable[..., Tensor]) -> Op:
    """An op of the 2020 signature, which takes the batch in steps that must divide it."""

    def op(x: WorkloadInputs) -> Tensor:
        value, locations, weights = _in_one_dtype(x)
        output = function(
            value, x.spatial_shapes, x.level_start_index, locations, weights, len(value)
        )
        return _like(output, x)

    return op


def _differentiable(module: Any) -> Callable[..., Tensor]:
    """Autograd over a module with ms_deform_attn_forward and ms_deform_attn_backward."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            *tensors, ctx.step = inputs
            ctx.save_for_backward(*tensors)
            output: Tensor = module.ms_deform_attn_forward(*tensors, ctx.step)
            return output

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> Any:
            grad_value, grad_locations, grad_weights = module.ms_deform_attn_backward(
                *ctx.saved_tensors, grad_output.contiguous(), ctx.step
            )
            return grad_value, None, None, grad_locations, grad_weights, None

    return Function.apply
