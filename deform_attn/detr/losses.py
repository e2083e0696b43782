"""The set loss that all systems share.

    loss = sum over sets of predictions (decoder layers, encoder, denoising, routes) of
           w_class * classification + w_l1 * |box - target| + w_giou * (1 - GIoU)

each divided by the number of objects (for denoising, of all noised copies), except DETR's
classification, which is a weighted mean over queries. D-FINE adds two losses of its distributions
(see dfine.py). Systems differ in matching and classification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from deform_attn.detr.boxes import Named, overlap
from deform_attn.detr.dfine import EdgeBins
from deform_attn.detr.matching import Hungarian, OneToMany, Pairs, Targets, check_targets, union

Outputs = Mapping[str, Any]


class Classification(Protocol):
    """Classification loss of a set of queries.

    Attributes:
        no_object: whether the last logit means "no object".
    """

    no_object: ClassVar[bool]

    def __call__(
        self, logits: Tensor, one_hot: Tensor, quality: Tensor, num_objects: Tensor
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            logits: ``[N, C]``.
            one_hot: targets ``[N, C]``, 1 at the class of matched queries.
            quality: ``one_hot`` times the IoU of the query's box with its target.
            num_objects: a scalar tensor that divides sums over queries.
        """


@dataclass(frozen=True)
class FocalLoss:
    """``-alpha (1 - p)^2 log p``, which gives easy negatives little weight (arXiv 1708.02002)."""

    alpha: float = 0.25
    no_object: ClassVar[bool] = False

    def __call__(
        self, logits: Tensor, one_hot: Tensor, quality: Tensor, num_objects: Tensor
    ) -> Tensor:
        """See :class:`Classification`."""
        p = logits.sigmoid()
        p_target = p * one_hot + (1 - p) * (1 - one_hot)
        weight = self.alpha * one_hot + (1 - self.alpha) * (1 - one_hot)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
        return (weight * (1 - p_target) ** 2 * cross_entropy).sum() / num_objects


@dataclass(frozen=True)
class VarifocalLoss:
    """The target score is the IoU, which also weighs the loss (RT-DETR, arXiv 2304.08069).

    Example:
        >>> import torch
        >>> from deform_attn.detr.losses import VarifocalLoss
        >>> logits = torch.tensor([[1.4, -9.0]])  # the sigmoid of 1.4 is 0.8, which the IoU is too
        >>> one_hot, num_objects = torch.tensor([[1.0, 0.0]]), torch.tensor(1.0)
        >>> loss = VarifocalLoss()
        >>> [loss(x, one_hot, 0.8 * one_hot, num_objects) for x in (logits, logits.flip(1))]
        [tensor(0.4003), tensor(6.5422)]
    """

    alpha: float = 0.75
    no_object: ClassVar[bool] = False

    def __call__(
        self, logits: Tensor, one_hot: Tensor, quality: Tensor, num_objects: Tensor
    ) -> Tensor:
        """See :class:`Classification`."""
        weight = self.alpha * logits.sigmoid().detach() ** 2 * (1 - one_hot) + quality
        return _binary(logits, quality, weight) / num_objects


@dataclass(frozen=True)
class MatchabilityAwareLoss:
    """The target score is ``IoU^gamma``; poor boxes keep their weight (DEIM, arXiv 2412.04234).

    Example:
        >>> import torch
        >>> from deform_attn.detr.losses import MatchabilityAwareLoss
        >>> logits = torch.tensor([[0.92, -9.0]])  # the sigmoid of 0.92 is 0.8 ** 1.5
        >>> one_hot, num_objects = torch.tensor([[1.0, 0.0]]), torch.tensor(1.0)
        >>> loss = MatchabilityAwareLoss()
        >>> [loss(x, one_hot, 0.8 * one_hot, num_objects) for x in (logits, logits.flip(1))]
        [tensor(0.5971), tensor(7.1991)]
    """

    gamma: float = 1.5
    no_object: ClassVar[bool] = False

    def __call__(
        self, logits: Tensor, one_hot: Tensor, quality: Tensor, num_objects: Tensor
    ) -> Tensor:
        """See :class:`Classification`."""
        weight = logits.sigmoid().detach() ** self.gamma * (1 - one_hot) + one_hot
        return _binary(logits, quality**self.gamma, weight) / num_objects


@dataclass(frozen=True)
class AlignedLoss:
    """The target score is ``p^alpha IoU^(1 - alpha)`` (Align-DETR, arXiv 2304.07527).

    Where an object has several queries, targets and the GIoU loss of its query of rank r, from 0
    for the highest target, are multiplied by ``exp(-r / tau)``.

    Attributes:
        alpha: weight of the score.
        tau: the larger, the slower the weights fall.
    """

    alpha: float = 0.25
    tau: float = 1.5
    no_object: ClassVar[bool] = False

    def __call__(
        self, logits: Tensor, one_hot: Tensor, quality: Tensor, num_objects: Tensor
    ) -> Tensor:
        """See :class:`Classification`; ``quality`` are the targets."""
        negative = torch.where(one_hot > 0, 1 - quality, logits.sigmoid() ** 2)
        losses = quality * F.logsigmoid(logits) + negative * F.logsigmoid(-logits)
        return -losses.sum() / num_objects

    def targets(self, score: Tensor, iou: Tensor) -> Tensor:
        """Target score of each pair of a query and an object."""
        target = score**self.alpha * iou ** (1 - self.alpha)
        return target.clamp(min=0.01).detach()

    def rank_weights(self, target: Tensor, of: Tensor) -> Tensor:
        """Weights of pairs with these targets, by their rank among the pairs of one object."""
        order = target.argsort(descending=True, stable=True)
        order = order[of[order].argsort(stable=True)]
        grouped = of[order]
        rank = torch.empty_like(target)
        places = torch.arange(len(of), device=of.device)
        rank[order] = (places - torch.searchsorted(grouped, grouped)).to(target.dtype)
        return torch.exp(-rank / self.tau)


@dataclass(frozen=True)
class WeightedCrossEntropy:
    """Softmax cross entropy, as a weighted mean over queries (DETR).

    Attributes:
        no_object_weight: weight of queries without an object; the others weigh 1.
    """

    no_object_weight: float = 0.1
    no_object: ClassVar[bool] = True

    def __call__(
        self, logits: Tensor, one_hot: Tensor, quality: Tensor, num_objects: Tensor
    ) -> Tensor:
        """See :class:`Classification`."""
        weights = torch.ones(logits.shape[-1], device=logits.device, dtype=logits.dtype)
        weights[-1] = self.no_object_weight
        return F.cross_entropy(logits, _classes(one_hot), weights)


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross entropy, summed over queries (Stewart)."""

    no_object: ClassVar[bool] = True

    def __call__(
        self, logits: Tensor, one_hot: Tensor, quality: Tensor, num_objects: Tensor
    ) -> Tensor:
        """See :class:`Classification`."""
        return F.cross_entropy(logits, _classes(one_hot), reduction="sum") / num_objects


def _binary(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")


def _classes(one_hot: Tensor) -> Tensor:
    """Class of each query; the last one, "no object", where none is set."""
    return torch.where(one_hot.any(-1), one_hot.argmax(-1), one_hot.shape[-1] - 1)


def averaged(number: int, device: torch.device, *, alone: bool = False) -> Tensor:
    """Mean of ``number`` over the processes of a training, at least 1.

    Losses divided by it have the gradient of one large batch, after averaging over processes.

    Args:
        number: of this process.
        device: of the result.
        alone: it is that of this process, without communication.
    """
    count = torch.tensor(float(number), device=device)
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    if parallel and not alone:
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp(min=1)


def in_evaluation(name: str, eval_layers: int) -> bool:
    """Whether a detector in evaluation mode has the set of a loss: no denoising, no routes.

    Args:
        name: of the loss.
        eval_layers: number of decoder layers that run in evaluation.

    Example:
        >>> from deform_attn.detr.losses import in_evaluation
        >>> names = ("layer2", "layer3", "layer_pre", "encoder", "dn2", "encoder_o2m")
        >>> [name for name in names if in_evaluation(f"giou/{name}", 3)]
        ['layer2', 'layer_pre', 'encoder']
    """
    of = name.partition("/")[2]
    layer = of.removeprefix("layer")
    if layer.isdigit():
        return int(layer) < eval_layers
    return of in ("encoder", "layer_pre")


def query_indices(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(image, query) of every pair of a batch, to index ``[B, Q, ...]``."""
    image = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(pairs)])
    return image, torch.cat([queries for queries, _ in pairs])


def paired(targets: Targets, pairs: Pairs, key: str) -> Tensor:
    """``key`` of the target of every pair of a batch."""
    return torch.cat([target[key][which] for target, (_, which) in zip(targets, pairs)])


def layers_of(outputs: Outputs, name: str) -> Iterator[tuple[str, Named]]:
    """Name and prediction of each layer; D-FINE's include the last layer's distributions.

    After the layers, as ``<name>_pre``: D-FINE's boxes and classes before its first refinement.
    """
    layers = len(outputs.get("logits", ()))
    for i in range(layers):
        keys = ("logits", "boxes", "corners", "initial")
        prediction = {key: outputs[key][i] for key in keys if key in outputs}
        prediction |= {
            key: outputs[key] for key in ("counted", "pixels", "extent", "grid") if key in outputs
        }
        if "corners" in outputs and i < layers - 1:
            prediction["teacher_corners"] = outputs["corners"][-1]
            prediction["teacher_logits"] = outputs["logits"][-1]
        yield f"{name}{i}", prediction
    if "pre_boxes" in outputs:
        yield f"{name}_pre", {"logits": outputs["pre_logits"][0], "boxes": outputs["pre_boxes"][0]}


class LossInput(NamedTuple):
    """A set of predictions and its targets.

    Attributes:
        name: of the set, such as ``layer2``.
        prediction: ``logits [B, Q, C]``, ``boxes [B, Q, 4]``, and what else the losses need.
        targets: of each image.
        pairs: of queries and targets.
        num_objects: divides the losses.
        ranked: queries of one object have weights by their rank (:class:`AlignedLoss`).
    """

    name: str
    prediction: Named
    targets: Targets
    pairs: Pairs
    num_objects: Tensor
    ranked: bool = False


@dataclass
class Criterion:
    """Weighted losses of all sets of predictions of a detector.

    Attributes:
        weights: of ``class``, ``l1``, ``giou``, and of D-FINE's ``fgl`` and ``ddf``.
        match: matches a decoder layer's queries with targets.
        classification: loss of the logits.
        encoder: targets of the encoder's proposals: "classes"; "binary", object or not (Deformable
            DETR in two stages); "anchors", binary and matched by the proposals' anchors (Mr. DETR).
        encoder_weight: further factor of all losses of proposals.
        one_to_many: assignment of the routes beside the decoder's own (Mr. DETR).
        route_divisor: further divisor of these routes' losses.
        bins: of D-FINE's distributions: adds their losses, and the boxes of all layers use the
            union of all layers' pairs.
    """

    weights: Mapping[str, float]
    match: Callable[[Named, Targets], Pairs] = field(default_factory=Hungarian)
    classification: Classification = field(default_factory=FocalLoss)
    encoder: Literal["classes", "binary", "anchors"] = "classes"
    encoder_weight: float = 1.0
    one_to_many: OneToMany | None = None
    route_divisor: float = 1.0
    bins: EdgeBins | None = None

    def __call__(
        self,
        outputs: Outputs,
        targets: Targets,
        num_objects: Tensor | None = None,
        *,
        alone: bool = False,
    ) -> dict[str, Tensor]:
        """Losses by name, ``<loss>/<set>``, such as ``giou/layer2``; their sum is to be minimised.

        Args:
            outputs: of a detector; in evaluation mode without denoising and routes.
            targets: ``{"labels": [n], "boxes": [n, 4]}`` of each image.
            num_objects: divides the losses, a scalar; by default the number of objects in
                ``targets``, averaged over processes. With gradient accumulation it is the mean of
                the passes of a step.
            alone: nothing is averaged over processes, which may call this at different times.

        Raises:
            ValueError: a target does not fit; the message names it.
        """
        logits = outputs["logits"]
        num_classes = logits.shape[-1] - self.classification.no_object
        if outputs.get("dn", {}).get("targets") is not targets:  # else the detector checked them
            check_targets(targets, logits.shape[1], num_classes)
        if num_objects is None:
            number = sum(len(target["labels"]) for target in targets)
            num_objects = averaged(number, logits.device, alone=alone)
        matched = list(self.matched(outputs, targets, num_objects))
        shared = union([one.pairs for one in matched]) if self.bins is not None else []
        positives = sum(len(queries) for queries, _ in shared)
        num_shared = averaged(positives, logits.device, alone=alone)
        # Denoising queries take the balance of the matched queries, as in the official code.
        balance = (positives, logits[0, ..., 0].numel() - positives)
        losses = {}
        for i, one in enumerate([*matched, *self.assigned(outputs, targets, num_objects)]):
            found = {"class": self.class_loss(one)}
            if self.bins is not None and i < len(matched):
                one = one._replace(pairs=shared, num_objects=num_shared)
            found |= self.box_losses(one, balance)
            scale = self.encoder_weight if one.name.startswith("encoder") else 1.0
            for loss, weight in self.weights.items():
                if loss in found:
                    losses[f"{loss}/{one.name}"] = scale * weight * found[loss]
        return losses

    def matched(
        self, outputs: Outputs, targets: Targets, num_objects: Tensor
    ) -> Iterator[LossInput]:
        """Sets with one-to-one matching: decoder layers and the encoder's proposals."""
        for name, prediction in layers_of(outputs, "layer"):
            pairs = self.match(prediction, targets)
            yield LossInput(name, prediction, targets, pairs, num_objects)
        for name in (name for name in outputs if name.startswith("encoder")):
            prediction = matchable = outputs[name]
            goals, match = targets, self.match
            if self.encoder != "classes":
                goals = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
            if self.encoder == "anchors":
                matchable = {**prediction, "boxes": prediction["anchors"]}
                match = Hungarian(class_weight=0)
            yield LossInput(name, prediction, goals, match(matchable, goals), num_objects)

    def assigned(
        self, outputs: Outputs, targets: Targets, num_objects: Tensor
    ) -> Iterator[LossInput]:
        """Sets with known pairs (denoising queries) or one-to-many assignment (routes)."""
        routes = {name: outputs[name] for name in ("o2m", "sep") if name in outputs}
        for route, own in {
            "": outputs,
            **{f"_{name}": own for name, own in routes.items()},
        }.items():
            noised = own.get("dn", {})
            for name, prediction in layers_of(noised, f"dn{route}"):
                number = num_objects * noised["groups"]
                yield LossInput(name, prediction, targets, noised["pairs"], number)
        for route, own in routes.items():
            for name, prediction in layers_of(own, route):
                assert self.one_to_many is not None, "routes need one_to_many"
                pairs = self.one_to_many(prediction, targets)
                number = num_objects * self.route_divisor
                yield LossInput(name, prediction, targets, pairs, number, ranked=True)

    def class_loss(self, one: LossInput) -> Tensor:
        """Classification loss over all queries of a set."""
        _, prediction, targets, pairs, num_objects, _ = one
        logits, where = prediction["logits"], query_indices(pairs)
        labels = paired(targets, pairs, "labels").long()
        iou = overlap(prediction["boxes"][where].detach(), paired(targets, pairs, "boxes"))[0]
        # On a CPU, a query with several targets gets the label of the last one.
        label = torch.full(logits.shape[:2], -1, device=logits.device).index_put(where, labels)
        classes = torch.arange(logits.shape[-1], device=logits.device)
        one_hot = (label[..., None] == classes).to(logits.dtype)
        quality = (
            one_hot * logits.new_zeros(label.shape).index_put(where, iou.to(logits))[..., None]
        )
        if isinstance(self.classification, AlignedLoss):
            place = (*where, labels)  # a query with several targets has several labels
            one_hot = torch.zeros_like(logits).index_put(place, logits.new_ones(()))
            target, weights = self._aligned(one)
            quality = torch.zeros_like(logits).index_put(place, (target * weights).to(logits))
        if "counted" in prediction:
            keep = prediction["counted"]
            logits, one_hot, quality = logits[keep], one_hot[keep], quality[keep]
        else:
            logits, one_hot, quality = (x.flatten(0, 1) for x in (logits, one_hot, quality))
        return self.classification(logits, one_hot, quality, num_objects)

    def _aligned(self, one: LossInput) -> tuple[Tensor, Tensor]:
        """Targets of Align-DETR's pairs, and their weights by rank."""
        assert isinstance(self.classification, AlignedLoss), "classification"
        where = query_indices(one.pairs)
        labels = paired(one.targets, one.pairs, "labels").long()
        boxes = one.prediction["boxes"][where].detach()
        iou = overlap(boxes, paired(one.targets, one.pairs, "boxes"))[0]
        image, query = where
        score = one.prediction["logits"].detach()[image, query, labels].sigmoid()
        target = self.classification.targets(score, iou)
        if not one.ranked:
            return target, torch.ones_like(target)
        most = max((len(t["labels"]) for t in one.targets), default=0)
        of = where[0] * most + torch.cat([which for _, which in one.pairs])
        return target, self.classification.rank_weights(target, of)

    def box_losses(self, one: LossInput, balance: tuple[int, int]) -> dict[str, Tensor]:
        """Losses of the boxes of matched queries.

        ``balance`` is that of :meth:`~deform_attn.detr.dfine.EdgeBins.distillation`.
        """
        _, prediction, targets, pairs, n, _ = one
        where, target_boxes = query_indices(pairs), paired(targets, pairs, "boxes")
        boxes = prediction["boxes"][where]
        iou, giou = overlap(boxes, target_boxes)
        distance = (boxes - target_boxes).abs()
        if "pixels" in prediction:  # Stewart's distances are in pixels
            distance = distance * prediction["pixels"][where[0]]
        misfit = 1 - giou
        if isinstance(self.classification, AlignedLoss):
            misfit = misfit * self._aligned(one)[1]
        losses = {"l1": distance.sum() / n, "giou": misfit.sum() / n}
        if self.bins is not None and "corners" in prediction:
            corners, initial = prediction["corners"][where], prediction["initial"][where]
            iou = iou.detach()
            losses["fgl"] = self.bins.localisation(corners, initial, target_boxes, iou).sum() / n
            if "teacher_corners" in prediction:
                losses["ddf"] = self.bins.distillation(prediction, where, iou, balance)
        return losses
