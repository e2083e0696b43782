"""Transforms of torchvision with the parameters of the official detectors.

They change an image of ``PIL`` and the corners of its boxes together, and draw from torch's global
generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

from deform_attn.detr.images import LARGEST_RATIO
from deform_attn.detr.samples import Original

# RT-DETR, D-FINE and DEIM. Zooming out has torchvision's probability of 0.5 and sides of up to 4.
DISTORT = v2.RandomPhotometricDistort(p=0.5)
ZOOM_OUT = v2.RandomZoomOut(fill=0)
IOU_CROP = v2.RandomApply([v2.RandomIoUCrop()], p=0.8)
# DEIM, of a mosaic.
AFFINE = v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.5, 1.5), fill=0)
SANITIZE = v2.Compose([v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)])


def transformed(original: Original, transforms: Sequence[Any]) -> Original:
    """Apply transforms in their order; boxes of less than a pixel are dropped at the end."""
    image, target = original
    size = (image.height, image.width)
    boxes = BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
    sample = image, {**target, "boxes": boxes}
    for transform in (*transforms, SANITIZE):
        sample = transform(*sample)
    image, target = sample
    return image, {**target, "boxes": target["boxes"].as_subclass(Tensor)}


def iou_crop(image: Image.Image, target: dict[str, Tensor]) -> Original:
    """RandomIoUCrop with a probability of 0.8.

    Without boxes torchvision draws until the crop is the whole image, and in an image of three
    pixels it divides by zero; both keep the whole image here.
    """
    if len(target["boxes"]) == 0 or min(image.size) < 4:
        return image, target
    return IOU_CROP(image, target)


def mosaic(originals: Sequence[Original], size: int) -> Original:
    """Four images as one, turned, shifted and scaled, as in DEIM.

    Args:
        originals: four.
        size: of the images in training; shorter sides become half of it, or less where the longer
            side would be more than LARGEST_RATIO times that.

    Raises:
        ValueError: not four images.
    """
    if len(originals) != 4:
        raise ValueError(f"originals: expected 4 of them, got {len(originals)}")
    small = [_with_shorter_side(one, size // 2) for one in originals]
    width, height = (max(image.size[i] for image, _ in small) for i in (0, 1))
    whole = Image.new("RGB", (2 * width, 2 * height))
    boxes = []
    for (image, target), place in zip(small, [(0, 0), (width, 0), (0, height), (width, height)]):
        whole.paste(image, place)
        boxes.append(target["boxes"] + torch.tensor(place).repeat(2))
    labels = torch.cat([target["labels"] for _, target in small])
    return transformed((whole, {"labels": labels, "boxes": torch.cat(boxes)}), [AFFINE])


def size_crop(original: Original, size: int) -> Original:
    """A part of random size, as in DETR.

    The shorter side becomes 1/2, 5/8 or 3/4 of the size; the crop has sides of 0.48 to 3/4 of it.

    Args:
        original: to crop.
        size: of the images in training.
    """
    shorter = round(size * (4 + _integer(0, 2)) / 8)
    original = _with_shorter_side(original, shorter)
    low, high = round(0.48 * size), round(0.75 * size)
    height, width = (
        _integer(min(side, low), min(side, high)) for side in reversed(original[0].size)
    )
    return transformed(original, [v2.RandomCrop((height, width))])


def _with_shorter_side(original: Original, side: int) -> Original:
    """Resized with its ratio; an image longer than LARGEST_RATIO times the side is made smaller."""
    shorter, longer = sorted(original[0].size)
    scaled = side, side * longer // shorter
    if scaled[1] > LARGEST_RATIO * side:
        scaled = max(1, LARGEST_RATIO * side * shorter // longer), LARGEST_RATIO * side
    wide = original[0].width == longer
    return transformed(original, [v2.Resize(scaled if wide else scaled[::-1])])


def _integer(low: int, high: int) -> int:
    """From low to high."""
    return int(torch.randint(low, high + 1, ()))
