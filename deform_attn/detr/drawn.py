"""Data sets that are drawn: shapes, and handwritten digits on photographs."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw

from deform_attn.detr.samples import Detection, Original, Sample, resized
from deform_attn.extras import needs

Drawing = tuple[Image.Image, list[list[float]], list[int]]


class _Drawn(Detection):
    """Images drawn on access, the same for the same seed, split and index.

    Args:
        split: ``train``, 2000 images, or ``val``, 200 others.
        size: side of the images in pixels; 0: that of the class.
        seed: another seed draws other images.
    """

    side: int
    lengths: ClassVar = {"train": 2000, "val": 200}

    def __init__(self, split: str = "train", size: int = 0, seed: int = 0) -> None:
        self.split, self.size, self.seed = split, size or self.side, seed
        self.identity = f"{type(self).__name__} {split} {len(self)} {self.size} {seed}"

    def __len__(self) -> int:
        return self.lengths[self.split]

    def __getitem__(self, index: int) -> Sample:
        return resized(self.original(index), self.size)

    def original(self, index: int) -> Original:
        """The image as it is drawn, which has the size already."""
        image, boxes, labels = self._drawn(index)
        corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        return image, {"labels": torch.tensor(labels).long(), "boxes": corners}

    def _drawn(self, index: int) -> Drawing:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        rng = np.random.default_rng((self.seed, list(self.lengths).index(self.split), index))
        return self.draw(rng, self.size)

    def draw(self, rng: np.random.Generator, size: int) -> Drawing:
        """A square image of that size, boxes ``(x1, y1, x2, y2)`` in pixels, and labels."""
        raise NotImplementedError

    @functools.cached_property
    def _ground_truth(self) -> dict[str, Any]:
        annotations: list[dict[str, Any]] = []
        for image_id in range(len(self)):
            _, boxes, labels = self._drawn(image_id)
            for (x1, y1, x2, y2), label in zip(boxes, labels):
                box = [x1, y1, x2 - x1, y2 - y1]
                ids = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label}
                annotations.append(ids | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
        size = {"height": self.size, "width": self.size}
        return {
            "images": [{"id": i, **size} for i in range(len(self))],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.classes)],
        }

    def ground_truth(self) -> dict[str, Any]:
        """All objects in COCO's format, in pixels."""
        return self._ground_truth


class Shapes(_Drawn):
    """One to four discs, squares and triangles on a noisy background, 64 x 64 pixels."""

    classes = ("disc", "square", "triangle")
    flips, side, most_objects = True, 64, 4

    def draw(self, rng: np.random.Generator, size: int) -> Drawing:
        """Shapes that do not touch, drawn enlarged and averaged for smooth edges."""
        fine = 4
        ground = rng.integers(88, 168, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(ground).resize((size * fine, size * fine), Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(image)
        boxes: list[list[float]] = []
        labels: list[int] = []
        count = int(rng.integers(1, self.most_objects + 1))
        while len(boxes) < count:
            label = int(rng.integers(len(self.classes)))
            corners = (64, 4, 3)[label]
            angles = rng.uniform(0, 2 * math.pi) + np.arange(corners) * (2 * math.pi / corners)
            outline = np.stack([np.cos(angles), np.sin(angles)], -1)
            outline = (outline * rng.uniform(0.08, 0.2) + rng.uniform(0.1, 0.9, 2)) * size
            box = [*outline.min(0).tolist(), *outline.max(0).tolist()]
            color = tuple(int(c) for c in rng.permutation([*rng.integers(0, 256, 2), 255]))
            if min(box) < 0 or max(box) > size or _touches(box, boxes):
                continue
            pen.polygon([(x * fine, y * fine) for x, y in outline.tolist()], fill=color)
            boxes.append(box)
            labels.append(label)
        image = image.resize((size, size), Image.Resampling.BOX)
        noisy = np.asarray(image) + rng.normal(0, 12, (size, size, 3))
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), boxes, labels


def _touches(box: list[float], others: list[list[float]]) -> bool:
    corners = np.reshape(others, (-1, 4))
    return bool(((corners[:, :2] < box[2:]) & (corners[:, 2:] > box[:2])).all(1).any())


class Digits(_Drawn):
    """Handwritten digits on photographs, from scikit-learn and scikit-image, 128 x 128 pixels.

    Images to train on and test images share neither digits nor photographs.
    """

    classes = tuple("0123456789")
    flips, side, most_objects = False, 128, 6

    def background(self, rng: np.random.Generator, size: int) -> Image.Image:
        """A random square of a photograph, at that size."""
        photographs = _photographs(self.split)
        photograph = photographs[int(rng.integers(len(photographs)))]
        side = rng.uniform(0.4, 1) * min(photograph.size)
        x, y = (rng.uniform(0, length - side) for length in photograph.size)
        return photograph.resize((size, size), box=(x, y, x + side, y + side))

    def draw(self, rng: np.random.Generator, size: int) -> Drawing:
        """Digits that do not touch, light on dark parts of the photograph, dark on light."""
        canvas = self.background(rng, size)
        digits, names = _handwriting(self.split)
        boxes: list[list[float]] = []
        labels: list[int] = []
        count = int(rng.integers(1, self.most_objects + 1))
        while len(boxes) < count:
            which = int(rng.integers(len(digits)))
            sides = rng.uniform(0.15, 0.36) * size * rng.uniform(0.8, 1.2, 2)
            width, height = (int(side) for side in sides)
            ink = digits[which].resize((width, height), Image.Resampling.BICUBIC)
            ink = ink.point(lambda v: max(0, min(255, 3 * (v - 85))))  # crisp edges
            x, y = (int(rng.uniform(0, size - length)) for length in (width, height))
            rows, columns = np.nonzero(np.asarray(ink) > 127)
            box = [float(x + columns.min()), float(y + rows.min())]
            box += [float(x + columns.max() + 1), float(y + rows.max() + 1)]
            if _touches(box, boxes):
                continue
            under = np.asarray(canvas.crop((x, y, x + width, y + height)).convert("L")).mean()
            color = rng.integers(176, 256, 3) if under < 128 else rng.integers(0, 80, 3)
            canvas.paste(tuple(int(c) for c in color), (x, y), ink)
            boxes.append(box)
            labels.append(names[which])
        return canvas, boxes, labels


DRAWN: dict[str, type[_Drawn]] = {"shapes": Shapes, "digits": Digits}


@functools.cache
def _handwriting(split: str) -> tuple[list[Image.Image], list[int]]:
    """Ink (0 to 255) and labels of the 1400 digits to train on, or of the 397 others."""
    with needs("detr"):
        from sklearn.datasets import load_digits

    digits = load_digits()
    part = slice(1400) if split == "train" else slice(1400, None)
    ink = (digits.images[part] * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(digit) for digit in ink], digits.target[part].tolist()


@functools.cache
def _photographs(split: str) -> list[Image.Image]:
    """Photographs that are in the wheels, without a download."""
    with needs("detr"):
        from skimage import data
        from sklearn.datasets import load_sample_image

    names = "astronaut brick chelsea coffee coins grass gravel hubble_deep_field moon retina "
    names += "immunohistochemistry flower.jpg"
    files = ("china.jpg rocket camera" if split == "val" else names).split()
    arrays = [load_sample_image(f) if f.endswith(".jpg") else getattr(data, f)() for f in files]
    photographs = [Image.fromarray(array).convert("RGB") for array in arrays]
    for photograph in photographs:
        photograph.thumbnail((640, 640))
    return photographs
