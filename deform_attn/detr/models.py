"""The systems: functions that build a detector from a backbone, a number of classes and a size.

Defaults are those of the papers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from deform_attn.checks import check_integer, check_tensor
from deform_attn.detr.backbones import Backbone, Normalize
from deform_attn.detr.boxes import to_corners
from deform_attn.detr.decoder import Decoder, DecoderLayer, Heads, SequentialDecoder
from deform_attn.detr.denoising import Denoising, Noised
from deform_attn.detr.dfine import EdgeBins, FineHeads
from deform_attn.detr.encoder import DeformableEncoder, DenseEncoder
from deform_attn.detr.hybrid import HybridEncoder
from deform_attn.detr.layers import (
    AddNorm,
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    DeformableAttention,
    DenseCrossAttention,
    FeedForward,
    InstructedSelfAttention,
    Make,
    SelfAttention,
    Size,
    box_head,
    class_head,
)
from deform_attn.detr.losses import (
    AlignedLoss,
    Classification,
    Criterion,
    CrossEntropy,
    MatchabilityAwareLoss,
    VarifocalLoss,
    WeightedCrossEntropy,
)
from deform_attn.detr.matching import Hungarian, Lexicographic, OneToMany, Targets, check_targets
from deform_attn.detr.memory import Memory, no_padding, pixel_centres, resize_mask
from deform_attn.detr.queries import (
    AnchorQueries,
    BoxPos,
    ConditionalPos,
    LearntQueries,
    Queries,
    SelectedQueries,
    SinePos,
    fixed_pos,
)

Outputs = dict[str, Any]
Results = list[dict[str, Tensor]]


class System(NamedTuple):
    """A detector with what it is trained and used with.

    Attributes:
        model: ``(images, padding_mask or None, targets or None)`` to outputs, see
            :class:`Detector`.
        criterion: ``(outputs, targets)`` to weighted losses by name.
        postprocess: ``(outputs, sizes [B, (height, width)])`` to boxes in pixels, scores and labels
            of each image.
    """

    model: nn.Module
    criterion: Criterion
    postprocess: Postprocess


Builder = Callable[..., System]  # of a backbone, a number of classes and a size


def check_images(images: Tensor, padding_mask: Tensor | None) -> None:
    """Check the inputs of a detector.

    Raises:
        TypeError: ``images`` is no tensor.
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    check_tensor("images", images)
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected shape [B, 3, H, W], got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(
            f"images: expected numbers in [0, 1], got {images.dtype}; divide bytes by 255"
        )
    if padding_mask is None:
        return
    if padding_mask.dtype != torch.bool or padding_mask.shape != images[:, 0].shape:
        shape, got = list(images[:, 0].shape), f"{padding_mask.dtype} {tuple(padding_mask.shape)}"
        raise ValueError(
            f"padding_mask: expected bool of shape {shape}, True for padding, got {got}"
        )


class Detector(nn.Module):
    """Backbone, encoder, queries and decoder; and the parts that only training uses.

    Args:
        backbone: images to maps.
        encoder: maps and padding to a memory.
        queries: memory to queries and proposals.
        decoder: queries and memory to predictions.
        denoising: makes queries of noised objects.
        o2m: queries and decoder of Mr. DETR's one-to-many route.
        sep: decoder of its route with a separate feed-forward network.
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
        self.normalize = Normalize.of(backbone)
        self.queries, self.decoder, self.denoising = queries, decoder, denoising
        self.o2m_queries = o2m[0] if o2m is not None else None
        self.o2m_decoder = o2m[1] if o2m is not None else None
        self.sep_decoder = sep

    def forward(
        self,
        images: Tensor,
        padding_mask: Tensor | None = None,
        targets: Targets | None = None,
    ) -> Outputs:
        """Detect.

        Args:
            images: ``[B, 3, H, W]``, RGB in [0, 1].
            padding_mask: bool ``[B, H, W]``, True for padding, which is right of and below the
                image.
            targets: for training: ``{"labels": [n], "boxes": [n, 4]}`` of each image.

        Returns:
            ``logits [layers, B, Q, C]`` and ``boxes [layers, B, Q, 4]``, ``(cx, cy, w, h)`` as
            fractions of the unpadded image. Some systems add ``pre_logits`` and ``pre_boxes`` of
            one layer, and dicts of such tensors: ``encoder``, ``encoder_o2m``, ``dn``, ``o2m``,
            ``sep``.

        Raises:
            ValueError: a shape or target does not fit; the message names the argument.
        """
        check_images(images, padding_mask)
        noised = None
        if self.training and self.denoising is not None and targets is not None:
            check_targets(targets, images.shape[0], self.denoising.num_classes)
            noised = self.denoising.noise(targets)
        maps = self.backbone(self.normalize(images, padding_mask))
        outputs = self.detect(self.encoder(maps, padding_mask), noised)
        if "dn" in outputs:
            outputs["dn"]["targets"] = targets  # the criterion need not check them again
        return outputs

    def detect(self, memory: Memory, noised: Noised | None = None) -> Outputs:
        """Queries and decoder on the encoder's memory."""
        queries, proposed = self.queries(memory)
        outputs = self._route(self.decoder, queries, memory, noised)
        if noised is None and self.training and self.denoising is not None:
            # Without objects the embedding is unused: DDP needs its gradient all the same.
            unused = self.denoising.label_embed.weight.sum() * 0
            outputs["logits"] = outputs["logits"] + unused
        outputs |= proposed
        if self.training and self.o2m_queries is not None and self.o2m_decoder is not None:
            many, proposed = self.o2m_queries(memory)
            outputs["encoder_o2m"] = proposed["encoder"]
            outputs["o2m"] = self._route(self.o2m_decoder, many, memory, noised)
        if self.training and self.sep_decoder is not None:
            outputs["sep"] = self._route(self.sep_decoder, queries, memory, noised)
        return outputs

    def _route(
        self, decoder: nn.Module, matched: Queries, memory: Memory, noised: Noised | None
    ) -> Outputs:
        """A decoder's predictions; those of noised queries are its ``dn``."""
        if noised is None or self.denoising is None:
            outputs: Outputs = decoder(matched, memory)
            return outputs
        both = self.denoising.prepend(matched, noised, getattr(self.queries, "query_pos", None))
        predictions = decoder(both, memory, noised.attn_mask(matched.content.shape[1]))
        slots = noised.labels.shape[1]
        outputs = {name: value[:, :, slots:] for name, value in predictions.items()}
        outputs["dn"] = {name: value[:, :, :slots] for name, value in predictions.items()}
        outputs["dn"] |= {"pairs": noised.pairs, "groups": noised.groups}
        if not self.denoising.contrastive:  # DN-DETR: padding slots have no loss
            outputs["dn"]["counted"] = noised.labels >= 0
        return outputs


class SequentialDetector(nn.Module):
    """Stewart's detector: every pixel of the backbone's last map is a cell."""

    def __init__(self, backbone: Backbone, decoder: SequentialDecoder) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, decoder
        self.normalize = Normalize.of(backbone)

    def forward(
        self,
        images: Tensor,
        padding_mask: Tensor | None = None,
        targets: Targets | None = None,
    ) -> Outputs:
        """As :class:`Detector`, with ``pixels``, ``extent`` and ``grid`` for the matching."""
        check_images(images, padding_mask)
        cells = self.backbone(self.normalize(images, padding_mask))[-1]
        mask = no_padding(cells) if padding_mask is None else resize_mask(padding_mask, cells)
        memory = Memory.of([cells], [mask])
        (rows, columns), (height, width) = memory.spatial_shapes[0], images.shape[-2:]
        assert memory.valid_ratios is not None
        ratios = memory.valid_ratios[:, 0]  # [B, (x, y)]
        pixels = (ratios * ratios.new_tensor([width, height])).repeat(1, 2)
        centres = pixel_centres(memory)
        outputs: Outputs = self.decoder(memory.features, centres, pixels[:, None])
        extent = ratios * ratios.new_tensor([columns, rows])
        return outputs | {"pixels": pixels, "extent": extent, "grid": (rows, columns)}


# --- Postprocessing: outputs to boxes in pixels ------------------------------------------------


def in_pixels(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes ``[B, n, 4]`` as corners in pixels of images of ``sizes [B, (height, width)]``."""
    height, width = torch.as_tensor(sizes, device=boxes.device).unbind(-1)
    return to_corners(boxes) * torch.stack([width, height, width, height], -1)[:, None]


class Detections(NamedTuple):
    """Detections of a batch, n of each image.

    Attributes:
        boxes: ``[B, n, 4]``, corners in pixels.
        scores: ``[B, n]``; 0 for what is not a detection.
        labels: ``[B, n]``.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Postprocess(Protocol):
    """From outputs to detections."""

    def detections(self, outputs: Outputs, sizes: Tensor) -> Detections:
        """Of a detector in evaluation mode, for images of ``sizes [B, (height, width)]``."""

    def __call__(self, outputs: Outputs, sizes: Tensor) -> Results:
        """For each image ``boxes``, ``scores`` and ``labels``."""


@dataclass(frozen=True)
class BestScores:
    """The pairs of query and class with the best sigmoid scores, best first.

    Attributes:
        number: of pairs per image, at most.
        fuse: combine a layer's scores with those of the layers before (Mr. DETR).
    """

    number: int = 300
    fuse: bool = False

    def detections(self, outputs: Outputs, sizes: Tensor) -> Detections:
        """See :class:`Postprocess`."""
        layers = outputs["logits"] if self.fuse else outputs["logits"][-1:]
        score, *others = layers.sigmoid()
        for layer in others:
            score = ((layer**2.001 + score**1.853) / 2).sqrt()
        queries, classes = score.shape[1:]
        scores, where = score.flatten(1).topk(min(self.number, queries * classes))
        query = (where // classes)[..., None].expand(-1, -1, 4)
        boxes = in_pixels(outputs["boxes"][-1].gather(1, query), sizes)
        return Detections(boxes, scores, where % classes)

    def __call__(self, outputs: Outputs, sizes: Tensor) -> Results:
        """See :class:`Postprocess`."""
        images = zip(*self.detections(outputs, sizes))
        return [{"boxes": b, "scores": s, "labels": c} for b, s, c in images]


@dataclass(frozen=True)
class BestClasses:
    """Every query's best class of a softmax whose last class is "no object" (DETR).

    Attributes:
        until: a cell's boxes count until the first with a lower score (Stewart).
    """

    until: float | None = None

    def detections(self, outputs: Outputs, sizes: Tensor) -> Detections:
        """See :class:`Postprocess`; in the order of the queries."""
        scores, labels = outputs["logits"][-1].softmax(-1)[..., :-1].max(-1)
        if self.until is not None:
            rows, columns = outputs["grid"]
            unsure = (scores < self.until).unflatten(1, (rows * columns, -1))  # one row per cell
            scores = scores.masked_fill(unsure.long().cumsum(-1).flatten(1) > 0, 0)
        return Detections(in_pixels(outputs["boxes"][-1], sizes), scores, labels)

    def __call__(self, outputs: Outputs, sizes: Tensor) -> Results:
        """See :class:`Postprocess`; without detections of score 0."""
        images = zip(*self.detections(outputs, sizes))
        return [{"boxes": b[s > 0], "scores": s[s > 0], "labels": c[s > 0]} for b, s, c in images]


# --- Systems -----------------------------------------------------------------------------------


def decoder_layers(
    size: Size, cross_attn: Make = DeformableAttention, **options: Any
) -> list[DecoderLayer]:
    """Decoder layers with ordinary self-attention; ``options`` of :class:`DecoderLayer`."""
    layers = range(size.decoder_layers)
    return [DecoderLayer(size, cross_attn, SelfAttention, **options) for _ in layers]


def sharing(module: Any, **replaced: nn.Module) -> Any:
    """A copy of a module that shares its parts, except those that are replaced."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **replaced}
    return twin


# Weights of losses. DETR, DAB, DN, DINO and RT-DETR weigh the class by 1; Deformable DETR and
# Mr. DETR by 2.
WEIGHTS = {"class": 1.0, "l1": 5.0, "giou": 2.0}
WEIGHTS_CLASS_2 = WEIGHTS | {"class": 2.0}
DFINE_SIZE = Size(num_levels=3, num_points=(3, 6, 3))
DAB_SINES = {"temperature": 20.0, "shift": 0.0}


def stewart(
    backbone: Backbone,
    num_classes: int,
    size: Size = Size(d_model=250, dropout=0.15),
    *,
    steps: int = 5,
) -> System:
    """Stewart et al. (arXiv 1506.04878): an LSTM predicts the boxes of each cell in sequence.

    Args:
        backbone: each pixel of its last map is a cell.
        num_classes: number of classes.
        size: only ``d_model``, the units of the LSTM, and ``dropout`` are used.
        steps: boxes per cell.

    Example:
        >>> import torch
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.models import Size, stewart
        >>> model = stewart(SmallBackbone(), 3, Size(d_model=32), steps=5).model
        >>> model(torch.rand(1, 3, 64, 64))["boxes"].shape  # 5 in each of 4 x 4 cells
        torch.Size([1, 1, 80, 4])
    """
    decoder = SequentialDecoder(backbone.channels[-1], size, num_classes, steps)
    weights = {"class": 1, "l1": 0.03}
    criterion = Criterion(weights, match=Lexicographic(steps), classification=CrossEntropy())
    model = SequentialDetector(backbone, decoder)
    # A low threshold, because average precision also counts boxes with low scores.
    return System(model, criterion, BestClasses(until=0.01))


def detr(
    backbone: Backbone,
    num_classes: int,
    size: Size = Size(dim_feedforward=2048, num_queries=100, dropout=0.1),
) -> System:
    """DETR (arXiv 2005.12872): learnt queries, dense attention, one-to-one matching.

    Example:
        >>> import torch
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.models import Size, detr
        >>> size = Size(32, 4, 3, encoder_layers=1, decoder_layers=2, num_queries=10)
        >>> model, criterion, postprocess = detr(SmallBackbone(), 3, size)
        >>> sorted(model(torch.rand(1, 3, 64, 64)))
        ['boxes', 'logits']
    """
    check_integer("num_classes", num_classes, 1)
    encoder = DenseEncoder(backbone.channels[-1], size)
    logits = num_classes + 1  # the last one is "no object"
    heads = Heads(size, logits, refine="no", shared=True, norm=True, default_init=True)
    layers = decoder_layers(size, DenseCrossAttention)
    decoder = Decoder(size, layers, fixed_pos, heads)
    queries = LearntQueries(size, points=False)
    match = Hungarian(class_weight=1, softmax=True)
    criterion = Criterion(WEIGHTS, match=match, classification=WeightedCrossEntropy())
    return System(Detector(backbone, encoder, queries, decoder), criterion, BestClasses())


def dab_detr(
    backbone: Backbone,
    num_classes: int,
    size: Size = Size(dim_feedforward=2048),
    *,
    denoising: Denoising | None = None,
) -> System:
    """DAB-DETR (arXiv 2201.12329), dense: queries are boxes, which attention also uses.

    Args:
        backbone: images to maps, of which the last one is used.
        num_classes: number of classes.
        size: of the system.
        denoising: makes it DN-DETR, whose queries have the content "no label".

    Example:
        >>> import torch
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.models import Size, dab_detr
        >>> size = Size(32, 4, 3, encoder_layers=1, decoder_layers=2, num_queries=10)
        >>> model, criterion, postprocess = dab_detr(SmallBackbone(), 3, size)
        >>> sorted(model(torch.rand(1, 3, 64, 64)))
        ['boxes', 'logits']
    """
    own = replace(size, activation=nn.PReLU)  # of feed-forward networks, not of heads
    encoder = DenseEncoder(backbone.channels[-1], own, scale=True, temperature=20)
    first = [True] + [False] * (size.decoder_layers - 1)
    layers = [
        DecoderLayer(own, partial(ConditionalCrossAttention, first=f), ConditionalSelfAttention)
        for f in first
    ]
    heads = Heads(size, num_classes, refine="twice", shared=True, norm=True, eps=1e-3)
    decoder = Decoder(size, layers, ConditionalPos(size.d_model), heads)
    queries = AnchorQueries(size, content=None if denoising is None else denoising.label_embed)
    model = Detector(backbone, encoder, queries, decoder, denoising=denoising)
    return System(model, Criterion(WEIGHTS), BestScores())


def deformable_detr(
    backbone: Backbone,
    num_classes: int,
    size: Size = Size(dropout=0.1),
    *,
    refine: bool = False,
    two_stage: bool = False,
) -> System:
    """Deformable DETR (arXiv 2010.04159): attention to sampled points of several maps.

    Args:
        backbone: images to maps.
        num_classes: number of classes.
        size: of the system.
        refine: each layer corrects the boxes of the layer before.
        two_stage: queries are the encoder's best proposals; includes ``refine``.

    Example:
        >>> import torch
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.models import Size, deformable_detr
        >>> size = Size(32, 4, 3, encoder_layers=1, decoder_layers=2, num_queries=10)
        >>> model, criterion, postprocess = deformable_detr(SmallBackbone(), 3, size)
        >>> sorted(model(torch.rand(1, 3, 64, 64)))
        ['boxes', 'logits']
    """
    refine = refine or two_stage
    heads = Heads(size, num_classes, refine="layer" if refine else "no", shared=not refine)
    queries: nn.Module = LearntQueries(size, points=True)
    if two_stage:
        queries = SelectedQueries(size, num_classes, binary=True)
    else:  # initial boxes are small
        with torch.no_grad():
            heads.get_parameter("box_heads.0.layers.2.bias")[2:] = -2
    decoder = Decoder(size, decoder_layers(size), fixed_pos, heads)
    encoder = DeformableEncoder(backbone.channels, size)
    model = Detector(backbone, encoder, queries, decoder)
    criterion = Criterion(WEIGHTS_CLASS_2, encoder="binary")
    return System(model, criterion, BestScores(number=100))


def dab_deformable_detr(
    backbone: Backbone,
    num_classes: int,
    size: Size = Size(dim_feedforward=2048),
    *,
    denoising: Denoising | None = None,
) -> System:
    """DAB-Deformable-DETR (arXiv 2201.12329): learnt boxes as references of deformable attention.

    Args:
        backbone: images to maps.
        num_classes: number of classes.
        size: of the system.
        denoising: makes it DN-Deformable-DETR, which reserves one channel of the content.

    Example:
        >>> import torch
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.models import Size, dab_deformable_detr
        >>> size = Size(32, 4, 3, encoder_layers=1, decoder_layers=2, num_queries=10)
        >>> model, criterion, postprocess = dab_deformable_detr(SmallBackbone(), 3, size)
        >>> sorted(model(torch.rand(1, 3, 64, 64)))
        ['boxes', 'logits']
    """
    heads = Heads(size, num_classes, refine="layer", eps=1e-3)
    decoder = Decoder(size, decoder_layers(size), SinePos(size.d_model, scale=True), heads)
    queries = AnchorQueries(size, content=size.d_model - (denoising is not None))
    encoder = DeformableEncoder(backbone.channels, size)
    model = Detector(backbone, encoder, queries, decoder, denoising=denoising)
    return System(model, Criterion(WEIGHTS), BestScores())


def _dn_denoising(num_classes: int, size: Size) -> Denoising:
    options: Any = {"groups": 5, "label_noise": 0.2, "box_noise": 0.4}
    return Denoising(num_classes, size.d_model, contrastive=False, **options)


def dn_detr(
    backbone: Backbone, num_classes: int, size: Size = Size(dim_feedforward=2048)
) -> System:
    """DN-DETR (arXiv 2203.01305): dense DAB-DETR trained with denoising queries.

    Example:
        >>> import torch
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.models import Size, dn_detr
        >>> size = Size(32, 4, 3, encoder_layers=1, decoder_layers=2, num_queries=10)
        >>> model, criterion, postprocess = dn_detr(SmallBackbone(), 3, size)
        >>> targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
        >>> sorted(model(torch.rand(1, 3, 64, 64), None, targets))
        ['boxes', 'dn', 'logits']
    """
    return dab_detr(backbone, num_classes, size, denoising=_dn_denoising(num_classes, size))


def dn_deformable_detr(
    backbone: Backbone, num_classes: int, size: Size = Size(dim_feedforward=2048)
) -> System:
    """DN-Deformable-DETR (arXiv 2203.01305): DAB-Deformable-DETR with denoising queries.

    Example:
        >>> import torch
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.models import Size, dn_deformable_detr
        >>> size = Size(32, 4, 3, encoder_layers=1, decoder_layers=2, num_queries=10)
        >>> model, criterion, postprocess = dn_deformable_detr(SmallBackbone(), 3, size)
        >>> targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
        >>> sorted(model(torch.rand(1, 3, 64, 64), None, targets))
        ['boxes', 'dn', 'logits']
    """
    denoising = _dn_denoising(num_classes, size)
    return dab_deformable_detr(backbone, num_classes, size, denoising=denoising)


def dino(
    backbone: Backbone,
    num_classes: int,
    size: Size = Size(dim_feedforward=2048, num_queries=900),
) -> System:
    """DINO (arXiv 2203.03605): contrastive denoising, mixed selection, look forward twice.

    Example:
        >>> import torch
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.models import Size, dino
        >>> size = Size(32, 4, 3, encoder_layers=1, decoder_layers=2, num_queries=10)
        >>> model, criterion, postprocess = dino(SmallBackbone(), 3, size)
        >>> targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
        >>> sorted(model(torch.rand(1, 3, 64, 64), None, targets))
        ['boxes', 'dn', 'encoder', 'logits']
    """
    queries = SelectedQueries(size, num_classes, learnt=True)
    heads = Heads(size, num_classes, refine="twice", shared=True, norm=True, eps=1e-3)
    decoder = Decoder(size, decoder_layers(size), SinePos(size.d_model, scale=False), heads)
    encoder = DeformableEncoder(backbone.channels, size, **DAB_SINES)
    denoising = Denoising(num_classes, size.d_model)
    model = Detector(backbone, encoder, queries, decoder, denoising=denoising)
    return System(model, Criterion(WEIGHTS), BestScores())


def rtdetr(backbone: Backbone, num_classes: int, size: Size = Size(num_levels=3)) -> System:
    """RT-DETR (arXiv 2304.08069): a hybrid encoder, and scores trained to be the IoU.

    Example:
        >>> import torch
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.models import Size, rtdetr
        >>> size = Size(32, 4, 3, encoder_layers=1, decoder_layers=2, num_queries=10)
        >>> model, criterion, postprocess = rtdetr(SmallBackbone(), 3, size)
        >>> targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
        >>> sorted(model(torch.rand(1, 3, 64, 64), None, targets))
        ['boxes', 'dn', 'encoder', 'logits']
    """
    layers = decoder_layers(size, partial(DeformableAttention, variant="rtdetr"), limit=65504)
    decoder = Decoder(size, layers, BoxPos(size), Heads(size, num_classes, refine="twice"))
    model = _hybrid(backbone, num_classes, size, decoder)
    return System(model, Criterion(WEIGHTS, classification=VarifocalLoss()), BestScores())


def rtdetrv2(
    backbone: Backbone,
    num_classes: int,
    size: Size = Size(num_levels=3),
    *,
    method: str = "default",
    pos_layers: int = 2,
    classification: Classification = VarifocalLoss(),
) -> System:
    """RT-DETRv2 (arXiv 2407.17140): RT-DETR with points by level and discrete sampling.

    Args:
        backbone: images to maps.
        num_classes: number of classes.
        size: of the system.
        method: "default" interpolates, "discrete" samples one pixel per point.
        pos_layers: of the MLP of positional embeddings; DEIM has 3.
        classification: loss of the logits; DEIM has another.

    Example:
        >>> import torch
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.models import Size, rtdetrv2
        >>> size = Size(32, 4, 3, encoder_layers=1, decoder_layers=2, num_queries=10)
        >>> model, criterion, postprocess = rtdetrv2(SmallBackbone(), 3, size)
        >>> targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
        >>> sorted(model(torch.rand(1, 3, 64, 64), None, targets))
        ['boxes', 'dn', 'encoder', 'logits']
    """
    attention = partial(DeformableAttention, variant="rtdetrv2", method=method)
    heads = Heads(size, num_classes, refine="twice")
    decoder = Decoder(size, decoder_layers(size, attention), BoxPos(size, pos_layers), heads)
    model = _hybrid(backbone, num_classes, size, decoder)
    return System(model, Criterion(WEIGHTS, classification=classification), BestScores())


def _hybrid(
    backbone: Backbone, num_classes: int, size: Size, decoder: Decoder, *, fine: bool = False
) -> Detector:
    """RT-DETR's encoder, query selection and contrastive denoising with a decoder."""
    if size.num_levels != len(backbone.channels):
        raise ValueError(
            f"num_levels: expected {len(backbone.channels)}, the maps of the backbone, "
            f"got {size.num_levels}"
        )
    encoder = HybridEncoder(backbone.channels, size, fine=fine)
    queries = SelectedQueries(size, num_classes)
    denoising = Denoising(num_classes, size.d_model, padding=True, eps=1e-5)
    return Detector(backbone, encoder, queries, decoder, denoising=denoising)


def dfine(
    backbone: Backbone,
    num_classes: int,
    size: Size = DFINE_SIZE,
    *,
    scale: float = 4.0,
    classification: Classification = VarifocalLoss(),
) -> System:
    """D-FINE (arXiv 2410.13842): edges as distributions, distilled from the last layer.

    Args:
        backbone: images to maps.
        num_classes: number of classes.
        size: of the system.
        scale: of :class:`~deform_attn.detr.dfine.EdgeBins`; 8 in D-FINE-X.
        classification: loss of the logits; DEIM has another.

    Example:
        >>> import torch
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.models import Size, dfine
        >>> size = Size(32, 4, 3, encoder_layers=1, decoder_layers=2, num_queries=10)
        >>> model, criterion, postprocess = dfine(SmallBackbone(), 3, size)
        >>> targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
        >>> sorted(model(torch.rand(1, 3, 64, 64), None, targets))
        ['boxes', 'corners', 'dn', 'encoder', 'initial', 'logits', 'pre_boxes', 'pre_logits']
    """
    bins = EdgeBins(scale=scale)
    heads = FineHeads(size, num_classes, bins)
    attention = partial(DeformableAttention, variant="dfine")
    layers = decoder_layers(size, attention, gated=True, limit=65504)
    decoder = Decoder(size, layers, BoxPos(size, limit=10), heads)
    model = _hybrid(backbone, num_classes, size, decoder, fine=True)
    weights = WEIGHTS | {"fgl": 0.15, "ddf": 1.5}
    criterion = Criterion(weights, classification=classification, bins=bins)
    return System(model, criterion, BestScores())


def deim(
    backbone: Backbone, num_classes: int, size: Size = DFINE_SIZE, *, scale: float = 4.0
) -> System:
    """DEIM (arXiv 2412.04234) on D-FINE: a matchability-aware loss, and SiLU.

    Its denser images are augmentation: "dense" in :mod:`~deform_attn.detr.augment`.

    Example:
        >>> import torch
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.models import Size, deim
        >>> size = Size(32, 4, 3, encoder_layers=1, decoder_layers=2, num_queries=10)
        >>> model, criterion, postprocess = deim(SmallBackbone(), 3, size)
        >>> targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
        >>> sorted(model(torch.rand(1, 3, 64, 64), None, targets))
        ['boxes', 'corners', 'dn', 'encoder', 'initial', 'logits', 'pre_boxes', 'pre_logits']
    """
    size = replace(size, activation=nn.SiLU)
    loss = MatchabilityAwareLoss()
    return dfine(backbone, num_classes, size, scale=scale, classification=loss)


def deim_rtdetrv2(
    backbone: Backbone,
    num_classes: int,
    size: Size = Size(num_levels=3),
    *,
    method: str = "default",
) -> System:
    """DEIM (arXiv 2412.04234) on RT-DETRv2; see :func:`deim`.

    Example:
        >>> import torch
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.models import Size, deim_rtdetrv2
        >>> size = Size(32, 4, 3, encoder_layers=1, decoder_layers=2, num_queries=10)
        >>> model, criterion, postprocess = deim_rtdetrv2(SmallBackbone(), 3, size)
        >>> targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
        >>> sorted(model(torch.rand(1, 3, 64, 64), None, targets))
        ['boxes', 'dn', 'encoder', 'logits']
    """
    size = replace(size, activation=nn.SiLU)
    options: Any = {"method": method, "pos_layers": 3, "classification": MatchabilityAwareLoss()}
    return rtdetrv2(backbone, num_classes, size, **options)


def mr_detr(
    backbone: Backbone,
    num_classes: int,
    size: Size = Size(num_queries=900),
    *,
    iou_weight: float = 0.7,
    denoising: Denoising | None = None,
    criterion: Criterion | None = None,
) -> System:
    """Mr. DETR (arXiv 2412.10028): two-stage Deformable DETR with two more routes in training.

    The routes share cross-attention, norms and heads. ``o2m`` adds instruction tokens to the
    self-attention, ``sep`` has a feed-forward network of its own. Only the first route is used for
    detection.

    Args:
        backbone: images to maps.
        num_classes: number of classes.
        size: of the system.
        iou_weight: of :class:`~deform_attn.detr.matching.OneToMany`.
        denoising: makes noised queries for all three routes.
        criterion: instead of Deformable DETR's; it gets the one-to-many assignment.

    Example:
        >>> import torch
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.models import Size, mr_detr
        >>> size = Size(32, 4, 3, encoder_layers=1, decoder_layers=2, num_queries=10)
        >>> model, criterion, postprocess = mr_detr(SmallBackbone(), 3, size)
        >>> sorted(model(torch.rand(1, 3, 64, 64)))
        ['boxes', 'encoder', 'encoder_o2m', 'logits', 'o2m', 'sep']
    """
    d = size.d_model
    heads = Heads(size, num_classes, refine="twice", eps=1e-3)
    queries = SelectedQueries(size, num_classes, learnt=True, binary=True)
    layers = decoder_layers(size)
    decoder = Decoder(size, layers, fixed_pos, heads)

    o2m_queries = sharing(queries, class_head=class_head(d, num_classes), box_head=box_head(d))
    o2m, sep = nn.ModuleList(), nn.ModuleList()
    for layer in layers:
        attention = layer.self_attn.get_submodule("attention")
        instructed = InstructedSelfAttention(attention, d, num_tokens=10)
        o2m.append(sharing(layer, self_attn=instructed, norm_self=AddNorm(d)))
        sep.append(sharing(layer, ffn=FeedForward(size)))
    model = Detector(
        backbone,
        DeformableEncoder(backbone.channels, size),
        queries,
        decoder,
        denoising=denoising,
        o2m=(o2m_queries, sharing(decoder, layers=o2m)),
        sep=sharing(decoder, layers=sep),
    )
    if criterion is None:
        criterion = Criterion(WEIGHTS_CLASS_2, encoder="anchors", encoder_weight=3)
    criterion.one_to_many = OneToMany(iou_weight, max_choices=int(size.num_queries * 0.25))
    return System(model, criterion, BestScores(fuse=True))


def _mr_denoising(num_classes: int, size: Size) -> Denoising:
    return Denoising(num_classes, size.d_model, box_noise=0.4, spare=False)


def mr_detr_dino(
    backbone: Backbone, num_classes: int, size: Size = Size(dim_feedforward=2048, num_queries=900)
) -> System:
    """Mr. DETR's routes on DINO (arXiv 2412.10028): contrastive denoising in all three of them.

    The routes' losses are divided by three times the number of objects.

    Example:
        >>> import torch
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.models import Size, mr_detr_dino
        >>> size = Size(32, 4, 3, encoder_layers=1, decoder_layers=2, num_queries=10)
        >>> model, criterion, postprocess = mr_detr_dino(SmallBackbone(), 3, size)
        >>> targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
        >>> sorted(model(torch.rand(1, 3, 64, 64), None, targets))
        ['boxes', 'dn', 'encoder', 'encoder_o2m', 'logits', 'o2m', 'sep']
    """
    criterion = Criterion(WEIGHTS_CLASS_2, encoder="binary", route_divisor=3)
    denoising = _mr_denoising(num_classes, size)
    options: Any = {"iou_weight": 0.8, "denoising": denoising, "criterion": criterion}
    return mr_detr(backbone, num_classes, size, **options)


def mr_detr_align(
    backbone: Backbone,
    num_classes: int,
    size: Size = Size(dim_feedforward=2048, num_queries=900),
    *,
    temperature: float = 1e4,
    shift: float = -0.5,
) -> System:
    """Mr. DETR's routes on Align-DETR (arXiv 2412.10028): as on DINO, with the aligned loss.

    Args:
        backbone: images to maps.
        num_classes: number of classes.
        size: of the system.
        temperature: of :class:`~deform_attn.detr.encoder.DeformableEncoder`; 20 for 24 epochs.
        shift: of the same; 0 for 24 epochs.

    Example:
        >>> import torch
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.models import Size, mr_detr_align
        >>> size = Size(32, 4, 3, encoder_layers=1, decoder_layers=2, num_queries=10)
        >>> model, criterion, postprocess = mr_detr_align(SmallBackbone(), 3, size)
        >>> targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
        >>> sorted(model(torch.rand(1, 3, 64, 64), None, targets))
        ['boxes', 'dn', 'encoder', 'encoder_o2m', 'logits', 'o2m', 'sep']
    """
    criterion = Criterion(WEIGHTS, classification=AlignedLoss(), encoder="binary", route_divisor=3)
    denoising = _mr_denoising(num_classes, size)
    options: Any = {"iou_weight": 0.8, "denoising": denoising, "criterion": criterion}
    system = mr_detr(backbone, num_classes, size, **options)
    encoder: Any = system.model.encoder
    encoder.temperature, encoder.shift = temperature, shift
    return system
