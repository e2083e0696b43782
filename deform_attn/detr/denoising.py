"""Denoising: additional queries made of noised ground truth, with known targets.

DN-DETR (arXiv 2203.01305) moves boxes a little; DINO (arXiv 2203.03605, section 3.3) adds, for each
of them, a negative that is moved further and must be classified as background. Groups of noised
queries do not attend to each other, and matched queries do not attend to them. Used in training
only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deform_attn.detr.boxes import from_corners, inverse_sigmoid, to_corners
from deform_attn.detr.matching import Pairs, Targets
from deform_attn.detr.queries import Queries


@dataclass(frozen=True)
class Noised:
    """Noised objects of a batch, in groups of slots; slots without an object are padding.

    Attributes:
        labels: noised labels ``[B, slots]``; -1 for padding.
        boxes: noised boxes as logits, ``[B, slots, 4]``; padding is 0, or an empty box (RT-DETR).
        pairs: queries and the targets they were made of.
        groups: number of groups, of ``slots / groups`` slots each.
    """

    labels: Tensor
    boxes: Tensor
    pairs: Pairs
    groups: int

    def attn_mask(self, num_queries: int) -> Tensor:
        """``[slots + num_queries] * 2``, True where a query must not attend to another."""
        slots = self.labels.shape[1]
        group = torch.arange(slots, device=self.labels.device) // (slots // self.groups)
        group = F.pad(group, (0, num_queries), value=-1)  # -1: matched queries, visible to all
        return (group[:, None] != group) & (group >= 0)


class Denoising(nn.Module):
    """Makes denoising queries.

    Args:
        num_classes: number of classes.
        d_model: channels of the content.
        contrastive: with negatives (DINO). Otherwise without, and the last channel of the content
            is 1 for noised and 0 for matched queries (DN-DETR).
        number: of positive queries, in as many groups as fit.
        groups: a fixed number of groups instead (DN-DETR).
        label_noise: probability that a label is replaced by a random one.
        box_noise: largest shift, as a fraction of half a box's side.
        padding: padding slots have an embedding of their own and an empty box (RT-DETR), else
            zeros.
        spare: the embedding has one row more than classes, as in all systems but Mr. DETR's.
        eps: of the inverse sigmoid of boxes.

    Example:
        >>> import torch
        >>> from deform_attn.detr.denoising import Denoising
        >>> targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
        >>> noised = Denoising(num_classes=3, d_model=32, number=4).noise(targets)
        >>> noised.groups, noised.labels.shape  # a positive and a negative query in each group
        (4, torch.Size([1, 8]))
    """

    def __init__(
        self,
        num_classes: int,
        d_model: int,
        *,
        contrastive: bool = True,
        number: int = 100,
        groups: int | None = None,
        label_noise: float = 0.25,
        box_noise: float = 1.0,
        padding: bool = False,
        spare: bool = True,
        eps: float = 1e-3,
    ) -> None:
        super().__init__()
        self.num_classes, self.contrastive, self.padding = num_classes, contrastive, padding
        self.number, self.groups, self.eps = number, groups, eps
        self.label_noise, self.box_noise = label_noise, box_noise
        channels, last = d_model if contrastive else d_model - 1, num_classes if padding else None
        self.label_embed = nn.Embedding(num_classes + spare, channels, padding_idx=last)

    def noise(self, targets: Targets) -> Noised | None:
        """Noised objects; None where the batch has no object."""
        counts = [len(target["labels"]) for target in targets]
        most = max(counts)
        if most == 0:
            return None
        groups = self.groups or max(1, self.number // most)
        signs = 2 if self.contrastive else 1  # positives, then negatives
        B, like = len(targets), targets[0]["boxes"]
        labels = torch.full((B, groups, signs, most), -1, device=like.device)
        empty = float(inverse_sigmoid(torch.zeros(()), self.eps)) if self.padding else 0.0
        boxes = like.new_full((B, groups, signs, most, 4), empty)
        pairs = []
        for i, (n, target) in enumerate(zip(counts, targets)):
            own = target["labels"].expand(groups, signs, n)
            other = torch.randint_like(own, self.num_classes)
            flip = torch.rand(own.shape, device=like.device) < self.label_noise
            labels[i, ..., :n] = torch.where(flip, other, own)
            moved = self._moved(target["boxes"].expand(groups, signs, n, 4))
            boxes[i, ..., :n, :] = inverse_sigmoid(moved, self.eps)
            group = torch.arange(groups, device=like.device)[:, None] * (signs * most)
            slot = torch.arange(n, device=like.device)
            pairs.append(((group + slot).flatten(), slot.repeat(groups)))
        return Noised(labels.flatten(1), boxes.flatten(1, 3), pairs, groups)

    def _moved(self, boxes: Tensor) -> Tensor:
        """Boxes ``[groups, signs, n, 4]`` with random shifts; negatives are shifted further."""
        half = boxes[..., 2:] / 2 * self.box_noise
        u = torch.rand_like(boxes)
        if not self.contrastive:
            extent = torch.cat([half, 2 * half], -1)
            return (boxes + (2 * u - 1) * extent).clamp(0, 1)
        u[:, 1] += 1
        sign = torch.randint_like(boxes, 2) * 2 - 1
        corners = to_corners(boxes) + sign * u * torch.cat([half, half], -1)
        return from_corners(corners.clamp(0, 1))

    def prepend(
        self, matched: Queries, noised: Noised, query_pos: Callable[[Tensor], Tensor] | None = None
    ) -> Queries:
        """Noised queries, followed by the matched ones.

        Args:
            matched: of an encoder's proposals, or learnt.
            noised: of :meth:`noise`.
            query_pos: of boxes, where the matched queries have theirs (Mr. DETR).
        """
        assert matched.reference_points is not None, "denoising needs references"
        content = torch.cat([self.content(noised), matched.content], 1)
        boxes = noised.boxes.sigmoid().to(matched.reference_points.dtype)
        references = torch.cat([boxes, matched.reference_points], 1)
        if matched.query_pos is None or query_pos is None:
            return Queries(content, references)
        return Queries(content, references, torch.cat([query_pos(boxes), matched.query_pos], 1))

    def content(self, noised: Noised) -> Tensor:
        """Embedded labels: ``[B, slots, d_model]``."""
        real = noised.labels >= 0
        unlabelled = self.num_classes if self.padding else 0
        content: Tensor = self.label_embed(noised.labels.where(real, unlabelled))
        if not self.padding:
            content = content * real[..., None]
        if not self.contrastive:
            content = torch.cat([content, real[..., None].to(content.dtype)], -1)
        return content
