"""Augmentation: one warp for flip, crop, zoom and mosaic; mixup; and when each of them is on.

Every random number of an item comes from a generator seeded with (seed, step, place in the batch):
nothing is carried from one step to the next, so training goes on where it stopped, to the bit, and
processes that share a batch draw what one process would. Mixup alone stays inside a process.
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

GRAY = 0.447  # what is seen outside an image

# Parts of training, from 0 to 1, in which each augmentation is on. `dense` is DEIM's dense
# one-to-one (arXiv 2412.04234, section 3.2): of 58 epochs, mosaic and mixup run from 4 to 29, which
# multiplies the objects of an image, and all but the flip is off before 4 and after 50.
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
    """Resample an image through an affine map, and move its boxes with it.

    Args:
        sample: image ``[3, H, W]`` and its target; a turned box becomes the upright one round it.
        output_to_input: ``[2, 3]``, from a point (x, y) of the new image to one of the old, both in
            [-1, 1].

    Returns:
        The new sample, of the same size. Boxes are clipped; one of which less than a quarter is
        left, or less than 1/64 of a side, is dropped.
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
    """The map under which the new image shows that part of the old one; [-1, 1] is all of it."""
    return np.concatenate([np.diag(np.broadcast_to(half, 2)), np.reshape(center, (2, 1))], 1)


def _colors(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast and the balance of the channels."""
    mean = image.mean()
    balance = torch.from_numpy(rng.uniform(0.8, 1.2, (3, 1, 1))).float()
    varied = (image - mean) * rng.uniform(0.7, 1.3) + mean * rng.uniform(0.7, 1.3)
    return (varied * balance).clamp(0, 1)


def mosaic(samples: Sequence[Sample], rng: np.random.Generator) -> Sample:
    """Four images at half their size in one, turned, moved and scaled as in DEIM.

    Args:
        samples: four of one size.
        rng: draws a turn of up to 10 degrees, a shift of up to a tenth, a scale of 0.5 to 1.5.

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
    """Blend each image of a batch with the one before it and give it the objects of both, in place.

    Args:
        images: ``[B, 3, H, W]``.
        targets: one for each.
        rng: draws the share of an image itself, from 0.45 to 0.55.
    """
    share = rng.uniform(0.45, 0.55)
    images.mul_(share).add_(images.roll(1, 0), alpha=(1 - share) / share)
    others = targets[-1:] + targets[:-1]
    targets[:] = [
        {key: torch.cat([mine[key], other[key]]) for key in mine}
        for mine, other in zip(targets, others)
    ]


class Item(NamedTuple):
    """A place in the batch of a step, and the number of the image that goes there."""

    step: int
    place: int
    image: int


def batches(
    length: int, batch: int, steps: range, seed: int, part: tuple[int, int] = (0, 1)
) -> Iterator[list[Item]]:
    """The batches of these steps: every image once an epoch, in an order of its own.

    A batch may begin in one epoch and end in the next.

    Args:
        length: images in the dataset.
        batch: images in a batch of all processes together.
        steps: from the first to the last.
        seed: of the order.
        part: (i, n): the i-th of n equal parts of each batch.

    Raises:
        ValueError: the batch cannot be shared equally.
    """
    if batch % part[1]:
        raise ValueError(f"batch: expected a multiple of {part[1]} processes, got {batch}")

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        numbers: list[int] = np.random.default_rng((seed, epoch)).permutation(length).tolist()
        return numbers

    share = batch // part[1]
    for step in steps:
        places = range(part[0] * share, (part[0] + 1) * share)
        epochs = (divmod(step * batch + place, length) for place in places)
        yield [Item(step, place, order(e)[i]) for place, (e, i) in zip(places, epochs)]


class Augmented(Dataset[tuple[Item, Sample]]):
    """A dataset as a step of training sees it; its items are those of `batches`.

    Args:
        dataset: where the images come from.
        name: which of AUGMENTATIONS.
        steps: length of the training.
        seed: of all that is drawn.
    """

    def __init__(self, dataset: Detection, name: str, steps: int, seed: int) -> None:
        if name not in AUGMENTATIONS:
            raise ValueError(f"augment: expected one of {list(AUGMENTATIONS)}, got {name!r}")
        self.dataset, self.steps, self.seed = dataset, steps, seed
        self._active = AUGMENTATIONS[name]

    def is_on(self, name: str, step: int) -> bool:
        """Whether the augmentation may be drawn in that step."""
        begin, end = self._active.get(name, (0, 0))
        return begin <= step / self.steps < end

    def __getitem__(self, item: Item) -> tuple[Item, Sample]:
        rng = np.random.default_rng((self.seed, item.step, item.place))
        sample = self.dataset[item.image]
        if self.is_on("mosaic", item.step) and rng.random() < 0.5:
            others = rng.integers(len(self.dataset), size=3).tolist()
            sample = mosaic([sample, *(self.dataset[i] for i in others)], rng)
        else:  # the mosaic takes the place of zoom and crop
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
        return item, sample

    def batch(self, drawn: list[tuple[Item, Sample]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Items as images ``[B, 3, size, size]`` and a list of targets, mixed up while it is on."""
        images, targets = collate([sample for _, sample in drawn])
        step = drawn[0][0].step
        rng = np.random.default_rng((self.seed, step))
        if self.is_on("mixup", step) and rng.random() < 0.5:
            mixup(images, targets, rng)
        return images, targets


def collate(samples: Sequence[Sample]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images of one size as one tensor, and their targets."""
    return torch.stack([image for image, _ in samples]), [target for _, target in samples]
