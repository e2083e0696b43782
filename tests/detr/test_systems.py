"""What was not recorded: recipes as a whole, random draws, and the edges."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from deform_attn.detr import losses, models
from deform_attn.detr.backbones import SmallBackbone, hgnetv2, resnet
from deform_attn.detr.boxes import sine_of_pixels, to_corners
from deform_attn.detr.denoising import Denoising
from deform_attn.detr.dfine import EdgeBins
from deform_attn.detr.matching import Hungarian, Lexicographic, OneToMany, union
from deform_attn.detr.memory import Memory
from deform_attn.detr.queries import proposals

TINY = models.Size(
    d_model=32,
    num_heads=4,
    num_levels=3,
    encoder_layers=1,
    decoder_layers=2,
    dim_feedforward=32,
    num_queries=12,
)
SYSTEMS: dict[str, Callable[..., models.System]] = {
    "stewart": models.stewart,
    "detr": models.detr,
    "dab_detr": models.dab_detr,
    "dn_detr": models.dn_detr,
    "one_stage": models.deformable_detr,
    "refined": partial(models.deformable_detr, refine=True),
    "two_stage": partial(models.deformable_detr, two_stage=True),
    "dab_deformable_detr": models.dab_deformable_detr,
    "dn_deformable_detr": models.dn_deformable_detr,
    "dino": models.dino,
    "rtdetr": models.rtdetr,
    "rtdetrv2": models.rtdetrv2,
    "rtdetrv2_discrete": partial(models.rtdetrv2, method="discrete"),
    "dfine": models.dfine,
    "dfine_wide": lambda *of, size: models.dfine(*of, replace(size, encoder_dims=(48, 40))),
    "rtdetr_wide": lambda *of, size: models.rtdetr(*of, replace(size, encoder_dims=(48, 40))),
    "deim": models.deim,
    "deim_rtdetrv2": models.deim_rtdetrv2,
    "mr_detr": models.mr_detr,
}
TARGETS = [
    {
        "labels": torch.tensor([2, 0]),
        "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.4, 0.2]]),
    },
    {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
]
NOTHING = [TARGETS[1], TARGETS[1]]


def made(name: str) -> models.System:
    return SYSTEMS[name](SmallBackbone((16, 16, 32)), 3, size=TINY)


def padded() -> tuple[Tensor, Tensor]:
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 48:], mask[1, :, 80:] = True, True
    return torch.rand(2, 3, 64, 96).masked_fill(mask[:, None], 0), mask


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_step_reaches_every_parameter(name: str) -> None:
    model, criterion, _ = made(name)
    for parameter in model.parameters():  # heads start at zero, and would hide what is before
        torch.nn.init.normal_(parameter, std=0.05)
    images, mask = padded()
    found = criterion(model(images, mask, TARGETS), TARGETS)
    assert all(loss.isfinite() for loss in found.values()), found
    torch.stack(list(found.values())).sum().backward()
    unreached = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not unreached


def numbers(outputs: Any) -> list[Tensor]:
    """All floating tensors of a detector's outputs."""
    if isinstance(outputs, Mapping):
        return [x for value in outputs.values() for x in numbers(value)]
    floating = isinstance(outputs, Tensor) and outputs.is_floating_point()
    return [outputs] if floating else []


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_half_precision(name: str, autocast: bool) -> None:
    """Predictions and losses are float32, whether operations or weights are bfloat16."""
    model, criterion, _ = made(name)
    images, mask = padded()
    if not autocast:
        model, images = model.to(torch.bfloat16), images.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = model(images, mask, TARGETS)
    assert {x.dtype for x in numbers(outputs)} == {torch.float32}
    found = criterion(outputs, TARGETS)
    assert all(loss.isfinite() and loss.dtype is torch.float32 for loss in found.values())
    torch.stack(list(found.values())).sum().backward()


@pytest.mark.parametrize("name", SYSTEMS)
def test_images_without_objects(name: str) -> None:
    """No loss of boxes, and a gradient of every parameter, which DDP needs."""
    model, criterion, _ = made(name)
    found = criterion(model(*padded(), NOTHING), NOTHING)
    assert all(loss.isfinite() for loss in found.values()), found
    assert all(not loss for key, loss in found.items() if key.startswith(("l1", "giou")))
    torch.stack(list(found.values())).sum().backward()
    assert not {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}


@pytest.mark.parametrize("name", SYSTEMS)
def test_results_are_boxes_in_pixels(name: str) -> None:
    model, _, postprocess = made(name)
    images, mask = padded()
    with torch.no_grad():
        outputs = model.eval()(images, mask)
        results = postprocess(outputs, torch.tensor([[64, 96], [48, 80]]))
        again = postprocess(model(images, mask, TARGETS), torch.tensor([[64, 96], [48, 80]]))
    assert not {"dn", "o2m", "sep"} & set(outputs)
    for result, same in zip(results, again):
        n = len(result["scores"])
        assert result["boxes"].shape == (n, 4)
        assert result["labels"].shape == (n,)
        assert ((result["labels"] >= 0) & (result["labels"] < 3)).all()
        assert ((result["scores"] >= 0) & (result["scores"] <= 1)).all()
        assert all(torch.equal(result[key], same[key]) for key in result)
    corners = to_corners(outputs["boxes"][-1, 1]) * torch.tensor([80, 48, 80, 48])
    distance = torch.cdist(results[1]["boxes"], corners, p=1).amin(-1)
    assert (distance < 1e-3).all()


@pytest.mark.parametrize("name", ["dn_detr", "dn_deformable_detr", "dino", "rtdetr", "deim"])
def test_noised_queries_are_not_seen(name: str) -> None:
    model: Any = made(name).model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images, mask = padded()
    with torch.no_grad():
        alone, beside = model(images, mask), model(images, mask, TARGETS)
    assert "dn" in beside
    for key in ("logits", "boxes"):
        torch.testing.assert_close(alone[key], beside[key], rtol=1e-5, atol=1e-6)


def test_fewer_layers_in_evaluation() -> None:
    size = replace(TINY, decoder_layers=3, eval_layers=2, expansion=0.5)
    model = models.rtdetr(SmallBackbone(), 3, size).model
    images = torch.rand(1, 3, 64, 64)
    assert len(model.train()(images)["logits"]) == 3
    assert len(model.eval()(images)["logits"]) == 2


def drawn(denoising: Denoising, n: int = 4) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Labels and corners of positives and of what else there is, and their noise."""
    labels, boxes = torch.arange(n) % 3, torch.tensor([[0.5, 0.5, 0.2, 0.3]]).repeat(n, 1)
    target: Mapping[str, Tensor] = {"labels": labels, "boxes": boxes}
    noised = denoising.noise([target])
    assert noised is not None
    moved = noised.boxes[0].sigmoid().unflatten(0, (noised.groups, -1, n))
    return labels, noised.labels[0].unflatten(0, (noised.groups, -1, n)), moved, noised


def test_contrastive_noise() -> None:
    labels, found, moved, noised = drawn(Denoising(3, 8, number=20000, box_noise=0.4))
    assert noised.groups == 5000
    assert moved.shape[1] == 2
    flipped = (found != labels).float().mean()  # a quarter is drawn anew, from three classes
    assert abs(flipped - 0.25 * 2 / 3) < 0.01
    half = torch.tensor([0.1, 0.15, 0.1, 0.15]) * 0.4
    corner = torch.tensor([0.4, 0.35, 0.6, 0.65])
    shift = (to_corners(moved) - corner) / half
    near, far = shift[:, 0].abs(), shift[:, 1].abs()
    assert near.max() < 1.001
    assert abs(near.mean() - 0.5) < 0.01
    assert far.min() > 0.999
    assert far.max() < 2.001
    assert abs(far.mean() - 1.5) < 0.01
    assert abs(shift.mean()) < 0.02  # either way
    queries, targets = noised.pairs[0]
    assert torch.equal(queries[:8], torch.tensor([0, 1, 2, 3, 8, 9, 10, 11]))
    assert torch.equal(targets[:8], torch.arange(4).repeat(2))


def test_noise_of_boxes_alone() -> None:
    plain = Denoising(3, 8, contrastive=False, groups=5000, label_noise=0.2, box_noise=0.4)
    labels, found, moved, noised = drawn(plain)
    assert moved.shape[:2] == (5000, 1)
    assert abs((found != labels).float().mean() - 0.2 * 2 / 3) < 0.01
    shift = (moved - torch.tensor([0.5, 0.5, 0.2, 0.3])) / 0.4
    bound = torch.tensor([0.1, 0.15, 0.2, 0.3])
    assert (shift.abs() <= bound * 1.001).all()
    assert (abs(shift.abs().mean((0, 1, 2)) / bound - 0.5) < 0.02).all()
    assert (plain.content(noised)[..., -1] == 1).all()


def test_padding_slots_are_zero() -> None:
    denoising = Denoising(3, 8, number=6)
    noised = denoising.noise(TARGETS)
    assert noised is not None
    assert not denoising.content(noised)[1].any()
    assert not noised.boxes[1].any()
    assert len(noised.pairs[1][0]) == 0
    assert denoising.noise(NOTHING) is None


@pytest.mark.parametrize(("padding", "logit"), [(False, 0.0), (True, -11.5129)])
def test_padding_slots_are_empty_boxes_in_rtdetr(padding: bool, logit: float) -> None:
    noised = Denoising(3, 8, padding=padding, eps=1e-5).noise(TARGETS)
    assert noised is not None
    slots = noised.boxes[noised.labels < 0]
    assert len(slots) == noised.labels.shape[1]  # all of the second image
    torch.testing.assert_close(slots, torch.full_like(slots, logit), rtol=0, atol=1e-4)


def test_one_to_many_is_thinned() -> None:
    box = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    prediction = {"logits": torch.zeros(1, 50, 3), "boxes": box.repeat(50, 1)[None]}
    target = {"labels": torch.tensor([1]), "boxes": box}
    [(queries, _)] = OneToMany()(prediction, [target])
    assert len(queries) == 6
    [(queries, _)] = OneToMany(max_choices=4)(prediction, [target])
    assert len(queries) == 4


def test_matching_survives_what_is_not_a_number() -> None:
    prediction = {"logits": torch.full((1, 5, 3), torch.nan), "boxes": torch.rand(1, 5, 4)}
    [(queries, targets)] = Hungarian()(prediction, [TARGETS[0]])
    assert len(set(queries.tolist())) == 2
    assert sorted(targets.tolist()) == [0, 1]


def test_the_most_frequent_object_stays() -> None:
    a, b = torch.tensor([3]), torch.tensor([7])
    zero, one = torch.tensor([0]), torch.tensor([1])
    [(queries, targets)] = union([[(a, zero)], [(a, one)], [(a, one)], [(b, zero)]])
    assert dict(zip(queries.tolist(), targets.tolist())) == {3: 1, 7: 0}


def test_early_predictions_win() -> None:
    predicted = torch.tensor([[32.0, 32, 20, 20], [32, 32, 20, 20], [5, 5, 4, 4]])
    cost = Lexicographic.cost(predicted, torch.tensor([[33.0, 33, 20, 20]]))
    assert cost[:, 0].argmin() == 0  # same box, predicted first
    assert cost[2, 0] > 100  # no overlap


def test_a_cell_of_more_objects_than_steps_says_what_it_can() -> None:
    cell = {"grid": (1, 1), "pixels": torch.full((1, 4), 64), "extent": torch.ones(1, 2)}
    objects = torch.rand(7, 4)
    predicted = objects[[6, 1, 4, 0, 3]][None]
    [(queries, which)] = Lexicographic()(cell | {"boxes": predicted}, [{"boxes": objects}])
    assert queries.tolist() == [0, 1, 2, 3, 4]
    assert which.tolist() == [6, 1, 4, 0, 3]  # not the first five


def test_a_cell_is_silent_after_it_was_unsure() -> None:
    model, _, postprocess = made("stewart")
    outputs = model.eval()(torch.rand(1, 3, 64, 64))
    logits = torch.full_like(outputs["logits"], -5)
    logits[..., -1] = 5
    logits[0, 0, [0, 2, 5, 6], 1] = 20  # cell 0: sure, unsure, sure; cell 1: sure, sure
    results = postprocess(outputs | {"logits": logits}, torch.tensor([[64, 64]]))
    expected = to_corners(outputs["boxes"][0, 0, [0, 5, 6]]) * 64
    torch.testing.assert_close(results[0]["boxes"], expected)


LOSSES = [
    (losses.FocalLoss(), [0.25 * 0.2**2 * -math.log(0.8), 0.75 * 0.3**2 * -math.log(0.7)]),
    (
        losses.VarifocalLoss(),
        [0.6 * -(0.6 * math.log(0.8) + 0.4 * math.log(0.2)), 0.75 * 0.3**2 * -math.log(0.7)],
    ),
    (
        losses.MatchabilityAwareLoss(),
        [
            -(0.6**1.5 * math.log(0.8) + (1 - 0.6**1.5) * math.log(0.2)),
            0.3**1.5 * -math.log(0.7),
        ],
    ),
]


@pytest.mark.parametrize(("loss", "terms"), LOSSES)
def test_classification_losses_by_hand(loss: losses.Classification, terms: list[float]) -> None:
    """One query with two classes: the target has p = 0.8 and IoU 0.6, the other class p = 0.3."""
    logits = torch.logit(torch.tensor([[0.8, 0.3]]))
    one_hot = torch.tensor([[1.0, 0.0]])
    found = loss(logits, one_hot, 0.6 * one_hot, torch.tensor(2.0))
    assert found.item() == pytest.approx(sum(terms) / 2, rel=1e-5)
    assert not loss.no_object


def test_softmax_losses_by_hand() -> None:
    """Two queries, the second without an object: DETR's mean, and Stewart's sum."""
    p = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.2, 0.7]])
    one_hot = torch.tensor([[0.0, 1, 0], [0, 0, 0]])
    of = [-math.log(0.5), -math.log(0.7)]
    for loss, expected in (
        (losses.WeightedCrossEntropy(), (of[0] + 0.1 * of[1]) / 1.1),
        (losses.WeightedCrossEntropy(no_object_weight=0.5), (of[0] + 0.5 * of[1]) / 1.5),
        (losses.CrossEntropy(), sum(of) / 4),
    ):
        found = loss(p.log(), one_hot, one_hot, torch.tensor(4.0))
        assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weight", [0.1, 0.3])
def test_a_criterion_asks_the_loss_whether_the_last_logit_is_no_object(weight: float) -> None:
    criterion = replace(made("detr").criterion, classification=losses.WeightedCrossEntropy(weight))
    outputs = {"logits": torch.zeros(1, 1, 5, 4), "boxes": torch.full((1, 1, 5, 4), 0.5)}
    box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    criterion(outputs, [{"labels": torch.tensor([2]), "boxes": box}])
    with pytest.raises(ValueError, match=r"expected 0 to 2, got 3 to 3"):
        criterion(outputs, [{"labels": torch.tensor([3]), "boxes": box}])


def test_proposals_of_an_image() -> None:
    memory = Memory.of([torch.zeros(1, 8, n, n) for n in (80, 40, 20)])
    logits, valid = proposals(memory)
    assert valid.shape == (1, 8400, 1)
    assert (~valid).sum() == 316  # as in RT-DETR at 640 pixels
    assert logits[~valid.expand_as(logits)].isinf().all()
    box = logits[0, 80 * 80 + 40 * 3 + 7].sigmoid()
    torch.testing.assert_close(box, torch.tensor([7.5 / 40, 3.5 / 40, 0.1, 0.1]))
    assert not proposals(Memory.of([torch.zeros(1, 8, 1, 1)] * 6))[1][0, 5]  # 1.6 of the image


@pytest.mark.parametrize(("temperature", "shift"), [(20, 0.0), (10000, -0.5)])
def test_positions_of_pixels(temperature: float, shift: float) -> None:
    padding = torch.zeros(1, 4, 6, dtype=torch.bool)
    padding[:, 3], padding[..., 4:] = True, True  # 3 rows and 4 columns are left
    found = sine_of_pixels(padding, torch.zeros(1, 8, 4, 6), temperature, shift)[0, :, 1, 2]
    expected = []
    for place, extent in ((2, 3), (3, 4)):  # counted from 1: y, then x
        for power in (0, 0.5):
            angle = 2 * math.pi * (place + shift) / (extent + 1e-6) / temperature**power
            expected += [math.sin(angle), math.cos(angle)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_scores_are_fused() -> None:
    p = torch.tensor([0.5, 0.2, 0.9]).view(3, 1, 1, 1)
    outputs = {"logits": torch.logit(p), "boxes": torch.rand(3, 1, 1, 4)}
    [result] = models.BestScores(fuse=True)(outputs, torch.tensor([[10, 10]]))
    second = math.sqrt((0.2**2.001 + 0.5**1.853) / 2)
    third = math.sqrt((0.9**2.001 + second**1.853) / 2)
    assert result["scores"].item() == pytest.approx(third, rel=1e-5)


@pytest.mark.parametrize("scale", [4.0, 8.0])
def test_edges_are_found_again(scale: float) -> None:
    """A distribution on the two bins that are targets, with their weights, is the target."""
    bins, n = EdgeBins(scale=scale), 200
    initial = torch.cat([0.3 + 0.4 * torch.rand(n, 2), 0.2 + 0.2 * torch.rand(n, 2)], -1)
    target_boxes = initial * (0.9 + 0.2 * torch.rand(n, 4))
    left, right_weight = bins.targets(initial, target_boxes)
    p = torch.zeros(n, 4, bins.count + 1)
    p.scatter_(-1, left[..., None], 1 - right_weight[..., None])
    p.scatter_add_(-1, left[..., None] + 1, right_weight[..., None])
    found = bins.boxes(initial, p.log().flatten(1))
    torch.testing.assert_close(found, target_boxes, rtol=1e-4, atol=1e-5)


GOOD = TARGETS[0]
BAD: list[tuple[list[Any], str]] = [
    ([GOOD], r"targets: expected 2, one per image, got 1"),
    ([GOOD, {**GOOD, "labels": torch.tensor([0.0, 1.0])}], r"\[1\]\['labels'\]: expected integers"),
    ([GOOD, {**GOOD, "boxes": torch.rand(3, 4)}], r"expected numbers \[2, 4\], got \[3, 4\]"),
    ([GOOD, {**GOOD, "labels": torch.tensor([0, 3])}], r"expected 0 to 2, got 0 to 3"),
    ([{**GOOD, "boxes": GOOD["boxes"] * 64}, GOOD], r"\[0\]\['boxes'\]: expected cxcywh in"),
    ([{**GOOD, "boxes": GOOD["boxes"] * torch.nan}, GOOD], r"got nan"),
]


@pytest.mark.parametrize(("targets", "message"), BAD)
@pytest.mark.parametrize("name", ["dino", "detr"])
def test_bad_targets(name: str, targets: Any, message: str) -> None:
    model, criterion, _ = made(name)
    images = torch.rand(2, 3, 64, 64)
    with pytest.raises(ValueError, match=message):
        criterion(model(images), targets)
    if name == "dino":
        with pytest.raises(ValueError, match=message):
            model(images, None, targets)


def test_bad_images() -> None:
    model = made("dino").model
    with pytest.raises(ValueError, match=r"images: expected shape \[B, 3, H, W\], got \(1, 1, 64"):
        model(torch.rand(1, 1, 64, 64))
    with pytest.raises(ValueError, match=r"padding_mask: expected bool of shape \[1, 64, 64\]"):
        model(torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64))
    model = models.dino(SmallBackbone(), 3, replace(TINY, num_queries=100)).model
    with pytest.raises(ValueError, match=r"memory: expected at least 100 pixels, .* got 84"):
        model(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"d_model": 32.0}, r"d_model: expected an integer, got 32\.0"),
        ({"num_queries": 0}, "num_queries: expected at least 1, got 0"),
        ({"encoder_layers": -1}, "encoder_layers: expected a number from 0, got -1"),
        ({"eval_layers": 7}, "eval_layers: expected a number up to 6, got 7"),
        ({"num_points": "4"}, "num_points: expected a count, or one for each of 4 levels, got '4'"),
        ({"num_points": (4, 4)}, r"num_points: expected a count, .* 4 levels, got \(4, 4\)"),
        ({"dropout": math.nan}, "dropout: expected a number from 0 to 1, got nan"),
        ({"depth": 0}, "depth: expected a number above 0, got 0"),
        ({"encoder_dims": (256, None)}, "encoder_dims: expected an integer, got None"),
    ],
)
def test_an_invalid_size_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        models.Size(**wrong)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.detr(SmallBackbone(), 0, TINY), "num_classes: expected at least 1, got 0"),
        (lambda: models.dino(SmallBackbone(), "3", TINY), "num_classes: expected an integer, got"),
        (lambda: models.stewart(SmallBackbone(), 0), "num_classes: expected at least 1, got 0"),
        (
            lambda: models.detr(SmallBackbone(), 3, replace(TINY, num_heads=5)),
            r"d_model: expected a multiple of num_heads \(5\), got 32",
        ),
        (
            lambda: models.dino(SmallBackbone(), 3, replace(TINY, num_levels=2)),
            "num_levels: expected at least 3, the maps of the backbone, got 2",
        ),
        (
            lambda: models.rtdetr(SmallBackbone(), 3, replace(TINY, num_levels=4)),
            "num_levels: expected 3, the maps of the backbone, got 4",
        ),
        (lambda: SmallBackbone((8, 0)), "channels: expected at least 1, got 0"),
        (lambda: resnet(51), "depth: expected one of 18, 34, 50, 101; got 51"),
        (lambda: resnet(50, 5), "maps: expected a number up to 4, got 5"),
        (lambda: hgnetv2("B3"), "name: expected one of B0, B2, B4, B5; got 'B3'"),
        (lambda: made("dino").model("image"), "images: expected a tensor, got str"),
        (
            lambda: made("dino").model(torch.zeros(1, 3, 64, 64).byte()),
            r"images: expected numbers in \[0, 1\], got torch.uint8; divide bytes by 255",
        ),
    ],
)
def test_an_invalid_argument_of_a_system_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()
