"""Augmentation: one affine warp for flip, crop, zoom and mosaic; mixup; their schedule; and sizes.

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
from torch import Tensor
from torch.utils.data import Dataset

from deform_attn.detr.data import Detection, Sample
from deform_attn.detr.images import pad

GRAY = 0.447  # outside of an image

# Begin and end of each augmentation, as fractions of the training. "dense" is DEIM's dense
# one-to-one schedule (arXiv 2412.04234, section 3.2) of 58 epochs.
AUGMENTATIONS: dict[str, dict[str, tuple[float, float]]] = {
    "none": {},
    "flip": {"flip": (0, 1)},
    "crop": {"flip": (0, 1), "colors": (0, 1), "zoom_out": (0, 1), "crop": (0, 1)},
    "dense": {
        "flip": (0, 1),
        **dict.fromkeys(("colors", "zoom_out", "crop"), (4 / 58, 50 / 58)),
        **dict.fromkeys(("mosaic", "mixup"), (4 / 58, 29 / 58)),
    },
}


def warp(sample: Sample, output_to_input: np.ndarray) -> Sample:
    """Resample an image through an affine map, and transform its boxes.

    Args:
        sample: image ``[3, H, W]`` and its target; rotated boxes become their bounding boxes.
        output_to_input: ``[2, 3]``, from a point (x, y) of the new image to one of the old image,
            both in [-1, 1].

    Returns:
        The new sample, of the same size. Boxes are clipped, and dropped if less than a quarter of
        their area or less than 1/64 of the image's side is left.
    """
    image, target = sample
    theta = torch.from_numpy(output_to_input).float()[None]
    grid = F.affine_grid(theta, [1, *image.shape], align_corners=False)
    warped = F.grid_sample(image[None] - GRAY, grid, align_corners=False)[0] + GRAY
    inverse = np.linalg.inv(np.vstack([output_to_input, [0, 0, 1]]))
    center, half = target["boxes"].double().numpy().reshape(-1, 2, 2).transpose(1, 0, 2)
    signs = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]])
    corners = (center[:, None] + half[:, None] / 2 * signs) * 2 - 1  # [n, 4, 2]
    corners = (corners @ inverse[:2, :2].T + inverse[:2, 2] + 1) / 2
    low, high = corners.min(1), corners.max(1)
    clipped_low, clipped_high = low.clip(0, 1), high.clip(0, 1)
    left = (clipped_high - clipped_low).clip(0)
    kept = (left.prod(1) >= (high - low).prod(1) / 4) & (left.min(1, initial=1) >= 1 / 64)
    boxes = np.concatenate([(clipped_low + clipped_high) / 2, left], 1)[kept]
    labels = target["labels"][torch.from_numpy(kept)]
    return warped, {"labels": labels, "boxes": torch.from_numpy(boxes).float()}


def _window(center: np.ndarray, half: np.ndarray | float) -> np.ndarray:
    """The map whose new image is a part of the old one, centre +- half; all of it is 0 +- 1."""
    return np.concatenate([np.diag(np.broadcast_to(half, 2)), np.reshape(center, (2, 1))], 1)


def _colors(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Random brightness, contrast and balance of the channels."""
    mean = image.mean()
    balance = torch.from_numpy(rng.uniform(0.8, 1.2, (3, 1, 1))).float()
    varied = (image - mean) * rng.uniform(0.7, 1.3) + mean * rng.uniform(0.7, 1.3)
    return (varied * balance).clamp(0, 1)


def mosaic(samples: Sequence[Sample], rng: np.random.Generator) -> Sample:
    """Four images at half their size, rotated, shifted and scaled as in DEIM.

    Args:
        samples: four of one size.
        rng: draws a rotation of up to 10 degrees, a shift of up to a tenth, a scale of 0.5 to 1.5.

    Raises:
        ValueError: not four samples.
    """
    if len(samples) != 4:
        raise ValueError(f"samples: expected 4 of them, got {len(samples)}")
    places = [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)]  # (x, y)
    images = [F.interpolate(s[0][None], scale_factor=0.5, mode="area")[0] for s in samples]
    rows = [torch.cat(images[:2], 2), torch.cat(images[2:], 2)]
    boxes = [s[1]["boxes"] / 2 + torch.tensor([*place, 0, 0]) for s, place in zip(samples, places)]
    target = {"labels": torch.cat([s[1]["labels"] for s in samples]), "boxes": torch.cat(boxes)}
    angle = math.radians(rng.uniform(-10, 10))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shift = rng.uniform(-0.2, 0.2, (2, 1))  # [-1, 1] is two long
    return warp((torch.cat(rows, 1), target), np.hstack([turn / rng.uniform(0.5, 1.5), shift]))


def mixup(images: Tensor, targets: list[dict[str, Tensor]], rng: np.random.Generator) -> None:
    """Blend each image of a batch with the one before, in place; it gets the objects of both.

    Args:
        images: ``[B, 3, H, W]``.
        targets: one for each.
        rng: draws the weight of the image itself, from 0.45 to 0.55.
    """
    share = rng.uniform(0.45, 0.55)
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
        raise ValueError(
            f"multi_scale: expected a fraction of {size} pixels that reaches another multiple of "
            f"32, such as {math.ceil(3200 / size) / 100}, got {multi_scale}"
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
            all images of a step have the same.
        resize: how the data set resizes its images.

    Raises:
        ValueError: an unknown name, or a ``multi_scale`` without effect.
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
        if name not in AUGMENTATIONS:
            raise ValueError(f"augment: expected one of {list(AUGMENTATIONS)}, got {name!r}")
        self.dataset, self.steps, self.seed = dataset, steps, seed
        self._active = AUGMENTATIONS[name]
        self.sizes = scales(dataset.size, multi_scale, resize)
        self._own_sizes = resize == "shortest"

    def is_on(self, name: str, step: int) -> bool:
        """Whether an augmentation may be applied in a step."""
        begin, end = self._active.get(name, (0, 0))
        return begin <= step / self.steps < end

    def __getitem__(self, item: Item) -> tuple[Item, Sample]:
        rng = np.random.default_rng((self.seed, item.step, item.place))
        sample = self.dataset[item.image]
        if self.is_on("mosaic", item.step) and rng.random() < 0.5:
            others = rng.integers(len(self.dataset), size=3).tolist()
            four = [sample, *(self.dataset[i] for i in others)]
            sample = mosaic([_square(one, self.dataset.size) for one in four], rng)
        else:  # zoom and crop are not applied to a mosaic
            if self.is_on("zoom_out", item.step) and rng.random() < 0.5:
                half = rng.uniform(1, 2)
                sample = warp(sample, _window(rng.uniform(1 - half, half - 1, 2), half))
            if self.is_on("crop", item.step) and rng.random() < 0.5:
                sides = rng.uniform(0.5, 1, 2)
                sample = warp(sample, _window(rng.uniform(sides - 1, 1 - sides), sides))
        if self.is_on("colors", item.step) and rng.random() < 0.5:
            sample = _colors(sample[0], rng), sample[1]
        if self.dataset.flips and self.is_on("flip", item.step) and rng.random() < 0.5:
            sample = warp(sample, _window(np.zeros(2), np.array([-1.0, 1.0])))
        if self._own_sizes:
            sample = self._resized(sample, rng)
        return item, sample

    def _resized(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """With one of the sizes; boxes are fractions of the image."""
        image, target = sample
        scale = self.sizes[int(rng.integers(len(self.sizes)))] / self.dataset.size
        if scale != 1:
            sides = [max(1, round(side * scale)) for side in image.shape[1:]]
            image = F.interpolate(image[None], sides, mode="bilinear", antialias=True)[0]
        return image, target

    def batch(self, drawn: list[tuple[Item, Sample]]) -> Batch:
        """Items as a batch, with mixup while that is on."""
        samples, step = [sample for _, sample in drawn], drawn[0][0].step
        if not self._own_sizes:  # generators of one seed: all images get the same size
            key = (self.seed, step, 2**32 - 1)
            samples = [self._resized(one, np.random.default_rng(key)) for one in samples]
        rng = np.random.default_rng((self.seed, step))
        if not self.is_on("mixup", step) or rng.random() >= 0.5:
            return collate(samples)
        height, width = (max(image.shape[i] for image, _ in samples) for i in (1, 2))
        images, _, targets = collate([_extended(one, height, width) for one in samples])
        mixup(images, targets, rng)
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
    if (h, w) == (height, width):
        return sample
    image = F.pad(image, (0, width - w, 0, height - h), value=GRAY)
    scale = torch.tensor([w / width, h / height]).repeat(2)
    return image, {**target, "boxes": target["boxes"] * scale}


def _square(sample: Sample, size: int) -> Sample:
    return _extended(sample, size, size)
