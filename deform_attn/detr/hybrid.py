"""RT-DETR's and D-FINE's encoder: attention in the smallest map, convolutions between maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deform_attn.detr.encoder import EncoderLayer
from deform_attn.detr.layers import Activation, ConvNorm, SelfAttention, Size, each
from deform_attn.detr.memory import Memory, flatten, precise_dtype, resize_mask


class RepVGG(nn.Module):
    """``activation(3x3 + 1x1)``; both can be folded into one convolution after training."""

    def __init__(self, channels: int, activation: Activation) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(channels, channels, 3), ConvNorm(channels, channels, 1)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, channels, H, W]`` to the same."""
        return self.activation(self.conv1(x) + self.conv2(x))


class CSPRep(nn.Module):
    """The sum of two 1x1 branches, one of them followed by RepVGG blocks."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        expansion: float,
        activation: Activation,
    ) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        self.conv1, self.conv2 = (ConvNorm(in_channels, hidden, 1, activation) for _ in range(2))
        self.bottlenecks = nn.Sequential(*(RepVGG(hidden, activation) for _ in range(num_blocks)))
        self.conv3 = (
            ConvNorm(hidden, out_channels, 1, activation)
            if hidden != out_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_channels, H, W]`` to ``[B, out_channels, H, W]``."""
        return self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x))


class GELAN(nn.Module):
    """Concatenates its input and the outputs of two CSPRep stages, and projects them (D-FINE).

    Example:
        >>> import torch
        >>> from deform_attn.detr.hybrid import GELAN
        >>> fuse = GELAN(32, num_blocks=1, expansion=0.5, activation=torch.nn.SiLU)
        >>> fuse(torch.rand(1, 64, 8, 6)).shape
        torch.Size([1, 32, 8, 6])
    """

    def __init__(
        self, channels: int, num_blocks: int, expansion: float, activation: Activation
    ) -> None:
        super().__init__()
        d, hidden = channels, round(expansion * channels // 2)

        def stage(in_channels: int) -> nn.Sequential:
            fuse = CSPRep(in_channels, hidden, num_blocks, 1, activation)
            return nn.Sequential(fuse, ConvNorm(hidden, hidden, 3, activation))

        self.conv1 = ConvNorm(2 * d, 2 * d, 1, activation)
        self.conv2, self.conv3 = stage(d), stage(hidden)
        self.conv4 = ConvNorm(2 * d + 2 * hidden, d, 1, activation)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 2 * channels, H, W]`` to ``[B, channels, H, W]``."""
        x = self.conv1(x)
        first = self.conv2(x.chunk(2, 1)[1])
        return self.conv4(torch.cat([x, first, self.conv3(first)], 1))


class HybridEncoder(nn.Module):
    """RT-DETR's hybrid encoder (arXiv 2304.08069, section 4.2).

    Args:
        channels: of the backbone's maps.
        size: of the system; ``encoder_dims`` where the encoder has sizes of its own.
        fine: D-FINE's variant: it fuses with :class:`GELAN`, downsamples with depthwise
            convolutions, and projects the fused maps only where the decoder has another width.

    Example:
        >>> import torch
        >>> from deform_attn.detr.hybrid import HybridEncoder
        >>> from deform_attn.detr.layers import Size
        >>> encoder = HybridEncoder([16, 48], Size(32, 4, 2))
        >>> memory = encoder([torch.rand(1, 16, 8, 6), torch.rand(1, 48, 4, 3)])
        >>> memory.features.shape, memory.spatial_shapes
        (torch.Size([1, 60, 32]), [(8, 6), (4, 3)])
    """

    def __init__(self, channels: Sequence[int], size: Size, *, fine: bool = False) -> None:
        super().__init__()
        d, dim_feedforward = size.encoder_dims or (size.d_model, size.dim_feedforward)
        steps, num_blocks, act = len(channels) - 1, round(3 * size.depth), nn.SiLU
        own = replace(size, d_model=d, dim_feedforward=dim_feedforward, activation=nn.GELU)
        self.input_proj = nn.ModuleList(ConvNorm(c, d, 1) for c in channels)
        self.layer = EncoderLayer(SelfAttention(own), own)
        one, half = partial(ConvNorm, d, d, 1), partial(ConvNorm, d, d, 3, stride=2)
        fuse: Any = partial(GELAN, d) if fine else partial(CSPRep, 2 * d, d)
        self.lateral_convs = each(steps, lambda: one() if fine else one(act))
        self.downsample_convs = each(
            steps, lambda: nn.Sequential(one(), half(groups=d)) if fine else half(act)
        )
        self.fpn_blocks = each(steps, lambda: fuse(num_blocks, size.expansion, act))
        self.pan_blocks = each(steps, lambda: fuse(num_blocks, size.expansion, act))
        same = fine and d == size.d_model
        self.output_proj = each(
            steps + 1, lambda: nn.Identity() if same else ConvNorm(d, size.d_model, 1)
        )

    def forward(self, maps: Sequence[Tensor], padding_mask: Tensor | None = None) -> Memory:
        """Encode a backbone's maps ``[B, c, H, W]``; padding of the images ``[B, h, w]``.

        The official models have no padding; here, with a mask, boxes are fractions of the unpadded
        image, as in the other systems.
        """
        return self.memory(self.fuse(maps, padding_mask), padding_mask)

    def fuse(self, maps: Sequence[Tensor], padding_mask: Tensor | None = None) -> list[Tensor]:
        """Maps ``[B, c, H, W]`` to maps ``[B, d, H, W]``."""
        *lower, top = (project(x) for project, x in zip(self.input_proj, maps))
        mask = None if padding_mask is None else resize_mask(padding_mask, top).flatten(1)
        pixels = self.layer(flatten([top]), axis_codes(top), None, mask)
        high = pixels.transpose(1, 2).view_as(top)

        outputs: list[Tensor] = []  # from the smallest map to the largest, and back
        for low, lateral, block in zip(reversed(lower), self.lateral_convs, self.fpn_blocks):
            high = lateral(high)
            outputs.insert(0, high)
            up = F.interpolate(high, size=low.shape[-2:], mode="nearest")
            high = block(torch.cat([up, low], 1))
        fused = [high]
        for high, downsample, block in zip(outputs, self.downsample_convs, self.pan_blocks):
            fused.append(block(torch.cat([downsample(fused[-1]), high], 1)))
        return fused

    def memory(self, maps: Sequence[Tensor], padding_mask: Tensor | None = None) -> Memory:
        """Fused maps as the memory of a decoder."""
        projected = [project(x) for project, x in zip(self.output_proj, maps)]
        if padding_mask is None:
            return Memory.of(projected)
        return Memory.of(projected, [resize_mask(padding_mask, x) for x in projected])


def axis_codes(x: Tensor) -> Tensor:
    """Sines of the positions of a map ``[B, d, H, W]``: ``[1, S, d]``, in its dtype.

    Pixel t has the code of ``(t // H, t % H)``, to which the official weights were trained: row
    and column of a square map, but not of others.
    """
    d, h, w = x.shape[1:]
    dtype = precise_dtype(x)
    t = torch.arange(h * w, device=x.device)
    power = 10000 ** -(torch.arange(d // 4, dtype=dtype, device=x.device) / (d // 4))
    first, second = (t // h)[:, None] * power, (t % h)[:, None] * power
    codes = torch.cat([first.sin(), first.cos(), second.sin(), second.cos()], -1)
    return codes[None].to(x.dtype)
