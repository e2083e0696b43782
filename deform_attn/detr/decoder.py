"""Decoders: layers of self-attention, cross-attention and feed-forward networks, and their heads.

    for each layer i:
        query_pos = position(i, x, reference)          positional embedding
        x = layer(x, query_pos, reference, memory)     attention
        logits, boxes, reference = heads(i, x)         prediction, and the next reference

The systems differ in their queries, positional embeddings, attention and references:

    system           queries                    query_pos       attention     references
    DETR             learnt position            fixed           dense         none
    DAB-DETR         learnt boxes               sines, sizes    conditional   look forward twice
    Deformable DETR  learnt, or selected        fixed           deformable    fixed, or refined
    DAB-Deformable   learnt boxes and content   scaled sines    deformable    refined
    DINO             selected, learnt content   sines           deformable    look forward twice
    RT-DETR          selected                   MLP of box      deformable    look forward twice
    D-FINE, DEIM     selected                   MLP of box      gated         distributions
    Mr. DETR         selected, learnt content   fixed           deformable    look forward twice

Look forward twice (DINO, arXiv 2203.03605, section 3.5): the loss of a layer's box also reaches the
layer before, because the box is computed from that layer's box with its graph. The reference that
attention samples at is always detached.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deform_attn.checks import check_integer
from deform_attn.detr.boxes import Named, inverse_sigmoid
from deform_attn.detr.layers import (
    MLP,
    AddNorm,
    FeedForward,
    Gate,
    Make,
    Size,
    box_head,
    class_head,
    each,
)
from deform_attn.detr.memory import Memory
from deform_attn.detr.queries import Queries, QueryPos, precise


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward, each with residual and LayerNorm.

    Args:
        size: of the system.
        cross_attn: makes the cross-attention, called with ``(x, query_pos, reference_points,
            memory)``.
        self_attn: makes the self-attention, called with ``(x, query_pos, attn_mask)``.
        gated: a gate instead of the residual of the cross-attention (D-FINE).
        limit: of the last residual sum (RT-DETR, D-FINE).
    """

    def __init__(
        self,
        size: Size,
        cross_attn: Make,
        self_attn: Make,
        *,
        gated: bool = False,
        limit: float | None = None,
    ) -> None:
        super().__init__()
        ffn = FeedForward(size)  # first: the order of construction decides the initial weights
        self.self_attn, self.cross_attn, self.ffn = self_attn(size), cross_attn(size), ffn
        self.norm_self = AddNorm(size.d_model)
        self.norm_cross = Gate(size.d_model) if gated else AddNorm(size.d_model)
        self.norm_ffn = AddNorm(size.d_model, limit)
        self.dropout = nn.Dropout(size.dropout)

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        reference_points: Tensor | None,
        memory: Memory,
        attn_mask: Tensor | None,
    ) -> Tensor:
        """Queries ``x [B, Q, d_model]``; ``attn_mask [Q, Q]`` is True where not allowed."""
        x = self.norm_self(x, self.dropout(self.self_attn(x, query_pos, attn_mask)))
        update = self.cross_attn(x, query_pos, reference_points, memory)
        x = self.norm_cross(x, self.dropout(update))
        return self.norm_ffn(x, self.dropout(self.ffn(x)))


class Heads(nn.Module):
    """Class and box heads of every layer.

    Args:
        size: of the system.
        num_classes: number of logits.
        refine: "no": references stay; "layer": the next reference is the layer's box; "twice": the
            same with look forward twice.
        shared: all layers have the same heads.
        norm: the heads get normalised queries, while the next reference is computed from queries
            that are not normalised.
        default_init: PyTorch's initial weights (DETR), instead of those of
            :func:`~deform_attn.detr.layers.class_head` and
            :func:`~deform_attn.detr.layers.box_head`.
        eps: of the inverse sigmoid.
    """

    def __init__(
        self,
        size: Size,
        num_classes: int,
        *,
        refine: Literal["no", "layer", "twice"],
        shared: bool = False,
        norm: bool = False,
        default_init: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        d, layers = size.d_model, size.decoder_layers
        make_class = nn.Linear if default_init else class_head
        make_box = (
            partial(MLP, d, d, 4, 3)
            if default_init
            else partial(box_head, d, activation=size.activation)
        )
        self.class_heads = each(layers, lambda: make_class(d, num_classes), shared=shared)
        self.box_heads = each(layers, make_box, shared=shared)
        self.norm = nn.LayerNorm(d) if norm else None
        self.refine, self.eps = refine, eps

    def forward(self, layer: int, x: Tensor, state: Named) -> tuple[Named, Named]:
        """Predictions of a layer from its queries ``x [B, Q, d_model]``, and the next state.

        The state holds ``reference_points``, and with look forward twice ``with_graph``, the same
        references with their graph.
        """
        reference_points = state.get("reference_points")
        normed = x if self.norm is None else self.norm(x)
        start = state.get("with_graph", reference_points)
        boxes = self.moved(self.box_heads[layer](normed), start)
        prediction = {"logits": self.class_heads[layer](normed), "boxes": boxes}
        if self.refine == "layer":
            state = {"reference_points": boxes.detach()}
        if self.refine == "twice":
            box = self.moved(self.box_heads[layer](x), reference_points)
            state = {"reference_points": box.detach(), "with_graph": box}
        return prediction, state

    def moved(self, delta: Tensor, reference_points: Tensor | None) -> Tensor:
        """Boxes ``[B, Q, 4]``: references (points, boxes or none), moved by ``delta`` as logits."""
        if reference_points is None:
            return delta.sigmoid()
        logit = inverse_sigmoid(reference_points, self.eps)
        return (delta + F.pad(logit, (0, 4 - logit.shape[-1]))).sigmoid()


class Decoder(nn.Module):
    """The loop over decoder layers that all systems share.

    Args:
        size: of the system.
        layers: of :class:`DecoderLayer`.
        position: ``(layer, x, queries, reference_points)`` to the positional embedding; one of
            those in :mod:`~deform_attn.detr.queries`.
        heads: ``(layer, x, state)`` to predictions and the next state: :class:`Heads` or
            :class:`~deform_attn.detr.dfine.FineHeads`.
    """

    def __init__(
        self, size: Size, layers: list[DecoderLayer], position: QueryPos, heads: nn.Module
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.position, self.heads = position, heads
        self.eval_layers = size.eval_layers or len(self.layers)

    def forward(self, queries: Queries, memory: Memory, attn_mask: Tensor | None = None) -> Named:
        """Predictions of all layers, stacked: ``logits [layers, B, Q, C]``, ``boxes [..., 4]``.

        ``attn_mask [Q, Q]`` is True where a query (row) must not attend to another (column).
        """
        x, state = queries.content, {}
        if queries.reference_points is not None:
            state["reference_points"] = queries.reference_points
        outputs: dict[str, list[Tensor]] = {}
        for i, layer in enumerate(self.layers[: None if self.training else self.eval_layers]):
            reference_points = None
            if "reference_points" in state:
                reference_points = memory.on_every_level(state["reference_points"])
            query_pos = self.position(i, x, queries, reference_points)
            x = layer(x, query_pos, reference_points, memory, attn_mask)
            prediction, state = self.heads(i, x, state)
            for name, value in prediction.items():
                outputs.setdefault(name, []).append(value)
        return precise({name: torch.stack(values) for name, values in outputs.items()})


class SequentialDecoder(nn.Module):
    """An LSTM that predicts the boxes of a cell one after another (Stewart et al., 2016).

    Its input is the same at each step: the features of one cell. As in the official code the LSTM
    has no biases, its output has no nonlinearity, and each step has heads of its own
    (arXiv 1506.04878).

    Args:
        channels: of the map whose pixels are the cells.
        size: of the system: ``d_model`` units, and the dropout before the heads.
        num_classes: number of classes; "no object" is one more.
        steps: boxes per cell.
    """

    def __init__(self, channels: int, size: Size, num_classes: int, steps: int) -> None:
        super().__init__()
        check_integer("num_classes", num_classes, 1)
        d = size.d_model
        self.gates = nn.Linear(channels + d, 4 * d, bias=False)
        self.class_heads = each(steps, lambda: nn.Linear(d, num_classes + 1))
        self.box_heads = each(steps, lambda: nn.Linear(d, 4))
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, cells: Tensor, centres: Tensor, pixels: Tensor) -> Named:
        """Predictions ``[1, B, cells * steps, ...]``, the boxes of a cell in order.

        Args:
            cells: ``[B, cells, channels]``.
            centres: of the cells, ``[B, cells, (x, y)]`` as fractions of the image.
            pixels: ``[B, 1, 4]``, the images' ``(width, height, width, height)``.
        """
        x = cells.flatten(0, 1)
        memory = hidden = x.new_zeros(x.shape[0], self.gates.out_features // 4)
        logits, offsets = [], []
        for to_class, to_box in zip(self.class_heads, self.box_heads):
            gates = self.gates(torch.cat([x, hidden], -1))
            candidate, input_gate, forget_gate, output_gate = gates.chunk(4, -1)
            memory = forget_gate.sigmoid() * memory + input_gate.sigmoid() * candidate.tanh()
            hidden = output_gate.sigmoid() * memory
            dropped = self.dropout(hidden)
            logits.append(to_class(dropped))
            offsets.append(to_box(dropped) * 100)  # pixels, in the paper's scale
        centres = F.pad(centres, (0, 2)).repeat_interleave(len(logits), 1)

        def in_order(steps: list[Tensor]) -> Tensor:  # [B * cells, ...] each
            return torch.stack(steps, 1).reshape(*centres.shape[:2], -1)

        boxes = centres + in_order(offsets) / pixels
        return precise({"logits": in_order(logits)[None], "boxes": boxes[None]})
