"""Official models: their names, weights that follow from them, and their recorded outputs."""

from __future__ import annotations

import functools
import json
import lzma
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deform_attn.detr.zoo import CONFIGURATIONS

from .recorded import FOLDER, _by_formula, relative_error

# Buffers that follow from the configuration.
DERIVED = re.compile(
    r"(num_points_scale|anchors|valid_mask|decoder\.up|reg_scale|_tracked|position_index)$"
)
# Vectors near 1: scales of norms and of affine blocks, and variances.
SCALES = re.compile(r"(?<!activation\.)(weight|running_var|lab\.scale)$")


def weight(name: str, shape: Sequence[int]) -> Tensor | None:
    """A tensor of an official model; None where its value is derived."""
    if DERIVED.search(name):
        return None
    shape = list(shape)
    if len(shape) > 1:
        fan_in = torch.Size(shape[1:]).numel()
        return _by_formula(name, shape, (3 / fan_in) ** 0.5)
    value = _by_formula(name, shape, 0.1)
    return 1 + value if SCALES.search(name) else value


@functools.cache
def official_names() -> dict[str, list[tuple[Any, ...]]]:
    """Names and shapes of the tensors of official models; a shared one also has its first name."""
    content = lzma.decompress((FOLDER / "official_names.json.xz").read_bytes())
    names: dict[str, list[tuple[Any, ...]]] = json.loads(content)
    return names


def official_state(name: str, *, values: bool = True) -> dict[str, Tensor]:
    """The state dict of an official model, with weights that follow from their names.

    Args:
        name: of the configuration.
        values: whether the weights are needed; else all are the same zero.
    """
    size = CONFIGURATIONS[name].size
    points = size.num_points
    counts = [points] * size.num_levels if isinstance(points, int) else points
    state = {}
    for key, shape, *first in official_names()[name]:
        value = weight(*first or [key], shape) if values else None
        if key.endswith("num_points_scale"):
            value = torch.cat([torch.full((n,), 1 / n) for n in counts])
        elif key.endswith("decoder.up"):
            value = torch.tensor([0.5])
        elif key.endswith("decoder.reg_scale"):
            value = torch.tensor([8.0 if name.endswith("_x") else 4.0])
        state[key] = torch.zeros(()).expand(shape) if value is None else value
    return state


def picture(name: str) -> tuple[Tensor, Tensor | None]:
    """The image of the recordings, float64, and its padding mask where the system has one."""
    height, width = (256, 256) if CONFIGURATIONS[name].resize == "stretch" else (256, 320)
    numbers = np.sin(np.arange(3 * height * width) * 0.37) * 0.5 + 0.5
    images = torch.from_numpy(numbers.reshape(1, 3, height, width))
    if CONFIGURATIONS[name].resize == "stretch" or name.startswith("mr_detr"):
        return images, None
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, 240:], mask[:, :, 288:] = True, True
    return images, mask


def recorded_outputs() -> dict[str, np.ndarray]:
    """Samples of the official outputs, logits then boxes, and last their two errors in float32."""
    return dict(np.load(FOLDER / "official_models.npz"))


def output_errors(name: str, outputs: dict[str, Tensor]) -> tuple[float, float]:
    """Relative error of the last layer's logits and boxes from those of the official code."""
    logits, boxes = (outputs[key][-1].flatten() for key in ("logits", "boxes"))
    logits = logits[:: 194 if len(logits) < 60000 else 586]
    boxes = boxes[:: 14 if len(boxes) < 2000 else 46]
    recorded = torch.from_numpy(recorded_outputs()[name][:-2])
    return (
        relative_error(logits, recorded[: len(logits)]),
        relative_error(boxes, recorded[len(logits) :]),
    )
