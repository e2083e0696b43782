"""Augmentation: boxes follow their pixels, the same random numbers every time, and its schedule."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from deform_attn.detr import augment, create
from deform_attn.detr.augment import AUGMENTATIONS, Augmented, Item, batches, mixup
from deform_attn.detr.drawn import Shapes
from deform_attn.detr.samples import Original, resized
from deform_attn.detr.train import Settings, train

SIZE = 64
NAMES = ["flip", "detr", "crop", "dense"]


class Images:
    """One image and its boxes, then nine black ones without objects, of the same size."""

    classes, flips, identity, most_objects = ("white",), True, "images", 9

    def __init__(self, pixels: np.ndarray, boxes: list[list[float]], size: int = SIZE) -> None:
        self.pixels, self.boxes, self.size = pixels, torch.tensor(boxes).reshape(-1, 4), size

    def __len__(self) -> int:
        return 10

    def original(self, index: int) -> Original:
        pixels = self.pixels if index == 0 else np.zeros_like(self.pixels)
        boxes = self.boxes if index == 0 else self.boxes[:0]
        target = {"labels": torch.zeros(len(boxes), dtype=torch.long), "boxes": boxes}
        return Image.fromarray(pixels), target

    def __getitem__(self, index: int) -> Any:
        return resized(self.original(index), self.size)

    def ground_truth(self) -> dict[str, Any]:
        return {}


def white_box() -> Images:
    pixels = np.zeros((72, 96, 3), np.uint8)
    pixels[30:54, 24:60] = 255
    return Images(pixels, [[24.0, 30, 60, 54]])


def extent(image: Tensor) -> Tensor:
    """Corners round the white pixels."""
    light = image.mean(0)
    ys, xs = torch.where(light > (light.min() + light.max()) / 2)
    return torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()


def check_boxes(name: str, resize: str = "stretch", draws: int = 40) -> None:
    """Boxes are round the pixels of the white box, or of all of them in a mosaic."""
    augmented = Augmented(white_box(), name, 58, 0, resize=resize)
    with_box = 0
    for place in range(draws):
        _, (image, target) = augmented[Item(10, place, 0)]
        if len(target["boxes"]) == 0:  # the centre was cropped, or all of it
            continue
        with_box += 1
        sides = torch.tensor([image.shape[2], image.shape[1]]).repeat(2)
        center, half = target["boxes"][:, :2], target["boxes"][:, 2:] / 2
        low, high = (center - half).amin(0), (center + half).amax(0)
        found, box = extent(image), torch.cat([low, high]) * sides
        outward = (box - found) * torch.tensor([-1, -1, 1, 1])
        assert outward.min() > -1.5, (place, box, found)
        # A turned box that the border cuts is larger than what is seen of it.
        inside = (box > 0.5).all() and (box < sides - 0.5).all()
        assert outward.max() < (1.5 if inside else 9), (place, box, found)
    assert with_box > draws / 2


@pytest.mark.parametrize("resize", ["stretch", "shortest"])
@pytest.mark.parametrize("name", NAMES)
def test_boxes_go_where_their_pixels_go(torchvision: None, name: str, resize: str) -> None:
    check_boxes(name, resize)


FAULTS: dict[str, tuple[str, Callable[[Any, pytest.MonkeyPatch], object]]] = {
    "a mirrored image keeps its boxes": (
        "flip",
        lambda _, patch: patch.setattr(
            augment, "flip", lambda one: (one[0].transpose(0), one[1]), raising=True
        ),
    ),
    "boxes of the whole image": (
        "crop",
        lambda module, patch: patch.setattr(
            module, "iou_crop", lambda image, target: (module.IOU_CROP(image, target)[0], target)
        ),
    ),
    "boxes of a mosaic before it is turned": (
        "dense",
        lambda module, patch: patch.setattr(
            module,
            "AFFINE",
            lambda image, target, real=module.AFFINE: (real(image, target)[0], target),
        ),
    ),
    "height and width": (
        "detr",
        lambda _, patch: patch.setattr(augment, "resized", with_swapped_sides),
    ),
}


def with_swapped_sides(*arguments: Any) -> Any:
    image, target = resized(*arguments)
    return image, {**target, "boxes": target["boxes"][:, [1, 0, 3, 2]]}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(
    torchvision: None, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deform_attn.detr import transforms

    name, plant = FAULTS[fault]
    plant(transforms, monkeypatch)
    with pytest.raises(AssertionError):
        check_boxes(name)


def test_a_crop_keeps_the_promised_overlap(
    torchvision: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pixels are their coordinates, from which the crop is known."""
    from torchvision.ops import box_iou

    from deform_attn.detr import transforms

    pixels = np.zeros((120, 160, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(160), np.arange(120)[:, None]
    boxes = torch.tensor([[10.0, 10, 90, 80], [100, 60, 150, 110], [70, 5, 100, 20]])
    target = {"labels": torch.arange(3), "boxes": boxes}
    monkeypatch.setattr(transforms.IOU_CROP.transforms[0], "options", [0.3])
    sizes = set()
    for _ in range(40):
        image, found = transforms.transformed(
            (Image.fromarray(pixels), target), [transforms.iou_crop]
        )
        x1, y1, *_ = image.getpixel((0, 0))
        x2, y2, *_ = image.getpixel((image.width - 1, image.height - 1))
        crop = torch.tensor([[x1, y1, x2 + 1, y2 + 1]]).float()
        sizes.add(image.size)
        whole = image.size == (160, 120)
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        kept = ((centers > crop[:, :2]) & (centers < crop[:, 2:])).all(1)
        assert found["labels"].tolist() == torch.arange(3)[kept].tolist()
        assert whole or box_iou(boxes[kept], crop).max() >= 0.3
        expected = boxes[kept].clamp(crop[:, :2].repeat(1, 2), crop[:, 2:].repeat(1, 2))
        assert torch.equal(found["boxes"], expected - crop[:, :2].repeat(1, 2))
    assert len(sizes) > 20


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name not in ("none", "flip")])
def test_an_item_depends_on_seed_step_and_place_alone(torchvision: None, name: str) -> None:
    """Not on what was drawn before; and the global generator stays as it is."""
    data = Augmented(Shapes("train"), name, steps=20, seed=1, multi_scale=0.5)
    whole = list(batches(50, 8, range(25), seed=1))
    items = whole[5]
    state = torch.get_rng_state()
    one = data.batch([data[item] for item in items])
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    drawn = {item.place: data[item] for item in reversed(items)}
    two = data.batch([drawn[item.place] for item in items])
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(one[2], two[2]))
    halves = [data[item][1][0] for part in (0, 1) for item in items[part::2]]
    assert {image.shape for image in halves} == {drawn[0][1][0].shape}
    other = [data[item._replace(step=6)][1][0] for item in items]
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(halves[:1], other[:1]))


def test_images_of_any_size_and_without_objects(torchvision: None) -> None:
    """An image of one pixel, an empty one, a box of a few pixels in a large one."""
    nothing = np.zeros((40, 50, 3), np.uint8)
    large = np.zeros((30, 900, 3), np.uint8)
    for pixels, boxes in (
        (nothing[:1, :1], [[0.0, 0, 1, 1]]),
        (nothing[:2, :3], [[1.0, 0, 3, 2]]),
        (nothing, []),
        (large, [[5.0, 5, 9, 9]]),
        (np.zeros((2, 3000, 3), np.uint8), [[5.0, 0, 900, 2]]),
        (np.zeros((3000, 1, 3), np.uint8), [[0.0, 5, 1, 2000]]),
    ):
        for name, resize in itertools.product(AUGMENTATIONS, ("stretch", "fit", "shortest")):
            augmented = Augmented(Images(pixels, boxes), name, 58, 0, resize=resize)
            drawn = [augmented[Item(10, place, place % 2)] for place in range(6)]
            images, mask, targets = augmented.batch(drawn)
            assert 0 <= images.min() <= images.max() <= 1
            assert mask is None or mask.shape[1:] == images.shape[2:]
            sides = torch.tensor([one.shape[:0:-1] for _, (one, _) in drawn])
            assert (sides > 0).all()
            for target in targets:
                assert len(target["labels"]) == len(target["boxes"])
                assert ((target["boxes"] >= 0) & (target["boxes"] <= 1)).all()


def test_a_large_image_is_reduced_to_what_the_smallest_crop_needs() -> None:
    pixels = np.zeros((300, 1000, 3), np.uint8)
    original = Images(pixels, [[100.0, 30, 500, 60]]).original(0)
    for resize, size in (("stretch", (712, 214)), ("shortest", (712, 214)), ("fit", (214, 64))):
        augmented = Augmented(Images(pixels, []), "none", 10, 0, resize=resize)
        image, target = augmented._reduced(original)
        assert image.size == size
        scale = torch.tensor([size[0] / 1000, size[1] / 300]).repeat(2)
        torch.testing.assert_close(target["boxes"], original[1]["boxes"] * scale)
        small = image.resize((200, 60)), target
        assert augmented._reduced(small) is small


def test_memory_is_bounded_for_images_of_any_ratio(torchvision: None) -> None:
    from deform_attn.detr import transforms

    narrow = Image.new("RGB", (3, 20000)), {"labels": torch.ones(1), "boxes": torch.ones(1, 4)}
    for image in (transforms.mosaic([narrow] * 4, 64)[0], transforms.size_crop(narrow, 64)[0]):
        assert max(image.size) <= 2 * 32 * transforms.LARGEST_RATIO
    reduced = Augmented(Images(np.zeros((2, 2, 3), np.uint8), []), "none", 10, 0)._reduced
    huge = Image.new("RGB", (200_000, 220)), {"boxes": torch.ones(1, 4)}
    assert math.prod(reduced(huge)[0].size) < 4.5 * (64 / 0.3) ** 2  # ceil of each side


def test_mixup_keeps_the_objects_of_both() -> None:
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    targets = [{"labels": torch.tensor([i]), "boxes": torch.full((1, 4), i / 10)} for i in range(2)]
    mixup(images, targets, 0.47)
    assert images[0].unique().tolist() == pytest.approx([0.53])
    torch.testing.assert_close(images[0] + images[1], torch.ones(3, 4, 4))
    assert [target["labels"].tolist() for target in targets] == [[0, 1], [1, 0]]
    assert targets[0]["boxes"][:, 0].tolist() == pytest.approx([0, 0.1])


def test_mosaic_and_mixup_multiply_objects_and_stop_half_way(torchvision: None) -> None:
    from deform_attn.detr import transforms

    data = Augmented(Shapes("train"), "dense", steps=58, seed=0)
    steps = {name: [i for i in range(58) if data.is_on(name, i)] for name in AUGMENTATIONS["dense"]}
    assert steps["mosaic"] == steps["mixup"] == list(range(4, 29))
    assert steps["iou_crop"] == steps["zoom_out"] == steps["distort"] == list(range(4, 50))

    def objects(step: int) -> int:
        drawn = [data[Item(step + i % 5, i, i)] for i in range(64)]
        return sum(len(target["boxes"]) for target in data.batch(drawn)[2])

    assert objects(12) > 1.5 * objects(50)
    with pytest.raises(ValueError, match="augment: expected one of"):
        Augmented(Shapes("train"), "more", steps=58, seed=0)
    with pytest.raises(ValueError, match="originals: expected 4 of them, got 3"):
        transforms.mosaic([Shapes("train").original(0)] * 3, 64)


def test_shortest_edges_of_detr_are_the_official_ones(torchvision: None) -> None:
    images = Images(np.zeros((600, 800, 3), np.uint8), [], size=800)
    assert Augmented(images, "detr", 9, 0, resize="shortest").sizes == [*range(480, 801, 32)]
    assert Augmented(images, "detr", 9, 0).sizes == [800]
    images.size = 64
    assert Augmented(images, "detr", 9, 0, resize="shortest").sizes == [64]


def test_without_torchvision_the_default_is_flip_and_the_others_name_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The training resumes with it where torchvision was installed meanwhile."""
    monkeypatch.setattr(Shapes, "lengths", {"train": 4, "val": 2})
    monkeypatch.delitem(sys.modules, "deform_attn.detr.transforms", raising=False)
    for name in ["torchvision", *sys.modules]:
        if name.partition(".")[0] == "torchvision":
            monkeypatch.setitem(sys.modules, name, None)
    versions = {"torch": "2.13.0+cpu"}
    monkeypatch.setattr("deform_attn.extras.metadata.version", versions.__getitem__)
    settings = {"data": "shapes", "recipe": "deim", "width": 32, "layers": 1, "queries": 10}
    settings |= {"steps": 1, "batch": 2}
    step = r'pip install "torchvision==0\.28\.\*" "torch==2\.13\.0", from the package index of'
    for name in ("detr", "crop", "dense"):
        with pytest.raises(ImportError, match=f"for torch 2.13.0.cpu, got none: {step} torch 2"):
            train(Settings(**settings, augment=name), tmp_path)
    assert not list(tmp_path.iterdir())
    train(Settings(**settings), tmp_path)
    shown = capsys.readouterr().out
    assert "augment: flip instead of dense, which needs torchvision: " in shown
    assert torch.load(tmp_path / "checkpoint.pt")["settings"]["augment"] == "flip"
    monkeypatch.setattr("deform_attn.detr.train.check_augmentation", lambda name: None)
    train(Settings(**settings | {"steps": 2}), tmp_path, resume=tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt")["settings"]["augment"] == "flip"

    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "deform_attn.detr.transforms", raising=False)
    for name in ("torchvision", "torchvision.transforms", "torchvision.tv_tensors"):
        monkeypatch.setitem(sys.modules, name, Broken())
    with pytest.raises(ImportError, match=r"got one whose import fails \(operator torchvision::n"):
        Augmented(Shapes("train"), "crop", 58, 0)
    with pytest.raises(ImportError, match="torchvision: expected the version for torch"):
        create("rtdetr_r18")  # its backbone is one of transformers, which imports torchvision
