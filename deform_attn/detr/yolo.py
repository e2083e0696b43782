"""YOLO's layout: ``data.yaml``, images, and a text file with the objects of each image."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from deform_attn.detr.coco import Content, box_fault, image_size, name_faults, raise_faults
from deform_attn.detr.images import SUFFIXES
from deform_attn.detr.progress import mapped

SPLIT = re.compile(r"(train|val|test)[\w-]*")  # keys with images


@dataclass
class Description:
    """What ``data.yaml`` lists.

    Attributes:
        file: ``data.yaml``.
        names: of the classes, by label.
        splits: folders of images, or text files with the names of images, by split.
        base: what relative paths start from.
    """

    file: Path
    names: list[str]
    splits: dict[str, list[str]]
    base: Path


def describe(file: Path) -> Description:
    """Read ``data.yaml``: ``names``, ``path`` and a key per split; other keys are ignored.

    Raises:
        OSError: it cannot be read.
        ValueError: its faults.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file}: expected YAML, got {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("names"), list | dict):
        raise ValueError(f"{file}: names: expected a list of the classes")
    names, faults = content["names"], []
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            expected = f"names: expected the numbers 0 to {len(names) - 1}"
            raise ValueError(f"{file}: {expected}, got {list(names)}")
        names = [names[i] for i in range(len(names))]
    for i, name in enumerate(names):
        if isinstance(name, bool) or not isinstance(name, str | int | float):
            faults.append(f"names: expected text for class {i}, got {name!r}; put it in quotes")
    if not names:
        faults.append("names: expected at least one class, got none")
    if (count := content.get("nc", len(names))) != len(names):
        faults.append(f"nc: expected {len(names)}, the number of names, got {count!r}")
    if "kpt_shape" in content:
        faults.append("kpt_shape: expected labels of boxes or polygons, got keypoints")
    splits = {}
    for key, value in content.items():
        if isinstance(key, str) and SPLIT.fullmatch(key) and value:
            splits[key] = paths = [value] if isinstance(value, str) else value
            if not isinstance(paths, list) or not all(isinstance(one, str) for one in paths):
                faults.append(f"{key}: expected a path or a list of paths, got {value!r}")
    base = content.get("path") or "."
    if not isinstance(base, str):
        faults.append(f"path: expected a path, got {base!r}")
    names = [str(name) for name in names]
    raise_faults(file, [*faults, *(f"names: {fault}" for fault in name_faults(names))])
    base = file.parent / base  # often names the folder itself, seen from elsewhere
    return Description(file, names, splits, base if base.is_dir() else file.parent)


def resolve(description: Description, entry: str) -> Path | None:
    """The folder or file that ``data.yaml`` names, if it exists.

    Roboflow writes ``../train/images`` for ``train/images``.
    """
    tried = [entry, entry[3:]] if entry.startswith("../") else [entry]
    return next((p for one in tried if os.path.exists(p := description.base / one)), None)


@dataclass
class Listed:
    """An image of a split, its label file, and where it is listed, for errors."""

    image: Path
    labels: Path
    origin: str


def list_images(description: Description, split: str) -> list[Listed]:
    """The images of a split.

    Raises:
        ValueError: there are none.
    """
    found = []
    for entry in description.splits[split]:
        path = resolve(description, entry)
        if path is None:
            place = description.base / entry
            raise ValueError(
                f"{description.file}: {split}: expected a folder of images or a text file with "
                f"their names, got {str(place)!r}, which does not exist"
            )
        if path.is_dir():
            names = [
                os.path.join(top, name)
                for top, _, names in os.walk(path)
                for name in names
                if name.lower().endswith(SUFFIXES) and name[0] != "."
            ]
            images = map(Path, sorted(names))
            found += [Listed(image, _label_file(image), "") for image in images]
        else:
            try:
                lines = path.read_text(encoding="utf-8-sig").splitlines()
            except ValueError as error:
                raise ValueError(f"{path}: expected names of images, got {error}") from error
            for number, line in enumerate(lines, 1):
                if name := line.strip():
                    beside = path.parent / name
                    image = beside if os.path.exists(beside) else description.base / name
                    found.append(Listed(image, _label_file(image), f"{path}:{number}: "))
    if not found:
        raise ValueError(f"{description.file}: {split}: expected images, got none")
    return found


def _label_file(image: Path) -> Path:
    """``images/`` becomes ``labels/``, the last one in the path; else it is beside the image."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return Path(*parts).with_suffix(".txt")


def read(
    description: Description, listed: list[Listed], root: Path
) -> tuple[Content, Iterator[str]]:
    """Images and objects in COCO's format, and the faults.

    Args:
        description: of the data set.
        listed: images of a split.
        root: names of images are relative to it.
    """
    content: Content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(description.names)],
    }
    return content, _read(description, listed, root, content)


def _read(
    description: Description, listed: list[Listed], root: Path, content: Content
) -> Iterator[str]:
    """Fill in the content; yields faults."""
    missing = 0
    for number, (one, read) in enumerate(zip(listed, mapped(_files, listed, "checks images"))):
        size, text, fault = read
        missing += text is None
        if fault:
            yield fault
            continue
        width, height = size
        facts = {"file_name": name_in(root, one.image), "width": width, "height": height}
        content["images"].append({"id": number, **facts})  # type: ignore[typeddict-item]
        for line, row in enumerate((text or "").splitlines(), 1):
            if not row.strip():
                continue
            try:
                label, box = _object(row, len(description.names), width, height)
            except ValueError as error:
                yield f"{name_in(root, one.labels)}:{line}: {error}"
                continue
            ids = {"id": len(content["annotations"]) + 1, "image_id": number}
            rest = {"category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            content["annotations"].append({**ids, **rest})  # type: ignore[typeddict-item]
    if missing == len(listed):
        example = name_in(root, listed[0].labels)
        yield f"labels: expected a file for each image with objects, such as {example}, got none"
    yield from _without_image(listed, root)


def _files(one: Listed) -> tuple[tuple[int, int], str | None, str]:
    """Size of an image, text of its label file if it has one, and their fault."""
    try:
        size = image_size(one.image)[0]
    except ValueError as error:
        return (0, 0), None, f"{one.origin}{error}"
    try:
        return size, one.labels.read_text(encoding="utf-8-sig"), ""
    except FileNotFoundError:
        return size, None, ""
    except (OSError, ValueError) as error:
        return size, None, f"{one.labels}: expected text, got {error}"


def _object(row: str, classes: int, width: int, height: int) -> tuple[int, list[float]]:
    """Class and box ``(x, y, width, height)`` in pixels of a line; a polygon becomes its box.

    Raises:
        ValueError: what is expected of the line.
    """
    try:
        numbers = [float(word) for word in row.split()]
    except ValueError as error:
        raise ValueError(f"expected numbers, got {row.strip()!r}") from error
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"expected finite numbers, got {row.strip()!r}")
    if len(numbers) != 5 and (len(numbers) < 7 or len(numbers) % 2 == 0):
        raise ValueError(
            "expected a class and 4 numbers (cx cy w h), or a class and at least 3 points of a "
            f"polygon, got {len(numbers)} numbers"
        )
    label = int(numbers[0])
    if label != numbers[0] or not 0 <= label < classes:
        raise ValueError(f"expected a class from 0 to {classes - 1}, got {row.split()[0]}")
    if len(numbers) == 5:
        cx, cy, w, h = numbers[1:]
        low, sides = (cx - w / 2, cy - h / 2), (w, h)
    else:
        xs, ys = numbers[1::2], numbers[2::2]
        low, sides = (min(xs), min(ys)), (max(xs) - min(xs), max(ys) - min(ys))
    box = [low[0] * width, low[1] * height, sides[0] * width, sides[1] * height]
    if fault := box_fault(box, width, height):
        got = " ".join(row.split()[1:9])
        raise ValueError(f"expected a box {fault}, in fractions of the image, got {got}")
    return label, box


def _without_image(listed: list[Listed], root: Path) -> Iterator[str]:
    """Label files in the folders of labels that belong to no image."""
    known = {one.labels for one in listed}
    folders = {
        one.labels.parent
        for one in listed
        if not one.origin and one.labels.parent != one.image.parent
    }
    for folder in sorted(folders):
        for file in sorted(folder.glob("*.txt")):
            if file not in known and file.name != "classes.txt" and file.name[0] != ".":
                yield f"{name_in(root, file)}: expected an image of this name, got none"


def name_in(root: Path, path: Path) -> str:
    """A path relative to the root, where it starts so; else an absolute one."""
    return str(path.relative_to(root) if path.is_relative_to(root) else path.absolute())
