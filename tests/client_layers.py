"""Layers with the structure and the signatures of other libraries' deformable attention.

Written from the signatures; each layer takes a query ``[B, Q, C]`` and a memory ``[B, S, C]``. They
are in a module of their own because pickles and replaced globals need one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

SHAPES = [(4, 7), (2, 3)]  # wide: discrete sampling clamps x and y apart
S = sum(height * width for height, width in SHAPES)
M, D, P = 2, 4, 2


def sampled(value: Tensor, shapes: Any, locations: Any, weights: Tensor, clamp: Any = None) -> Any:
    """The operator on value [B, S, M, D] and a list of locations [B, Q, M, P, 2], one a level.

    With ``clamp``, discrete sampling: "official" clamps both coordinates by the height.
    """
    B, _, M, D = value.shape
    Q = locations[0].shape[1]
    maps = value.split([height * width for height, width in shapes], 1)
    columns = []
    for (height, width), rows, points in zip(shapes, maps, locations):
        image = rows.permute(0, 2, 3, 1).reshape(B * M, D, height, width)
        grid = points.transpose(1, 2).flatten(0, 1)
        if clamp is None:
            columns.append(F.grid_sample(image, 2 * grid - 1, align_corners=False))
            continue
        x, y = (grid * torch.tensor([width, height]) + 0.5).long().unbind(-1)
        x = x.clamp(0, (height if clamp == "official" else width) - 1)
        index = (y.clamp(0, height - 1) * width + x).flatten(1)[:, None].expand(-1, D, -1)
        columns.append(image.flatten(2).gather(2, index).unflatten(2, grid.shape[1:3]))
    weights = weights.reshape(B, Q, M, -1).transpose(1, 2).flatten(0, 1)[:, None]
    output = (torch.cat(columns, -1) * weights).sum(-1)
    return output.unflatten(0, (B, M)).flatten(1, 2).transpose(1, 2)


class Layer(nn.Module):
    """Projections; ``operands`` gives value [B, S, M, D], locations and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.sampling_offsets = nn.Linear(M * D, M * len(SHAPES) * P * 2)
        self.attention_weights = nn.Linear(M * D, M * len(SHAPES) * P)
        self.value_proj = nn.Linear(M * D, M * D)

    def operands(self, query: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, Q, _ = query.shape
        value = self.value_proj(memory).reshape(B, -1, M, D)
        offsets = self.sampling_offsets(query).reshape(B, Q, M, len(SHAPES), P, 2)
        weights = self.attention_weights(query).reshape(B, Q, M, -1).softmax(-1)
        return value, 0.5 + 0.4 * offsets, weights.reshape(B, Q, M, len(SHAPES), P)


# mmcv and GroundingDINO: a global function and, on GPUs, an autograd Function --------------------


def multi_scale_deformable_attn_pytorch(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    return sampled(value, value_spatial_shapes, sampling_locations.unbind(3), attention_weights)


class MultiScaleDeformableAttnFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        raise RuntimeError("not compiled")


def renames(names: dict[str, str]) -> Callable[[Any], Any]:
    """A decorator as mmengine's, which renames deprecated arguments."""

    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def renamed(*args: Any, **kwargs: Any) -> Any:
            kwargs = {names.get(name, name): value for name, value in kwargs.items()}
            return function(*args, **kwargs)

        return renamed

    return decorate


class GroundingDINO(Layer):
    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        value, locations, weights = self.operands(query, memory)
        return multi_scale_deformable_attn_pytorch(value, torch.tensor(SHAPES), locations, weights)


class MMCV(Layer):
    @no_type_check
    @renames({"residual": "identity"})
    def forward(self, query: Tensor, memory: Tensor, identity: Any = None) -> Tensor:
        value, locations, weights = self.operands(query, memory)
        shapes = torch.tensor(SHAPES)
        if value.is_cuda:
            starts = torch.tensor([0, 28])
            return MultiScaleDeformableAttnFunction.apply(
                value, shapes, starts, locations, weights, 64
            )
        return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


class Derived(MMCV):
    """A subclass that calls the forward of its base."""

    def forward(self, query: Tensor, memory: Tensor, identity: Any = None) -> Tensor:
        return 2 * super().forward(query, memory, residual=identity)


# Deformable DETR, Mask2Former: the Function, and a function where it fails -----------------------


def ms_deform_attn_core_pytorch(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    return sampled(value, value_spatial_shapes, sampling_locations.unbind(3), attention_weights)


class Official(Layer):
    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        value, locations, weights = self.operands(query, memory)
        shapes, starts = torch.tensor(SHAPES), torch.tensor([0, 28])
        try:
            return MultiScaleDeformableAttnFunction.apply(
                value, shapes, starts, locations, weights, 64
            )
        except RuntimeError:
            return ms_deform_attn_core_pytorch(value, SHAPES, locations, weights)


# ultralytics: levels and points joined -----------------------------------------------------------


def ultralytics_core(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    points = sampling_locations.shape[3] // len(value_spatial_shapes)
    locations = sampling_locations.split(points, 3)
    return sampled(value, value_spatial_shapes, locations, attention_weights)


class Ultralytics(Layer):
    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        value, locations, weights = self.operands(query, memory)
        return ultralytics_core(value, SHAPES, locations.flatten(3, 4), weights.flatten(3))


# rfdetr and LW-DETR: rows last, sizes also as numbers, weights without levels --------------------


def rfdetr_core(
    value: Tensor,
    value_spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    value_spatial_shapes_hw: Any = None,
) -> Tensor:
    shapes = value_spatial_shapes_hw or value_spatial_shapes
    rows = value.permute(0, 3, 1, 2)
    return sampled(rows, shapes, sampling_locations.unbind(3), attention_weights)


class RFDETR(Layer):
    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        value, locations, weights = self.operands(query, memory)
        return rfdetr_core(
            value.permute(0, 2, 3, 1).contiguous(),
            torch.tensor(SHAPES),
            locations,
            weights.flatten(3),
            value_spatial_shapes_hw=SHAPES,
        )


# RT-DETRv2, D-FINE, DEIM: an attribute that holds a partial --------------------------------------


def deformable_attention_core_func_v2(
    value: Any,
    value_spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: list[int],
    method: str = "default",
) -> Tensor:
    """Takes a list of maps [B, M, D, H * W], or one value [B, S, M, D]."""
    if not isinstance(value, Tensor):
        value = torch.cat(list(value), -1).permute(0, 3, 1, 2)
    clamp = "official" if method == "discrete" else None
    locations = sampling_locations.split(num_points_list, 3)
    return sampled(value, value_spatial_shapes, locations, attention_weights, clamp)


class DFINE(Layer):
    core = staticmethod(deformable_attention_core_func_v2)
    method = "default"

    def __init__(self) -> None:
        super().__init__()
        self.ms_deformable_attn_core = functools.partial(self.core, method=self.method)

    def maps(self, value: Tensor) -> Any:
        return value.permute(0, 2, 3, 1).split([h * w for h, w in SHAPES], -1)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        value, locations, weights = self.operands(query, memory)
        return self.ms_deformable_attn_core(
            self.maps(value), SHAPES, locations.flatten(3, 4), weights.flatten(3), [P, P]
        )


class RTDETRv2(DFINE):
    def maps(self, value: Tensor) -> Any:
        return value


class Discrete(RTDETRv2):
    method = "discrete"


def gtr_core(
    value: Any,
    value_spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: list[int],
    method: str = "default",
    value_shape: str = "default",
) -> Tensor:
    """Takes a list of maps [B * M, D, H, W]."""
    heads = sampling_locations.shape[2]
    flat = [x.flatten(2).unflatten(0, (-1, heads)) for x in value]
    return deformable_attention_core_func_v2(
        flat, value_spatial_shapes, sampling_locations, attention_weights, num_points_list
    )


class GTR(DFINE):
    core = staticmethod(gtr_core)

    def maps(self, value: Tensor) -> Any:
        return [
            x.flatten(0, 1).unflatten(2, size).contiguous()
            for x, size in zip(super().maps(value), SHAPES)
        ]


# LibreYOLO: a slot that has no provider ----------------------------------------------------------


def maybe_ms_deform_attn(
    value: Tensor, spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Any:
    return None


class Slot(Layer):
    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        value, locations, weights = self.operands(query, memory)
        output = maybe_ms_deform_attn(value, torch.tensor(SHAPES), locations, weights)
        if output is not None:
            return output
        return ms_deform_attn_core_pytorch(value, SHAPES, locations, weights)


# What must not be replaced -----------------------------------------------------------------------


def deformable_core_that_differs(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    return 2 * ms_deform_attn_core_pytorch(
        value, value_spatial_shapes, sampling_locations, attention_weights
    )


class Differs(Layer):
    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        value, locations, weights = self.operands(query, memory)
        return deformable_core_that_differs(value, SHAPES, locations, weights)


class Hiding:
    """A decorator that is no function."""

    def __init__(self, function: Any) -> None:
        functools.update_wrapper(self, function)

    def __get__(self, module: Any, cls: Any) -> Any:
        return functools.partial(self.__wrapped__, module)  # type: ignore[attr-defined]


class Hidden(Layer):
    forward = Hiding(GroundingDINO.forward)  # type: ignore[assignment]
