"""D-FINE (arXiv 2410.13842): a box's edges as distributions, refined from layer to layer.

Each edge is ``reference edge + sum_n softmax(corners)_n W(n)``, in quarters of the first box's
size; a layer adds to the logits of the layer before it, and learns from the last layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deform_attn.detr.boxes import Named, from_corners, inverse_sigmoid, to_corners
from deform_attn.detr.encoder import MLP, Activation, Size, box_head, class_head, each


class Gate(nn.Module):
    """``norm(g1 * x + g2 * update)``: how much of the old state, how much of the attended."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * d, 2 * d)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        """``[B, Q, d]`` twice to ``[B, Q, d]``."""
        keep, take = self.gate(torch.cat([x, update], -1)).sigmoid().chunk(2, -1)
        return self.norm(keep * x + take * update)


class EdgeBins(nn.Module):
    """The distances ``W(n)`` that an edge's distribution is over: fine near 0, coarse far away.

    Args:
        count: number of intervals; there is one bin more.
        up: ``W`` is linear up to about this.
        scale: edges move in units of ``size / scale``; larger for small corrections.

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
        powers = step ** torch.arange(1, self.count // 2, device=bound.device) - 1
        return torch.cat([-2 * bound, -powers.flip(0), 0 * bound, powers, 2 * bound])

    def boxes(self, initial: Tensor, corners: Tensor) -> Tensor:
        """Box ``[..., 4]`` from the initial box and the logits ``[..., 4 * (count + 1)]``."""
        probabilities = corners.unflatten(-1, (4, self.count + 1)).softmax(-1)
        distance = 0.5 * self.scale + F.linear(probabilities, self()[None])[..., 0]
        unit = initial[..., 2:] / self.scale
        low = initial[..., :2] - distance[..., :2] * unit
        high = initial[..., :2] + distance[..., 2:] * unit
        return from_corners(torch.cat([low, high], -1))

    @torch.no_grad()
    def targets(self, initial: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Left bin of each edge of ``truth`` and the weight of the bin right of it: ``[n, 4]``."""
        corners = to_corners(truth)
        unit = (initial[:, 2:] / self.scale).clamp(min=1e-16)
        low = (initial[:, :2] - corners[:, :2]) / unit
        high = (corners[:, 2:] - initial[:, :2]) / unit
        bins = self()
        distance = torch.cat([low, high], -1) - 0.5 * self.scale
        distance = torch.minimum(torch.maximum(distance, bins[0]), bins[-1])
        left = torch.searchsorted(bins, distance.contiguous(), right=True) - 1
        left = left.clamp(0, self.count - 1)
        return left, (distance - bins[left]) / (bins[left + 1] - bins[left])

    def localisation(self, corners: Tensor, initial: Tensor, truth: Tensor, iou: Tensor) -> Tensor:
        """FGL: cross entropy on the two bins beside the truth, weighted by IoU: ``[n, 4]``.

        ``corners [n, 4 * (count + 1)]`` are logits of matched queries, which refer to the boxes
        ``initial [n, 4]``; ``truth [n, 4]`` are their objects, ``iou [n]`` how well they are met.
        """
        left, right_weight = self.targets(initial, truth)
        log_p = corners.unflatten(-1, (4, self.count + 1)).log_softmax(-1)
        at_left = log_p.gather(-1, left[..., None])[..., 0]
        at_right = log_p.gather(-1, left[..., None] + 1)[..., 0]
        return -iou[:, None] * ((1 - right_weight) * at_left + right_weight * at_right)

    def distillation(
        self, prediction: Named, matched: tuple[Tensor, ...], iou: Tensor, balance: tuple[int, int]
    ) -> Tensor:
        """DDF: the last layer's distributions teach, whether a query is matched or not.

        A query that is ``matched``, (image, query), weighs its box's ``iou``, another what the
        teacher scores it. The ``balance`` is of how many are matched and how many not; each kind
        counts as the root of that.
        """
        temperature = 5
        student = prediction["corners"].unflatten(-1, (4, self.count + 1)) / temperature
        teacher = prediction["teacher_corners"].unflatten(-1, (4, self.count + 1)) / temperature
        weight = prediction["teacher_logits"].sigmoid().amax(-1).index_put(matched, iou).detach()
        q, p = student.log_softmax(-1), teacher.detach().softmax(-1)
        divergence = F.kl_div(q, p, reduction="none").sum(-1)
        loss = temperature**2 * (weight[..., None] * divergence).mean(-1)  # [B, Q]
        hit = torch.zeros_like(weight, dtype=torch.bool)
        hit[matched] = True
        zero = loss.sum() * 0
        of_hits = loss[hit].mean() if hit.any() else zero
        of_others = loss[~hit].mean() if not hit.all() else zero
        a, b = (number**0.5 for number in balance)
        return (a * of_hits + b * of_others) / (a + b)


class Quality(nn.Module):
    """LQE: a peaked distribution is a sure box, and a sure box a better score."""

    def __init__(self, bins: EdgeBins, act: Activation) -> None:
        super().__init__()
        self.bins, self.mlp = bins.count + 1, MLP(4 * (4 + 1), 64, 1, 2, act).zeroed()

    def forward(self, logits: Tensor, corners: Tensor) -> Tensor:
        """``logits [B, Q, C]`` plus one number a query, of each edge's four likeliest bins."""
        top = corners.unflatten(-1, (4, self.bins)).softmax(-1).topk(4).values
        statistics = torch.cat([top, top.mean(-1, keepdim=True)], -1).flatten(-2)
        return logits + self.mlp(statistics)


class FineHeads(nn.Module):
    """Heads of D-FINE's decoder: as :class:`~deform_attn.detr.decoder.Heads`, with distributions.

    The first layer's plain head makes the box which all distances refer to.
    """

    def __init__(self, size: Size, classes: int, bins: EdgeBins) -> None:
        super().__init__()
        d, layers, act, outputs = size.d, size.decoder_layers, size.act, 4 * (bins.count + 1)
        self.classes = each(layers, lambda: class_head(d, classes))
        self.corners = each(layers, lambda: box_head(d, outputs, act))
        self.first_box, self.bins = box_head(d, act=act), bins
        self.quality = each(layers, lambda: Quality(bins, act))

    def forward(self, i: int, x: Tensor, state: Named) -> tuple[Named, Named]:
        """Predictions of layer i from its queries ``x``; the state of the next layer."""
        prediction = {}
        if i == 0:
            guess = (self.first_box(x) + inverse_sigmoid(state["reference"], 1e-5)).sigmoid()
            prediction = {"pre_boxes": guess, "pre_logits": self.classes[0](x)}
            state = {"initial": guess.detach(), "x": torch.zeros_like(x)}
        corners = self.corners[i](x + state["x"])
        if i > 0:
            corners = corners + state["corners"]
        boxes = self.bins.boxes(state["initial"], corners)
        logits = self.quality[i](self.classes[i](x), corners)
        shared = {"corners": corners, "initial": state["initial"]}
        prediction |= {"logits": logits, "boxes": boxes, **shared}
        return prediction, {"reference": boxes.detach(), "x": x.detach(), **shared}
