"""Data sets by name: drawn ones, and folders with annotations."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from deform_attn.checks import as_path, check_choice, check_integer
from deform_attn.detr.drawn import DRAWN
from deform_attn.detr.files import nearby
from deform_attn.detr.folders import LAYOUTS, AnnotatedFolder, find_splits
from deform_attn.detr.images import LARGEST_SIZE
from deform_attn.detr.samples import Detection


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
    name = _as_name(name)
    check_integer("size", size, 0, LARGEST_SIZE)
    check_integer("seed", seed, 0)
    if name in DRAWN:
        check_choice("split", split, DRAWN[name].lengths)
        return DRAWN[name](split, size, seed)
    folder, layout = folder_of(name)
    return AnnotatedFolder(folder, split, size or 640, resize, classes, layout)


def splits_of(name: str) -> list[str]:
    """Names of the splits of a data set.

    Raises:
        ValueError: an unknown name, or an invalid folder.
    """
    return list(DRAWN[name].lengths if name in DRAWN else find_splits(*folder_of(name)))


def _as_name(name: object) -> str:
    if not isinstance(name, str | Path):
        raise TypeError(f"data: expected the name of a data set or a folder, got {name!r}")
    return str(name)


def folder_of(name: str) -> tuple[Path, str]:
    """Folder and layout, empty if not given, of a name on the command line.

    Raises:
        ValueError: the name has neither.
    """
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
