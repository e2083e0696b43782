"""Recorded reference outputs: reading them, their weights, and how far a result is from them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "goldens"


class Golden:
    """One recorded file: inputs, official weights, and what came out."""

    def __init__(self, name: str, folder: Path = FOLDER) -> None:
        self.name = name
        self.arrays = dict(np.load(folder / f"{name}.npz"))
        self.meta: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        self.config: dict[str, Any] = self.meta["config"]

    def __getitem__(self, key: str) -> Tensor:
        tensor = torch.from_numpy(np.array(self.arrays[key]))
        return tensor.long() if tensor.dtype == torch.int32 else tensor

    def maps(self, name: str) -> list[Tensor]:
        """Input maps of all levels: ``in/<name>0``, ``in/<name>1``, ..."""
        n = sum(key.removeprefix(f"in/{name}").isdigit() for key in self.arrays)
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
        """Official weights, by the formula, checked against the recorded first values."""
        entries = self.meta["state_dicts"][variant] if variant else self.meta["state_dict"]
        state = {}
        for entry in entries:
            state[entry["name"]] = _weight(entry)
            first = self.arrays.get("/".join(filter(None, ["check", variant, entry["name"]])))
            if first is not None:
                found = state[entry["name"]].flatten()[: len(first)].numpy()
                np.testing.assert_allclose(found, first, rtol=1e-6, atol=1e-8)
        return state

    def error(self, name: str, found: Tensor) -> float:
        """``max |found - recorded| / max |recorded|``; a sampled gradient's norms count too."""
        if "match" in name.split("/"):  # pairs: the same set, or not
            same = set(zip(*found.tolist())) == set(zip(*self[f"out/{name}"].tolist()))
            return 0.0 if same else float("inf")
        if f"out/{name}" in self.arrays:
            return relative_error(found, self[f"out/{name}"])
        found = found.double().flatten()
        norms = torch.stack([found.abs().sum(), found.norm()])
        return max(
            relative_error(found[::97], self[f"out/{name}__every97"]),
            *((norms - self[f"out/{name}__norms"]).abs() / self[f"out/{name}__norms"]).tolist(),
        )


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Infinite where shapes differ or a number is not finite."""
    if found.shape != wanted.shape:
        return float("inf")
    if wanted.numel() == 0:
        return 0.0
    found, wanted = found.detach().double(), wanted.double()
    difference = (found - wanted).abs().max().item()
    size = wanted.abs().max().item()
    error = difference / size if size else difference
    return error if np.isfinite(error) else float("inf")


def _uniform(key: str, n: int) -> np.ndarray:
    k = (zlib.crc32(key.encode()) % 1000) / 1000
    s = np.sin(np.arange(n, dtype=np.float64) * (12.9898 + k) + 78.233 * k) * 43758.5453
    return 2 * (s - np.floor(s)) - 1


def _weight(entry: dict[str, Any]) -> Tensor:
    shape = entry["shape"]
    if "constant" in entry:
        return torch.full(shape, entry["constant"])
    if "values" in entry:
        return torch.tensor(entry["values"]).view(shape)
    key = entry["formula_key"]
    value = (0.08 * _uniform(key, int(np.prod(shape)))).astype(np.float32)
    if "norm" in key.lower() and key.endswith("weight"):
        value = 1 + value
    if key.endswith("sampling_offsets.bias"):
        value = value * np.float32(30)
    return torch.from_numpy(value.reshape(shape))
