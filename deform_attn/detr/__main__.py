"""Commands for detectors: ``python -m deform_attn.detr train|evaluate|predict|export|data``."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deform_attn.extras import needs

with needs("detr"):
    import tyro
    from rich.console import Console
    from rich.table import Table

    from deform_attn.checks import as_path, check_integer, check_threshold
    from deform_attn.console import command
    from deform_attn.detr.coco import raise_faults
    from deform_attn.detr.data import folder_of, open_dataset, splits_of
    from deform_attn.detr.device import find_device
    from deform_attn.detr.drawn import DRAWN
    from deform_attn.detr.evaluate import as_text, coco_results, detect, score
    from deform_attn.detr.export import SUFFIXES
    from deform_attn.detr.export import export as export_detector
    from deform_attn.detr.files import check_apart, check_file, make_folder, write
    from deform_attn.detr.folders import AnnotatedFolder
    from deform_attn.detr.hold_out import hold_out as divide_folder
    from deform_attn.detr.images import draw, find_images, read_fault, read_image
    from deform_attn.detr.pictures import draw_sheet, precision_recall
    from deform_attn.detr.predict import open_detector
    from deform_attn.detr.progress import progress
    from deform_attn.detr.train import Text, settings_of, train

PROG = "python -m deform_attn.detr"
FAULTS = (ValueError, OSError, RuntimeError, ArithmeticError, ImportError, MemoryError)
OUT_OF_MEMORY = "allocate memory|not enough memory|out of memory"  # of torch, by device
SIZES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def evaluate(
    model: str,
    data: str,
    split: str = "val",
    batch: int = 16,
    device: Text = "",
    workers: int = 0,
    results: Path | None = None,
    out: Path | None = None,
) -> None:
    """Print the AP of a detector on a data set, in all and of each class and size.

    Classes are compared by name.

    Example: python -m deform_attn.detr evaluate --model RUN/model.pt --data FOLDER --out RUN

    Args:
        model: what `deform_attn.detr.load` takes: model.pt, an official checkpoint, a folder.
        data: shapes, digits, FOLDER, coco:FOLDER, roboflow:FOLDER or yolo:FOLDER.
        split: train, val, test or another of the folder.
        batch: images at a time.
        device: cpu, cuda, ...; by default a GPU, if there is one.
        workers: processes that prepare batches.
        results: JSON file for the detections, in COCO's results format, with the file's ids.
        out: folder for precision_recall.png, with curves of each class.
    """
    if out is not None:
        out = make_folder("out", out)
    if results is not None:
        results = check_file("results", results)
    check_integer("batch", batch, 1)
    detector = open_detector("model", model, find_device(device))
    dataset = open_dataset(
        data, split, detector.size, resize=detector.resize, classes=detector.classes
    )
    for name, folder in (("out", out), ("results", results and results.parent)):
        if folder is not None and isinstance(dataset, AnnotatedFolder):
            dataset.check_apart(name, folder, annotations=name == "results")
    if list(dataset.classes) != list(detector.classes):
        raise ValueError(f"data: expected the classes {detector.classes}, got {dataset.classes}")
    if out is not None and dataset.most_objects == 0:
        raise ValueError(
            f"out: expected objects in {split}, of which precision_recall.png has curves, got "
            "none; without --out, the detections can be written with --results"
        )
    parts = (detector.model, detector.postprocess, dataset, batch)
    with progress("evaluates images", len(dataset)) as advance:
        found = detect(*parts, observe=lambda _, targets: advance(len(targets)), workers=workers)
    coco = dataset.ground_truth()
    scores = score(coco, found)
    table = Table("", split, box=None)
    for name, value in scores.metrics.items():
        table.add_row(name, as_text(value))
    _print(table)
    table = Table("class", "objects", *SIZES, box=None)
    for label, name in enumerate(scores.classes):
        numbers = [as_text(value) for value in scores.of_class(label).values()]
        table.add_row(name, str(scores.objects[label]), *numbers)
    _print(table)
    if results is not None:
        rows = coco_results(coco, found)
        if isinstance(dataset, AnnotatedFolder):
            rows = dataset.with_file_ids(rows)
        write(results, lambda f: f.write(json.dumps(rows).encode()))
    if out is not None:
        picture = out / "precision_recall.png"
        figure = precision_recall(scores, f"{model} on {data}, {split}")
        write(picture, lambda f: figure.savefig(f, format="png", dpi=120))
        print(picture)


def predict(
    model: str,
    images: list[str],
    out: Path,
    threshold: float = 0.5,
    batch: int = 16,
    device: Text = "",
) -> None:
    """Detect in images; write pictures with boxes, and detections.json.

    Images that cannot be read are listed at the end; the exit status is then 1.

    Example: python -m deform_attn.detr predict --model digits --images photos/ --out found/

    Args:
        model: what `deform_attn.detr.load` takes.
        images: files, folders or patterns.
        out: folder for the results.
        threshold: lowest score.
        batch: images at a time.
        device: cpu, cuda, ...; by default a GPU, if there is one.
    """
    check_integer("batch", batch, 1)
    check_threshold("threshold", threshold)
    detector = open_detector("model", model, find_device(device))
    files = find_images(images)
    out = make_folder("out", out)
    check_apart("out", out, [place for f in files for place in (f.parent, f.resolve().parent)])
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    try:
        with progress("predicts images", len(files)) as advance:
            for first in range(0, len(files), batch):
                numbered = dict(enumerate(files[first : first + batch], first))
                try:
                    found = detector.predict(numbered.values(), threshold, batch)
                except (OSError, ValueError):
                    numbered = _readable(numbered, faults)
                    found = detector.predict(numbered.values(), threshold, batch)
                for (number, file), one in zip(numbered.items(), found):
                    rows.append(_drawn(number, file, one, out))
                advance(batch)
    finally:  # after Ctrl-C too
        write(out / "detections.json", lambda f: f.write(json.dumps(rows, indent=1).encode()))
    print(f"{sum(len(row['names']) for row in rows)} detections in {len(rows)} images: {out}")
    raise_faults(f"images: expected {len(files)} that can be read, got {len(rows)}", faults)


def _readable(files: dict[int, Path], faults: list[str]) -> dict[int, Path]:
    """The files that are images; adds the reasons why others are not to ``faults``."""
    found = {number: read_fault(file) for number, file in files.items()}
    faults += filter(None, found.values())
    return {number: file for number, file in files.items() if not found[number]}


def _drawn(number: int, file: Path, found: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write a picture with the boxes; the entry of ``detections.json``."""
    stem = os.fsencode(file.stem)[:200].decode(errors="ignore")  # names have at most 255 bytes
    picture = f"{number:05d}_{stem}.png"
    drawn = draw(read_image(file), found)
    write(out / picture, functools.partial(drawn.save, format="PNG"), sync=False)
    numbers = {key: found[key].tolist() for key in ("boxes", "scores", "labels")}
    return {"file": str(file), "picture": picture, **numbers, "names": found["names"]}


def export(model: str, file: Path, size: int = 0) -> None:
    """Write a detector with its postprocessing: ONNX, exported program or TorchScript trace.

    Example: python -m deform_attn.detr export --model RUN/model.pt --file detector.onnx

    Args:
        model: what `deform_attn.detr.load` takes.
        file: with the suffix .onnx, .pt2 or .torchscript.
        size: side of the images in pixels; 0: that of the detector.
    """
    file = check_file("file", file, SUFFIXES)
    detector = open_detector("model", model)
    error = export_detector(detector.model, detector.postprocess, file, size or detector.size)
    print(f"{file}: boxes and scores differ by {error:.2g} from the model's")


def data(
    data: str,
    split: Text = "",
    sheet: Path | None = None,
    samples: int = 12,
    hold_out: float = 0.0,
    seed: int = 0,
) -> None:
    """Check a data set, count its objects, draw a sheet of samples, or divide its images.

    The images of a folder are read to the last pixel. Other commands read them when they need them.

    With hold_out, a folder with annotations of one split gets hold_out/train.json and
    hold_out/val.json, which later commands use instead. Nothing is overwritten.

    Examples: python -m deform_attn.detr data --data FOLDER --sheet sheet.png;
    python -m deform_attn.detr data --data FOLDER --hold-out 0.2

    Args:
        data: shapes, digits, FOLDER, coco:FOLDER, roboflow:FOLDER or yolo:FOLDER.
        split: train, val, test or another; by default all of them.
        sheet: PNG file for samples of the first one, with their boxes.
        samples: number of them.
        hold_out: fraction of images, such as 0.2, that become val, as above. 0: none.
        seed: of the images that are held out.
    """
    check_integer("samples", samples, 1)
    if sheet is not None:
        sheet = check_file("sheet", sheet, (".png",))
    if hold_out:
        if data in DRAWN:
            raise ValueError(f"data: expected a folder to divide, got {data!r}, which has splits")
        folder, layout = folder_of(data)
        print(*divide_folder(folder, hold_out, seed, layout))
    names = [split] if split else sorted(splits_of(data), key=_order)
    classes = None
    sets = {}
    for name in names:
        sets[name] = open_dataset(data, name, resize="fit", classes=classes)
        classes = sets[name].classes
    folders = {name: one for name, one in sets.items() if isinstance(one, AnnotatedFolder)}
    if sheet is not None:
        for annotated in folders.values():
            annotated.check_apart("sheet", sheet.parent)
    for name, one in sets.items():
        objects = [row["image_id"] for row in one.ground_truth()["annotations"]]
        empty = len(one) - len(set(objects))
        most = f"at most {one.most_objects} per image"
        print(f"{name}: {len(one)} images, {empty} without objects; {len(objects)} objects, {most}")
    table = Table("class", *names, box=None)
    counts = [
        Counter(row["category_id"] for row in one.ground_truth()["annotations"])
        for one in sets.values()
    ]
    for label, name in enumerate(classes or ()):
        table.add_row(name, *(str(count[label]) for count in counts))
    _print(table)
    if sheet is not None:
        draw_sheet(next(iter(sets.values())), sheet, samples)
        print(sheet)
    faults = [f"{name}: {fault}" for name, one in folders.items() for fault in one.pixel_faults()]
    raise_faults("data: expected images that can be read", faults)


def _print(table: Table) -> None:
    Console(markup=False, highlight=False).print(table)  # names may contain brackets


def _order(split: str) -> tuple[int, str]:
    """Training images first: their classes number those of the others."""
    starts = [split.startswith(name) for name in ("train", "val", "test")]
    return starts.index(True) if any(starts) else 3, split


def _train_command(arguments: Sequence[str]) -> Callable[..., Any]:
    """``train``; with ``--resume``, options that are not given have the values of that run.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: damaged, or no training; or its data is no more in its place.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path, nargs="?")
    parser.add_argument("--data", nargs="?")
    given = parser.parse_known_args(arguments)[0]
    if given.resume in (None, Path("None")):  # help shows None as the default
        return train
    run = as_path("resume", given.resume)
    settings = settings_of(run)
    if given.data is None:
        try:
            splits_of(settings.data)
        except ValueError as error:
            raise ValueError(f"{error}; --data gives the new place of the data") from error
    return functools.partial(train, settings=settings, out=run if run.is_dir() else run.parent)


def main() -> None:
    """Read the command line and run a command."""
    commands: dict[str, Any] = {
        "train": train,
        "evaluate": evaluate,
        "predict": predict,
        "export": export,
        "data": data,
    }
    with command():
        try:
            _check_values(sys.argv[1:])
            if sys.argv[1:2] == ["train"]:
                commands["train"] = _train_command(sys.argv[2:])
            tyro.extras.subcommand_cli_from_dict(
                commands, prog=PROG, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)
            )
        except BrokenPipeError:
            raise
        except FAULTS as error:
            text = str(error)
            if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, text):
                text = (
                    f"memory: {text.splitlines()[0] if text else 'exhausted'}; choose a smaller "
                    "--size or --batch; train: also --accumulate with a smaller --batch, and "
                    "--recompute 1"
                )
            if "\nOriginal Traceback" in text:  # of a process of the data loader
                text = text.rpartition(f"\n{type(error).__name__}: ")[2]
            sys.exit(f"{PROG}: error: {text.strip()}")


def _check_values(arguments: Sequence[str]) -> None:
    """Raise a ValueError for an empty value: as a path it would be the current folder."""
    option = "arguments"
    for word in arguments:
        name, sign, value = word.partition("=")
        if name.startswith("--"):
            option = name[2:].replace("-", "_")
        if not word or (name.startswith("--") and sign and not value):
            raise ValueError(
                f"{option}: expected a value, got ''; an option that is left out has its default"
            )


if __name__ == "__main__":
    main()
