"""Train a detector: ``python -m deform_attn.detr.train --recipe rtdetr --data shapes --out RUN``.

RUN then holds ``model.pt`` (what `deform_attn.detr.load` opens), ``curves.png``, ``history.json``
and ``checkpoint.pt``. The same command goes on where a killed one stopped, to the bit. Under
``torchrun --nproc-per-node N -m deform_attn.detr.train ...`` N processes share each batch.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from deform_attn.detr.augment import Augmented, batches
from deform_attn.detr.data import open_dataset
from deform_attn.detr.evaluate import draw_curves, evaluate
from deform_attn.detr.recipes import RECIPES, build

AMP = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """All that the result of a training depends on; a checkpoint goes on under the same alone."""

    recipe: str  # one of RECIPES
    data: str  # shapes, digits or coco:FOLDER
    steps: int = 800
    batch: int = 16  # images of a step, of all processes together
    size: int = 0  # sides of the images in pixels; 0: those of the data
    width: int = 64  # channels, a multiple of 32
    layers: int = 2  # of the decoder
    queries: int = 20
    lr: float = 1e-3
    backbone_lr: float = 1.0  # times lr; 0.1 is usual for a backbone that was trained before
    weight_decay: float = 1e-4
    clip: float = 0.1  # largest norm of all gradients together
    augment: str = ""  # one of AUGMENTATIONS; by default the recipe's
    amp: str = "none"  # matrix products in bfloat16, or in float16 with scaled losses
    freeze_norms: int = 0  # 1: batch norms keep their statistics, as those of DETR's backbone do
    seed: int = 0
    evaluate_every: int = 100  # steps
    save_every: int = 100  # steps

    def __post_init__(self) -> None:
        for name, known in (("recipe", RECIPES), ("amp", AMP)):
            if (got := getattr(self, name)) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; got {got!r}")
        for name in ("steps", "batch", "evaluate_every", "save_every"):
            if (got := getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected at least 1, got {got}")


def learning_rate_factor(step: int, steps: int) -> float:
    """DEIM's shape: a quadratic warm-up, flat to the middle, a cosine; it ends at a twentieth.

    Example:
        >>> from deform_attn.detr.train import learning_rate_factor
        >>> [round(learning_rate_factor(step, 1000), 3) for step in (9, 49, 500, 750, 1000)]
        [0.04, 1.0, 1.0, 0.525, 0.05]
    """
    warm_up = max(1, min(steps // 20, 2000))
    rising = min(1.0, ((step + 1) / warm_up) ** 2)
    falling = max(0.0, step / steps - 0.5) * 2
    return rising * (0.05 + 0.95 * (1 + math.cos(math.pi * falling)) / 2)


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay.

    The backbone's rate is its own; offsets and reference points learn at a tenth where the recipe
    says so (Deformable DETR, arXiv 2010.04159, section 5); biases and norms do not decay.
    """
    slow = RECIPES[settings.recipe].slow
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = settings.backbone_lr if name.startswith("backbone.") else 1.0
        factor *= 0.1 if any(part in name for part in slow) else 1.0
        decay = settings.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((factor * settings.lr, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "peak": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def train(settings: Settings, out: Path, workers: int = 0) -> dict[str, Any]:
    """Train until the last step, from the checkpoint in ``out`` where there is one.

    Args:
        settings: what to train, on what, how.
        out: folder of the run.
        workers: processes that draw batches ahead; they change no number.

    Returns:
        The history: ``loss`` of each step; ``parts``, each loss by name, and ``ap``, COCO's
        numbers, at each evaluation, with its ``step``; ``cpu_seconds`` of this process.

    Raises:
        ValueError: a setting that is not possible, or not that of the checkpoint in ``out``.
        FloatingPointError: a loss that is not finite.
    """
    shared = "RANK" in os.environ  # with other processes of torchrun
    if shared:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        return _Run(settings, out).go(workers)
    finally:
        if shared:
            distributed.destroy_process_group()


class _Run:
    """A training: what a checkpoint holds, and the loop."""

    def __init__(self, settings: Settings, out: Path) -> None:
        self.settings, self.out = settings, out
        of_process = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
        rank, world, local = (int(os.environ.get(name, n)) for name, n in of_process.items())
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        self.rank, self.world, self.device = rank, world, device
        self.console = Console(quiet=rank > 0, highlight=False)
        name, how = settings.data, (settings.size, settings.seed)
        self.data, self.test = (open_dataset(name, split, *how) for split in ("train", "val"))
        augment = settings.augment or RECIPES[settings.recipe].augment
        self.augmented = Augmented(self.data, augment, settings.steps, settings.seed)
        torch.manual_seed(settings.seed)
        sizes = (settings.width, settings.layers, settings.queries)
        system = build(settings.recipe, len(self.data.classes), *sizes)
        self.criterion, self.postprocess = system.criterion, system.postprocess
        self.model = system.model.to(device)
        if world > 1 and cuda:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, settings))
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "float16")
        parts = ("model", "average", "optimizer", "scaler")
        self.parts = {name: getattr(self, name) for name in parts}
        self.step = 0
        self.history: dict[str, Any] = {"loss": [], "parts": [], "ap": [], "cpu_seconds": 0.0}
        torch.manual_seed(settings.seed + 1000 * rank)  # each process draws noise of its own
        self.random = [torch.default_generator]
        self.random += [torch.cuda.default_generators[local]] if cuda else []
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.pt").exists():
            self._load(out / "checkpoint.pt")

    def _of_all(self, mine: Any) -> list[Any]:
        """What each process has."""
        everybody = [mine] * self.world
        if self.world > 1:
            distributed.all_gather_object(everybody, mine)
        return everybody

    # Checkpoints. Learning rates, order and augmentation of the images follow from seed and step.

    def _save(self) -> None:
        random = self._of_all([generator.get_state() for generator in self.random])
        if self.rank > 0:
            return
        facts = {"settings": asdict(self.settings), "step": self.step}
        checkpoint = facts | {"history": self.history, "random": random}
        checkpoint |= {name: part.state_dict() for name, part in self.parts.items()}
        trained = facts | {"classes": list(self.data.classes), "size": self.data.size}
        trained |= {"ap": self.history["ap"][-1:], "model": self.average.state_dict()}
        title = f"{self.settings.recipe} on {self.settings.data}, seed {self.settings.seed}"
        for name, write in {
            "model.pt": lambda f: torch.save(trained, f),
            "history.json": lambda f: f.write(json.dumps(self.history).encode()),
            "curves.png": lambda f: draw_curves(self.history, title, f),
            "checkpoint.pt": lambda f: torch.save(checkpoint, f),
        }.items():
            _write(self.out / name, write)

    def _load(self, file: Path) -> None:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        for name, now in asdict(self.settings).items():
            if (then := checkpoint["settings"][name]) != now:
                raise ValueError(f"{name}: expected {then!r} as in {file}, got {now!r}")
        if (then := len(checkpoint["random"])) != self.world:
            raise ValueError(f"processes: expected {then} as in {file}, got {self.world}")
        for name, part in self.parts.items():
            part.load_state_dict(checkpoint[name])
        self.step, self.history = checkpoint["step"], checkpoint["history"]
        for generator, state in zip(self.random, checkpoint["random"][self.rank]):
            generator.set_state(state)
        self.console.print(f"going on after step {self.step} of {self.settings.steps}")

    # The loop

    def go(self, workers: int) -> dict[str, Any]:
        """All steps that are left."""
        settings, part = self.settings, (self.rank, self.world)
        left = range(self.step, settings.steps)
        loader = DataLoader(
            self.augmented,
            batch_sampler=batches(len(self.data), settings.batch, left, settings.seed, part),
            collate_fn=self.augmented.batch,
            num_workers=workers,
            generator=torch.Generator(),  # the loader draws from it, not from the global one
        )
        model: nn.Module = self.model
        if self.world > 1:
            model = DistributedDataParallel(model, find_unused_parameters=True)
        model.train()
        for module in self.model.modules() if settings.freeze_norms else ():
            if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                module.eval()
        began = time.process_time() - self.history["cpu_seconds"]
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        hidden = not self.console.is_terminal  # a bar, where somebody can see it move
        with Progress(*columns, console=self.console, disable=hidden) as bar:
            task = bar.add_task("", total=settings.steps, completed=self.step)
            for images, targets in loader:
                losses = self._step(model, images, targets)
                self.history["loss"].append(sum(losses.values()))
                last = self.step == settings.steps
                if last or self.step % settings.evaluate_every == 0:
                    self._evaluate(losses)
                self.history["cpu_seconds"] = time.process_time() - began
                if last or self.step % settings.save_every == 0:
                    self._save()
                bar.update(task, advance=1, description=f"loss {self.history['loss'][-1]:.3f}")
        if self.world > 1:  # gloo's threads let go of the last tensors; else Python ends under them
            distributed.barrier()
        return self.history

    def _step(
        self, model: nn.Module, images: Tensor, targets: list[dict[str, Tensor]]
    ) -> dict[str, float]:
        """One step of the optimizer; the losses, averaged over processes."""
        images = images.to(self.device)
        targets = [{key: t.to(self.device) for key, t in one.items()} for one in targets]
        half = AMP[self.settings.amp]
        with torch.autocast(self.device.type, half, enabled=half is not None):
            outputs = model(images, None, targets)
        losses = self.criterion(outputs, targets)
        loss = torch.stack(list(losses.values())).sum()
        if not loss.isfinite():
            parts = {name: value.item() for name, value in losses.items()}
            raise FloatingPointError(f"step {self.step}: expected finite losses, got {parts}")
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(self.step, self.settings.steps)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self._follow()
        numbers = torch.stack([value.detach() for value in losses.values()]).tolist()
        of_all = self._of_all(dict(zip(losses, numbers)))  # those without objects have no denoising
        names = dict.fromkeys(name for one in of_all for name in one)
        return {name: sum(one.get(name, 0.0) for one in of_all) / self.world for name in names}

    def _follow(self) -> None:
        """Move the average of the weights: over a twentieth of the training, less at its start."""
        span = max(1.0, min(self.settings.steps / 20, self.step / 4))
        follow, lead = ([*m.parameters(), *m.buffers()] for m in (self.average, self.model))
        with torch.no_grad():
            for mean, now in zip(follow, lead):
                mean.copy_(mean.lerp(now, 1 / span) if mean.is_floating_point() else now)

    def _evaluate(self, losses: dict[str, float]) -> None:
        self.history["parts"].append({"step": self.step, **losses})
        if self.rank == 0:
            ap = evaluate(self.average, self.postprocess, self.test, self.settings.batch)
            self.history["ap"].append({"step": self.step, **ap})
            done = f"step {self.step:5}  loss {self.history['loss'][-1]:.3f}"
            self.console.print(f"{done}  AP {ap['AP']:.3f}  AP50 {ap['AP50']:.3f}")


def _write(file: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Whatever kills this, at any time: the file is the old one or the new one."""
    partial = file.with_name(file.name + ".partial")
    with open(partial, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, file)


def main() -> None:
    """Read the command line and train."""
    prog = "python -m deform_attn.detr.train"
    try:
        tyro.cli(train, prog=prog, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    except ValueError as error:
        sys.exit(f"{prog}: error: {error}")


if __name__ == "__main__":
    main()
