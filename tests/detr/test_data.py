"""Data sets: the same images every time, boxes that fit, and errors for invalid folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from deform_attn.detr.augment import batches, collate
from deform_attn.detr.data import open_dataset
from deform_attn.detr.drawn import Digits, Shapes
from deform_attn.detr.evaluate import average_precision, score
from deform_attn.detr.folders import AnnotatedFolder
from deform_attn.detr.pictures import precision_recall


@pytest.mark.parametrize("kind", [Shapes, Digits])
def test_drawn_images_depend_on_seed_split_and_index_alone(kind: Any) -> None:
    dataset = kind("train", seed=3)
    again = [kind("train", seed=3)[i] for i in (5, 2)]
    for index, (image, target) in zip((5, 2), again):
        same_image, same_target = dataset[index]
        assert torch.equal(image, same_image)
        assert torch.equal(target["boxes"], same_target["boxes"])
        assert torch.equal(target["labels"], same_target["labels"])
    for other in (kind("train", seed=4)[5], kind("val", seed=3)[5], dataset[6]):
        assert not torch.equal(again[0][0], other[0])
    with pytest.raises(IndexError, match="0 to 1999, got 2000"):
        dataset[2000]


@pytest.mark.parametrize("kind", [Shapes, Digits])
def test_drawn_boxes_fit_inside_and_all_classes_occur(kind: Any) -> None:
    dataset = kind("train")
    seen = set()
    for index in range(60):
        image, target = dataset[index]
        assert image.shape == (3, dataset.size, dataset.size)
        assert image.dtype == torch.float32
        assert 0 <= image.min() <= image.max() <= 1
        boxes = target["boxes"]
        assert len(boxes) >= 1
        assert (boxes[:, 2:] > 0).all()
        assert (boxes[:, :2] - boxes[:, 2:] / 2 >= 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] / 2 <= 1).all()
        seen.update(target["labels"].tolist())
    assert seen == set(range(len(dataset.classes)))


def test_the_box_of_a_shape_is_where_it_was_drawn() -> None:
    """Inside the box of a shape the colour stands out; just outside it is the calm ground."""
    dataset = Shapes("val")
    for index in range(20):
        image, target = dataset[index]
        for cx, cy, w, _ in (target["boxes"] * dataset.size).tolist():
            center = image[:, round(cy - 0.5), round(cx - 0.5)]
            edge = image[:, round(cy - 0.5), max(0, round(cx - w / 2 - 2))]
            assert (center - edge).abs().max() > 0.2


def test_digits_and_photographs_of_the_test_images_are_not_trained_on() -> None:
    from deform_attn.detr.drawn import _handwriting, _photographs

    for pictures in (lambda split: _handwriting(split)[0], _photographs):
        train = {picture.tobytes() for picture in pictures("train")}
        assert not train & {picture.tobytes() for picture in pictures("val")}


def test_ground_truth_of_a_drawn_set_scores_one_against_itself() -> None:
    dataset = Shapes("val")
    found = []
    for index in range(len(dataset)):
        target = dataset[index][1]
        center, half = target["boxes"][:, :2] * 64, target["boxes"][:, 2:] * 32
        corners = torch.cat([center - half, center + half], -1)
        scores = torch.ones(len(corners))
        found.append({"boxes": corners, "scores": scores, "labels": target["labels"]})
    assert average_precision(dataset.ground_truth(), found)["AP"] == pytest.approx(1)
    found[0]["labels"] = (found[0]["labels"] + 1) % 3
    assert average_precision(dataset.ground_truth(), found)["AP"] < 1


def test_average_precision_of_a_case_by_hand() -> None:
    """Two objects, one found at IoU 0.6 under a false alarm with a higher score."""
    coco = {
        "images": [{"id": 5, "height": 100, "width": 100}],
        "categories": [{"id": 9, "name": "thing"}],
        "annotations": [
            {"id": i, "image_id": 5, "category_id": 9, "bbox": box, "area": 400, "iscrowd": 0}
            for i, box in enumerate(([0, 0, 20, 20], [50, 50, 20, 20]), 1)
        ],
    }
    found = {
        "boxes": torch.tensor([[80.0, 0, 90, 10], [0, 0, 20, 12]]),
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.tensor([0, 0]),
    }
    result = average_precision(coco, [found])
    # precision 1/2 up to recall 1/2: 51 of 101 recall points, at IoU .5, .55 and .6
    assert result["AP50"] == pytest.approx(51 / 101 / 2)
    assert result["AP"] == pytest.approx(51 / 101 / 2 * 3 / 10)
    assert result["AP75"] == 0
    counted_from_0 = [{**one, "id": one["id"] - 1} for one in coco["annotations"]]
    assert average_precision({**coco, "annotations": counted_from_0}, [found]) == result
    coco["categories"].append({"id": 12, "name": "other"})
    scores = score(coco, [found])
    assert scores.of_class(0) == {name: result[name] for name in scores.of_class(0)}
    assert set(scores.of_class(1).values()) == {None}
    figure = precision_recall(scores, "by hand")
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["0.076  mean of 1", "0.076  thing"]
    assert figure.get_supxlabel() == "without objects: other"
    for panel, precision in zip(figure.axes, (0.5, 0, 0.15)):
        assert panel.lines[0].get_ydata()[0] == pytest.approx(precision)
    nothing = {name: numbers[:0] for name, numbers in found.items()}
    assert average_precision(coco, [nothing])["AP"] == 0
    empty = score({**coco, "annotations": []}, [found])
    assert set(empty.metrics.values()) == {None}
    with pytest.raises(ValueError, match="scores: expected objects to find, got none"):
        precision_recall(empty, "nothing")


# A folder of one's own


def coco_folder(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda c: None) -> Path:
    """Three images of odd modes, categories with gaps, an empty image, a crowd; then `change`."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2017").mkdir()
    for name, mode in (("ä b.png", "RGBA"), ("gray.png", "L"), ("16.png", "I;16")):
        Image.new(mode, (40, 30)).save(folder / "train2017" / name)
    sides = {"height": 30, "width": 40}
    content = {
        "images": [
            {"id": 70, "file_name": "ä b.png", **sides},
            {"id": 3, "file_name": "gray.png", **sides},
            {"id": 8, "file_name": "16.png", **sides},
        ],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 4, "name": "ant"}],
        "annotations": [
            {"id": 1, "image_id": 70, "category_id": 90, "bbox": [10, 5, 20, 10]},
            {"id": 2, "image_id": 70, "category_id": 4, "bbox": [-0.5, 0, 40.9, 30.2]},
            {"id": 3, "image_id": 8, "category_id": 4, "bbox": [0, 0, 5, 5], "iscrowd": True},
        ],
        "info": {"year": 2017},
    }
    change(content)
    file = folder / "annotations" / "instances_train2017.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_nothing_of_a_folder_is_lost(tmp_path: Path) -> None:
    dataset = open_dataset(f"coco:{coco_folder(tmp_path)}", "train", size=32)
    assert len(dataset) == 3
    assert dataset.classes == ("ant", "zebra")
    image, target = dataset[0]
    assert image.shape == (3, 32, 32)
    assert target["labels"].tolist() == [1, 0]
    expected = torch.tensor([[20 / 40, 10 / 30, 20 / 40, 10 / 30], [0.5, 0.5, 1, 1]])
    torch.testing.assert_close(target["boxes"], expected)
    assert dataset[1][1]["boxes"].shape == (0, 4)
    assert dataset[2][1]["labels"].shape == (0,)  # a crowd is no target,
    assert len(dataset.ground_truth()["annotations"]) == 3  # but it counts in the AP
    assert dataset.ground_truth()["info"] == {"year": 2017}
    found = {
        "boxes": torch.tensor([[10.0, 5, 30, 15], [-0.5, 0, 40.4, 30.2]]),
        "scores": torch.ones(2),
        "labels": torch.tensor([1, 0]),
    }
    nothing = {name: numbers[:0] for name, numbers in found.items()}
    in_crowd = {
        "boxes": torch.tensor([[0.0, 0, 5, 5]]),
        "scores": torch.ones(1),
        "labels": torch.tensor([0]),
    }
    result = average_precision(dataset.ground_truth(), [found, nothing, in_crowd])
    assert result["AP"] == pytest.approx(1)


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing image": (
        lambda c: c["images"][1].update(file_name="no.png"),
        r"image 3: expected an image in .*no\.png', got .*No such file",
    ),
    "not an image": (
        lambda c: c["images"][1].update(file_name="../annotations"),
        r"image 3: expected an image in .*annotations', got .*directory",
    ),
    "other size": (
        lambda c: c["images"][1].update(width=41),
        r"image 3: expected \(width, height\) of .*gray\.png to be \(41, 30\), got \(40, 30\)",
    ),
    "box outside": (
        lambda c: c["annotations"][0].update(bbox=[30, 5, 20, 10]),
        r"annotation 1 \(image 70\): expected bbox inside 40 x 30 pixels, "
        r"got \[30\.0, 5\.0, 20\.0, 10\.0\]",
    ),
    "negative size": (
        lambda c: c["annotations"][1].update(bbox=[9, 9, -4, 2]),
        r"annotation 2 \(image 70\): expected bbox with width and height above 0, "
        r"got \[9\.0, 9\.0, -4\.0, 2\.0\]",
    ),
    "no number": (
        lambda c: c["annotations"][1].update(bbox=[9, 9, float("nan"), 2]),
        r"annotations\.1\.bbox\.2: .* finite number, got nan",
    ),
    "three numbers": (
        lambda c: c["annotations"][1].update(bbox=[9, 9, 3]),
        r"annotations\.1\.bbox: .* at least 4 items .*, got \[9, 9, 3\]",
    ),
    "unknown category": (
        lambda c: c["annotations"][2].update(category_id=5),
        r"annotation 3 \(image 8\): expected category_id among \[4, 90\], got 5",
    ),
    "unknown image": (
        lambda c: c["annotations"][2].update(image_id=71),
        r"annotation 3 \(image 71\): expected image_id of a listed image, got 71",
    ),
    "nothing of the box inside": (
        lambda c: c["annotations"][0].update(bbox=[-1, 10, 0.5, 5]),
        r"annotation 1 \(image 70\): expected bbox with a part inside 40 x 30 pixels, "
        r"got \[-1\.0, 10\.0, 0\.5, 5\.0\]",
    ),
    "box beside the image": (
        lambda c: c["annotations"][0].update(bbox=[40, 10, 1, 5]),
        r"annotation 1 \(image 70\): expected bbox with a part inside 40 x 30 pixels",
    ),
    "class twice": (
        lambda c: c["categories"][0].update(name="ant"),
        r"categories: expected one named 'ant', got 2",
    ),
    "null byte": (
        lambda c: c["images"][0].update(file_name="a\0.png"),
        r"image 70: expected an image in '.*a\\x00\.png', got embedded null byte",
    ),
    "id twice": (
        lambda c: c["annotations"][2].update(id=1),
        r"annotations: expected one of id 1, got 2",
    ),
    "key left out": (
        lambda c: c["images"][0].pop("height"),
        r"images\.0\.height: Field required, got \{.*'width': 40\}",
    ),
    "no list": (lambda c: c.pop("categories"), r"categories: Field required"),
    "text for a number": (
        lambda c: c["images"][0].update(height="30"),
        r"images\.0\.height: Input should be a valid integer, got '30'",
    ),
    "text for an id": (
        lambda c: c["categories"][0].update(id="zebra"),
        r"categories\.0\.id: Input should be a valid integer, got 'zebra'",
    ),
    "no image": (lambda c: c["images"].clear(), r"images: .* at least 1 item .*, got \[\]"),
    "no object": (lambda c: c["images"].append(7), r"images\.3: Input should be an object, got 7"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_folder_is_named(name: str, tmp_path: Path) -> None:
    change, message = FAULTS[name]
    with pytest.raises(ValueError, match=message):
        AnnotatedFolder(coco_folder(tmp_path, change), "train", 32)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    def spoil(content: dict[str, Any]) -> None:
        content["images"][1]["file_name"] = "no.png"
        for one in content["annotations"]:
            one["bbox"] = [0, 0, 0, 1]

    with pytest.raises(ValueError, match="4 faults") as error:
        AnnotatedFolder(coco_folder(tmp_path, spoil), "train", 32)
    assert all(f"annotation {i}" in str(error.value) for i in (1, 2, 3))


def test_a_broken_image_and_a_missing_file_are_named(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    (folder / "train2017" / "gray.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image 3: expected an image in .*gray\.png"):
        AnnotatedFolder(folder, "train", 32)
    Image.new("F", (40, 30)).save(folder / "train2017" / "gray.png", "TIFF")
    with pytest.raises(ValueError, match=r"image 3: expected an image in .*gray\.png', got floats"):
        AnnotatedFolder(folder, "train", 32)
    file = folder / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    with pytest.raises(ValueError, match="Invalid JSON: EOF"):
        AnnotatedFolder(folder, "train", 32)
    file.unlink()
    file.mkdir()
    with pytest.raises(OSError, match=r"train2017\.json: expected a file with annotations"):
        AnnotatedFolder(folder, "train", 32)
    with pytest.raises(
        ValueError, match="expected one that starts with 'val', got train2017; .* --hold"
    ):
        AnnotatedFolder(folder, "val", 32)
    with pytest.raises(ValueError, match="'yolo:FOLDER', got 'voc'"):
        open_dataset("voc", "train")
    with pytest.raises(ValueError, match="split: expected one of train, val; got 'test'"):
        open_dataset("shapes", "test")


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    file = folder / "annotations" / "instances_train2017.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(AnnotatedFolder(folder, "train", 32)) == 3


def test_a_size_that_exif_data_exchange_is_explained(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(folder / "train2017" / "gray.png", exif=exif)
    with pytest.raises(ValueError, match=r"to be \(40, 30\), got \(30, 40\), because its EXIF"):
        AnnotatedFolder(folder, "train", 32)


def test_labels_of_the_evaluation_are_those_of_the_training_by_name(tmp_path: Path) -> None:
    """Other ids, and fewer categories: a perfect detector still has an AP of 1."""

    def renumber(content: dict[str, Any]) -> None:
        content["categories"] = [{"id": 7, "name": "zebra"}]
        content["annotations"] = content["annotations"][:1]
        content["annotations"][0]["category_id"] = 7

    train = AnnotatedFolder(coco_folder(tmp_path / "one"), "train", 32)
    other = coco_folder(tmp_path / "two", renumber)
    val = AnnotatedFolder(other, "train", 32, classes=train.classes)
    assert val.classes == train.classes == ("ant", "zebra")
    assert val[0][1]["labels"].tolist() == [1]
    found = {"boxes": torch.tensor([[10.0, 5, 30, 15]]), "scores": torch.ones(1)}
    found["labels"] = torch.tensor([1])
    nothing = {name: numbers[:0] for name, numbers in found.items()}
    result = average_precision(val.ground_truth(), [found, nothing, nothing])
    assert result["AP"] == pytest.approx(1)
    assert result["AP_large"] is None
    with pytest.raises(
        ValueError, match=r"those of the training .* model, \['ant'\], got \['zebra'\]"
    ):
        AnnotatedFolder(other, "train", 32, classes=["ant"])


def test_the_identity_of_a_folder_is_its_content(tmp_path: Path) -> None:
    first = AnnotatedFolder(coco_folder(tmp_path / "a"), "train", 32).identity
    assert AnnotatedFolder(coco_folder(tmp_path / "b"), "train", 64).identity == first
    cut = coco_folder(tmp_path / "c", lambda c: c["annotations"].pop())
    assert AnnotatedFolder(cut, "train", 32).identity != first
    Image.new("RGB", (40, 30), "red").save(tmp_path / "b/train2017/gray.png")
    assert AnnotatedFolder(tmp_path / "b", "train", 32).identity != first


def test_images_keep_their_ratio_where_asked(tmp_path: Path) -> None:
    dataset = AnnotatedFolder(coco_folder(tmp_path), "train", 32, resize="fit")
    assert dataset[0][0].shape == (3, 24, 32)
    Image.new("RGB", (20, 60)).save(tmp_path / "train2017/gray.png")
    file = tmp_path / "annotations/instances_train2017.json"
    text = file.read_text(encoding="utf-8")
    content = json.loads(text)
    content["images"][1].update(width=20, height=60)
    file.write_text(json.dumps(content))
    dataset = AnnotatedFolder(tmp_path, "train", 32, resize="fit")
    images, mask, targets = collate([dataset[0], dataset[1]])
    assert images.shape == (2, 3, 32, 32)
    assert mask is not None
    assert (~mask).sum((1, 2)).tolist() == [24 * 32, 11 * 32]
    assert not images[mask[:, None].expand_as(images)].any()
    assert targets[0]["boxes"][1].tolist() == [0.5, 0.5, 1, 1]
    assert collate([dataset[0], dataset[0]])[1] is None
    with pytest.raises(ValueError, match="resize: expected one of stretch, .*; got 'crop'"):
        AnnotatedFolder(tmp_path, "train", 32, resize="crop")


# Batches


def test_batches_are_the_same_wherever_training_starts_and_however_it_is_shared() -> None:
    whole = list(batches(50, 8, range(25), seed=1))
    assert list(batches(50, 8, range(13, 25), seed=1)) == whole[13:]
    parts = [list(batches(50, 8, range(25), seed=1, part=(i, 2))) for i in range(2)]
    assert [a + b for a, b in zip(*parts)] == whole
    images = [item.image for items in whole for item in items]
    epochs = [images[i : i + 50] for i in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)  # none is left out
    assert epochs[0] != epochs[1]
    assert len(next(batches(5, 8, range(1), seed=1))) == 8  # more than there are
    with pytest.raises(ValueError, match="multiple of 3 processes, got 8"):
        next(batches(50, 8, range(20), seed=1, part=(0, 3)))
