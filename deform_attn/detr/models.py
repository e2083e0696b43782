"""The systems: a function each, from a backbone to a model, its criterion and its postprocessing.

A backbone is a module with ``channels``, those of the maps ``[B, c, H, W]`` that it makes of
images ``[B, 3, h, w]``, large maps first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from deform_attn import MSDeformableAttention, MSDeformAttn
from deform_attn.detr import decoder as dec
from deform_attn.detr import encoder as enc
from deform_attn.detr import losses
from deform_attn.detr.boxes import to_corners
from deform_attn.detr.denoising import Denoising, Noised
from deform_attn.detr.dfine import EdgeBins, FineHeads
from deform_attn.detr.losses import Criterion
from deform_attn.detr.matching import Hungarian, Lexicographic, OneToMany, Target, check_targets

Outputs = dict[str, Any]
Results = list[dict[str, Tensor]]


class Backbone(Protocol):
    """Anything that makes maps of images and says how many channels they have."""

    channels: Sequence[int]

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """``[B, 3, h, w]`` to maps ``[B, c, H, W]``, large ones first."""


class SmallBackbone(nn.Module):
    """Maps at 1/4, 1/8 and 1/16 of small images, for trials without a pretrained network."""

    def __init__(self, channels: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        self.channels = list(channels)
        self.stem = enc.ConvNorm(3, channels[0], 3, 2, "relu")
        widths = [channels[0], *channels]
        self.stages = nn.ModuleList(
            nn.Sequential(enc.ConvNorm(a, b, 3, 2, "relu"), enc.ConvNorm(b, b, 3, 1, "relu"))
            for a, b in pairwise(widths)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """``[B, 3, h, w]`` to a map of each stage."""
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


class System(NamedTuple):
    """A detector with what it is trained and used with."""

    model: nn.Module  # (images [B, 3, H, W], mask [B, H, W] or None, targets or None) -> outputs
    criterion: Criterion  # (outputs, targets) -> weighted losses
    postprocess: Callable[[Outputs, Tensor], Results]  # (outputs, sizes [B, (height, width)])


class Detector(nn.Module):
    """Backbone, encoder, queries, decoder; and what only training has.

    Args:
        backbone: images to maps.
        encoder: maps and padding to a memory.
        queries: memory to queries and proposals.
        decoder: queries and memory to predictions.
        denoising: queries of noised objects.
        o2m: another decoder, with queries of its own (Mr. DETR).
        sep: another decoder, with the first one's queries (Mr. DETR).
    """

    def __init__(
        self,
        backbone: Backbone,
        encoder: nn.Module,
        queries: nn.Module,
        decoder: nn.Module,
        *,
        denoising: Denoising | None = None,
        o2m: tuple[nn.Module, dec.Decoder] | None = None,
        sep: dec.Decoder | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.encoder = backbone, encoder
        self.queries, self.decoder, self.denoising = queries, decoder, denoising
        self.o2m = nn.ModuleList(o2m) if o2m is not None else None
        self.sep = sep

    def forward(
        self, images: Tensor, mask: Tensor | None = None, targets: Sequence[Target] | None = None
    ) -> Outputs:
        """Detect.

        Args:
            images: ``[B, 3, H, W]``.
            mask: ``[B, H, W]``, True for padding.
            targets: of training; ``{"labels": [n], "boxes": [n, 4]}`` of each image.

        Returns:
            ``logits [layers, B, Q, C]`` and ``boxes [layers, B, Q, 4]``; where a system has them,
            ``encoder``, ``dn``, ``pre``, ``o2m`` and ``sep``: dicts of the like.

        Raises:
            ValueError: a shape or target does not fit; the message names the argument.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected shape [B, 3, H, W], got {tuple(images.shape)}")
        if mask is not None and (mask.dtype, mask.shape) != (torch.bool, images[:, 0].shape):
            shape, got = list(images[:, 0].shape), f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(f"mask: expected bool of shape {shape}, True for padding, got {got}")
        noised = None
        if self.training and self.denoising is not None and targets is not None:
            check_targets(targets, len(images), self.denoising.classes)
            noised = self.denoising.noise(targets)
        return self.detect(self.encoder(self.backbone(images), mask), noised)

    def detect(self, memory: enc.Memory, noised: Noised | None = None) -> Outputs:
        """All that comes after the encoder."""
        queries, proposed = self.queries(memory)
        if noised is None or self.denoising is None:
            outputs = split(self.decoder(queries, memory))
        else:
            both = self.denoising.before(queries, noised)
            said = self.decoder(both, memory, noised.blocked(queries.content.shape[1]))
            slots = noised.labels.shape[1]
            outputs = split({name: value[:, :, slots:] for name, value in said.items()})
            outputs["dn"] = split({name: value[:, :, :slots] for name, value in said.items()})
            outputs["dn"] |= {"pairs": noised.pairs, "groups": noised.groups}
            if not self.denoising.contrastive:  # DN-DETR: padding is told nothing
                outputs["dn"]["counted"] = noised.labels >= 0
        outputs |= proposed
        if self.training and self.o2m is not None and self.sep is not None:
            many, proposed = self.o2m[0](memory)
            outputs["encoder_o2m"] = proposed["encoder"]
            outputs["o2m"] = self.o2m[1](many, memory)
            outputs["sep"] = self.sep(queries, memory)
        return outputs


class SequentialDetector(nn.Module):
    """Stewart's: every pixel of the last map is a cell that an LSTM describes."""

    def __init__(self, backbone: Backbone, decoder: dec.SequentialDecoder) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, decoder

    def forward(
        self, images: Tensor, mask: Tensor | None = None, targets: Sequence[Target] | None = None
    ) -> Outputs:
        """As :class:`Detector`; padding is seen as image."""
        memory = enc.Memory.of(self.backbone(images)[-1:])
        height, width = images.shape[-2:]
        pixels = torch.tensor([width, height, width, height], device=images.device)
        outputs: Outputs = self.decoder(memory.features, enc.pixel_centres(memory), pixels)
        return outputs | {"pixels": pixels, "grid": torch.tensor(memory.shapes[0])}


def split(said: Mapping[str, Tensor]) -> Outputs:
    """D-FINE's first guess apart from what all layers say."""
    outputs: Outputs = {name: v for name, v in said.items() if not name.startswith("pre_")}
    if "pre_boxes" in said:
        outputs["pre"] = {"logits": said["pre_logits"][0], "boxes": said["pre_boxes"][0]}
    return outputs


# --- Postprocessing: outputs to boxes in pixels ------------------------------------------------


def in_pixels(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes ``[B, n, 4]`` as corners in pixels of images of ``sizes [B, (height, width)]``."""
    height, width = torch.as_tensor(sizes, device=boxes.device).unbind(-1)
    return to_corners(boxes) * torch.stack([width, height, width, height], -1)[:, None]


def best_scores(outputs: Outputs, sizes: Tensor, number: int = 300, fuse: bool = False) -> Results:
    """The best pairs of a query and a class: ``boxes`` (corners, pixels), ``scores``, ``labels``.

    Args:
        outputs: a detector's.
        sizes: ``(height, width)`` of each image.
        number: of results for each image, at most.
        fuse: a layer's score is the mean of its own and that of the layer before (Mr. DETR).
    """
    p = outputs["logits"].sigmoid()
    score = p[-1]
    if fuse:
        score = p[0]
        for layer in p[1:]:
            score = ((layer**2.001 + score**1.853) / 2).sqrt()
    classes = score.shape[-1]
    scores, where = score.flatten(1).topk(min(number, score[0].numel()))
    query = (where // classes)[..., None].expand(-1, -1, 4)
    boxes = in_pixels(outputs["boxes"][-1].gather(1, query), sizes)
    images = zip(boxes, scores, where % classes)
    return [{"boxes": b, "scores": s, "labels": c} for b, s, c in images]


def best_classes(outputs: Outputs, sizes: Tensor, until: float | None = None) -> Results:
    """Every query's best class of a softmax whose last class is "no object" (DETR).

    Args:
        outputs: a detector's.
        sizes: ``(height, width)`` of each image.
        until: queries of a cell are read in order until one scores less than this (Stewart).
    """
    scores, labels = outputs["logits"][-1].softmax(-1)[..., :-1].max(-1)
    keep = torch.ones_like(scores, dtype=torch.bool)
    if until is not None:
        cells = int(outputs["grid"].prod())
        sure = (scores >= until).unflatten(1, (cells, -1))
        keep = sure.long().cumprod(-1).bool().flatten(1)
    boxes = in_pixels(outputs["boxes"][-1], sizes)
    images = zip(boxes, scores, labels, keep)
    return [{"boxes": b[k], "scores": s[k], "labels": c[k]} for b, s, c, k in images]


# --- Parts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """How large a system is; each recipe's default is its paper's.

    Attributes:
        d: width.
        heads: of attention.
        levels: feature maps that attention samples.
        points: samples of a query, head and level; a list where levels differ.
        encoder_layers, decoder_layers: number of layers.
        hidden: width of feed-forward networks.
        queries: number of them.
        dropout: probability.
    """

    d: int = 256
    heads: int = 8
    levels: int = 4
    points: int | tuple[int, ...] = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    hidden: int = 1024
    queries: int = 300
    dropout: float = 0.0


def class_head(d: int, classes: int) -> nn.Linear:
    """Every class starts with a score of 0.01, that a thousand negatives do not drown the rest."""
    head = nn.Linear(d, classes)
    nn.init.constant_(head.bias, -math.log(99))
    return head


def box_head(d: int, outputs: int = 4, act: str = "relu") -> enc.MLP:
    """Starts as no correction at all."""
    return enc.MLP(d, d, outputs, 3, act).zeroed()


def each(layers: int, make: Callable[[], nn.Module], *, shared: bool = False) -> nn.ModuleList:
    """A head for every layer, or one for all."""
    return nn.ModuleList([make()] * layers if shared else [make() for _ in range(layers)])


def heads(
    size: Size, classes: int, *, shared: bool = False, norm: bool = False, **how: Any
) -> dec.Heads:
    """Heads of a decoder; ``how`` is their treatment of references."""
    d, n = size.d, size.decoder_layers
    return dec.Heads(
        each(n, partial(class_head, d, classes), shared=shared),
        each(n, partial(box_head, d), shared=shared),
        norm=nn.LayerNorm(d) if norm else None,
        **how,
    )


def layers_with(
    cross_attention: Callable[[], nn.Module], size: Size, act: str = "relu", **how: Any
) -> list[dec.DecoderLayer]:
    """A decoder's layers with plain self-attention."""

    def layer() -> dec.DecoderLayer:
        ffn = enc.FeedForward(size.d, size.hidden, act, size.dropout)
        looks = enc.SelfAttention(size.d, size.heads, size.dropout)
        return dec.DecoderLayer(looks, cross_attention(), ffn, size.d, dropout=size.dropout, **how)

    return [layer() for _ in range(size.decoder_layers)]


def sampling(size: Size) -> enc.DeformableAttention:
    """Deformable DETR's attention."""
    assert isinstance(size.points, int), "points of each level are RT-DETRv2's and D-FINE's"
    return enc.DeformableAttention(MSDeformAttn(size.d, size.levels, size.heads, size.points))


def encoder_layers(
    attention: Callable[[], nn.Module], size: Size, act: str = "relu"
) -> list[enc.EncoderLayer]:
    """An encoder's layers."""
    return [
        enc.EncoderLayer(attention(), size.d, size.hidden, act, size.dropout)
        for _ in range(size.encoder_layers)
    ]


def deformable_encoder(backbone: Backbone, size: Size, **sines: float) -> enc.DeformableEncoder:
    """Of Deformable DETR; DINO's line differs in the sines of positions."""
    layers = encoder_layers(partial(sampling, size), size)
    return enc.DeformableEncoder(backbone.channels, layers, size.d, levels=size.levels, **sines)


def variant(module: Any, **replaced: nn.Module) -> Any:
    """The same module with the same parameters, but for the parts that are replaced."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **replaced}
    return twin


# Weights of losses. DETR's line classifies with a softmax or focal loss; Deformable DETR and
# Mr. DETR weigh it twice.
ONE = {"class": 1.0, "l1": 5.0, "giou": 2.0}
TWO = ONE | {"class": 2.0}
DAB_SINES = {"temperature": 20.0, "shift": 0.0}

# --- Systems -----------------------------------------------------------------------------------


def stewart(
    backbone: Backbone, classes: int, size: Size = Size(d=250, dropout=0.15), *, steps: int = 5
) -> System:
    """Stewart et al. (arXiv 1506.04878), where sets of boxes began: an LSTM says them in order.

    Args:
        backbone: images to maps; the last one's pixels are the cells.
        classes: number of classes; one, people, in the paper.
        size: ``d`` units of the LSTM, and its dropout.
        steps: boxes of a cell.
    """
    decoder = dec.SequentialDecoder(backbone.channels[-1], classes, steps, size.d, size.dropout)
    criterion = Criterion(
        {"class": 1, "l1": 0.03}, match=Lexicographic(steps), classification=losses.cross_entropy
    )
    model = SequentialDetector(backbone, decoder)
    # An average precision counts unsure boxes too: it asks for a low threshold.
    return System(model, criterion, partial(best_classes, until=0.01))


def detr(
    backbone: Backbone, classes: int, size: Size = Size(hidden=2048, queries=100, dropout=0.1)
) -> System:
    """DETR (arXiv 2005.12872): queries attend to every pixel of one map; sets are matched."""
    d, n = size.d, size.decoder_layers
    look = partial(enc.SelfAttention, d, size.heads, size.dropout)
    encoder = enc.DenseEncoder(backbone.channels[-1], encoder_layers(look, size), d)
    said = dec.Heads(
        each(n, lambda: nn.Linear(d, classes + 1), shared=True),  # the last: no object
        each(n, lambda: enc.MLP(d, d, 4, 3), shared=True),
        norm=nn.LayerNorm(d),
        refine="no",
    )
    attend = partial(dec.DenseCrossAttention, d, size.heads, size.dropout)
    decoder = dec.Decoder(layers_with(attend, size), dec.FixedPosition(), said)
    queries = dec.LearntQueries(size.queries, d, points=False)
    criterion = Criterion(
        ONE, match=Hungarian(classes=1, softmax=True), classification=losses.softmax
    )
    return System(Detector(backbone, encoder, queries, decoder), criterion, best_classes)


def dab_detr(backbone: Backbone, classes: int, size: Size = Size(hidden=2048)) -> System:
    """DAB-DETR (arXiv 2201.12329), dense: queries are boxes, and attend by place and by size."""
    d = size.d
    pixels = encoder_layers(lambda: enc.SelfAttention(d, size.heads), size, "prelu")
    channels = backbone.channels[-1]
    encoder = enc.DenseEncoder(channels, pixels, d, scale=True, temperature=20)
    layers = [
        dec.DecoderLayer(
            dec.ConditionalSelfAttention(d, size.heads),
            dec.ConditionalCrossAttention(d, size.heads, first=i == 0),
            enc.FeedForward(d, size.hidden, "prelu", size.dropout),
            d,
            dropout=size.dropout,
        )
        for i in range(size.decoder_layers)
    ]
    said = heads(size, classes, shared=True, norm=True, refine="twice", eps=1e-3)
    decoder = dec.Decoder(layers, dec.ConditionalPosition(d), said)
    queries = dec.AnchorQueries(size.queries, d, content=None)
    return System(Detector(backbone, encoder, queries, decoder), Criterion(ONE), best_scores)


def deformable_detr(
    backbone: Backbone,
    classes: int,
    size: Size = Size(dropout=0.1),
    *,
    refine: bool = False,
    two_stage: bool = False,
) -> System:
    """Deformable DETR (arXiv 2010.04159): queries sample a few points of every map.

    Args:
        backbone: images to maps.
        classes: number of classes.
        size: of the model.
        refine: each layer corrects the boxes of the layer before it.
        two_stage: queries are the encoder's best proposals; refined.
    """
    d, moves = size.d, refine or two_stage
    said = heads(size, classes, shared=not moves, refine="layer" if moves else "no")
    queries: nn.Module = dec.LearntQueries(size.queries, d, points=True)
    if two_stage:
        head, box = class_head(d, classes), box_head(d)
        queries = dec.SelectedQueries(
            size.queries, d, head, box, content="sine", objectness=True, keep_all=True
        )
    else:  # boxes start small
        with torch.no_grad():
            said.get_parameter("boxes.0.layers.2.bias")[2:] = -2
    decoder = dec.Decoder(layers_with(partial(sampling, size), size), dec.FixedPosition(), said)
    model = Detector(backbone, deformable_encoder(backbone, size), queries, decoder)
    return System(model, Criterion(TWO, encoder="binary"), partial(best_scores, number=100))


def dab_deformable_detr(backbone: Backbone, classes: int, size: Size = Size(hidden=2048)) -> System:
    """DAB-Deformable-DETR (arXiv 2201.12329): learnt boxes that say where to sample."""
    d = size.d
    said = heads(size, classes, refine="layer", eps=1e-3)
    layers = layers_with(partial(sampling, size), size)
    decoder = dec.Decoder(layers, dec.SinePosition(d, scale=True), said)
    queries = dec.AnchorQueries(size.queries, d, content=d)
    encoder = deformable_encoder(backbone, size, **DAB_SINES)
    return System(Detector(backbone, encoder, queries, decoder), Criterion(ONE), best_scores)


def restoring(classes: int, size: Size) -> Denoising:
    """DN-DETR's noise. The last channel of a content says whether a query is noised."""
    how: Any = {"groups": 5, "label_noise": 0.2, "box_noise": 0.4, "indicator": True}
    return Denoising(classes, size.d, contrastive=False, **how)


def dn_detr(backbone: Backbone, classes: int, size: Size = Size(hidden=2048)) -> System:
    """DN-DETR (arXiv 2203.01305) on DAB-DETR: noised boxes are to be restored."""
    system = dab_detr(backbone, classes, size)
    noise = system.model.denoising = restoring(classes, size)
    system.model.queries = dec.AnchorQueries(size.queries, size.d, content=noise.embed)
    return system


def dn_deformable_detr(backbone: Backbone, classes: int, size: Size = Size(hidden=2048)) -> System:
    """DN-DETR (arXiv 2203.01305) on DAB-Deformable-DETR."""
    system = dab_deformable_detr(backbone, classes, size)
    system.model.denoising = restoring(classes, size)
    system.model.queries = dec.AnchorQueries(size.queries, size.d, content=size.d - 1)
    return system


def dino(backbone: Backbone, classes: int, size: Size = Size(hidden=2048, queries=900)) -> System:
    """DINO (arXiv 2203.03605): contrastive denoising, mixed selection, look forward twice."""
    d = size.d
    head, box = class_head(d, classes), box_head(d)
    queries = dec.SelectedQueries(size.queries, d, head, box, content="learnt")
    said = heads(size, classes, shared=True, norm=True, refine="twice", eps=1e-3)
    layers = layers_with(partial(sampling, size), size)
    decoder = dec.Decoder(layers, dec.SinePosition(d, scale=False), said)
    encoder, denoising = deformable_encoder(backbone, size, **DAB_SINES), Denoising(classes, d)
    model = Detector(backbone, encoder, queries, decoder, denoising=denoising)
    return System(model, Criterion(ONE), best_scores)


def rtdetr(
    backbone: Backbone,
    classes: int,
    size: Size = Size(levels=3),
    *,
    version: int = 1,
    method: str = "default",
    eval_layers: int | None = None,
    **encoder: Any,
) -> System:
    """RT-DETR (arXiv 2304.08069) and RT-DETRv2 (2407.17140): a light encoder, and scores that
    know how good their boxes are.

    Args:
        backbone: images to maps.
        classes: number of classes.
        size: of the model; v2 takes points of each level.
        version: 1 or 2.
        method: "discrete" samples pixels instead of interpolating them (v2).
        eval_layers: decoder layers to run in evaluation.
        encoder: ``expansion`` and ``depth`` of its blocks.
    """
    attend = partial(sampling_boxes, size, "rtdetr" if version == 1 else "rtdetrv2", method)
    layers = layers_with(attend, size, limit=65504 if version == 1 else None)
    said = heads(size, classes, refine="twice")
    decoder = dec.Decoder(layers, dec.BoxPosition(size.d), said, eval_layers=eval_layers)
    model = hybrid(backbone, classes, size, decoder, **encoder)
    return System(model, Criterion(ONE, classification=losses.varifocal), best_scores)


def sampling_boxes(size: Size, variant: str, method: str = "default") -> enc.DeformableAttention:
    """RT-DETR's attention and its successors'."""
    points = size.points if isinstance(size.points, int) else list(size.points)
    return enc.DeformableAttention(
        MSDeformableAttention(size.d, size.heads, size.levels, points, method, variant=variant)
    )


def hybrid(
    backbone: Backbone,
    classes: int,
    size: Size,
    decoder: dec.Decoder,
    act: str = "relu",
    **how: Any,
) -> Detector:
    """RT-DETR's frame: hybrid encoder, content from the memory, contrastive denoising."""
    d = size.d
    encoder = enc.HybridEncoder(backbone.channels, d, heads=size.heads, hidden=size.hidden, **how)
    head, box = class_head(d, classes), box_head(d, act=act)
    queries = dec.SelectedQueries(size.queries, d, head, box, content="memory")
    denoising = Denoising(classes, d, padding=True, eps=1e-5)
    return Detector(backbone, encoder, queries, decoder, denoising=denoising)


def dfine(
    backbone: Backbone,
    classes: int,
    size: Size = Size(levels=3, points=(3, 6, 3)),
    *,
    eval_layers: int | None = None,
    act: str = "relu",
    scale: float = 4.0,
    **encoder: Any,
) -> System:
    """D-FINE (arXiv 2410.13842): boxes as distributions of their edges, taught by the last layer.

    Args:
        backbone: images to maps.
        classes: number of classes.
        size: of the model.
        eval_layers: decoder layers to run in evaluation.
        act: activation of layers and heads.
        scale: of the edges' bins; larger for smaller corrections, 8 in the largest model.
        encoder: ``expansion`` and ``depth`` of its blocks, which are RT-DETR's.
    """
    d, n, bins = size.d, size.decoder_layers, EdgeBins(scale=scale)
    said = FineHeads(
        each(n, partial(class_head, d, classes)),
        each(n, partial(box_head, d, 4 * (bins.count + 1), act)),
        box_head(d, act=act),
        bins,
        act=act,
    )
    attend = partial(sampling_boxes, size, "dfine")
    layers = layers_with(attend, size, act, gated=True, limit=65504)
    decoder = dec.Decoder(layers, dec.BoxPosition(d, act, limit=10), said, eval_layers=eval_layers)
    model = hybrid(backbone, classes, size, decoder, act, project=False, **encoder)
    weights, kind = ONE | {"fgl": 0.15, "ddf": 1.5}, losses.varifocal
    criterion = Criterion(weights, classification=kind, share_matches=True, bins=bins)
    return System(model, criterion, best_scores)


def deim(
    backbone: Backbone,
    classes: int,
    size: Size = Size(levels=3, points=(3, 6, 3)),
    *,
    base: Callable[..., System] = dfine,
    **options: Any,
) -> System:
    """DEIM (arXiv 2412.04234): a loss that does not give up on poor matches, for D-FINE or, as
    ``base``, RT-DETRv2; that images hold more objects is the data's part.
    """
    if base is dfine:
        options = {"act": "silu", **options}
    system = base(backbone, classes, size, **options)
    system.criterion.classification = losses.matchability_aware
    return system


def mr_detr(
    backbone: Backbone, classes: int, size: Size = Size(queries=900), *, tokens: int = 10
) -> System:
    """Mr. DETR (arXiv 2412.10028): two more routes through one decoder, many queries an object.

    The three routes share cross-attention, norms and heads. ``o2m`` is told by tokens that many
    may answer; ``sep`` has a feed-forward network of its own instead. Only the first is used.
    """
    d = size.d
    said = heads(size, classes, refine="twice", eps=1e-3)
    how: Any = {"content": "learnt", "position": True, "objectness": True, "keep_all": True}
    queries = dec.SelectedQueries(size.queries, d, class_head(d, classes), box_head(d), **how)
    layers = layers_with(partial(sampling, size), size)
    decoder = dec.Decoder(layers, dec.FixedPosition(), said)

    many = variant(queries, classes=class_head(d, classes), box=box_head(d))
    o2m, sep = nn.ModuleList(), nn.ModuleList()
    for layer in layers:
        told = dec.InstructedSelfAttention(layer.self_attn.get_submodule("attention"), d, tokens)
        o2m.append(variant(layer, self_attn=told, join_self=enc.AddNorm(d)))
        sep.append(variant(layer, ffn=enc.FeedForward(d, size.hidden, "relu", size.dropout)))
    model = Detector(
        backbone,
        deformable_encoder(backbone, size),
        queries,
        decoder,
        o2m=(many, variant(decoder, layers=o2m)),
        sep=variant(decoder, layers=sep),
    )
    assign = OneToMany(sample=int(size.queries * 0.25))
    criterion = Criterion(TWO, encoder="anchors", encoder_weight=3, one_to_many=assign)
    return System(model, criterion, partial(best_scores, fuse=True))
