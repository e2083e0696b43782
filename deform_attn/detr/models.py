"""The systems: a function each, from a backbone, a number of classes and a size to a detector.

The defaults are those of the papers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from deform_attn.detr import decoder as dec
from deform_attn.detr import encoder as enc
from deform_attn.detr import losses
from deform_attn.detr.boxes import to_corners
from deform_attn.detr.denoising import Denoising, Noised
from deform_attn.detr.dfine import EdgeBins, FineHeads
from deform_attn.detr.encoder import Size
from deform_attn.detr.losses import Criterion
from deform_attn.detr.matching import Hungarian, Lexicographic, OneToMany, Targets, check_targets

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
        conv = partial(enc.ConvNorm, size=3, act=nn.ReLU)
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


class System(NamedTuple):
    """A detector with what it is trained and used with."""

    model: nn.Module  # (images [B, 3, H, W], mask [B, H, W] or None, targets or None) -> outputs
    criterion: Criterion  # (outputs, targets) -> weighted losses
    postprocess: Callable[[Outputs, Tensor], Results]  # (outputs, sizes [B, (height, width)])


Builder = Callable[..., System]  # of a backbone, a number of classes and a size


class Detector(nn.Module):
    """Backbone, encoder, queries, decoder; and what only training has.

    Args:
        backbone: images to maps.
        encoder: maps and padding to a memory.
        queries: memory to queries and proposals.
        decoder: queries and memory to predictions.
        denoising: queries of noised objects.
        o2m, sep: other decoders, with queries of its own and with the first one's (Mr. DETR).
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
        self, images: Tensor, mask: Tensor | None = None, targets: Targets | None = None
    ) -> Outputs:
        """Detect.

        Args:
            images: ``[B, 3, H, W]``.
            mask: ``[B, H, W]``, True for padding.
            targets: of training; ``{"labels": [n], "boxes": [n, 4]}`` of each image.

        Returns:
            ``logits [layers, B, Q, C]`` and ``boxes [layers, B, Q, 4]``; where a system has them,
            ``pre_logits`` and ``pre_boxes`` of one layer, and ``encoder``, ``dn``, ``o2m`` and
            ``sep``: dicts of the like.

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
            outputs = self.decoder(queries, memory)
        else:
            both = self.denoising.before(queries, noised)
            said = self.decoder(both, memory, noised.blocked(queries.content.shape[1]))
            slots = noised.labels.shape[1]
            outputs = {name: value[:, :, slots:] for name, value in said.items()}
            outputs["dn"] = {name: value[:, :, :slots] for name, value in said.items()}
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
        self, images: Tensor, mask: Tensor | None = None, targets: Targets | None = None
    ) -> Outputs:
        """As :class:`Detector`; padding is seen as image."""
        memory = enc.Memory.of(self.backbone(images)[-1:])
        height, width = images.shape[-2:]
        pixels = torch.tensor([width, height, width, height], device=images.device)
        outputs: Outputs = self.decoder(memory.features, enc.pixel_centres(memory), pixels)
        return outputs | {"pixels": pixels, "grid": torch.tensor(memory.shapes[0])}


# --- Postprocessing: outputs to boxes in pixels ------------------------------------------------


def in_pixels(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes ``[B, n, 4]`` as corners in pixels of images of ``sizes [B, (height, width)]``."""
    height, width = torch.as_tensor(sizes, device=boxes.device).unbind(-1)
    return to_corners(boxes) * torch.stack([width, height, width, height], -1)[:, None]


def best_scores(outputs: Outputs, sizes: Tensor, number: int = 300, fuse: bool = False) -> Results:
    """The best pairs of a query and a class: ``boxes`` (corners, pixels), ``scores``, ``labels``.

    At most ``number`` of them for each image of ``sizes [B, (height, width)]``. With ``fuse`` a
    layer's score is the mean of its own and that of the layer before (Mr. DETR).
    """
    layers = outputs["logits"] if fuse else outputs["logits"][-1:]
    score, *others = layers.sigmoid()
    for layer in others:
        score = ((layer**2.001 + score**1.853) / 2).sqrt()
    classes = score.shape[-1]
    scores, where = score.flatten(1).topk(min(number, score[0].numel()))
    query = (where // classes)[..., None].expand(-1, -1, 4)
    boxes = in_pixels(outputs["boxes"][-1].gather(1, query), sizes)
    images = zip(boxes, scores, where % classes)
    return [{"boxes": b, "scores": s, "labels": c} for b, s, c in images]


def best_classes(outputs: Outputs, sizes: Tensor, until: float | None = None) -> Results:
    """Every query's best class of a softmax whose last class is "no object" (DETR).

    The results are those of :func:`best_scores`. Queries of a cell are read in order, and only
    ``until`` one scores less than that (Stewart).
    """
    scores, labels = outputs["logits"][-1].softmax(-1)[..., :-1].max(-1)
    keep = torch.ones_like(scores, dtype=torch.bool)
    if until is not None:
        sure = (scores >= until).unflatten(1, (int(outputs["grid"].prod()), -1))  # a row a cell
        keep = sure.long().cumprod(-1).bool().flatten(1)
    boxes = in_pixels(outputs["boxes"][-1], sizes)
    images = zip(boxes, scores, labels, keep)
    return [{"boxes": b[k], "scores": s[k], "labels": c[k]} for b, s, c, k in images]


# --- Systems -----------------------------------------------------------------------------------


def decoder_layers(
    size: Size, look: enc.Make = enc.DeformableAttention, **how: Any
) -> list[dec.DecoderLayer]:
    """A decoder's layers: plain self-attention, and ``look`` at the image."""
    layers = range(size.decoder_layers)
    return [dec.DecoderLayer(size, look, enc.SelfAttention, **how) for _ in layers]


def variant(module: Any, **replaced: nn.Module) -> Any:
    """The same module with the same parameters, but for the parts that are replaced."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **replaced}
    return twin


# Weights of losses. DETR's line classifies with a softmax or focal loss; Deformable DETR and
# Mr. DETR weigh it twice.
ONE = {"class": 1.0, "l1": 5.0, "giou": 2.0}
TWO = ONE | {"class": 2.0}
FINE = Size(levels=3, points=(3, 6, 3))  # D-FINE's: most points where objects are seen best
DAB_SINES = {"temperature": 20.0, "shift": 0.0}


def stewart(
    backbone: Backbone, classes: int, size: Size = Size(d=250, dropout=0.15), *, steps: int = 5
) -> System:
    """Stewart et al. (arXiv 1506.04878), where sets of boxes began: an LSTM says them in order.

    Each pixel of the backbone's last map is a cell, with as many boxes as ``steps``; ``size`` gives
    the number of the LSTM's units, ``d``, and its dropout.
    """
    decoder = dec.SequentialDecoder(backbone.channels[-1], size, classes, steps)
    weights, kind = {"class": 1, "l1": 0.03}, losses.cross_entropy
    criterion = Criterion(weights, match=Lexicographic(steps), classification=kind)
    model = SequentialDetector(backbone, decoder)
    # An average precision counts unsure boxes too: it asks for a low threshold.
    return System(model, criterion, partial(best_classes, until=0.01))


def detr(
    backbone: Backbone, classes: int, size: Size = Size(hidden=2048, queries=100, dropout=0.1)
) -> System:
    """DETR (arXiv 2005.12872): queries attend to every pixel of one map; sets are matched."""
    encoder = enc.DenseEncoder(backbone.channels[-1], size)
    # The last class is no object.
    said = dec.Heads(size, classes + 1, refine="no", shared=True, norm=True, plain=True)
    layers = decoder_layers(size, look=dec.DenseCrossAttention)
    decoder = dec.Decoder(size, layers, dec.fixed_position, said)
    queries = dec.LearntQueries(size, points=False)
    match = Hungarian(classes=1, softmax=True)
    criterion = Criterion(ONE, match=match, classification=losses.softmax)
    return System(Detector(backbone, encoder, queries, decoder), criterion, best_classes)


def dab_detr(backbone: Backbone, classes: int, size: Size = Size(hidden=2048)) -> System:
    """DAB-DETR (arXiv 2201.12329), dense: queries are boxes, and attend by place and by size."""
    own = replace(size, act=nn.PReLU)  # of feed-forward networks alone
    encoder = enc.DenseEncoder(backbone.channels[-1], own, scale=True, temperature=20)
    looks = [partial(dec.ConditionalCrossAttention, first=True)]
    looks += [partial(dec.ConditionalCrossAttention, first=False)] * (size.decoder_layers - 1)
    layers = [dec.DecoderLayer(own, look, dec.ConditionalSelfAttention) for look in looks]
    said = dec.Heads(size, classes, refine="twice", shared=True, norm=True, eps=1e-3)
    decoder = dec.Decoder(size, layers, dec.ConditionalPosition(size.d), said)
    queries = dec.AnchorQueries(size, content=None)
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

    With ``refine`` each layer corrects the boxes of the layer before it; with ``two_stage`` queries
    are the encoder's best proposals, and refined.
    """
    moves = refine or two_stage
    said = dec.Heads(size, classes, refine="layer" if moves else "no", shared=not moves)
    queries: nn.Module = dec.LearntQueries(size, points=True)
    if two_stage:
        queries = dec.SelectedQueries(size, classes, binary=True)
    else:  # boxes start small
        with torch.no_grad():
            said.get_parameter("boxes.0.layers.2.bias")[2:] = -2
    decoder = dec.Decoder(size, decoder_layers(size), dec.fixed_position, said)
    encoder = enc.DeformableEncoder(backbone.channels, size)
    model = Detector(backbone, encoder, queries, decoder)
    return System(model, Criterion(TWO, encoder="binary"), partial(best_scores, number=100))


def dab_deformable_detr(backbone: Backbone, classes: int, size: Size = Size(hidden=2048)) -> System:
    """DAB-Deformable-DETR (arXiv 2201.12329): learnt boxes that say where to sample."""
    said = dec.Heads(size, classes, refine="layer", eps=1e-3)
    decoder = dec.Decoder(size, decoder_layers(size), dec.SinePosition(size.d, scale=True), said)
    queries = dec.AnchorQueries(size, content=size.d)
    encoder = enc.DeformableEncoder(backbone.channels, size, **DAB_SINES)
    return System(Detector(backbone, encoder, queries, decoder), Criterion(ONE), best_scores)


def dn_detr(
    backbone: Backbone, classes: int, size: Size = Size(hidden=2048), *, base: Builder = dab_detr
) -> System:
    """DN-DETR (arXiv 2203.01305): noised boxes are to be restored, on DAB-DETR or, as ``base``,
    DAB-Deformable-DETR.
    """
    system = base(backbone, classes, size)
    how: Any = {"groups": 5, "label_noise": 0.2, "box_noise": 0.4}
    noise = system.model.denoising = Denoising(classes, size.d, contrastive=False, **how)
    content = noise.embed if isinstance(system.model.encoder, enc.DenseEncoder) else size.d - 1
    system.model.queries = dec.AnchorQueries(size, content=content)
    return system


def dn_deformable_detr(backbone: Backbone, classes: int, size: Size = Size(hidden=2048)) -> System:
    """DN-DETR on DAB-Deformable-DETR."""
    return dn_detr(backbone, classes, size, base=dab_deformable_detr)


def dino(backbone: Backbone, classes: int, size: Size = Size(hidden=2048, queries=900)) -> System:
    """DINO (arXiv 2203.03605): contrastive denoising, mixed selection, look forward twice."""
    queries = dec.SelectedQueries(size, classes, learnt=True)
    said = dec.Heads(size, classes, refine="twice", shared=True, norm=True, eps=1e-3)
    decoder = dec.Decoder(size, decoder_layers(size), dec.SinePosition(size.d, scale=False), said)
    encoder = enc.DeformableEncoder(backbone.channels, size, **DAB_SINES)
    model = Detector(backbone, encoder, queries, decoder, denoising=Denoising(classes, size.d))
    return System(model, Criterion(ONE), best_scores)


def rtdetr(
    backbone: Backbone,
    classes: int,
    size: Size = Size(levels=3),
    *,
    version: int = 1,
    method: str = "default",
) -> System:
    """RT-DETR (arXiv 2304.08069) and RT-DETRv2 (2407.17140): a light encoder, and scores that
    know how good their boxes are.

    The ``version`` is 1 or 2; v2 takes points of each level, and with the method "discrete" it
    samples pixels instead of interpolating them.
    """
    like, limit = ("rtdetr", 65504) if version == 1 else ("rtdetrv2", None)
    look = partial(enc.DeformableAttention, variant=like, method=method)
    layers = decoder_layers(size, look=look, limit=limit)
    said = dec.Heads(size, classes, refine="twice")
    decoder = dec.Decoder(size, layers, dec.BoxPosition(size), said)
    model = hybrid(backbone, classes, size, decoder)
    return System(model, Criterion(ONE, classification=losses.varifocal), best_scores)


def hybrid(
    backbone: Backbone, classes: int, size: Size, decoder: dec.Decoder, *, fine: bool = False
) -> Detector:
    """RT-DETR's frame: hybrid encoder, content from the memory, contrastive denoising."""
    encoder = enc.HybridEncoder(backbone.channels, size, fine=fine)
    queries = dec.SelectedQueries(size, classes)
    denoising = Denoising(classes, size.d, padding=True, eps=1e-5)
    return Detector(backbone, encoder, queries, decoder, denoising=denoising)


def dfine(backbone: Backbone, classes: int, size: Size = FINE, *, scale: float = 4.0) -> System:
    """D-FINE (arXiv 2410.13842): boxes as distributions of their edges, taught by the last layer.

    ``scale`` is that of the edges' bins: larger for smaller corrections, 8 in the largest model.
    """
    bins = EdgeBins(scale=scale)
    said = FineHeads(size, classes, bins)
    look = partial(enc.DeformableAttention, variant="dfine")
    layers = decoder_layers(size, look, gated=True, limit=65504)
    decoder = dec.Decoder(size, layers, dec.BoxPosition(size, limit=10), said)
    model = hybrid(backbone, classes, size, decoder, fine=True)
    weights = ONE | {"fgl": 0.15, "ddf": 1.5}
    criterion = Criterion(weights, classification=losses.varifocal, bins=bins)
    return System(model, criterion, best_scores)


def deim(
    backbone: Backbone, classes: int, size: Size = FINE, *, base: Builder = dfine, **options: Any
) -> System:
    """DEIM (arXiv 2412.04234): a loss that does not give up on poor matches, for D-FINE or, as
    ``base``, RT-DETRv2, both with SiLU; that images hold more objects is the data's part.
    """
    size = replace(size, act=nn.SiLU)
    system = base(backbone, classes, size, **options)
    if system.criterion.bins is None:  # RT-DETRv2's positions are as deep as its boxes
        system.model.get_submodule("decoder.position").mlp = enc.MLP(4, size.d, size.d, 3, size.act)
    system.criterion.classification = losses.matchability_aware
    return system


def mr_detr(
    backbone: Backbone, classes: int, size: Size = Size(queries=900), *, iou: float = 0.7
) -> System:
    """Mr. DETR (arXiv 2412.10028): two more routes through one decoder, many queries an object.

    The three routes share cross-attention, norms and heads. ``o2m`` is told by tokens that many
    may answer; ``sep`` has a feed-forward network of its own instead. Only the first is used.
    The IoU's weight in the assignment is 0.8 in the official variants on DINO and Align-DETR.
    """
    d = size.d
    said = dec.Heads(size, classes, refine="twice", eps=1e-3)
    queries = dec.SelectedQueries(size, classes, learnt=True, binary=True)
    layers = decoder_layers(size)
    decoder = dec.Decoder(size, layers, dec.fixed_position, said)

    many = variant(queries, classes=enc.class_head(d, classes), box=enc.box_head(d))
    o2m, sep = nn.ModuleList(), nn.ModuleList()
    for layer in layers:
        told = dec.InstructedSelfAttention(layer.self_attn.get_submodule("attention"), d, tokens=10)
        o2m.append(variant(layer, self_attn=told, join_self=enc.AddNorm(d)))
        sep.append(variant(layer, ffn=enc.FeedForward(size)))
    encoder = enc.DeformableEncoder(backbone.channels, size)
    o2m_route, sep_route = (many, variant(decoder, layers=o2m)), variant(decoder, layers=sep)
    model = Detector(backbone, encoder, queries, decoder, o2m=o2m_route, sep=sep_route)
    assign = OneToMany(iou, sample=int(size.queries * 0.25))
    criterion = Criterion(TWO, encoder="anchors", encoder_weight=3, one_to_many=assign)
    return System(model, criterion, partial(best_scores, fuse=True))
