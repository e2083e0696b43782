"""The decoder: queries that look at each other and at the image, layer by layer.

    for each layer i:
        position = p(x, reference)            what a query is asked: where to look
        x = layer(x, position, reference)     what it has seen
        logits, boxes, reference = heads(x)   what it says, and where it looks next

Where queries come from, what ``position`` is, how layers attend and what heads do to references
are the differences between the systems:

    system           queries                    position       attention     references
    DETR             learnt position            fixed          dense         none
    DAB-DETR         learnt boxes               sines, sizes   conditional   look forward twice
    Deformable DETR  learnt, or selected        fixed          deformable    fixed, or refined
    DAB-Deformable   learnt boxes and content   sines, scaled  deformable    refined
    DINO             selected, learnt content   sines          deformable    look forward twice
    RT-DETR          selected                   MLP of box     deformable    look forward twice
    D-FINE, DEIM     selected                   MLP of box     gated         distributions
    Mr. DETR         selected, learnt content   fixed          deformable    look forward twice

Look forward twice (DINO, 3.5): a layer's box also corrects the layer before it, for its reference
keeps that layer's graph; the reference that attention and the next layer see does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deform_attn.detr import encoder as enc
from deform_attn.detr.boxes import Named, inverse_sigmoid, sine, sine_of_box
from deform_attn.detr.dfine import Gate
from deform_attn.detr.encoder import MLP, AddNorm, Make, Mask, Memory, Size, pixel_centres


@dataclass(frozen=True)
class Queries:
    """What a decoder starts from.

    Attributes:
        content: ``[B, Q, d]``.
        reference: points ``[B, Q, 2]`` or boxes ``[B, Q, 4]`` in [0, 1]; None for DETR.
        position: ``[B, Q, d]`` where it is not made from the reference.
    """

    content: Tensor
    reference: Tensor | None = None
    position: Tensor | None = None


Proposals = dict[str, Named]
Position = Callable[..., Tensor | None]


def precise(said: Named) -> Named:
    """In float32 what autocast made half precision, which losses are not for."""
    return {name: x.float() if x.dtype.itemsize == 2 else x for name, x in said.items()}


# --- Where queries come from -----------------------------------------------------------------


class LearntQueries(nn.Module):
    """Learnt positions (DETR), with contents and with points of the positions (Deformable DETR)."""

    def __init__(self, size: Size, *, points: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.queries, 2 * size.d if points else size.d)
        self.points = nn.Linear(size.d, 2) if points else None

    def forward(self, memory: Memory) -> tuple[Queries, Proposals]:
        """The same queries for every image; no proposals."""
        embed = self.embed.weight.expand(len(memory.features), -1, -1)
        if self.points is None:
            return Queries(torch.zeros_like(embed), position=embed), {}
        position, content = embed.chunk(2, -1)
        return Queries(content, self.points(position).sigmoid(), position), {}


class AnchorQueries(nn.Module):
    """Learnt boxes (DAB-DETR), at first all over the image, and content, 0 where narrower than d.

    ``content`` is a number of learnt channels, an embedding of which all take the last row
    (DN-DETR: "no label"), or None.
    """

    def __init__(self, size: Size, *, content: int | nn.Embedding | None) -> None:
        super().__init__()
        self.boxes = nn.Embedding(size.queries, 4)
        self.boxes.weight.data[:, :2] = inverse_sigmoid(torch.rand(size.queries, 2), 1e-3)
        self.label = content if isinstance(content, nn.Embedding) else None
        self.content = nn.Embedding(size.queries, content) if isinstance(content, int) else None
        self.d = size.d

    def forward(self, memory: Memory) -> tuple[Queries, Proposals]:
        """The same queries for every image; no proposals."""
        boxes = self.boxes.weight
        learnt = boxes[:, :0] if self.content is None else self.content.weight
        if self.label is not None:
            learnt = self.label.weight[-1].expand(len(boxes), -1)
        content = F.pad(learnt, (0, self.d - learnt.shape[1]))
        B = len(memory.features)
        return Queries(content.expand(B, -1, -1), boxes.sigmoid().expand(B, -1, -1)), {}


class SelectedQueries(nn.Module):
    """Two stages: every pixel proposes a box, the best become queries (Deformable DETR, 4.2).

    Contents are ``learnt`` (DINO's mixed selection), else the selected features (RT-DETR). As in
    Deformable DETR, where ``binary``, the first class, "object", ranks proposals, all of them are
    told, and positions, with contents that are not learnt, are projections of the selected boxes'
    sines; else the best class ranks proposals, and only those that are selected are told.
    """

    def __init__(
        self, size: Size, classes: int, *, learnt: bool = False, binary: bool = False
    ) -> None:
        super().__init__()
        d = size.d
        self.number, self.d, self.binary = size.queries, d, binary
        heads = enc.class_head(d, classes), enc.box_head(d, act=size.act)
        self.project, self.norm = nn.Linear(d, d), nn.LayerNorm(d)
        self.classes, self.box = heads
        self.content = nn.Embedding(size.queries, d) if learnt else None
        self.sines = nn.Sequential(nn.Linear(2 * d, 2 * d), nn.LayerNorm(2 * d)) if binary else None

    def forward(self, memory: Memory) -> tuple[Queries, Proposals]:
        """Queries of each image, and the proposals for the criterion.

        Raises:
            ValueError: there are fewer pixels than queries.
        """
        anchors, valid = proposals(memory)
        features = self.norm(self.project(memory.features * valid))
        logits = self.classes(features)
        if logits.shape[1] < self.number:
            raise ValueError(f"memory: expected {self.number} pixels, got {logits.shape[1]}")
        score = logits[..., 0] if self.binary else logits.amax(-1)
        top = score.topk(self.number, 1).indices[..., None]

        def best(x: Tensor) -> Tensor:
            return x.gather(1, top.expand(-1, -1, x.shape[-1]))

        content, position = best(features), None
        if self.binary:
            boxes = self.box(features) + anchors
            selected = best(boxes)
        else:
            logits, anchors = best(logits), best(anchors)
            boxes = selected = self.box(content) + anchors
        proposed = {"logits": logits, "boxes": boxes.sigmoid(), "anchors": anchors.sigmoid()}
        content, reference = content.detach(), selected.detach().sigmoid()
        if self.sines is not None:
            position, content = self.sines(sine(reference, self.d // 2)).chunk(2, -1)
        if self.content is not None:
            content = self.content.weight.expand(len(reference), -1, -1)
        return Queries(content, reference, position), {"encoder": precise(proposed)}


def proposals(memory: Memory) -> tuple[Tensor, Tensor]:
    """Logits of a box at every pixel, 0.05 of the image and twice that a level, and which count.

    Boxes that are not well inside the image, and padding, have infinite logits.

    Returns:
        ``[B, S, 4]`` and bool ``[B, S, 1]``.
    """
    centres = pixel_centres(memory)
    sizes = [0.05 * 2**i for i, (h, w) in enumerate(memory.shapes) for _ in range(h * w)]
    size = torch.tensor(sizes, device=centres.device)[:, None].expand(len(centres), -1, 2)
    boxes = torch.cat([centres, size], -1)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    if memory.padding is not None:
        valid = valid & ~memory.padding[..., None]
    logits = torch.log(boxes / (1 - boxes))
    return logits.masked_fill(~valid, float("inf")), valid


# --- What position is ------------------------------------------------------------------------


def fixed_position(i: int, x: Tensor, queries: Queries, reference: Any) -> Tensor | None:
    """The queries' own, ``[B, Q, d]``, in every layer."""
    return queries.position


class BoxPosition(nn.Module):
    """An MLP of the reference box (RT-DETR); ``limit`` clamps it (D-FINE)."""

    def __init__(self, size: Size, limit: float | None = None) -> None:
        super().__init__()
        self.mlp, self.limit = MLP(4, 2 * size.d, size.d, 2, size.act), limit

    def forward(self, i: int, x: Tensor, queries: Queries, reference: Tensor) -> Tensor:
        """``[B, Q, d]``."""
        position = self.mlp(reference[:, :, 0])
        return position if self.limit is None else position.clamp(-self.limit, self.limit)


class SinePosition(nn.Module):
    """An MLP of the reference box's sines (DINO), scaled by an MLP of the content (DAB)."""

    def __init__(self, d: int, *, scale: bool) -> None:
        super().__init__()
        self.d, self.mlp = d, MLP(2 * d, d, d, 2)
        self.scale = MLP(d, d, d, 2) if scale else None

    def forward(self, i: int, x: Tensor, queries: Queries, reference: Tensor) -> Tensor:
        """``[B, Q, d]``."""
        position: Tensor = self.mlp(sine_of_box(reference[:, :, 0], self.d))
        # The first layer's content knows nothing of the image.
        return position if self.scale is None or i == 0 else position * self.scale(x)


class ConditionalPosition(nn.Module):
    """DAB-DETR's pair for :class:`ConditionalCrossAttention`, side by side: an MLP of the box's
    sines, and the sines of its centre, sharper where the box is small (section 4.4).
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.d, self.mlp, self.scale = d, MLP(2 * d, d, d, 2), MLP(d, d, d, 2)
        self.size = MLP(d, d, 2, 2)

    def forward(self, i: int, x: Tensor, queries: Queries, reference: Tensor) -> Tensor:
        """``[B, Q, 2 d]``."""
        reference = reference[:, :, 0]
        sines = sine_of_box(reference, self.d)
        y_and_x = sines[..., : self.d].unflatten(-1, (2, -1))  # [B, Q, (y, x), d / 2]
        if i > 0:
            y_and_x = y_and_x * self.scale(x).unflatten(-1, (2, -1))
        sharper = self.size(x).sigmoid() / reference[..., 2:]  # (w, h)
        y_and_x = y_and_x * sharper.flip(-1)[..., None]
        return torch.cat([self.mlp(sines), y_and_x.flatten(-2)], -1)


# --- How a layer attends ---------------------------------------------------------------------


class DenseCrossAttention(nn.Module):
    """Every query looks at every pixel: ``q = x + position, k = memory + its position``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(size.d, size.heads, size.dropout, batch_first=True)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor | None, memory: Memory
    ) -> Tensor:
        """Update of ``x [B, Q, d]``."""
        assert memory.position is not None
        k, v = memory.features + memory.position, memory.features
        return self.attention(x + position, k, v, memory.padding, False)[0]


class ConditionalAttention(nn.Module):
    """Content and position have projections of their own (Conditional DETR, DAB-DETR)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        d, self.heads = size.d, size.heads
        self.q_content, self.q_position = nn.Linear(d, d), nn.Linear(d, d)
        self.k_content, self.k_position = nn.Linear(d, d), nn.Linear(d, d)
        self.v, self.output = nn.Linear(d, d), nn.Linear(d, d)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, hidden: Mask) -> Tensor:
        """``[B, heads, Q, D]`` of queries, keys and values; ``hidden`` ones are True."""
        mask = None if hidden is None else ~hidden
        attended = F.scaled_dot_product_attention(q, k, v, mask)
        return self.output(attended.transpose(1, 2).flatten(2))

    def split(self, *tensors: Tensor) -> list[Tensor]:
        """``[B, N, heads * D]`` each to ``[B, heads, N, D]``."""
        return [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in tensors]


class ConditionalSelfAttention(ConditionalAttention):
    """Content and position are added."""

    def forward(self, x: Tensor, position: Tensor, blocked: Mask = None) -> Tensor:
        """Update of ``x [B, Q, d]``; ``position [B, Q, 2 d]``, its first half counts."""
        position, _ = position.chunk(2, -1)
        q = self.q_content(x) + self.q_position(position)
        k = self.k_content(x) + self.k_position(position)
        q, k, v = self.split(q, k, self.v(x))
        return self.attend(q, k, v, blocked)


class ConditionalCrossAttention(ConditionalAttention):
    """Content is compared with content, place with place, side by side in every head."""

    def __init__(self, size: Size, *, first: bool) -> None:
        super().__init__(size)
        self.q_sine = nn.Linear(size.d, size.d)
        # The first layer's content knows nothing yet: there, it asks with its position too.
        self.first = first
        if not first:
            del self.q_position

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor | None, memory: Memory
    ) -> Tensor:
        """Update of ``x [B, Q, d]``; ``position [B, Q, 2 d]``."""
        position, sines = position.chunk(2, -1)
        q, k = self.q_content(x), self.k_content(memory.features)
        k_position = self.k_position(memory.position)
        if self.first:
            q, k = q + self.q_position(position), k + k_position
        q, k, v = self.split(q, k, self.v(memory.features))
        q_sine, k_position = self.split(self.q_sine(sines), k_position)
        hidden = None if memory.padding is None else memory.padding[:, None, None]
        return self.attend(torch.cat([q, q_sine], -1), torch.cat([k, k_position], -1), v, hidden)


class InstructedSelfAttention(nn.Module):
    """Learnt tokens beside the queries tell a layer to answer many to one (Mr. DETR)."""

    def __init__(self, attention: nn.Module, d: int, tokens: int) -> None:
        super().__init__()
        self.attention = attention
        self.tokens, self.positions = nn.Embedding(tokens, d), nn.Embedding(tokens, d)

    def forward(self, x: Tensor, position: Tensor, blocked: Mask = None) -> Tensor:
        """Update of ``x [B, Q, d]``; there are no queries to be ``blocked`` in this route."""
        tokens = self.tokens.weight.expand(len(x), -1, -1)
        q = torch.cat([tokens + self.positions.weight, x + position], 1)
        v = torch.cat([tokens, x], 1)
        return self.attention(q, q, v, need_weights=False)[0][:, tokens.shape[1] :]


class DecoderLayer(nn.Module):
    """Look at each other, look at the image, think; each is added and normalised.

    ``look`` makes the attention to the image, called with ``(x, position, reference, memory)``,
    ``talk`` that among queries, called with ``(x, position, blocked)``. Where ``gated``, a gate
    joins what was seen with what was known (D-FINE); ``limit`` is that of the last sum, for half
    precision (RT-DETR, D-FINE).
    """

    def __init__(
        self, size: Size, look: Make, talk: Make, *, gated: bool = False, limit: float | None = None
    ) -> None:
        super().__init__()
        # The feed-forward network draws its weights first, as when the recipes were compared.
        ffn = enc.FeedForward(size)
        self.self_attn, self.cross_attn, self.ffn = talk(size), look(size), ffn
        self.join_self = AddNorm(size.d)
        self.join_cross = Gate(size.d) if gated else AddNorm(size.d)
        self.join_ffn = AddNorm(size.d, limit)
        self.dropout = nn.Dropout(size.dropout)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor | None, memory: Memory, blocked: Mask
    ) -> Tensor:
        """Queries ``x [B, Q, d]``; ``blocked [Q, Q]`` hides queries where True."""
        x = self.join_self(x, self.dropout(self.self_attn(x, position, blocked)))
        x = self.join_cross(x, self.dropout(self.cross_attn(x, position, reference, memory)))
        return self.join_ffn(x, self.dropout(self.ffn(x)))


# --- What heads say, and where queries look next ----------------------------------------------


class Heads(nn.Module):
    """Classes and boxes of every layer.

    Args:
        size: of the model.
        classes: number of them.
        refine: "no": references stay, "layer": they become the layer's box, "twice": so too, and
            a box keeps the graph of the reference it corrects (look forward twice).
        shared: all layers have the same heads.
        norm: the heads see normalised queries; the next box is made from queries that are not.
        plain: heads start as PyTorch's layers do (DETR).
        eps: of the inverse sigmoid.
    """

    def __init__(
        self,
        size: Size,
        classes: int,
        *,
        refine: Literal["no", "layer", "twice"],
        shared: bool = False,
        norm: bool = False,
        plain: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        d, layers = size.d, size.decoder_layers
        of_class = nn.Linear if plain else enc.class_head
        self.classes = enc.each(layers, lambda: of_class(d, classes), shared=shared)
        of_box = partial(MLP, d, d, 4, 3) if plain else partial(enc.box_head, d, act=size.act)
        self.boxes = enc.each(layers, of_box, shared=shared)
        self.norm = nn.LayerNorm(d) if norm else None
        self.refine, self.eps = refine, eps

    def forward(self, i: int, x: Tensor, state: Named) -> tuple[Named, Named]:
        """Predictions of layer i from its queries ``x``; the state of the next layer."""
        reference = state["reference"]
        hidden = x if self.norm is None else self.norm(x)
        told = self.moved(self.boxes[i](hidden), state.get("with_graph", reference))
        prediction = {"logits": self.classes[i](hidden), "boxes": told}
        if self.refine == "layer":
            state = {"reference": told.detach()}
        if self.refine == "twice":
            box = self.moved(self.boxes[i](x), reference)
            state = {"reference": box.detach(), "with_graph": box}
        return prediction, state

    def moved(self, delta: Tensor, reference: Tensor | None) -> Tensor:
        """A reference, a point or a box or none, moved by logits: a box."""
        if reference is None:
            return delta.sigmoid()
        logit = inverse_sigmoid(reference, self.eps)
        return (delta + F.pad(logit, (0, 4 - logit.shape[-1]))).sigmoid()


class Decoder(nn.Module):
    """The loop that all systems share.

    ``position(i, x, queries, reference)`` is what a query is asked, and ``heads(i, x, state)`` give
    predictions and the next state: :class:`Heads`, or those of
    :class:`~deform_attn.detr.dfine.FineHeads`.
    """

    def __init__(
        self, size: Size, layers: list[DecoderLayer], position: Position, heads: nn.Module
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.position, self.heads = position, heads
        self.eval_layers = size.eval_layers or len(self.layers)

    def forward(self, queries: Queries, memory: Memory, blocked: Mask = None) -> Named:
        """Predictions of all layers, stacked: ``logits [layers, B, Q, C]``, ``boxes [..., 4]``.

        ``blocked [Q, Q]`` is True where a query (row) must not see another.
        """
        x, state = queries.content, {"reference": queries.reference}
        said: dict[str, list[Tensor]] = {}
        for i, layer in enumerate(self.layers[: None if self.training else self.eval_layers]):
            reference = memory.on_every_level(state["reference"])  # [B, Q, L, 2 or 4]
            position = self.position(i, x, queries, reference)
            x = layer(x, position, reference, memory, blocked)
            prediction, state = self.heads(i, x, state)
            for name, value in prediction.items():
                said.setdefault(name, []).append(value)
        return precise({name: torch.stack(values) for name, values in said.items()})


class SequentialDecoder(nn.Module):
    """The ancestor (Stewart et al., arXiv 1506.04878): an LSTM says one box after another.

    It sees one cell of the image, the same at each step, and remembers what it has said. As in
    the authors' code, the LSTM has no biases, and its output no nonlinearity; each step has its
    own heads.

    Args:
        channels: of the map whose pixels are the cells.
        size: of the model: ``d`` units, and the dropout of what the heads see.
        classes: number of classes; "no object" is one more.
        steps: boxes of a cell.
    """

    def __init__(self, channels: int, size: Size, classes: int, steps: int) -> None:
        super().__init__()
        d = size.d
        self.gates = nn.Linear(channels + d, 4 * d, bias=False)
        self.classes = enc.each(steps, lambda: nn.Linear(d, classes + 1))
        self.boxes = enc.each(steps, lambda: nn.Linear(d, 4))
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, cells: Tensor, centres: Tensor, pixels: Tensor) -> Named:
        """Predictions ``[1, B, cells * steps, ...]``, a cell's in order.

        Args:
            cells: ``[B, cells, channels]``.
            centres: of the cells, ``[B, cells, (x, y)]`` in [0, 1].
            pixels: the images' ``(width, height, width, height)``.
        """
        x = cells.flatten(0, 1)
        memory = said = x.new_zeros(len(x), self.gates.out_features // 4)
        logits, boxes = [], []
        for classes, box in zip(self.classes, self.boxes):
            value, write, keep, tell = self.gates(torch.cat([x, said], -1)).chunk(4, -1)
            memory = keep.sigmoid() * memory + write.sigmoid() * value.tanh()
            said = tell.sigmoid() * memory
            hidden = self.dropout(said)
            logits.append(classes(hidden))
            boxes.append(box(hidden) * 100 / pixels)  # the paper's scale
        centres = F.pad(centres, (0, 2)).repeat_interleave(len(boxes), 1)

        def in_order(steps: list[Tensor]) -> Tensor:  # [B * cells, ...] each
            return torch.stack(steps, 1).reshape(*centres.shape[:2], -1)[None]

        return precise({"logits": in_order(logits), "boxes": centres + in_order(boxes)})
