"""Denoising: extra queries made of noised objects, which know what they must become.

DN-DETR (arXiv 2203.01305) moves boxes a little; DINO (2203.03605, 3.3) adds, for each, one moved
further, which must become nothing. Groups of noised queries do not see each other, and queries
that are matched never see them: training alone has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deform_attn.detr.boxes import from_corners, inverse_sigmoid, to_corners
from deform_attn.detr.decoder import Queries
from deform_attn.detr.matching import Pairs, Targets


@dataclass(frozen=True)
class Noised:
    """Noised objects of a batch, in groups of slots; slots without an object are padding.

    Attributes:
        labels: ``[B, D]``, noised; -1 for padding.
        boxes: ``[B, D, 4]``, noised, as logits; for padding 0, or with RT-DETR an empty box.
        pairs: queries and the objects they must become.
        groups: number of groups, all of D / groups slots.
    """

    labels: Tensor
    boxes: Tensor
    pairs: Pairs
    groups: int

    def blocked(self, queries: int) -> Tensor:
        """``[D + queries, D + queries]``, True where a query must not see another."""
        slots = self.labels.shape[1]
        group = torch.arange(slots, device=self.labels.device) // (slots // self.groups)
        group = F.pad(group, (0, queries), value=-1)  # -1: matched, which all may see
        return (group[:, None] != group) & (group >= 0)


class Denoising(nn.Module):
    """Makes denoising queries.

    Args:
        classes: number of classes.
        d: width of the content.
        contrastive: with negatives (DINO); else boxes moved a little alone, and the last channel of
            the content tells noised queries, 1, from matched ones, 0 (DN-DETR).
        number: of queries, of positives for DINO; groups are as many as fit.
        groups: instead, a fixed number of them (DN-DETR).
        label_noise: probability that a label is drawn anew.
        box_noise: of half a box's size.
        padding: padding has an embedding of its own and an empty box (RT-DETR), else zeros.
        eps: of the inverse sigmoid of boxes.
    """

    def __init__(
        self,
        classes: int,
        d: int,
        *,
        contrastive: bool = True,
        number: int = 100,
        groups: int | None = None,
        label_noise: float = 0.25,
        box_noise: float = 1.0,
        padding: bool = False,
        eps: float = 1e-3,
    ) -> None:
        super().__init__()
        self.classes, self.contrastive, self.padding = classes, contrastive, padding
        self.number, self.groups, self.eps = number, groups, eps
        self.label_noise, self.box_noise = label_noise, box_noise
        channels, last = d if contrastive else d - 1, classes if padding else None
        self.embed = nn.Embedding(classes + 1, channels, padding_idx=last)

    def noise(self, targets: Targets) -> Noised | None:
        """Noised objects; None where the batch has no object."""
        counts = [len(target["labels"]) for target in targets]
        most = max(counts)
        if most == 0:
            return None
        groups = self.groups or max(1, self.number // most)
        signs = 2 if self.contrastive else 1  # positives, then negatives
        B, device = len(targets), targets[0]["boxes"].device
        labels = torch.full((B, groups, signs, most), -1, device=device)
        nothing = float(inverse_sigmoid(torch.zeros(()), self.eps)) if self.padding else 0.0
        boxes = torch.full((B, groups, signs, most, 4), nothing, device=device)
        pairs = []
        for i, (n, target) in enumerate(zip(counts, targets)):
            real = target["labels"].expand(groups, signs, n)
            other = torch.randint_like(real, self.classes)
            flip = torch.rand(real.shape, device=device) < self.label_noise
            labels[i, ..., :n] = torch.where(flip, other, real)
            moved = self._moved(target["boxes"].expand(groups, signs, n, 4))
            boxes[i, ..., :n, :] = inverse_sigmoid(moved, self.eps)
            group = torch.arange(groups, device=device)[:, None] * (signs * most)
            slot = torch.arange(n, device=device)
            pairs.append(((group + slot).flatten(), slot.repeat(groups)))
        return Noised(labels.flatten(1), boxes.flatten(1, 3), pairs, groups)

    def _moved(self, boxes: Tensor) -> Tensor:
        """Boxes ``[groups, signs, n, 4]``, moved by up to, negatives by more than, a share."""
        half = boxes[..., 2:] / 2 * self.box_noise
        u = torch.rand_like(boxes)
        if not self.contrastive:
            extent = torch.cat([half, 2 * half], -1)
            return (boxes + (2 * u - 1) * extent).clamp(0, 1)
        u[:, 1] += 1
        sign = torch.randint_like(boxes, 2) * 2 - 1
        corners = to_corners(boxes) + sign * u * torch.cat([half, half], -1)
        return from_corners(corners.clamp(0, 1))

    def before(self, matched: Queries, noised: Noised) -> Queries:
        """Noised queries before the matched ones."""
        assert matched.reference is not None, "denoising needs references"
        content = torch.cat([self.content(noised), matched.content], 1)
        return Queries(content, torch.cat([noised.boxes.sigmoid(), matched.reference], 1))

    def content(self, noised: Noised) -> Tensor:
        """Embedded labels: ``[B, D, d]``."""
        real = noised.labels >= 0
        content: Tensor = self.embed(noised.labels.where(real, self.classes))
        if not self.padding:
            content = content * real[..., None]
        if not self.contrastive:
            content = torch.cat([content, real[..., None].float()], -1)
        return content
