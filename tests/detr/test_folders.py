"""Folders of three layouts: the same data set from each, faults, splits, and the cache."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from deform_attn.detr import cache, folders
from deform_attn.detr.data import open_dataset, splits_of
from deform_attn.detr.files import write
from deform_attn.detr.folders import AnnotatedFolder
from deform_attn.detr.hold_out import divide, hold_out

SIDES = {"width": 40, "height": 30}
CATEGORIES = [{"id": 0, "name": "ant"}, {"id": 1, "name": "bee"}]
IMAGES = [{"id": i, "file_name": f"{name}.png", **SIDES} for i, name in enumerate("abc")]
BOXES = [(0, 0, [10, 5, 20, 10]), (0, 1, [0, 0, 40, 30]), (2, 1, [30, 20, 10, 10])]
ANNOTATIONS = [
    {"id": i, "image_id": image, "category_id": label, "bbox": box}
    for i, (image, label, box) in enumerate(BOXES, 1)
]
CONTENT = {"images": IMAGES, "annotations": ANNOTATIONS, "categories": CATEGORIES}


def images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for facts in IMAGES:
        Image.new("RGB", (40, 30)).save(folder / str(facts["file_name"]))


def make_coco(folder: Path, splits: tuple[str, ...] = ("train", "val", "test")) -> Path:
    (folder / "annotations").mkdir(parents=True)
    for split in splits:
        images(folder / f"images/{split}2017")
        file = folder / f"annotations/instances_{split}2017.json"
        file.write_text(json.dumps(CONTENT))
    return folder


def make_roboflow(folder: Path) -> Path:
    """With the name of the project as a category, which one class has too."""
    group = {"id": 5, "name": "ant", "supercategory": "none"}
    rows = [group, *(one | {"supercategory": "ant"} for one in CATEGORIES)]
    for split in ("train", "valid", "test"):
        images(folder / split)
        file = folder / split / "_annotations.coco.json"
        file.write_text(json.dumps(CONTENT | {"categories": rows}))
    return folder


LABELS = {"a": "0 .5 .33333 .5 .33333\n1 0.5 0.5 1 1\n", "c": "1 .75 .66667 1 .66667 1 1 .75 1\n"}


def make_yolo(folder: Path, splits: tuple[str, ...] = ("train", "val", "test")) -> Path:
    """A box as a polygon; an image without a label file."""
    keys = "".join(f"{split}: ../images/{split}\n" for split in splits)
    folder.mkdir(parents=True)
    (folder / "data.yaml").write_text(f"path: datasets/it\n{keys}nc: 2\nnames: [ant, bee]\n")
    for split in splits:
        images(folder / "images" / split)
        (folder / "labels" / split).mkdir(parents=True)
        for name, text in LABELS.items():
            (folder / "labels" / split / f"{name}.txt").write_text(text)
    return folder


MAKE: dict[str, Callable[[Path], Path]] = {
    "coco": make_coco,
    "roboflow": make_roboflow,
    "yolo": make_yolo,
}

ANNOTATION_FILE = {
    "coco": "annotations/instances_train2017.json",
    "roboflow": "train/_annotations.coco.json",
    "yolo": "labels/train/a.txt",
    "one.json": "result.json",
}


@pytest.mark.parametrize("layout", MAKE)
def test_every_layout_gives_the_same_data_set(layout: str, tmp_path: Path) -> None:
    folder = MAKE[layout](tmp_path / "it")
    assert len(splits_of(str(folder))) == 3
    for name in (f"{layout}:{folder}", str(folder)):
        for split in ("train", "val", "test"):
            dataset = open_dataset(name, split, 32)
            assert dataset.classes == ("ant", "bee")
            assert (len(dataset), dataset.most_objects) == (3, 2)
            truth = dataset.ground_truth()
            rows = [(one["image_id"], one["category_id"]) for one in truth["annotations"]]
            assert rows == [(image, label) for image, label, _ in BOXES]
            boxes = [one["bbox"] for one in truth["annotations"]]
            expected = torch.tensor([box for _, _, box in BOXES], dtype=torch.float32)
            torch.testing.assert_close(torch.tensor(boxes).float(), expected, atol=1e-3, rtol=0)
            assert dataset[1][1]["boxes"].shape == (0, 4)
            assert dataset[2][1]["labels"].tolist() == [1]
    val = open_dataset(str(folder), "val", 32, classes=["bee", "cat", "ant"])
    assert [val[i][1]["labels"].tolist() for i in range(3)] == [[2, 0], [], [0]]
    with pytest.raises(ValueError, match="split: expected one that starts with 'dev', got t"):
        open_dataset(str(folder), "dev")


def test_a_folder_of_no_layout_or_of_two_is_named(tmp_path: Path) -> None:
    looked_for = r"instances_NAME\.json \(coco\) or NAME/_annot.* \(roboflow\) or data\.yaml \(yolo"
    with pytest.raises(ValueError, match=f"expected annotations/{looked_for}.*, got none of them"):
        open_dataset(str(tmp_path), "train")
    make_yolo(tmp_path / "two")
    (tmp_path / "two/annotations").mkdir()
    (tmp_path / "two/annotations/instances_train.json").write_text("{}")
    with pytest.raises(ValueError, match="expected one layout, got several: coco:.* or yolo:"):
        open_dataset(str(tmp_path / "two"), "train")
    assert len(open_dataset(f"yolo:{tmp_path / 'two'}", "train")) == 3
    (tmp_path / "two/data.yaml").rename(tmp_path / "two/other.yaml")
    assert len(open_dataset(str(tmp_path / "two/other.yaml"), "train")) == 3
    for name, message in (
        ("coco:", "data: expected 'shapes', .*, got 'coco:'"),
        ("a\0b", r"data: expected .*, got 'a\\x00b'"),
        ("yolo:a\0b", r"data: expected a folder, got 'a\\x00b'"),
        ("yolo:none", "data: expected a folder, got 'none': '.' has no 'none'"),
        (
            str(tmp_path / "two/labels/train/a.txt"),
            r"data: expected a folder, got the file .*a\.txt'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            open_dataset(name, "train")


def edit(name: str, text: str | bytes) -> Callable[[Path], Any]:
    return lambda f: (f / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def yaml_with(**keys: str) -> Callable[[Path], Any]:
    """``data.yaml`` with other values, written as they are."""
    keys = {"train": "images/train", "names": "[ant, bee]"} | keys
    return edit("data.yaml", "".join(f"{key}: {value}\n" for key, value in keys.items()))


def replace_image(folder: Path, mode: str, value: float) -> None:
    (folder / "images/train/c.png").unlink()
    Image.new(mode, (40, 30), value).save(folder / "images/train/c.tif")


LINE = r"labels/train/a\.txt:2: expected "
YOLO_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "class out of range": (
        edit("labels/train/a.txt", "0 .5 .5 1 1\n2 .5 .5 1 1"),
        LINE + "a class from 0 to 1, got 2",
    ),
    "class of a fraction": (
        edit("labels/train/a.txt", "\n0.5 .5 .5 1 1"),
        LINE + r"a class from 0 to 1, got 0\.5",
    ),
    "four numbers": (
        edit("labels/train/a.txt", "\n0 .5 .5 1"),
        LINE + r"a class and 4 numbers \(cx cy w h\), or .* polygon, got 4 numbers",
    ),
    "six numbers": (edit("labels/train/a.txt", "\n0 .5 .5 1 1 .9"), LINE + ".*, got 6 numbers"),
    "no number": (edit("labels/train/a.txt", "\nant .5 .5 1 1"), LINE + "numbers, got 'ant .5"),
    "not finite": (edit("labels/train/a.txt", "\n0 .5 nan 1 1"), LINE + "finite numbers, got '0"),
    "in pixels": (
        edit("labels/train/a.txt", "\n0 20 15 10 10"),
        LINE + "a box inside 40 x 30 pixels, in fractions of the image, got 20 15 10 10",
    ),
    "outside": (edit("labels/train/a.txt", "\n0 1.01 .5 .02 .1"), LINE + "a box with a part ins"),
    "no width": (edit("labels/train/a.txt", "\n0 .5 .5 0 1"), LINE + "a box with width and height"),
    "no text": (edit("labels/train/a.txt", b"\xff"), r"a\.txt: expected text, got 'utf-8' codec"),
    "image missing": (
        lambda f: (f / "images/train/c.png").unlink(),
        r"1 fault\s+labels/train/c\.txt: expected an image of this name, got none",
    ),
    "image broken": (
        edit("images/train/c.png", "no image"),
        r"expected an image in .*c\.png', got cannot identify",
    ),
    "image of floats": (
        lambda f: replace_image(f, "F", 0.5),
        r"expected an image in .*c\.tif', got floats; scale them to 8 or 16 bits",
    ),
    "image of 32 bits": (
        lambda f: replace_image(f, "I", 70000),
        r"expected an image in .*c\.tif', got integers from 70000 to 70000; scale them",
    ),
    "no labels": (
        lambda f: (f / "labels").rename(f / "texts"),
        r"labels: expected a file for each .*, such as labels/train/a\.txt, got none",
    ),
    "name twice": (yaml_with(names="[ant, ant]"), r"data\.yaml: 1 fault\s+names: .* 'ant', got 2"),
    "names left out": (
        yaml_with(names="{0: ant, 2: bee}"),
        r"names: expected the numbers 0 to 1, got \[0, 2\]",
    ),
    "name of another type": (
        yaml_with(names="[ant, no]"),
        "names: expected text for class 1, got False; put it in quotes",
    ),
    "no names": (yaml_with(names=""), r"data\.yaml: names: expected a list"),
    "number of names": (yaml_with(nc="3"), "nc: expected 2, the number of names, got 3"),
    "keypoints": (yaml_with(kpt_shape="[2, 3]"), "kpt_shape: expected labels of boxes or poly"),
    "no YAML": (yaml_with(names="[ant"), r"(?s)data\.yaml: expected YAML, got .*line 3"),
    "null byte": (yaml_with(train=r'"images\0"'), r"train: expected a folder of images .*\\x00'"),
    "no such folder": (yaml_with(train="none"), r"train: expected a folder .*none', which does no"),
    "path of another type": (yaml_with(train="3"), "train: expected a path or a list of .*, got 3"),
    "no splits": (
        edit("data.yaml", "names: [ant, bee]"),
        r"data\.yaml: expected train, val or test, each a path of images, got none",
    ),
    "no images": (yaml_with(train="labels/train"), "train: expected images, got none"),
    "list with a missing image": (
        lambda f: (
            yaml_with(train="list.txt")(f),
            edit("list.txt", "images/train/a.png\nb.png")(f),
        ),
        r"list\.txt:2: expected an image in .*b\.png', got .*No such file",
    ),
}


@pytest.mark.parametrize("name", YOLO_FAULTS)
def test_a_fault_of_yolo_is_named_with_file_and_line(name: str, tmp_path: Path) -> None:
    change, message = YOLO_FAULTS[name]
    change(make_yolo(tmp_path / "it", ("train",)))
    with pytest.raises(ValueError, match=message):
        AnnotatedFolder(tmp_path / "it", "train", 32)


def test_what_yolo_allows(tmp_path: Path) -> None:
    """An empty label file, a byte order mark, lists, names in another encoding, EXIF data."""
    folder = make_yolo(tmp_path / "it", ("train", "val"))
    edit("labels/train/c.txt", "")(folder)
    edit("labels/train/a.txt", b"\xef\xbb\xbf1 .5 .5 1 1\r\n")(folder)
    (folder / "images/train/b.png").rename(folder / "images/train" / os.fsdecode(b"b\xff.png"))
    edit("labels/train/classes.txt", "ant\nbee\n")(folder)
    edit("some.txt", "./images/train/a.png\n\nimages/train/c.png\n")(folder)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(folder / "images/train/a.png", exif=exif)
    text = "names: {1: 1, 0: ant}\ntrain: [images/train, images/val]\nval: some.txt\ntest:\n"
    edit("data.yaml", b"\xef\xbb\xbf" + text.encode())(folder)
    train, val = (AnnotatedFolder(folder, split, 32) for split in ("train", "val"))
    assert (len(train), len(val)) == (6, 2)
    assert train.classes == ("ant", "1")
    assert splits_of(str(folder)) == ["train", "val"]
    assert val.ground_truth()["annotations"][0]["bbox"] == [0, 0, 30, 40]
    assert train[2][1]["labels"].tolist() == []


# Dividing


def test_every_class_is_in_both_parts_where_possible() -> None:
    classes = [{0}] * 40 + [{1}, {1}] + [{0, 2}, {2}] + [{3}] + [set()] * 5
    held = divide(classes, 0.2, seed=1)
    assert held == divide(classes, 0.2, seed=1) != divide(classes, 0.2, seed=2)
    assert len(held) == 10
    parts = [
        {label for i in part for label in classes[i]} for part in (held, {*range(50)} - {*held})
    ]
    assert parts == [{0, 1, 2}, {0, 1, 2, 3}]  # one image has no two parts
    ring = [{0, 3}, {0, 2}, {1, 2}, {1, 3}]  # a choice for classes 0 and 1 can leave out class 2
    assert all(divide(ring, 0.5, seed) in ([0, 2], [1, 3]) for seed in range(9))


@pytest.mark.parametrize("layout", ["one.json", "coco", "roboflow", "yolo"])
def test_a_folder_with_one_annotation_file_is_divided(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "it"
    if layout == "one.json":  # as of annotation tools: any name, images in a folder that it names
        images(folder / "images")
        rows = [one | {"file_name": f"images/{one['file_name']}"} for one in IMAGES]
        outlines = [one | {"segmentation": [[1, 2, 3, 4, 5, 6]]} for one in ANNOTATIONS]
        content = CONTENT | {"images": rows, "annotations": outlines}
        (folder / "result.json").write_text(json.dumps(content))
    elif layout == "roboflow":
        make_roboflow(folder)
        for split in ("test", "valid"):
            (folder / split / "_annotations.coco.json").unlink()
    else:
        make = {"coco": make_coco, "yolo": make_yolo}[layout]
        make(folder, ("train",))
    with pytest.raises(ValueError, match="'val', got .*; `data --data .* --hold-out 0.2` divides"):
        AnnotatedFolder(folder, "val", 32)
    files = hold_out(folder, 0.4)
    train, val = (AnnotatedFolder(folder, split, 32) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 1)
    assert train.classes == val.classes == ("ant", "bee")
    names = {facts["file_name"] for one in (train, val) for facts in one.ground_truth()["images"]}
    assert len(names) == 3
    assert sum(len(one.ground_truth()["annotations"]) for one in (train, val)) == 3
    if layout == "one.json":
        assert "segmentation" in json.loads(files[0].read_text())["annotations"][0]
    with pytest.raises(ValueError, match=r"train\.json: exists; delete .*hold_out"):
        hold_out(folder, 0.4)
    shutil.rmtree(folder / "hold_out")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr("deform_attn.detr.hold_out.write", Mock(side_effect=[write, OSError("full")]))
        hold_out(folder, 0.4)
    assert not list((folder / "hold_out").iterdir())  # a part alone would be taken for the whole
    hold_out(folder, 0.4)
    whole = folder / ANNOTATION_FILE[layout]
    whole.write_text(whole.read_text() + "\n")
    with pytest.raises(ValueError, match=r"train\.json: expected .* when it was divided, got anot"):
        AnnotatedFolder(folder, "train", 32)


def test_what_cannot_be_divided_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold_out: expected annotations of one split, got test"):
        hold_out(make_coco(tmp_path / "it"), 0.2)
    with pytest.raises(ValueError, match="expected a fraction above 0 and below 1, got 1"):
        hold_out(tmp_path / "it", 1)


# The cache


def aged(folder: Path, by: float = 100) -> Path:
    """All files as if written earlier: a cache of files that are changed now is not kept."""
    for file in folder.rglob("*"):
        if file.is_file():
            facts = file.stat()
            os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns - int(by * 1e9)))
    return folder


@pytest.mark.parametrize("layout", MAKE)
def test_what_was_checked_is_checked_again_after_a_change(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = MAKE[layout](tmp_path / "it")
    AnnotatedFolder(folder, "train", 32)
    assert not (folder / cache.FOLDER).exists()  # they may change within the clock's resolution
    first = AnnotatedFolder(aged(folder), "train", 32)
    file = next((folder / cache.FOLDER).iterdir())
    reads: list[Any] = []
    original = folders.coco.raise_faults
    monkeypatch.setattr(
        folders.coco, "raise_faults", lambda *args: (reads.append(args), original(*args))
    )

    def opened() -> int:
        """How often the folder was checked to open it."""
        reads.clear()
        again = AnnotatedFolder(folder, "train", 32)
        assert again.ground_truth() == first.ground_truth()
        return len(reads)

    assert opened() == 0
    image = next(folder.rglob("train*/b.png"))
    os.utime(image, (1, 1))
    assert opened() == 1
    assert opened() == 0
    annotations = folder / ANNOTATION_FILE[layout]
    os.utime(annotations, (1, 1))
    assert opened() == 1
    kept = file.read_bytes()
    for broken in (kept[:-9], kept.replace(b"bee", b"fly"), b"", b"1 x\n{}"):
        file.write_bytes(broken)
        assert opened() == 1
        assert file.read_bytes() == kept
    file.write_bytes(kept)
    image.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"expected an image in .*b\.png"):
        AnnotatedFolder(folder, "train", 32)


def test_a_new_image_is_seen_and_a_cache_is_not_needed(tmp_path: Path) -> None:
    folder = aged(make_yolo(tmp_path / "it", ("train",)))
    (folder / cache.FOLDER).touch()  # where its folder cannot be made
    assert len(AnnotatedFolder(folder, "train", 32)) == 3
    (folder / cache.FOLDER).unlink()
    assert len(AnnotatedFolder(folder, "train", 32)) == 3
    assert (folder / cache.FOLDER / "train.json").exists()
    Image.new("RGB", (40, 30)).save(folder / "images/train/d.png")
    assert len(AnnotatedFolder(folder, "train", 32)) == 4
    (folder / "labels/train/b.txt").write_text("0 .5 .5 .5 .5")
    assert len(AnnotatedFolder(folder, "train", 32).ground_truth()["annotations"]) == 4
