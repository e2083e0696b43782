"""Training: the same to the bit after a kill, the same in two processes, and it learns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deform_attn.detr.data import Shapes
from deform_attn.detr.recipes import RECIPES, build
from deform_attn.detr.train import Settings, parameter_groups, train

SHORT = {"steps": 24, "batch": 4, "evaluate_every": 12, "save_every": 5, "data": "shapes"}


@pytest.fixture
def few_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shapes, "lengths", {"train": 2000, "val": 16})


def command(out: Path, **settings: Any) -> list[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return ["-m", "deform_attn.detr.train", "--out", str(out), *options]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def differing(one: Any, two: Any, path: str = "") -> list[str]:
    """Where two nests of dicts and lists are not the same to the bit."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        return [f for key in one for f in differing(one[key], two[key], f"{path}/{key}")]
    if isinstance(one, list):
        assert len(one) == len(two), path
        return [f for i, pair in enumerate(zip(one, two)) for f in differing(*pair, f"{path}/{i}")]
    same = torch.equal(one, two) if isinstance(one, Tensor) else one == two
    return [] if same else [path]


@pytest.mark.parametrize("amp", ["none", "bfloat16"])
def test_a_killed_training_goes_on_to_the_bit(amp: str, tmp_path: Path) -> None:
    """Denoising draws random numbers, DEIM's augmentation mixes; killed twice, at any step."""
    settings = {"recipe": "deim", "amp": amp, **SHORT}
    train_command = [sys.executable, *command(tmp_path / "whole", **settings)]
    subprocess.run(train_command, check=True, env=environment())
    cut = [sys.executable, *command(tmp_path / "cut", **settings)]
    random = torch.Generator().manual_seed(time.time_ns() % 2**32)
    for _ in range(2):
        before = (tmp_path / "cut/checkpoint.pt").exists() and checkpoint(tmp_path / "cut")["step"]
        process = subprocess.Popen(cut, env=environment())
        while process.poll() is None:
            time.sleep(0.05)
            if (tmp_path / "cut/checkpoint.pt").exists():
                now = checkpoint(tmp_path / "cut")["step"]
                if now > before:
                    time.sleep(0.5 * torch.rand((), generator=random).item())
                    break
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    subprocess.run(cut, check=True, env=environment())
    whole, cut_short = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut")
    for one in (whole, cut_short):
        del one["history"]["cpu_seconds"]
    assert whole["step"] == SHORT["steps"]
    assert differing(whole, cut_short) == []
    for name in ("model.pt", "history.json", "curves.png"):
        assert (tmp_path / "cut" / name).stat().st_size > 0
    assert not list((tmp_path / "cut").glob("*.partial"))


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path: Path) -> None:
    """The first step's gradients agree to rounding (Adam's mean is a tenth of them), so do losses.

    Two images hold unequal numbers of objects, so that a process that divided by its own would
    differ.
    """
    settings: dict[str, Any] = {"recipe": "deformable_detr", "freeze_norms": 1, **SHORT}
    settings |= {"save_every": 1, "evaluate_every": 5, "clip": 1e9}
    for steps in (1, 5):
        now = settings | {"steps": steps}
        train(Settings(**now), tmp_path / f"one{steps}")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc-per-node=2", *command(tmp_path / f"two{steps}", **now)]
        subprocess.run(torchrun, check=True, env=environment(), capture_output=True)
    one, two = (checkpoint(tmp_path / f"{name}1") for name in ("one", "two"))
    states = zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values())
    for mine, theirs in states:
        scale = mine["exp_avg"].abs().max().item()
        torch.testing.assert_close(
            mine["exp_avg"], theirs["exp_avg"], rtol=1e-4, atol=2e-5 * scale + 1e-9
        )
    one, two = (checkpoint(tmp_path / f"{name}5") for name in ("one", "two"))
    torch.testing.assert_close(
        torch.tensor(one["history"]["loss"]),
        torch.tensor(two["history"]["loss"]),
        rtol=2e-3,
        atol=0,
    )
    with pytest.raises(ValueError, match="processes: expected 2 as in .*, got 1"):
        train(Settings(**settings | {"steps": 5}), tmp_path / "two5")


@pytest.mark.usefixtures("few_test_images")
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_takes_a_step_and_saves(recipe: str, tmp_path: Path) -> None:
    settings = SHORT | {"steps": 2, "evaluate_every": 100, "batch": 2}
    history = train(Settings(recipe=recipe, **settings), tmp_path)  # type: ignore[arg-type]
    assert len(history["loss"]) == 2
    assert all(loss > 0 for loss in history["loss"])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("few_test_images")
def test_float16_scales_its_losses(tmp_path: Path) -> None:
    settings = SHORT | {"steps": 3, "save_every": 1, "batch": 2}
    train(Settings(recipe="deformable_detr", amp="float16", **settings), tmp_path)  # type: ignore[arg-type]
    assert checkpoint(tmp_path)["scaler"]["scale"] > 1


@pytest.mark.usefixtures("few_test_images")
def test_a_setting_that_cannot_be_is_named(tmp_path: Path) -> None:
    settings: dict[str, Any] = SHORT | {"recipe": "deformable_detr", "steps": 1, "batch": 2}
    for wrong, message in (
        ({"recipe": "yolo"}, "recipe: expected one of detr, .*; got 'yolo'"),
        ({"amp": "int8"}, "amp: expected one of none, bfloat16, float16; got 'int8'"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"data": "voc"}, "data: expected 'shapes'"),
        ({"augment": "more"}, "augment: expected one of"),
        ({"batch": 4000}, "batch: expected at most the 2000 images"),
    ):
        with pytest.raises(ValueError, match=message):
            train(Settings(**settings | wrong), tmp_path)
    train(Settings(**settings), tmp_path)
    with pytest.raises(ValueError, match=r"lr: expected 0\.001 as in .*checkpoint\.pt, got 0\.1"):
        train(Settings(**settings | {"lr": 0.1}), tmp_path)


def test_rates_and_decay_are_those_of_the_parameter() -> None:
    settings = Settings(recipe="deformable_detr", data="shapes", backbone_lr=0.5)
    model = build("deformable_detr", 3, 64, 2, 20).model
    groups = parameter_groups(model, settings)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        slow = "sampling_offsets" in name or "reference_points" in name
        lr = 1e-3 * (0.5 if name.startswith("backbone.") else 0.1 if slow else 1)
        assert rates[id(parameter)] == (lr, 1e-4 if parameter.dim() > 1 else 0), name


def test_a_detector_learns(tmp_path: Path) -> None:
    settings = Settings(recipe="rtdetr", data="shapes", steps=120, batch=8, lr=2e-3)
    history = train(settings, tmp_path)
    assert history["ap"][-1]["AP50"] > 0.1
