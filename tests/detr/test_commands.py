"""The commands, on a folder made by the test, and fine-tuning."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from deform_attn.detr import __main__ as commands
from deform_attn.detr import load
from deform_attn.detr.data import Digits
from deform_attn.detr.export import export
from deform_attn.detr.recipes import build
from deform_attn.detr.train import Settings, train, transfer

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six digits as photographs, in COCO's format; the class "7" is missing from the file."""
    path = tmp_path_factory.mktemp("coco")
    (path / "annotations").mkdir()
    for split in ("train", "val"):
        dataset = Digits("val")
        dataset.lengths = {"train": 6, "val": 6}  # type: ignore[misc]
        coco = dataset.ground_truth()
        coco["images"] = [one | {"file_name": f"{one['id']}.png"} for one in coco["images"]]
        coco["annotations"] = [one for one in coco["annotations"] if one["category_id"] != 7]
        coco["categories"] = [one for one in coco["categories"] if one["id"] != 7]
        (path / split).mkdir()
        for i in range(6):
            pixels = (dataset[i][0] * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(path / split / f"{i}.png")
        (path / f"annotations/instances_{split}.json").write_text(json.dumps(coco))
    return path


def run(monkeypatch: Patch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["detr", *map(str, arguments)])
    commands.main()


def test_evaluate(
    folder: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Capture,
) -> None:
    """Labels are compared by name; undefined numbers are dashes."""
    results = tmp_path / "results.json"
    arguments = ["--model", "digits", "--data", f"coco:{folder}", "--results", results]
    run(monkeypatch, "evaluate", *arguments)
    rows = dict(
        line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2
    )
    assert float(rows["AP50"]) > 0.5
    assert rows["AP_large"] == rows["7"] == "-"
    assert {"image_id", "category_id", "bbox", "score"} == set(json.loads(results.read_text())[0])
    with pytest.raises(SystemExit, match="error: name_or_path: expected one of"):
        run(monkeypatch, "evaluate", "--model", "letters", "--data", "shapes")


def test_predict(
    folder: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Capture,
) -> None:
    """A folder and a pattern, in several batches."""
    images = ["--images", folder / "val", str(folder / "train" / "[01].png")]
    run(monkeypatch, "predict", "--model", "digits", *images, "--out", tmp_path, "--batch", 3)
    rows = json.loads((tmp_path / "detections.json").read_text())
    assert [Path(row["file"]).name for row in rows][-2:] == ["0.png", "1.png"]
    assert len(rows) == 8
    assert all((tmp_path / row["picture"]).exists() for row in rows)
    assert sum(len(row["names"]) for row in rows) > 5
    assert "in 8 images" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected a file, a folder or a pattern, got 'none'"):
        run(monkeypatch, "predict", "--model", "digits", "--images", "none", "--out", tmp_path)


def test_data(
    folder: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Capture,
) -> None:
    run(monkeypatch, "data", "--data", f"coco:{folder}", "--sheet", tmp_path / "sheet.png")
    assert capsys.readouterr().out.startswith("6 images, ")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (1200, 600)


@pytest.mark.parametrize(
    ("recipe", "suffix"), [("rtdetr", ".onnx"), ("stewart", ".onnx"), ("dino", ".pt2")]
)
def test_export_has_a_dynamic_batch(recipe: str, suffix: str, tmp_path: Path) -> None:
    """What was written is compared with the model, with another batch."""
    model, _, postprocess = build(recipe, 3, 32, 1, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    file = tmp_path / f"detector{suffix}"
    assert export(model.eval(), postprocess, file, (64, 96)) < 1e-2
    assert file.stat().st_size > 1000
    with pytest.raises(ValueError, match=r"expected a suffix of \.onnx, .*, got 'a\.bin'"):
        export(model, postprocess, "a.bin", 64)


def test_weights_are_transferred_by_the_names_of_the_classes() -> None:
    source = build("rtdetr", 3, 32, 1, 10).model
    model = build("rtdetr", 4, 32, 1, 10).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = transfer(model, source, ["dog", "cat", "bird", "fish"], ["cat", "horse", "dog"])
    after, given = model.state_dict(), source.state_dict()
    per_class = {name for name in after if "class_head" in name or "label_embed" in name}
    assert set(kept) == per_class
    for name, value in after.items():
        if name not in per_class:
            assert torch.equal(value, given[name])
            continue
        assert torch.equal(value[:2], given[name][[2, 0]])
        assert torch.equal(value[2:4], before[name][2:4])
    assert transfer(model, source, ["cat", "horse", "dog", "cat"], ["cat", "horse", "dog"]) == []


def test_fine_tuning_starts_from_weights(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    settings = {"data": f"coco:{folder}", "init": "digits", "size": 128, "lr": 1e-4}
    settings |= {"freeze": "backbone.", "steps": 2, "batch": 2, "evaluate_every": 2}
    history = train(Settings(**settings), tmp_path)
    assert "drawn anew" not in capsys.readouterr().out  # all classes are known
    detector, shipped = load(tmp_path / "model.pt"), load("digits")
    assert detector.classes == [name for name in shipped.classes if name != "7"]
    assert detector.facts["settings"]["recipe"] == "rtdetr"
    assert history["ap"][-1]["AP50"] > 0.5
    own, given = detector.model.state_dict(), shipped.model.state_dict()
    name = "backbone.stem.conv.weight"
    assert torch.equal(own[name], given[name])
    with pytest.raises(ValueError, match="recipe, model: expected one of them, or init alone"):
        Settings(data="shapes")
