"""Matching of queries and targets.

``Pairs`` hold, for each image, the indices of queries and of the targets matched with them. A
prediction is ``{"logits": [B, Q, C], "boxes": [B, Q, 4]}``; targets are a list of ``{"labels": [n],
"boxes": [n, 4]}``, one per image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from deform_attn.detr.boxes import Named, overlap

Target = Mapping[str, Tensor]
Targets = Sequence[Target]
Pairs = list[tuple[Tensor, Tensor]]


def check_targets(targets: Targets, images: int, num_classes: int) -> None:
    """Check the targets of a batch; on a GPU, valid ones cost one synchronisation.

    Raises:
        ValueError: the number of targets, a shape, a dtype, a label or a box is invalid.
    """
    if len(targets) != images:
        raise ValueError(f"targets: expected {images}, one per image, got {len(targets)}")

    def error(i: int, key: str, expected: str, got: str) -> ValueError:
        return ValueError(f"targets[{i}][{key!r}]: expected {expected}, got {got}")

    for i, target in enumerate(targets):
        labels, boxes = target["labels"], target["boxes"]
        if labels.dim() != 1 or labels.is_floating_point():
            raise error(i, "labels", "integers [n]", f"{labels.dtype} {list(labels.shape)}")
        if boxes.shape != (len(labels), 4):
            raise error(i, "boxes", f"numbers [{len(labels)}, 4]", f"{list(boxes.shape)}")

    def in_range(labels: Tensor) -> Tensor:
        return ((labels >= 0) & (labels < num_classes)).all()

    def inside(boxes: Tensor) -> Tensor:  # with a margin for rounding
        return ((boxes > -1e-3) & (boxes < 1 + 1e-3)).all()

    labels, boxes = (torch.cat([t[key] for t in targets]) for key in ("labels", "boxes"))
    if in_range(labels) & inside(boxes):
        return
    for i, target in enumerate(targets):
        labels, boxes = target["labels"], target["boxes"]
        if not in_range(labels):
            expected = f"0 to {num_classes - 1}"
            raise error(i, "labels", expected, f"{labels.min()} to {labels.max()}")
        if not inside(boxes):
            got = f"{boxes.min():.4g} to {boxes.max():.4g}"
            raise error(i, "boxes", "cxcywh in [0, 1]", got)


def assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the assignment with the least total cost (Hungarian method)."""
    rows, columns = linear_sum_assignment(cost.detach().cpu().double().numpy())
    return torch.as_tensor(rows).to(cost.device), torch.as_tensor(columns).to(cost.device)


def _images(prediction: Named, targets: Targets) -> Iterator[tuple[Tensor, Tensor, Target]]:
    """Logits, boxes (in at least float32) and targets of each image."""
    dtype = torch.promote_types(prediction["logits"].dtype, torch.float32)
    return zip(prediction["logits"].to(dtype), prediction["boxes"].to(dtype), targets)


@dataclass(frozen=True)
class Hungarian:
    """One query per object, at the least total cost of class, L1 distance and GIoU (DETR, 3.1).

    Attributes:
        class_weight: weight of the class cost.
        l1_weight: weight of the L1 distance of the boxes.
        giou_weight: weight of the negative GIoU.
        softmax: the class cost is ``-p`` of a softmax (DETR), else that of the focal loss.
        alpha: of the focal loss.

    Example:
        >>> import torch
        >>> from deform_attn.detr.matching import Hungarian
        >>> boxes = [[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.4, 0.4], [0.9, 0.9, 0.1, 0.1]]
        >>> boxes = torch.tensor([boxes])
        >>> prediction = {"logits": torch.zeros(1, 3, 2), "boxes": boxes}
        >>> targets = [{"labels": torch.tensor([0, 1]), "boxes": boxes[0, [2, 0]]}]
        >>> queries, objects = Hungarian()(prediction, targets)[0]
        >>> queries.tolist(), objects.tolist()
        ([0, 2], [1, 0])
    """

    class_weight: float = 2
    l1_weight: float = 5
    giou_weight: float = 2
    softmax: bool = False
    alpha: float = 0.25

    def cost(self, logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """``[queries, targets]`` of one image."""
        if self.softmax:
            class_cost = -logits.softmax(-1)
        else:
            p = logits.sigmoid()
            positive = self.alpha * (1 - p) ** 2 * -(p + 1e-8).log()
            negative = (1 - self.alpha) * p**2 * -(1 - p + 1e-8).log()
            class_cost = positive - negative
        class_cost = class_cost[:, target["labels"].long()]
        target_boxes = target["boxes"].to(boxes.dtype)
        l1 = torch.cdist(boxes, target_boxes, p=1)
        giou = overlap(boxes[:, None], target_boxes)[1]
        total = self.class_weight * class_cost + self.l1_weight * l1 - self.giou_weight * giou
        return total.nan_to_num(1.0)  # as in DEIM: a diverged model still gets an assignment

    @torch.no_grad()
    def __call__(self, prediction: Named, targets: Targets) -> Pairs:
        """Pairs of all images."""
        return [assign(self.cost(*image)) for image in _images(prediction, targets)]


@dataclass(frozen=True)
class OneToMany:
    """Several queries per object (Mr. DETR, arXiv 2412.10028).

    The quality of a query for an object is a weighted mean of the IoU and the class's probability.
    Every query chooses the object of its highest quality. The choice counts if that quality reaches
    the threshold, or if no query has a higher quality for one of the objects. An object that c
    choices count for is matched with the ``min(c, max_queries)`` queries of the highest quality for
    it, whichever object those chose.

    Attributes:
        iou_weight: weight of the IoU: 0.7, and 0.8 in Mr. DETR's variants on DINO and Align-DETR;
            the rest is the probability's.
        threshold: lowest quality of a choice that counts.
        max_queries: queries per object.
        max_choices: choices per image; further ones are dropped at random.

    Example:
        >>> import torch
        >>> from deform_attn.detr.matching import OneToMany
        >>> boxes = [[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]
        >>> boxes = torch.tensor([boxes])
        >>> prediction = {"logits": torch.zeros(1, 3, 2), "boxes": boxes}
        >>> targets = [{"labels": torch.tensor([0]), "boxes": boxes[0, :1]}]
        >>> queries, objects = OneToMany()(prediction, targets)[0]
        >>> queries.tolist(), objects.tolist()
        ([0, 1], [0, 0])
    """

    iou_weight: float = 0.7
    threshold: float = 0.4
    max_queries: int = 6
    max_choices: int = 225

    @torch.no_grad()
    def __call__(self, prediction: Named, targets: Targets) -> Pairs:
        """Pairs of all images, in the order of the objects."""
        return [self._assign(*image) for image in _images(prediction, targets)]

    def _assign(self, logits: Tensor, boxes: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        objects = len(target["labels"])
        if objects == 0:
            none = torch.zeros(0, dtype=torch.long, device=logits.device)
            return none, none
        iou = overlap(boxes[:, None], target["boxes"].to(boxes.dtype))[0]
        p = logits.sigmoid()[:, target["labels"].long()]
        quality = self.iou_weight * iou + (1 - self.iou_weight) * p  # [Q, objects]
        best, choice = quality.max(1)
        counts = best >= self.threshold
        counts[quality.argmax(0)] = True
        if int(counts.sum()) > self.max_choices:
            candidates = counts.nonzero()[:, 0]
            order = torch.randperm(len(candidates), device=logits.device)
            counts[candidates[order[self.max_choices :]]] = False
        choices = torch.bincount(choice[counts], minlength=objects)
        numbers = choices.clamp(max=self.max_queries).tolist()
        ranked = quality.argsort(dim=0, descending=True, stable=True)
        queries = torch.cat([ranked[:number, i] for i, number in enumerate(numbers)])
        which = torch.arange(objects, device=logits.device)
        return queries, which.repeat_interleave(torch.tensor(numbers, device=logits.device))


@dataclass(frozen=True)
class Lexicographic:
    """Matching by overlap, then order, then distance (Stewart et al., arXiv 1506.04878).

    A prediction whose centre is off by more than half an object's side does not overlap it. Among
    the assignments with the fewest such pairs, those that use early predictions are preferred, and
    then those with the least distance.

    Attributes:
        steps: predictions per cell; an object belongs to the cell that contains its centre.
    """

    steps: int = 5

    @staticmethod
    def cost(boxes: Tensor, objects: Tensor) -> Tensor:
        """``[predictions, objects]``, the three criteria as one number.

        Boxes are ``(cx, cy, w, h)`` in pixels, in the order of output.
        """
        offset = (boxes[:, None, :2] - objects[:, :2]).abs() / objects[:, 2:]
        missed = (offset > 0.5).any(-1).double()
        rank = torch.arange(len(boxes), device=boxes.device)[:, None]
        distance = torch.cdist(boxes.double(), objects.double(), p=1)
        return 100 * missed + rank + distance / 2000

    @torch.no_grad()
    def __call__(self, prediction: Named, targets: Targets) -> Pairs:
        """Pairs of all images; a cell with more objects than steps leaves some unmatched.

        The prediction has ``grid``, (rows, columns) of cells in the padded image; ``extent [B, (x,
        y)]``, the number of cells in the unpadded one; and ``pixels [B, 4]``, its (width, height,
        width, height).
        """
        pairs = []
        rows, columns = prediction["grid"]
        for i, (boxes, target) in enumerate(zip(prediction["boxes"].float(), targets)):
            pixels, extent = prediction["pixels"][i], prediction["extent"][i]
            x, y = (target["boxes"][:, :2] * extent).long().unbind(-1)
            cell = y.clamp(0, rows - 1) * columns + x.clamp(0, columns - 1)
            found = []
            for number in cell.unique().tolist():
                objects, first = (cell == number).nonzero()[:, 0], number * self.steps
                predicted = boxes[first : first + self.steps] * pixels
                query, which = assign(self.cost(predicted, target["boxes"][objects] * pixels))
                found.append(torch.stack([first + query, objects[which]]))
            empty = torch.zeros(2, 0, dtype=torch.long, device=boxes.device)
            queries, indices = torch.cat([empty, *found], 1)
            pairs.append((queries, indices))
        return pairs


def union(sets: Sequence[Pairs]) -> Pairs:
    """Union of the pairs of all layers; a query keeps its most frequent object (D-FINE)."""
    merged = []
    for image in zip(*sets):
        device = image[0][0].device
        votes = Counter(p for q, t in image for p in zip(q.tolist(), t.tolist()))
        first: dict[int, int] = {}
        for query, target in sorted(votes, key=lambda pair: (-votes[pair], pair)):
            first.setdefault(query, target)
        pairs = torch.tensor(list(first.items()), dtype=torch.long, device=device).view(-1, 2)
        merged.append((pairs[:, 0], pairs[:, 1]))
    return merged
