"""Annotation files in COCO's format: their schema, and the faults that are named."""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from PIL import ExifTags
from pydantic import (
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import NotRequired, TypedDict

from deform_attn.detr.images import open_image, range_fault

_KEYS = ConfigDict(strict=True, extra="ignore")  # outlines of objects would take gigabytes


@with_config(_KEYS)
class ImageRow(TypedDict):
    """An image; ``width`` and ``height`` in pixels, upright."""

    id: int
    file_name: str
    height: PositiveInt
    width: PositiveInt


@with_config(_KEYS)
class Annotation(TypedDict):
    """An object; ``bbox`` is ``(x, y, width, height)`` in pixels."""

    id: int
    image_id: int
    category_id: int
    bbox: Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
    area: NotRequired[FiniteFloat]
    iscrowd: NotRequired[Annotated[int, Field(strict=False)]]  # some files have true and false


@with_config(_KEYS)
class Category(TypedDict):
    """A class."""

    id: int
    name: str
    supercategory: NotRequired[Any]


@with_config(_KEYS)
class Content(TypedDict):
    """An annotation file."""

    images: Annotated[list[ImageRow], Field(min_length=1)]
    annotations: list[Annotation]
    categories: Annotated[list[Category], Field(min_length=1)]
    info: NotRequired[Any]


_SCHEMA = TypeAdapter(Content)


def raise_faults(place: object, faults: Iterable[str]) -> None:
    """Raise a ValueError with the place and a line for each of the first 20 faults, if any.

    Args:
        place: a file, or an argument with what was expected.
        faults: each a line.
    """
    if found := list(faults):
        shown = found[:20] + ([f"... and {len(found) - 20} more"] if found[20:] else [])
        number = f"{len(found)} fault{'s' if len(found) > 1 else ''}"
        raise ValueError("\n  ".join([f"{place}: {number}", *shown]))


def parse(file: Path) -> Content:
    """The content of an annotation file, of which keys, types, ids and references are checked.

    Keys that detection does not need are left out; ``area`` and ``iscrowd`` are filled in.

    Raises:
        OSError: it cannot be read.
        ValueError: its faults.
    """
    if file.is_dir():
        raise IsADirectoryError(f"{file}: expected a file with annotations, got a folder")
    text = file.read_bytes().removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    try:
        content = _SCHEMA.validate_json(text)
    except ValidationError as error:
        brief = reprlib.Repr()
        brief.maxlevel = 1
        wrong = [(".".join(map(str, e["loc"])), e["msg"], e["input"]) for e in error.errors()]
        faults = [(f"{path}: " if path else "", text, brief.repr(got)) for path, text, got in wrong]
        raise_faults(file, [f"{path}{text}, got {got}" for path, text, got in faults])
        raise
    for one in content["annotations"]:
        one.setdefault("area", one["bbox"][2] * one["bbox"][3])
        one.setdefault("iscrowd", 0)
    return content


def without_groups(content: Content) -> Content:
    """Without the category that groups the others: Roboflow lists the project as one.

    It is the supercategory of others, has "none" itself, and no objects.
    """
    rows = content["categories"]
    used = {one["category_id"] for one in content["annotations"]}
    kept = [
        one
        for one in rows
        if one["id"] in used
        or one.get("supercategory") != "none"
        or all(one is other or other.get("supercategory") != one["name"] for other in rows)
    ]
    return {**content, "categories": kept}


def content_faults(content: Content) -> Iterator[str]:
    """Faults of ids, names, boxes and references."""
    rows: Any = content
    for part in ("images", "annotations", "categories"):
        counts = Counter(one["id"] for one in rows[part])
        yield from (f"{part}: expected one of id {i}, got {n}" for i, n in counts.items() if n > 1)
    yield from (f"categories: {fault}" for fault in name_faults(_names(content)))
    images = {facts["id"]: (facts["width"], facts["height"]) for facts in content["images"]}
    known = {category["id"] for category in content["categories"]}
    for one in content["annotations"]:
        name, box = f"annotation {one['id']} (image {one['image_id']})", one["bbox"]
        if one["image_id"] not in images:
            yield f"{name}: expected image_id of a listed image, got {one['image_id']}"
        if fault := box_fault(box, *images.get(one["image_id"], (math.inf, math.inf))):
            yield f"{name}: expected bbox {fault}, got {box}"
        if one["category_id"] not in known:
            expected = f"category_id among {sorted(known)}"
            yield f"{name}: expected {expected}, got {one['category_id']}"


def _names(content: Content) -> list[str]:
    return [category["name"] for category in content["categories"]]


def name_faults(names: Iterable[str]) -> Iterator[str]:
    """Names of classes that occur several times."""
    for name, count in Counter(names).items():
        if count > 1:
            yield f"expected one named {name!r}, got {count}"


def box_fault(box: list[float], width: float, height: float) -> str:
    """What is expected of a box ``(x, y, width, height)`` and does not hold; else nothing.

    Boxes may exceed the image by a pixel, as from rounding.
    """
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return "with width and height above 0"
    if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
        return f"inside {width} x {height} pixels"
    if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
        return f"with a part inside {width} x {height} pixels"
    return ""


def image_size(file: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of an image file as shown, and as stored.

    Pixels are not decoded, but for PNG files, whose EXIF data may follow them, and for images of
    more than 8 bits, whose range is checked.

    Raises:
        ValueError: it is no image, or one whose values have no known range; the message names it.
    """
    try:
        with open_image(file) as image:
            if fault := range_fault(image):
                raise ValueError(fault)
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            width, height = image.size
            return (height, width) if turned else image.size, image.size
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise ValueError(f"expected an image in {str(file)!r}, got {error}") from error


def image_fault(facts: ImageRow, folder: Path) -> str:
    """Why an image is not the listed one; else nothing."""
    listed, file = (facts["width"], facts["height"]), folder / facts["file_name"]
    try:
        found, stored = image_size(file)
    except ValueError as error:
        return f"image {facts['id']}: {error}"
    if found == listed:
        return ""
    turned = found != stored and stored == listed
    why = ", because its EXIF data turn it" if turned else ""
    expected = f"(width, height) of {file} to be {listed}"
    return f"image {facts['id']}: expected {expected}, got {found}{why}"
