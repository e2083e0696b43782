"""Finds handwritten digits on a photograph with the shipped detector: ``make demo``.

It runs with every backend that can run here, and all of them must find the same boxes. The picture
shows the boxes, and the sampling points of the decoder's last layer for one of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from rich.console import Console
from rich.table import Table

from deform_attn import BACKENDS, use_backend, viz
from deform_attn.detr import load
from deform_attn.detr.drawn import Digits

TOLERANCE = 1e-4  # of the picture's side, and of a score
SIDE = 768  # pixels of the picture
COLORS = {True: "#00a651", False: "#d62728"}  # right, wrong


def picture(seed: int) -> tuple[Image.Image, list[list[float]], list[int]]:
    """Digits and a photograph that are not in the training data; boxes and labels."""
    return Digits("val").draw(np.random.default_rng(seed), SIDE)


def detect(image: Image.Image, device: str) -> dict[str, dict[str, Any]]:
    """Results of each backend that runs on the device; asserts that they agree."""
    predictor = load("digits", device)
    found = {}
    for name, backend in BACKENDS.items():
        if backend.why_not(device, torch.float32) is None:
            with use_backend(name):
                found[name] = predictor.predict([image])[0]
    first = next(iter(found.values()))
    for name, other in found.items():
        if other["names"] != first["names"]:
            raise AssertionError(f"{name}: expected {first['names']}, got {other['names']}")
        for what, scale in (("boxes", SIDE), ("scores", 1)):
            error = ((other[what] - first[what]).abs().max() / scale).item()
            if not error <= TOLERANCE:
                raise AssertionError(f"{name}: {what} differ by {error}, at most {TOLERANCE}")
    return found


def draw(image: Image.Image, found: dict[str, Any], targets: tuple[Any, Any], file: Path) -> None:
    """Draw boxes and scores, and the sampling points of the detection with the highest score."""
    predictor = load("digits")
    with torch.no_grad(), viz.record(predictor.model) as seen:
        predictor.predict([image])
    layer = seen[-1]  # the last of the decoder
    query = viz.choose_query(layer, image, box=tuple(found["boxes"][0].tolist()))

    figure = Figure((12.4, 6.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(image)
    left.set(xticks=[], yticks=[])
    for box, name, score in zip(found["boxes"].tolist(), found["names"], found["scores"].tolist()):
        color = COLORS[is_right(box, name, *targets)]
        x1, y1, x2, y2 = box
        left.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linewidth=2))
        label = {"color": "white", "fontsize": 10, "va": "bottom", "ha": "left"}
        around = {"facecolor": color, "edgecolor": color, "pad": 1.5}
        left.text(x1, y1 - 3, f"{name}  {score:.2f}", bbox=around, **label)
    detections = list(zip(found["boxes"].tolist(), found["names"]))
    hits = sum(
        any(is_right(*one, [box], [label]) for one in detections) for box, label in zip(*targets)
    )
    title = f"{hits} of {len(targets[0])} digits found, {len(detections)} detections"
    left.set_title(title, loc="left")
    viz.draw(image, layer, query, axes=right)
    right.set_title(
        f"sampling points of the decoder's last layer for the {found['names'][0]}", loc="left"
    )
    right.legend(loc="upper left", bbox_to_anchor=(0, 0), ncols=3, frameon=False, fontsize=9)
    figure.savefig(file, dpi=100, bbox_inches="tight")


def is_right(box: list[float], name: str, boxes: list[list[float]], labels: list[int]) -> bool:
    """Whether a digit of that name overlaps the box with an IoU of at least 0.5."""

    def iou(other: list[float]) -> float:
        sides = [min(box[i + 2], other[i + 2]) - max(box[i], other[i]) for i in (0, 1)]
        shared = max(0.0, sides[0]) * max(0.0, sides[1])
        areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
        return shared / (sum(areas) - shared)

    return any(str(label) == name and iou(b) >= 0.5 for b, label in zip(boxes, labels))


def main() -> None:
    """Detect, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the picture")
    parser.add_argument("--seed", type=int, default=9, help="of the picture")
    arguments = parser.parse_args()
    image, *targets = picture(arguments.seed)
    found = detect(image, "cuda" if torch.cuda.is_available() else "cpu")
    table = Table("digit", *(f"{name}: score and box" for name in found), box=None)
    for i, name in enumerate(next(iter(found.values()))["names"]):
        cells = (
            f"{one['scores'][i]:.6f}  " + " ".join(f"{side:8.3f}" for side in one["boxes"][i])
            for one in found.values()
        )
        table.add_row(name, *cells)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "digits.png"
    draw(image, next(iter(found.values())), tuple(targets), file)
    print(f"{', '.join(found)}: the same to {TOLERANCE}; {file}")


if __name__ == "__main__":
    main()
