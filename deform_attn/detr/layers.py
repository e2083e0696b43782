"""Sizes of a system, and the layers that encoders and decoders are built from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deform_attn import MSDeformableAttention, MSDeformAttn
from deform_attn.checks import (
    check_counts,
    check_integer,
    check_positive,
    check_sizes,
    check_threshold,
)
from deform_attn.detr.memory import Memory

Activation = type[nn.Module]


@dataclass(frozen=True)
class Size:
    """Sizes of a system; the defaults of each system are those of its paper.

    Attributes:
        d_model: channels of queries and memory.
        num_heads: attention heads.
        num_levels: feature maps that attention samples.
        num_points: samples per query, head and level; a tuple where the levels differ.
        encoder_layers: number of encoder layers.
        decoder_layers: number of decoder layers.
        eval_layers: decoder layers that run in evaluation; None: all (RT-DETR trades accuracy for
            speed with it, without training again).
        dim_feedforward: channels inside feed-forward networks.
        num_queries: number of queries.
        dropout: dropout probability.
        activation: activation of feed-forward networks and heads.
        expansion: width of RT-DETR's fusion blocks, as a fraction of their output.
        depth: depth of RT-DETR's fusion blocks: ``round(3 * depth)`` convolutions each.
        encoder_dims: ``(d_model, dim_feedforward)`` of the hybrid encoder, where they differ from
            the decoder's (D-FINE-X).

    Raises:
        TypeError: a size has another type.
        ValueError: a size is out of its range.

    Example:
        >>> from deform_attn.detr.layers import Size
        >>> Size(num_levels=3, num_points=(3, 6))
        Traceback (most recent call last):
            ...
        ValueError: num_points: expected a count, or one for each of 3 levels, got (3, 6)
    """

    d_model: int = 256
    num_heads: int = 8
    num_levels: int = 4
    num_points: int | tuple[int, ...] = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    eval_layers: int | None = None
    dim_feedforward: int = 1024
    num_queries: int = 300
    dropout: float = 0.0
    activation: Activation = nn.ReLU
    expansion: float = 1.0
    depth: float = 1.0
    encoder_dims: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("d_model", "num_heads", "num_levels", "decoder_layers", "dim_feedforward"):
            check_integer(name, getattr(self, name), 1)
        check_integer("encoder_layers", self.encoder_layers, 0)
        check_integer("num_queries", self.num_queries, 1)
        if self.eval_layers is not None:
            check_integer("eval_layers", self.eval_layers, 1, self.decoder_layers)
        check_counts(self.num_points, self.num_levels)
        check_threshold("dropout", self.dropout)
        for name in ("expansion", "depth"):
            check_positive(name, getattr(self, name))
        for size in self.encoder_dims or ():
            check_integer("encoder_dims", size, 1)


Make = Callable[[Size], nn.Module]


class MLP(nn.Module):
    """Linear layers with an activation between them."""

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        sizes = [in_channels, *[hidden_channels] * (num_layers - 1), out_channels]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.activation = activation()

    def zero_output(self) -> MLP:
        """Set the last layer to zero, so that the output starts as zero; returns itself."""
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_channels]`` to ``[..., out_channels]``."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def class_head(d_model: int, num_classes: int) -> nn.Linear:
    """Classification head whose scores start at 0.01, so that negatives do not dominate the loss.

    Focal loss, arXiv 1708.02002, section 3.3.
    """
    check_integer("num_classes", num_classes, 1)
    head = nn.Linear(d_model, num_classes)
    nn.init.constant_(head.bias, -math.log(99))
    return head


def box_head(d_model: int, out_channels: int = 4, activation: Activation = nn.ReLU) -> MLP:
    """Box head with three layers that starts with no correction of the reference."""
    return MLP(d_model, d_model, out_channels, 3, activation).zero_output()


def each(num_layers: int, make: Callable[[], nn.Module], *, shared: bool = False) -> nn.ModuleList:
    """One module per layer; with ``shared``, the same module for all layers."""
    return nn.ModuleList([make()] * num_layers if shared else [make() for _ in range(num_layers)])


class FeedForward(nn.Sequential):
    """``linear2(dropout(activation(linear1(x))))``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.linear1 = nn.Linear(size.d_model, size.dim_feedforward)
        self.activation = size.activation()
        self.dropout = nn.Dropout(size.dropout)
        self.linear2 = nn.Linear(size.dim_feedforward, size.d_model)


class AddNorm(nn.Module):
    """``norm(x + update)``; the sum is clamped to ``+-limit`` to keep float16 finite (RT-DETR)."""

    def __init__(self, d_model: int, limit: float | None = None) -> None:
        super().__init__()
        self.norm, self.limit = nn.LayerNorm(d_model), limit

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        """Both ``[B, Q, d_model]``."""
        x = x + update
        if self.limit is not None:
            x = x.clamp(-self.limit, self.limit)
        return self.norm(x)


class Gate(nn.Module):
    """``norm(g1 * x + g2 * update)`` with gates computed from both (D-FINE, arXiv 2410.13842)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * d_model, 2 * d_model)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        """Both ``[B, Q, d_model]``."""
        g1, g2 = self.gate(torch.cat([x, update], -1)).sigmoid().chunk(2, -1)
        return self.norm(g1 * x + g2 * update)


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch norm, activation; ``options`` are those of ``Conv2d``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        activation: Activation = nn.Identity,
        **options: Any,
    ) -> None:
        super().__init__()
        options = {"padding": kernel_size // 2, "bias": False, **options}
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, **options)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = activation()


# --- Attention: modules return the update of the queries, without residual -------------------


def dense_attention(size: Size) -> nn.MultiheadAttention:
    """PyTorch's attention, batch first.

    Raises:
        ValueError: the heads do not divide ``d_model``.
    """
    check_sizes("d_model", "num_heads", d_model=size.d_model, num_heads=size.num_heads)
    return nn.MultiheadAttention(size.d_model, size.num_heads, size.dropout, batch_first=True)


class SelfAttention(nn.Module):
    """Attention among queries: ``q = k = x + query_pos``, ``v = x``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention = dense_attention(size)

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        attn_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Update of ``x [B, Q, d_model]``.

        ``attn_mask [Q, Q]`` and ``padding_mask [B, Q]`` are True where attention is not allowed.
        """
        q = x + query_pos
        return self.attention(q, q, x, padding_mask, False, attn_mask)[0]


class DeformableAttention(nn.Module):
    """Attention to sampled points near the reference of each query.

    Args:
        size: of the system.
        variant: that of :class:`~deform_attn.MSDeformableAttention`; empty: Deformable DETR's
            attention, :class:`~deform_attn.MSDeformAttn`.
        method: "default" (bilinear) or "discrete", for a ``variant``.

    Raises:
        ValueError: ``num_points`` differ by level without a ``variant``.
    """

    def __init__(self, size: Size, variant: str = "", method: str = "default") -> None:
        super().__init__()
        d_model, num_heads = size.d_model, size.num_heads
        num_levels, num_points = size.num_levels, size.num_points
        self.attention: nn.Module
        if variant:
            options: Any = {"method": method, "variant": variant}
            self.attention = MSDeformableAttention(
                d_model, num_heads, num_levels, num_points, **options
            )
        elif isinstance(num_points, int):
            self.attention = MSDeformAttn(d_model, num_levels, num_heads, num_points)
        else:
            raise ValueError(
                f"num_points: expected an integer, got {num_points}; points by level are for "
                "RT-DETRv2, D-FINE and DEIM"
            )

    def forward(
        self, x: Tensor, query_pos: Tensor, reference_points: Tensor, memory: Memory
    ) -> Tensor:
        """Update of ``x [B, Q, d_model]``; references are ``[B, Q, num_levels or 1, 2 or 4]``."""
        masks: tuple[Tensor | None, ...] = ()
        if memory.padding_mask is not None:  # True is padding for one module, pixels for the other
            official = isinstance(self.attention, MSDeformAttn)
            masks = (None, memory.padding_mask) if official else (~memory.padding_mask,)
        return self.attention(
            x + query_pos, reference_points, memory.features, memory.spatial_shapes, *masks
        )


class DenseCrossAttention(nn.Module):
    """Attention to all pixels: ``q = x + query_pos``, ``k = memory + pos``, ``v = memory``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention = dense_attention(size)

    def forward(
        self, x: Tensor, query_pos: Tensor, reference_points: Tensor | None, memory: Memory
    ) -> Tensor:
        """Update of ``x [B, Q, d_model]``."""
        assert memory.pos is not None, "dense attention needs positions of the pixels"
        k, v = memory.features + memory.pos, memory.features
        return self.attention(x + query_pos, k, v, memory.padding_mask, False)[0]


class ConditionalAttention(nn.Module):
    """Separate projections of content and position (Conditional DETR, DAB-DETR)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        d, self.num_heads = size.d_model, size.num_heads
        self.q_content, self.q_pos = nn.Linear(d, d), nn.Linear(d, d)
        self.k_content, self.k_pos = nn.Linear(d, d), nn.Linear(d, d)
        self.v, self.out_proj = nn.Linear(d, d), nn.Linear(d, d)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Queries, keys and values ``[B, num_heads, N, D]``; ``mask`` is True where not allowed."""
        allowed = None if mask is None else ~mask
        attended = F.scaled_dot_product_attention(q, k, v, allowed)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def split(self, *tensors: Tensor) -> list[Tensor]:
        """``[B, N, num_heads * D]`` each to ``[B, num_heads, N, D]``."""
        return [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in tensors]


class ConditionalSelfAttention(ConditionalAttention):
    """Self-attention where projections of content and position are added."""

    def forward(self, x: Tensor, query_pos: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Update of ``x [B, Q, d_model]``; of ``query_pos [B, Q, 2 d_model]`` the first half."""
        query_pos, _ = query_pos.chunk(2, -1)
        q = self.q_content(x) + self.q_pos(query_pos)
        k = self.k_content(x) + self.k_pos(query_pos)
        q, k, v = self.split(q, k, self.v(x))
        return self.attend(q, k, v, attn_mask)


class ConditionalCrossAttention(ConditionalAttention):
    """Cross-attention where content and position are concatenated in every head.

    In the ``first`` layer the query's content is not yet informative, so its position is added.
    """

    def __init__(self, size: Size, *, first: bool) -> None:
        super().__init__(size)
        self.q_sine = nn.Linear(size.d_model, size.d_model)
        self.first = first
        if not first:
            del self.q_pos

    def forward(
        self, x: Tensor, query_pos: Tensor, reference_points: Tensor | None, memory: Memory
    ) -> Tensor:
        """Update of ``x [B, Q, d_model]``; ``query_pos [B, Q, 2 d_model]``."""
        query_pos, sines = query_pos.chunk(2, -1)
        q, k = self.q_content(x), self.k_content(memory.features)
        k_pos = self.k_pos(memory.pos)
        if self.first:
            q, k = q + self.q_pos(query_pos), k + k_pos
        q, k, v = self.split(q, k, self.v(memory.features))
        q_sine, k_pos = self.split(self.q_sine(sines), k_pos)
        mask = None if memory.padding_mask is None else memory.padding_mask[:, None, None]
        return self.attend(torch.cat([q, q_sine], -1), torch.cat([k, k_pos], -1), v, mask)


class InstructedSelfAttention(nn.Module):
    """Self-attention with learnt instruction tokens beside the queries (Mr. DETR, section 3.3)."""

    def __init__(self, attention: nn.Module, d_model: int, num_tokens: int) -> None:
        super().__init__()
        self.attention = attention
        self.tokens = nn.Embedding(num_tokens, d_model)
        self.tokens_pos = nn.Embedding(num_tokens, d_model)

    def forward(self, x: Tensor, query_pos: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Update of ``x [B, Q, d_model]``.

        With noised queries, which ``attn_mask [Q, Q]`` hides from matched ones, tokens and matched
        queries attend to each other only.
        """
        n = self.tokens.num_embeddings
        if attn_mask is not None:
            noised = attn_mask[-1:]  # what the last query, a matched one, must not see
            tokens_mask = torch.cat([attn_mask.new_ones(1, n), noised], 1).expand(n, -1)
            attn_mask = torch.cat([noised.T.expand(-1, n), attn_mask], 1)
            attn_mask = torch.cat([tokens_mask, attn_mask])
        tokens = self.tokens.weight.expand(x.shape[0], -1, -1)
        q = torch.cat([tokens + self.tokens_pos.weight, x + query_pos], 1)
        v = torch.cat([tokens, x], 1)
        return self.attention(q, q, v, attn_mask=attn_mask, need_weights=False)[0][:, n:]
