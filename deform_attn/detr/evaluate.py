"""Average precision as COCO defines it, computed by faster-coco-eval, and curves of a training."""

from __future__ import annotations

import functools
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from deform_attn.checks import check_integer
from deform_attn.detr.augment import collate
from deform_attn.detr.models import Postprocess
from deform_attn.detr.samples import Detection
from deform_attn.extras import needs

Drawn = ParamSpec("Drawn")
Picture = TypeVar("Picture")
MOST_WORKERS = 1024  # processes that prepare batches
NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100")


def started(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader, whose processes leave Ctrl-C to this one.

    A process inherits the signals that are blocked where it is started; Windows has no such thing.
    """
    if not hasattr(signal, "pthread_sigmask"):
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def detect(
    model: nn.Module,
    postprocess: Postprocess,
    dataset: Detection,
    batch: int = 16,
    part: tuple[int, int] = (0, 1),
    observe: Callable[[dict[str, Any], list[dict[str, Tensor]]], None] | None = None,
    workers: int = 0,
) -> list[dict[str, Tensor]]:
    """Detections in all images of a data set.

    Args:
        model: called in evaluation mode, on its own device and in its own dtype, with images
            ``[B, 3, H, W]`` and their padding mask ``[B, H, W]`` or None.
        postprocess: of its outputs and sizes ``[B, (height, width)]`` to boxes ``(x1, y1, x2, y2)``
            in pixels, scores and labels of each image.
        dataset: the images.
        batch: images per call of the model.
        part: (i, n): the i-th of n consecutive parts of the images, for a process of several.
        observe: called with the outputs and the targets of each batch.
        workers: processes that prepare batches.

    Returns:
        For each image what ``postprocess`` gives, in pixels of the file.

    Raises:
        TypeError: ``batch`` or ``workers`` is no integer.
        ValueError: ``batch`` is below 1, or ``workers`` below 0 or above 1024.
    """
    check_integer("batch", batch, 1)
    check_integer("workers", workers, 0, MOST_WORKERS)
    begin, end = (len(dataset) * i // part[1] for i in (part[0], part[0] + 1))
    facts = dataset.ground_truth()["images"]
    parameter = next(model.parameters())
    device = parameter.device
    sizes = torch.tensor([[one["height"], one["width"]] for one in facts])
    detections: list[dict[str, Tensor]] = []
    images_of: Any = Subset(dataset, range(begin, end))  # type: ignore[arg-type]
    loader = DataLoader(
        images_of,
        batch,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    training = model.training
    model.eval()
    with torch.no_grad():
        for images, mask, targets in started(loader):
            mask = None if mask is None else mask.to(device)
            outputs = model(images.to(parameter), mask)
            if observe is not None:
                observe(outputs, [{k: t.to(device) for k, t in one.items()} for one in targets])
            first = begin + len(detections)
            detections += postprocess(outputs, sizes[first : first + len(images)].to(device))
    model.train(training)
    return detections


def evaluate(
    model: nn.Module, postprocess: Postprocess, dataset: Detection, batch: int = 16
) -> dict[str, float | None]:
    """The AP of a model on a data set: :func:`detect`, then :func:`average_precision`."""
    detections = detect(model, postprocess, dataset, batch)
    return average_precision(dataset.ground_truth(), detections)


def average_precision(
    ground_truth: dict[str, Any], detections: list[dict[str, Tensor]]
) -> dict[str, float | None]:
    """COCO's metrics for the detections in each image.

    Args:
        ground_truth: ``images``, ``annotations`` and ``categories``; labels number the categories
            in the order of their ids.
        detections: for each image ``boxes [n, 4]``, ``(x1, y1, x2, y2)`` in pixels, ``scores [n]``
            and ``labels [n]``; the 100 best of a class count.

    Returns:
        ``AP``, ``AP50``, ... in [0, 1]; None where there is no object to find.

    Example:
        >>> import torch
        >>> from deform_attn.detr.evaluate import average_precision
        >>> ground_truth = {
        ...     "images": [{"id": 1, "height": 9, "width": 9}],
        ...     "categories": [{"id": 7, "name": "cat"}],
        ...     "annotations": [
        ...         {"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 1, 4, 4], "area": 16,
        ...          "iscrowd": 0}
        ...     ],
        ... }
        >>> found = {"boxes": [[1.0, 1, 5, 4]], "scores": [0.9], "labels": [0]}  # IoU 0.75
        >>> found = {name: torch.tensor(numbers) for name, numbers in found.items()}
        >>> result = average_precision(ground_truth, [found])
        >>> round(result["AP50"], 2), result["AP_large"]
        (1.0, None)
    """
    return score(ground_truth, detections).metrics


@dataclass(frozen=True)
class Scores:
    """COCO's metrics of a detector on a data set.

    Attributes:
        metrics: ``AP``, ``AP50``, ... in [0, 1]; None where there is no object to find.
        classes: names, by label.
        objects: number of each class, without crowds.
        precision: ``[IoU, recall, class, area]``, the highest at that recall or above. IoU is 0.5,
            0.55, ... 0.95; recall is 0, 0.01, ... 1; areas are all, small, medium and large. NaN
            where there is no object.
    """

    metrics: dict[str, float | None]
    classes: tuple[str, ...]
    objects: list[int]
    precision: np.ndarray

    def of_class(self, label: int) -> dict[str, float | None]:
        """``AP``, ``AP50``, ``AP75``, ``AP_small``, ``AP_medium`` and ``AP_large`` of a class."""
        precision = self.precision[:, :, label]
        parts = [precision[..., 0], precision[0, :, 0], precision[5, :, 0]]
        parts += [precision[..., area] for area in (1, 2, 3)]
        means = [float(part.mean()) for part in parts]
        return {name: None if np.isnan(mean) else mean for name, mean in zip(NAMES, means)}


def score(ground_truth: dict[str, Any], detections: list[dict[str, Tensor]]) -> Scores:
    """COCO's metrics, in all and of each class, with precision-recall curves.

    Args:
        ground_truth: as :func:`average_precision` takes it.
        detections: likewise.
    """
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    classes = tuple(category["name"] for category in categories)
    counts = Counter(
        one["category_id"] for one in ground_truth["annotations"] if not one["iscrowd"]
    )
    objects = [counts[category["id"]] for category in categories]
    if not counts:
        nothing = np.full((10, 101, len(classes), 4), np.nan)
        return Scores(dict.fromkeys(NAMES), classes, objects, nothing)
    evaluation = _evaluated(ground_truth, coco_results(ground_truth, detections))
    numbers = evaluation.stats[: len(NAMES)].tolist()
    metrics = {name: None if n < 0 else n for name, n in zip(NAMES, numbers)}  # -1: undefined
    precision = np.asarray(evaluation.eval["precision"], dtype=float)[..., -1]
    return Scores(metrics, classes, objects, np.where(precision < 0, np.nan, precision))


def coco_results(
    ground_truth: dict[str, Any], detections: list[dict[str, Tensor]]
) -> list[dict[str, Any]]:
    """Detections as the rows of COCO's results format."""
    categories = sorted(category["id"] for category in ground_truth["categories"])
    rows = []
    for facts, detected in zip(ground_truth["images"], detections):
        columns = (detected[name].tolist() for name in ("boxes", "scores", "labels"))
        for (x1, y1, x2, y2), score, label in zip(*columns):
            one = {"category_id": categories[label], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            rows.append({"image_id": facts["id"], "score": score, **one})
    return rows


def _evaluated(ground_truth: dict[str, Any], rows: list[dict[str, Any]]) -> Any:
    with needs("detr"):
        from faster_coco_eval import COCO, COCOeval_faster

    # Ids from 1: COCO's evaluation takes an object with the id 0 for one that is not matched.
    annotations = [{**one, "id": i} for i, one in enumerate(ground_truth["annotations"], 1)]
    reference = COCO({**ground_truth, "annotations": annotations})
    results = reference.loadRes(rows)
    evaluation = COCOeval_faster(reference, results, "bbox", print_function=lambda *_: None)
    evaluation.run()
    return evaluation


def as_text(value: float | None) -> str:
    """A number of :func:`average_precision` with three digits; a dash where it is undefined."""
    return "-" if value is None else f"{value:.3f}"


def literal_text(draw: Callable[Drawn, Picture]) -> Callable[Drawn, Picture]:
    """A function that draws with matplotlib, where ``$`` in a name starts no formula."""

    @functools.wraps(draw)
    def drawn(*args: Drawn.args, **kwargs: Drawn.kwargs) -> Picture:
        with needs("detr"):
            from matplotlib import rc_context

        with rc_context({"text.parse_math": False}):
            return draw(*args, **kwargs)

    return drawn


@literal_text
def draw_curves(history: dict[str, Any], title: str, file: BinaryIO) -> None:
    """Write a PNG with the loss of every step, and loss and AP of every evaluation.

    The loss of a step is without denoising and Mr. DETR's routes, which evaluations do not have.
    """
    from matplotlib.figure import Figure

    figure = Figure((9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, subplot_kw={"xlabel": "step"})
    loss = np.array(history["matched_loss"], dtype=float)
    left.plot(np.arange(1, len(loss) + 1), loss, color="#9ecae1", linewidth=0.7)
    parts = np.array_split(loss, min(40, len(loss)))
    ends = np.cumsum([len(part) for part in parts])
    left.plot(ends, [part.mean() for part in parts], color="#08519c", label="training images")
    if rows := history["val_loss"]:
        steps, values = zip(*((row["step"], row["loss"]) for row in rows))
        left.plot(steps, values, "o-", color="#d95f0e", markersize=3, label="test images")
        left.legend(frameon=False)
    left.set_title("loss", loc="left")
    lowest = 0.0
    for name, color in (("AP", "#08519c"), ("AP50", "#d95f0e")):
        rows = [(row["step"], row[name]) for row in history["ap"] if row[name] is not None]
        if not rows:
            continue
        steps, values = zip(*rows)
        right.plot(steps, values, "o-", color=color, markersize=3)
        place = max(values[-1], lowest)  # of the second text: above the first one
        right.annotate(f" {name} {values[-1]:.2f}", (steps[-1], place), color=color, va="center")
        lowest = values[-1] + 0.06
        right.set_xlim(0, steps[-1] * 1.2)
    right.set(ylim=(0, 1))
    right.set_title("average precision on the test images", loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.suptitle(title)
    figure.savefig(file, format="png", dpi=120)
