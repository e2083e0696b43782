"""Augmentation: the official transforms, their schedule, mixup, and sizes.

Images are augmented at their own resolution, and resized once, to the size that was drawn.

The random numbers of an item come from a generator seeded with (seed, step, place in the batch).
Nothing is carried from step to step, so that a resumed training is the same to the bit, and
processes that share a batch draw what one process would, as do the passes of a step. Only mixup
blends images of the same process and pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from deform_attn.checks import check_choice
from deform_attn.detr.images import LARGEST_RATIO, pad
from deform_attn.detr.samples import Detection, Original, Sample, resized
from deform_attn.extras import needs_torchvision

# Begin and end of each transform, as fractions of the training:
#   detr   DETR, Deformable DETR, DINO
#   crop   RT-DETRv2 (R50, 72 epochs), D-FINE
#   dense  DEIM's dense one-to-one schedule (arXiv 2412.04234, section 3.2) of 58 epochs
AUGMENTATIONS: dict[str, dict[str, tuple[float, float]]] = {
    "none": {},
    "flip": {"flip": (0, 1)},
    "detr": {"flip": (0, 1), "size_crop": (0, 1)},
    "crop": {"flip": (0, 1), **dict.fromkeys(("distort", "zoom_out", "iou_crop"), (0, 71 / 72))},
    "dense": {
        "flip": (0, 1),
        **dict.fromkeys(("distort", "zoom_out", "iou_crop"), (4 / 58, 50 / 58)),
        **dict.fromkeys(("mosaic", "mixup"), (4 / 58, 29 / 58)),
    },
}
WITHOUT_TORCHVISION = ("none", "flip")
SMALLEST_CROP = 0.3  # of an image's side
OF_SIZE, OF_MIXUP = 2**32 - 1, 2**32 - 2  # in the place of an item's place in the batch


def check_augmentation(name: str) -> None:
    """Check the name of an augmentation, and that its transforms can be imported.

    Raises:
        ValueError: an unknown name.
        ImportError: it needs torchvision, which is not installed; the message names the command.
    """
    check_choice("augment", name, AUGMENTATIONS)
    if name not in WITHOUT_TORCHVISION:
        with needs_torchvision():
            import deform_attn.detr.transforms  # noqa: F401


def flip(original: Original) -> Original:
    """Mirrored; it needs no torchvision."""
    image, target = original
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    boxes = torch.stack([image.width - x2, y1, image.width - x1, y2], 1)
    return ImageOps.mirror(image), {**target, "boxes": boxes}


def mixup(images: Tensor, targets: list[dict[str, Tensor]], share: float) -> None:
    """Blend each image of a batch with the one before, in place; it gets the objects of both.

    Args:
        images: ``[B, 3, H, W]``.
        targets: one for each.
        share: weight of the image itself; DEIM draws 0.45 to 0.55.
    """
    images.mul_(share).add_(images.roll(1, 0), alpha=(1 - share) / share)
    others = targets[-1:] + targets[:-1]
    targets[:] = [
        {key: torch.cat([mine[key], other[key]]) for key in mine}
        for mine, other in zip(targets, others)
    ]


class Item(NamedTuple):
    """An image of a batch: the step, the place in the batch, and the index of the image."""

    step: int
    place: int
    image: int


def batches(
    length: int,
    batch: int,
    steps: range,
    seed: int,
    part: tuple[int, int] = (0, 1),
    accumulate: int = 1,
) -> Iterator[list[Item]]:
    """The batches of these steps: every image once per epoch, in a random order.

    A batch may begin in one epoch and end in the next.

    Args:
        length: number of images.
        batch: images in a batch, of all processes together.
        steps: from the first to the last.
        seed: of the order.
        part: (i, n): the i-th of n equal parts of each batch.
        accumulate: batches per step; together they have the images of one batch so many times
            larger.

    Raises:
        ValueError: the batch has no n equal parts.
    """
    if batch % part[1]:
        raise ValueError(f"batch: expected a multiple of {part[1]} processes, got {batch}")

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        numbers: list[int] = np.random.default_rng((seed, epoch)).permutation(length).tolist()
        return numbers

    share, whole = batch // part[1], batch * accumulate
    for step in steps:
        for first in range(part[0] * share, whole, batch):
            places = range(first, first + share)
            epochs = (divmod(step * whole + place, length) for place in places)
            yield [Item(step, place, order(e)[i]) for place, (e, i) in zip(places, epochs)]


def scales(size: int, multi_scale: float, resize: str = "stretch") -> list[int]:
    """The sizes of images in multi-scale training: ``size``, and multiples of 32 around it.

    RT-DETR (arXiv 2304.08069) draws one for each batch, and ``size`` three times as often as
    another. With "shortest" no image is larger than ``size``, as in DETR.

    Args:
        size: of the images in pixels.
        multi_scale: largest change, as a fraction of ``size``; 0: none.
        resize: as :func:`~deform_attn.detr.images.as_tensor` takes it.

    Raises:
        ValueError: there is no such multiple of 32.

    Example:
        >>> from deform_attn.detr.augment import scales
        >>> scales(128, 0.25), scales(800, 0.1, "shortest")
        ([96, 160, 128, 128, 128], [736, 768, 800])
    """
    if multi_scale == 0:
        return [size]
    shortest = resize == "shortest"
    low, high = size * (1 - multi_scale), size * (1 if shortest else 1 + multi_scale)
    others = [s for s in range(32, round(high) + 1, 32) if s >= round(low) and s != size]
    if not others:
        fraction = math.ceil(3200 / size) / 100
        reached = f"such as {fraction}" if fraction < 1 else "which needs larger images"
        raise ValueError(
            f"multi_scale: expected a fraction of {size} pixels that reaches another multiple of "
            f"32, {reached}, got {multi_scale}"
        )
    return others + [size] * (1 if shortest else 3)


class Augmented(Dataset[tuple[Item, Sample]]):
    """A data set with augmentation; its items are those of :func:`batches`.

    Args:
        dataset: of the images.
        name: one of AUGMENTATIONS.
        steps: length of the training.
        seed: of all random numbers.
        multi_scale: of :func:`scales`. With "shortest" each image has a size of its own, otherwise
            all images of a step have the same. With "shortest" and the augmentation "detr" 0 means
            0.4, which is DETR's.
        resize: how images get their size, see :func:`~deform_attn.detr.images.as_tensor`.

    Raises:
        ValueError: an unknown name, or a ``multi_scale`` without effect.
        ImportError: the augmentation needs torchvision.
    """

    def __init__(
        self,
        dataset: Detection,
        name: str,
        steps: int,
        seed: int,
        multi_scale: float = 0.0,
        resize: str = "stretch",
    ) -> None:
        check_augmentation(name)
        self.dataset, self.steps, self.seed, self.resize = dataset, steps, seed, resize
        self._active = AUGMENTATIONS[name]
        self._own_sizes = resize == "shortest"
        if name == "detr" and self._own_sizes and multi_scale == 0 and dataset.size >= 80:
            multi_scale = 0.4  # from 80 pixels on it always reaches another multiple of 32
        self._drops_boxes = name not in WITHOUT_TORCHVISION
        self.sizes = scales(dataset.size, multi_scale, resize)

    def is_on(self, name: str, step: int) -> bool:
        """Whether a transform may be applied in a step."""
        begin, end = self._active.get(name, (0, 0))
        return begin <= step / self.steps < end

    def __getitem__(self, item: Item) -> tuple[Item, Sample]:
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also set the generators of GPUs
            torch.default_generator.manual_seed(self._state(item.step, item.place))
            original = self._transformed(item)
            if self.dataset.flips and self.is_on("flip", item.step) and torch.rand(()) < 0.5:
                original = flip(original)
            if not self._own_sizes:  # all images of a step have the same
                torch.default_generator.manual_seed(self._state(item.step, OF_SIZE))
            size = self.sizes[int(torch.randint(len(self.sizes), ()))]
        image, target = resized(original, size, self.resize)
        if self._drops_boxes:  # those of less than a pixel, as the official code
            sides = torch.tensor([image.shape[2], image.shape[1]])
            kept = (target["boxes"][:, 2:] * sides >= 1).all(1)
            target = {key: values[kept] for key, values in target.items()}
        return item, (image, target)

    def _state(self, step: int, place: int) -> int:
        """A seed for an item."""
        words = np.random.SeedSequence((self.seed, step, place)).generate_state(1, np.uint64)
        return int(words[0] >> 1)

    def _transformed(self, item: Item) -> Original:
        """An item after the transforms of torchvision that are on."""
        original = self.dataset.original(item.image)
        on = [name for name in self._active if name != "flip" and self.is_on(name, item.step)]
        if not on:
            return original
        from deform_attn.detr import transforms

        original = self._reduced(original)
        chosen: list[object] = []
        if "mosaic" in on and torch.rand(()) < 0.5:
            others = torch.randint(len(self.dataset), (3,)).tolist()
            four = [original, *(self._reduced(self.dataset.original(i)) for i in others)]
            original = transforms.mosaic(four, self.dataset.size)
        elif "zoom_out" in on:  # neither zoom nor crop of a mosaic
            chosen = [transforms.ZOOM_OUT, transforms.iou_crop]
        if "distort" in on:
            chosen.insert(0, transforms.DISTORT)
        if "size_crop" in on and torch.rand(()) < 0.5:
            return transforms.size_crop(original, self.dataset.size)
        return transforms.transformed(original, chosen)

    def _reduced(self, original: Original) -> Original:
        """A large image reduced so far that the smallest crop has the size of the training.

        One of other than usual ratios is reduced further: zooming out makes 16 times its pixels.
        """
        image, target = original
        side = max(image.size) if self.resize == "fit" else min(image.size)
        enough = max(self.sizes) / SMALLEST_CROP
        most_pixels = LARGEST_RATIO * enough**2
        scale = min(enough / side, math.sqrt(most_pixels / image.width / image.height))
        if scale >= 1:
            return original
        width, height = (math.ceil(length * scale) for length in image.size)
        factors = torch.tensor([width / image.width, height / image.height]).repeat(2)
        small = image.resize((width, height), Image.Resampling.BILINEAR)
        return small, {**target, "boxes": target["boxes"] * factors}

    def batch(self, drawn: list[tuple[Item, Sample]]) -> Batch:
        """Items as a batch, with mixup while that is on."""
        samples, step = [sample for _, sample in drawn], drawn[0][0].step
        rng = torch.Generator().manual_seed(self._state(step, OF_MIXUP))
        chance, weight = torch.rand(2, generator=rng).tolist()
        if not self.is_on("mixup", step) or chance >= 0.5:
            return collate(samples)
        height, width = (max(image.shape[i] for image, _ in samples) for i in (1, 2))
        images, _, targets = collate([_extended(one, height, width) for one in samples])
        mixup(images, targets, 0.45 + weight / 10)
        return images, None, targets


Batch = tuple[Tensor, Tensor | None, list[dict[str, Tensor]]]


def collate(samples: Sequence[Sample]) -> Batch:
    """Images padded to one size ``[B, 3, H, W]``, their padding mask or None, and their targets."""
    images, padding_mask = pad([image for image, _ in samples])
    return images, padding_mask, [target for _, target in samples]


def _extended(sample: Sample, height: int, width: int) -> Sample:
    """A sample whose padding, on the right and below, is part of the image."""
    image, target = sample
    h, w = image.shape[1:]
    image = F.pad(image, (0, width - w, 0, height - h))
    scale = torch.tensor([w / width, h / height]).repeat(2)
    return image, {**target, "boxes": target["boxes"] * scale}
