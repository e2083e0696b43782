"""Every named model against the official code, and transformers' types against transformers:
``python -m tests.detr.models_table [NAME ...]``.

A row: how a file in the official layout is loaded, the worst relative error of logits and boxes
from pixels, the official code's own error in float32, and time and memory of one image of 640 x
640 pixels on one thread. Official weights follow from their names; official outputs were recorded
in float64, see ``tests/goldens/README.md``. Rounding exchanges proposals of nearly equal scores,
in the official code too. So float32 gets the proposals selected in float64; and of float64's
proposals whose scores differ by less than 1e-9 both orders are tried.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deform_attn.detr import create, load
from deform_attn.detr.zoo import CONFIGURATIONS

from .official import official_names, official_state, output_errors, picture, recorded_outputs
from .test_hub import KINDS
from .test_hub import errors as errors_of_transformers

# Models whose official code is not compared.
NOT_COMPARED = {
    "stewart_r50": "official code: Caffe and GoogLeNet; decoder compared, see Stewart",
}
COLUMNS = (
    "model",
    "parameters",
    "file loads as",
    "float64: logits, boxes",
    "float32: logits, boxes",
)
COLUMNS += ("official float32", "640 x 640: CPU s", "MiB")


TIE = 1e-9  # scores of proposals whose order is one of rounding


@contextmanager
def same_proposals(kept: list[Tensor], ties: list[int], *, replay: bool) -> Iterator[None]:
    """Keep the indices of the selected proposals, or select those that were kept.

    ``ties`` gets the places of proposals that may be exchanged with the next one.
    """
    topk = Tensor.topk

    def patched(x: Tensor, k: int, dim: int = -1, **options: Any) -> Any:
        if k < 100:
            return topk(x, k, dim, **options)
        if replay:
            indices = kept[0]
            return torch.return_types.topk((x.gather(dim, indices), indices))
        found = topk(x, k, dim, **options)
        kept.append(found.indices)
        ties.extend((found.values[0].diff().abs() < TIE).nonzero().flatten().tolist())
        return found

    Tensor.topk = patched  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.topk = topk  # type: ignore[method-assign]


def layout(name: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """A file's content as the authors of the model publish it."""
    if name.startswith(("rtdetr_", "rtdetrv2_")):
        return {"ema": {"module": state}, "last_epoch": 71}
    if name.startswith(("dfine", "deim", "mr_detr")):
        return {"model": state}
    return {"model": state, "args": Namespace(lr=1e-4), "epoch": 49}


def loaded(name: str) -> tuple[torch.nn.Module, str]:
    """The model from a file in the official layout, and as which configuration it was loaded."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.pth"
        state = {key: value.contiguous() for key, value in official_state(name).items()}
        torch.save(layout(name, state), file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some models have the same names and shapes
            detector = load(file)
    return detector.model, detector.facts["model"]


def errors_of(model: torch.nn.Module, name: str, kept: list[Tensor]) -> tuple[float, float]:
    """Errors of a model in its dtype; float64 first, which keeps the proposals for float32."""
    dtype = next(model.parameters()).dtype
    images, mask = picture(name)
    ties: list[int] = []

    def errors(*, replay: bool) -> tuple[float, float]:
        with torch.no_grad(), same_proposals(kept, ties, replay=replay):
            return output_errors(name, model(images.to(dtype), mask))

    found = errors(replay=dtype == torch.float32)
    if len(ties) == 1:
        selected, i = kept[0], ties[0]
        kept[0] = selected.clone()
        kept[0][:, [i, i + 1]] = selected[:, [i + 1, i]]
        found, before = errors(replay=True), found
        if found > before:
            kept[0], found = selected, before
    return found


def cost(model: torch.nn.Module) -> tuple[float, float]:
    """CPU seconds, and MiB allocated beyond the weights, of one image of 640 x 640 pixels."""
    image = torch.rand(1, 3, 640, 640, generator=torch.Generator().manual_seed(0))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, began = _resident("VmRSS"), time.process_time()
    with torch.no_grad():
        model(image)
    return time.process_time() - began, _resident("VmHWM") - before


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def row(name: str) -> str:
    """A line of the table."""
    torch.set_num_threads(1)
    if name in official_names():
        model, found = loaded(name)
    else:
        model, found = create(name).model.eval(), NOT_COMPARED[name]
    seconds, mebibytes = cost(model)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    cells = [name, f"{millions:.1f} M", found, "-", "-", "-", f"{seconds:.2f}", f"{mebibytes:.0f}"]
    if name in official_names():
        kept: list[Tensor] = []
        for i, dtype in ((3, torch.float64), (4, torch.float32)):
            errors = errors_of(model.to(dtype), name, kept)
            cells[i] = ", ".join(f"{error:.0e}" for error in errors)
        cells[5] = ", ".join(f"{error:.0e}" for error in recorded_outputs()[name][-2:])
    return f"| {' | '.join(cells)} |"


def row_of_transformers(kind: str) -> str:
    """A line of the second table, from a folder of ``save_pretrained``."""
    torch.set_num_threads(1)
    cells = [kind]
    for dtype in (torch.float64, torch.float32):
        with tempfile.TemporaryDirectory() as folder:
            found = errors_of_transformers(kind, Path(folder), dtype)
        cells.append(", ".join(f"{error:.0e}" for error in found))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the tables, a process for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[*CONFIGURATIONS, *KINDS])
    names = parser.parse_args().names
    create("dfine_n")  # imports what all need, before processes are forked
    os.environ["OMP_NUM_THREADS"] = "1"
    if set(names) & set(CONFIGURATIONS):
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    heading = f"\n| {' | '.join(('transformers', *COLUMNS[3:5]))} |\n{'|---' * 3}|"
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for name in names:
            if name in KINDS and heading:
                print(heading, flush=True)
                heading = ""
            try:
                make = row if name in CONFIGURATIONS else row_of_transformers
                print(pool.apply(make, (name,)), flush=True)
            except (RuntimeError, ValueError) as error:
                print(f"| {name} | FAILED: {str(error)[:300]!r} |", flush=True)


if __name__ == "__main__":
    main()
