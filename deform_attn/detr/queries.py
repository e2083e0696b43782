"""Where queries come from, and the positional embeddings that decoder layers add to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deform_attn.detr.boxes import Named, inverse_sigmoid, sine, sine_of_box
from deform_attn.detr.layers import MLP, Size, box_head, class_head
from deform_attn.detr.memory import Memory, pixel_centres


@dataclass(frozen=True)
class Queries:
    """Input of a decoder.

    Attributes:
        content: ``[B, Q, d_model]``.
        reference_points: points ``[B, Q, 2]`` or boxes ``[B, Q, 4]`` in [0, 1]; None for DETR.
        query_pos: ``[B, Q, d_model]``, where it is not computed from the references.
    """

    content: Tensor
    reference_points: Tensor | None = None
    query_pos: Tensor | None = None


Proposals = dict[str, Named]
QueryPos = Callable[..., Tensor | None]  # of (layer, x, queries, reference_points)


def precise(predictions: Named) -> Named:
    """Predictions in at least float32, as losses need them."""
    return {name: x.float() if x.dtype.itemsize == 2 else x for name, x in predictions.items()}


# --- Queries: modules return the queries of each image, and proposals for the criterion -------


class LearntQueries(nn.Module):
    """Learnt positional embeddings (DETR); with ``points``, content and points too.

    Deformable DETR (arXiv 2010.04159, section 4.1) predicts the points from the positions.
    """

    def __init__(self, size: Size, *, points: bool) -> None:
        super().__init__()
        channels = 2 * size.d_model if points else size.d_model
        self.query_embed = nn.Embedding(size.num_queries, channels)
        self.reference_points = nn.Linear(size.d_model, 2) if points else None

    def forward(self, memory: Memory) -> tuple[Queries, Proposals]:
        """The same queries for every image; no proposals."""
        embed = self.query_embed.weight.expand(memory.features.shape[0], -1, -1)
        if self.reference_points is None:
            return Queries(torch.zeros_like(embed), query_pos=embed), {}
        query_pos, content = embed.chunk(2, -1)
        return Queries(content, self.reference_points(query_pos).sigmoid(), query_pos), {}


class AnchorQueries(nn.Module):
    """Learnt boxes (DAB-DETR), initially all over the image, and their content.

    Args:
        size: of the system.
        content: a number of learnt channels, padded with zeros to ``d_model``; or an embedding
            whose last row is the content of all queries (DN-DETR: "no label"); None: zeros.
    """

    def __init__(self, size: Size, *, content: int | nn.Embedding | None) -> None:
        super().__init__()
        self.refpoint_embed = nn.Embedding(size.num_queries, 4)
        centres = torch.rand(size.num_queries, 2)
        self.refpoint_embed.weight.data[:, :2] = inverse_sigmoid(centres, 1e-3)
        self.label_embed = content if isinstance(content, nn.Embedding) else None
        self.tgt_embed = (
            nn.Embedding(size.num_queries, content) if isinstance(content, int) else None
        )
        self.d_model = size.d_model

    def forward(self, memory: Memory) -> tuple[Queries, Proposals]:
        """The same queries for every image; no proposals."""
        boxes = self.refpoint_embed.weight
        content = boxes[:, :0] if self.tgt_embed is None else self.tgt_embed.weight
        if self.label_embed is not None:
            content = self.label_embed.weight[-1].expand(boxes.shape[0], -1)
        content = F.pad(content, (0, self.d_model - content.shape[1]))
        B = memory.features.shape[0]
        return Queries(content.expand(B, -1, -1), boxes.sigmoid().expand(B, -1, -1)), {}


class SelectedQueries(nn.Module):
    """The best proposals of the encoder become queries (Deformable DETR's two stages, section 4.2).

    Args:
        size: of the system.
        num_classes: number of classes.
        learnt: learnt content (DINO's mixed selection) instead of the selected features (RT-DETR).
        binary: as in Deformable DETR, the first class means "object" and ranks the proposals; all
            proposals are returned for the criterion, not only the selected ones; the positional
            embedding, and content that is not learnt, are projections of the selected boxes'
            sines. Otherwise the best class ranks the proposals.

    Example:
        >>> import torch
        >>> from deform_attn.detr.layers import Size
        >>> from deform_attn.detr.memory import Memory
        >>> from deform_attn.detr.queries import SelectedQueries
        >>> select = SelectedQueries(Size(32, 4, num_queries=10), num_classes=3)
        >>> queries, _ = select(Memory.of([torch.rand(2, 32, 8, 6), torch.rand(2, 32, 4, 3)]))
        >>> queries.content.shape, queries.reference_points.shape
        (torch.Size([2, 10, 32]), torch.Size([2, 10, 4]))
    """

    def __init__(
        self, size: Size, num_classes: int, *, learnt: bool = False, binary: bool = False
    ) -> None:
        super().__init__()
        d = size.d_model
        self.num_queries, self.d_model, self.binary = size.num_queries, d, binary
        heads = class_head(d, num_classes), box_head(d, activation=size.activation)
        self.proj, self.norm = nn.Linear(d, d), nn.LayerNorm(d)
        self.class_head, self.box_head = heads
        self.tgt_embed = nn.Embedding(size.num_queries, d) if learnt else None
        self.pos_trans = (
            nn.Sequential(nn.Linear(2 * d, 2 * d), nn.LayerNorm(2 * d)) if binary else None
        )

    def forward(self, memory: Memory) -> tuple[Queries, Proposals]:
        """Queries of each image, and the proposals for the criterion.

        Raises:
            ValueError: there are fewer pixels than queries.
        """
        anchors, valid = proposals(memory)
        features = self.norm(self.proj(memory.features * valid))
        logits = self.class_head(features)
        if logits.shape[1] < self.num_queries:
            raise ValueError(
                f"memory: expected at least {self.num_queries} pixels, one per query, got "
                f"{logits.shape[1]}; larger images have more"
            )
        score = logits[..., 0] if self.binary else logits.amax(-1)
        top = score.topk(self.num_queries, 1).indices[..., None]

        def select(x: Tensor) -> Tensor:
            return x.gather(1, top.expand(-1, -1, x.shape[-1]))

        content, query_pos = select(features), None
        if self.binary:
            boxes = self.box_head(features) + anchors
            selected = select(boxes)
        else:
            logits, anchors = select(logits), select(anchors)
            boxes = selected = self.box_head(content) + anchors
        proposed = {"logits": logits, "boxes": boxes.sigmoid(), "anchors": anchors.sigmoid()}
        content, references = content.detach(), selected.detach().sigmoid()
        if self.pos_trans is not None:
            query_pos, content = self._projected(references).chunk(2, -1)
        if self.tgt_embed is not None:
            content = self.tgt_embed.weight.expand(references.shape[0], -1, -1)
        return Queries(content, references, query_pos), {"encoder": precise(proposed)}

    def query_pos(self, boxes: Tensor) -> Tensor:
        """Positional embedding ``[..., d_model]`` of boxes ``[..., 4]``, if ``binary``."""
        return self._projected(boxes)[..., : self.d_model]

    def _projected(self, boxes: Tensor) -> Tensor:
        assert self.pos_trans is not None, "binary"
        sines = sine(boxes, self.d_model // 2).to(self.proj.weight.dtype)
        projected: Tensor = self.pos_trans(sines)
        return projected


def proposals(memory: Memory) -> tuple[Tensor, Tensor]:
    """A box at every pixel, as logits: 0.05 of the image in the first level, doubled per level.

    Boxes outside (0.01, 0.99), and padding, have infinite logits.

    Returns:
        Logits ``[B, S, 4]``, and bool ``[B, S, 1]``, False where they are infinite.
    """
    centres = pixel_centres(memory)
    sides = [0.05 * 2**i for i, (h, w) in enumerate(memory.spatial_shapes) for _ in range(h * w)]
    side = torch.tensor(sides, device=centres.device, dtype=centres.dtype)[:, None]
    boxes = torch.cat([centres, side.expand(centres.shape[0], -1, 2)], -1)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    if memory.padding_mask is not None:
        valid = valid & ~memory.padding_mask[..., None]
    logits = torch.log(boxes / (1 - boxes))
    return logits.masked_fill(~valid, float("inf")), valid


# --- Positional embeddings of queries, for each decoder layer --------------------------------


def fixed_pos(layer: int, x: Tensor, queries: Queries, reference_points: Any) -> Tensor | None:
    """The queries' own ``query_pos [B, Q, d_model]`` in every layer."""
    return queries.query_pos


class BoxPos(nn.Module):
    """An MLP of the reference box (RT-DETR), clamped to ``+-limit`` (D-FINE).

    Args:
        size: of the system.
        num_layers: of the MLP: 2, or 3 in DEIM on RT-DETRv2.
        limit: largest magnitude of the output.
    """

    def __init__(self, size: Size, num_layers: int = 2, limit: float | None = None) -> None:
        super().__init__()
        d = size.d_model
        hidden = 2 * d if num_layers == 2 else d  # the widths of the official weights
        self.mlp, self.limit = MLP(4, hidden, d, num_layers, size.activation), limit

    def forward(self, layer: int, x: Tensor, queries: Queries, reference_points: Tensor) -> Tensor:
        """``[B, Q, d_model]``."""
        query_pos = self.mlp(reference_points[:, :, 0].to(x.dtype))
        return query_pos if self.limit is None else query_pos.clamp(-self.limit, self.limit)


class SinePos(nn.Module):
    """An MLP of the reference box's sines (DINO), scaled by an MLP of the content (DAB).

    The ``scale`` starts with the second layer; the first layer's content is not informative.
    """

    def __init__(self, d_model: int, *, scale: bool) -> None:
        super().__init__()
        self.d_model, self.mlp = d_model, MLP(2 * d_model, d_model, d_model, 2)
        self.query_scale = MLP(d_model, d_model, d_model, 2) if scale else None

    def forward(self, layer: int, x: Tensor, queries: Queries, reference_points: Tensor) -> Tensor:
        """``[B, Q, d_model]``."""
        sines = sine_of_box(reference_points[:, :, 0], self.d_model)
        query_pos: Tensor = self.mlp(sines.to(x.dtype))
        if self.query_scale is None or layer == 0:
            return query_pos
        return query_pos * self.query_scale(x)


class ConditionalPos(nn.Module):
    """DAB-DETR's two embeddings of the reference box (arXiv 2201.12329, section 4.4).

    An MLP of the box's sines; and the sines of its centre, modulated by the size of the box. For
    :class:`~deform_attn.detr.layers.ConditionalCrossAttention`.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model, self.mlp = d_model, MLP(2 * d_model, d_model, d_model, 2)
        self.query_scale = MLP(d_model, d_model, d_model, 2)
        self.ref_anchor_head = MLP(d_model, d_model, 2, 2)

    def forward(self, layer: int, x: Tensor, queries: Queries, reference_points: Tensor) -> Tensor:
        """``[B, Q, 2 d_model]``, the two embeddings side by side."""
        boxes = reference_points[:, :, 0]
        sines = sine_of_box(boxes, self.d_model)
        y_and_x = sines[..., : self.d_model].unflatten(-1, (2, -1))  # [B, Q, (y, x), d_model / 2]
        if layer > 0:
            y_and_x = y_and_x * self.query_scale(x).unflatten(-1, (2, -1))
        modulation = self.ref_anchor_head(x).sigmoid() / boxes[..., 2:]  # (w, h)
        y_and_x = y_and_x * modulation.flip(-1)[..., None]
        return torch.cat([self.mlp(sines.to(x.dtype)), y_and_x.flatten(-2).to(x.dtype)], -1)
