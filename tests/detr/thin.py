"""Copy recorded outputs, without what follows from the rest:
``python -m tests.detr.thin FROM TO [NAME ...]``.

Inputs and weights that the formulas give are left out, gradients of more than 400 elements are
sampled as the longer ones already were (every 97th element, and two norms), and of the twenty
random problems of ``matcher_losses`` the first eight are kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from .systems import SYSTEMS

PROBLEMS = 8
KEPT = (
    *("name", "description", "source", "source_licence", "config", "gradient_scalars", "notes"),
    *("weight_scale", "no_gradient", "source_commit"),
)


def thinned(
    arrays: dict[str, np.ndarray], meta: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and their description."""
    kept = {}
    for key, array in arrays.items():
        parts = key.split("/")
        number = next((int(part) for part in parts if part.isdigit()), 0)
        if meta["name"] == "matcher_losses" and number >= PROBLEMS:
            continue
        if "det_key" in meta["inputs"].get(key, {}) or parts[0] == "weight":
            continue
        if any("grad" in part for part in parts[1:]) and array.size > 400 and "__" not in key:
            flat = array.astype(np.float64).ravel()
            kept[key + "__every97"] = array.ravel()[::97]
            norms = [np.abs(flat).sum(), np.sqrt((flat**2).sum())]
            kept[key + "__norms"] = np.array(norms, np.float32)
            continue
        kept[key] = array
    short = {key: meta[key] for key in KEPT if key in meta}
    short["inputs"] = {
        key: {"shape": entry["shape"], "det_key": entry["det_key"]}
        for key, entry in meta["inputs"].items()
        if "det_key" in entry
    }
    if "state_dict" in meta:
        short["state_dict"] = [described(entry) for entry in meta["state_dict"]]
    if "state_dicts" in meta:
        short["state_dicts"] = {
            variant: [described(entry) for entry in entries]
            for variant, entries in meta["state_dicts"].items()
        }
    if meta["name"] == "matcher_losses":
        short["config"] = meta["config"] | {"problems": PROBLEMS}
    return kept, short


def described(entry: dict[str, Any]) -> dict[str, Any]:
    """A weight, without its type and without a formula's key that is its name."""
    same = entry.get("formula_key") == entry["name"]
    return {k: v for k, v in entry.items() if k != "dtype" and not (same and k == "formula_key")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("names", nargs="*", default=list(SYSTEMS))
    arguments = parser.parse_args()
    for name in arguments.names:
        arrays = dict(np.load(arguments.source / f"{name}.npz"))
        meta = json.loads((arguments.source / f"{name}.json").read_text())
        kept, short = thinned(arrays, meta)
        np.savez_compressed(arguments.to / f"{name}.npz", **kept)
        text = json.dumps(short, separators=(",", ":"))
        (arguments.to / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
