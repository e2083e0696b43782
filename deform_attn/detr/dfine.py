"""D-FINE (arXiv 2410.13842): the edges of a box as distributions, refined from layer to layer.

The distance of an edge from the centre of the first layer's box is ``0.5 * scale + sum_n
softmax(corners)_n W(n)``, in units of that box's side divided by ``scale``. Each layer adds to the
logits of the layer before, and learns from the distributions of the last layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deform_attn.detr.boxes import Named, from_corners, inverse_sigmoid, to_corners
from deform_attn.detr.layers import MLP, Activation, Size, box_head, class_head, each


class EdgeBins(nn.Module):
    """The distances ``W(n)`` of the bins: fine near 0, coarse far away.

    Args:
        count: number of intervals; there is one bin more.
        up: half of the range, in units of the first box's side; bins are denser inside it.
        scale: official ``reg_scale``; larger for smaller corrections.

    Example:
        >>> EdgeBins()().shape
        torch.Size([33])
    """

    up: Tensor
    scale: Tensor

    def __init__(self, count: int = 32, up: float = 0.5, scale: float = 4.0) -> None:
        super().__init__()
        self.count = count
        self.register_buffer("up", torch.tensor([up]))
        self.register_buffer("scale", torch.tensor([scale]))

    def forward(self) -> Tensor:
        """``W``: ``[count + 1]``."""
        bound = self.up * self.scale
        step = (bound + 1) ** (2 / (self.count - 2))
        exponents = torch.arange(1, self.count // 2, device=bound.device, dtype=bound.dtype)
        powers = step**exponents - 1
        return torch.cat([-2 * bound, -powers.flip(0), 0 * bound, powers, 2 * bound])

    def boxes(self, initial: Tensor, corners: Tensor) -> Tensor:
        """Box ``[..., 4]`` from the initial box and the logits ``[..., 4 * (count + 1)]``."""
        probabilities = corners.unflatten(-1, (4, self.count + 1)).softmax(-1)
        bins = self().to(probabilities.dtype)
        distance = 0.5 * self.scale + F.linear(probabilities, bins[None])[..., 0]
        unit = initial[..., 2:] / self.scale
        low = initial[..., :2] - distance[..., :2] * unit
        high = initial[..., :2] + distance[..., 2:] * unit
        return from_corners(torch.cat([low, high], -1))

    @torch.no_grad()
    def targets(self, initial: Tensor, target_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The bins next to each edge of ``target_boxes [n, 4]``.

        Returns:
            Index of the left bin, and weight of the right bin: ``[n, 4]`` each.
        """
        corners = to_corners(target_boxes)
        unit = (initial[:, 2:] / self.scale).clamp(min=1e-16)
        low = (initial[:, :2] - corners[:, :2]) / unit
        high = (corners[:, 2:] - initial[:, :2]) / unit
        bins = self().to(unit.dtype)
        distance = torch.cat([low, high], -1) - 0.5 * self.scale
        distance = torch.minimum(torch.maximum(distance, bins[0]), bins[-1])
        left = torch.searchsorted(bins, distance.contiguous(), right=True) - 1
        left = left.clamp(0, self.count - 1)
        return left, (distance - bins[left]) / (bins[left + 1] - bins[left])

    def localisation(
        self, corners: Tensor, initial: Tensor, target_boxes: Tensor, iou: Tensor
    ) -> Tensor:
        """Fine-grained localisation loss (FGL): cross entropy of the two bins next to each edge.

        Args:
            corners: logits of matched queries, ``[n, 4 * (count + 1)]``.
            initial: the boxes that they refer to, ``[n, 4]``.
            target_boxes: ``[n, 4]``.
            iou: of the predicted boxes, ``[n]``; weighs the loss.

        Returns:
            ``[n, 4]``.
        """
        left, right_weight = self.targets(initial, target_boxes)
        log_p = corners.unflatten(-1, (4, self.count + 1)).log_softmax(-1)
        at_left = log_p.gather(-1, left[..., None])[..., 0]
        at_right = log_p.gather(-1, left[..., None] + 1)[..., 0]
        return -iou[:, None] * ((1 - right_weight) * at_left + right_weight * at_right)

    def distillation(
        self, prediction: Named, matched: tuple[Tensor, ...], iou: Tensor, balance: tuple[int, int]
    ) -> Tensor:
        """Decoupled distillation focal loss (DDF): divergence from the last layer's distributions.

        Args:
            prediction: with ``corners``, ``teacher_corners`` and ``teacher_logits``.
            matched: (image, query) of the matched queries.
            iou: of their boxes, which weighs their loss; other queries are weighted by the
                teacher's score.
            balance: numbers of matched and other queries; the mean loss of each kind is weighted by
                the square root.

        Returns:
            A scalar.
        """
        temperature = 5
        student = prediction["corners"].unflatten(-1, (4, self.count + 1)) / temperature
        teacher = prediction["teacher_corners"].unflatten(-1, (4, self.count + 1)) / temperature
        weight = prediction["teacher_logits"].sigmoid().amax(-1).index_put(matched, iou).detach()
        q, p = student.log_softmax(-1), teacher.detach().softmax(-1)
        divergence = F.kl_div(q, p, reduction="none").sum(-1)
        loss = temperature**2 * (weight[..., None] * divergence).mean(-1)  # [B, Q]
        is_matched = torch.zeros_like(weight, dtype=torch.bool)
        is_matched[matched] = True
        zero = loss.sum() * 0
        of_matched = loss[is_matched].mean() if is_matched.any() else zero
        of_others = loss[~is_matched].mean() if not is_matched.all() else zero
        a, b = (number**0.5 for number in balance)
        return (a * of_matched + b * of_others) / (a + b)


class LocationQuality(nn.Module):
    """Location quality estimator: corrects the score by how peaked the edge distributions are."""

    def __init__(self, bins: EdgeBins, activation: Activation) -> None:
        super().__init__()
        self.num_bins = bins.count + 1
        self.mlp = MLP(4 * (4 + 1), 64, 1, 2, activation).zero_output()

    def forward(self, logits: Tensor, corners: Tensor) -> Tensor:
        """``logits [B, Q, C]`` plus one number per query, from each edge's four likeliest bins."""
        top = corners.unflatten(-1, (4, self.num_bins)).softmax(-1).topk(4).values
        statistics = torch.cat([top, top.mean(-1, keepdim=True)], -1).flatten(-2)
        return logits + self.mlp(statistics)


class FineHeads(nn.Module):
    """Heads of D-FINE's decoder, in the place of :class:`~deform_attn.detr.decoder.Heads`.

    An ordinary box head of the first layer makes the box that all distances refer to.

    Args:
        size: of the system.
        num_classes: number of classes.
        bins: of the distributions.
    """

    def __init__(self, size: Size, num_classes: int, bins: EdgeBins) -> None:
        super().__init__()
        d, layers, act = size.d_model, size.decoder_layers, size.activation
        self.class_heads = each(layers, lambda: class_head(d, num_classes))
        self.corner_heads = each(layers, lambda: box_head(d, 4 * (bins.count + 1), act))
        self.pre_box_head, self.bins = box_head(d, activation=act), bins
        self.quality = each(layers, lambda: LocationQuality(bins, act))

    def forward(self, layer: int, x: Tensor, state: Named) -> tuple[Named, Named]:
        """Predictions of a layer from its queries ``x [B, Q, d_model]``, and the next state."""
        prediction = {}
        if layer == 0:
            logit = inverse_sigmoid(state["reference_points"], 1e-5)
            pre_boxes = (self.pre_box_head(x) + logit).sigmoid()
            prediction = {"pre_boxes": pre_boxes, "pre_logits": self.class_heads[0](x)}
            state = {"initial": pre_boxes.detach(), "x": torch.zeros_like(x)}
        corners = self.corner_heads[layer](x + state["x"])
        if layer > 0:
            corners = corners + state["corners"]
        boxes = self.bins.boxes(state["initial"], corners)
        logits = self.quality[layer](self.class_heads[layer](x), corners)
        shared = {"corners": corners, "initial": state["initial"]}
        prediction |= {"logits": logits, "boxes": boxes, **shared}
        return prediction, {"reference_points": boxes.detach(), "x": x.detach(), **shared}
