"""Official models: names, layouts of files, and outputs from pixels."""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deform_attn.detr import checkpoints, create, load
from deform_attn.detr.checkpoints import read_checkpoint
from deform_attn.detr.models import Detector
from deform_attn.detr.zoo import COCO_80, COCO_91, CONFIGURATIONS, from_official, identify

from .official import official_state, output_errors, picture

# One of each system, backbone and layout; `python -m tests.detr.models_table` has all.
FOUND = ("detr_r50_dc5", "deformable_detr_r50_two_stage", "dab_detr_r50", "dn_deformable_detr_r50")
FOUND += ("dino_swin_l_5scale", "mr_detr_r50_300", "rtdetr_r18", "rtdetrv2_hgnetv2_l")
FOUND += ("deim_rtdetrv2_r18", "dfine_n", "dfine_x")
# Models with the same names and shapes as others.
TWINS = ("dfine", "deim_dfine", "discrete", "dc5", "detr_r50")


@pytest.mark.parametrize("name", FOUND)
def test_a_model_is_found_by_its_names_and_shapes(name: str) -> None:
    """Strictly: all names and shapes are those of the official file."""
    found = identify(official_state(name, values=False))
    assert (name, len(CONFIGURATIONS[name].classes)) in found
    systems = {CONFIGURATIONS[other].system.__name__ for other, _ in found}
    assert systems <= {"dfine", "deim"} or len(systems) == 1
    assert len(found) == 1 or all(any(t in other for t in TWINS) for other, _ in found)


@pytest.mark.parametrize("name", ["rtdetr_r18", "deim_rtdetrv2_r18", "dfine_n", "dab_detr_r50"])
def test_outputs_from_pixels_are_those_of_the_official_code(name: str) -> None:
    """In float64, with padding where the system has it."""
    state = official_state(name)
    _, system, num_classes = from_official(state, name=name)
    assert num_classes == len(CONFIGURATIONS[name].classes)
    images, mask = picture(name)
    with torch.no_grad():
        outputs = system.model.double().eval()(images, mask)
    assert max(output_errors(name, outputs)) < 1e-6


@pytest.fixture(scope="module")
def nano() -> dict[str, Tensor]:
    """The smallest official model, with 3 classes."""
    state = official_state("dfine_n")
    for key in list(state):
        if "score_head" in key:
            state[key] = state[key][:3].clone()
        if "denoising_class_embed" in key:
            state[key] = state[key][:4].clone()
    return {key: value.contiguous() for key, value in state.items()}


class _Foreign:
    """A class that a checkpoint may have and that is not installed."""


def layouts(state: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "plain": state,
        "model": {"model": state, "epoch": 3, "args": argparse.Namespace(lr=1e-4, two_stage=True)},
        "ema": {"ema": {"module": state, "updates": 7}, "model": {"other": torch.zeros(1)}},
        "wrapped": {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        "foreign": {"model": state, "config": _Foreign()},
    }


@pytest.mark.parametrize("layout", layouts({}))
def test_layouts_of_official_files(layout: str, nano: dict[str, Tensor], tmp_path: Path) -> None:
    module = types.ModuleType("not_installed")
    module.Foreign = _Foreign  # type: ignore[attr-defined]
    _Foreign.__module__, _Foreign.__qualname__ = "not_installed", "Foreign"
    sys.modules["not_installed"] = module
    try:
        torch.save(layouts(nano)[layout], tmp_path / "file.pth")
    finally:
        del sys.modules["not_installed"]
    state = checkpoints.official_state(read_checkpoint(tmp_path / "file.pth"))
    assert set(state) == set(nano)
    assert all(torch.equal(state[key], nano[key]) for key in nano)


def test_a_file_of_old_torch(nano: dict[str, Tensor], tmp_path: Path) -> None:
    old = {"model": {"a": torch.ones(2)}}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert checkpoints.official_state(read_checkpoint(tmp_path / "old.pth"))["a"].tolist() == [1, 1]


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code of the file ran')",))


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "args": _Harmful()}, tmp_path / "file.pth")
    content = read_checkpoint(tmp_path / "file.pth")
    assert content["model"]["a"].tolist() == [1]
    assert type(content["args"]).__mro__[-2].__name__ == "_Inert"


def test_an_official_file_is_loaded_and_used(nano: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"model": nano}, tmp_path / "weights.pth")
    with pytest.warns(UserWarning, match="the weights fit dfine_n and deim_dfine_n, which"):
        detector = load(tmp_path / "weights.pth")
    assert detector.facts == {"model": "dfine_n"}
    assert detector.classes == ["class 0", "class 1", "class 2"]
    assert (detector.size, detector.resize) == (640, "stretch")
    found = detector.predict([torch.rand(3, 48, 64)], threshold=0)[0]
    assert found["boxes"].shape == (300, 4)
    torch.save({"model": nano}, tmp_path / "deim_n.pth")
    assert load(tmp_path / "deim_n.pth").facts == {"model": "deim_dfine_n"}
    assert load(tmp_path / "weights.pth", model="deim_dfine_n").facts == {"model": "deim_dfine_n"}
    with pytest.raises(RuntimeError, match="size mismatch"):
        load(tmp_path / "weights.pth", model="dfine_s")
    with pytest.raises(ValueError, match=r"model: expected one of detr_r50, .*; got 'yolo'"):
        load(tmp_path / "weights.pth", model="yolo")


def test_other_weights_are_named(nano: dict[str, Tensor], tmp_path: Path) -> None:
    other = {key: value for key, value in nano.items() if "encoder.lateral" not in key}
    torch.save({"model": other}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: .* looks like dfine or deim of other sizes"):
        load(tmp_path / "other.pth")
    torch.save({"model": {"layer1.weight": torch.ones(1)}}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"resnet\.pth: .* this file is none of them: 1 tensors"):
        load(tmp_path / "resnet.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"empty\.pth: expected tensors, .*got \['epoch'\]"):
        load(tmp_path / "empty.pth")


def test_sizes_are_those_stated() -> None:
    # Millions of parameters, as the papers and the official pages state them.
    stated = {"detr_r50": 41, "dino_r50_4scale": 47, "rtdetr_r18": 20, "rtdetr_r50": 42}
    stated |= {"rtdetr_r101": 76, "dfine_n": 4, "dfine_s": 10, "dfine_m": 19, "dfine_l": 31}
    stated |= {"dfine_x": 62, "deformable_detr_r50": 40}
    for name, number in stated.items():
        with torch.device("meta"):
            model = create(name).model
        assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - number) < 1, name


def test_classes_of_coco() -> None:
    assert (len(COCO_80), len(COCO_91)) == (80, 91)
    assert (COCO_80[0], COCO_80[-1], COCO_91[1], COCO_91[90]) == (
        *("person", "toothbrush"),
        *("person", "toothbrush"),
    )
    assert [i for i, name in enumerate(COCO_91) if name.startswith("unused")] == [
        *(0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
    ]


def test_frozen_norms_stay_frozen() -> None:
    model: Any = create("rtdetr_r50", 3).model
    assert isinstance(model, Detector)
    model.train()
    norms = [m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training or norm.weight.requires_grad for norm in norms)
    assert model.encoder.fpn_blocks[0].conv1.norm.training


def test_dilation_keeps_the_resolution() -> None:
    images = torch.rand(1, 3, 64, 64)
    for name, side in (("detr_r50", 2), ("detr_r50_dc5", 4)):
        backbone = CONFIGURATIONS[name].backbone().eval()
        with torch.no_grad():
            [last] = backbone(images)
        assert last.shape == (1, 2048, side, side)
