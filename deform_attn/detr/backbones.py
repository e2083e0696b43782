"""Backbones: from images to feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deform_attn.checks import check_choice, check_integer
from deform_attn.detr.layers import ConvNorm
from deform_attn.extras import needs_transformers


class Backbone(Protocol):
    """A module that makes feature maps of images.

    One that was pretrained on normalised images has the attributes ``mean`` and ``std`` too, three
    numbers each, with which detectors normalise their images.
    """

    @property
    def channels(self) -> Sequence[int]:
        """Of each map."""

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
        for count in channels:
            check_integer("channels", count, 1)
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


# --- Backbones of transformers ----------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class LibraryBackbone(nn.Module):
    """A backbone of the library transformers, which the extra ``backbones`` installs.

    Attributes:
        body: the library's module; its tensors keep its names.
        channels: of each map.
        mean: of the images that the official weights were trained on, by colour.
        std: standard deviation of the same.
        frozen: batch norms keep their statistics and their parameters in training.
    """

    def __init__(
        self,
        body: Any,
        *,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.body, self.channels = body, tuple(body.channels)
        self.mean, self.std, self.frozen = tuple(mean), tuple(std), frozen
        for norm in self._norms() if frozen else ():
            norm.requires_grad_(False)

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.body.modules() if isinstance(module, nn.BatchNorm2d)]

    def train(self, mode: bool = True) -> LibraryBackbone:
        """As :meth:`torch.nn.Module.train`; frozen batch norms stay in evaluation mode."""
        super().train(mode)
        for norm in self._norms() if self.frozen else ():
            norm.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """``[B, 3, h, w]`` to a map of each stage."""
        return list(self.body(images).feature_maps)


def _library() -> Any:
    with needs_transformers():
        import transformers
    return transformers


def _stages(maps: int) -> list[str]:
    check_integer("maps", maps, 1, 4)
    return [f"stage{i}" for i in range(5 - maps, 5)]


RESNET_DEPTHS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}


def _resnet_sizes(depth: int) -> dict[str, Any]:
    check_choice("depth", depth, RESNET_DEPTHS)
    basic = depth < 50
    sizes = [64, 128, 256, 512] if basic else [256, 512, 1024, 2048]
    kind = "basic" if basic else "bottleneck"
    return {"depths": RESNET_DEPTHS[depth], "hidden_sizes": sizes, "layer_type": kind}


def resnet(depth: int = 50, maps: int = 3, *, dilated: bool = False) -> LibraryBackbone:
    """ResNet as in torchvision, with frozen batch norms and normalised images (DETR's line).

    Args:
        depth: 18, 34, 50 or 101.
        maps: number of the last stages whose maps are used.
        dilated: the last stage keeps the resolution, with dilated convolutions (DC5).
    """
    library = _library()
    config = library.ResNetConfig(out_features=_stages(maps), **_resnet_sizes(depth))
    body = library.ResNetBackbone(config)
    if dilated:
        for i, layer in enumerate(body.encoder.stages[-1].layers):
            for module in layer.modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
                    if i > 0 and module.kernel_size == (3, 3):
                        module.dilation = module.padding = (2, 2)
    return LibraryBackbone(body, mean=IMAGENET_MEAN, std=IMAGENET_STD, frozen=True)


def resnet_vd(depth: int = 50, maps: int = 3, *, frozen: bool = False) -> LibraryBackbone:
    """ResNet-vd of RT-DETR.

    Args:
        depth: 18, 34, 50 or 101.
        maps: number of the last stages whose maps are used.
        frozen: batch norms are frozen (RT-DETR from depth 50 on).
    """
    library = _library()
    sizes = _resnet_sizes(depth)
    config = library.RTDetrResNetConfig(out_features=_stages(maps), **sizes)
    return LibraryBackbone(library.RTDetrResNetBackbone(config), frozen=frozen)


# stem (middle, out), then of each stage: channels (middle, out), blocks; layers of all blocks
HGNET: dict[str, tuple[tuple[int, int], list[tuple[int, int, int]], int]] = {
    "B0": ((16, 16), [(16, 64, 1), (32, 256, 1), (64, 512, 2), (128, 1024, 1)], 3),
    "B2": ((24, 32), [(32, 96, 1), (64, 384, 1), (128, 768, 3), (256, 1536, 1)], 4),
    "B4": ((32, 48), [(48, 128, 1), (96, 512, 1), (192, 1024, 3), (384, 2048, 1)], 6),
    "B5": ((32, 64), [(64, 128, 1), (128, 512, 2), (256, 1024, 5), (512, 2048, 2)], 6),
}


def hgnetv2(
    name: str, maps: int = 3, *, affine: bool = False, frozen: bool = False
) -> LibraryBackbone:
    """HGNetV2 of D-FINE, DEIM and RT-DETR.

    Args:
        name: B0, B2, B4 (RT-DETR's L) or B5 (its X).
        maps: number of the last stages whose maps are used.
        affine: learnable affine blocks after the activations (D-FINE-N, S and M).
        frozen: batch norms are frozen (D-FINE-L and X).
    """
    check_choice("name", name, HGNET)
    (stem_mid, stem_out), stages, layers = HGNET[name]
    middle, out, blocks = (list(column) for column in zip(*stages))
    library = _library()
    config = library.HGNetV2Config(
        out_features=_stages(maps),
        stem_channels=[3, stem_mid, stem_out],
        stage_in_channels=[stem_out, *out[:-1]],
        stage_mid_channels=middle,
        stage_out_channels=out,
        hidden_sizes=out,
        depths=[1] * 4,
        stage_num_blocks=blocks,
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5],
        stage_numb_of_layers=[layers] * 4,
        use_learnable_affine_block=affine,
    )
    return LibraryBackbone(library.HGNetV2Backbone(config), frozen=frozen)


def swin_large(maps: int = 3) -> LibraryBackbone:
    """Swin-L with windows of 12, pretrained on images of 384 pixels (DINO, Mr. DETR).

    Args:
        maps: number of the last stages whose maps are used.
    """
    library = _library()
    config = library.SwinConfig(
        out_features=_stages(maps),
        image_size=384,
        embed_dim=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=12,
        drop_path_rate=0.2,
    )
    body = library.SwinBackbone(config)
    body.swin.layernorm = nn.Identity()  # of the classifier
    return LibraryBackbone(body, mean=IMAGENET_MEAN, std=IMAGENET_STD)
