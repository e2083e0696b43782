"""Attention modules: projections round the operator, with the official names and weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from deform_attn.functional import ms_deform_attn_fused
from deform_attn.inputs import Levels

__all__ = ["MSDeformAttn"]


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention as Deformable DETR, DINO and Mask2Former call it.

    Every query predicts, for each head and level, ``n_points`` offsets from its reference point
    and their weights (a softmax over all levels' points). Deformable DETR (arXiv 2010.04159),
    section 4.1; names, initial weights and state dict are those of its official module.

    Args:
        d_model: channels of query, input and output.
        n_levels: number of feature maps.
        n_heads: number of heads; divides ``d_model``.
        n_points: points that a query samples in each level and head.

    Raises:
        ValueError: a size is less than 1, or ``d_model`` is not a multiple of ``n_heads``.

    Example:
        >>> import torch
        >>> from deform_attn import MSDeformAttn
        >>> attention = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=3)
        >>> shapes = torch.tensor([[8, 6], [4, 3]])
        >>> start = torch.tensor([0, 48])
        >>> features = torch.rand(2, 60, 32)
        >>> query, reference = torch.rand(2, 5, 32), torch.rand(2, 5, 2, 2)
        >>> attention(query, reference, features, shapes, start).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4
    ) -> None:
        super().__init__()
        sizes = {
            "d_model": d_model,
            "n_levels": n_levels,
            "n_heads": n_heads,
            "n_points": n_points,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if d_model % n_heads:
            raise ValueError(f"d_model: expected a multiple of n_heads ({n_heads}), got {d_model}")
        self.im2col_step = 64  # callers of the official module set it; there is no such limit here
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Head m looks in direction 2 pi m / M, its k-th point k pixels away; weights are even."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)  # [M, 2]
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None, :] * steps[None, None, :, None]  # [M, 1, P, 2]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.n_levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Levels,
        input_level_start_index: Tensor | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from every query to a few points of every feature map.

        Args:
            query: ``[batch, queries, d_model]``.
            reference_points: ``[batch, queries, n_levels, 2]``, the point ``(x, y)`` as fractions
                of the map, or ``[batch, queries, n_levels, 4]``, a box ``(cx, cy, w, h)``: offsets
                are pixels of the level, or ``n_points`` times half a box's sides.
            input_flatten: feature maps, one row a pixel: ``[batch, rows, d_model]``.
            input_spatial_shapes: ``(height, width)`` of each level: ``[n_levels, 2]`` or a list.
            input_level_start_index: row of each level's first pixel, ``[n_levels]``.
            input_padding_mask: ``[batch, rows]``, True for padding: such rows count as zero.

        Returns:
            ``[batch, queries, d_model]``.

        Raises:
            ValueError: a shape does not fit; the message names the argument.
        """
        if input_flatten.dim() != 3 or input_flatten.shape[-1] != self.d_model:
            raise ValueError(
                f"input_flatten: expected shape [batch, rows, {self.d_model}], "
                f"got {tuple(input_flatten.shape)}"
            )
        B, S, _ = input_flatten.shape
        if query.dim() != 3 or query.shape[0] != B or query.shape[-1] != self.d_model:
            raise ValueError(
                f"query: expected shape [{B}, queries, {self.d_model}], got {tuple(query.shape)}"
            )
        if len(input_spatial_shapes) != self.n_levels:
            raise ValueError(
                f"input_spatial_shapes: expected {self.n_levels} levels (n_levels), "
                f"got {len(input_spatial_shapes)}"
            )
        Q = query.shape[1]
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            if input_padding_mask.dtype != torch.bool or input_padding_mask.shape != (B, S):
                raise ValueError(
                    f"input_padding_mask: expected a bool tensor of shape [{B}, {S}], True for "
                    f"padding, got {input_padding_mask.dtype} {tuple(input_padding_mask.shape)}"
                )
            value = value.masked_fill(input_padding_mask[..., None], 0)
        value = value.view(B, S, self.n_heads, -1)
        width = reference_points.shape[-1]
        if reference_points.shape != (B, Q, self.n_levels, width) or width not in (2, 4):
            raise ValueError(
                f"reference_points: expected shape [{B}, {Q}, {self.n_levels}, 2] of points (x, y) "
                f"or [{B}, {Q}, {self.n_levels}, 4] of boxes (cx, cy, w, h), "
                f"got {tuple(reference_points.shape)}"
            )
        points = (B, Q, self.n_heads, self.n_levels, self.n_points)
        attended = ms_deform_attn_fused(
            value,
            input_spatial_shapes,
            input_level_start_index,
            reference_points,
            self.sampling_offsets(query).view(*points, 2),
            self.attention_weights(query).view(points),
        )
        output: Tensor = self.output_proj(attended)
        return output
