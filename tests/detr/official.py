"""Weights of official models that follow from their names, as for the recorded outputs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from .recorded import _by_formula

# Buffers that follow from the configuration.
DERIVED = re.compile(r"(num_points_scale|anchors|valid_mask|decoder\.up|reg_scale|_tracked)$")
SCALES = re.compile(r"(norm\d?|bn|lab\.scale|enc_output\.(?:1|norm))\.?(weight)?$")


def weight(name: str, shape: Sequence[int]) -> Tensor | None:
    """A tensor of an official model; None where its value is derived."""
    if DERIVED.search(name):
        return None
    shape = list(shape)
    if len(shape) > 1:
        fan_in = torch.Size(shape[1:]).numel()
        return _by_formula(name, shape, (3 / fan_in) ** 0.5)
    value = _by_formula(name, shape, 0.1)
    return 1 + value if name.endswith("running_var") or SCALES.search(name) else value
