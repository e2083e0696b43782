"""Pictures of data sets and of their evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deform_attn.detr.evaluate import Scores, as_text, literal_text
from deform_attn.detr.files import write
from deform_attn.detr.images import COLOURS
from deform_attn.detr.samples import Detection

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@literal_text
def draw_sheet(dataset: Detection, file: Path, samples: int = 12) -> None:
    """Write a PNG with some images of a data set, evenly spaced, with boxes and class names.

    A panel stays empty where the image cannot be read.
    """
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
        try:
            image, target = dataset[place * len(dataset) // number]
        except ValueError:
            panel.set_title("cannot be read", fontsize=7, color="#d62728")
            continue
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
    write(file, lambda f: figure.savefig(f, format="png", dpi=100))


@literal_text
def precision_recall(scores: Scores, title: str) -> Figure:
    """Draw the precision at each recall, of each class and their mean.

    The panels are for the IoU 0.5, 0.75, and the mean over 0.5 to 0.95. Classes without objects are
    left out, and named below. Of more than 20 classes the five with the lowest AP are named.

    Raises:
        ValueError: no class has objects.
    """
    import matplotlib
    from matplotlib.figure import Figure

    of_class = {label: scores.of_class(label) for label in range(len(scores.classes))}
    known = [label for label in of_class if scores.objects[label]]
    if not known:
        raise ValueError("scores: expected objects to find, got none")
    lowest_first = sorted(known, key=lambda label: of_class[label]["AP"] or 0)
    named = lowest_first[::-1] if len(known) <= 20 else lowest_first[:5][::-1]
    colours = matplotlib.colormaps["tab10" if len(named) <= 10 else "tab20"]
    colour_of = {label: colours(i) for i, label in enumerate(sorted(named))}
    figure = Figure((12, 4.3), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    precision = scores.precision[:, :, :, 0]
    recall = np.linspace(0, 1, precision.shape[1])
    kinds = [("IoU 0.50", "AP50", precision[0]), ("IoU 0.75", "AP75", precision[5])]
    kinds.append(("mean over IoU 0.50 to 0.95", "AP", precision.mean(0)))
    lines: dict[int, Any] = {}
    for panel, (kind, metric, curves) in zip(panels, kinds):
        for label in known:
            if label not in colour_of:
                panel.plot(*_reached(recall, curves[:, label]), color="#bbbbbb", linewidth=0.6)
        for label, colour in colour_of.items():
            style = {"color": colour, "linewidth": 1.3, "alpha": 0.9}
            (lines[label],) = panel.plot(*_reached(recall, curves[:, label]), **style)
        mean = curves[:, known].mean(1)
        panel.fill_between(recall, mean, color="#000000", alpha=0.05, linewidth=0)
        (lines[-1],) = panel.plot(*_reached(recall, mean), color="black", linewidth=2.6)
        panel.set_title(kind, loc="left", fontsize=10, color="#444444")
        text = f"{metric} {as_text(scores.metrics[metric])}"
        panel.set_title(text, loc="right", fontsize=11, fontweight="bold")
        panel.set(xlim=(0, 1.01), ylim=(0, 1.02), xlabel="recall")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
    panels[0].set_ylabel("precision")
    texts = [f"{as_text(of_class[label]['AP'])}  {scores.classes[label]}" for label in named]
    figure.legend(
        [lines[-1], *(lines[label] for label in named)],
        [f"{as_text(scores.metrics['AP'])}  mean of {len(known)}", *texts],
        loc="outside right center",
        title="AP by class" if len(named) == len(known) else "lowest AP by class",
        frameon=False,
        alignment="left",
        fontsize=9 if len(named) <= 12 else 7,
    )
    missing = [name for label, name in enumerate(scores.classes) if label not in known]
    if missing:
        shown = ", ".join(missing[:12]) + (f" and {len(missing) - 12} more" if missing[12:] else "")
        figure.supxlabel(f"without objects: {shown}", fontsize=9, color="#666666")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _reached(recall: np.ndarray, precision: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve up to the recall that is reached, and from there down to 0."""
    end = int((precision > 0).sum())
    if end == len(recall):
        return recall, precision
    drop = recall[max(end - 1, 0)]
    return np.append(recall[:end], drop), np.append(precision[:end], 0.0)
