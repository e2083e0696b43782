"""Data to train on: drawn shapes, handwritten digits on photographs, a COCO folder of your own.

A dataset gives ``(image, target)``: the image ``[3, size, size]``, float32 in [0, 1]; the target a
dict of ``labels`` ``[n]``, int64, and ``boxes`` ``[n, 4]``, float32 ``(cx, cy, w, h)`` in [0, 1].
``ground_truth()`` is the same in COCO's format, in pixels of the original images, for the AP.
"""

from __future__ import annotations

import functools
import math
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, ValidationError
from torch import Tensor

from deform_attn.detr.boxes import from_corners

Sample = tuple[Tensor, dict[str, Tensor]]


class Detection(Protocol):
    """What training and evaluation ask of a dataset."""

    classes: tuple[str, ...]
    size: int  # sides of the images, in pixels
    flips: bool  # whether a mirrored object is one of its class

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def ground_truth(self) -> dict[str, Any]:
        """``images``, ``annotations`` and ``categories`` of COCO; image i is that of item i."""


def open_dataset(name: str, split: str, size: int = 0, seed: int = 0) -> Detection:
    """The dataset that a command line names.

    Args:
        name: ``shapes``, ``digits`` or ``coco:FOLDER``.
        split: ``train`` or ``val``.
        size: sides of the images in pixels; 0: 64, 128 and 640.
        seed: of what is drawn; a folder has none.

    Raises:
        ValueError: another name or split, or a folder with faults; each is named.

    Example:
        >>> from deform_attn.detr.data import open_dataset
        >>> image, target = open_dataset("shapes", "val")[0]
        >>> image.shape, target["boxes"].shape[-1]
        (torch.Size([3, 64, 64]), 4)
    """
    if split not in ("train", "val"):
        raise ValueError(f"split: expected 'train' or 'val', got {split!r}")
    if name in (drawn := {"shapes": Shapes, "digits": Digits}):
        return drawn[name](split, size, seed)
    kind, _, folder = name.partition(":")
    if kind == "coco" and folder:
        return CocoFolder(folder, split, size or 640)
    raise ValueError(f"data: expected 'shapes', 'digits' or 'coco:FOLDER', got {name!r}")


def upright(image: Image.Image) -> Image.Image:
    """An image as it is meant to be seen: cameras may store it on its side."""
    return ImageOps.exif_transpose(image)


def as_tensor(image: Image.Image, size: int) -> Tensor:
    """An image of any mode as ``[3, size, size]`` in [0, 1], upright and stretched to a square."""
    resized = upright(image).convert("RGB").resize((size, size))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


Drawing = tuple[Image.Image, list[list[float]], list[int]]


class _Drawn(Detection):
    """Images drawn when they are asked for: the same for the same seed, split and index.

    Args:
        split: ``train`` or ``val``: 2000 images to train on, or 200 to test.
        size: sides of the image, in pixels; 0: those of the class.
        seed: another seed draws other images.
    """

    side: int
    lengths: ClassVar = {"train": 2000, "val": 200}

    def __init__(self, split: str = "train", size: int = 0, seed: int = 0) -> None:
        self.split, self.size, self.seed = split, size or self.side, seed

    def __len__(self) -> int:
        return self.lengths[self.split]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        rng = np.random.default_rng((self.seed, list(self.lengths).index(self.split), index))
        image, boxes, labels = self.draw(rng, self.size)
        corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) / self.size
        target = {"labels": torch.tensor(labels).long(), "boxes": from_corners(corners)}
        return as_tensor(image, self.size), target

    def draw(self, rng: np.random.Generator, size: int) -> Drawing:
        """An image of that size, its boxes ``(x1, y1, x2, y2)`` in pixels, and their classes."""
        raise NotImplementedError

    def ground_truth(self) -> dict[str, Any]:
        """All objects in COCO's format, in pixels."""
        annotations: list[dict[str, Any]] = []
        for image_id in range(len(self)):
            target = self[image_id][1]
            for (cx, cy, w, h), label in zip(target["boxes"].tolist(), target["labels"].tolist()):
                box = [self.size * side for side in (cx - w / 2, cy - h / 2, w, h)]
                ids = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label}
                shape = {"bbox": box, "area": box[2] * box[3], "iscrowd": 0}
                annotations.append(ids | shape)
        size = {"height": self.size, "width": self.size}
        return {
            "images": [{"id": i, **size} for i in range(len(self))],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.classes)],
        }


class Shapes(_Drawn):
    """One to four discs, squares and triangles on a noisy ground, in 64 by 64 pixels."""

    classes = ("disc", "square", "triangle")
    flips, side = True, 64

    def draw(self, rng: np.random.Generator, size: int) -> Drawing:
        """Shapes that do not touch, drawn finely and then averaged."""
        fine = 4  # drawn so many times as large, for smooth edges
        ground = rng.integers(88, 168, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(ground).resize((size * fine, size * fine), Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(image)
        boxes: list[list[float]] = []
        labels: list[int] = []
        wanted = int(rng.integers(1, 5))
        while len(boxes) < wanted:
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
    """Real handwritten digits on real photographs: scikit-learn's and scikit-image's own, in 128
    by 128 pixels. Neither a digit nor a photograph of the test images is in one to train on.
    """

    classes = tuple("0123456789")
    flips, side = False, 128

    def draw(self, rng: np.random.Generator, size: int) -> Drawing:
        """Digits that do not touch, light where the photograph is dark and dark elsewhere."""
        photographs = _photographs(self.split)
        photograph = photographs[int(rng.integers(len(photographs)))]
        side = rng.uniform(0.4, 1) * min(photograph.size)
        x, y = (rng.uniform(0, length - side) for length in photograph.size)
        canvas = photograph.resize((size, size), box=(x, y, x + side, y + side))
        digits, names = _handwriting(self.split)
        boxes: list[list[float]] = []
        labels: list[int] = []
        wanted = int(rng.integers(1, 7))
        while len(boxes) < wanted:
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


@functools.cache
def _handwriting(split: str) -> tuple[list[Image.Image], list[int]]:
    """Ink (0 to 255) of 1400 digits to train on or of the 397 others, and what they are."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    part = slice(1400) if split == "train" else slice(1400, None)
    ink = (digits.images[part] * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(digit) for digit in ink], digits.target[part].tolist()


@functools.cache
def _photographs(split: str) -> list[Image.Image]:
    """Photographs that come with the wheels, so that nothing is downloaded."""
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


# What an annotation file must hold, and of which types; whatever else it holds is kept.


class _Row(BaseModel, strict=True, extra="allow"):
    id: int


class _Image(_Row):
    file_name: str
    height: PositiveInt
    width: PositiveInt


class _Annotation(_Row):
    image_id: int
    category_id: int
    bbox: Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
    iscrowd: Annotated[int, Field(strict=False)] = 0  # true and false are seen too


class _Category(_Row):
    name: str


class _Content(BaseModel, strict=True, extra="allow"):
    images: Annotated[list[_Image], Field(min_length=1)]
    annotations: list[_Annotation]
    categories: Annotated[list[_Category], Field(min_length=1)]


class CocoFolder:
    """Your own images, annotated in COCO's format; every fault is found before training starts.

    The folder holds ``annotations/instances_NAME.json`` and the images in ``NAME/``, where NAME
    starts with the split: ``train`` or ``train2017``. Images without objects and objects of a crowd
    are kept: both count in the AP, and the model is trained on the former. Boxes may be outside the
    image by one pixel, as rounding leaves them; they are then clipped.

    Args:
        folder: that folder.
        split: ``train`` or ``val``.
        size: images are stretched to a square with these sides.

    Raises:
        ValueError: no such file, or anything wrong in it: one line for each fault, with its place
            in the file or its id, what was expected and what came. Keys and types come first; where
            they are right, ids, images, boxes and references.
    """

    flips = True

    def __init__(self, folder: str | Path, split: str, size: int) -> None:
        pattern = f"annotations/instances_{split}*.json"
        found = sorted(Path(folder).glob(pattern))
        if len(found) != 1:
            names = [file.name for file in found] or "none"
            raise ValueError(f"{folder}: expected one file {pattern}, got {names}")
        self.size = size
        self.images = Path(folder) / found[0].stem.removeprefix("instances_")
        try:
            self._content = _Content.model_validate_json(found[0].read_bytes()).model_dump()
            faults = [*_faults(self._content, self.images)]
        except ValidationError as error:
            brief = reprlib.Repr()
            brief.maxlevel = 1
            wrong = [(".".join(map(str, e["loc"])), e["msg"], e["input"]) for e in error.errors()]
            faults = [f"{path}: {text}, got {brief.repr(got)}" for path, text, got in wrong]
        if faults:
            shown = faults[:20] + ([f"... and {len(faults) - 20} more"] if faults[20:] else [])
            raise ValueError("\n  ".join([f"{found[0]}: {len(faults)} faults", *shown]))
        categories = sorted(self._content["categories"], key=lambda category: category["id"])
        self.classes = tuple(category["name"] for category in categories)
        self._label = {category["id"]: i for i, category in enumerate(categories)}
        self._objects: dict[Any, list[dict[str, Any]]] = {}
        for one in self._content["annotations"]:
            self._objects.setdefault(one["image_id"], []).append(one)

    def __len__(self) -> int:
        return len(self._content["images"])

    def __getitem__(self, index: int) -> Sample:
        facts = self._content["images"][index]
        objects = [one for one in self._objects.get(facts["id"], []) if not one["iscrowd"]]
        boxes = torch.tensor([one["bbox"] for one in objects], dtype=torch.float32).reshape(-1, 4)
        sides = torch.tensor([facts["width"], facts["height"]])
        low = boxes[:, :2].clamp(min=0)
        high = torch.minimum(boxes[:, :2] + boxes[:, 2:], sides)
        labels = torch.tensor([self._label[one["category_id"]] for one in objects]).long()
        boxes = from_corners(torch.cat([low, high], -1)) / sides.repeat(2)
        with Image.open(self.images / facts["file_name"]) as image:
            return as_tensor(image, self.size), {"labels": labels, "boxes": boxes}

    def ground_truth(self) -> dict[str, Any]:
        """The file, with the areas and crowd flags that it may leave out."""
        rows = self._content["annotations"]
        areas = [{"area": one["bbox"][2] * one["bbox"][3], **one} for one in rows]
        return {**self._content, "annotations": areas}


def _faults(content: dict[str, Any], folder: Path) -> Iterator[str]:
    """What is wrong with ids, images, boxes and references of an annotation file."""
    for part in ("images", "annotations", "categories"):
        counts = Counter(one["id"] for one in content[part])
        yield from (f"{part}: expected one of id {i}, got {n}" for i, n in counts.items() if n > 1)
    for facts in content["images"]:
        name, file = f"image {facts['id']}", folder / facts["file_name"]
        listed, found = (facts["width"], facts["height"]), None
        try:
            with Image.open(file) as image:
                found = upright(image).size
        except OSError as error:
            yield f"{name}: expected an image in {file}, got {error}"
        if found not in (None, listed):
            yield f"{name}: expected (width, height) of {file} to be {listed}, got {found}"
    images = {facts["id"]: (facts["width"], facts["height"]) for facts in content["images"]}
    known = sorted(category["id"] for category in content["categories"])
    for one in content["annotations"]:
        name, (x, y, w, h) = f"annotation {one['id']} (image {one['image_id']})", one["bbox"]
        width, height = images.get(one["image_id"], (math.inf, math.inf))
        if one["image_id"] not in images:
            yield f"{name}: expected image_id of a listed image, got {one['image_id']}"
        if w <= 0 or h <= 0:
            yield f"{name}: expected bbox with width and height above 0, got {[x, y, w, h]}"
        elif x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            yield f"{name}: expected bbox inside {width} x {height} pixels, got {[x, y, w, h]}"
        if one["category_id"] not in known:
            yield f"{name}: expected category_id among {known}, got {one['category_id']}"
