"""Every system in every export format: ``python -m tests.detr.export_table [RECIPE ...]``.

A cell: the largest difference of boxes (in pixels) and scores between the exported file, exported
with a batch of 2 and run with a batch of 3, and the model. ONNX runs in onnxruntime.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import torch

from deform_attn.detr.export import SUFFIXES, export
from deform_attn.detr.recipes import RECIPES, build

LIMIT = 1e-2  # pixels


def difference(recipe: str, file: Path) -> float:
    """Of a small model with random weights, after export to this file and with another batch."""
    torch.manual_seed(0)
    model, _, postprocess = build(recipe, 3, 32, 1, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return export(model.eval(), postprocess, file, (64, 96))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES))
    warnings.simplefilter("ignore")
    print(f"| system | {' | '.join(SUFFIXES)} | dynamic batch |\n|{'---|' * (len(SUFFIXES) + 2)}")
    for recipe in parser.parse_args().recipes:
        cells, met = [], True
        with tempfile.TemporaryDirectory() as folder:
            for suffix in SUFFIXES:
                try:
                    found = difference(recipe, Path(folder) / f"detector{suffix}")
                except Exception as error:  # of whichever exporter
                    cells.append(f"{type(error).__name__}: {str(error)[:60]!r}")
                    met = False
                else:
                    cells.append(f"{found:.0e}")
                    met &= found < LIMIT
        print(f"| {recipe} | {' | '.join(cells)} | {'yes' if met else 'NO'} |", flush=True)


if __name__ == "__main__":
    main()
