"""Divide a folder with one annotation file into images to train on and images to evaluate on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deform_attn.checks import as_path, check_integer, check_number
from deform_attn.detr.files import make_folder, write
from deform_attn.detr.folders import HELD_OUT, Source, find_splits, validated


def divide(classes: Sequence[set[int]], fraction: float, seed: int = 0) -> list[int]:
    """Choose images to hold out, at random.

    Each class, beginning with the rarest, is in that fraction of its images, at least in one that
    is held out and in one that is not, if it has two images. Images with several classes can make
    that impossible: the best of 20 random orders is taken.

    Args:
        classes: of the objects in each image.
        fraction: of the images that are held out.
        seed: of the order.

    Returns:
        Indices of the images that are held out, sorted.

    Example:
        >>> from deform_attn.detr.hold_out import divide
        >>> held_out = divide([{0}] * 8 + [{1}] * 2, 0.2)
        >>> len(held_out), sum(i >= 8 for i in held_out)
        (3, 1)
    """
    rng = np.random.default_rng(seed)
    several = Counter(label for labels in classes for label in labels)
    shared = {label for label, count in several.items() if count > 1}
    best: tuple[int, list[int]] | None = None
    for _ in range(20):
        held = _divided(classes, fraction, rng.permutation(len(classes)).tolist())
        kept = set(range(len(classes))) - set(held)
        parts = ({label for i in part for label in classes[i]} for part in (held, kept))
        missing = sum(len(shared - part) for part in parts)
        if best is None or missing < best[0]:
            best = missing, held
        if missing == 0:
            break
    assert best is not None
    return best[1]


def _divided(classes: Sequence[set[int]], fraction: float, order: list[int]) -> list[int]:
    """Images that are held out, chosen in that order, class by class."""
    of_class: dict[int, list[int]] = {}
    for image in order:
        for label in classes[image]:
            of_class.setdefault(label, []).append(image)
    held: dict[int, bool] = {}
    rarest_first = sorted(of_class, key=lambda label: (len(of_class[label]), label))
    for images in [*(of_class[label] for label in rarest_first), order]:
        most = len(images) - 1  # one stays
        target = min(max(1, round(fraction * len(images))), most)
        missing = target - sum(held.get(image, False) for image in images)
        for image in images:
            if image not in held:
                held[image] = missing > 0
                missing -= 1
    return sorted(image for image, is_held in held.items() if is_held)


def hold_out(
    folder: str | Path, fraction: float, seed: int = 0, layout: str = ""
) -> tuple[Path, Path]:
    """Divide the images of a folder; later commands use the two files instead of its own.

    Args:
        folder: with annotations of one split.
        fraction: of the images for evaluation, above 0 and below 1.
        seed: of the choice.
        layout: "coco", "roboflow" or "yolo"; by default that which the folder has.

    Returns:
        The files, ``hold_out/train.json`` and ``hold_out/val.json``, in COCO's format.

    Raises:
        OSError: they cannot be written.
        TypeError: an argument has another type.
        ValueError: an invalid fraction; a folder with several splits, with a single image, with
            faults, or which was divided before.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> from deform_attn.detr.hold_out import hold_out
        >>> with TemporaryDirectory() as folder:
        ...     for name in "abcde":
        ...         Image.new("RGB", (40, 30)).save(Path(folder, f"{name}.png"))
        ...         _ = Path(folder, f"{name}.txt").write_text("0 0.5 0.5 0.25 0.5")
        ...     _ = Path(folder, "data.yaml").write_text("{train: ., names: [cat]}")
        ...     [file.name for file in hold_out(folder, 0.2)]
        ['train.json', 'val.json']
    """
    if not 0 < check_number("hold_out", fraction) < 1:
        raise ValueError(f"hold_out: expected a fraction above 0 and below 1, got {fraction}")
    check_integer("seed", seed, 0)
    folder = as_path("folder", folder)
    root = folder if folder.is_dir() else folder.parent
    parts = root / HELD_OUT / "train.json", root / HELD_OUT / "val.json"
    for part in parts:
        if part.exists():
            raise ValueError(f"{part}: exists; delete {part.parent} to divide the images again")
    splits = find_splits(folder, layout)
    if len(splits) != 1:
        raise ValueError(
            f"{str(folder)!r}: hold_out: expected annotations of one split, got {', '.join(splits)}"
        )
    name, make = next(iter(splits.items()))
    source = make()
    content: dict[str, Any] = dict(validated(name, source)[0])
    if len(content["images"]) < 2:
        raise ValueError(f"{source.file}: hold_out: expected at least 2 images, got 1")
    labels: dict[int, set[int]] = {facts["id"]: set() for facts in content["images"]}
    for one in content["annotations"]:
        if not one["iscrowd"]:
            labels[one["image_id"]].add(one["category_id"])
    ids = list(labels)
    held = {ids[i] for i in divide(list(labels.values()), fraction, seed)}
    try:
        for part, is_val in zip(parts, (False, True)):
            _write(part, source, content, {i for i in ids if (i in held) == is_val})
    except BaseException:  # the first alone would be a smaller data set
        parts[0].unlink(missing_ok=True)
        raise
    return parts


def _write(file: Path, source: Source, content: dict[str, Any], ids: set[int]) -> None:
    """A file with some images; an annotation file keeps what is not needed here, such as masks."""
    whole = content
    if source.file.suffix == ".json":
        whole = json.loads(source.file.read_text(encoding="utf-8-sig"))
        whole["categories"] = [
            one
            for one in whole["categories"]
            if one["id"] in {kept["id"] for kept in content["categories"]}
        ]
    names = {facts["id"]: facts["file_name"] for facts in content["images"]}
    images = [one for one in whole["images"] if one["id"] in ids]
    info = whole.get("info")
    info = info if isinstance(info, dict) else {}
    parts = {
        "info": {**info, "divided": source.file.name, "digest": source.digest()},
        "images": [{**one, "file_name": names[one["id"]]} for one in images],
        "annotations": [one for one in whole["annotations"] if one["image_id"] in ids],
    }
    make_folder("hold_out", file.parent)
    write(file, lambda f: f.write(json.dumps({**whole, **parts}).encode()))
