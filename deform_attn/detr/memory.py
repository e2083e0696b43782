"""Feature maps as the memory that decoders attend to, with padding and positions of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def precise_dtype(x: Tensor) -> torch.dtype:
    """Dtype of positions beside features ``x``: float32, or float64 where features are float64."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class Memory:
    """Feature maps of all levels, flattened to one row per pixel.

    Attributes:
        features: ``[B, S, d_model]``.
        spatial_shapes: ``(height, width)`` of each level.
        padding_mask: bool ``[B, S]``, True for padding; None where there is none.
        pos: ``[B, S, d_model]``, added to the keys of dense attention.
        valid_ratios: ``[B, num_levels, (x, y)]``, the part of each level that is not padding;
            None: all of it.
    """

    features: Tensor
    spatial_shapes: list[tuple[int, int]]
    padding_mask: Tensor | None = None
    pos: Tensor | None = None
    valid_ratios: Tensor | None = None

    @staticmethod
    def of(maps: Sequence[Tensor], padding_masks: Sequence[Tensor] | None = None) -> Memory:
        """From maps ``[B, d_model, H, W]``, and bool masks ``[B, H, W]``, True for padding."""
        features, shapes = flatten(maps), [(x.shape[-2], x.shape[-1]) for x in maps]
        if padding_masks is None:
            return Memory(features, shapes)
        dtype = precise_dtype(features)
        return Memory(
            features,
            shapes,
            padding_mask=torch.cat([mask.flatten(1) for mask in padding_masks], 1),
            valid_ratios=torch.stack([valid_ratio(mask, dtype) for mask in padding_masks], 1),
        )

    def on_every_level(self, reference_points: Tensor) -> Tensor:
        """References ``[B, Q, 2 or 4]`` as fractions of each padded map.

        Returns:
            ``[B, Q, num_levels, 2 or 4]``; without padding ``[B, Q, 1, 2 or 4]``.
        """
        if self.valid_ratios is None:
            return reference_points[:, :, None]
        ratios = self.valid_ratios.repeat(1, 1, reference_points.shape[-1] // 2)
        return reference_points[:, :, None] * ratios[:, None]


def flatten(maps: Sequence[Tensor]) -> Tensor:
    """``[B, d, H, W]`` each to ``[B, S, d]``."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)


def resize_mask(padding_mask: Tensor, x: Tensor) -> Tensor:
    """Padding of images ``[B, h, w]`` as padding of their map ``x [B, d, H, W]``."""
    return F.interpolate(padding_mask[:, None].float(), size=x.shape[-2:])[:, 0].bool()


def no_padding(x: Tensor) -> Tensor:
    """A mask ``[B, H, W]`` for a map ``x [B, d, H, W]`` without padding."""
    return torch.zeros(x.shape[0], *x.shape[-2:], dtype=torch.bool, device=x.device)


def valid_ratio(padding_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, H, W]`` to ``[B, (x, y)]``: the part of the first row and column without padding."""
    valid = (~padding_mask).to(dtype)
    return torch.stack([valid[:, 0].mean(1), valid[:, :, 0].mean(1)], -1)


def pixel_centres(memory: Memory) -> Tensor:
    """Centre ``(x, y)`` of every pixel as a fraction of its unpadded image: ``[B, S, 2]``."""
    B, device = memory.features.shape[0], memory.features.device
    dtype = precise_dtype(memory.features)
    levels = []
    for i, (h, w) in enumerate(memory.spatial_shapes):
        y = (torch.arange(h, device=device, dtype=dtype) + 0.5) / h
        x = (torch.arange(w, device=device, dtype=dtype) + 0.5) / w
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(1, -1, 2)
        if memory.valid_ratios is None:
            levels.append(grid.expand(B, -1, -1))
        else:
            levels.append(grid / memory.valid_ratios[:, i, None])
    return torch.cat(levels, 1)
