"""The named workloads, and how inputs are drawn for them.

WORKLOADS  the shapes of models that use the op, for every benchmark and performance test
draw       inputs of a workload: seeded, the same numbers on every device
scaled     a workload with smaller maps and the same pattern of access
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

MODEL_800x1333 = ((100, 167), (50, 84), (25, 42), (13, 21))
MODEL_640 = ((80, 80), (40, 40), (20, 20))


@dataclasses.dataclass(frozen=True)
class Workload:
    """The sizes of a call."""

    name: str
    levels: tuple[tuple[int, int], ...]  # (height, width)
    queries: int
    heads: int
    head_dim: int
    points: tuple[int, ...]  # of each level
    encoder: bool = False  # a query for every pixel of every level

    @property
    def rows(self) -> int:
        """S: pixels of all levels."""
        return sum(height * width for height, width in self.levels)

    @property
    def num_points(self) -> list[int] | None:
        """Counts of the flat layout, None where every level has the same count."""
        return None if len(set(self.points)) == 1 else list(self.points)

    @property
    def samples(self) -> int:
        """Sampling points of one image."""
        return self.queries * self.heads * sum(self.points)


def _encoder(name: str, levels: tuple[tuple[int, int], ...]) -> Workload:
    rows = sum(height * width for height, width in levels)
    return Workload(name, levels, rows, 8, 32, (4,) * len(levels), encoder=True)


def _decoder(name: str, levels: tuple[tuple[int, int], ...], queries: int) -> Workload:
    return Workload(name, levels, queries, 8, 32, (4,) * len(levels))


WORKLOADS = {
    workload.name: workload
    for workload in (
        _decoder("rtdetr_decoder_640", MODEL_640, 300),
        _encoder("deformable_detr_encoder_800x1333", MODEL_800x1333),
        _decoder("deformable_detr_decoder_800x1333", MODEL_800x1333, 300),
        _decoder("dino_decoder_900q", MODEL_800x1333, 900),
        _encoder("mask2former_pixel_decoder_1024", ((128, 128), (64, 64), (32, 32))),
        Workload("rfdetr_decoder_560", ((40, 40),), 300, 16, 16, (2,)),
        # training: 13 groups of 300 queries
        Workload("rfdetr_train", ((40, 40),), 3900, 16, 16, (2,)),
        Workload("dfine_decoder_640", MODEL_640, 300, 8, 32, (3, 6, 3)),
    )
}


def scaled(workload: Workload, factor: float) -> Workload:
    """The workload with each side of each map times `factor` (at least 1 pixel).

    Offsets are drawn in pixels, so the distance between the points of a query does not change. For
    counting and for tests.
    """
    levels = tuple(
        (max(1, round(height * factor)), max(1, round(width * factor)))
        for height, width in workload.levels
    )
    rows = sum(height * width for height, width in levels)
    queries = rows if workload.encoder else max(1, round(workload.queries * factor))
    name = f"{workload.name}*{factor:g}"
    return dataclasses.replace(workload, name=name, levels=levels, queries=queries)


@dataclasses.dataclass(frozen=True)
class WorkloadInputs:
    """The tensors of a call, and the gradient that its backward starts from."""

    value: Tensor  # [B, S, M, D]
    spatial_shapes: Tensor  # [L, 2] (height, width)
    level_start_index: Tensor  # [L]
    sampling_locations: Tensor  # [B, Q, M, L, P, 2], or [B, Q, M, K, 2] with num_points
    attention_weights: Tensor  # [B, Q, M, L, P], or [B, Q, M, K]
    grad_output: Tensor  # [B, Q, M * D]
    num_points: list[int] | None

    @property
    def differentiable(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors that have gradients."""
        return self.value, self.sampling_locations, self.attention_weights

    def map(self, change: Callable[[Tensor], Tensor]) -> WorkloadInputs:
        """The same call with `change` applied to the three tensors that have gradients."""
        value, locations, weights = (change(tensor) for tensor in self.differentiable)
        return dataclasses.replace(
            self, value=value, sampling_locations=locations, attention_weights=weights
        )


def draw(
    workload: Workload,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> WorkloadInputs:
    """Inputs like those of a model: sampling points a few pixels away from their reference points.

    Encoders have a reference point at the centre of each pixel, in the order of the maps; decoders
    have boxes, several per object. Each head has a direction, and point p lies p + 1 steps away in
    it (the initialisation of the paper), plus random noise of one step in each axis, as after
    training. A step is a pixel of the level for encoders, a fraction of the box for decoders.
    Weights are a softmax over all points of a head. `value` and the weights have `dtype`, locations
    float32 (float64 with a float64 value).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heads, counts = workload.heads, torch.tensor(workload.points)
    total = int(counts.sum())
    maps = torch.tensor(workload.levels).flip(-1)  # [L, 2] (width, height)
    if workload.encoder:
        centers = _pixel_centers(workload).expand(batch, -1, -1)  # [B, Q, 2]
        step = (1 / maps).repeat_interleave(counts, 0)  # [K, 2]: one pixel
    else:
        centers, sizes = _boxes(batch, workload.queries, generator)
        reach = counts.repeat_interleave(counts)[:, None]  # [K, 1]
        step = sizes[:, :, None, None, :] / (2 * reach)  # [B, Q, 1, K, 2]
    angle = torch.arange(heads) * (2 * math.pi / heads)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)  # [M, 2]
    ring = torch.cat([torch.arange(1, count + 1) for count in workload.points])  # [K]
    offsets = direction[:, None] * ring[:, None] + normal(batch, workload.queries, heads, total, 2)
    locations = centers[:, :, None, None, :] + offsets * step  # [B, Q, M, K, 2]
    weights = normal(batch, workload.queries, heads, total).softmax(-1)
    if workload.num_points is None:
        split = (len(workload.levels), workload.points[0])
        locations, weights = locations.unflatten(3, split), weights.unflatten(3, split)

    areas = torch.tensor([0, *(height * width for height, width in workload.levels)])
    acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    width = heads * workload.head_dim
    return WorkloadInputs(
        value=normal(batch, workload.rows, heads, workload.head_dim).to(device, dtype),
        spatial_shapes=torch.tensor(workload.levels, device=device),
        level_start_index=areas.cumsum(0)[:-1].to(device),
        sampling_locations=locations.to(device, acc_dtype),
        attention_weights=weights.to(device, dtype),
        grad_output=normal(batch, workload.queries, width).to(device, dtype),
        num_points=workload.num_points,
    )


def _pixel_centers(workload: Workload) -> Tensor:
    """[Q, 2]: (x, y) of every pixel of every level."""
    grids = []
    for height, width in workload.levels:
        y, x = torch.meshgrid(
            (torch.arange(height) + 0.5) / height,
            (torch.arange(width) + 0.5) / width,
            indexing="ij",
        )
        grids.append(torch.stack([x, y], -1).flatten(0, 1))
    return torch.cat(grids)


def _boxes(batch: int, queries: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres and sizes [B, Q, 2] of boxes: about ten queries per object, in random order."""
    objects = max(1, queries // 10)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    centers = 0.05 + 0.9 * uniform(batch, objects, 2)
    sizes = 0.03 * 10 ** uniform(batch, objects, 2)  # a side is 0.03 to 0.3 of the image
    owner = torch.randint(objects, (batch, queries, 1), generator=generator).expand(-1, -1, 2)
    jitter = torch.randn((batch, queries, 2), generator=generator)
    sizes = sizes.gather(1, owner)
    return centers.gather(1, owner) + 0.1 * sizes * jitter, sizes
