"""Boxes, their overlap, and the sines that stand for a position.

A box is ``(cx, cy, w, h)`` as fractions of the image; ``corners`` are ``(x0, y0, x1, y1)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Named = dict[str, Tensor]  # predictions, proposals: whatever has boxes beside it


def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """Logit of ``x``, finite at 0 and 1; eps is 1e-3 or 1e-5, and papers' results depend on it."""
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


def sine(x: Tensor, dims: int, temperature: float = 1e4) -> Tensor:
    """Each of n coordinates as ``dims`` sines and cosines: ``[..., n]`` to ``[..., n * dims]``."""
    power = torch.arange(0, dims, 2, dtype=torch.float32, device=x.device) / dims
    angle = x[..., None] * (2 * math.pi) / temperature**power
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-3)


def sine_of_box(box: Tensor, channels: int) -> Tensor:
    """A box as ``2 * channels`` sines in the order of DAB-DETR and DINO: y, x, w, h."""
    return sine(box[..., [1, 0, 2, 3]], channels // 2)


def sine_of_pixels(
    padding: Tensor, channels: int, temperature: float = 1e4, shift: float = 0.0
) -> Tensor:
    """Position of each pixel in the part of its image that is no padding, ``[B, channels, H, W]``.

    ``padding [B, H, W]`` is True where padded; half of the channels are for y, half for x. The
    temperature is 10000 (DETR, Deformable DETR) or 20 (DAB-DETR and its line), the shift -0.5 for
    pixel centres (Deformable DETR), 0 elsewhere.
    """
    y, x = (~padding).cumsum(1).float(), (~padding).cumsum(2).float()
    y = (y + shift) / (y[:, -1:] + 1e-6)
    x = (x + shift) / (x[:, :, -1:] + 1e-6)
    return sine(torch.stack([y, x], -1), channels // 2, temperature).permute(0, 3, 1, 2)
