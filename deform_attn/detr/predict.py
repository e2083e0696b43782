"""Use a trained detector: :func:`load` it by name or from a file, then ``predict`` on images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deform_attn.detr.checkpoints import read_checkpoint
from deform_attn.detr.images import as_tensor, pad, read_image
from deform_attn.detr.recipes import build

SHIPPED = Path(__file__).parent / "weights"


class Predictor:
    """A trained detector with its preprocessing, postprocessing and class names.

    Attributes:
        model: the ``nn.Module``, in evaluation mode.
        classes: names, by label.
        size: longer side of the images, in pixels.
        resize: "stretch" to a square, or "fit", which keeps the ratio of the sides.
        facts: of its training: ``settings``, ``step`` and the ``ap`` reached.
    """

    def __init__(self, content: dict[str, Any], device: str | torch.device = "cpu") -> None:
        self.classes, self.size = content["classes"], content["size"]
        self.facts = {name: content[name] for name in ("settings", "step", "ap")}
        settings = content["settings"]
        self.resize = settings.get("resize", "stretch")
        sizes = (settings[name] for name in ("width", "layers", "queries"))
        system = build(settings["recipe"], len(self.classes), *sizes)
        system.model.load_state_dict(content["model"])
        self.model, self.postprocess = system.model.eval().to(device), system.postprocess

    @torch.no_grad()
    def predict(
        self, images: Sequence[Any], threshold: float = 0.5, batch: int = 16
    ) -> list[dict[str, Any]]:
        """Detect in images of any sizes and modes.

        Args:
            images: files, ``PIL`` images, arrays ``[H, W, 3]`` or tensors ``[3, H, W]``, see
                :func:`~deform_attn.detr.images.read_image`.
            threshold: lowest score.
            batch: images per call of the model, and in memory at a time.

        Returns:
            For each image ``boxes [n, 4]``, ``(x1, y1, x2, y2)`` in its pixels; ``scores [n]``,
            best first; ``labels [n]``; and ``names``, a list of n classes. A box has one class,
            its best.

        Raises:
            FileNotFoundError: no such file.
            TypeError: a single image instead of a list, or an image of another type.
            ValueError: not an image.

        Example:
            >>> from PIL import Image
            >>> from deform_attn.detr import load
            >>> found = load("digits").predict([Image.new("RGB", (64, 48))])
            >>> found[0]["boxes"].shape
            torch.Size([0, 4])
        """
        single = isinstance(images, str | Path | Image.Image)
        if single or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4):
            raise TypeError(f"images: expected a list of images, got {type(images).__name__}")
        found: list[dict[str, Any]] = []
        for first in range(0, len(images), batch):
            found += self._predict(images[first : first + batch], threshold)
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


def load(name_or_path: str | Path, device: str | torch.device = "cpu") -> Predictor:
    """Open a trained detector.

    Args:
        name_or_path: ``digits``, which is part of the package, or ``model.pt`` of a training.
        device: where it runs.

    Raises:
        FileNotFoundError: neither the name of a shipped detector nor a file.
        ValueError: the file is damaged, or not of a training.

    Example:
        >>> from deform_attn.detr import load
        >>> load("digits").classes
        ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9']
    """
    shipped = {file.stem: file for file in SHIPPED.glob("*.pt")}
    file = shipped.get(str(name_or_path), Path(name_or_path))
    if "\0" in str(file) or not file.is_file():
        raise FileNotFoundError(
            f"name_or_path: expected one of {sorted(shipped)} or a file, got {str(name_or_path)!r}"
        )
    content = read_checkpoint(file)
    names = ("classes", "size", "settings", "step", "ap", "model")
    if missing := [name for name in names if name not in content]:
        raise ValueError(
            f"{file}: expected model.pt of a training, got a file without {', '.join(missing)}"
        )
    return Predictor(content, device)
