"""Use a trained detector: `load` it by name or from a file, then ``predict`` on images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from deform_attn.detr.data import as_tensor, upright
from deform_attn.detr.recipes import build

SHIPPED = Path(__file__).parent / "weights"


class Predictor:
    """A trained detector, with what it needs to be used.

    Attributes:
        model: the ``nn.Module``, in evaluation mode.
        classes: name of each label.
        size: sides of the square that images are stretched to.
        facts: how it was trained: ``settings``, ``step`` and the ``ap`` reached.
    """

    def __init__(self, content: dict[str, Any], device: str | torch.device = "cpu") -> None:
        self.classes, self.size = content["classes"], content["size"]
        self.facts = {name: content[name] for name in ("settings", "step", "ap")}
        settings = content["settings"]
        sizes = (settings[name] for name in ("width", "layers", "queries"))
        system = build(settings["recipe"], len(self.classes), *sizes)
        system.model.load_state_dict(content["model"])
        self.model, self.postprocess = system.model.eval().to(device), system.postprocess

    @torch.no_grad()
    def predict(
        self, images: Sequence[str | Path | Image.Image], threshold: float = 0.5
    ) -> list[dict[str, Any]]:
        """Detect in images of any sizes and modes.

        Args:
            images: files or ``PIL`` images.
            threshold: the lowest score that counts.

        Returns:
            For each image ``boxes`` ``[n, 4]`` ``(x1, y1, x2, y2)`` in its pixels, ``scores``
            ``[n]``, best first, ``labels`` ``[n]``, and ``names``, a list of n classes. A box has
            one class, its best.

        Raises:
            FileNotFoundError: no such file.
            TypeError: one image in the place of a list of them.

        Example:
            >>> from PIL import Image
            >>> from deform_attn.detr import load
            >>> found = load("digits").predict([Image.new("RGB", (64, 48))])
            >>> found[0]["boxes"].shape
            torch.Size([0, 4])
        """
        if isinstance(images, str | Path | Image.Image):
            raise TypeError(f"images: expected a list of images or files, got {type(images)}")
        opened = [i if isinstance(i, Image.Image) else Image.open(i) for i in images]
        if not opened:
            return []
        device = next(self.model.parameters()).device
        batch = torch.stack([as_tensor(image, self.size) for image in opened]).to(device)
        sizes = torch.tensor([upright(image).size[::-1] for image in opened], device=device)
        found = []
        for one in self.postprocess(self.model(batch), sizes):
            sure = {name: values[one["scores"] >= threshold] for name, values in one.items()}
            boxes = sure["boxes"]
            # A query is named once, whatever other classes it may also be.
            same = (boxes[:, None] == boxes).all(-1).tril(-1).any(-1)
            kept = {name: values[~same] for name, values in sure.items()}
            found.append({**kept, "names": [self.classes[i] for i in kept["labels"].tolist()]})
        return found


def load(name_or_path: str | Path, device: str | torch.device = "cpu") -> Predictor:
    """Open a trained detector.

    Args:
        name_or_path: ``digits``, which comes with the package, or ``model.pt`` of a training.
        device: where it runs.

    Raises:
        FileNotFoundError: neither the name of a shipped detector nor a file.

    Example:
        >>> from deform_attn.detr import load
        >>> load("digits").classes
        ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9']
    """
    shipped = {file.stem: file for file in SHIPPED.glob("*.pt")}
    file = shipped.get(str(name_or_path), Path(name_or_path))
    if not file.is_file():
        raise FileNotFoundError(
            f"name_or_path: expected one of {sorted(shipped)} or a file, got {str(name_or_path)!r}"
        )
    return Predictor(torch.load(file, map_location="cpu", weights_only=True), device)
