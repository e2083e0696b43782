"""Use a trained detector: :func:`load` it by name or from a file, then ``predict`` on images."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deform_attn.checks import as_path, check_choice, check_integer, check_threshold
from deform_attn.detr.checkpoints import official_state, read_checkpoint
from deform_attn.detr.device import find_device
from deform_attn.detr.files import nearby
from deform_attn.detr.images import LARGEST_SIZE, as_tensor, pad, read_image
from deform_attn.detr.models import System
from deform_attn.detr.recipes import build
from deform_attn.detr.zoo import CONFIGURATIONS, configuration, create, from_official

SHIPPED = Path(__file__).parent / "weights"
WEIGHTS = (".pt", ".pth", ".pt2", ".ckpt", ".bin", ".safetensors", ".onnx", ".tar", ".zip")


class Predictor:
    """A trained detector with its preprocessing, postprocessing and class names.

    Attributes:
        model: the ``nn.Module``, in evaluation mode.
        postprocess: of its outputs, see :class:`~deform_attn.detr.models.System`.
        classes: names, by label.
        size: of the images, in pixels.
        resize: how they get that size, see :func:`~deform_attn.detr.images.as_tensor`.
        facts: of its training: ``settings``, ``step`` and the ``ap`` reached; or ``model``, the
            name of the official configuration.
    """

    def __init__(
        self,
        system: System,
        classes: Sequence[str],
        size: int,
        resize: str = "stretch",
        *,
        facts: dict[str, Any] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.model = system.model.eval().to(device)
        self.postprocess = system.postprocess
        self.classes, self.size, self.resize = list(classes), size, resize
        self.facts = facts or {}

    @torch.no_grad()
    def predict(
        self, images: Iterable[Any], threshold: float = 0.5, batch: int = 16
    ) -> list[dict[str, Any]]:
        """Detect in images of any sizes and modes.

        Args:
            images: files, ``PIL`` images, arrays ``[H, W, 3]`` or tensors ``[3, H, W]``, see
                :func:`~deform_attn.detr.images.read_image`; a list, or a generator, such as of the
                frames of a video.
            threshold: lowest score.
            batch: images per call of the model, and in memory at a time.

        Returns:
            For each image ``boxes [n, 4]``, ``(x1, y1, x2, y2)`` in its pixels; ``scores [n]``,
            best first; ``labels [n]``; and ``names``, a list of n classes. A box has one class,
            its best.

        Raises:
            FileNotFoundError: no such file.
            TypeError: a single image instead of a list, or an argument of another type.
            ValueError: not an image, or an invalid threshold or batch.

        Example:
            >>> from PIL import Image
            >>> from deform_attn.detr import load
            >>> found = load("digits").predict([Image.new("RGB", (64, 48))])
            >>> found[0]["boxes"].shape
            torch.Size([0, 4])
        """
        single = not isinstance(images, Iterable) or isinstance(images, str | bytes | Mapping)
        if single or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4):
            raise TypeError(f"images: expected a list of images, got {type(images).__name__}")
        check_threshold("threshold", threshold)
        check_integer("batch", batch, 1)
        found: list[dict[str, Any]] = []
        waiting = iter(images)
        while part := list(itertools.islice(waiting, batch)):
            found += self._predict(part, threshold)
        return found

    def _predict(self, images: Sequence[Any], threshold: float) -> list[dict[str, Any]]:
        parameter = next(self.model.parameters())
        tensors, sizes = [], []
        for one in images:
            image = read_image(one)
            tensors.append(as_tensor(image, self.size, self.resize))
            sizes.append([image.height, image.width])
        batch, mask = pad(tensors)
        mask = None if mask is None else mask.to(parameter.device)
        outputs = self.model(batch.to(parameter), mask)
        found = []
        for one in self.postprocess(outputs, torch.tensor(sizes, device=parameter.device)):
            sure = {name: values[one["scores"] >= threshold] for name, values in one.items()}
            boxes = sure["boxes"]
            # A query may have several classes: the first one is its best.
            again = (boxes[:, None] == boxes).all(-1).tril(-1).any(-1)
            kept = {name: values[~again] for name, values in sure.items()}
            found.append({**kept, "names": [self.classes[i] for i in kept["labels"].tolist()]})
        return found


def load(
    name_or_path: str | Path, device: str | torch.device = "cpu", *, model: str | None = None
) -> Predictor:
    """Open a trained detector.

    Args:
        name_or_path: ``digits``, which is part of the package; ``model.pt`` of a training, or its
            folder; an official checkpoint, of DETR, Deformable DETR, DAB-DETR, DN-DETR, DINO,
            RT-DETR, RT-DETRv2, D-FINE, DEIM or Mr. DETR; or a folder or a name on the Hugging Face
            hub of a detr, deformable_detr, dab-detr, rt_detr, rt_detr_v2 or d_fine of transformers.
        device: where it runs.
        model: one of :data:`~deform_attn.detr.zoo.CONFIGURATIONS`, for an official checkpoint; by
            default it is found out from names and shapes.

    Raises:
        FileNotFoundError: neither the name of a shipped detector, nor a file or folder.
        TypeError: an argument of another type.
        ModuleNotFoundError: official models need transformers, the extra ``backbones``.
        ValueError: the file is damaged, or its model is not known; a folder without a model; no
            such device; or ``model`` is unknown, or given for a file that names its own.
        RuntimeError: ``model`` does not fit the file.

    Example:
        >>> from deform_attn.detr import load
        >>> load("digits").classes
        ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9']
    """
    return open_detector("name_or_path", name_or_path, device, model)


def open_detector(
    argument: str,
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    model: str | None = None,
) -> Predictor:
    """As :func:`load`.

    Args:
        argument: names ``name_or_path`` in errors.
        name_or_path: of :func:`load`.
        device: likewise.
        model: likewise.
    """
    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"{argument}: expected a name or a path, got {name_or_path!r}")
    device = find_device(device)
    shipped = {file.stem: file for file in SHIPPED.glob("*.pt")}
    if model is not None:
        check_choice("model", model, CONFIGURATIONS)
    name = str(name_or_path)
    file = shipped.get(name, as_path(argument, name or "."))
    exists = name != "" and os.path.exists(file)
    if exists and file.is_dir() and not (file / "config.json").exists():
        if not (file / "model.pt").is_file():
            raise ValueError(
                f"{argument}: expected config.json of a model of transformers or model.pt of a "
                f"training in the folder {name!r}, got neither"
            )
        file = file / "model.pt"
    if exists and file.is_dir():
        return _from_transformers(argument, str(file), device)
    if isinstance(name_or_path, str) and not exists and _may_be_on_hub(name):
        return _from_transformers(argument, name, device)
    if not exists and name in CONFIGURATIONS:
        raise FileNotFoundError(
            f"{argument}: expected trained weights, got {name!r}, an architecture: give its "
            f"official checkpoint, or a folder that `train --model {name} --data FOLDER --out RUN` "
            "wrote"
        )
    if not exists:
        why = f": {nearby(file, list(shipped))}" if name else ""
        raise FileNotFoundError(
            f"{argument}: expected one of {sorted(shipped)}, a file, a folder or a name on the "
            f"hub (ORGANIZATION/MODEL), got {name!r}{why}"
        )
    content = read_checkpoint(file)
    if "settings" in content and "random" in content:
        raise ValueError(
            f"{file}: expected model.pt of a training, got its checkpoint, with which --resume "
            f"continues it: load the folder, {str(file.parent)!r}"
        )
    if "settings" in content and "classes" in content:
        try:
            trained = _from_training(content)
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{file}: expected model.pt of a training, got {error!r}") from error
        if model is not None:
            raise ValueError(
                f"model: expected None, since {str(file)!r} names its own, got {model!r}"
            )
        trained.model.to(device)
        return trained
    try:
        state = official_state(content)
        name, system, num_classes = from_official(state, file.name, model)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    one = configuration(name)
    classes = one.classes
    if num_classes != len(classes):
        classes = tuple(f"class {i}" for i in range(num_classes))
    facts = {"model": name}
    return Predictor(system, classes, one.image_size, one.resize, facts=facts, device=device)


def _from_training(content: dict[str, Any]) -> Predictor:
    """From ``model.pt`` of a training."""
    settings = content["settings"]
    check_integer("size", content["size"], 1, LARGEST_SIZE)
    if settings.get("model"):
        system = create(settings["model"], len(content["classes"]))
    else:
        sizes = (settings[name] for name in ("width", "layers", "queries"))
        system = build(settings["recipe"], len(content["classes"]), *sizes)
    system.model.load_state_dict(content["model"])
    return Predictor(
        system,
        content["classes"],
        content["size"],
        content.get("resize", "stretch"),
        facts={name: content[name] for name in ("settings", "step", "ap")},
    )


def _may_be_on_hub(name: str) -> bool:
    """Whether a name that is no path can be ORGANIZATION/MODEL, decided without the network."""
    start = r"[A-Za-z0-9][\w.-]*"
    one = re.fullmatch(f"({start})/{start}", name, re.ASCII)
    return one is not None and not name.endswith(WEIGHTS) and not Path(one[1]).exists()


def _from_transformers(argument: str, name: str, device: str | torch.device) -> Predictor:
    from deform_attn.detr.hub import from_transformers

    try:
        system, classes, size, resize = from_transformers(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{argument}: {error}") from error
    return Predictor(system, classes, size, resize, facts={"model": name}, device=device)
