"""Recorded reference outputs: reading them, their weights, and how far a result is from them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Some gradients are zero but for rounding, such as that of a key's bias, which a softmax does not
# see; all others are fifty times larger at least.
ROUNDED_ZERO = 1e-6
FOLDER = Path(__file__).parent.parent / "goldens"


class Golden:
    """One recorded file: inputs, official weights, and what came out."""

    def __init__(self, name: str, folder: Path = FOLDER) -> None:
        self.name = name
        if not any(folder.glob("*.npz")):
            raise FileNotFoundError(f"{folder}: no recorded outputs")
        if not (folder / f"{name}.npz").exists():  # recorded later than the others there
            folder = FOLDER
        self.arrays = dict(np.load(folder / f"{name}.npz"))
        self.meta: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        self.config: dict[str, Any] = self.meta["config"]

    def __getitem__(self, key: str) -> Tensor:
        """A recorded array, or an input that follows from its key."""
        if key in self.arrays:
            tensor = torch.from_numpy(np.array(self.arrays[key]))
            if tensor.is_floating_point():
                return tensor.double()
            return tensor.long() if tensor.dtype == torch.int32 else tensor
        entry = self.meta["inputs"][key]
        return _by_formula(entry["det_key"], entry["shape"], 1.7320508).double()

    def maps(self, name: str) -> list[Tensor]:
        """Input maps of all levels: ``in/<name>0``, ``in/<name>1``, ..."""
        known = {*self.arrays, *self.meta["inputs"]}
        n = sum(key.removeprefix(f"in/{name}").isdigit() for key in known)
        return [self[f"in/{name}{i}"] for i in range(n)]

    def targets(self, prefix: str = "in") -> list[dict[str, Tensor]]:
        return [
            {key: self[f"{prefix}/targets/{i}/{key}"] for key in ("labels", "boxes")}
            for i in range(2)
        ]

    def outputs(self) -> set[str]:
        """Names of all that came out, sampled gradients by the name of the whole."""
        names = {key.removeprefix("out/") for key in self.arrays if key.startswith("out/")}
        return {name.split("__")[0] for name in names}

    def state(self, variant: str | None = None) -> dict[str, Tensor]:
        """Official weights, by the formula, checked against what is recorded of them."""
        entries = self.meta["state_dicts"][variant] if variant else self.meta["state_dict"]
        scale = self.meta.get("weight_scale", {}).get(variant, 0.08)
        state = {}
        for entry in entries:
            state[entry["name"]] = weight = _weight(entry, scale)
            for kind in ("check", "weight"):  # the first numbers, or all
                first = self.arrays.get("/".join(filter(None, [kind, variant, entry["name"]])))
                if first is None:
                    continue
                first = first.ravel()
                same = torch.allclose(
                    weight.flatten()[: len(first)], torch.from_numpy(first).float(), 1e-6
                )
                assert same, f"{self.name}: the formula does not give {entry['name']}"
        return state

    def error(self, name: str, found: Tensor) -> float:
        """``max |found - recorded| / max |recorded|``; a sampled gradient's norms count too."""
        recorded = self[f"out/{name}" if f"out/{name}" in self.arrays else f"out/{name}__every97"]
        parts = name.split("/")
        if "match" in parts:  # pairs: the same set, or not
            if recorded.dim() == 1:  # Stewart's: the target of each prediction, or -1
                recorded = torch.stack([torch.arange(len(recorded)), recorded])
            same = set(zip(*found.tolist())) == set(zip(*recorded.tolist()))
            return 0.0 if same else float("inf")
        if {"grad", "lossgrad"} & set(parts) and recorded.abs().max() < ROUNDED_ZERO:
            return 0.0 if found.abs().max() < ROUNDED_ZERO else float("inf")
        if f"out/{name}" in self.arrays:
            return relative_error(found, recorded)
        found = found.double().flatten()
        norms = torch.stack([found.abs().sum(), found.norm()])
        return max(
            relative_error(found[::97], recorded),
            *((norms - self[f"out/{name}__norms"]).abs() / self[f"out/{name}__norms"]).tolist(),
        )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Infinite where shapes differ or a number is not finite."""
    if found.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    found, expected = found.detach().double(), expected.double()
    difference = (found - expected).abs().max().item()
    size = expected.abs().max().item()
    error = difference / size if size else difference
    return error if np.isfinite(error) else float("inf")


def _by_formula(key: str, shape: list[int], scale: float) -> Tensor:
    """Numbers in [-scale, scale) that follow from a name and a shape alone."""
    k = (zlib.crc32(key.encode()) % 1000) / 1000
    i = np.arange(int(np.prod(shape)), dtype=np.float64)
    s = np.sin(i * (12.9898 + k) + 78.233 * k) * 43758.5453
    u = 2 * (s - np.floor(s)) - 1
    return torch.from_numpy((scale * u).astype(np.float32).reshape(shape))


def _weight(entry: dict[str, Any], scale: float) -> Tensor:
    if "constant" in entry:
        return torch.full(entry["shape"], float(entry["constant"]))
    if "values" in entry:
        return torch.tensor(entry["values"]).view(entry["shape"])
    key = entry.get("formula_key", entry["name"])
    value = _by_formula(key, entry["shape"], scale)
    if "norm" in key.lower() and entry["name"].endswith("weight"):
        value = 1 + value
    return value * 30 if entry["name"].endswith("sampling_offsets.bias") else value
