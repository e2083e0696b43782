"""One row of the table, for the environment that runs this."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import io
import json
import logging
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import deform_attn
from benchmarks.clients.systems import SYSTEMS, Flat, build

NEGLIGIBLE = 1e-4  # smaller gradients, relative to the largest, are compared as if this large
LARGE = 1e6  # larger numbers are compared as infinite
MOST_ROWS = 2000  # tensors of more rows are compared in order


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of a tensor, relative to its maximum, with rows as sets.

    A top-k orders rows whose scores are nearly equal by chance. Where the rows of ``[..., Q, n]``
    differ in order, each is compared with the nearest row of the other tensor.
    """
    worst = 0.0
    assert len(found) == len(expected), f"{len(found)} outputs instead of {len(expected)}"
    for a, b in zip(found, expected):
        assert a.shape == b.shape, f"{tuple(a.shape)} instead of {tuple(b.shape)}"
        apart = _relative(a, b)
        if apart > 1e-6 and b.dim() >= 2 and b.shape[-2] <= MOST_ROWS:
            apart = min(apart, _as_sets(a, b))
        worst = max(worst, apart)
    return worst


def _as_sets(a: Tensor, b: Tensor) -> float:
    a, b = (x.nan_to_num(0.0, LARGE, -LARGE).clamp(-LARGE, LARGE) for x in (a, b))
    distances = torch.cdist(a.flatten(0, -3), b.flatten(0, -3), p=float("inf"))
    apart = max(distances.amin(dim).max() for dim in (-2, -1))
    finite = b.abs()[b.abs() < LARGE]
    return float(apart / finite.max()) if finite.numel() else float(apart)


def _relative(a: Tensor, b: Tensor) -> float:
    if b.numel() == 0 or torch.equal(a, b):
        return 0.0
    finite = b.isfinite() & (b.abs() < LARGE)
    if not torch.equal(finite, a.isfinite() & (a.abs() < LARGE)):
        return float("inf")
    a, b = a[finite], b[finite]
    return float((a - b).abs().max() / b.abs().max()) if b.numel() else 0.0


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
    """What ``accelerate(model, example)`` measures."""
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


# ------------------------------------------------------------------------------------------ exports


def _trace(model: Flat, image: Tensor, folder: Path) -> list[Tensor]:
    """Traced, saved, and run in a process that has torch alone."""
    traced = torch.jit.trace(model, image, check_trace=False)
    files = [str(folder / name) for name in ("model", "input", "output")]
    traced.save(files[0])
    torch.save(image, files[1])
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(int(sys.argv[4]))\n"
        "model = torch.jit.load(sys.argv[1])\n"
        "with torch.no_grad():\n"
        "    torch.save(list(model(torch.load(sys.argv[2]))), sys.argv[3])"
    )
    command = [sys.executable, "-c", code, *files, str(torch.get_num_threads())]
    subprocess.run(command, check=True, capture_output=True)
    return list(torch.load(files[2]))


def _trace_with_gradients(model: Flat, image: Tensor, folder: Path) -> list[Tensor]:
    with torch.enable_grad():
        return _trace(model, image, folder)


def _run_onnx(path: Path, image: Tensor) -> list[Tensor]:
    """Outputs of a file in onnxruntime; its other input is the size of the image."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    first, *rest = session.get_inputs()
    feed: dict[str, Any] = {first.name: image.numpy()}
    feed |= {other.name: numpy.array([image.shape[-2:]], dtype=numpy.int64) for other in rest}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


def _onnx(**options: Any) -> Callable[[Flat, Tensor, Path], list[Tensor]]:
    def export(model: Flat, image: Tensor, folder: Path) -> list[Tensor]:
        path = folder / "model.onnx"
        torch.onnx.export(model, (image,), str(path), verbose=False, **options)
        return _run_onnx(path, image)

    return export


def _export(model: Flat, image: Tensor, folder: Path) -> list[Tensor]:
    path = folder / "model.pt2"
    torch.export.save(torch.export.export(model, (image,)), path)
    return list(torch.export.load(path).module()(image))


def _own(model: Flat, image: Tensor, folder: Path) -> list[Tensor]:
    """By the library's command, with its own defaults and outputs."""
    assert model.own is not None
    with torch.enable_grad():
        path = model.own(model, image.shape[-1], folder)
    return [x for x in _run_onnx(Path(path), image) if x.is_floating_point()]


EXPORTS = {
    "trace": _trace,
    "trace, grad": _trace_with_gradients,
    "torch.export": _export,
    "ONNX 17": _onnx(dynamo=False, opset_version=17),
    "ONNX dynamo": _onnx(dynamo=True),
    "own ONNX": _own,
}
TOLERANCE = 1e-3  # of an exported float32 model, whose operators run in another order
SAME = 1e-5  # of two exports of the same graph


def exports(name: str, chosen: list[str]) -> dict[str, Any]:
    """For each kind of export, whether the stock and the accelerated model have it.

    "yes": the export runs elsewhere and returns what the model returns. "as stock": it returns what
    the export of the stock model returns, which differs from the model: some models order queries
    by scores that random weights make nearly equal. Otherwise: the reason why not.
    """
    system = SYSTEMS[name]
    model = build(name, system.small)
    image = torch.randn(1, 3, system.small, system.small)
    with torch.no_grad():
        expected = outputs_of(copy.deepcopy(model), image)
    rows: dict[str, Any] = {}
    for kind in chosen:
        own = kind == "own ONNX"
        if own and model.own is None:
            continue
        rows[kind] = []
        stock: list[Tensor] | None = None
        for accelerated in (False, True):
            copied = copy.deepcopy(model)
            if accelerated:
                deform_attn.accelerate(copied)
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                try:
                    found = EXPORTS[kind](copied, image, Path(folder))
                    if own and not accelerated:
                        result = "yes"  # its outputs are not those of the model
                    elif own and stock is not None:
                        result = _verdict(difference(found, stock))
                    else:
                        result = _verdict(difference([x.float() for x in found], expected))
                    if result != "yes" and accelerated and stock is not None:
                        result = "as stock" if difference(found, stock) <= SAME else result
                    stock = found
                except Exception as error:
                    text = str(error).strip().splitlines() or [""]
                    result = f"no: {type(error).__name__}: {text[0][:160]}"
            rows[kind].append(result)
    return {"exports": rows}


def _verdict(apart: float) -> str:
    return "yes" if apart <= TOLERANCE else f"differs by {apart:.0e}"


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
