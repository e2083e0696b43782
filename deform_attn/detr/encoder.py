"""From a backbone's maps to the memory that decoders attend to: three encoders.

Dense attention over one map (DETR), deformable attention over several (Deformable DETR), and
attention on the smallest map with convolutions between the maps (RT-DETR).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deform_attn import MSDeformableAttention, MSDeformAttn
from deform_attn.detr.boxes import sine_of_pixels

Activation = type[nn.Module]
Mask = Tensor | None  # True hides
Make = Callable[["Size"], nn.Module]


@dataclass(frozen=True)
class Size:
    """How large a system is; each recipe's default is its paper's.

    Attributes:
        d: width.
        heads: of attention.
        levels: feature maps that attention samples.
        points: samples of a query, head and level; a list where levels differ.
        encoder_layers, decoder_layers: number of layers.
        eval_layers: decoder layers to run in evaluation (RT-DETR: speed without a new training).
        hidden: width of feed-forward networks.
        queries: number of them.
        dropout: probability.
        act: activation of feed-forward networks and of heads.
        expansion, depth: of the blocks that fuse RT-DETR's maps: their width, and a third of their
            convolutions.
        encoder: ``(d, hidden)`` of RT-DETR's and D-FINE's encoder, where they are not the decoder's
            (D-FINE's largest model).
    """

    d: int = 256
    heads: int = 8
    levels: int = 4
    points: int | tuple[int, ...] = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    eval_layers: int | None = None
    hidden: int = 1024
    queries: int = 300
    dropout: float = 0.0
    act: Activation = nn.ReLU
    expansion: float = 1.0
    depth: float = 1.0
    encoder: tuple[int, int] | None = None


@dataclass(frozen=True)
class Memory:
    """Feature maps of all levels, one row a pixel.

    Attributes:
        features: ``[B, S, d]``.
        shapes: ``(height, width)`` of each level.
        padding: ``[B, S]``, True for padding; None where there is none.
        position: ``[B, S, d]``, added to the keys of dense attention.
        ratios: ``[B, L, (x, y)]``, the part of each level that is no padding; None: all of it.
    """

    features: Tensor
    shapes: list[tuple[int, int]]
    padding: Mask = None
    position: Tensor | None = None
    ratios: Tensor | None = None

    @staticmethod
    def of(maps: Sequence[Tensor]) -> Memory:
        """Maps ``[B, d, H, W]`` without padding."""
        return Memory(flat(maps), [(x.shape[-2], x.shape[-1]) for x in maps])

    def on_every_level(self, reference: Tensor | None) -> Tensor | None:
        """References ``[B, Q, 2 or 4]`` as fractions of each padded map: ``[B, Q, L, 2 or 4]``."""
        if reference is None:
            return None
        if self.ratios is None:
            return reference[:, :, None]
        ratios = self.ratios.repeat(1, 1, reference.shape[-1] // 2)
        return reference[:, :, None] * ratios[:, None]


def flat(maps: Sequence[Tensor]) -> Tensor:
    """``[B, d, H, W]`` each to ``[B, S, d]``."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)


class MLP(nn.Module):
    """Linear layers with an activation between them."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, layers: int, act: Activation = nn.ReLU
    ) -> None:
        super().__init__()
        sizes = [inputs, *[hidden] * (layers - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.act = act()

    def zeroed(self) -> MLP:
        """Starts with zero, whatever the input."""
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` to ``[..., outputs]``."""
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)


def class_head(d: int, classes: int) -> nn.Linear:
    """Every class starts with a score of 0.01, that a thousand negatives do not drown the rest."""
    head = nn.Linear(d, classes)
    nn.init.constant_(head.bias, -math.log(99))
    return head


def box_head(d: int, outputs: int = 4, act: Activation = nn.ReLU) -> MLP:
    """Starts as no correction at all."""
    return MLP(d, d, outputs, 3, act).zeroed()


def each(layers: int, make: Callable[[], nn.Module], *, shared: bool = False) -> nn.ModuleList:
    """A module for every layer, or one for all."""
    return nn.ModuleList([make()] * layers if shared else [make() for _ in range(layers)])


class FeedForward(nn.Sequential):
    """``linear2(act(linear1(x)))``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.linear1 = nn.Linear(size.d, size.hidden)
        self.act = size.act()
        self.dropout = nn.Dropout(size.dropout)
        self.linear2 = nn.Linear(size.hidden, size.d)


class AddNorm(nn.Module):
    """``norm(x + update)``; ``limit`` keeps half precision finite (RT-DETR)."""

    def __init__(self, d: int, limit: float | None = None) -> None:
        super().__init__()
        self.norm, self.limit = nn.LayerNorm(d), limit

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        """``[B, Q, d]`` twice to ``[B, Q, d]``."""
        x = x + update
        if self.limit is not None:
            x = x.clamp(-self.limit, self.limit)
        return self.norm(x)


class SelfAttention(nn.Module):
    """Every query looks at every other: ``q = k = x + position, v = x``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(size.d, size.heads, size.dropout, batch_first=True)

    def forward(
        self, x: Tensor, position: Tensor, blocked: Mask = None, padding: Mask = None
    ) -> Tensor:
        """Update of ``x [B, Q, d]``; ``blocked [Q, Q]``, ``padding [B, Q]`` hide what is True."""
        q = x + position
        return self.attention(q, q, x, padding, False, blocked)[0]


class DeformableAttention(nn.Module):
    """Every query looks at a few points near its reference.

    ``variant`` and ``method`` are those of :class:`~deform_attn.MSDeformableAttention`; without a
    variant, the attention is Deformable DETR's, :class:`~deform_attn.MSDeformAttn`.
    """

    def __init__(self, size: Size, variant: str = "", method: str = "default") -> None:
        super().__init__()
        d, heads, levels, points = size.d, size.heads, size.levels, size.points
        if variant:
            like: Any = {"method": method, "variant": variant}
            self.attention: nn.Module = MSDeformableAttention(d, heads, levels, points, **like)
        else:
            assert isinstance(points, int), "points of each level are RT-DETRv2's and D-FINE's"
            self.attention = MSDeformAttn(d, levels, heads, points)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """Update of ``x [B, Q, d]``; references are ``[B, Q, L, 2 or 4]``."""
        padded = () if memory.padding is None else (None, memory.padding)
        return self.attention(x + position, reference, memory.features, memory.shapes, *padded)


class EncoderLayer(nn.Module):
    """Attention, then a feed-forward network, each added and normalised."""

    def __init__(self, attention: nn.Module, size: Size) -> None:
        super().__init__()
        self.attention, self.ffn = attention, FeedForward(size)
        self.join1, self.join2 = AddNorm(size.d), AddNorm(size.d)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x: Tensor, *where: Any) -> Tensor:
        """``x [B, S, d]``; ``where`` is whatever the attention takes beside it."""
        x = self.join1(x, self.dropout(self.attention(x, *where)))
        return self.join2(x, self.dropout(self.ffn(x)))


class DenseEncoder(nn.Module):
    """DETR's: every pixel of one map looks at every other.

    With ``scale`` positions are scaled by an MLP of the pixel, and ``temperature`` is that of their
    sines: True and 20 in DAB-DETR.
    """

    def __init__(
        self, channels: int, size: Size, *, scale: bool = False, temperature: float = 1e4
    ) -> None:
        super().__init__()
        d = size.d
        layers = each(size.encoder_layers, lambda: EncoderLayer(SelfAttention(size), size))
        self.project, self.layers = nn.Conv2d(channels, d, 1), layers
        self.scale = MLP(d, d, d, 2) if scale else None
        self.temperature = temperature

    def forward(self, maps: Sequence[Tensor], padding: Mask = None) -> Memory:
        """The last of a backbone's maps, ``[B, c, H, W]``; padding of the images, ``[B, h, w]``."""
        x = self.project(maps[-1])
        small = resized(padding, x)
        return self.encode(x, sine_of_pixels(small, x.shape[1], self.temperature), small)

    def encode(self, x: Tensor, position: Tensor, padding: Tensor) -> Memory:
        """All ``[B, d, H, W]``, padding ``[B, H, W]``."""
        shapes = [(x.shape[-2], x.shape[-1])]
        x, position, padding = flat([x]), flat([position]), padding.flatten(1)
        for layer in self.layers:
            scale = 1 if self.scale is None else self.scale(x)
            x = layer(x, position * scale, None, padding)
        return Memory(x, shapes, padding, position)


class DeformableEncoder(nn.Module):
    """Deformable DETR's: every pixel of every map looks at a few points of all maps.

    Maps beyond the backbone's are each half the one before. ``temperature`` and ``shift`` are those
    of :func:`~deform_attn.detr.boxes.sine_of_pixels`.
    """

    def __init__(
        self, channels: Sequence[int], size: Size, *, temperature: float = 1e4, shift: float = -0.5
    ) -> None:
        super().__init__()
        d, levels = size.d, size.levels
        layers = each(size.encoder_layers, lambda: EncoderLayer(DeformableAttention(size), size))
        more = [channels[-1], *[d] * levels][: levels - len(channels)]
        convolutions = [nn.Conv2d(c, d, 1) for c in channels]
        convolutions += [nn.Conv2d(c, d, 3, stride=2, padding=1) for c in more]
        self.project = nn.ModuleList(nn.Sequential(c, nn.GroupNorm(32, d)) for c in convolutions)
        self.level_embed = nn.Parameter(torch.empty(levels, d).normal_())
        self.layers = layers
        self.temperature, self.shift = temperature, shift

    def forward(self, maps: Sequence[Tensor], padding: Mask = None) -> Memory:
        """A backbone's maps, ``[B, c, H, W]``; padding of the images, ``[B, h, w]``."""
        projected = [project(x) for project, x in zip(self.project, maps)]
        x = maps[-1]
        for project in self.project[len(maps) :]:
            x = project(x)
            projected.append(x)
        small = [resized(padding, x) for x in projected]
        d = projected[0].shape[1]
        positions = [sine_of_pixels(p, d, self.temperature, self.shift) for p in small]
        return self.encode(projected, positions, small)

    def encode(
        self, maps: Sequence[Tensor], positions: Sequence[Tensor], paddings: Sequence[Tensor]
    ) -> Memory:
        """All levels' ``[B, d, H, W]`` twice, and ``[B, H, W]``."""
        memory = replace(
            Memory.of(maps),
            padding=torch.cat([p.flatten(1) for p in paddings], 1),
            ratios=torch.stack([valid_ratio(p) for p in paddings], 1),
        )
        position = flat([p + e[:, None, None] for p, e in zip(positions, self.level_embed)])
        reference = memory.on_every_level(pixel_centres(memory))
        for layer in self.layers:
            x = layer(memory.features, position, reference, memory)
            memory = replace(memory, features=x)
        return memory


def resized(padding: Mask, x: Tensor) -> Tensor:
    """Padding of images as padding of a map ``x [B, d, H, W]``."""
    if padding is None:
        return torch.zeros(x.shape[0], *x.shape[-2:], dtype=torch.bool, device=x.device)
    return F.interpolate(padding[:, None].float(), size=x.shape[-2:])[:, 0].bool()


def valid_ratio(padding: Tensor) -> Tensor:
    """``[B, H, W]`` to ``[B, (x, y)]``: the part of the first row and column without padding."""
    return torch.stack([(~padding[:, 0]).float().mean(1), (~padding[:, :, 0]).float().mean(1)], -1)


def pixel_centres(memory: Memory) -> Tensor:
    """Centre ``(x, y)`` of every pixel as a fraction of its unpadded image: ``[B, S, 2]``."""
    B, device = memory.features.shape[0], memory.features.device
    levels = []
    for i, (h, w) in enumerate(memory.shapes):
        y = (torch.arange(h, device=device) + 0.5) / h
        x = (torch.arange(w, device=device) + 0.5) / w
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(1, -1, 2)
        levels.append(grid.expand(B, -1, -1))
        if memory.ratios is not None:
            levels[-1] = grid / memory.ratios[:, i, None]
    return torch.cat(levels, 1)


class ConvNorm(nn.Sequential):
    """Convolution without bias (``how``: its stride, its groups), batch norm, activation."""

    def __init__(
        self, inputs: int, outputs: int, size: int, act: Activation = nn.Identity, **how: Any
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **how)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = act()


class RepVGG(nn.Module):
    """``act(3x3 + 1x1)``: can be folded into one convolution after training."""

    def __init__(self, d: int, act: Activation) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(d, d, 3), ConvNorm(d, d, 1)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, d, H, W]`` to the same."""
        return self.act(self.conv1(x) + self.conv2(x))


class CSPRep(nn.Module):
    """Two 1x1 branches, one through RepVGG blocks, added: fuses two maps into one."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, expansion: float, act: Activation
    ) -> None:
        super().__init__()
        hidden = int(outputs * expansion)
        self.conv1, self.conv2 = (ConvNorm(inputs, hidden, 1, act) for _ in range(2))
        self.bottlenecks = nn.Sequential(*(RepVGG(hidden, act) for _ in range(blocks)))
        self.conv3 = ConvNorm(hidden, outputs, 1, act) if hidden != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, H, W]``."""
        return self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x))


class GELAN(nn.Module):
    """Fuses two maps into one: all that two stages of CSPRep are told and say (D-FINE)."""

    def __init__(self, d: int, blocks: int, expansion: float, act: Activation) -> None:
        super().__init__()
        hidden = round(expansion * d // 2)

        def stage(inputs: int) -> nn.Sequential:
            fuse = CSPRep(inputs, hidden, blocks, 1, act)
            return nn.Sequential(fuse, ConvNorm(hidden, hidden, 3, act))

        self.conv1 = ConvNorm(2 * d, 2 * d, 1, act)
        self.conv2, self.conv3 = stage(d), stage(hidden)
        self.conv4 = ConvNorm(2 * d + 2 * hidden, d, 1, act)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 2 d, H, W]`` to ``[B, d, H, W]``."""
        told = self.conv1(x)
        said = self.conv2(told.chunk(2, 1)[1])
        return self.conv4(torch.cat([told, said, self.conv3(said)], 1))


class HybridEncoder(nn.Module):
    """RT-DETR's (arXiv 2304.08069, 4.2): attention in the smallest map, convolutions across.

    D-FINE's is ``fine``: it fuses with :class:`GELAN`, halves maps channel by channel, and projects
    the fused maps once more only where the decoder has another width.
    """

    def __init__(self, channels: Sequence[int], size: Size, *, fine: bool = False) -> None:
        super().__init__()
        d, hidden = size.encoder or (size.d, size.hidden)
        steps, blocks, act = len(channels) - 1, round(3 * size.depth), nn.SiLU
        layer = replace(size, d=d, hidden=hidden, act=nn.GELU)
        self.project = nn.ModuleList(ConvNorm(c, d, 1) for c in channels)
        self.attention = EncoderLayer(SelfAttention(layer), layer)
        one, half = partial(ConvNorm, d, d, 1), partial(ConvNorm, d, d, 3, stride=2)
        fuse: Any = partial(GELAN, d) if fine else partial(CSPRep, 2 * d, d)
        self.lateral = each(steps, lambda: one() if fine else one(act))
        self.down = each(steps, lambda: nn.Sequential(one(), half(groups=d)) if fine else half(act))
        self.fuse_up = each(steps, lambda: fuse(blocks, size.expansion, act))
        self.fuse_down = each(steps, lambda: fuse(blocks, size.expansion, act))
        same = fine and d == size.d
        self.output = each(steps + 1, lambda: nn.Identity() if same else ConvNorm(d, size.d, 1))

    def forward(self, maps: Sequence[Tensor], padding: Mask = None) -> Memory:
        """A backbone's maps, ``[B, c, H, W]``; padding is seen as image (as officially)."""
        return self.memory(self.fuse(maps))

    def fuse(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps ``[B, c, H, W]`` to maps ``[B, d, H, W]``."""
        *lower, top = (project(x) for project, x in zip(self.project, maps))
        pixels = self.attention(flat([top]), axis_codes(top))
        high = pixels.transpose(1, 2).view_as(top)

        outputs: list[Tensor] = []  # top down, then bottom up
        for low, lateral, fuse in zip(reversed(lower), self.lateral, self.fuse_up):
            high = lateral(high)
            outputs.insert(0, high)
            up = F.interpolate(high, size=low.shape[-2:], mode="nearest")
            high = fuse(torch.cat([up, low], 1))
        fused = [high]
        for high, down, fuse in zip(outputs, self.down, self.fuse_down):
            fused.append(fuse(torch.cat([down(fused[-1]), high], 1)))
        return fused

    def memory(self, maps: Sequence[Tensor]) -> Memory:
        """Fused maps as a decoder's memory."""
        return Memory.of([project(x) for project, x in zip(self.output, maps)])


def axis_codes(x: Tensor) -> Tensor:
    """Sines of the position in a map ``[B, d, H, W]``: ``[1, S, d]``.

    Pixel t has the code of ``(t // H, t % H)`` as the official weights learnt it: column and row
    where the map is square, and mixed up where it is not.
    """
    d, h, w = x.shape[1:]
    t = torch.arange(h * w, device=x.device)
    power = 10000 ** -(torch.arange(d // 4, dtype=torch.float32, device=x.device) / (d // 4))
    first, second = (t // h)[:, None] * power, (t % h)[:, None] * power
    return torch.cat([first.sin(), first.cos(), second.sin(), second.cos()], -1)[None]
