"""What a data set is, for training and evaluation.

An item is ``(image, target)``: the image ``[3, h, w]``, float32 RGB in [0, 1]; the target a dict of
``labels [n]``, int64, and ``boxes [n, 4]``, float32 ``(cx, cy, w, h)`` as fractions of the image,
before a batch pads it. Before it is resized the image is one of ``PIL``, and the boxes are corners
``(x1, y1, x2, y2)`` in its pixels; augmentation starts from these.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from deform_attn.detr.boxes import from_corners
from deform_attn.detr.images import as_tensor

Sample = tuple[Tensor, dict[str, Tensor]]
Original = tuple[Image.Image, dict[str, Tensor]]  # before it is resized


class Detection(Protocol):
    """What training and evaluation need of a data set.

    Attributes:
        classes: names, by label.
        size: side of the images in pixels: the longer one, or the shorter with "shortest".
        flips: whether a mirrored object keeps its class.
        identity: changes where the content of the data set does.
        most_objects: in an image.
    """

    classes: tuple[str, ...]
    size: int
    flips: bool
    identity: str
    most_objects: int

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def original(self, index: int) -> Original:
        """The item before it is resized."""

    def ground_truth(self) -> dict[str, Any]:
        """``images``, ``annotations`` and ``categories`` in COCO's format, in pixels of the files.

        Image i is that of item i; ids of categories are labels.
        """


def resized(original: Original, size: int, resize: str = "stretch") -> Sample:
    """An item in the size that the model takes.

    Args:
        original: an RGB image, and its target with corners in pixels.
        size: in pixels, see :func:`~deform_attn.detr.images.as_tensor`.
        resize: likewise.
    """
    image, target = original
    boxes = from_corners(target["boxes"]) / torch.tensor(image.size).repeat(2)
    return as_tensor(image, size, resize), {**target, "boxes": boxes}
