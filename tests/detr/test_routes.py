"""Mr. DETR's routes on DINO and Align-DETR: losses as recorded, noised queries in all routes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deform_attn.detr import models
from deform_attn.detr.backbones import SmallBackbone
from deform_attn.detr.layers import InstructedSelfAttention, Size

from .recorded import FOLDER, _by_formula

BATCH, QUERIES, CLASSES, GROUPS, MOST = 2, 12, 5, 2, 3
SIZE = Size(
    d_model=32,
    num_heads=2,
    dim_feedforward=64,
    num_levels=3,
    encoder_layers=1,
    decoder_layers=2,
    num_queries=QUERIES,
)
SYSTEMS = {"dino": models.mr_detr_dino, "align": models.mr_detr_align}


def drawn(name: str, queries: int) -> dict[str, Tensor]:
    """A set of predictions that follows from its name."""
    logits = _by_formula(f"{name}/logits", [BATCH, queries, CLASSES], 3.0)
    boxes = _by_formula(f"{name}/boxes", [BATCH, queries, 4], 1.5).sigmoid() * 0.6 + 0.1
    return {"logits": logits.double(), "boxes": boxes.double()}


def layers(name: str, queries: int) -> dict[str, Any]:
    sets = [drawn(f"{name}{i}", queries) for i in range(2)]
    return {key: torch.stack([one[key] for one in sets]) for key in ("logits", "boxes")}


def ours(name: str) -> str:
    """Our name of a recorded loss: loss_class_dn_o2m_0 is class/dn_o2m0."""
    kind, part = re.fullmatch(r"loss_(class|bbox|giou)(.*)", name).groups()  # type: ignore[union-attr]
    kind = {"bbox": "l1"}.get(kind, kind)
    part = part.replace("_group_", "_o2m")
    if part.startswith("_enc"):
        return f"{kind}/encoder{part.removeprefix('_enc')}"
    if part.startswith("_dn"):
        last = re.sub(r"_(\d)$", r"\1", part)
        return f"{kind}/{last[1:]}" if last[-1].isdigit() else f"{kind}/{last[1:]}1"
    if part.startswith(("_o2m", "_sep")):
        return f"{kind}/{part[1:].replace('_', '')}"
    return f"{kind}/layer{part[1:] or 1}"


@pytest.mark.parametrize("kind", SYSTEMS)
def test_losses_are_those_of_the_official_code(kind: str) -> None:
    targets = [
        {
            "labels": torch.tensor([1, 3, 1][:n]),
            "boxes": (_by_formula(f"targets/{i}", [n, 4], 1.5).sigmoid() * 0.6 + 0.1).double(),
        }
        for i, n in enumerate((3, 2))
    ]
    slot = torch.arange(MOST)
    pairs = []
    for target in targets:
        which = slot[: len(target["labels"])]
        first = torch.arange(GROUPS)[:, None] * (2 * MOST)
        pairs.append(((first + which).flatten(), which.repeat(GROUPS)))
    outputs: dict[str, Any] = layers("layer", QUERIES)
    for route in ("o2m", "sep"):
        outputs[route] = layers(route, QUERIES)
    for name, holder in (("dn", outputs), ("dn_o2m", outputs["o2m"]), ("dn_sep", outputs["sep"])):
        holder["dn"] = layers(name, GROUPS * 2 * MOST) | {"pairs": pairs, "groups": GROUPS}
    for name in ("encoder", "encoder_o2m"):
        outputs[name] = drawn(name, QUERIES)
    criterion = SYSTEMS[kind](SmallBackbone(), CLASSES, SIZE).criterion
    assert criterion.one_to_many is not None
    criterion.one_to_many = replace(criterion.one_to_many, max_choices=225)  # of 900 queries
    found = criterion(outputs, targets)
    recorded = json.loads((FOLDER / "mr_detr_routes.json").read_text())
    expected = {
        ours(name.removeprefix(f"{kind}/")): value
        for name, value in recorded.items()
        if name.startswith(kind)
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        weight = criterion.weights[name.partition("/")[0]]
        assert found[name].item() / weight == pytest.approx(value, rel=5e-6), name


def test_tokens_and_matched_queries_do_not_see_noised_ones() -> None:
    attention = torch.nn.MultiheadAttention(32, 2, batch_first=True)
    instructed = InstructedSelfAttention(attention, 32, 4)
    x, pos = torch.rand(2, 1, 9, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[3:, :3] = True  # three noised queries, six matched ones
    changed = x.clone()
    changed[:, :3] += 1
    with torch.no_grad():
        one, two = (instructed(y, pos, mask) for y in (x, changed))
        alone = instructed(x[:, 3:], pos[:, 3:], torch.zeros(6, 6, dtype=torch.bool))
        instructed.tokens.weight += 1
        other = instructed(x, pos, mask)
    torch.testing.assert_close(one[:, 3:], two[:, 3:])
    torch.testing.assert_close(one[:, :3], other[:, :3])  # noised queries do not see the tokens
    assert not torch.allclose(one[:, 3:], other[:, 3:])
    assert alone.shape == (1, 6, 32)


@pytest.mark.parametrize("kind", SYSTEMS)
def test_all_parameters_are_trained(kind: str) -> None:
    torch.manual_seed(0)
    system = SYSTEMS[kind](SmallBackbone((16, 16, 16)), CLASSES, SIZE)
    target = {"labels": torch.tensor([1, 2]), "boxes": torch.rand(2, 4) * 0.3 + 0.3}
    targets = [target, {"labels": target["labels"][:1], "boxes": target["boxes"][:1]}]
    outputs = system.model.train()(torch.rand(2, 3, 64, 64), None, targets)
    losses = system.criterion(outputs, targets)
    assert {"class/dn_o2m0", "giou/dn_sep1", "l1/encoder_o2m"} <= set(losses)
    torch.stack(list(losses.values())).sum().backward()
    without = {n for n, p in system.model.named_parameters() if p.grad is None}
    assert without == set()
