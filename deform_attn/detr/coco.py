"""Your own images with annotations in COCO's format."""

from __future__ import annotations

import hashlib
import math
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image, ImageOps
from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, ValidationError

from deform_attn.detr.boxes import from_corners
from deform_attn.detr.data import Sample
from deform_attn.detr.images import RESIZE, as_tensor, read_image

# Keys and types of an annotation file; other keys are kept.


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
    iscrowd: Annotated[int, Field(strict=False)] = 0  # some files have true and false


class _Category(_Row):
    name: str


class _Content(BaseModel, strict=True, extra="allow"):
    images: Annotated[list[_Image], Field(min_length=1)]
    annotations: list[_Annotation]
    categories: Annotated[list[_Category], Field(min_length=1)]


class CocoFolder:
    """Images and annotations of a folder, all of which are checked before training starts.

    Of the images the headers are checked; one whose pixels are damaged is named when it is read.

    The folder holds ``annotations/instances_NAME.json`` and the images in ``NAME/``, where NAME
    starts with the split: ``train`` or ``train2017``. Images without objects are trained on; crowds
    only count in the AP. Boxes may exceed the image by a pixel, as from rounding, and are clipped.

    Args:
        folder: that folder.
        split: ``train`` or ``val``.
        size: longer side of the images in pixels, the shorter one with "shortest".
        resize: "stretch" to a square; "fit" or "shortest", which keep the ratio of the sides (see
            ``images.as_tensor``).
        classes: names by label; by default the categories in the order of their ids.

    Raises:
        ValueError: no such file, or faults in it: one line for each, with its place or id, what was
            expected and what came. Keys and types are checked first, then ids, images, boxes and
            references.
    """

    flips = True

    def __init__(
        self,
        folder: str | Path,
        split: str,
        size: int,
        resize: str = "stretch",
        classes: Sequence[str] | None = None,
    ) -> None:
        if resize not in RESIZE:
            raise ValueError(f"resize: expected one of {', '.join(RESIZE)}, got {resize!r}")
        self.size, self.resize = size, resize
        file, self.images = _annotation_file(Path(folder), split)
        text = file.read_bytes().removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        try:
            content = _Content.model_validate_json(text).model_dump()
            faults = [*_faults(content, self.images, classes)]
        except ValidationError as error:
            brief = reprlib.Repr()
            brief.maxlevel = 1
            wrong = [(".".join(map(str, e["loc"])), e["msg"], e["input"]) for e in error.errors()]
            faults = [f"{path}: {text}, got {brief.repr(got)}" for path, text, got in wrong]
        if faults:
            shown = faults[:20] + ([f"... and {len(faults) - 20} more"] if faults[20:] else [])
            number = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
            raise ValueError("\n  ".join([f"{file}: {number}", *shown]))
        found = hashlib.sha256(text)
        for facts in content["images"]:
            found.update(b"%d " % (self.images / facts["file_name"]).stat().st_size)
        self.identity = found.hexdigest()
        categories = sorted(content["categories"], key=lambda category: category["id"])
        names = [category["name"] for category in categories]
        self.classes = tuple(names if classes is None else classes)
        labels = {category["id"]: self.classes.index(category["name"]) for category in categories}
        rows = [
            {
                "area": one["bbox"][2] * one["bbox"][3],
                **one,
                "category_id": labels[one["category_id"]],
            }
            for one in content["annotations"]
        ]
        known = [{"id": i, "name": name} for i, name in enumerate(self.classes)]
        self._content = {**content, "annotations": rows, "categories": known}
        self._objects: dict[Any, list[dict[str, Any]]] = {}
        for one in rows:
            self._objects.setdefault(one["image_id"], []).append(one)
        counts = Counter(one["image_id"] for one in rows if not one["iscrowd"])
        self.most_objects = max(counts.values(), default=0)

    def __len__(self) -> int:
        return len(self._content["images"])

    def __getitem__(self, index: int) -> Sample:
        """Image, and labels and boxes ``(cx, cy, w, h)`` as fractions of it, without crowds."""
        facts = self._content["images"][index]
        objects = [one for one in self._objects.get(facts["id"], []) if not one["iscrowd"]]
        boxes = torch.tensor(
            [_clipped(one["bbox"], facts["width"], facts["height"]) for one in objects]
        ).reshape(-1, 4)
        sides = torch.tensor([facts["width"], facts["height"]]).repeat(2)
        labels = torch.tensor([one["category_id"] for one in objects]).long()
        image = as_tensor(read_image(self.images / facts["file_name"]), self.size, self.resize)
        return image, {"labels": labels, "boxes": from_corners(boxes) / sides}

    def ground_truth(self) -> dict[str, Any]:
        """The content of the file, with labels as ids of categories, and with all areas."""
        return self._content


def _annotation_file(folder: Path, split: str) -> tuple[Path, Path]:
    """The annotation file of a split, and the folder of its images."""
    pattern = f"annotations/instances_{split}*.json"
    try:
        found = sorted(folder.glob(pattern))
    except ValueError as error:  # such as a null byte in the name
        raise ValueError(f"{str(folder)!r}: expected a folder, got {error}") from error
    if len(found) != 1:
        names = [file.name for file in found] or "none"
        raise ValueError(f"{str(folder)!r}: expected one file {pattern}, got {names}")
    return found[0], folder / found[0].stem.removeprefix("instances_")


def _clipped(bbox: list[float], width: int, height: int) -> list[float]:
    """Corners of ``(x, y, width, height)``, clipped to the image."""
    x, y, w, h = bbox
    return [max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))]


def _faults(content: dict[str, Any], folder: Path, classes: Sequence[str] | None) -> Iterator[str]:
    """Faults of ids, names, images, boxes and references in an annotation file."""
    for part in ("images", "annotations", "categories"):
        counts = Counter(one["id"] for one in content[part])
        yield from (f"{part}: expected one of id {i}, got {n}" for i, n in counts.items() if n > 1)
    names = Counter(category["name"] for category in content["categories"])
    yield from (
        f"categories: expected one named {name!r}, got {n}" for name, n in names.items() if n > 1
    )
    if classes is not None and (unknown := sorted(set(names) - set(classes))):
        expected = f"names of the training images, {list(classes)}"
        yield f"categories: expected {expected}, got {unknown} too"
    for facts in content["images"]:
        name, file = f"image {facts['id']}", folder / facts["file_name"]
        listed, found = (facts["width"], facts["height"]), None
        try:
            with Image.open(file) as image:
                stored, found = image.size, ImageOps.exif_transpose(image).size
        except Exception as error:  # Pillow's decoders raise errors of many types
            yield f"{name}: expected an image in {str(file)!r}, got {error}"
            continue
        if found != listed:
            turned = found != stored and stored == listed
            why = ", because its EXIF data turn it" if turned else ""
            yield (f"{name}: expected (width, height) of {file} to be {listed}, got {found}{why}")
    images = {facts["id"]: (facts["width"], facts["height"]) for facts in content["images"]}
    known = sorted(category["id"] for category in content["categories"])
    for one in content["annotations"]:
        name, box = f"annotation {one['id']} (image {one['image_id']})", one["bbox"]
        x, y, w, h = box
        width, height = images.get(one["image_id"], (math.inf, math.inf))
        if one["image_id"] not in images:
            yield f"{name}: expected image_id of a listed image, got {one['image_id']}"
        if w <= 0 or h <= 0:
            yield f"{name}: expected bbox with width and height above 0, got {box}"
        elif x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            yield f"{name}: expected bbox inside {width} x {height} pixels, got {box}"
        elif min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
            yield f"{name}: expected bbox with a part inside {width} x {height} pixels, got {box}"
        if one["category_id"] not in known:
            yield f"{name}: expected category_id among {known}, got {one['category_id']}"
