"""Pictures of data sets and of their evaluation."""

from __future__ import annotations

from pathlib import Path

from deform_attn.detr.data import Detection
from deform_attn.detr.images import COLOURS


def draw_sheet(dataset: Detection, file: Path, samples: int = 12) -> None:
    """Write a PNG with some images of a data set, evenly spaced, with boxes and class names."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    number = min(samples, len(dataset))
    columns = min(4, number)
    rows = -(-number // columns)
    figure = Figure((3 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.set_axis_off()
    for place, panel in enumerate(panels[:number]):
        image, target = dataset[place * len(dataset) // number]
        height, width = image.shape[1:]
        panel.imshow(image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
        for (cx, cy, w, h), label in zip(target["boxes"].tolist(), target["labels"].tolist()):
            x, y = (cx - w / 2) * width, (cy - h / 2) * height
            colour = COLOURS[label % len(COLOURS)]
            panel.add_patch(
                Rectangle((x, y), w * width, h * height, fill=False, color=colour, linewidth=1.5)
            )
            above = y > height / 12
            panel.text(
                x,
                y,
                dataset.classes[label],
                color="white",
                fontsize=7,
                va="bottom" if above else "top",
                clip_on=True,
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 1},
            )
        if not len(target["labels"]):
            panel.set_title("no objects", fontsize=7, color="#666666")
    figure.savefig(file, dpi=100)
