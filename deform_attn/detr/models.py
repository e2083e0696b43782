"""The systems: a function each, from a backbone to a model, its criterion and its postprocessing.

A backbone is a module with ``channels``, those of the maps ``[B, c, H, W]`` that it makes of
images ``[B, 3, h, w]``, large maps first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from deform_attn import MSDeformableAttention, MSDeformAttn
from deform_attn.detr import losses
from deform_attn.detr.boxes import to_corners
from deform_attn.detr.decoder import (
    AnchorQueries,
    BoxPosition,
    ConditionalCrossAttention,
    ConditionalPosition,
    ConditionalSelfAttention,
    Decoder,
    DecoderLayer,
    DenseCrossAttention,
    FixedPosition,
    Heads,
    InstructedSelfAttention,
    LearntQueries,
    SelectedQueries,
    SinePosition,
)
from deform_attn.detr.denoising import Denoising, Noised
from deform_attn.detr.dfine import EdgeBins, FineHeads, Gate
from deform_attn.detr.encoder import (
    MLP,
    AddNorm,
    ConvNorm,
    DeformableAttention,
    DeformableEncoder,
    DenseEncoder,
    EncoderLayer,
    FeedForward,
    HybridEncoder,
    Memory,
    SelfAttention,
)
from deform_attn.detr.losses import Criterion
from deform_attn.detr.matching import Hungarian, OneToMany, Target

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
        self.stem = ConvNorm(3, channels[0], 3, 2, "relu")
        widths = [channels[0], *channels]
        self.stages = nn.ModuleList(
            nn.Sequential(ConvNorm(a, b, 3, 2, "relu"), ConvNorm(b, b, 3, 1, "relu"))
            for a, b in zip(widths, widths[1:])
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """``[B, 3, h, w]`` to a map of each stage."""
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


class System(NamedTuple):
    """A detector with what it is trained and used with."""

    model: Detector  # (images [B, 3, H, W], mask [B, H, W] or None, targets or None) -> outputs
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
        o2m: tuple[nn.Module, Decoder] | None = None,
        sep: Decoder | None = None,
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
        """
        noised = None
        if self.training and self.denoising is not None and targets is not None:
            noised = self.denoising.noise(targets)
        return self.detect(self.encoder(self.backbone(images), mask), noised)

    def detect(self, memory: Memory, noised: Noised | None = None) -> Outputs:
        """All that comes after the encoder."""
        queries, proposed = self.queries(memory)
        if noised is None or self.denoising is None:
            outputs = split(self.decoder(queries, memory))
        else:
            first = self.denoising.queries(noised)
            both = replace(
                queries,
                content=torch.cat([first.content, queries.content], 1),
                reference=torch.cat([first.reference, queries.reference], 1),
            )
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
        rows, columns = outputs["grid"]
        sure = (scores >= until).unflatten(1, (rows * columns, -1))
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


def box_head(d: int, outputs: int = 4, act: str = "relu", size: float = 0.0) -> MLP:
    """Starts as no correction at all; ``size`` is what is added to the logits of sizes."""
    head = MLP(d, d, outputs, 3, act)
    nn.init.zeros_(head.layers[-1].weight)
    nn.init.zeros_(head.layers[-1].bias)
    if size:
        nn.init.constant_(head.layers[-1].bias[2:], size)
    return head


def variant(module: Any, **replaced: nn.Module) -> Any:
    """The same module with the same parameters, but for the parts that are replaced."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **replaced}
    return twin


def repeated(module: nn.Module, layers: int) -> nn.ModuleList:
    """One head for all layers."""
    return nn.ModuleList([module] * layers)


def sampling(size: Size) -> DeformableAttention:
    """Deformable DETR's attention."""
    assert isinstance(size.points, int), "a list of points is RT-DETRv2's"
    return DeformableAttention(MSDeformAttn(size.d, size.levels, size.heads, size.points))


def deformable_encoder(backbone: Backbone, size: Size, **sines: float) -> DeformableEncoder:
    """Of Deformable DETR; DINO's line differs in the sines of positions."""
    layers = [
        EncoderLayer(sampling(size), size.d, size.hidden, dropout=size.dropout)
        for _ in range(size.encoder_layers)
    ]
    return DeformableEncoder(backbone.channels, layers, size.d, levels=size.levels, **sines)


def deformable_layers(size: Size) -> list[DecoderLayer]:
    """Of Deformable DETR's decoder."""
    return [
        DecoderLayer(
            SelfAttention(size.d, size.heads, size.dropout),
            sampling(size),
            FeedForward(size.d, size.hidden, "relu", size.dropout),
            size.d,
            dropout=size.dropout,
        )
        for _ in range(size.decoder_layers)
    ]


WEIGHTS = {"class": 2.0, "l1": 5.0, "giou": 2.0}
DAB_SINES = {"temperature": 20, "shift": 0.0}


# --- Systems -----------------------------------------------------------------------------------


def detr(
    backbone: Backbone, num_classes: int, size: Size = Size(hidden=2048, queries=100, dropout=0.1)
) -> System:
    """DETR (arXiv 2005.12872): queries attend to every pixel of one map; sets are matched."""
    d, n = size.d, size.decoder_layers

    def ffn() -> FeedForward:
        return FeedForward(d, size.hidden, "relu", size.dropout)

    encoder = DenseEncoder(
        backbone.channels[-1],
        [
            EncoderLayer(
                SelfAttention(d, size.heads, size.dropout), d, size.hidden, dropout=size.dropout
            )
            for _ in range(size.encoder_layers)
        ],
        d,
    )
    layers = [
        DecoderLayer(
            SelfAttention(d, size.heads, size.dropout),
            DenseCrossAttention(d, size.heads, size.dropout),
            ffn(),
            d,
            dropout=size.dropout,
        )
        for _ in range(n)
    ]
    heads = Heads(
        repeated(nn.Linear(d, num_classes + 1), n),
        repeated(MLP(d, d, 4, 3), n),
        refine="no",
        norm=nn.LayerNorm(d),
    )
    decoder = Decoder(layers, FixedPosition(), heads)
    model = Detector(backbone, encoder, LearntQueries(size.queries, d, points=False), decoder)
    criterion = Criterion(
        {"class": 1, "l1": 5, "giou": 2},
        match=Hungarian(classes=1, softmax=True),
        classification=losses.softmax,
    )
    return System(model, criterion, best_classes)


def dab_detr(
    backbone: Backbone, num_classes: int, size: Size = Size(hidden=2048)
) -> System:
    """DAB-DETR (arXiv 2201.12329), dense: queries are boxes, and attend by place and by size."""
    d, n = size.d, size.decoder_layers
    encoder = DenseEncoder(
        backbone.channels[-1],
        [
            EncoderLayer(SelfAttention(d, size.heads), d, size.hidden, "prelu", size.dropout)
            for _ in range(size.encoder_layers)
        ],
        d,
        scale=True,
        temperature=20,
    )
    layers = [
        DecoderLayer(
            ConditionalSelfAttention(d, size.heads),
            ConditionalCrossAttention(d, size.heads, first=i == 0),
            FeedForward(d, size.hidden, "prelu", size.dropout),
            d,
            dropout=size.dropout,
        )
        for i in range(n)
    ]
    heads = Heads(
        repeated(class_head(d, num_classes), n),
        repeated(box_head(d), n),
        refine="twice",
        norm=nn.LayerNorm(d),
        eps=1e-3,
    )
    decoder = Decoder(layers, ConditionalPosition(d), heads)
    model = Detector(backbone, encoder, AnchorQueries(size.queries, d, content=0), decoder)
    return System(model, Criterion({"class": 1, "l1": 5, "giou": 2}), best_scores)


def deformable_detr(
    backbone: Backbone,
    num_classes: int,
    size: Size = Size(dropout=0.1),
    *,
    refine: bool = False,
    two_stage: bool = False,
) -> System:
    """Deformable DETR (arXiv 2010.04159): queries sample a few points of every map.

    Args:
        backbone: images to maps.
        num_classes: number of classes.
        size: of the model.
        refine: each layer corrects the boxes of the layer before it.
        two_stage: queries are the encoder's best proposals; refined.
    """
    d, n = size.d, size.decoder_layers
    if refine or two_stage:
        # Without proposals, boxes start small.
        start = [0.0 if two_stage else -2.0] + [0.0] * n
        classes = nn.ModuleList(class_head(d, num_classes) for _ in range(n))
        boxes = nn.ModuleList(box_head(d, size=start[i]) for i in range(n))
    else:
        classes = repeated(class_head(d, num_classes), n)
        boxes = repeated(box_head(d, size=-2.0), n)
    heads = Heads(classes, boxes, refine="layer" if refine or two_stage else "no")
    queries: nn.Module = LearntQueries(size.queries, d, points=True)
    if two_stage:
        queries = SelectedQueries(
            size.queries,
            d,
            class_head(d, num_classes),
            box_head(d),
            content="sine",
            objectness=True,
            keep_all=True,
        )
    decoder = Decoder(deformable_layers(size), FixedPosition(), heads)
    model = Detector(backbone, deformable_encoder(backbone, size), queries, decoder)
    return System(model, Criterion(WEIGHTS, encoder="binary"), partial(best_scores, number=100))


def dab_deformable_detr(
    backbone: Backbone, num_classes: int, size: Size = Size()
) -> System:
    """DAB-Deformable-DETR (arXiv 2201.12329): learnt boxes that say where to sample."""
    d, n = size.d, size.decoder_layers
    heads = Heads(
        nn.ModuleList(class_head(d, num_classes) for _ in range(n)),
        nn.ModuleList(box_head(d) for _ in range(n)),
        refine="layer",
        eps=1e-3,
    )
    decoder = Decoder(deformable_layers(size), SinePosition(d, scale=True), heads)
    encoder = deformable_encoder(backbone, size, **DAB_SINES)
    model = Detector(backbone, encoder, AnchorQueries(size.queries, d, content=d), decoder)
    return System(model, Criterion({"class": 1, "l1": 5, "giou": 2}), best_scores)


def dn_deformable_detr(
    backbone: Backbone, num_classes: int, size: Size = Size()
) -> System:
    """DN-DETR (arXiv 2203.01305) on DAB-Deformable-DETR: noised boxes are to be restored."""
    model, criterion, postprocess = dab_deformable_detr(backbone, num_classes, size)
    # The last channel of the content says whether a query is noised.
    model.queries = AnchorQueries(size.queries, size.d, content=size.d - 1)
    model.denoising = Denoising(
        num_classes,
        size.d,
        contrastive=False,
        groups=5,
        label_noise=0.2,
        box_noise=0.4,
        indicator=True,
    )
    return System(model, criterion, postprocess)


def dino(
    backbone: Backbone, num_classes: int, size: Size = Size(hidden=2048, queries=900)
) -> System:
    """DINO (arXiv 2203.03605): contrastive denoising, mixed selection, look forward twice."""
    d, n = size.d, size.decoder_layers
    heads = Heads(
        repeated(class_head(d, num_classes), n),
        repeated(box_head(d), n),
        refine="twice",
        norm=nn.LayerNorm(d),
        eps=1e-3,
    )
    queries = SelectedQueries(
        size.queries, d, class_head(d, num_classes), box_head(d), content="learnt"
    )
    decoder = Decoder(deformable_layers(size), SinePosition(d, scale=False), heads)
    encoder = deformable_encoder(backbone, size, **DAB_SINES)
    denoising = Denoising(num_classes, d)
    model = Detector(backbone, encoder, queries, decoder, denoising=denoising)
    return System(model, Criterion({"class": 1, "l1": 5, "giou": 2}), best_scores)


def rtdetr(
    backbone: Backbone,
    num_classes: int,
    size: Size = Size(levels=3),
    *,
    version: int = 1,
    method: str = "default",
    eval_layers: int | None = None,
    expansion: float = 1.0,
    depth: float = 1.0,
) -> System:
    """RT-DETR (arXiv 2304.08069) and RT-DETRv2 (2407.17140): a light encoder, and scores that
    know how good their boxes are.

    Args:
        backbone: images to maps.
        num_classes: number of classes.
        size: of the model; v2 takes a list of points.
        version: 1 or 2.
        method: "discrete" samples pixels instead of interpolating them (v2).
        eval_layers: decoder layers to run in evaluation.
        expansion, depth: of the encoder's blocks.
    """
    d, n = size.d, size.decoder_layers
    layers = [
        DecoderLayer(
            SelfAttention(d, size.heads, size.dropout),
            DeformableAttention(
                MSDeformableAttention(
                    d,
                    size.heads,
                    size.levels,
                    size.points if isinstance(size.points, int) else list(size.points),
                    method,
                    variant="rtdetr" if version == 1 else "rtdetrv2",
                )
            ),
            FeedForward(d, size.hidden, "relu", size.dropout),
            d,
            dropout=size.dropout,
            limit=65504 if version == 1 else None,
        )
        for _ in range(n)
    ]
    heads = Heads(
        nn.ModuleList(class_head(d, num_classes) for _ in range(n)),
        nn.ModuleList(box_head(d) for _ in range(n)),
        refine="twice",
    )
    queries = SelectedQueries(
        size.queries, d, class_head(d, num_classes), box_head(d), content="memory"
    )
    encoder = HybridEncoder(
        backbone.channels, d, heads=size.heads, hidden=size.hidden, expansion=expansion, depth=depth
    )
    decoder = Decoder(layers, BoxPosition(d), heads, eval_layers=eval_layers)
    denoising = Denoising(num_classes, d, padding=True)
    model = Detector(backbone, encoder, queries, decoder, denoising=denoising)
    criterion = Criterion({"class": 1, "l1": 5, "giou": 2}, classification=losses.varifocal)
    return System(model, criterion, best_scores)


def dfine(
    backbone: Backbone,
    num_classes: int,
    size: Size = Size(levels=3, points=(3, 6, 3)),
    *,
    eval_layers: int | None = None,
    expansion: float = 1.0,
    depth: float = 1.0,
    act: str = "relu",
    reg_scale: float = 4.0,
    hybrid_width: int | None = None,
) -> System:
    """D-FINE (arXiv 2410.13842): boxes as distributions of their edges, taught by the last layer.

    Args:
        backbone: images to maps.
        num_classes: number of classes.
        size: of the model.
        eval_layers: decoder layers to run in evaluation.
        expansion, depth: of the encoder's blocks, which are RT-DETR's here.
        act: activation of the heads.
        reg_scale: larger for smaller corrections; 8 in the largest model.
        hybrid_width: of the encoder's maps, where it is not the decoder's.
    """
    d, n = size.d, size.decoder_layers
    points = size.points if isinstance(size.points, int) else list(size.points)
    layers = [
        DecoderLayer(
            SelfAttention(d, size.heads, size.dropout),
            DeformableAttention(
                MSDeformableAttention(d, size.heads, size.levels, points, variant="dfine")
            ),
            FeedForward(d, size.hidden, "silu", size.dropout),
            d,
            dropout=size.dropout,
            join_cross=Gate(d),
            limit=65504,
        )
        for _ in range(n)
    ]
    bins = EdgeBins(scale=reg_scale)
    heads = FineHeads(
        nn.ModuleList(class_head(d, num_classes) for _ in range(n)),
        nn.ModuleList(box_head(d, 4 * (bins.count + 1), act) for _ in range(n)),
        box_head(d, act=act),
        bins,
        act=act,
    )
    queries = SelectedQueries(
        size.queries, d, class_head(d, num_classes), box_head(d, act=act), content="memory"
    )
    encoder = HybridEncoder(
        backbone.channels,
        hybrid_width or d,
        d,
        project=False,
        heads=size.heads,
        hidden=size.hidden,
        expansion=expansion,
        depth=depth,
    )
    decoder = Decoder(layers, BoxPosition(d, act, limit=10), heads, eval_layers=eval_layers)
    denoising = Denoising(num_classes, d, padding=True)
    model = Detector(backbone, encoder, queries, decoder, denoising=denoising)
    criterion = Criterion(
        {"class": 1, "l1": 5, "giou": 2, "fgl": 0.15, "ddf": 1.5},
        classification=losses.varifocal,
        share_matches=True,
        bins=bins,
    )
    return System(model, criterion, best_scores)


def deim(
    backbone: Backbone,
    num_classes: int,
    size: Size = Size(levels=3, points=(3, 6, 3)),
    **options: Any,
) -> System:
    """DEIM (arXiv 2412.04234): D-FINE with a loss that does not give up on poor matches; its
    denser objects an image are the data's part.
    """
    model, criterion, postprocess = dfine(backbone, num_classes, size, **options)
    criterion.classification = losses.matchability_aware
    return System(model, criterion, postprocess)


def mr_detr(
    backbone: Backbone, num_classes: int, size: Size = Size(queries=900), *, tokens: int = 10
) -> System:
    """Mr. DETR (arXiv 2412.10028): two more routes through one decoder, many queries an object.

    The three routes share cross-attention, norms and heads. ``o2m`` is told by tokens that many
    may answer; ``sep`` has a feed-forward network of its own instead. Only the first is used.
    """
    d, n = size.d, size.decoder_layers
    layers = deformable_layers(size)
    heads = Heads(
        nn.ModuleList(class_head(d, num_classes) for _ in range(n)),
        nn.ModuleList(box_head(d) for _ in range(n)),
        refine="twice",
        eps=1e-3,
    )
    queries = SelectedQueries(
        size.queries,
        d,
        class_head(d, num_classes),
        box_head(d),
        content="learnt",
        position=True,
        objectness=True,
        keep_all=True,
    )
    decoder = Decoder(layers, FixedPosition(), heads)
    instructed = [
        variant(
            layer,
            self_attn=InstructedSelfAttention(layer.self_attn.attention, tokens),
            join_self=AddNorm(d),
        )
        for layer in layers
    ]
    apart = [
        variant(layer, ffn=FeedForward(d, size.hidden, "relu", size.dropout)) for layer in layers
    ]
    many = variant(queries, classes=class_head(d, num_classes), box=box_head(d))
    model = Detector(
        backbone,
        deformable_encoder(backbone, size),
        queries,
        decoder,
        o2m=(many, variant(decoder, layers=nn.ModuleList(instructed))),
        sep=variant(decoder, layers=nn.ModuleList(apart)),
    )
    criterion = Criterion(
        WEIGHTS, encoder="anchors", one_to_many=OneToMany(sample=int(size.queries * 0.25))
    )
    return System(model, criterion, partial(best_scores, fuse=True))
