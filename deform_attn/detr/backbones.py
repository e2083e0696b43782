"""Backbones: from images to feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from deform_attn.detr.layers import ConvNorm


class Backbone(Protocol):
    """A module that makes feature maps of images.

    One that was pretrained on normalised images has the attributes ``mean`` and ``std`` too, three
    numbers each, with which detectors normalise their images.

    Attributes:
        channels: of each map.
    """

    channels: Sequence[int]

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """``[B, 3, h, w]`` to maps ``[B, c, H, W]``, large ones first."""


class Normalize(nn.Module):
    """Normalises images as a pretrained backbone expects them; padding becomes zero.

    Args:
        mean: of red, green and blue in [0, 1].
        std: their standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    @staticmethod
    def of(backbone: Backbone) -> Normalize:
        """With ``mean`` and ``std`` of a backbone, or 0 and 1 where it has none."""
        mean = getattr(backbone, "mean", (0.0, 0.0, 0.0))
        return Normalize(mean, getattr(backbone, "std", (1.0, 1.0, 1.0)))

    def forward(self, images: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Images ``[B, 3, H, W]`` in [0, 1]; ``padding_mask [B, H, W]`` is True for padding."""
        images = (images - self.mean) / self.std
        return images if padding_mask is None else images.masked_fill(padding_mask[:, None], 0)


class SmallBackbone(nn.Module):
    """Maps at 1/4, 1/8 and 1/16 of small images, for training without pretrained weights."""

    def __init__(self, channels: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        self.channels = list(channels)
        conv = partial(ConvNorm, kernel_size=3, activation=nn.ReLU)
        self.stem = conv(3, channels[0], stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(conv(a, b, stride=2), conv(b, b))
            for a, b in pairwise([channels[0], *channels])
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """``[B, 3, h, w]`` to a map of each stage."""
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]
