"""System by quantity, worst relative error: ``python -m tests.detr.table [--goldens DIR]``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .recorded import FOLDER, Golden
from .systems import SYSTEMS

# (quantity, limit of its relative error), by the first rule whose words are in the name.
QUANTITIES = (
    ("matchings", 0.0, ("match",)),
    ("DDF", 2e-3, ("ddf",)),
    ("GIoU", 1e-4, ("loss_giou", "giou")),
    ("gradients of losses", 1e-4, ("lossgrad",)),
    ("gradients", 1e-4, ("grad",)),
    ("losses", 2e-5, ("loss",)),
    ("outputs", 2e-5, ("",)),
)


def quantity(name: str) -> tuple[str, float]:
    """What a recorded array is, and how far from it is still right."""
    parts = name.split("/")
    for kind, limit, words in QUANTITIES:
        if any(word in part for word in words for part in parts):
            return kind, limit
    raise AssertionError(name)


def errors(name: str, folder: Path = FOLDER) -> dict[str, float]:
    """Relative error of everything that is recorded of a system."""
    torch.manual_seed(0)
    golden = Golden(name, folder)
    found = SYSTEMS[name](golden)
    missing, beyond = golden.outputs() - set(found), set(found) - golden.outputs()
    assert not missing, f"{name}: recorded, but not found: {sorted(missing)}"
    assert not beyond, f"{name}: found, but not recorded: {sorted(beyond)}"
    return {key: golden.error(key, value) for key, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--goldens", type=Path, default=FOLDER)
    parser.add_argument("systems", nargs="*", default=list(SYSTEMS))
    arguments = parser.parse_args()
    kinds = [kind for kind, *_ in QUANTITIES]
    print("| system | arrays | " + " | ".join(kinds) + " |")
    print("|---" * (len(kinds) + 2) + "|")
    for name in arguments.systems:
        rows: dict[str, dict[str, list[float]]] = {}
        for key, error in errors(name, arguments.goldens).items():
            row = f"{name}: stewart" if key.startswith("stewart/") else name
            rows.setdefault(row, {}).setdefault(quantity(key)[0], []).append(error)
        for row, found in rows.items():
            cells = [f"{max(found[kind]):.1e}" if kind in found else "" for kind in kinds]
            arrays = sum(len(of_kind) for of_kind in found.values())
            print(f"| {row} | {arrays} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
