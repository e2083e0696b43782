"""System by quantity, worst relative error: ``python -m tests.detr.table [--goldens DIR]``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .recorded import FOLDER, Golden
from .systems import SYSTEMS

# Limits of the relative error, by the first rule that has a part of the recorded name. Ours is
# computed in float64, so that the error is the recording's own: float32 rounding, which is the same
# on every machine, and, where stated, a constant of the official code. The recordings' discrete
# choices (top-k, matching, discrete sampling) have margins far above float32 rounding.
QUANTITIES = (
    ("matchings", 0.0, ("match",)),
    # a divergence of nearly equal distributions, which cancels
    ("DDF", 1e-4, ("loss_ddf", "ddf", "grad_ddf")),
    # the official code adds 1e-6 or 1e-7 to the areas that it divides by
    ("GIoU", 4e-5, ("loss_giou", "giou", "grad_giou", "tgt_loss_giou")),
    # a difference, divided by the width of a bin, which is 0.08 near 0
    ("FGL targets", 2e-5, ("fgl_target_weight_right", "fgl_target_weight_left")),
    ("gradients of losses", 1e-5, ("lossgrad",)),
    ("gradients", 1e-5, ("grad",)),
    ("losses", 3e-6, ("loss",)),
    ("outputs", 2e-6, ()),
)
# Gradients of DAB-DETR's summed losses pass through that GIoU into activations that nearly cancel.
EXCEPTIONS = {
    ("dab_detr_losses", "gradients of losses"): 5e-5,
    ("dn_detr_dense", "gradients of losses"): 1e-4,
}


def quantity(system: str, name: str) -> tuple[str, float]:
    """What a recorded array is, and the limit of its error."""
    parts = name.split("/")
    for kind, limit, words in QUANTITIES:
        if any(part == word or part.startswith(f"{word}_") for word in words for part in parts):
            return kind, EXCEPTIONS.get((system, kind), limit)
    return QUANTITIES[-1][:2]


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
            rows.setdefault(row, {}).setdefault(quantity(name, key)[0], []).append(error)
        for row, found in rows.items():
            cells = [f"{max(found[kind]):.1e}" if kind in found else "" for kind in kinds]
            arrays = sum(len(of_kind) for of_kind in found.values())
            print(f"| {row} | {arrays} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
