"""The set criterion: what each prediction is told, whichever system made it.

    loss = sum over sets of predictions (layers, encoder, denoising, routes) of
           w_class * classification + w_l1 * |box - box*| + w_giou * (1 - GIoU)

divided by the number of objects. A system is: how a set is matched, how it is classified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deform_attn.detr.boxes import Named, overlap
from deform_attn.detr.dfine import EdgeBins
from deform_attn.detr.matching import Hungarian, OneToMany, Pairs, Targets, check_targets, union

Outputs = Mapping[str, Any]
# (logits, one-hot targets, one-hot times IoU) -> the loss of each logit
Classification = Callable[[Tensor, Tensor, Tensor], Tensor]


def focal(logits: Tensor, hot: Tensor, quality: Tensor, alpha: float = 0.25) -> Tensor:
    """Easy negatives count little: ``-alpha (1 - p)^2 log p`` (arXiv 1708.02002)."""
    p = logits.sigmoid()
    right = p * hot + (1 - p) * (1 - hot)
    balance = alpha * hot + (1 - alpha) * (1 - hot)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, hot, reduction="none")
    return balance * (1 - right) ** 2 * cross_entropy


def varifocal(logits: Tensor, hot: Tensor, quality: Tensor, alpha: float = 0.75) -> Tensor:
    """The score learns the IoU, weighted by it: low uncertainty is selected (RT-DETR, 4.3)."""
    weight = alpha * logits.sigmoid().detach() ** 2 * (1 - hot) + quality
    return F.binary_cross_entropy_with_logits(logits, quality, weight, reduction="none")


def matchability_aware(logits: Tensor, hot: Tensor, quality: Tensor, gamma: float = 1.5) -> Tensor:
    """As varifocal, but a poor box is no less weighted than a good one (DEIM)."""
    weight = logits.sigmoid().detach() ** gamma * (1 - hot) + hot
    return F.binary_cross_entropy_with_logits(logits, quality**gamma, weight, reduction="none")


def softmax(logits: Tensor, hot: Tensor, quality: Tensor, nothing: float = 0.1) -> Tensor:
    """Cross entropy where the last class is "no object", weighted by ``nothing`` (DETR).

    A weighted mean over queries, where the others are what the criterion sums and divides.
    """
    weights = torch.ones(logits.shape[-1], device=logits.device)
    weights[-1] = nothing
    return F.cross_entropy(logits.flatten(0, 1), _with_nothing(hot).flatten(), weights)


def cross_entropy(logits: Tensor, hot: Tensor, quality: Tensor) -> Tensor:
    """Cross entropy of every query where the last class is "no object" (Stewart)."""
    return F.cross_entropy(logits.transpose(1, 2), _with_nothing(hot), reduction="none")


def _with_nothing(hot: Tensor) -> Tensor:
    return torch.where(hot.any(-1), hot.argmax(-1), hot.shape[-1] - 1)


def averaged(number: int, device: torch.device) -> Tensor:
    """Mean over processes, at least 1, so that their mean gradient is that of one big batch."""
    count = torch.tensor(float(number), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp(min=1)


def at(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(image, query) of every pair of a batch, to index ``[B, Q, ...]``."""
    image = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(pairs)])
    return image, torch.cat([queries for queries, _ in pairs])


def chosen(targets: Targets, pairs: Pairs, key: str) -> Tensor:
    """The targets' ``key`` of every pair of a batch."""
    return torch.cat([target[key][which] for target, (_, which) in zip(targets, pairs)])


def layers_of(outputs: Outputs, name: str) -> Iterator[tuple[str, Named]]:
    """Each layer's prediction, with the last one's corners to learn from; D-FINE's first guess."""
    layers = len(outputs.get("logits", ()))
    for i in range(layers):
        keys = ("logits", "boxes", "corners", "initial")
        prediction = {key: outputs[key][i] for key in keys if key in outputs}
        prediction |= {key: outputs[key] for key in ("counted", "pixels", "grid") if key in outputs}
        if "corners" in outputs and i < layers - 1:
            prediction["teacher_corners"] = outputs["corners"][-1]
            prediction["teacher_logits"] = outputs["logits"][-1]
        yield f"{name}{i}", prediction
    if "pre_boxes" in outputs:
        yield f"{name}_pre", {"logits": outputs["pre_logits"][0], "boxes": outputs["pre_boxes"][0]}


class Told(NamedTuple):
    """A set of predictions and what it is told: pairs of its queries and targets."""

    name: str
    prediction: Named
    targets: Targets
    pairs: Pairs
    number: Tensor  # of objects, which divides its losses


@dataclass
class Criterion:
    """Weighted losses of all sets of predictions of a detector.

    Attributes:
        weights: of ``class``, ``l1``, ``giou``, and of D-FINE's ``fgl`` and ``ddf``.
        match: matching of the decoder's layers.
        classification: one of the functions above.
        encoder: what the encoder's proposals are told: "classes"; "binary", object or not
            (Deformable DETR's two stages); "anchors", binary and matched by the proposals' places
            alone (Mr. DETR).
        encoder_weight: of all losses of proposals, on top of theirs.
        one_to_many: assignment of the routes beside the decoder's own.
        bins: of D-FINE's distributions of edges, which then learn too; and boxes of all layers
            learn from the union of all layers' pairs.
    """

    weights: Mapping[str, float]
    match: Callable[[Named, Targets], Pairs] = field(default_factory=Hungarian)
    classification: Classification = focal
    encoder: Literal["classes", "binary", "anchors"] = "classes"
    encoder_weight: float = 1.0
    one_to_many: OneToMany | None = None
    bins: EdgeBins | None = None

    def __call__(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Losses by name: ``<loss>/<set>``, such as ``giou/layer2``; their sum is to be minimised.

        Of a detector's outputs, and of ``{"labels": [n], "boxes": [n, 4]}`` of each image.

        Raises:
            ValueError: a target does not fit; the message names it.
        """
        logits = outputs["logits"]  # a softmax has "no object" as its last class
        classes = logits.shape[-1] - (self.classification in (softmax, cross_entropy))
        check_targets(targets, logits.shape[1], classes)
        count = averaged(sum(len(target["labels"]) for target in targets), logits.device)
        matched = list(self.matched(outputs, targets, count))
        shared = union([told.pairs for told in matched])
        positives = sum(len(queries) for queries, _ in shared)
        of_shared = averaged(positives, logits.device)
        # Denoising queries' edges are balanced as the matched ones', as in the official code.
        balance = (positives, logits[0, ..., 0].numel() - positives)
        losses = {}
        for i, told in enumerate([*matched, *self.assigned(outputs, targets, count)]):
            found = {"class": self.classes(told)}
            if self.bins is not None and i < len(matched):
                told = told._replace(pairs=shared, number=of_shared)
            found |= self.boxes(told, balance)
            scale = self.encoder_weight if told.name.startswith("encoder") else 1.0
            for loss, weight in self.weights.items():
                if loss in found:
                    losses[f"{loss}/{told.name}"] = scale * weight * found[loss]
        return losses

    def matched(self, outputs: Outputs, targets: Targets, count: Tensor) -> Iterator[Told]:
        """Sets whose pairs come from one-to-one matching."""
        for name, prediction in layers_of(outputs, "layer"):
            yield Told(name, prediction, targets, self.match(prediction, targets), count)
        for name in (name for name in outputs if name.startswith("encoder")):
            prediction = places = outputs[name]
            goals, match = targets, self.match
            if self.encoder != "classes":
                goals = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
            if self.encoder == "anchors":
                places, match = {**prediction, "boxes": prediction["anchors"]}, Hungarian(classes=0)
            yield Told(name, prediction, goals, match(places, goals), count)

    def assigned(self, outputs: Outputs, targets: Targets, count: Tensor) -> Iterator[Told]:
        """Sets that know their objects: denoising queries, and routes of several queries each."""
        noised = outputs.get("dn", {})
        for name, prediction in layers_of(noised, "dn"):
            yield Told(name, prediction, targets, noised["pairs"], count * noised["groups"])
        for route in ("o2m", "sep"):
            for name, prediction in layers_of(outputs.get(route, {}), route):
                assert self.one_to_many is not None, "routes need one_to_many"
                pairs = self.one_to_many(prediction, targets)
                yield Told(name, prediction, targets, pairs, count)

    def classes(self, told: Told) -> Tensor:
        """The classification's loss over all queries, divided by the number of objects."""
        _, prediction, targets, pairs, n = told
        logits, where = prediction["logits"], at(pairs)
        labels = chosen(targets, pairs, "labels").long()
        iou = overlap(prediction["boxes"][where].detach(), chosen(targets, pairs, "boxes"))[0]
        # A query with several objects keeps one label: the last one's, on a CPU.
        label = torch.full(logits.shape[:2], -1, device=logits.device).index_put(where, labels)
        hot = (label[..., None] == torch.arange(logits.shape[-1], device=logits.device)).float()
        quality = hot * torch.zeros_like(label, dtype=iou.dtype).index_put(where, iou)[..., None]
        loss = self.classification(logits, hot, quality)
        if "counted" in prediction:
            loss = loss * prediction["counted"][..., None]
        return loss if loss.dim() == 0 else loss.sum() / n

    def boxes(self, told: Told, balance: tuple[int, int]) -> dict[str, Tensor]:
        """Losses of boxes, divided so too; the ``balance``: how many are matched, how many not."""
        _, prediction, targets, pairs, n = told
        where, truth = at(pairs), chosen(targets, pairs, "boxes")
        boxes = prediction["boxes"][where]
        iou, giou = overlap(boxes, truth)
        distance = (boxes - truth).abs()
        if "pixels" in prediction:  # Stewart's distances are in pixels
            distance = distance * prediction["pixels"]
        losses = {"l1": distance.sum() / n, "giou": (1 - giou).sum() / n}
        if self.bins is not None and "corners" in prediction:
            corners, initial = prediction["corners"][where], prediction["initial"][where]
            iou = iou.detach()
            losses["fgl"] = self.bins.localisation(corners, initial, truth, iou).sum() / n
            if "teacher_corners" in prediction:
                losses["ddf"] = self.bins.distillation(prediction, where, iou, balance)
        return losses
