"""Commands for detectors: ``python -m deform_attn.detr train|evaluate|predict|export|data``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from deform_attn.detr.data import open_dataset
from deform_attn.detr.evaluate import (
    as_text,
    average_precision,
    class_precision,
    coco_results,
    detect,
)
from deform_attn.detr.export import export as export_detector
from deform_attn.detr.images import draw, find_images, read_image
from deform_attn.detr.predict import load
from deform_attn.detr.train import find_device, train

PROG = "python -m deform_attn.detr"


def _at_least_one(**numbers: int) -> None:
    for name, got in numbers.items():
        if got < 1:
            raise ValueError(f"{name}: expected at least 1, got {got}")


def evaluate(
    model: str,
    data: str,
    split: str = "val",
    batch: int = 16,
    device: str = "",
    results: Path | None = None,
) -> None:
    """Print the AP of a detector on a data set, and the AP of each class.

    Example: python -m deform_attn.detr evaluate --model RUN/model.pt --data coco:FOLDER

    Args:
        model: what `deform_attn.detr.load` takes: model.pt, an official checkpoint, a folder.
        data: shapes, digits or coco:FOLDER; classes are compared by name.
        split: train or val.
        batch: images at a time.
        device: cpu, cuda, ...; by default a GPU, if there is one.
        results: JSON file for the detections, in COCO's results format.
    """
    if results is not None:
        results.parent.mkdir(parents=True, exist_ok=True)
    detector = load(model, find_device(device))
    dataset = open_dataset(
        data, split, detector.size, resize=detector.resize, classes=detector.classes
    )
    if list(dataset.classes) != list(detector.classes):
        raise ValueError(f"data: expected the classes {detector.classes}, got {dataset.classes}")
    found = detect(detector.model, detector.postprocess, dataset, batch)
    coco = dataset.ground_truth()
    table = Table("", "AP", box=None)
    for name, value in average_precision(coco, found).items():
        table.add_row(name, as_text(value))
    for name, value in class_precision(coco, found).items():
        table.add_row(name, as_text(value))
    Console().print(table)
    if results is not None:
        results.write_text(json.dumps(coco_results(coco, found)))


def predict(
    model: str,
    images: list[str],
    out: Path,
    threshold: float = 0.5,
    batch: int = 16,
    device: str = "",
) -> None:
    """Detect in images; write pictures with boxes, and detections.json.

    Example: python -m deform_attn.detr predict --model digits --images photos/ --out found/

    Args:
        model: what `deform_attn.detr.load` takes.
        images: files, folders or patterns.
        out: folder for the results.
        threshold: lowest score.
        batch: images at a time.
        device: cpu, cuda, ...; by default a GPU, if there is one.
    """
    _at_least_one(batch=batch)
    detector = load(model, find_device(device))
    files = find_images(images)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for first in range(0, len(files), batch):
        part = files[first : first + batch]
        for i, (file, found) in enumerate(zip(part, detector.predict(part, threshold, batch))):
            picture = f"{first + i:05d}_{file.stem}.png"
            draw(read_image(file), found).save(out / picture)
            numbers = {key: found[key].tolist() for key in ("boxes", "scores", "labels")}
            rows.append({"file": str(file), "picture": picture, **numbers, "names": found["names"]})
    (out / "detections.json").write_text(json.dumps(rows, indent=1))
    print(f"{sum(len(row['names']) for row in rows)} detections in {len(files)} images: {out}")


def export(model: str, file: Path, size: int = 0) -> None:
    """Write a detector with its postprocessing: ONNX, exported program or TorchScript trace.

    Example: python -m deform_attn.detr export --model RUN/model.pt --file detector.onnx

    Args:
        model: what `deform_attn.detr.load` takes.
        file: with the suffix .onnx, .pt2 or .torchscript.
        size: side of the images in pixels; 0: that of the detector.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    detector = load(model)
    error = export_detector(detector.model, detector.postprocess, file, size or detector.size)
    print(f"{file}: boxes and scores differ by {error:.2g} from the model's")


def data(data: str, split: str = "train", sheet: Path | None = None, samples: int = 12) -> None:
    """Check a data set, count its objects, and draw a sheet of samples.

    Example: python -m deform_attn.detr data --data coco:FOLDER --sheet sheet.png

    Args:
        data: shapes, digits or coco:FOLDER.
        split: train or val.
        sheet: PNG file for samples with their boxes.
        samples: number of them.
    """
    _at_least_one(samples=samples)
    dataset = open_dataset(data, split)
    coco = dataset.ground_truth()
    counts = Counter(one["category_id"] for one in coco["annotations"])
    most = max(Counter(one["image_id"] for one in coco["annotations"]).values(), default=0)
    print(f"{len(dataset)} images, {len(coco['annotations'])} objects, at most {most} per image")
    table = Table("class", "objects", box=None)
    for label, name in enumerate(dataset.classes):
        table.add_row(name, str(counts[label]))
    Console().print(table)
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        _draw_sheet(dataset, sheet, samples)


def _draw_sheet(dataset: Any, file: Path, samples: int) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    number = min(samples, len(dataset))
    columns = min(4, number)
    rows = -(-number // columns)
    figure = Figure((3 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.set_axis_off()
    for panel, i in zip(panels, range(0, len(dataset), max(1, len(dataset) // number))):
        image, target = dataset[i]
        height, width = image.shape[1:]
        panel.imshow(image.permute(1, 2, 0).numpy())
        for (cx, cy, w, h), label in zip(target["boxes"].tolist(), target["labels"].tolist()):
            corner = ((cx - w / 2) * width, (cy - h / 2) * height)
            panel.add_patch(Rectangle(corner, w * width, h * height, fill=False, color="#d62728"))
            panel.text(*corner, dataset.classes[label], color="#d62728", fontsize=8, va="bottom")
    figure.savefig(file, dpi=100)


def main() -> None:
    """Read the command line and run a command."""
    commands: dict[str, Any] = {
        "train": train,
        "evaluate": evaluate,
        "predict": predict,
        "export": export,
        "data": data,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, prog=PROG, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)
        )
    except (ValueError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        sys.exit(f"{PROG}: error: {error}")


if __name__ == "__main__":
    main()
