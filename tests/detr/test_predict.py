"""The shipped detector finds digits in images of any kind, and all backends agree."""

from __future__ import annotations

import math
import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deform_attn import BACKENDS
from deform_attn.detr import create, load
from deform_attn.detr.augment import collate
from deform_attn.detr.drawn import Digits
from deform_attn.detr.evaluate import average_precision
from deform_attn.detr.predict import SHIPPED
from examples import detect_digits

IMAGES = 40


def test_the_shipped_detector_reaches_the_precision_that_its_file_says() -> None:
    """On test images; a fifth of them, hence the margin."""
    detector, dataset = load("digits"), Digits("val")
    images = collate([dataset[i] for i in range(IMAGES)])[0]
    with torch.no_grad():
        found = detector.postprocess(detector.model(images), torch.full((IMAGES, 2), 128))
    coco = dataset.ground_truth()
    coco["images"] = coco["images"][:IMAGES]
    coco["annotations"] = [one for one in coco["annotations"] if one["image_id"] < IMAGES]
    reached = average_precision(coco, found)["AP50"]
    assert detector.facts["ap"][0]["AP50"] > 0.85
    assert reached > detector.facts["ap"][0]["AP50"] - 0.1


def test_the_shipped_file_is_small_and_says_how_it_was_made() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 3e6
    facts = load("digits").facts
    assert facts["step"] == facts["settings"]["steps"]
    assert facts["settings"]["data"] == "digits"
    assert isinstance(facts["settings"]["seed"], int)


def test_the_demonstration_finds_the_same_with_every_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["detect_digits", "--out", str(tmp_path)])
    detect_digits.main()
    assert re.search(r"compiled, .*reference: the same to 0\.0001;", capsys.readouterr().out)
    with Image.open(tmp_path / "digits.png") as drawn:
        assert min(drawn.size) > 500
    image, boxes, labels = detect_digits.picture(9)
    found = load("digits").predict([image])[0]
    names = zip(found["boxes"].tolist(), found["names"])
    right = [name for box, name in names if detect_digits.is_right(box, name, boxes, labels)]
    assert len(right) >= len(labels) - 1


def test_the_demonstration_fails_where_backends_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect_digits, "TOLERANCE", -1.0)
    two = {name: BACKENDS[name] for name in ("compiled", "reference")}
    monkeypatch.setattr(detect_digits, "BACKENDS", two)
    with pytest.raises(AssertionError, match=r"boxes differ by .*, at most -1\.0"):
        detect_digits.detect(detect_digits.picture(9)[0], "cpu")


def test_images_of_any_size_and_mode_and_on_their_side(tmp_path: Path) -> None:
    detector = load("digits")
    image, _, _ = detect_digits.picture(9)
    wide = image.resize((900, 300))
    whole, squeezed, gray = detector.predict([image, wide, image.convert("L")])
    scale = torch.tensor([900, 300, 900, 300]) / detect_digits.SIDE
    assert squeezed["names"] == whole["names"]
    torch.testing.assert_close(squeezed["boxes"], whole["boxes"] * scale, rtol=0.05, atol=5)
    assert len(gray["names"]) > 0

    turned = wide.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn it by 90 degrees to see it", as cameras write
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = detector.predict([tmp_path / "turned.png"])[0]
    assert upright["names"] == squeezed["names"]
    torch.testing.assert_close(upright["boxes"], squeezed["boxes"], rtol=0, atol=1e-3)


def test_scores_are_sorted_and_above_the_threshold() -> None:
    detector = load("digits")
    image = detect_digits.picture(9)[0]
    few, many = (detector.predict([image], threshold=t)[0]["scores"] for t in (0.5, 0.01))
    assert (few >= 0.5).all()
    assert len(many) > len(few)
    assert torch.equal(many, many.sort(descending=True).values)
    boxes = detector.predict([image], threshold=0)[0]["boxes"]
    assert len(boxes) == len(boxes.unique(dim=0)) == 20  # a class for each query
    assert detector.predict([]) == []


def test_what_cannot_be_loaded_or_predicted_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"one of \['digits'\], a file, .*'letters'"):
        load("letters")
    torch.save({"settings": {"recipe": "rtdetr"}, "classes": ["a"]}, tmp_path / "odd.pt")
    with pytest.raises(
        ValueError, match=r"odd\.pt: expected model\.pt of a training, got KeyError"
    ):
        load(tmp_path / "odd.pt")
    with pytest.raises(FileNotFoundError, match=r"a name on the hub \(ORG.*\), got ''"):
        load("")
    with pytest.raises(ValueError, match=r"name_or_path: expected config\.json .* got neither$"):
        load(tmp_path)
    (tmp_path / "model.pt").write_text("# text")
    for one in (tmp_path, tmp_path / "model.pt"):  # the folder of a training, and its file
        with pytest.raises(ValueError, match=r"model\.pt: expected a checkpoint, got a file that"):
            load(one)
    with pytest.raises(ValueError, match=r"odd\.pt: expected model\.pt .*size: expected an int"):
        trained = torch.load(SHIPPED / "digits.pt", weights_only=True)
        torch.save(trained | {"size": None}, tmp_path / "odd.pt")
        load(tmp_path / "odd.pt")
    with pytest.raises(TypeError, match="name_or_path: expected a name or a path, got None"):
        load(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device: expected cpu, cuda or .*, got 'gpu': Expected"):
        load("digits", device="gpu")
    with pytest.raises(TypeError, match="device: expected a name such as cpu or cuda, got 0"):
        load("digits", device=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"num_classes: expected an integer, got \['a'\]"):
        create("rtdetr_r18", ["a"])  # type: ignore[arg-type]
    torch.save({"settings": {}, "classes": ["a"], "random": []}, tmp_path / "checkpoint.pt")
    with pytest.raises(
        ValueError, match=r"expected model\.pt of a training, got its checkpoint, .*"
    ):
        load(tmp_path / "checkpoint.pt")
    detector, image = load("digits"), Image.new("RGB", (9, 9))
    single: tuple[Any, ...] = (image, "a.png", np.zeros((9, 9, 3)), None, {"image": image})
    for one in single:
        with pytest.raises(TypeError, match="images: expected a list of images, got"):
            detector.predict(one)
    with pytest.raises(FileNotFoundError):
        detector.predict([tmp_path / "none.png"])
    with pytest.raises(ValueError, match="threshold: expected a number from 0 to 1, got nan"):
        detector.predict([image], threshold=math.nan)
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        detector.predict([image], batch=0)
    with pytest.raises(TypeError, match="threshold: expected a number, got '0.5'"):
        detector.predict([image], threshold="0.5")  # type: ignore[arg-type]
    for batch in (1.5, "2", True, None):
        with pytest.raises(TypeError, match=f"batch: expected an integer, got {batch!r}"):
            detector.predict([image], batch=batch)  # type: ignore[arg-type]


def test_files_are_closed_as_they_are_read(tmp_path: Path) -> None:
    """A long list needs no more open files than a short one; generators are read by batches."""
    names = [tmp_path / f"{i}.png" for i in range(24)]
    for name in names:
        Image.new("RGB", (16, 16)).save(name)
    detector = load("digits")
    detector.predict(names[:1])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    now = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (now + 6, hard))
    try:
        found = detector.predict(names, batch=24)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(found) == 24
    for image in (np.zeros((16, 16, 3), np.uint8), torch.zeros(3, 16, 16)):
        assert len(detector.predict((image for _ in range(3)), batch=2)) == 3
