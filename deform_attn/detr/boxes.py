"""Boxes, their overlap, and sine embeddings of positions.

A box is ``(cx, cy, w, h)`` as fractions of the image; corners are ``(x0, y0, x1, y1)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Named = dict[str, Tensor]  # predictions or proposals: "logits", "boxes", ...


def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """Logit of ``x``, finite at 0 and 1; ``eps`` is 1e-3 or 1e-5, as in each official code."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def to_corners(boxes: Tensor) -> Tensor:
    """``(cx, cy, w, h)`` to ``(x0, y0, x1, y1)``; negative sizes count as 0."""
    centre, size = boxes[..., :2], boxes[..., 2:].clamp(min=0)
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def from_corners(corners: Tensor) -> Tensor:
    """``(x0, y0, x1, y1)`` to ``(cx, cy, w, h)``."""
    low, high = corners[..., :2], corners[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (arXiv 1902.09630) of boxes ``[..., 4]`` that broadcast.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([[0.5, 0.5, 1, 1]]), torch.tensor([[0.25, 0.5, 0.5, 1]])
        >>> [x.item() for x in overlap(a, b)]
        [0.5, 0.5]
    """
    a, b = to_corners(a), to_corners(b)

    def area(corners: Tensor) -> Tensor:
        return (corners[..., 2:] - corners[..., :2]).clamp(min=0).prod(-1)

    def span(low: Tensor, high: Tensor) -> Tensor:
        return area(torch.cat([low, high], -1))

    common = span(torch.max(a[..., :2], b[..., :2]), torch.min(a[..., 2:], b[..., 2:]))
    hull = span(torch.min(a[..., :2], b[..., :2]), torch.max(a[..., 2:], b[..., 2:]))
    union = area(a) + area(b) - common
    tiny = torch.finfo(union.dtype).tiny
    iou = common / union.clamp(min=tiny)
    return iou, iou - (hull - union) / hull.clamp(min=tiny)


def sine(x: Tensor, channels: int, temperature: float = 1e4) -> Tensor:
    """``channels`` sines and cosines per coordinate: ``[..., n]`` to ``[..., n * channels]``.

    Computed in the dtype of ``x``, half precision in float32.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    power = torch.arange(0, channels, 2, dtype=x.dtype, device=x.device) / channels
    angle = x[..., None] * (2 * math.pi) / temperature**power
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-3)


def sine_of_box(box: Tensor, d_model: int) -> Tensor:
    """A box as ``2 * d_model`` sines, in the order of DAB-DETR and DINO: y, x, w, h."""
    return sine(box[..., [1, 0, 2, 3]], d_model // 2)


def sine_of_pixels(
    padding_mask: Tensor, x: Tensor, temperature: float = 1e4, shift: float = 0.0
) -> Tensor:
    """Positional embedding of the pixels of a map, relative to its unpadded part.

    Half of the channels are for y, half for x.

    Args:
        padding_mask: bool ``[B, H, W]``, True for padding.
        x: the map ``[B, d_model, H, W]``, which gives channels and dtype.
        temperature: 10000 (DETR, Deformable DETR) or 20 (DAB-DETR, DINO).
        shift: -0.5 for pixel centres (systems on Deformable DETR), 0 elsewhere.

    Returns:
        ``[B, d_model, H, W]``.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows, columns = (~padding_mask).cumsum(1).to(dtype), (~padding_mask).cumsum(2).to(dtype)
    rows = (rows + shift) / (rows[:, -1:] + 1e-6)
    columns = (columns + shift) / (columns[:, :, -1:] + 1e-6)
    sines = sine(torch.stack([rows, columns], -1), x.shape[1] // 2, temperature)
    return sines.permute(0, 3, 1, 2).to(x.dtype)
