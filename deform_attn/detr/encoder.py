"""Encoders of the DETR line: dense attention over one map, deformable attention over several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deform_attn.detr.boxes import sine_of_pixels
from deform_attn.detr.layers import (
    MLP,
    AddNorm,
    DeformableAttention,
    FeedForward,
    SelfAttention,
    Size,
    each,
)
from deform_attn.detr.memory import Memory, flatten, no_padding, pixel_centres, resize_mask


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with residual and LayerNorm."""

    def __init__(self, self_attn: nn.Module, size: Size) -> None:
        super().__init__()
        self.self_attn, self.ffn = self_attn, FeedForward(size)
        self.norm1, self.norm2 = AddNorm(size.d_model), AddNorm(size.d_model)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """``x [B, S, d_model]``; ``args`` are the further arguments of the attention."""
        x = self.norm1(x, self.dropout(self.self_attn(x, *args)))
        return self.norm2(x, self.dropout(self.ffn(x)))


class DenseEncoder(nn.Module):
    """DETR's encoder: every pixel of one map attends to all others.

    Args:
        channels: of the backbone's last map.
        size: of the system.
        scale: scale the positions by an MLP of the pixel (DAB-DETR).
        temperature: of :func:`~deform_attn.detr.boxes.sine_of_pixels`; 20 in DAB-DETR.
    """

    def __init__(
        self, channels: int, size: Size, *, scale: bool = False, temperature: float = 1e4
    ) -> None:
        super().__init__()
        d = size.d_model
        layers = each(size.encoder_layers, lambda: EncoderLayer(SelfAttention(size), size))
        self.input_proj, self.layers = nn.Conv2d(channels, d, 1), layers
        self.query_scale = MLP(d, d, d, 2) if scale else None
        self.temperature = temperature

    def forward(self, maps: Sequence[Tensor], padding_mask: Tensor | None = None) -> Memory:
        """Encode the last of the maps ``[B, c, H, W]``; padding of the images ``[B, h, w]``."""
        x = self.input_proj(maps[-1])
        mask = no_padding(x) if padding_mask is None else resize_mask(padding_mask, x)
        return self.encode(x, sine_of_pixels(mask, x, self.temperature), mask)

    def encode(self, x: Tensor, pos: Tensor, padding_mask: Tensor) -> Memory:
        """From a projected map and its positions ``[B, d_model, H, W]``, and ``[B, H, W]``."""
        memory = replace(Memory.of([x], [padding_mask]), valid_ratios=None)
        x, pixel_pos = memory.features, flatten([pos])
        for layer in self.layers:
            scale = 1 if self.query_scale is None else self.query_scale(x)
            x = layer(x, pixel_pos * scale, None, memory.padding_mask)
        return replace(memory, features=x, pos=pixel_pos)


class DeformableEncoder(nn.Module):
    """Deformable DETR's encoder: every pixel attends to sampled points of all maps.

    Args:
        channels: of the backbone's maps; each further level halves the one before.
        size: of the system.
        temperature: of :func:`~deform_attn.detr.boxes.sine_of_pixels`.
        shift: of the same function.
    """

    def __init__(
        self, channels: Sequence[int], size: Size, *, temperature: float = 1e4, shift: float = -0.5
    ) -> None:
        super().__init__()
        d, num_levels = size.d_model, size.num_levels
        if num_levels < len(channels):
            raise ValueError(
                f"num_levels: expected at least {len(channels)}, the maps of the backbone, "
                f"got {num_levels}"
            )
        layers = each(size.encoder_layers, lambda: EncoderLayer(DeformableAttention(size), size))
        further = [channels[-1], *[d] * num_levels][: num_levels - len(channels)]
        convolutions = [nn.Conv2d(c, d, 1) for c in channels]
        convolutions += [nn.Conv2d(c, d, 3, stride=2, padding=1) for c in further]
        self.input_proj = nn.ModuleList(
            nn.Sequential(conv, nn.GroupNorm(32, d)) for conv in convolutions
        )
        self.level_embed = nn.Parameter(torch.empty(num_levels, d).normal_())
        self.layers = layers
        self.temperature, self.shift = temperature, shift

    def forward(self, maps: Sequence[Tensor], padding_mask: Tensor | None = None) -> Memory:
        """Encode a backbone's maps ``[B, c, H, W]``; padding of the images ``[B, h, w]``."""
        projected = [project(x) for project, x in zip(self.input_proj, maps)]
        x = maps[-1]
        for project in self.input_proj[len(maps) :]:
            x = project(x)
            projected.append(x)
        masks = [
            no_padding(x) if padding_mask is None else resize_mask(padding_mask, x)
            for x in projected
        ]
        positions = [
            sine_of_pixels(mask, x, self.temperature, self.shift)
            for mask, x in zip(masks, projected)
        ]
        return self.encode(projected, positions, masks)

    def encode(
        self, maps: Sequence[Tensor], positions: Sequence[Tensor], padding_masks: Sequence[Tensor]
    ) -> Memory:
        """From maps and positions of all levels ``[B, d_model, H, W]``, and ``[B, H, W]``."""
        memory = Memory.of(maps, padding_masks)
        pos = flatten([p + e[:, None, None] for p, e in zip(positions, self.level_embed)])
        reference_points = memory.on_every_level(pixel_centres(memory))
        for layer in self.layers:
            x = layer(memory.features, pos, reference_points, memory)
            memory = replace(memory, features=x)
        return memory
