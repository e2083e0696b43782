"""Training: the same to the bit after a kill, the same in two processes, and it learns."""

from __future__ import annotations

import copy
import csv
import errno
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar
from unittest.mock import Mock

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader, Dataset, Subset

from deform_attn.detr import load
from deform_attn.detr.augment import Augmented, Batch, Item, batches, collate
from deform_attn.detr.data import open_dataset, write_coco
from deform_attn.detr.device import find_device
from deform_attn.detr.drawn import Shapes
from deform_attn.detr.evaluate import NAMES, detect, evaluate, started
from deform_attn.detr.files import locked, write
from deform_attn.detr.losses import in_evaluation
from deform_attn.detr.models import Detector
from deform_attn.detr.recipes import RECIPES, build
from deform_attn.detr.recompute import recompute
from deform_attn.detr.train import Settings, _Run, _Stopped, parameter_groups, settings_of, train
from tests import vision


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a training on a folder of few images: shapes, written as PNG."""
    folder = tmp_path_factory.mktemp("coco")
    few = {"train": 24, "val": 8}
    for split in few:
        dataset = Shapes(split)
        dataset.lengths = few  # type: ignore[misc]
        write_coco(dataset, folder, split)
    settings = {"data": f"coco:{folder}", "size": 64, "steps": 16, "batch": 4}
    return settings | {"evaluate_every": 8, "save_every": 3}


def command(out: Path, **settings: Any) -> list[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return ["-m", "deform_attn.detr", "train", "--out", str(out), *options]


@pytest.fixture
def dense() -> Iterator[str]:
    """The augmentation with all transforms, or "flip" without torchvision."""
    with vision.enabled():
        yield "flip" if vision.why_not() else "dense"


@pytest.fixture
def one_thread(set_threads: Callable[[int], None]) -> None:
    """As the environment of the commands: sums have the same order."""
    set_threads(1)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(*arguments: str) -> None:
    """Two processes; a fault is shown with what they printed."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*start, *arguments], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


# Runs a training that kills itself while it writes its second checkpoint.
KILLED = """
import os, signal
from deform_attn.detr import __main__, train
from tests import vision

write = train.write

def written(file, to):
    def half(f):
        to(f)
        f.truncate(1000)
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, half if file.name == "checkpoint.pt" and file.exists() else to)

train.write = written
with vision.enabled():
    __main__.main()
"""


def test_a_killed_training_resumes_to_the_bit(
    short: dict[str, Any],
    tmp_path: Path,
    one_thread: None,
    dense: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With random denoising and augmentation; killed while saving, and during an evaluation.

    Ctrl-C and SIGTERM end it after the current step, which is saved, and evaluated later.
    """
    settings = short | {"recipe": "deim", "augment": dense, "amp": "bfloat16", "steps": 10}
    settings |= {"batch": 2, "accumulate": 2, "recompute": 1, "multi_scale": 0.5, "patience": 9}
    settings |= {"width": 32}
    train(Settings(**settings), tmp_path / "whole")
    killed = [sys.executable, "-c", KILLED, *command(tmp_path / "cut", **settings)[2:]]
    assert subprocess.run(killed, env=environment()).returncode == -signal.SIGKILL
    assert checkpoint(tmp_path / "cut")["step"] == 3  # that of the last complete save
    step = _Run._step
    stops = (signal.SIGTERM, SystemExit, 5), (signal.SIGINT, KeyboardInterrupt, 8)
    for number, error, last in stops:
        out = tmp_path / number.name

        def signalled(run: Any, *batch: Any, number: int = number, last: int = last) -> Any:
            if run.step == last - 1:
                signal.raise_signal(number)
            return step(run, *batch)

        shutil.copytree(tmp_path / "cut", out)
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(_Run, "_step", signalled)
            train(Settings(**settings), out)
        assert checkpoint(out)["step"] == last
        assert checkpoint(out)["history"]["ap"] == []
    shutil.copytree(tmp_path / "SIGINT", tmp_path / "cut", dirs_exist_ok=True)

    def stopped(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return detect(*arguments)

    evaluations: list[Any] = [stopped]  # of step 8
    for error in (SystemExit, MemoryError):
        saved = checkpoint(tmp_path / "cut")
        assert (saved["step"], saved["history"]["ap"]) == (8, [])
        with monkeypatch.context() as patch, pytest.raises(error):
            calls = Mock(side_effect=evaluations)
            patch.setattr("deform_attn.detr.train.detect", lambda *x: calls()(*x))
            train(Settings(**settings), tmp_path / "cut")
        evaluations = [detect, MemoryError]  # of step 8, and of step 10
    saved = checkpoint(tmp_path / "cut")
    assert (saved["step"], [one["step"] for one in saved["history"]["ap"]]) == (10, [8])
    train(Settings(**settings), tmp_path / "cut", workers=1)
    whole, cut = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut")
    for one in (whole, cut):
        del one["history"]["cpu_seconds"]
    assert whole["step"] == 10
    assert differing(whole, cut) == []
    for name in ("model.pt", "history.json", "curves.png"):
        assert (tmp_path / "cut" / name).stat().st_size > 0
    rows = [(tmp_path / name / "log.csv").read_text() for name in ("whole", "cut")]
    assert rows[0] == rows[1]
    assert [row.split(",")[0] for row in rows[0].splitlines()] == ["step", *map(str, range(1, 11))]
    table = list(csv.DictReader(rows[0].splitlines()))
    assert [row["step"] for row in table if row["AP"] and row["val_loss"]] == ["8", "10"]
    # Denoising has a loss in training only.
    assert all(0 < float(row["matched_loss"]) < float(row["loss"]) for row in table)
    assert not list((tmp_path / "cut").glob("*.partial"))


class Blocked(Dataset[bool]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> bool:
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_processes_of_a_loader_leave_ctrl_c_to_the_training() -> None:
    """They would end before the training has saved."""
    assert next(started(DataLoader(Blocked(), num_workers=1))).item()
    assert not Blocked()[0]


def test_a_full_disk_is_named_and_leaves_no_partial_file(tmp_path: Path) -> None:
    def full(f: BinaryIO) -> None:
        f.write(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "model.pt").write_bytes(b"old")
    with pytest.raises(OSError, match=r"model\.pt: cannot be written: .*No space left"):
        write(tmp_path / "model.pt", full)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "model.pt", Mock(side_effect=KeyboardInterrupt))
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    # torch.save reports a full disk as "unexpected pos"
    (tmp_path / "model.pt.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"model\.pt: cannot be written: No space left on device$"):
        write(tmp_path / "model.pt", lambda f: torch.save({"x": torch.zeros(9999)}, f))
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    assert (tmp_path / "model.pt").read_bytes() == b"old"


def test_one_process_at_a_time_trains_in_a_folder(
    short: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(**short | {"recipe": "detr", "steps": 1, "batch": 2, "width": 32})
    fork = multiprocessing.get_context("fork")
    held, done = fork.Event(), fork.Event()

    def hold() -> None:
        with locked("out", tmp_path):
            held.set()
            done.wait()

    other = fork.Process(target=hold)
    other.start()
    held.wait()
    message = rf"out: expected a folder without a running training, .* process {other.pid} trains"
    with pytest.raises(OSError, match=message):
        train(settings, tmp_path)
    done.set()
    other.join()
    train(settings, tmp_path)
    assert "nothing remains" not in capsys.readouterr().out
    train(settings, tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"nothing remains to do; --resume {tmp_path}/checkpoint.pt with a larger --st" in shown


@pytest.mark.parametrize("recipe", ["detr", "dn_deformable_detr", "dfine"])
def test_one_class_is_trained_evaluated_and_found(
    recipe: str, short: dict[str, Any], tmp_path: Path
) -> None:
    """From the weights of three classes, given as the folder of their training."""
    folder = Path(short["data"].removeprefix("coco:"))
    (tmp_path / "data/annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / "data" / split).symlink_to(folder / split)
        coco = json.loads((folder / f"annotations/instances_{split}.json").read_text())
        coco["categories"] = coco["categories"][1:2]
        label = coco["categories"][0]["id"]
        coco["annotations"] = [one for one in coco["annotations"] if one["category_id"] == label]
        (tmp_path / f"data/annotations/instances_{split}.json").write_text(json.dumps(coco))
    settings = short | {"steps": 1, "batch": 2}
    sizes = {"recipe": recipe, "width": 32, "layers": 1, "queries": 10}
    train(Settings(**settings | sizes), tmp_path / "three")
    settings |= {"init": str(tmp_path / "three"), "data": f"coco:{tmp_path / 'data'}"}
    history = train(Settings(**settings), tmp_path / "one")
    assert 0 <= history["ap"][-1]["AP"] <= 1
    detector = load(tmp_path / "one")
    assert detector.classes == ["square"]
    found = detector.predict([Image.new("RGB", (64, 64))], threshold=0)[0]
    assert found["names"] == ["square"] * 10


def test_two_processes_train_as_one_with_the_doubled_batch(
    short: dict[str, Any], tmp_path: Path
) -> None:
    """The first step's gradients agree to rounding (Adam's mean is a tenth of them), so do losses.

    The first step of two processes is accumulated in two passes, and computes blocks again.
    Halves of a batch hold unequal numbers of objects: a process that divided by its own would
    differ.
    """
    settings = short | {"recipe": "deformable_detr", "freeze_norms": 1, "clip": 1e9}
    script = tmp_path / "two.py"
    script.write_text(
        "from pathlib import Path\n"
        "from torch import distributed\n"
        "from deform_attn.detr.train import Settings, train\n"
        "distributed.init_process_group('gloo')\n"
        "passes = {'batch': 2, 'accumulate': 2, 'recompute': 1}\n"
        "for steps, sizes in (1, passes), (5, {}):\n"
        f"    folder = Path({str(tmp_path)!r}) / f'two{{steps}}'\n"
        f"    train(Settings(**{settings!r} | sizes | {{'steps': steps}}), folder)\n"
        "distributed.destroy_process_group()\n"
    )
    torchrun(str(script))
    for steps in (1, 5):
        train(Settings(**settings | {"steps": steps}), tmp_path / f"one{steps}")
    one, two = (checkpoint(tmp_path / f"{name}1") for name in ("one", "two"))
    states = zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values())
    for mine, theirs in states:
        scale = mine["exp_avg"].abs().max().item()
        torch.testing.assert_close(
            mine["exp_avg"], theirs["exp_avg"], rtol=1e-4, atol=2e-5 * scale + 1e-9
        )
    detector = load(tmp_path / "two5/model.pt")
    val = open_dataset(settings["data"], "val", 64)
    ap = evaluate(detector.model, detector.postprocess, val)
    recorded = checkpoint(tmp_path / "two5")["history"]["ap"][-1]  # each process had half of them
    assert {name: recorded[name] for name in ap} == pytest.approx(ap, abs=1e-6)
    images, _, targets = collate([val[i] for i in range(len(val))])
    with torch.no_grad():
        losses = build("deformable_detr", 3, 64, 2, 20).criterion(detector.model(images), targets)
    recorded = checkpoint(tmp_path / "two5")["history"]["val_loss"][-1]
    for name, value in losses.items():
        assert recorded[name] == pytest.approx(value.item(), rel=1e-5)
    assert recorded["loss"] == pytest.approx(sum(losses.values()).item(), rel=1e-5)
    one, two = (checkpoint(tmp_path / f"{name}5") for name in ("one", "two"))
    torch.testing.assert_close(
        torch.tensor(one["history"]["loss"]),
        torch.tensor(two["history"]["loss"]),
        rtol=2e-3,
        atol=0,
    )
    with pytest.raises(ValueError, match="processes: expected 2 as in .*, got 1"):
        train(Settings(**settings | {"steps": 5}), tmp_path / "two5")


def double(batch: Batch) -> Batch:
    images, mask, targets = batch
    return images.double(), mask, [{**one, "boxes": one["boxes"].double()} for one in targets]


def test_accumulated_passes_are_the_step_of_a_larger_batch(
    short: dict[str, Any], tmp_path: Path
) -> None:
    """In float64; the passes have unequal numbers of objects."""
    settings = short | {"recipe": "deformable_detr", "width": 32, "clip": 1e9}
    found = []
    for sizes in ({"batch": 4}, {"batch": 1, "accumulate": 4}):
        run = _Run(Settings(**settings | sizes), tmp_path)
        items = batches(24, sizes["batch"], range(1), 0, accumulate=sizes.get("accumulate", 1))
        passes = [double(run.augmented.batch([run.augmented[i] for i in one])) for one in items]
        run.average.double()
        model = run.model.double().eval()  # batch norms have statistics of a pass
        losses = run._step(model, passes)
        numbers = {len(target["labels"]) for *_, targets in passes for target in targets}
        found.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    assert len(numbers) > 1
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("recipe", ["rtdetr", "mr_detr"])
def test_recomputed_gradients_are_the_same_to_the_bit(recipe: str, one_thread: None) -> None:
    """With dropout; batch norms count a batch once; names do not change; less is kept."""
    model, criterion, _ = build(recipe, 3, 32, 2, 10)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    twin = copy.deepcopy(model)
    blocks = recompute(twin)
    stages = twin.get_submodule("backbone.stages")
    assert {*stages.children(), twin.get_submodule("backbone.stem")} < set(blocks)
    images, _, targets = collate([Shapes()[i] for i in range(3)])
    kept = []
    for one in (model, twin):
        sizes: list[int] = []
        torch.manual_seed(0)
        with saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            losses = criterion(one.train()(images, None, targets), targets)
        sum(losses.values()).backward()
        kept.append(sum(sizes))
    assert kept[1] < 0.7 * kept[0]
    assert differing(model.state_dict(), twin.state_dict()) == []
    grads = [{name: p.grad for name, p in one.named_parameters()} for one in (model, twin)]
    assert differing(*grads) == []
    twin.eval()(images)  # nothing is computed again


def test_multi_scale_draws_one_size_for_a_batch_and_several_shortest_edges() -> None:
    dataset = Shapes()
    augmented = Augmented(dataset, "flip", 20, 0, multi_scale=0.5)
    plain = Augmented(dataset, "flip", 20, 0)
    seen = []
    for step, part in itertools.product(range(20), range(2)):
        items = next(batches(9, 4, range(step, step + 1), 0, (part, 2)))
        images, mask, targets = augmented.batch([augmented[i] for i in items])
        assert mask is None
        _, _, expected = plain.batch([plain[i] for i in items])
        assert differing(targets, expected) == []
        seen.append(tuple(images.shape[-2:]))
    assert set(seen) == {(32, 32), (64, 64), (96, 96)}
    assert seen[::2] == seen[1::2]  # processes draw the same
    augmented = Augmented(dataset, "none", 20, 0, multi_scale=0.5, resize="shortest")
    drawn = [
        augmented[Item(step, place, 0)][1][0].shape[1:] for step in range(9) for place in (0, 1)
    ]
    assert set(drawn) == {(32, 32), (64, 64)}
    assert drawn[::2] != drawn[1::2]
    with pytest.raises(
        ValueError, match="multi_scale: expected a fraction of 64 pixels that reach"
    ):
        Augmented(dataset, "none", 20, 0, multi_scale=0.3)


class Writer:
    """In the place of TensorBoard's."""

    written: ClassVar[list[Any]] = []

    def __init__(self, folder: str, purge_step: int) -> None:
        self.written.append((Path(folder).name, purge_step))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.written.append((name, value, step))

    def close(self) -> None:
        self.written.append("closed")


def test_tensorboard_and_the_hint_of_the_time(
    short: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = short | {"recipe": "deformable_detr", "batch": 2, "width": 32, "save_every": 6}
    settings |= {"evaluate_every": 5, "steps": 6}
    names = "tensorboard", "torch.utils.tensorboard"
    message = "tensorboard: .* pip install tensorboard$"
    with monkeypatch.context() as patch, pytest.raises(ModuleNotFoundError, match=message):
        patch.setitem(sys.modules, names[0], None)
        train(Settings(**settings), tmp_path, tensorboard=True)
    assert not list(tmp_path.iterdir())
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr("deform_attn.detr.logs.perf_counter", itertools.count().__next__)
    history = train(Settings(**settings), tmp_path, tensorboard=True)
    train(Settings(**settings | {"steps": 7}), tmp_path, resume=tmp_path, tensorboard=True)
    written = Writer.written
    assert written[0] == ("tensorboard", 1)
    assert [one[1:] for one in written if one[0] == "loss"][:6] == [
        (loss, i + 1) for i, loss in enumerate(history["loss"])
    ]
    assert [one[2] for one in written if one[0] == "AP"] == [5, 6, 7]
    assert [one[2] for one in written if one[0] == "val_loss"] == [5, 6, 7]
    assert written.index(("tensorboard", 7)) == written.index("closed") + 1
    assert written[-1] == "closed"
    shown = capsys.readouterr().out
    assert shown.count("a step takes 1 s: 2 s for the 2 that remain") == 1
    assert shown.count("an evaluation takes 1 s: 1 s for the 1 that remain") == 1


def test_a_device_that_is_not_there_is_named(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(**short | {"recipe": "detr"})
    for name in ("cuda:99", "tpu", "meta"):
        message = f"device: expected cpu, cuda or another of PyTorch, got '{name}': "
        with pytest.raises(ValueError, match=message):
            train(settings, tmp_path, device=name)
    assert find_device("cpu").type == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="each of the 2 processes has its own, got 'cuda:1'"):
        train(settings, tmp_path, device="cuda:1")


def test_a_process_whose_images_are_empty_goes_on(short: dict[str, Any], tmp_path: Path) -> None:
    """It has no denoising queries: other losses than the process beside it, and fewer gradients.

    Two and three test images are one and two batches: processes evaluate without each other.
    """
    folder = Path(short["data"].removeprefix("coco:"))
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(folder / split)
        coco = json.loads((folder / f"annotations/instances_{split}.json").read_text())
        coco["annotations"] = [one for one in coco["annotations"] if one["image_id"] % 2]
        if split == "val":
            coco["images"] = coco["images"][:5]
            coco["annotations"] = [one for one in coco["annotations"] if one["image_id"] < 5]
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(coco))
    settings = short | {"data": f"coco:{tmp_path}", "recipe": "rtdetr", "batch": 2, "steps": 6}
    torchrun(*command(tmp_path / "out", **settings))
    history = checkpoint(tmp_path / "out")["history"]
    assert len(history["loss"]) == 6
    assert all(0 < loss < 1000 for loss in history["loss"])


def test_a_signal_ends_an_evaluation_of_several_processes(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same batch of all: the fourth, which only the other process has."""
    settings = short | {"recipe": "detr", "batch": 1, "width": 32, "layers": 1, "queries": 5}
    run = _Run(Settings(**settings), tmp_path)
    run.world, run.history["loss"], run.history["matched_loss"] = 2, [1.0], [1.0]
    run.test = Subset(run.test, range(7))
    run.test.ground_truth = run.test.dataset.ground_truth
    monkeypatch.setattr(run, "_gathered", lambda value: [value, value])
    rounds: list[int] = [0, 0, 0, signal.SIGTERM]
    monkeypatch.setattr(run, "_stopped", Mock(side_effect=rounds))
    with pytest.raises(_Stopped):
        run._evaluate()


def test_weights_that_are_not_finite_are_not_saved(short: dict[str, Any], tmp_path: Path) -> None:
    run = _Run(Settings(**short | {"recipe": "detr", "width": 32, "layers": 1}), tmp_path)
    run._save_state()
    nn.init.constant_(next(run.model.parameters()), math.nan)
    run.step = 1
    with pytest.raises(FloatingPointError, match="step 1: expected finite weights, got NaN or inf"):
        run._save_state()
    assert checkpoint(tmp_path)["step"] == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_takes_steps_and_is_loaded(
    recipe: str, short: dict[str, Any], tmp_path: Path
) -> None:
    settings = short | {"recipe": recipe, "steps": 2, "batch": 2}
    history = train(Settings(**settings), tmp_path)
    assert len(history["loss"]) == 2
    assert all(loss > 0 for loss in history["loss"])
    trained, evaluated = ({n for n in history[k][-1] if "/" in n} for k in ("parts", "val_loss"))
    assert evaluated == {name for name in trained if in_evaluation(name, 2)}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    detector = load(tmp_path / "model.pt")
    assert detector.classes == ["disc", "square", "triangle"]
    found = detector.predict([Image.new("L", (50, 70))], threshold=0)[0]
    assert found["boxes"].shape == (len(found["names"]), 4)
    assert found["boxes"].isfinite().all()


def test_float16_scales_its_losses(short: dict[str, Any], tmp_path: Path) -> None:
    """Where a scaled gradient overflows the step is left out and the scale halved."""
    settings = short | {"recipe": "deformable_detr", "amp": "float16", "steps": 3, "batch": 2}
    train(Settings(**settings), tmp_path)
    state = checkpoint(tmp_path)
    assert 1 < state["scaler"]["scale"] <= 65536
    assert all(one["exp_avg"].isfinite().all() for one in state["optimizer"]["state"].values())


def test_a_setting_that_cannot_be_is_named(short: dict[str, Any], tmp_path: Path) -> None:
    settings = short | {"recipe": "deformable_detr", "steps": 1, "batch": 2}
    for wrong, message in (
        ({"recipe": "yolo"}, "recipe: expected one of stewart, .*; got 'yolo'"),
        ({"amp": "int8"}, "amp: expected one of none, bfloat16, float16; got 'int8'"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"data": "voc"}, "data: expected 'shapes'"),
        ({"augment": "more"}, "augment: expected one of none, flip, detr, .*; got 'more'"),
        ({"resize": "crop"}, "resize: expected one of stretch, fit, shortest; got 'crop'"),
        ({"queries": 0}, "queries: expected at least 1, got 0"),
        ({"layers": 0}, "layers: expected at least 1, got 0"),
        ({"width": 48}, "width: expected a multiple of 32, got 48"),
        ({"clip": -1.0}, r"clip: expected a number above 0, got -1\.0"),
        ({"lr": math.nan}, "lr: expected a number above 0, got nan"),
        ({"weight_decay": -1.0}, r"weight_decay: expected a number from 0, got -1\.0"),
        ({"freeze_norms": 2}, "freeze_norms: expected 0 or 1, got 2"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"patience": -1}, "patience: expected a number from 0, got -1"),
        ({"accumulate": 0}, "accumulate: expected at least 1, got 0"),
        ({"recompute": 2}, "recompute: expected 0 or 1, got 2"),
        ({"multi_scale": -0.1}, r"multi_scale: expected 0 to below 1, got -0\.1"),
        ({"multi_scale": 0.2}, r"multi_scale: .* of 64 pixels .* 32, such as 0\.5, got 0\.2"),
        ({"multi_scale": 0.2, "size": 32}, r"multi_scale: .* which needs larger images, got 0\.2"),
        ({"size": 10**6}, "size: expected a number up to 16384, got 1000000"),
        ({"batch": 10**9}, "batch: expected a number up to 65536, got 1000000000"),
        ({"queries": 10**6}, "queries: expected a number up to 10000, got 1000000"),
        ({"width": 32 * 10**6}, "width: expected a number up to 4096, got 32000000"),
        ({"steps": 10**20}, r"steps: expected a number below 2\*\*63, got 1000000"),
        ({"seed": 2**70}, r"seed: expected a number below 2\*\*62, got"),
        (
            {"multi_scale": 0.5, "recipe": "rtdetr", "queries": 99},
            "multi_scale: expected a smaller .* 32 pixels a side: .* 99 pixels, .* got 84",
        ),
        (
            {"size": 32, "recipe": "rtdetr", "queries": 99},
            "queries: expected fewer, or a larger size, got 99, .* 32 pixels a side: .* got 84",
        ),
        ({"save_every": 4, "keep_every": 6}, "keep_every: expected a multiple of save_every"),
    ):
        with pytest.raises(ValueError, match=message):
            train(Settings(**settings | wrong), tmp_path)
    for wrong, message in (
        ({"steps": 1.5}, r"steps: expected an integer, got 1\.5"),
        ({"batch": "2"}, "batch: expected an integer, got '2'"),
        ({"lr": "1e-4"}, "lr: expected a number, got '1e-4'"),
        ({"data": tmp_path}, "data: expected text, got PosixPath"),
    ):
        with pytest.raises(TypeError, match=message):
            train(Settings(**settings | wrong), tmp_path)
    for workers, message in (
        (-1, "a number from 0, got -1"),
        (10**6, "a number up to 1024, got 1"),
    ):
        with pytest.raises(ValueError, match=f"workers: expected {message}"):
            train(Settings(**settings), tmp_path, workers=workers)


def test_training_ends_without_a_better_ap(
    short: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same command does not go on; a larger patience does, and counts from the best AP."""
    values = iter([0.1, 0.3, 0.2, 0.3, 0.1, 0.4, 0.2, 0.1, 0.3])

    def judged(*arguments: Any) -> dict[str, Any]:
        return dict.fromkeys(NAMES) | {"AP": next(values), "AP50": 0.5}

    monkeypatch.setattr("deform_attn.detr.train.average_precision", judged)
    settings = short | {"recipe": "deformable_detr", "batch": 2, "steps": 9, "width": 32}
    settings |= {"evaluate_every": 1, "save_every": 9, "patience": 2}
    message = r"ends after step 4: the last 2 evaluations .* above 0\.300, that of step 4 in best"
    for _ in range(2):
        history = train(Settings(**settings), tmp_path)
        assert len(history["loss"]) == len(history["ap"]) == checkpoint(tmp_path)["step"] == 4
        assert re.search(message, " ".join(capsys.readouterr().out.split()))
    assert load(tmp_path / "best.pt").facts["step"] == 4
    history = train(Settings(**settings | {"patience": 4}), tmp_path, resume=tmp_path)
    assert [row["AP"] for row in history["ap"]][-3:] == [0.2, 0.1, 0.3]


def test_a_training_is_continued_with_other_settings(
    short: dict[str, Any], tmp_path: Path, one_thread: None
) -> None:
    """From an earlier checkpoint after it diverged; what decides the model cannot change."""
    settings = short | {"recipe": "deformable_detr", "batch": 2, "steps": 2, "evaluate_every": 9}
    settings |= {"save_every": 1, "keep_every": 2}
    run, next_run = tmp_path / "run", tmp_path / "next"
    train(Settings(**settings), run)
    with pytest.raises(
        FloatingPointError,
        match=r"step [3-9]: .*finite .*--resume .*run/checkpoint_STEP.pt --lr 1e\+29 --out",
    ):
        train(Settings(**settings | {"lr": 1e30, "steps": 60}), run, resume=run)
    for every, message in (
        ({"save_every": 60}, r"finite .*--resume .*one --lr 1e\+29 --out"),
        ({"evaluate_every": 1}, "step 1: expected finite losses of the test images, got {'class"),
    ):
        shutil.rmtree(tmp_path / "one", ignore_errors=True)
        wrong = settings | {"keep_every": 0, "lr": 1e30, "steps": 60} | every
        with pytest.raises(FloatingPointError, match=message):
            train(Settings(**wrong), tmp_path / "one")
    early = run / "checkpoint_2.pt"
    (tmp_path / "moved").symlink_to(short["data"].removeprefix("coco:"))
    other = settings | {"lr": 1e-4, "backbone_lr": 0.1, "weight_decay": 0.1, "accumulate": 2}
    other |= {"recompute": 1, "multi_scale": 0.5, "patience": 3}
    other |= {"steps": 4, "evaluate_every": 4, "augment": "none", "amp": "float16", "seed": 1}
    other |= {"data": f"coco:{tmp_path / 'moved'}", "save_every": 4, "keep_every": 0}
    with pytest.raises(ValueError, match=r"steps: expected 60 as in .*, got 4; --resume"):
        train(Settings(**other), run)
    with pytest.raises(ValueError, match=r"layers: expected 2 as in .*, got 3; --init starts"):
        train(Settings(**other | {"layers": 3}), next_run, resume=early)
    with pytest.raises(ValueError, match=r"init: expected '' as in .*, got 'digits'; without --re"):
        train(Settings(**other | {"recipe": "", "init": "digits"}), next_run, resume=early)
    with pytest.raises(ValueError, match=r"out: expected a folder without another training"):
        train(Settings(**other), run, resume=early)
    with pytest.raises(FileNotFoundError, match=r"resume: expected a checkpoint or its folder"):
        train(Settings(**other), next_run, resume=tmp_path / "none")
    assert settings_of(early) == Settings(**settings | {"augment": "flip"})
    with pytest.raises(ValueError, match=r"steps: expected at least 2, as in .*, got 1"):
        train(Settings(**other | {"steps": 1}), next_run, resume=early)
    old = torch.load(early, weights_only=True)
    state = old["optimizer"]
    for name in ("matched_loss", "lr", "val_loss"):  # as an earlier version saved it
        del old["history"][name]
    torch.save(old, early)
    history = train(Settings(**other), next_run, resume=early)
    assert len(history["loss"]) == 4
    assert [bool(rate) for rate in history["lr"]] == [False, False, True, True]
    rows = (next_run / "log.csv").read_text().splitlines()
    assert [row.split(",")[:2] == [str(i), ""] for i, row in enumerate(rows)][1:3] == [True, True]
    after = checkpoint(next_run)
    assert after["settings"] == other | {
        name: after["settings"][name] for name in after["settings"].keys() - other.keys()
    }
    groups = after["optimizer"]["param_groups"]
    assert sorted({round(group["peak"], 9) for group in groups}) == [1e-5, 1e-4]
    assert {group["weight_decay"] for group in groups} == {0, 0.1}
    assert [group["params"] for group in groups] == [g["params"] for g in state["param_groups"]]
    # The scaler of float16 leaves steps out.
    assert all(2 <= one["step"] <= 4 for one in after["optimizer"]["state"].values())
    assert (next_run / "best.pt").exists()
    train(Settings(**other | {"steps": 5}), next_run, resume=next_run)
    assert checkpoint(next_run)["step"] == 5


def test_a_folder_is_known_by_its_content_not_by_its_path(
    short: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(short["data"].removeprefix("coco:"))
    settings = short | {"recipe": "deformable_detr", "steps": 1, "batch": 2}
    train(Settings(**settings), tmp_path / "out")
    (tmp_path / "link").symlink_to(folder)
    train(Settings(**settings | {"data": f"coco:{tmp_path / 'link'}"}), tmp_path / "out")
    shutil.copytree(folder, tmp_path / "cut")
    file = tmp_path / "cut/annotations/instances_train.json"
    coco = json.loads(file.read_text())
    coco["images"] = coco["images"][:5]
    coco["annotations"] = [one for one in coco["annotations"] if one["image_id"] < 5]
    file.write_text(json.dumps(coco))
    moved = Settings(**settings | {"data": f"coco:{tmp_path / 'cut'}"})
    for resume in (None, tmp_path / "out"):
        with pytest.raises(ValueError, match="data: expected the train images of .*, got others"):
            train(moved, tmp_path / "out", resume=resume)
    file.write_text((folder / "annotations/instances_train.json").read_text())
    image = tmp_path / "cut/val/0.png"
    image.write_bytes(image.read_bytes() + b"0")
    with pytest.raises(ValueError, match="data: expected the val images of .*; --resume continues"):
        train(moved, tmp_path / "out")
    train(moved, tmp_path / "out", resume=tmp_path / "out")
    assert "warning: data: the test images are not those" in capsys.readouterr().out
    coco["categories"][0]["name"] = "circle"
    file.write_text(json.dumps(coco))
    (tmp_path / "cut/annotations/instances_val.json").write_text(json.dumps(coco))
    shutil.copytree(tmp_path / "cut/train", tmp_path / "cut/val", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"classes: expected \['disc', .*got \['circle', .*--init"):
        train(moved, tmp_path / "out", resume=tmp_path / "out")
    coco["annotations"] = []
    (tmp_path / "cut/annotations/instances_val.json").write_text(json.dumps(coco))
    unknown = Settings(**settings | {"data": moved.data, "patience": 1})
    with pytest.raises(ValueError, match="patience: expected 0, because the test images have no o"):
        train(unknown, tmp_path / "new")
    file.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="data: expected objects to learn, got none in coco:"):
        train(moved, tmp_path / "new")


def test_a_checkpoint_that_cannot_be_read_is_named(short: dict[str, Any], tmp_path: Path) -> None:
    settings = Settings(**short | {"recipe": "detr", "steps": 1, "batch": 2})
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"checkpoint\.pt: expected a checkpoint, got an empty or cut"
    ):
        train(settings, tmp_path)
    file.with_suffix(".safetensors").write_text("{}")
    with pytest.raises(ValueError, match="expected a checkpoint, got safetensors: give the folder"):
        settings_of(file.with_suffix(".safetensors"))
    file.write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match=r"expected a checkpoint, got a file that torch\.load"):
        train(settings, tmp_path)
    whole = {name: {} for name in ("history", "data", "model", "average", "optimizer", "scaler")}
    for wrong, message in (
        ({"settings": {}}, "settings of the data"),
        ({"settings": None}, "settings"),
        ({"settings": {"data": "x"}, "step": "1", "optimizer": None}, "step, optimizer"),
    ):
        torch.save(whole | {"step": 1, "random": []} | wrong, file)
        with pytest.raises(ValueError, match=f"of a training, got a file without {message}$"):
            settings_of(tmp_path)
    torch.save({"model": {}}, file)
    with pytest.raises(
        ValueError,
        match=r"checkpoint\.pt: expected checkpoint\.pt of a training, got a file without step",
    ):
        train(settings, tmp_path)


def test_more_objects_than_queries_are_warned_of(
    short: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = short | {"recipe": "detr", "steps": 1, "batch": 2, "queries": 2}
    train(Settings(**settings), tmp_path)
    assert "up to 4 objects, more than the 2 queries" in capsys.readouterr().out


def test_images_of_different_sizes_are_padded_and_masked(
    short: dict[str, Any], tmp_path: Path, dense: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(short["data"].removeprefix("coco:"), folder)
    for split in ("train", "val"):
        file = folder / f"annotations/instances_{split}.json"
        coco = json.loads(file.read_text())
        for facts in coco["images"][::2]:
            facts["height"] = 128
            with Image.open(folder / split / facts["file_name"]) as image:
                tall = ImageOps.pad(image, (64, 128), centering=(0, 0))
            tall.save(folder / split / facts["file_name"])
        file.write_text(json.dumps(coco))
    masks = []
    forward = Detector.forward

    def seen(self: Any, images: Tensor, padding_mask: Any = None, targets: Any = None) -> Any:
        masks.append(padding_mask)
        return forward(self, images, padding_mask, targets)

    monkeypatch.setattr(Detector, "forward", seen)
    settings = {"data": f"coco:{folder}", "resize": "fit", "recipe": "dino", "augment": dense}
    train(Settings(**short | settings | {"steps": 6, "size": 128}), tmp_path / "out")
    padded = [mask for mask in masks if mask is not None]
    assert padded
    assert all(mask.any() and not mask.all(-1).all(-1).any() for mask in padded)
    files = sorted((folder / "val").glob("*.png"))
    predictor = load(tmp_path / "out/model.pt")
    masks.clear()
    together = predictor.predict(files[:2], threshold=0)
    assert masks[0] is not None
    alone = [predictor.predict([file], threshold=0)[0] for file in files[:2]]
    for one, other in zip(alone, together):  # convolutions see padding beyond the border
        torch.testing.assert_close(one["scores"], other["scores"], rtol=0.5, atol=0.05)


def test_rates_and_decay_are_those_of_the_parameter() -> None:
    settings = Settings(recipe="deformable_detr", data="shapes", backbone_lr=0.5)
    model = build("deformable_detr", 3, 64, 2, 20).model
    groups = parameter_groups(model, settings)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rates) == len(list(model.parameters()))
    slow = [name for name, _ in model.named_parameters() if "sampling_offsets" in name]
    assert len(slow) == 2 * 3  # one layer of the encoder, two of the decoder
    slow += ["queries.reference_points.weight", "queries.reference_points.bias"]
    assert set(slow) < {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        lr = 1e-3 * (0.5 if name.startswith("backbone.") else 0.1 if name in slow else 1)
        assert rates[id(parameter)] == (lr, 1e-4 if parameter.dim() > 1 else 0), name


def test_a_detector_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shapes, "lengths", Shapes.lengths | {"val": 60})
    settings = Settings(recipe="deformable_detr", data="shapes", steps=120, batch=8, lr=2e-3)
    history = train(settings, tmp_path)
    assert sum(history["loss"][-10:]) < 0.7 * sum(history["loss"][:10])
    assert history["ap"][-1]["AP50"] > 0.1
