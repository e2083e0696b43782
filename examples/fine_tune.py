"""Fine-tunes the shipped detector of digits to three other classes: ``make demo``.

It writes a folder in COCO's format, 60 photographs to train on and 60 others with stars, rings and
crosses, trains for 200 steps from the weights of ``digits``, and draws what it finds in four
photographs. With ``--compare`` it also trains for 800 steps from random weights, and fails if the
fine-tuned detector's AP is lower.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw

from deform_attn.detr import load
from deform_attn.detr.data import write_coco
from deform_attn.detr.drawn import Digits
from deform_attn.detr.images import draw, read_image
from deform_attn.detr.train import Settings, train

STEPS, STEPS_FROM_NOTHING = 200, 800
ENLARGED = 4  # drawn larger, for smooth edges


class Signs(Digits):
    """One to four stars, rings and crosses on the photographs of the digits, 128 x 128 pixels."""

    classes = ("star", "ring", "cross")
    flips, most_objects = True, 4
    lengths: ClassVar = {"train": 60, "val": 60}

    def draw(
        self, rng: np.random.Generator, size: int
    ) -> tuple[Image.Image, list[list[float]], list[int]]:
        """Signs that do not overlap, light on dark parts of the photograph, dark on light."""
        canvas = self.background(rng, size)
        taken = np.zeros((size, size), bool)
        boxes: list[list[float]] = []
        labels: list[int] = []
        count = int(rng.integers(1, self.most_objects + 1))
        while len(boxes) < count:
            label, side = int(rng.integers(len(self.classes))), int(rng.uniform(0.15, 0.36) * size)
            ink = sign(self.classes[label], side, rng.uniform(0, 2 * math.pi))
            x, y = (int(rng.uniform(0, size - side)) for _ in range(2))
            if taken[y : y + side, x : x + side].any():
                continue
            taken[y : y + side, x : x + side] = True
            under = np.asarray(canvas.crop((x, y, x + side, y + side)).convert("L")).mean()
            color = rng.integers(176, 256, 3) if under < 128 else rng.integers(0, 80, 3)
            canvas.paste(tuple(int(c) for c in color), (x, y), ink)
            rows, columns = np.nonzero(np.asarray(ink) > 127)
            corners = (x + columns.min(), y + rows.min(), x + columns.max() + 1, y + rows.max() + 1)
            boxes.append([float(corner) for corner in corners])
            labels.append(label)
        return canvas, boxes, labels


def sign(name: str, side: int, angle: float) -> Image.Image:
    """The ink (0 to 255) of a sign in a square, turned by an angle."""
    fine = side * ENLARGED
    image = Image.new("L", (fine, fine))
    pen = ImageDraw.Draw(image)
    centre = radius = fine / 2
    if name == "ring":
        pen.ellipse((0, 0, fine - 1, fine - 1), outline=255, width=fine // 6)
    elif name == "star":
        tips = [(angle + i * math.pi / 5, radius * (0.4 if i % 2 else 1)) for i in range(10)]
        pen.polygon([(centre + r * math.cos(a), centre + r * math.sin(a)) for a, r in tips], 255)
    else:
        for turn in (angle, angle + math.pi / 2):
            x, y = radius * math.cos(turn), radius * math.sin(turn)
            pen.line((centre - x, centre - y, centre + x, centre + y), 255, fine // 5)
    return image.resize((side, side), Image.Resampling.BOX)


def run(folder: Path, out: Path, steps: int, **settings: Any) -> float:
    """Train, and return the AP on the test images."""
    options = {"size": 128, "batch": 8, "evaluate_every": steps // 4, "save_every": steps}
    history = train(Settings(data=f"coco:{folder}", steps=steps, **options, **settings), out)
    return float(history["ap"][-1]["AP"])


def show(model: Path, images: list[Path], file: Path) -> None:
    """What a detector finds, side by side."""
    detector = load(model)
    drawn = [
        draw(read_image(image), found).resize((384, 384))
        for image, found in zip(images, detector.predict(images, threshold=0.4))
    ]
    sheet = Image.new("RGB", (384 * len(drawn), 384))
    for i, image in enumerate(drawn):
        sheet.paste(image, (384 * i, 0))
    sheet.save(file)


def main() -> None:
    """Write the folder, fine-tune, draw, and compare if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/fine_tune"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--compare", action="store_true", help="also train from random weights")
    given = parser.parse_args()
    folder, tuned = given.out / "data", given.out / "tuned"
    for old in (folder, tuned):
        shutil.rmtree(old, ignore_errors=True)
    for split in ("train", "val"):
        write_coco(Signs(split), folder, split)
    torch.set_num_threads(max(1, min(2, torch.get_num_threads())))
    reached = run(folder, tuned, given.steps, init="digits")
    print(f"fine-tuned in {given.steps} steps: AP {reached:.3f}; {tuned / 'curves.png'}")
    images = sorted((folder / "val").glob("*.png"))[:4]
    show(tuned / "model.pt", images, given.out / "found.png")
    print(given.out / "found.png")
    if given.compare:
        nothing = run(folder, given.out / "nothing", STEPS_FROM_NOTHING, recipe="rtdetr")
        print(f"from random weights in {STEPS_FROM_NOTHING} steps: AP {nothing:.3f}")
        if reached < nothing:
            raise SystemExit(f"expected an AP of at least {nothing:.3f} by fine-tuning")


if __name__ == "__main__":
    main()
