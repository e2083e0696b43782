"""One row of the table, for the environment that runs this."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import io
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import deform_attn
from benchmarks.clients.exports import EXPORTS, compare, difference
from benchmarks.clients.systems import SYSTEMS, build
from deform_attn.integrations.adapters import METER

NEGLIGIBLE = 1e-4  # smaller gradients, relative to the largest, are compared as if this large


def outputs_of(model: nn.Module, image: Tensor) -> list[Tensor]:
    """Outputs in evaluation mode, without gradients."""
    with torch.no_grad():
        return [output.clone() for output in model(image)]


def gradients_of(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Gradients of the sum of squares of the outputs."""
    model.zero_grad()
    sum(output.square().mean() for output in model(image) if output.requires_grad).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agreement(name: str) -> dict[str, Any]:
    """Differences of outputs and gradients in float64, or in float32 where a model has no other."""
    system = SYSTEMS[name]
    model = build(name, system.small)
    image = torch.randn(1, 3, system.small, system.small)
    dtype = torch.float64
    try:
        torch.set_default_dtype(dtype)
        outputs_of(copy.deepcopy(model).double(), image.double())
        model, image = model.double(), image.double()
    except (RuntimeError, TypeError, ValueError):
        dtype = torch.float32
        torch.set_default_dtype(dtype)
    expected, before = outputs_of(model, image), gradients_of(model, image)
    types = [type(module) for module in model.modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    _, report = deform_attn.accelerate(model)
    found, after = outputs_of(model, image), gradients_of(model, image)
    deform_attn.restore(model)
    restored = types == [type(module) for module in model.modules()] and all(
        vars(module).get(key) is value
        for module, held in zip(model.modules(), attributes)
        for key, value in held.items()
        if callable(value)
    )
    same = all(torch.equal(a, b) for a, b in zip(outputs_of(model, image), expected))
    torch.set_default_dtype(torch.float32)
    assert before.keys() == after.keys()
    least = NEGLIGIBLE * max(float(grad.abs().max()) for grad in before.values())
    return {
        "replaced": len(report.replaced),
        "left": list(report.left),
        "dtype": str(dtype).removeprefix("torch."),
        "outputs": difference(found, expected),
        "gradients": max(
            float((after[key] - grad).abs().max()) / max(float(grad.abs().max()), least)
            for key, grad in before.items()
        ),
        "restored": restored and same,
    }


def timing(name: str) -> dict[str, Any]:
    """What ``accelerate(model, example)`` measures, in CPU time: cores may be shared."""
    METER.clock = time.process_time
    system = SYSTEMS[name]
    model = build(name, system.side)
    image = torch.randn(1, 3, system.side, system.side)
    measurement = deform_attn.accelerate(model, example=image)[1].measurement
    assert measurement is not None
    return {
        "before": measurement.before,
        "after": measurement.after,
        "gain": measurement.gain,
        "spread": measurement.spread,
        "shares": measurement.shares,
    }


def exports(name: str, chosen: list[str]) -> dict[str, Any]:
    """For each kind of export, whether the stock and the accelerated model have it."""
    system = SYSTEMS[name]
    model = build(name, system.small)
    image = torch.randn(1, 3, system.small, system.small)
    kinds = [kind for kind in chosen if kind != "own ONNX" or model.own is not None]
    return {"exports": compare(model, (image,), kinds)}


def main() -> int:
    """Print a row as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="*", default=["agreement", "timing"])
    parser.add_argument("--exports", nargs="*", default=[], choices=EXPORTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    package = SYSTEMS[arguments.system].package
    row: dict[str, Any] = {
        "system": arguments.system,
        "library": f"{package} {importlib.metadata.version(package)}",
    }
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "agreement": lambda: agreement(arguments.system),
        "timing": lambda: timing(arguments.system),
        "exports": lambda: exports(arguments.system, arguments.exports),
    }
    chosen = arguments.parts + (["exports"] if arguments.exports else [])
    for part in chosen:
        start = time.perf_counter()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                row |= parts[part]()
        except Exception as error:
            traceback.print_exc()
            row.setdefault("errors", {})[part] = f"{type(error).__name__}: {str(error)[:200]}"
        row[f"seconds_{part}"] = round(time.perf_counter() - start, 1)
    print(json.dumps(row))
    return 1 if "errors" in row else 0


if __name__ == "__main__":
    sys.exit(main())
