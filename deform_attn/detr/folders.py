"""Your own images: folders with annotations in COCO's, Roboflow's or YOLO's layout.

==========  ==============================================================================
coco        ``annotations/instances_NAME.json``; images in ``NAME/``, ``images/NAME/``,
            ``images/`` or the folder itself
roboflow    ``NAME/_annotations.coco.json``, and images beside it
yolo        ``data.yaml``, images, and ``labels/`` for each ``images/`` in their paths
==========  ==============================================================================

NAME starts with the split: ``train2017`` is train, ``valid`` is val. A folder with one annotation
file, of any layout or name, can be divided: see :mod:`deform_attn.detr.hold_out`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from deform_attn.checks import as_path, check_choice, check_integer
from deform_attn.detr import cache, coco, yolo
from deform_attn.detr.files import check_apart, nearby
from deform_attn.detr.images import LARGEST_SIZE, RESIZE, read_fault, read_image
from deform_attn.detr.progress import mapped
from deform_attn.detr.samples import Original, Sample, resized

HELD_OUT = "hold_out"  # folder of the files that `data --hold-out` writes
ROBOFLOW = "_annotations.coco.json"


class Source:
    """A split of a folder, before it is read.

    Attributes:
        root: the folder; names of files are relative to it.
        file: named in errors.
        annotations: files whose change makes a cache invalid.
        images: names of the images; None where the annotations list them.
        searched: folders whose images are found at any depth.
    """

    root: Path
    file: Path
    annotations: list[str]
    images: list[str] | None = None
    searched: Sequence[Path] = ()

    def read(self) -> tuple[coco.Content, Iterable[str]]:
        """The content, and its faults; names of images are relative to the root."""
        raise NotImplementedError

    def digest(self) -> str:
        """Of the content of the annotation files."""
        found = hashlib.sha256()
        for name in self.annotations:
            found.update((self.root / name).read_bytes())
        return found.hexdigest()


class CocoSource(Source):
    """An annotation file in COCO's format, with images in one of several folders."""

    def __init__(self, root: Path, file: Path, folders: Sequence[str]) -> None:
        self.root, self.file = root, file
        self.folders = [folder for folder in folders if (root / folder).is_dir()] or folders[:1]
        self.annotations = [str(file.relative_to(root))]

    def read(self) -> tuple[coco.Content, Iterable[str]]:
        """Keys and types are checked first, then ids, boxes and references, then images."""
        content = coco.parse(self.file)
        if self.file.name == ROBOFLOW:
            content = coco.without_groups(content)
        first = content["images"][0]["file_name"]
        folder = next(
            (f for f in self.folders if os.path.exists(self.root / f / first)), self.folders[0]
        )
        for facts in content["images"]:
            facts["file_name"] = os.path.normpath(os.path.join(folder, facts["file_name"]))
        return content, self._faults(content)

    def _faults(self, content: coco.Content) -> Iterator[str]:
        yield from coco.content_faults(content)
        check = functools.partial(coco.image_fault, folder=self.root)
        yield from filter(None, mapped(check, content["images"], "checks images"))


class HeldOut(CocoSource):
    """A part of another source, as `data --hold-out` wrote it."""

    def __init__(self, root: Path, file: Path, whole: Source) -> None:
        super().__init__(root, file, ["."])
        self.whole = whole
        self.annotations += whole.annotations

    def read(self) -> tuple[coco.Content, Iterable[str]]:
        """As CocoSource; raises ValueError if the divided annotations have changed."""
        content, faults = super().read()
        info = content.get("info")
        if not isinstance(info, dict) or info.get("digest") != self.whole.digest():
            raise ValueError(
                f"{self.file}: expected {self.whole.file} as it was when it was divided, got "
                f"another; delete {self.file.parent}, and divide it again"
            )
        return content, faults


class YoloSource(Source):
    """A split that ``data.yaml`` names."""

    def __init__(self, root: Path, description: yolo.Description, split: str) -> None:
        self.root, self.file, self.description = root, description.file, description
        self.listed = yolo.list_images(description, split)
        self.images = [yolo.name_in(root, one.image) for one in self.listed]
        labels = [one.labels for one in self.listed if one.labels.exists()]
        lists = [yolo.resolve(description, entry) for entry in description.splits[split]]
        self.searched = [one for one in lists if one and one.is_dir()]
        files = [description.file, *(one for one in lists if one and one.is_file()), *labels]
        self.annotations = [yolo.name_in(root, file) for file in files]

    def read(self) -> tuple[coco.Content, Iterable[str]]:
        """Label files, and sizes from the images."""
        return yolo.read(self.description, self.listed, self.root)


Splits = dict[str, Callable[[], Source]]


def _coco(folder: Path, pattern: str = "annotations/instances_*.json") -> Splits:
    found: Splits = {}
    for file in sorted(f for f in folder.glob(pattern) if f.name[0] != "."):
        name = file.stem.removeprefix("instances_")
        places = [name, f"images/{name}", "images", "."]
        found[name] = functools.partial(CocoSource, folder, file, places)
    return found


def _roboflow(folder: Path) -> Splits:
    files = sorted(folder.glob(f"*/{ROBOFLOW}"))
    return {f.parent.name: functools.partial(CocoSource, folder, f, [f.parent.name]) for f in files}


def _yolo(folder: Path, name: str = "data.yaml") -> Splits:
    file = folder / name
    if not file.is_file():
        return {}
    one = yolo.describe(file)
    if not one.splits:
        raise ValueError(f"{file}: expected train, val or test, each a path of images, got none")
    return {split: functools.partial(YoloSource, folder, one, split) for split in one.splits}


LAYOUTS: dict[str, tuple[Callable[[Path], Splits], str]] = {
    "coco": (_coco, "annotations/instances_NAME.json"),
    "roboflow": (_roboflow, f"NAME/{ROBOFLOW}"),
    "yolo": (_yolo, "data.yaml"),
}


def find_splits(folder: Path, layout: str = "") -> Splits:
    """The splits of a folder by name, in the layout that it has or that is given.

    Raises:
        ValueError: no folder, no layout, or several of them.
    """
    if layout:
        check_choice("layout", layout, LAYOUTS)
    if not os.path.exists(folder):
        raise ValueError(f"data: expected a folder, got {str(folder)!r}: {nearby(folder)}")
    if folder.is_dir():
        splits = _recognised(folder, layout)
    elif layout in ("", "yolo") and folder.suffix in (".yaml", ".yml"):
        folder, splits = folder.parent, _yolo(folder.parent, folder.name)
    else:
        raise ValueError(f"data: expected a folder, got the file {str(folder)!r}")
    parts = sorted((folder / HELD_OUT).glob("*.json"))
    if parts and len(splits) == 1:
        whole = next(iter(splits.values()))
        return {f.stem: functools.partial(_held_out, folder, f, whole=whole) for f in parts}
    return splits


def _recognised(folder: Path, layout: str) -> Splits:
    tried = {layout: LAYOUTS[layout]} if layout else LAYOUTS
    found = {name: splits for name, (find, _) in tried.items() if (splits := find(folder))}
    if len(found) > 1:
        spelled = " or ".join(f"{name}:{folder}" for name in found)
        raise ValueError(f"{str(folder)!r}: expected one layout, got several: {spelled}")
    if found:
        return next(iter(found.values()))
    if layout in ("", "coco"):  # a single file of any name
        splits = {**_coco(folder, "annotations/*.json"), **_coco(folder, "*.json")}
        if len(splits) == 1:
            return splits
    patterns = " or ".join(f"{pattern} ({name})" for name, (_, pattern) in tried.items())
    raise ValueError(f"{str(folder)!r}: expected {patterns}, got none of them")


def _held_out(folder: Path, file: Path, whole: Callable[[], Source]) -> Source:
    return HeldOut(folder, file, whole())


def find_source(folder: Path, split: str, layout: str = "") -> tuple[str, Source]:
    """The split of that name, or the only one whose name starts so, and its name.

    Raises:
        ValueError: there is none, or there are several.
    """
    splits = find_splits(folder, layout)
    if not isinstance(split, str):
        raise TypeError(f"split: expected a name, got {split!r}")
    names = [split] if split in splits else [n for n in splits if split and n.startswith(split)]
    if len(names) != 1:
        step = ""
        if len(splits) == 1:
            step = f"; `data --data {folder} --hold-out 0.2` divides it into train and val"
        raise ValueError(
            f"{str(folder)!r}: split: expected one that starts with {split!r}, got "
            f"{', '.join(splits)}{step}"
        )
    return names[0], splits[names[0]]()


def validated(name: str, source: Source) -> tuple[coco.Content, str]:
    """The content of a source without faults, and its digest, from the cache where that is valid.

    A cache is valid while names, sizes and times of annotations and images are the same.

    Raises:
        ValueError: the faults.
    """
    file = source.root / cache.FOLDER / f"{name}.json"
    began = time.time()
    kept = cache.load(file)
    if kept is not None:
        images = source.images or [facts["file_name"] for facts in kept["content"]["images"]]
        try:
            current = cache.stamp(source.root, [*source.annotations, *images])[0]
        except (OSError, ValueError):
            current = ""
        if current == kept["stamp"]:
            return kept["content"], kept["identity"]
    content, faults = source.read()
    coco.raise_faults(source.file, faults)
    identity = hashlib.sha256(json.dumps(content).encode())
    images = [facts["file_name"] for facts in content["images"]]
    for image in images:
        identity.update(b"%d " % (source.root / image).stat().st_size)
    stamp, latest = cache.stamp(source.root, [*source.annotations, *images])
    if latest < began - 2:  # a later change could leave the time as it is
        cache.save(file, {"stamp": stamp, "identity": identity.hexdigest(), "content": content})
    return content, identity.hexdigest()


class AnnotatedFolder:
    """Images and annotations of a folder, all of which are checked before training starts.

    Images without objects are trained on; crowds only count in the AP. Boxes may exceed the image
    by a pixel, as from rounding, and are clipped. What was checked is kept in ``.deform_attn/``
    of the folder, and checked again after a change.

    COCO: ``annotations/instances_NAME.json``. Roboflow: ``NAME/_annotations.coco.json``. YOLO:
    ``data.yaml``. NAME starts with the split.

    Args:
        folder: of one of these layouts, or ``data.yaml`` of one.
        split: ``train``, ``val``, ``test`` or another name.
        size: longer side of the images in pixels, the shorter one with "shortest".
        resize: "stretch" to a square; "fit" or "shortest", which keep the ratio of the sides (see
            ``images.as_tensor``).
        classes: names by label; by default the categories in the order of their ids.
        layout: "coco", "roboflow" or "yolo"; by default that which the folder has.

    Raises:
        TypeError: an argument has another type.
        OSError: a file cannot be read.
        ValueError: no such split, or faults in it: one line for each, with its file, place or id,
            what was expected and what came.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> from deform_attn.detr.folders import AnnotatedFolder
        >>> with TemporaryDirectory() as folder:
        ...     Image.new("RGB", (40, 30)).save(Path(folder, "a.png"))
        ...     _ = Path(folder, "a.txt").write_text("1 0.5 0.5 0.25 0.5")
        ...     _ = Path(folder, "data.yaml").write_text("{train: ., names: [cat, dog]}")
        ...     image, target = AnnotatedFolder(folder, "train", size=64)[0]
        >>> image.shape, target["labels"].tolist(), target["boxes"].tolist()
        (torch.Size([3, 64, 64]), [1], [[0.5, 0.5, 0.25, 0.5]])
    """

    flips = True

    def __init__(
        self,
        folder: str | Path,
        split: str,
        size: int,
        resize: str = "stretch",
        classes: Sequence[str] | None = None,
        layout: str = "",
    ) -> None:
        check_choice("resize", resize, RESIZE)
        check_integer("size", size, 1, LARGEST_SIZE)
        self.size, self.resize = size, resize
        name, source = find_source(as_path("folder", folder), split, layout)
        self.root, self._file, self._searched = source.root, source.file, source.searched
        content, self.identity = validated(name, source)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        names = [category["name"] for category in categories]
        self.classes = tuple(names if classes is None else classes)
        if unknown := sorted(set(names) - set(self.classes)):
            expected = f"those of the training images or of the model, {list(self.classes)}"
            raise ValueError(f"{source.file}: categories: expected {expected}, got {unknown} too")
        labels = {category["id"]: self.classes.index(category["name"]) for category in categories}
        self._file_ids = {label: category for category, label in labels.items()}
        rows = [
            {**one, "category_id": labels[one["category_id"]]} for one in content["annotations"]
        ]
        known = [{"id": i, "name": name} for i, name in enumerate(self.classes)]
        self._content: dict[str, Any] = {**content, "annotations": rows, "categories": known}
        self._objects: dict[Any, list[dict[str, Any]]] = {}
        for one in rows:
            self._objects.setdefault(one["image_id"], []).append(one)
        counts = Counter(one["image_id"] for one in rows if not one["iscrowd"])
        self.most_objects = max(counts.values(), default=0)

    def __len__(self) -> int:
        return len(self._content["images"])

    def __getitem__(self, index: int) -> Sample:
        """Image, and labels and boxes ``(cx, cy, w, h)`` as fractions of it, without crowds."""
        return resized(self.original(index), self.size, self.resize)

    def original(self, index: int) -> Original:
        """Image in the file's size, and labels and corners in its pixels, without crowds."""
        facts = self._content["images"][index]
        objects = [one for one in self._objects.get(facts["id"], []) if not one["iscrowd"]]
        boxes = torch.tensor(
            [_clipped(one["bbox"], facts["width"], facts["height"]) for one in objects]
        ).reshape(-1, 4)
        labels = torch.tensor([one["category_id"] for one in objects]).long()
        try:
            image = read_image(self.root / facts["file_name"])
        except (OSError, ValueError) as error:
            raise ValueError(f"{error}; `data --data {self.root}` lists all such images") from error
        return image, {"labels": labels, "boxes": boxes}

    def check_apart(self, argument: str, folder: Path, *, annotations: bool = False) -> None:
        """Check that a folder for results is none of the images.

        Args:
            argument: names the folder in errors.
            folder: for results.
            annotations: nor that of annotations in a JSON file: it is for another one.

        Raises:
            ValueError: it is one of them.
        """
        names = {os.path.dirname(facts["file_name"]) for facts in self._content["images"]}
        folders = [self.root / name for name in names]
        if annotations and self._file.suffix == ".json":
            folders.append(self._file.parent)
        check_apart(argument, folder, folders, self._searched)

    def pixel_faults(self) -> Iterator[str]:
        """The images whose pixels cannot be read, and why."""
        files = [self.root / facts["file_name"] for facts in self._content["images"]]
        yield from filter(None, mapped(read_fault, files, "reads images"))

    def ground_truth(self) -> dict[str, Any]:
        """What was read, in COCO's format, with labels as ids of categories."""
        return self._content

    def with_file_ids(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of COCO's results with the category ids of the annotation file.

        Rows of classes that the file does not list are left out.
        """
        ids = self._file_ids
        known = [row for row in rows if row["category_id"] in ids]
        return [{**row, "category_id": ids[row["category_id"]]} for row in known]


def _clipped(bbox: list[float], width: int, height: int) -> list[float]:
    """Corners of ``(x, y, width, height)``, clipped to the image."""
    x, y, w, h = bbox
    return [max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))]
