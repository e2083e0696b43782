"""Training and fine-tuning: ``python -m deform_attn.detr train``.

The folder of a run holds ``model.pt`` and ``best.pt``, that of the best AP, for
`deform_attn.detr.load`; ``log.csv`` and ``curves.png``; ``history.json``; and ``checkpoint.pt``.
The same command resumes a training that was stopped, with the same result to the bit; ``--resume``
continues it with the settings of the run, apart from those that are given. Under
``torchrun --nproc-per-node N -m deform_attn.detr train ...`` N processes share each batch.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeAlias

import torch
import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from deform_attn.checks import (
    as_path,
    check_choice,
    check_integer,
    check_number,
    check_positive,
)
from deform_attn.detr.augment import (
    AUGMENTATIONS,
    Augmented,
    Batch,
    batches,
    check_augmentation,
)
from deform_attn.detr.checkpoints import read_checkpoint
from deform_attn.detr.data import open_dataset
from deform_attn.detr.device import default_device, find_device
from deform_attn.detr.evaluate import (
    MOST_WORKERS,
    as_text,
    average_precision,
    detect,
    draw_curves,
    started,
)
from deform_attn.detr.files import locked, make_folder, nearby, write
from deform_attn.detr.folders import AnnotatedFolder
from deform_attn.detr.images import LARGEST_SIZE, RESIZE
from deform_attn.detr.logs import Log, Stopwatch, summary_writer
from deform_attn.detr.losses import averaged, in_evaluation
from deform_attn.detr.predict import SHIPPED, Predictor, open_detector
from deform_attn.detr.recipes import RECIPES, Recipe, build
from deform_attn.detr.recompute import recompute
from deform_attn.detr.zoo import CONFIGURATIONS

# Settings that may differ from those of the run that --resume continues.
CHANGEABLE = frozenset(
    [
        "steps",
        "batch",
        "accumulate",
        "recompute",
        "multi_scale",
        "lr",
        "backbone_lr",
        "weight_decay",
        "clip",
        "augment",
        "amp",
        "freeze_norms",
        "seed",
        "evaluate_every",
        "save_every",
        "keep_every",
        "patience",
    ]
)
WRITTEN = ("model.pt", "best.pt")  # by a training, for `deform_attn.detr.load`
OF_STEPS, OF_EVALUATIONS = ("loss", "matched_loss", "lr"), ("parts", "val_loss", "ap")
ARCHITECTURE = ("recipe", "model", "width", "layers", "queries")
# Largest settings: beyond them memory ends, with an error of the allocator, or by the system.
LARGEST = {
    "size": LARGEST_SIZE,
    "batch": 2**16,
    "accumulate": 2**16,
    "layers": 100,
    "queries": 10_000,
    "width": 4096,
}
# Text that may be left out. Help shows no empty default: the command line refuses empty values.
Text: TypeAlias = Annotated[
    str,
    tyro.conf.arg(help_behavior_hint=lambda text: "" if text == "''" else f"(default: {text})"),
]
AMP = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a training. Each field is an option of ``train``.

    One of ``recipe``, ``model`` and ``init`` is required.

    Example:
        >>> from deform_attn.detr.train import Settings
        >>> Settings(data="shapes", recipe="rtdetr", accumulate=0).check()
        Traceback (most recent call last):
            ...
        ValueError: accumulate: expected at least 1, got 0
    """

    # shapes, digits, or a folder of COCO's, Roboflow's or YOLO's layout
    data: str
    # a small system on a small backbone: stewart, detr, dab_detr, deformable_detr,
    # deformable_detr_two_stage, dab_deformable_detr, dn_deformable_detr, dino, rtdetr, rtdetrv2,
    # dfine, deim or mr_detr
    recipe: Text = ""
    # or an official model, such as detr_r50, dino_r50_4scale, rtdetr_r18, dfine_n; another name
    # lists all
    model: Text = ""
    # weights to start from: digits, model.pt of a training, an official checkpoint, a folder or a
    # name on the hub
    init: Text = ""
    steps: int = 800  # of the optimizer
    batch: int = 16  # images per forward pass, of all processes together
    accumulate: int = 1  # passes per step: a step of so many batches, in the memory of one
    # 1: gradient checkpointing: blocks of the backbone, encoder and decoder layers are computed
    # again for the gradients, instead of keeping what is inside them
    recompute: int = 0
    size: int = 0  # of the images in pixels; 0: that of the model, or of the data
    resize: Text = ""  # stretch, fit or shortest; by default that of the model, or stretch
    # batches of random sizes, the multiples of 32 within this part of the size: 0.25 of 640 is 480
    # to 800 (RT-DETR); with shortest, images of random sizes, none larger; 0: one size
    multi_scale: float = 0.0
    width: int = 64  # channels, a multiple of 32
    layers: int = 2  # of the decoder
    queries: int = 20  # the most objects that are found in an image
    lr: float = 1e-3  # 1e-4 is usual for official models
    backbone_lr: float = 1.0  # times lr; 0.1 is usual for a pretrained backbone
    freeze: Text = ""  # parameters whose names start so keep their values: "backbone"
    weight_decay: float = 1e-4  # of weights; biases and norms have none
    clip: float = 0.1  # largest norm of the gradients
    # none, flip, or with torchvision: detr (flip, crop), crop (flip, colours, zoom, crop) or dense
    # (DEIM: mosaic and mixup too); by default that of the recipe or of the official model, or flip
    # without torchvision
    augment: Text = ""
    amp: str = "none"  # none, bfloat16, or float16 with scaled losses
    freeze_norms: int = 0  # 1: batch norms keep their statistics, as in DETR's backbone
    seed: int = 0  # of weights, order, augmentation and drawn images
    evaluate_every: int = 100  # steps between evaluations
    save_every: int = 100  # steps between saves
    keep_every: int = 0  # steps after which a save also stays as checkpoint_STEP.pt; 0: none
    patience: int = 0  # evaluations without a better AP after which training ends; 0: never

    def check(self) -> None:
        """Check the settings, apart from the data.

        Raises:
            TypeError: a setting has another type; the message names it.
            ValueError: a setting has an invalid value; the message names it.
        """
        for field in fields(self):
            got, kind = getattr(self, field.name), type(field.default)
            if kind is int:
                check_integer(field.name, got)
            elif kind is float:
                check_number(field.name, got)
            elif not isinstance(got, str):
                raise TypeError(f"{field.name}: expected text, got {got!r}")
        if self.recipe and self.model:
            raise ValueError(
                f"recipe, model: expected one of them, got {self.recipe!r} and {self.model!r}"
            )
        if not (self.recipe or self.model or self.init):
            raise ValueError("recipe, model: expected one of them, or init alone, got none")
        choices: dict[str, Iterable[str]] = {
            "recipe": RECIPES,
            "model": CONFIGURATIONS,
            "resize": RESIZE,
            "augment": AUGMENTATIONS,
        }
        check_choice("amp", self.amp, AMP)
        for name, known in choices.items():
            if got := getattr(self, name):
                check_choice(name, got, known)
        counts = ("steps", "batch", "accumulate", "layers", "queries")
        for name in (*counts, "evaluate_every", "save_every"):
            check_integer(name, getattr(self, name), 1, LARGEST.get(name, 2**63 - 1))
        for name in ("size", "width"):
            check_integer(name, getattr(self, name), 0, LARGEST[name])
        for name in ("lr", "clip"):
            check_positive(name, getattr(self, name))
        for name in ("backbone_lr", "weight_decay", "seed", "keep_every", "patience"):
            if not 0 <= (got := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}: expected a number from 0, got {got}")
        if self.seed >= 2**62:
            raise ValueError(f"seed: expected a number below 2**62, got {self.seed}")
        if self.width < 32 or self.width % 32:
            raise ValueError(f"width: expected a multiple of 32, got {self.width}")
        if self.model:
            for name in ("width", "layers", "queries"):
                if (got := getattr(self, name)) != (default := getattr(Settings, name)):
                    raise ValueError(
                        f"{name}: expected {default}, the default, because {self.model} has its "
                        f"own, got {got}"
                    )
        for name in ("freeze_norms", "recompute"):
            if (got := getattr(self, name)) not in (0, 1):
                raise ValueError(f"{name}: expected 0 or 1, got {got}")
        if not 0 <= self.multi_scale < 1:
            raise ValueError(f"multi_scale: expected 0 to below 1, got {self.multi_scale}")
        if self.keep_every % self.save_every:
            raise ValueError(
                f"keep_every: expected a multiple of save_every, which is {self.save_every}, "
                f"got {self.keep_every}"
            )


def _recipe(settings: Settings) -> Recipe:
    """The recipe, or that of the system of an official model."""
    if settings.recipe:
        return RECIPES[settings.recipe]
    system = CONFIGURATIONS[settings.model].system
    name = {"deim_rtdetrv2": "deim", "dn_detr": "dab_detr"}.get(system.__name__, system.__name__)
    augment = "detr" if CONFIGURATIONS[settings.model].resize == "shortest" else "crop"
    return replace(RECIPES[name], augment="dense" if name == "deim" else augment)


def learning_rate_factor(step: int, steps: int) -> float:
    """DEIM's schedule: a quadratic warm-up, constant until the middle, then a cosine to 0.05.

    Example:
        >>> from deform_attn.detr.train import learning_rate_factor
        >>> [round(learning_rate_factor(step, 1000), 3) for step in (9, 49, 500, 750, 1000)]
        [0.04, 1.0, 1.0, 0.525, 0.05]
    """
    warm_up = max(1, min(steps // 20, 2000))
    rising = min(1.0, ((step + 1) / warm_up) ** 2)
    falling = max(0.0, step / steps - 0.5) * 2
    return rising * (0.05 + 0.95 * (1 + math.cos(math.pi * falling)) / 2)


def resolved(settings: Settings, source: Predictor | None) -> Settings:
    """Settings with the architecture of the weights to start from, where they name none.

    Raises:
        ValueError: the weights are of no known architecture.
    """
    if settings.recipe or settings.model:
        return settings
    assert source is not None, "init"
    if source.facts.get("model") in CONFIGURATIONS:
        return replace(settings, model=source.facts["model"])
    if "settings" not in source.facts:
        raise ValueError(f"model: expected one of {', '.join(CONFIGURATIONS)} for {settings.init}")
    trained = source.facts["settings"]
    return replace(settings, **{name: trained[name] for name in ARCHITECTURE if name in trained})


def with_augmentation(
    settings: Settings, checkpoint: dict[str, Any] | None, observe: Callable[[str], object]
) -> Settings:
    """Settings with an augmentation, where they name none.

    That is the one of the checkpoint, the recipe's, or "flip" where the recipe's needs torchvision
    and there is none.

    Args:
        settings: valid ones, with a recipe or a model.
        checkpoint: to resume.
        observe: called with the reason where "flip" replaces another.

    Raises:
        ImportError: the augmentation that is named, or that of the checkpoint, needs torchvision.
    """
    chosen = settings.augment or ("" if checkpoint is None else checkpoint["settings"]["augment"])
    if chosen:
        check_augmentation(chosen)
        return replace(settings, augment=chosen)
    chosen = _recipe(settings).augment
    try:
        check_augmentation(chosen)
    except ImportError as error:
        observe(f"augment: flip instead of {chosen}, which needs torchvision: {error}")
        chosen = "flip"
    return replace(settings, augment=chosen)


# Tensors with a row per class: then one more, of "no object" or padding, in some systems.
_PER_CLASS = re.compile(r"\b(?:class_heads?|label_embed)\b")


def transfer(
    model: nn.Module,
    source: nn.Module,
    classes: Sequence[str],
    source_classes: Sequence[str],
) -> list[str]:
    """Copy the weights of another model; rows of classes go by the names of the classes.

    Args:
        model: to change.
        source: of the same system; sizes may differ.
        classes: of the model.
        source_classes: of the source.

    Returns:
        Names of the tensors that keep their initial values, or some rows of them.
    """
    own, given = model.state_dict(keep_vars=True), source.state_dict()
    rows = [
        (i, source_classes.index(name)) for i, name in enumerate(classes) if name in source_classes
    ]
    kept = []
    for name, tensor in own.items():
        other = given.get(name)
        if other is None or other.shape[1:] != tensor.shape[1:]:
            kept.append(name)
            continue
        with torch.no_grad():
            if not _PER_CLASS.search(name):
                if other.shape == tensor.shape:
                    tensor.copy_(other)
                else:
                    kept.append(name)
                continue
            for mine, theirs in rows:
                tensor[mine] = other[theirs]
            if len(tensor) > len(classes) and len(other) > len(source_classes):
                tensor[len(classes) :] = other[-1]
            if len(rows) < len(classes):
                kept.append(name)
    return kept


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay.

    The backbone has a factor of its own. Sampling offsets and reference points have a tenth of the
    rate in some recipes (Deformable DETR, arXiv 2010.04159, section 5). Biases and norms have no
    weight decay.
    """
    slow = _recipe(settings).slow
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}  # the same for all rates
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_slow = any(part in name for part in slow)
            kind = (name.startswith("backbone."), is_slow, parameter.dim() > 1)
            groups.setdefault(kind, []).append(parameter)
    found = []
    for (in_backbone, is_slow, decays), parameters in groups.items():
        lr = settings.lr * (settings.backbone_lr if in_backbone else 1) * (0.1 if is_slow else 1)
        decay = settings.weight_decay if decays else 0.0
        found.append({"params": parameters, "lr": lr, "peak": lr, "weight_decay": decay})
    return found


def _own_device(name: str) -> torch.device:
    """Of several processes, each has the GPU of its number.

    Raises:
        ValueError: it is not there, or all processes would have the same GPU.
    """
    name = name or default_device()
    processes = _torchrun("WORLD_SIZE", 1)
    if processes > 1 and name != "cpu":
        if ":" in name:
            raise ValueError(
                f"device: expected cpu or cuda, of which each of the {processes} processes has "
                f"its own, got {name!r}"
            )
        name = f"{name}:{_torchrun('LOCAL_RANK')}"
    return find_device(name)


def _torchrun(name: str, default: int = 0) -> int:
    """A number that torchrun sets; the default without it."""
    return int(os.environ.get(name, default))


def train(
    settings: Settings,
    out: Path,
    workers: int = 0,
    resume: Path | None = None,
    device: Text = "",
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Train or fine-tune a detector; resumes from the checkpoint in the folder, if there is one.

    With a checkpoint to resume, its training is continued. On the command line, options that are
    not given have the values of that run; in Python, ``settings_of(RUN)`` gives them. Other values
    may be given of steps, batch, rates, augmentation, random sizes, precision, seed, patience,
    saving, the device, the place of the data and the number of processes. What decides the model
    and the images to train on must be the same.

    Under torchrun it makes a process group, if there is none, and destroys it at the end. A script
    that trains several times makes one group for all: PyTorch's store keeps the addresses of a
    destroyed group, and a second group can wait for them.

    Examples, from random weights, from those of digits, from official ones, and continued:

    python -m deform_attn.detr train --recipe rtdetr --data shapes --out RUN

    python -m deform_attn.detr train --init digits --data FOLDER --size 128 --out RUN

    python -m deform_attn.detr train --init FILE.pth --data FOLDER --lr 1e-4 --backbone-lr 0.1
    --multi-scale 0.25 --batch 4 --accumulate 4 --recompute 1 --patience 5 --out RUN

    python -m deform_attn.detr train --resume RUN --steps 1600 --lr 1e-4 --out NEXT

    Args:
        settings: of the training.
        out: folder of the run; with resume, by default that of the checkpoint.
        workers: processes that prepare batches, of training and evaluation; they do not change the
            result.
        resume: a checkpoint, or the folder of a run, to continue. ``out`` is the same folder, or
            one that has no other training.
        device: cpu, cuda, cuda:1, mps, ...; by default a GPU, if there is one. Under torchrun each
            process has its own.
        tensorboard: write events for TensorBoard too, in ``tensorboard/`` of the folder.

    Returns:
        The history. Of each step: ``loss``; ``matched_loss``, without denoising and Mr. DETR's
        routes; ``lr``, before the factors of parameter groups. Of each evaluation, with its
        ``step``: ``parts``, each training loss by name; ``val_loss``, likewise of the test images,
        and their sum as ``loss``; ``ap``, COCO's numbers. And ``cpu_seconds`` of this process.

    Raises:
        TypeError: a setting of another type.
        ValueError: an invalid setting, or another than in the checkpoint; or no such device.
        OSError: another process trains in the folder, or a file cannot be written.
        ImportError: TensorBoard, or torchvision for the augmentation, is not installed.
        FileNotFoundError: there is no checkpoint to resume.
        FloatingPointError: the loss or a gradient is not finite; the checkpoint is older.
    """
    if not isinstance(settings, Settings):
        raise TypeError(f"settings: expected deform_attn.detr.train.Settings, got {settings!r}")
    settings.check()
    out, resume = as_path("out", out), None if resume is None else as_path("resume", resume)
    check_integer("workers", workers, 0, MOST_WORKERS)
    if tensorboard:
        summary_writer()
    where = _own_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)  # NCCL takes the current one
    makes_group = "RANK" in os.environ and not distributed.is_initialized()
    if makes_group:
        distributed.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        run = _Run(settings, out, resume, where, workers, tensorboard=tensorboard)
        with locked("out", out) if run.rank == 0 else nullcontext():
            return run.go()
    finally:
        if makes_group:
            distributed.destroy_process_group()


class _Stopped(Exception):
    """A signal came before the end of an evaluation."""


class _Run:
    """The state of a training, its checkpoints, and the loop."""

    def __init__(
        self,
        settings: Settings,
        out: Path,
        resume: Path | None = None,
        device: torch.device | None = None,
        workers: int = 0,
        *,
        tensorboard: bool = False,
    ) -> None:
        file, checkpoint = _checkpoint(out, resume)
        change, source = resume is not None, None
        if checkpoint is None:
            if settings.init and not (SHIPPED / f"{settings.init}.pt").is_file():
                init, written = as_path("init", settings.init), [out / name for name in WRITTEN]
                if init.exists() and any(x.exists() and x.samefile(init) for x in (out, *written)):
                    raise ValueError(
                        f"out: expected another folder than that of init, got {str(out)!r}, whose "
                        f"{' and '.join(WRITTEN)} the training would replace"
                    )
            source = open_detector("init", settings.init) if settings.init else None
            settings = resolved(settings, source)
        elif not (settings.recipe or settings.model):
            then = checkpoint["settings"]
            settings = replace(settings, **{name: then[name] for name in ARCHITECTURE})
        settings.check()
        rank, world = _torchrun("RANK"), _torchrun("WORLD_SIZE", 1)
        device = device or torch.device("cpu")
        self.rank, self.world, self.device = rank, world, device
        self.workers, self.tensorboard = workers, tensorboard
        self.console = Console(quiet=rank > 0, highlight=False, markup=False)
        wrap = functools.partial(self.console.print, soft_wrap=True)
        self.settings = settings = with_augmentation(settings, checkpoint, wrap)
        if checkpoint is not None:
            _check_settings(settings, checkpoint["settings"], file, change=change)
        self.out = out
        official = CONFIGURATIONS.get(settings.model)
        size = settings.size or (0 if official is None else official.image_size)
        self.resize = settings.resize or ("stretch" if official is None else official.resize)
        options = (size, settings.seed, self.resize)
        self.data = open_dataset(settings.data, "train", *options)
        self.test = open_dataset(settings.data, "val", *options, self.data.classes)
        for one in (self.data, self.test):
            if isinstance(one, AnnotatedFolder):
                one.check_apart("out", out)
        of_images = (settings.steps, settings.seed, settings.multi_scale, self.resize)
        self.augmented = Augmented(self.data, settings.augment, *of_images)
        torch.manual_seed(settings.seed)
        if official is None:
            sizes = (settings.width, settings.layers, settings.queries)
            system = build(settings.recipe, len(self.data.classes), *sizes)
            self.queries = settings.queries
        else:
            system = official.build(len(self.data.classes))
            self.queries = official.size.num_queries
        if source is not None:
            initial = transfer(system.model, source.model, self.data.classes, source.classes)
            named = system.model.named_parameters()
            if {name for name, parameter in named if parameter.dim() > 1} <= {*initial}:
                raise ValueError(
                    f"init: expected weights of {settings.recipe or settings.model}, got none of "
                    f"its names and sizes in {settings.init!r}; without --recipe and --model, the "
                    "system and the sizes of the weights are taken"
                )
            if initial:
                more = f" and {len(initial) - 20} more" if initial[20:] else ""
                wrap(f"drawn anew: {', '.join(initial[:20])}{more}")
        frozen = [
            parameter
            for name, parameter in system.model.named_parameters()
            if settings.freeze and name.startswith(settings.freeze)
        ]
        if settings.freeze and not frozen:
            starts = sorted({name.split(".")[0] for name in system.model.state_dict()})
            raise ValueError(
                f"freeze: expected the start of a parameter's name, such as one of {starts}, "
                f"got {settings.freeze!r}"
            )
        for parameter in frozen:
            parameter.requires_grad_(False)
        self.criterion, self.postprocess = system.criterion, system.postprocess
        self.model = system.model.to(device)
        if world > 1 and device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        if settings.recompute:
            recompute(self.model)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, settings))
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "float16")
        parts = ("model", "average", "optimizer", "scaler")
        self.parts = {name: getattr(self, name) for name in parts}
        self.step = self.saved = 0  # done, and of the last checkpoint
        self.log: Log | None = None
        self.watch, self.began = Stopwatch(self.console.print), time.process_time()
        self.signal = 0  # the signal that ends the training
        self.handlers: dict[int, Any] = {signal.SIGINT: None, signal.SIGTERM: None}
        self.history: dict[str, Any] = {name: [] for name in (*OF_STEPS, *OF_EVALUATIONS)}
        self.history["cpu_seconds"] = 0.0
        self._check_objects()
        self._check_sizes()
        torch.manual_seed(settings.seed + 1000 * rank)  # processes draw different noise
        make_folder("out", out)
        if checkpoint is not None:
            self._load(file, checkpoint, change=change)

    def _check_objects(self) -> None:
        """Warn of images with more objects than queries can find.

        Raises:
            ValueError: there is no object to learn, or none to measure an AP for ``patience``.
        """
        if self.settings.patience and self.test.most_objects == 0:
            raise ValueError(
                "patience: expected 0, because the test images have no objects and no AP, "
                f"got {self.settings.patience}"
            )
        most = self.data.most_objects
        if most == 0:
            raise ValueError(f"data: expected objects to learn, got none in {self.settings.data}")
        # Stewart's boxes are those of its cells.
        if most > self.queries and self.settings.recipe != "stewart":
            self.console.print(
                f"warning: queries: images have up to {most} objects, more than the "
                f"{self.queries} queries; the others are never learnt",
                soft_wrap=True,
            )

    def _check_sizes(self) -> None:
        """Check that the smallest images have enough pixels.

        Raises:
            ValueError: they have fewer than queries.
        """
        side = min(self.augmented.sizes)
        try:
            with torch.no_grad():
                self.average(torch.zeros(1, 3, side, side, device=self.device))
        except ValueError as error:
            expected = f"queries: expected fewer, or a larger size, got {self.queries}"
            if len(self.augmented.sizes) > 1:
                expected = (
                    f"multi_scale: expected a smaller number, got {self.settings.multi_scale}"
                )
            raise ValueError(
                f"{expected}, because some images have {side} pixels a side: {error}"
            ) from error

    def _random_state(self) -> dict[str, Tensor]:
        """States of the generators, by type of device."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            states[self.device.type] = torch.get_device_module(self.device).get_rng_state()
        return states

    def _gathered(self, value: Any) -> list[Any]:
        """A value of each process."""
        values = [value] * self.world
        if self.world > 1:
            distributed.all_gather_object(values, value)
        return values

    # Checkpoints. Learning rates, order and augmentation of the images follow from seed and step.

    def _save(self) -> None:
        self.history["cpu_seconds"] = time.process_time() - self.began
        if self.rank == 0:
            name = self.settings.recipe or self.settings.model
            title = f"{name} on {self.settings.data}, seed {self.settings.seed}"
            write(self.out / "history.json", lambda f: f.write(json.dumps(self.history).encode()))
            write(self.out / "curves.png", lambda f: draw_curves(self.history, title, f))
        keep = self.settings.keep_every
        self._save_state(keep=keep > 0 and self.step % keep == 0)

    def _save_state(self, *, keep: bool = False) -> None:
        """The model, and what a training is resumed from; ``keep``: also as a file of this step."""
        numbers = [x for x in self.model.state_dict().values() if x.is_floating_point()]
        if not torch.stack([x.isfinite().all() for x in numbers]).all():
            self._diverged("weights", "NaN or infinity")
        random, self.saved = self._gathered(self._random_state()), self.step
        if self.rank > 0:
            return
        checkpoint = {"settings": asdict(self.settings), "step": self.step}
        checkpoint |= {"history": self.history, "random": random, "data": self._data()}
        checkpoint |= {name: part.state_dict() for name, part in self.parts.items()}
        write(self.out / "model.pt", lambda f: torch.save(self._trained(), f))
        for name in ("checkpoint.pt", *([f"checkpoint_{self.step}.pt"] if keep else [])):
            write(self.out / name, lambda f: torch.save(checkpoint, f))

    def _trained(self) -> dict[str, Any]:
        """Content of a file for `load`."""
        facts = {"settings": asdict(self.settings), "step": self.step}
        facts |= {"classes": list(self.data.classes), "size": self.data.size}
        facts |= {"resize": self.resize, "ap": self.history["ap"][-1:]}
        return facts | {"model": self.average.state_dict()}

    def _data(self) -> dict[str, Any]:
        classes = list(self.data.classes)
        return {"classes": classes, "train": self.data.identity, "val": self.test.identity}

    def _load(self, file: Path, checkpoint: dict[str, Any], *, change: bool) -> None:
        """Continue from a checkpoint; ``change``: settings may be others."""
        then, data = checkpoint["settings"], checkpoint["data"]
        for part, now in self._data().items():
            if part not in data or data[part] == now:
                continue
            if part == "val" and change:  # they decide no step
                self.console.print(
                    f"warning: data: the test images are not those of {file}: their AP is not "
                    "comparable with earlier ones",
                    soft_wrap=True,
                )
                continue
            step = "--init starts another training from its weights"
            if part == "val":
                step = "--resume continues it with other test images"
            if part == "classes":
                raise ValueError(f"classes: expected {data[part]} as in {file}, got {now}; {step}")
            raise ValueError(
                f"data: expected the {part} images of {file}, got others from "
                f"{self.settings.data}; {step}"
            )
        if (processes := len(checkpoint["random"])) != self.world and not change:
            raise ValueError(
                f"processes: expected {processes} as in {file}, got {self.world}; "
                "--resume continues it with others"
            )
        groups = [dict(group, params=None) for group in self.optimizer.param_groups]
        for name, part in self.parts.items():
            if name != "scaler" or then.get("amp") == self.settings.amp:
                try:
                    part.load_state_dict(checkpoint[name])
                except (RuntimeError, ValueError) as error:
                    raise ValueError(f"{file}: {name}: {error}") from error
        for group, own in zip(self.optimizer.param_groups, groups):
            group |= {name: own[name] for name in ("peak", "weight_decay")}
        self.step = self.saved = checkpoint["step"]
        # Histories of earlier versions have fewer numbers.
        self.history |= {name: [None] * self.step for name in OF_STEPS} | checkpoint["history"]
        if self.step > self.settings.steps:
            raise ValueError(
                f"steps: expected at least {self.step}, as in {file}, got {self.settings.steps}"
            )
        if self.rank < processes and then.get("seed") == self.settings.seed:
            states = checkpoint["random"][self.rank]
            if isinstance(states, list):  # as earlier versions saved them
                states = dict(zip(("cpu", "cuda"), states))
            torch.set_rng_state(states["cpu"])
            if self.device.type != "cpu" and self.device.type in states:
                module = torch.get_device_module(self.device)
                module.set_rng_state(states[self.device.type])
        done = f"step {self.step} of {self.settings.steps}"
        self.console.print(f"resumes {file} after {done}", soft_wrap=True)
        if self.step == self.settings.steps and not self._evaluation_is_awaited():
            self.console.print(
                f"nothing remains to do; --resume {file} with a larger --steps continues",
                soft_wrap=True,
            )

    # The loop

    def go(self) -> dict[str, Any]:
        """Run the remaining steps; SIGINT and SIGTERM save after the current one."""
        if threading.current_thread() is threading.main_thread():
            for number in self.handlers:
                self.handlers[number] = signal.signal(number, self._signalled)
        try:
            return self._go()
        finally:
            if self.log is not None:
                self.log.close()
            for number, handler in self.handlers.items():
                if handler is not None:
                    signal.signal(number, handler)

    def _go(self) -> dict[str, Any]:
        settings, remaining = self.settings, range(self.step, self.settings.steps)
        order = settings.seed, (self.rank, self.world), settings.accumulate
        loader = DataLoader(
            self.augmented,
            batch_sampler=batches(len(self.data), settings.batch, remaining, *order),
            collate_fn=self.augmented.batch,
            num_workers=self.workers,
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        model: nn.Module = self.model
        if self.world > 1:
            model = DistributedDataParallel(model)
        model.train()
        for module in self.model.modules() if settings.freeze_norms else ():
            if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                module.eval()
        awaited = self._evaluation_is_awaited()  # a process ended before it or during it
        if remaining and not awaited and self._ended_early():
            return self.history
        self.began = time.process_time() - self.history["cpu_seconds"]
        if self.rank == 0:
            logged = self.step - awaited
            self.log = Log(self.out, self.history, logged, tensorboard=self.tensorboard)
        if awaited and self._finish_step(save=True):
            remaining = range(0)
        passes = zip(*[started(loader)] * settings.accumulate)
        layers = getattr(self.model.get_submodule("decoder"), "eval_layers", 1)
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        no_bar = not self.console.is_terminal
        with Progress(*columns, console=self.console, disable=no_bar) as bar:
            task = bar.add_task("", total=settings.steps, completed=self.step)
            for left in reversed(range(len(remaining))):
                with self.watch.time("step", left):
                    losses = self._step(model, next(passes))
                matched = sum(loss for name, loss in losses.items() if in_evaluation(name, layers))
                lr = settings.lr * learning_rate_factor(self.step - 1, settings.steps)
                row = sum(losses.values()), matched, lr
                for name, value in zip(OF_STEPS, row):
                    self.history[name].append(value)
                if left == 0 or self.step % settings.evaluate_every == 0:
                    self.history["parts"].append({"step": self.step, **losses})
                ended = self._finish_step(save=left == 0 or self.step % settings.save_every == 0)
                bar.update(task, advance=1, description=f"loss {self.history['loss'][-1]:.3f}")
                if ended:
                    break
        if self.world > 1:  # gloo's threads may still use tensors when Python ends: wait
            distributed.barrier()
        return self.history

    def _evaluation_is_awaited(self) -> bool:
        """Whether an evaluation after the current step is due, and not in the history yet."""
        due, done = ([one["step"] for one in self.history[name][-1:]] for name in ("parts", "ap"))
        return due == [self.step] != done

    def _finish_step(self, *, save: bool) -> bool:
        """Save, evaluate where that is due, and log the step; whether the training has ended."""
        ended = self.step == self.settings.steps
        stopped = self._stopped()
        if self._evaluation_is_awaited():
            self.history["cpu_seconds"] = time.process_time() - self.began
            # and again with its numbers: a kill during it costs no step, one after it no evaluation
            if save and not stopped:
                self._save_state()
            every = self.settings.evaluate_every
            others = 0 if ended else -(-self.settings.steps // every) - self.step // every
            try:
                if stopped:
                    raise _Stopped
                with self.watch.time("evaluation", others):
                    self._evaluate()
            except _Stopped:  # the evaluation follows when the training is resumed
                self._save()
                self._stop(self._stopped())
            ended = ended or self._ended_early()
            stopped = self._stopped()
        if self.log is not None:
            self.log.add(self.history)
        if save or ended or stopped:
            self._save()
        if stopped and not ended:
            self._stop(stopped)
        return ended

    def _stopped(self) -> int:
        """The signal that ends the training, or 0; processes get it in different steps."""
        return max(self._gathered(self.signal))

    def _ended_early(self) -> bool:
        """Whether the last evaluations had no better AP than one before them."""
        values = [row["AP"] or 0.0 for row in self.history["ap"]]
        patience = self.settings.patience
        if not patience or max(values[-patience:], default=1) > max(values[:-patience], default=-1):
            return False
        best = max(range(len(values)), key=lambda i: (values[i], i))
        self.console.print(
            f"ends after step {self.step}: the last {patience} evaluations have no AP above "
            f"{values[best]:.3f}, that of step {self.history['ap'][best]['step']} in best.pt; "
            "--resume with a larger --patience continues",
            soft_wrap=True,
        )
        return True

    def _signalled(self, number: int, frame: Any) -> None:
        """Ends the training after the current step; a second signal ends it at once."""
        self.signal = number
        signal.signal(number, self.handlers[number])

    def _stop(self, number: int) -> NoReturn:
        name = signal.Signals(number).name
        self.console.print(f"{name}: saved after step {self.step}; the same command resumes")
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def _step(self, model: nn.Module, passes: Sequence[Batch]) -> dict[str, float]:
        """One step of the optimizer; the losses, averaged over passes and processes."""
        number = sum(len(target["labels"]) for *_, targets in passes for target in targets)
        num_objects = averaged(number, self.device) / len(passes)
        self.optimizer.zero_grad()
        found = []
        for one in passes:
            waits: AbstractContextManager[None] = nullcontext()
            if isinstance(model, DistributedDataParallel) and one is not passes[-1]:
                waits = model.no_sync()  # the last pass adds up the gradients of all processes
            with waits:
                found.append(self._pass(model, one, num_objects, len(passes)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(self.step, self.settings.steps)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        if not self.scaler.is_enabled() and not norm.isfinite():  # the scaler leaves such steps out
            self._diverged("gradients", f"the norm {norm.item()}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self._average_weights()
        gathered = [losses for part in self._gathered(found) for losses in part]
        # A pass without objects has no denoising losses.
        names = dict.fromkeys(name for one in gathered for name in one)
        return {name: sum(one.get(name, 0.0) for one in gathered) / len(gathered) for name in names}

    def _pass(
        self, model: nn.Module, batch: Batch, num_objects: Tensor, passes: int
    ) -> dict[str, float]:
        """Gradients of one of the passes of a step; its losses."""
        images, padding_mask, targets = batch
        images = images.to(self.device)
        if padding_mask is not None:
            padding_mask = padding_mask.to(self.device)
        targets = [{key: t.to(self.device) for key, t in one.items()} for one in targets]
        half = AMP[self.settings.amp]
        with torch.autocast(self.device.type, half, enabled=half is not None):
            outputs = model(images, padding_mask, targets)
        losses = self.criterion(outputs, targets, num_objects)
        loss = torch.stack(list(losses.values())).sum()
        if not loss.isfinite():
            self._diverged("losses", {name: value.item() for name, value in losses.items()})
        self.scaler.scale(loss / passes).backward()
        numbers = torch.stack([value.detach() for value in losses.values()]).tolist()
        return dict(zip(losses, numbers))

    def _diverged(self, what: str, got: object) -> NoReturn:
        earlier = self.out
        if self.saved == self.step:  # the last checkpoint has the same weights
            earlier /= "checkpoint_STEP.pt"
        raise FloatingPointError(
            f"step {self.step}: expected finite {what}, got {got}; continue an earlier checkpoint "
            "(--keep-every keeps them) with other settings, such as a lower learning rate: "
            f"--resume {earlier} --lr {self.settings.lr / 10:g} --out ANOTHER"
        )

    def _average_weights(self) -> None:
        """Update the moving average, over a twentieth of the training, less at its start."""
        span = max(1.0, min(self.settings.steps / 20, self.step / 4))
        averages, current = ([*m.parameters(), *m.buffers()] for m in (self.average, self.model))
        with torch.no_grad():
            for mean, now in zip(averages, current):
                mean.copy_(mean.lerp(now, 1 / span) if mean.is_floating_point() else now)

    def _evaluate(self) -> None:
        """Loss and AP of the averaged weights on the test images."""
        weighted: list[tuple[int, dict[str, Tensor]]] = []

        def stop_at_a_signal() -> None:
            if self._stopped():
                raise _Stopped

        def observe(outputs: dict[str, Any], targets: list[dict[str, Tensor]]) -> None:
            stop_at_a_signal()
            number = max(1, sum(len(target["labels"]) for target in targets))
            weighted.append((number, self.criterion(outputs, targets, alone=True)))

        options = (self.settings.batch, (self.rank, self.world), observe, self.workers)
        found = detect(self.average, self.postprocess, self.test, *options)
        most = -(-len(self.test) // self.world)  # images of a process
        for _ in range(len(weighted), -(-most // self.settings.batch)):
            stop_at_a_signal()  # in all processes as often
        found = [{key: value.cpu() for key, value in one.items()} for one in found]
        sums = [(n, {name: n * value.item() for name, value in of.items()}) for n, of in weighted]
        gathered = self._gathered((found, sums))
        sums = [one for _, part in gathered for one in part]
        total = sum(number for number, _ in sums)
        val = {name: sum(of[name] for _, of in sums) / total for name in sums[0][1]}
        if not all(map(math.isfinite, val.values())):
            self._diverged("losses of the test images", val)
        self.history["val_loss"].append({"step": self.step, "loss": sum(val.values()), **val})
        ap = None
        if self.rank == 0:
            detections = [one for part, _ in gathered for one in part]
            ap = average_precision(self.test.ground_truth(), detections)
        ap = self._gathered(ap)[0]
        best = max((one["AP"] or 0 for one in self.history["ap"]), default=-1)
        self.history["ap"].append({"step": self.step, **ap})
        if self.rank == 0 and ((ap["AP"] or 0) >= best or not (self.out / "best.pt").exists()):
            write(self.out / "best.pt", lambda f: torch.save(self._trained(), f))
        loss, matched = (self.history[name][-1] for name in ("loss", "matched_loss"))
        both = "" if loss == matched else f", {matched:.3f} of matched queries"
        loss_now = f"loss {loss:.3f}{both}  val loss {sum(val.values()):.3f}"
        ap_now = f"AP {as_text(ap['AP'])}  AP50 {as_text(ap['AP50'])}"
        self.console.print(f"step {self.step:5}  {loss_now}  {ap_now}", soft_wrap=True)


def settings_of(run: str | Path) -> Settings:
    """The settings of a training, to continue it with some of them changed.

    Args:
        run: its folder, or a checkpoint in it.

    Raises:
        TypeError: no path.
        FileNotFoundError: there is no such checkpoint.
        ValueError: damaged, or no training.

    Example::

        settings = dataclasses.replace(settings_of("RUN"), lr=1e-4, steps=2000)
        train(settings, Path("NEXT"), resume=Path("RUN"))
    """
    then = _read(_file_of(as_path("resume", run)))["settings"]
    known = {field.name for field in fields(Settings)}  # of the checkpoint's version: perhaps more
    return Settings(**{name: value for name, value in then.items() if name in known})


def _checkpoint(out: Path, resume: Path | None) -> tuple[Path, dict[str, Any] | None]:
    """The checkpoint that a training starts from, with its content; None where it is new.

    Raises:
        FileNotFoundError: there is nothing to resume.
        ValueError: damaged, or no training.
    """
    file = out / "checkpoint.pt"
    if resume is not None:
        given = _file_of(resume)
        if os.path.exists(file) and not file.samefile(given):
            raise ValueError(
                f"out: expected a folder without another training, got {file}; choose another "
                f"folder, or continue that one with --resume {out}"
            )
        file = given
    return file, _read(file) if os.path.exists(file) else None


def _file_of(resume: Path) -> Path:
    """The checkpoint of a folder, or the file itself.

    Raises:
        FileNotFoundError: there is none.
    """
    file = resume / "checkpoint.pt" if os.path.isdir(resume) else resume
    if not os.path.exists(file):
        raise FileNotFoundError(
            f"resume: expected a checkpoint or its folder, got {str(resume)!r}: {nearby(file)}"
        )
    return file


def _read(file: Path) -> dict[str, Any]:
    """Content of a checkpoint of a training.

    Raises:
        ValueError: damaged, or no training.
    """
    content = read_checkpoint(file)
    dicts = ("settings", "history", "data", "model", "average", "optimizer", "scaler")
    types: dict[str, type] = {"step": int, "random": list, **dict.fromkeys(dicts, dict)}
    missing = [name for name, kind in types.items() if not isinstance(content.get(name), kind)]
    if missing or "data" not in content["settings"]:
        raise ValueError(
            f"{file}: expected checkpoint.pt of a training, got a file without "
            f"{', '.join(missing) or 'settings of the data'}"
        )
    return content


def _check_settings(settings: Settings, then: dict[str, Any], file: Path, *, change: bool) -> None:
    """Compare settings with those of a checkpoint; ``change``: those of CHANGEABLE may differ.

    Raises:
        ValueError: another value.
    """
    for name, now in asdict(settings).items():
        # The data is compared by its content. Initial weights are not needed any more; given
        # together with --resume they would be ignored.
        free = name == "data" or (change and name in CHANGEABLE)
        free = free or (name == "init" and not (change and now))
        if free or name not in then or then[name] == now:
            continue
        step = "--init starts another training from its weights"
        if name == "init":
            step = "without --resume and in another folder it starts a training from these weights"
        if name in CHANGEABLE:
            step = "--resume continues it with other settings"
        raise ValueError(f"{name}: expected {then[name]!r} as in {file}, got {now!r}; {step}")
