"""Data sets: drawn shapes, handwritten digits on photographs, and folders with annotations.

An item is ``(image, target)``: the image ``[3, h, w]``, float32 RGB in [0, 1]; the target a dict of
``labels [n]``, int64, and ``boxes [n, 4]``, float32 ``(cx, cy, w, h)`` as fractions of the image,
before a batch pads it. Before it is resized the image is one of ``PIL``, and the boxes are corners
``(x1, y1, x2, y2)`` in its pixels; augmentation starts from these.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from deform_attn.checks import as_path, check_choice, check_integer
from deform_attn.detr.boxes import from_corners
from deform_attn.detr.files import nearby
from deform_attn.detr.images import as_tensor
from deform_attn.extras import needs

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


def open_dataset(
    name: str | Path,
    split: str,
    size: int = 0,
    seed: int = 0,
    resize: str = "stretch",
    classes: Sequence[str] | None = None,
) -> Detection:
    """A data set by its name on the command line.

    Args:
        name: ``shapes``, ``digits``, or a folder of a layout in :mod:`deform_attn.detr.folders`;
            ``coco:FOLDER``, ``roboflow:FOLDER`` and ``yolo:FOLDER`` choose the layout.
        split: ``train`` or ``val``; of a folder also ``test`` or another name.
        size: longer side of the images in pixels, the shorter one with "shortest"; 0: 64 for
            shapes, 128 for digits, 640 for a folder.
        seed: of what is drawn; a folder has none.
        resize: of a folder's images: "stretch" to a square; "fit" or "shortest", which keep the
            ratio (see ``images.as_tensor``).
        classes: names by label, where they are given, as those of the training images are for the
            evaluation.

    Raises:
        TypeError: an argument has another type.
        ValueError: an unknown name or split, or an invalid folder; the message names each fault.
        OSError: a file of the folder cannot be read.

    Example:
        >>> from deform_attn.detr.data import open_dataset
        >>> image, target = open_dataset("shapes", "val")[0]
        >>> image.shape, target["boxes"].shape[-1]
        (torch.Size([3, 64, 64]), 4)
    """
    from deform_attn.detr.folders import AnnotatedFolder

    name = _as_name(name)
    check_integer("size", size, 0)
    check_integer("seed", seed, 0)
    if name in DRAWN:
        check_choice("split", split, _Drawn.lengths)
        return DRAWN[name](split, size, seed)
    folder, layout = folder_of(name)
    return AnnotatedFolder(folder, split, size or 640, resize, classes, layout)


def splits_of(name: str) -> list[str]:
    """Names of the splits of a data set.

    Raises:
        ValueError: an unknown name, or an invalid folder.
    """
    from deform_attn.detr.folders import find_splits

    return list(_Drawn.lengths if name in DRAWN else find_splits(*folder_of(name)))


def _as_name(name: object) -> str:
    if not isinstance(name, str | Path):
        raise TypeError(f"data: expected the name of a data set or a folder, got {name!r}")
    return str(name)


def folder_of(name: str) -> tuple[Path, str]:
    """Folder and layout, empty if not given, of a name on the command line.

    Raises:
        ValueError: the name has neither.
    """
    from deform_attn.detr.folders import LAYOUTS

    layout, _, folder = _as_name(name).partition(":")
    if layout in LAYOUTS and folder:
        return as_path("data", folder), layout
    path = as_path("data", name or ".")
    if not name or not os.path.exists(path):
        why = f": {nearby(path, list(DRAWN))}" if name else ""
        raise ValueError(
            "data: expected 'shapes', 'digits', a folder, or 'coco:FOLDER', 'roboflow:FOLDER' or "
            f"'yolo:FOLDER', got {name!r}{why}"
        )
    return path, ""


def write_coco(dataset: Detection, folder: str | Path, split: str) -> None:
    """Write a data set as PNG files and annotations in COCO's format.

    Args:
        dataset: its images must have the sizes that its ground truth states.
        folder: gets ``annotations/instances_SPLIT.json`` and images in ``SPLIT/``.
        split: ``train`` or ``val``.
    """
    images, content = Path(folder) / split, dict(dataset.ground_truth())
    images.mkdir(parents=True, exist_ok=True)
    content["images"] = [one | {"file_name": f"{one['id']}.png"} for one in content["images"]]
    for i, facts in enumerate(content["images"]):
        pixels = (dataset[i][0] * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(images / facts["file_name"])
    file = Path(folder) / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


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
