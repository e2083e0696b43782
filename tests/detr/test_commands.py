"""The commands, on a folder made by the test, and fine-tuning."""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from deform_attn.detr import __main__ as commands
from deform_attn.detr import create, load
from deform_attn.detr.augment import AUGMENTATIONS
from deform_attn.detr.data import open_dataset, write_coco
from deform_attn.detr.drawn import Digits, Shapes
from deform_attn.detr.export import difference, export
from deform_attn.detr.folders import AnnotatedFolder
from deform_attn.detr.hold_out import hold_out
from deform_attn.detr.hub import from_transformers
from deform_attn.detr.images import RESIZE, find_images
from deform_attn.detr.models import Detections
from deform_attn.detr.recipes import RECIPES, build
from deform_attn.detr.train import AMP, Settings, settings_of, train, transfer

from .official import official_state

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six digits as photographs, in COCO's format; the class "7" is missing from the file."""
    path = tmp_path_factory.mktemp("coco")
    for split in ("train", "val"):
        dataset = Digits("val")
        dataset.lengths = {"train": 6, "val": 6}  # type: ignore[misc]
        write_coco(dataset, path, split)
        file = path / f"annotations/instances_{split}.json"
        coco = json.loads(file.read_text())
        coco["annotations"] = [one for one in coco["annotations"] if one["category_id"] != 7]
        coco["categories"] = [one for one in coco["categories"] if one["id"] != 7]
        for one in coco["categories"]:
            one["id"] += 20
        for one in coco["annotations"]:
            one["category_id"] += 20
        file.write_text(json.dumps(coco))
    return path


def run(monkeypatch: Patch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["detr", *map(str, arguments)])
    commands.main()


def test_drawn_data_is_not_divided(monkeypatch: Patch) -> None:
    with pytest.raises(SystemExit, match="data: expected a folder to divide, got 'shapes'"):
        run(monkeypatch, "data", "--data", "shapes", "--hold-out", "0.2")


def test_evaluate(
    folder: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Capture,
) -> None:
    """Labels are compared by name; undefined numbers are dashes."""
    results = tmp_path / "results.json"
    arguments = ["--model", "digits", "--data", f"coco:{folder}", "--results", results]
    run(monkeypatch, "evaluate", *arguments, "--out", tmp_path / "out")
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[1:] for line in words if line}
    assert float(rows["AP50"][0]) > 0.5
    assert rows["AP_large"] == ["-"]
    assert rows["7"] == ["0", *"------"]
    assert (tmp_path / "out/precision_recall.png").read_bytes().startswith(b"\x89PNG")
    coco = json.loads((folder / "annotations/instances_val.json").read_text())
    boxes = json.loads(results.read_text())
    assert {"image_id", "category_id", "bbox", "score"} == set(boxes[0])
    assert {one["category_id"] for one in boxes} <= {one["id"] for one in coco["categories"]}
    for wrong, message in (
        (("letters", "shapes"), "error: model: expected one of"),
        (("digits", "shapes"), r"data: expected the classes \['0', .*, got \('disc'"),
        (("digits", f"coco:{folder}", "--batch", 0), "batch: expected at least 1, got 0"),
        (("digits", "shapes", "--device", "tpu"), "device: expected cpu, .*, got 'tpu'"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, "evaluate", "--model", wrong[0], "--data", *wrong[1:])


def test_evaluation_without_objects_draws_no_curves(
    bad: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    for file in bad.glob("*.txt"):
        file.write_text("a.jpg" if file.name == "val.txt" else "")
    results = tmp_path / "results.json"
    command = ("evaluate", "--model", "digits", "--data", bad, "--results", results)
    with pytest.raises(SystemExit, match="out: expected objects in val, of which .*, got none; wi"):
        run(monkeypatch, *command, "--out", tmp_path)
    assert not results.exists()
    run(monkeypatch, *command)
    assert isinstance(json.loads(results.read_text()), list)
    assert "AP50       -" in capsys.readouterr().out


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
    (tmp_path / "detections.json").unlink()
    (tmp_path / "detections.json").mkdir()
    with pytest.raises(SystemExit, match=r"error: .*detections\.json: cannot be written: "):
        run(monkeypatch, "predict", "--model", "digits", *images[:2], "--out", tmp_path)
    interrupt = Mock(side_effect=KeyboardInterrupt)  # a process in the background ignores SIGINT
    monkeypatch.setattr(commands, "find_images", interrupt)
    with pytest.raises(SystemExit) as interrupted:  # without a traceback
        run(monkeypatch, "predict", "--model", "digits", *images[:2], "--out", tmp_path)
    assert interrupted.value.code == 130
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="expected a file, a folder or a pattern, got 'none'"):
        run(monkeypatch, "predict", "--model", "digits", "--images", "none", "--out", tmp_path)
    (tmp_path / "empty").mkdir()
    message = r"images: expected images \(\.jpg, .*\), got the folder '.*empty' without any"
    with pytest.raises(SystemExit, match=message):
        run(
            monkeypatch,
            *("predict", "--model", "digits", "--images", tmp_path / "empty", "--out", tmp_path),
        )
    trained = ("train", "--init", "letters", "--data", "shapes", "--out", tmp_path)
    with pytest.raises(SystemExit, match="error: init: expected one of"):
        run(monkeypatch, *trained)


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A YOLO data set of two images, an image that is cut, and a val split of the good ones."""
    folder = tmp_path / "bad"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg", "cut.jpg"):
        Image.effect_noise((64, 64), 50).convert("RGB").save(folder / name)
        (folder / name).with_suffix(".txt").write_text("0 .5 .5 .5 .5")
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "val.txt").write_text("a.jpg\nb.jpg\n")
    names = ", ".join(map(str, range(10)))
    (folder / "data.yaml").write_text(f"{{train: ., val: val.txt, names: [{names}]}}")
    return folder


def test_predict_leaves_out_images_that_cannot_be_read(
    bad: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """They are listed, with the reasons, and the others written; so are those before Ctrl-C."""
    (bad / "folder.png").mkdir()
    (bad / ".hidden.jpg").touch()
    (bad / f"{'n' * 250}.jpg").symlink_to(bad / "a.jpg")
    command = ("predict", "--model", "digits", "--images", bad, "--out", tmp_path, "--batch", 2)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *command)
    assert re.search(
        r"images: expected 5 that can be read, got 3: 2 faults\n  '.*cut\.jpg': expected an image, "
        r"got .*truncated.*\n  '.*folder\.png': expected an image, got .*Is a directory",
        str(ended.value.code),
    )
    assert f" in 3 images: {tmp_path}" in capsys.readouterr().out
    rows = json.loads((tmp_path / "detections.json").read_text())
    assert [Path(row["file"]).name[:2] for row in rows] == ["a.", "b.", "nn"]
    assert all((tmp_path / row["picture"]).is_file() for row in rows)
    predict = Mock(side_effect=[load("digits").predict([bad / "a.jpg"]), KeyboardInterrupt])
    monkeypatch.setattr("deform_attn.detr.predict.Predictor.predict", predict)
    with pytest.raises(SystemExit):
        run(monkeypatch, *command[:-1], 1)
    assert len(json.loads((tmp_path / "detections.json").read_text())) == 1


def test_a_home_folder_is_found_in_every_path(
    bad: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """The shell leaves ``--out=~/found`` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for suffix in (".jpg", ".txt"):
        (bad / "cut").with_suffix(suffix).unlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(monkeypatch, "predict", "--model=digits", "--images=~/bad/[ab].jpg", "--out=~/found")
    run(monkeypatch, "data", "--data=~/bad", "--split=val", "--sheet=~/sheet.png")
    evaluated = ("evaluate", "--model=digits", "--data=~/bad", "--out=~/curves")
    run(monkeypatch, *evaluated, "--results=~/results.json")
    sizes = ("--width=32", "--layers=1", "--queries=5", "--size=64", "--batch=1", "--steps=1")
    run(monkeypatch, "train", "--recipe=detr", "--data=~/bad", "--out=~/run", *sizes)
    run(monkeypatch, "train", "--resume=~/run")
    short = ("--size=64", "--batch=1", "--steps=1")
    run(monkeypatch, "train", "--init=~/run", "--data=~/bad", "--out=~/next", *short)
    run(monkeypatch, "export", "--model=~/run", "--file=~/detector.torchscript")
    written = (
        "found/detections.json sheet.png curves results.json run/model.pt next/model.pt "
        "detector.torchscript"
    )
    assert all((tmp_path / name).exists() for name in written.split())
    assert not list((tmp_path / "here").iterdir())


def test_data_lists_images_that_cannot_be_read(
    bad: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Other commands stop at the first, with the step that lists all."""
    sheet = tmp_path / "sheet.png"
    message = r"data: expected images that can be read: 1 fault\n  train: '.*cut\.jpg': expected an"
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, "data", "--data", bad, "--sheet", sheet)
    assert "train: 3 images, 0 without objects" in capsys.readouterr().out
    assert sheet.stat().st_size > 0
    run(monkeypatch, "data", "--data", bad, "--split", "val")
    evaluated = ("evaluate", "--model", "digits", "--data", bad, "--split", "train")
    for workers in (0, 1):
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, *evaluated, "--workers", workers)
        text = str(ended.value.code)
        assert re.fullmatch(r".*: error: '.*cut\.jpg': .*; `data --data .*bad` lists all .*", text)
        del ended
        gc.collect()  # ends the process that prepared batches


def test_a_file_or_folder_that_cannot_be_written_is_named_before_the_work(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    (file := tmp_path / "file").write_text("")
    refuse = Mock(side_effect=OSError(30, "Read-only file system"))
    not_a_folder = f"expected a folder to write to, got '{file}': File exists"
    evaluated = ("evaluate", "--model", "none", "--data", "none")
    trained = ("train", "--recipe", "detr", "--width", 32, "--layers", 1, "--data", "shapes")
    for arguments, message in (
        ((*evaluated, "--out", file), f"out: {not_a_folder}"),
        ((*evaluated, "--results", tmp_path), "results: expected a file to write, got the folder"),
        ((*evaluated, "--results", file / "it"), f"results: {not_a_folder}"),
        (("data", "--data", "none", "--sheet", "a.xyz"), r"sheet: .* a suffix of \.png, got 'a"),
        (
            ("export", "--model", "none", "--file", file),
            "file: expected a suffix of .onnx, ",
        ),
        ((*trained, "--out", file), f"out: {not_a_folder}"),
    ):
        with pytest.raises(SystemExit, match=f"error: {message}"):
            run(monkeypatch, *arguments)
    Image.new("RGB", (9, 9)).save(tmp_path / "image.png")
    monkeypatch.setattr("deform_attn.detr.files.tempfile.TemporaryFile", refuse)
    out = tmp_path / "out"
    for arguments in (
        (*trained, "--out", out),
        (*evaluated, "--out", out),
        ("predict", "--model", "digits", "--images", tmp_path, "--out", out),
    ):
        with pytest.raises(
            SystemExit, match="out: expected a folder to write to, got .*: Read-only"
        ):
            run(monkeypatch, *arguments)


def test_results_are_not_written_among_the_images(
    bad: Path, folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Found through a link too; nothing is written."""
    (tmp_path / "link").symlink_to(bad)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.jpg").symlink_to(bad / "a.jpg")
    before = {*bad.rglob("*")} - {*bad.glob(".deform_attn*")}
    found = ("predict", "--model=digits", "--images")
    evaluated = ("evaluate", "--model=digits", "--data", bad)
    trained = ("train", "--recipe=detr", "--data", bad, "--width=32", "--layers=1")
    for argument, words in (
        ("out", (*found, bad, "--out", bad)),
        ("out", (*found, bad / "a.jpg", "--out", tmp_path / "link")),
        ("out", (*found, tmp_path / "other", "--out", bad)),
        ("out", (*evaluated, "--out", bad)),
        ("results", (*evaluated, "--results", bad / "results.json")),
        ("results", (*evaluated[:-1], folder, "--results", folder / "annotations/results.json")),
        ("sheet", ("data", "--data", bad, "--sheet", bad / "sheet.png")),
        ("sheet", ("data", "--data", folder, "--sheet", folder / "val/sheet.png")),
        ("out", (*trained, "--out", bad)),
        ("out", (*trained, "--out", bad / "run")),  # which YOLO's "train: ." includes
    ):
        message = f"{argument}: expected a folder in which no data is found, got '.*; choose "
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, *words)
    assert {*bad.rglob("*")} - {*bad.rglob(".deform_attn*"), *bad.glob(".deform_attn/*")} == before


def test_too_little_memory_is_named(tmp_path: Path, monkeypatch: Patch) -> None:
    """A model whose images take 2**62 bytes, and an error of Python."""
    command = ("predict", "--model=digits", "--images", tmp_path, "--out", tmp_path / "out")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for fault in (lambda *_: torch.empty(2**60), Mock(side_effect=MemoryError)):
        monkeypatch.setattr("deform_attn.detr.predict.Predictor.predict", fault)
        with pytest.raises(SystemExit, match="error: memory: .*; choose a smaller --size or --bat"):
            run(monkeypatch, *command)
    with pytest.raises(SystemExit, match="error: size: expected a number up to 16384, got 999999"):
        run(monkeypatch, "export", "--model=digits", "--file", tmp_path / "a.pt2", "--size=999999")


def test_an_empty_value_is_refused(tmp_path: Path, monkeypatch: Patch) -> None:
    """Such as that of a variable of the shell which is not set; it was the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.png").touch()
    trained = ("train", "--recipe=detr", "--data=shapes")
    for argument, words in (
        ("out", (*trained, "--out", "")),
        ("out", (*trained, "--out=")),
        ("init", (*trained, "--out=run", "--init", "")),
        ("resume", ("train", "--resume", "")),
        ("results", ("evaluate", "--model=digits", "--data=digits", "--results=")),
        ("images", ("predict", "--model=digits", "--images", "image.png", "", "--out=found")),
        ("sheet", ("data", "--data=shapes", "--sheet", "")),
        ("hold_out", ("data", "--data=shapes", "--hold-out=")),
        ("file", ("export", "--model=digits", "--file", "")),
    ):
        with pytest.raises(SystemExit, match=f"error: {argument}: expected a value, got ''; an op"):
            run(monkeypatch, *words)
    assert [file.name for file in tmp_path.iterdir()] == ["image.png"]


def test_data(
    folder: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Capture,
) -> None:
    run(monkeypatch, "data", "--data", f"coco:{folder}", "--sheet", tmp_path / "sheet.png")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[:2]] == ["train: 6 images", "val: 6 images"]
    assert lines[2].split() == ["class", "train", "val"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (1200, 600)
    assert lines[-1] == str(tmp_path / "sheet.png")
    with pytest.raises(SystemExit, match="samples: expected at least 1, got 0"):
        run(monkeypatch, "data", "--data", f"coco:{folder}", "--samples", 0)


def test_names_with_signs_of_markup(
    folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Of terminals and of formulas: they are shown as they are."""
    names = ["[red]", "[/b]", "$x^$", "$\\foo$", *"4567", "[8]", "{9}"]
    for split in ("train", "val"):
        (tmp_path / "$x^$/annotations").mkdir(parents=True, exist_ok=True)
        (tmp_path / "$x^$" / split).symlink_to(folder / split)
        coco = json.loads((folder / f"annotations/instances_{split}.json").read_text())
        for one in coco["categories"]:
            one["name"] = names[int(one["name"])]
        file = tmp_path / f"$x^$/annotations/instances_{split}.json"
        file.write_text(json.dumps(coco))
    data, out = f"coco:{tmp_path / '$x^$'}", tmp_path / "[a]"
    run(monkeypatch, "data", "--data", data, "--sheet", tmp_path / "sheet.png")
    options = ("--data", data, "--steps=1", "--batch=2", "--out", out)
    run(monkeypatch, "train", "--init", "digits", *options)
    run(monkeypatch, "train", "--resume", out)
    run(monkeypatch, "evaluate", "--model", out, "--data", data, "--out", out)
    words = capsys.readouterr().out.split()
    for name in ("[red]", "[/b]", "$x^$", "$\\foo$", "[8]", "{9}"):
        assert words.count(name) == 2, name  # of data and of evaluate
    assert f"{out}/checkpoint.pt" in words
    assert (out / "precision_recall.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("recipe", "suffix"),
    [
        ("stewart", ".onnx"),
        ("dino", ".pt2"),
        ("rtdetr", ".torchscript"),
    ],
)
def test_export_has_a_dynamic_batch(
    recipe: str, suffix: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """What was written is compared with the model, with another batch; nothing is warned of."""
    model, _, postprocess = build(recipe, 3, 32, 1, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    file = tmp_path / f"detector{suffix}"
    assert export(model.eval(), postprocess, file, (64, 96)) < 1e-2
    assert file.stat().st_size > 1000
    assert not recwarn.list
    with pytest.raises(ValueError, match=r"expected a suffix of \.onnx, .*, got 'a\.bin'"):
        export(model, postprocess, "a.bin", 64)
    with pytest.raises(ValueError, match="size: expected at least 1, got -3"):
        export(model, postprocess, file, -3)
    with pytest.raises(TypeError, match=r"size: expected an integer or .*, got '64'"):
        export(model, postprocess, file, "64")  # type: ignore[arg-type]


def test_detections_are_compared_by_pairs() -> None:
    """Detections of nearly equal scores may change places; another label or box is a difference."""
    boxes = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0)) * 50
    scores = torch.tensor([0.9, 0.5, 0.5, 0.4, 0.2]).repeat(2, 1)
    labels = torch.tensor([0, 1, 1, 0, 2]).repeat(2, 1)
    expected = Detections(boxes, scores, labels)
    exchanged = torch.tensor([0, 2, 1, 3])
    found = Detections(*(x[:, exchanged].clone() for x in expected))
    found.scores[1, 0] += 1e-3
    assert difference(expected, found) == pytest.approx(1e-3, rel=1e-3)
    found.boxes[0, 1] += 3
    assert difference(expected, found) == pytest.approx(3, rel=1e-3)
    found.labels[1, 3] = 1
    assert difference(expected, found) == math.inf
    found.boxes[:] = math.nan
    assert difference(expected, found) == math.inf


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
    with pytest.raises(ValueError, match="out: expected another folder than that of init, got"):
        (tmp_path / "checkpoint.pt").unlink()
        train(Settings(**settings | {"init": str(tmp_path / "model.pt")}), tmp_path)
    (tmp_path / "model.pt").rename(tmp_path / "pretrained.pt")  # which no training replaces
    with pytest.raises(ValueError, match="freeze: "):
        train(Settings(**settings | {"init": f"{tmp_path}/pretrained.pt", "freeze": "x"}), tmp_path)
    with pytest.raises(ValueError, match="recipe, model: expected one of them, or init alone"):
        Settings(data="shapes").check()
    with pytest.raises(ValueError, match="queries: expected 20, the default, because dfine_n has"):
        Settings(data="shapes", model="dfine_n", queries=7).check()
    wrong = settings | {"recipe": "rtdetr", "width": 32}
    with pytest.raises(ValueError, match="init: expected weights of rtdetr, got none of its names"):
        train(Settings(**wrong), tmp_path / "other")
    with pytest.raises(ValueError, match=r"freeze: expected the start .*'backbone'.*, got 'body'"):
        train(Settings(**settings | {"freeze": "body"}), tmp_path / "other")


def test_arguments_of_another_type_are_named(folder: Path, tmp_path: Path) -> None:
    settings = Settings(data="shapes", recipe="detr")
    digits, known = load("digits"), {"out": tmp_path / "run"}
    calls: list[tuple[Any, Any, str]] = [
        (train, ({"data": "shapes"}, tmp_path), "settings: expected .*Settings, got {'data': 'sha"),
        (train, (settings, None), "out: expected a path, got None"),
        (train, (settings, ""), "out: expected a path, got ''; '.' is the current folder"),
        (train, (settings, tmp_path, 0, 3), "resume: expected a path, got 3"),
        (settings_of, (known,), "resume: expected a path, got {'out': "),
        (create, (["detr_r50"],), r"name: expected one of .*; got \['detr_r50'\]"),
        (build, ("yolo", 3, 32, 1, 10), "recipe: expected one of .*; got 'yolo'"),
        (open_dataset, (3, "train"), "data: expected the name of a data set or a folder, got 3"),
        (open_dataset, ("shapes", ["val"]), r"split: expected one of train, val; got \['val'\]"),
        (open_dataset, ("shapes", "val", 0, "x"), "seed: expected an integer, got 'x'"),
        (AnnotatedFolder, (None, "train", 32), "folder: expected a path, got None"),
        (AnnotatedFolder, (folder, None, 32), "split: expected a name, got None"),
        (AnnotatedFolder, (folder, "train", 1.5), "size: expected an integer, got 1.5"),
        (AnnotatedFolder, (folder, "train", 32, "fit", None, 3), "layout: expected one of coco, "),
        (hold_out, (3, 0.2), "folder: expected a path, got 3"),
        (hold_out, (str(folder), 0.2, "x"), "seed: expected an integer, got 'x'"),
        (export, (digits.model, digits.postprocess, None, 64), "file: expected a path, got None"),
        (
            export,
            (None, digits.postprocess, "a.onnx", 64),
            "model: expected a torch.nn.Module, got NoneTy",
        ),
        (
            load,
            ("rtdetr_r18",),
            "name_or_path: expected trained weights, .* `train --model rt",
        ),
        (partial(load, model="dfine"), ("digits",), "model: expected .*'dfine', similar: dfine_"),
        (
            partial(load, model="dfine_n"),
            ("digits",),
            "model: expected None, since .*digits.pt' n",
        ),
        (from_transformers, (3,), "name_or_folder: expected a path, got 3"),
        (find_images, (3,), "images: expected files, folders or patterns, got 3"),
        (digits.predict, (["none.png"],), "images: expected a file, got 'none.png': '.' has no '"),
    ]
    for function, arguments, message in calls:
        with pytest.raises((TypeError, ValueError, OSError), match=f"^{message}"):
            function(*arguments)
    assert find_images(folder / "val")[0].name == "0.png"


def test_an_invalid_setting_is_named(monkeypatch: Patch, tmp_path: Path, capsys: Capture) -> None:
    wrong = ["--recipe", "rtdetr", "--data", "shapes", "--out", tmp_path, "--steps", 0]
    with pytest.raises(SystemExit, match="^python -m .*: error: steps: expected at least 1, got 0"):
        run(monkeypatch, "train", *wrong)
    assert capsys.readouterr() == ("", "")  # the parser of the command line prints nothing
    with pytest.raises(SystemExit, match="error: steps: expected at least 1, got 0"):
        run(monkeypatch, "train", *wrong, "--resume", "None")  # the default in the help


def test_a_resumed_training_repeats_no_options(
    folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """A value that contradicts the run is an error before the data is read."""
    run_folder = tmp_path / "run"
    sizes = {"steps": 1, "batch": 2, "width": 32, "layers": 1, "queries": 10, "size": 64}
    settings = Settings(data=f"coco:{folder}", recipe="detr", lr=1e-5, **sizes)
    train(settings, run_folder)
    run(monkeypatch, "train", "--resume", run_folder, "--steps", 2)
    assert "resumes" in capsys.readouterr().out
    assert settings_of(run_folder) == replace(settings, steps=2, augment="flip")
    more = ["--lr=2e-5", "--steps=3", "--out", tmp_path / "next"]
    run(monkeypatch, "train", f"--resume={run_folder}", *more)
    assert settings_of(tmp_path / "next") == replace(settings, steps=3, lr=2e-5, augment="flip")
    moved = tmp_path / "moved"
    shutil.copytree(run_folder, moved)
    saved = torch.load(moved / "checkpoint.pt", weights_only=True)
    saved["settings"]["data"] = "coco:none"
    torch.save(saved, moved / "checkpoint.pt")
    with pytest.raises(SystemExit, match="data: expected a folder, got 'none': .*; --data gives"):
        run(monkeypatch, "train", "--resume", moved)
    run(monkeypatch, "train", "--resume", moved, "--data", f"coco:{folder}")
    monkeypatch.setattr("deform_attn.detr.train.open_dataset", Mock(side_effect=AssertionError))
    for given, message in (
        (("--recipe", "dino"), "recipe: expected 'detr' as in .*, got 'dino'; --init starts"),
        (("--model", "dfine_n"), "recipe, model: expected one of them, got 'detr' and 'dfine_n'"),
        (("--layers", 2), "layers: expected 1 as in .*, got 2; --init starts"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, "train", "--resume", run_folder, *given)
    with pytest.raises(SystemExit, match="resume: expected a checkpoint or its folder, got 'none'"):
        run(monkeypatch, "train", "--resume", "none")
    with pytest.raises(SystemExit, match=r"model\.pt: expected checkpoint\.pt of a training, got"):
        run(monkeypatch, "train", "--resume", run_folder / "model.pt")


def test_help_has_examples_and_names_the_choices(monkeypatch: Patch, capsys: Capture) -> None:
    for name in ("train", "evaluate", "predict", "export", "data"):
        with pytest.raises(SystemExit, match="0"):
            run(monkeypatch, name, "--help")
        text = capsys.readouterr().out
        assert f"python -m deform_attn.detr {name} --" in text
        assert "(default: '')" not in " ".join(text.replace("│", " ").split())  # is refused
        words = set(re.findall(r"\w+", text))
        if name == "train":
            assert {*RECIPES, *AUGMENTATIONS, *AMP, *RESIZE, "rtdetr_r18"} <= words


DOCS = Path(__file__).parents[2] / "docs/detr"


def documented() -> list[str]:
    """The commands of the documentation, with their continuation lines."""
    found = []
    for file in sorted(DOCS.glob("*.md")):
        fences = re.findall(r"^```(\w*)\n(.*?)^```$", file.read_text(), re.MULTILINE | re.DOTALL)
        lines = [line for language, block in fences if not language for line in block.splitlines()]
        found += [line for line in lines if line.startswith("python -m deform_attn.detr ")]
    return found


def test_every_command_of_the_documentation_runs(
    folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """In the order of the pages, at small sizes; each new training in RUN gets a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photographs").symlink_to(folder / "val")
    (tmp_path / "UNDIVIDED/annotations").mkdir(parents=True)
    for name in ("annotations/instances_val.json", "val"):
        (tmp_path / "UNDIVIDED" / name).symlink_to(folder / name)
    torch.save({"model": official_state("dfine_n")}, "dfine_n_coco.pth")
    monkeypatch.setattr(Shapes, "lengths", {"train": 4, "val": 2})
    lines = [line.split()[3:] for line in documented()]
    assert {words[0] for words in lines} == {"train", "evaluate", "predict", "export", "data"}
    runs = 0
    for words in lines:
        runs += words[-2:] == ["--out", "RUN"]
        words = [word.replace("FOLDER", str(folder)) for word in words]
        words = [re.sub(r"^RUN\b", f"RUN{runs}", word) for word in words]
        if words[0] == "train":
            steps = 2 if "--resume" in words else 1
            words += ["--steps", str(steps), "--batch", "2", "--evaluate-every", "1"]
        if "--recipe" in words:
            words += ["--width", "32", "--layers", "1", "--queries", "10"]
        if words[0] in ("train", "export") and "--size" not in words:
            words += ["--size", "320" if "--model" in words and words[0] == "train" else "64"]
        run(monkeypatch, *words)
        capsys.readouterr()
    written = [f"{name}/curves.png" for name in ("NEXT", *(f"RUN{i + 1}" for i in range(runs)))]
    written += ["results.json", "found/detections.json", "sheet.png", "detector.onnx"]
    written.append("UNDIVIDED/hold_out/val.json")
    assert all((tmp_path / file).stat().st_size > 0 for file in written)
