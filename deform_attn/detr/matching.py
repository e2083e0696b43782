"""Which query answers for which object.

``Pairs`` hold, for each image, the queries and the targets they are matched with. A prediction is
``{"logits": [B, Q, C], "boxes": [B, Q, 4]}``; targets are a list of ``{"labels": [n], "boxes":
[n, 4]}``, one an image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from deform_attn.detr.boxes import Named, overlap

Target = Mapping[str, Tensor]
Targets = Sequence[Target]
Pairs = list[tuple[Tensor, Tensor]]


def check_targets(targets: Targets, images: int, classes: int) -> None:
    """Raise a ValueError that names what is wrong with the targets of a batch, if anything is."""
    if len(targets) != images:
        raise ValueError(f"targets: expected {images}, one an image, got {len(targets)}")

    def wrong(i: int, key: str, expected: str, got: str) -> ValueError:
        return ValueError(f"targets[{i}][{key!r}]: expected {expected}, got {got}")

    for i, target in enumerate(targets):
        labels, boxes = target["labels"], target["boxes"]
        if labels.dim() != 1 or labels.is_floating_point():
            raise wrong(i, "labels", "integers [n]", f"{labels.dtype} {list(labels.shape)}")
        if boxes.shape != (len(labels), 4):
            raise wrong(i, "boxes", f"numbers [{len(labels)}, 4]", f"{list(boxes.shape)}")
        if not ((labels >= 0) & (labels < classes)).all():
            raise wrong(i, "labels", f"0 to {classes - 1}", f"{labels.min()} to {labels.max()}")
        if not ((boxes > -1e-3) & (boxes < 1 + 1e-3)).all():
            raise wrong(i, "boxes", "cxcywh in [0, 1]", f"{boxes.min():.4g} to {boxes.max():.4g}")


def assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the assignment of least total cost (Hungarian method)."""
    rows, columns = linear_sum_assignment(cost.detach().cpu().double().numpy())
    return torch.as_tensor(rows).to(cost.device), torch.as_tensor(columns).to(cost.device)


@dataclass(frozen=True)
class Hungarian:
    """One query for each object, so that classes, L1 distance and GIoU cost least (DETR, 3.1).

    Attributes:
        classes, l1, giou: weights of the class cost, of the boxes' L1 distance and negative GIoU.
        softmax: the class cost is ``-p`` of a softmax (DETR), else the focal loss of a sigmoid.
        alpha: the focal loss's.
    """

    classes: float = 2
    l1: float = 5
    giou: float = 2
    softmax: bool = False
    alpha: float = 0.25

    def cost(self, logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """``[queries, targets]`` of one image."""
        if self.softmax:
            of_class = -logits.softmax(-1)
        else:
            p = logits.sigmoid()
            hit = self.alpha * (1 - p) ** 2 * -(p + 1e-8).log()
            miss = (1 - self.alpha) * p**2 * -(1 - p + 1e-8).log()
            of_class = hit - miss
        distance = torch.cdist(boxes, target["boxes"], p=1)
        giou = overlap(boxes[:, None], target["boxes"])[1]
        of_class = of_class[:, target["labels"].long()]
        # A diverged model gives NaN; the assignment must exist all the same (DEIM).
        total = self.classes * of_class + self.l1 * distance - self.giou * giou
        return total.nan_to_num(1.0)

    @torch.no_grad()
    def __call__(self, prediction: Named, targets: Targets) -> Pairs:
        """Pairs of all images."""
        images = zip(prediction["logits"].float(), prediction["boxes"].float(), targets)
        return [assign(self.cost(logits, boxes, target)) for logits, boxes, target in images]


@dataclass(frozen=True)
class OneToMany:
    """Several queries for each object (Mr. DETR, arXiv 2412.10028).

    A query's quality for an object mixes IoU and the class's probability. Every query chooses its
    best object, if good enough or if it is some object's best; an object chosen by c queries takes
    its best ``min(c, most)``, whoever they chose.

    Attributes:
        iou: weight of the IoU, 0.8 in Mr. DETR's variants on DINO and Align-DETR; the rest is the
            probability's.
        threshold: quality from which a choice counts.
        most: queries an object may take.
        sample: more choices than this, over all objects, are thinned at random.
    """

    iou: float = 0.7
    threshold: float = 0.4
    most: int = 6
    sample: int = 225

    @torch.no_grad()
    def __call__(self, prediction: Named, targets: Targets) -> Pairs:
        """Pairs of all images, in the order of the objects."""
        images = zip(prediction["logits"].float(), prediction["boxes"].float(), targets)
        return [self._one(logits, boxes, target) for logits, boxes, target in images]

    def _one(self, logits: Tensor, boxes: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        objects = len(target["labels"])
        if objects == 0:
            none = torch.zeros(0, dtype=torch.long, device=logits.device)
            return none, none
        iou = overlap(boxes[:, None], target["boxes"])[0]
        p = logits.sigmoid()[:, target["labels"].long()]
        quality = self.iou * iou + (1 - self.iou) * p  # [Q, objects]
        best, choice = quality.max(1)
        chosen = best >= self.threshold
        chosen[quality.argmax(0)] = True
        if int(chosen.sum()) > self.sample:
            candidates = chosen.nonzero()[:, 0]
            chosen[candidates[torch.randperm(len(candidates))[self.sample :]]] = False
        counts = torch.bincount(choice[chosen], minlength=objects).clamp(max=self.most).tolist()
        order = quality.argsort(dim=0, descending=True, stable=True)
        queries = torch.cat([order[:count, i] for i, count in enumerate(counts)])
        which = torch.arange(objects, device=logits.device)
        return queries, which.repeat_interleave(torch.tensor(counts, device=logits.device))


@dataclass(frozen=True)
class Lexicographic:
    """The ancestor (Stewart et al., arXiv 1506.04878): overlap first, then order, then distance.

    A prediction whose centre is more than half an object's size away does not overlap it. Among
    assignments with fewest such pairs, those that use early predictions win; distance breaks ties.

    Attributes:
        steps: predictions of one cell; objects belong to the cell that holds their centre.
    """

    steps: int = 5

    @staticmethod
    def cost(boxes: Tensor, objects: Tensor) -> Tensor:
        """``[predictions, objects]``, one number a triple; boxes in pixels, in order of output."""
        offset = (boxes[:, None, :2] - objects[:, :2]).abs() / objects[:, 2:]
        missed = (offset > 0.5).any(-1).double()
        rank = torch.arange(len(boxes), device=boxes.device)[:, None]
        distance = torch.cdist(boxes.double(), objects.double(), p=1)
        return 100 * missed + rank + distance / 2000

    @torch.no_grad()
    def __call__(self, prediction: Named, targets: Targets) -> Pairs:
        """Pairs of all images; of a cell with more objects than steps, some stay unmatched."""
        pairs = []
        rows, columns = (int(n) for n in prediction["grid"])
        for boxes, target in zip(prediction["boxes"].float(), targets):
            x, y = target["boxes"][:, 0] * columns, target["boxes"][:, 1] * rows
            x, y = x.long().clamp(0, columns - 1), y.long().clamp(0, rows - 1)
            cell = y * columns + x
            found = []
            for i in cell.unique().tolist():
                objects, first = (cell == i).nonzero()[:, 0], i * self.steps
                mine = boxes[first : first + self.steps] * prediction["pixels"]
                theirs = target["boxes"][objects] * prediction["pixels"]
                query, object_ = assign(self.cost(mine, theirs))
                found.append(torch.stack([first + query, objects[object_]]))
            empty = torch.zeros(2, 0, dtype=torch.long, device=boxes.device)
            queries, which = torch.cat([empty, *found], 1)
            pairs.append((queries, which))
        return pairs


def union(sets: Sequence[Pairs]) -> Pairs:
    """All layers' pairs; a query that has several objects keeps the most frequent (D-FINE)."""
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
