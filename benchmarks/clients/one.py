"""One row of the table, for the environment that runs this."""

from __future__ import annotations

import argparse
import contextlib
import copy
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

import torch
from torch import Tensor, nn

import deform_attn
from benchmarks.clients.systems import SYSTEMS, build

NEGLIGIBLE = 1e-4  # smaller gradients, relative to the largest, are compared as if this large


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of a tensor, relative to its maximum, with rows as sets.

    A top-k orders rows whose scores are nearly equal by chance, so that the rows of a tensor
    ``[B, Q, n]`` are sorted by their sums first if they differ otherwise.
    """
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape, f"{tuple(a.shape)} instead of {tuple(b.shape)}"
        apart = _relative(a, b)
        if apart > 1e-6 and b.dim() >= 3:
            apart = min(apart, _relative(*(_sorted(x) for x in (a, b))))
        worst = max(worst, apart)
    return worst


def _sorted(rows: Tensor) -> Tensor:
    keys = rows.nan_to_num(0.0, 0.0, 0.0).clamp(-1e4, 1e4)
    order = (keys * torch.linspace(1, 2, rows.shape[-1])).sum(-1).argsort(-1)
    return rows.gather(-2, order[..., None].expand_as(rows))


def _relative(a: Tensor, b: Tensor) -> float:
    if b.numel() == 0 or torch.equal(a, b):
        return 0.0
    finite = b.isfinite() & (b.abs() < 1e6)
    if not torch.equal(finite, a.isfinite() & (a.abs() < 1e6)):
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


def _trace(model: nn.Module, image: Tensor, path: Path) -> list[Tensor]:
    """Traced, saved, and run in a process that has torch alone."""
    traced = torch.jit.trace(model, image, check_trace=False)
    traced.save(str(path))
    torch.save(image, path.with_suffix(".in"))
    code = (
        "import sys, torch\n"
        "model = torch.jit.load(sys.argv[1])\n"
        "with torch.no_grad():\n"
        "    torch.save(list(model(torch.load(sys.argv[2]))), sys.argv[3])"
    )
    files = [str(path), *(str(path.with_suffix(suffix)) for suffix in (".in", ".out"))]
    subprocess.run([sys.executable, "-c", code, *files], check=True, capture_output=True)
    return list(torch.load(path.with_suffix(".out")))


def _trace_with_gradients(model: nn.Module, image: Tensor, path: Path) -> list[Tensor]:
    with torch.enable_grad():
        return _trace(model, image, path)


def _onnx(**options: Any) -> Callable[[nn.Module, Tensor, Path], list[Tensor]]:
    def export(model: nn.Module, image: Tensor, path: Path) -> list[Tensor]:
        import onnxruntime

        torch.onnx.export(model, (image,), str(path), verbose=False, **options)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        return [torch.from_numpy(array) for array in found]

    return export


def _export(model: nn.Module, image: Tensor, path: Path) -> list[Tensor]:
    torch.export.save(torch.export.export(model, (image,)), path)
    return list(torch.export.load(path).module()(image))


EXPORTS = {
    "trace": _trace,
    "trace, grad": _trace_with_gradients,
    "onnx 16": _onnx(dynamo=False, opset_version=16),
    "onnx 17": _onnx(dynamo=False, opset_version=17),
    "onnx dynamo": _onnx(dynamo=True),
    "torch.export": _export,
}
TOLERANCE = 1e-3  # of an exported float32 model, whose operators run in another order


def exports(name: str, chosen: list[str]) -> dict[str, Any]:
    """For each kind of export, "yes" or why not, of the stock and of the accelerated model."""
    system = SYSTEMS[name]
    model = build(name, system.small)
    image = torch.randn(1, 3, system.small, system.small)
    rows: dict[str, Any] = {}
    for kind in chosen:
        rows[kind] = []
        for accelerated in (False, True):
            copied = copy.deepcopy(model)
            if accelerated:
                deform_attn.accelerate(copied)
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                try:
                    expected = outputs_of(copied, image)
                    found = EXPORTS[kind](copied, image, Path(folder) / "model")
                    apart = difference([x.to(y) for x, y in zip(found, expected)], expected)
                    result = "yes" if apart <= TOLERANCE else f"differs by {apart:.0e}"
                except Exception as error:
                    text = str(error).strip().splitlines() or [""]
                    result = f"no: {type(error).__name__}: {text[0][:160]}"
            rows[kind].append(result)
    return {"exports": rows}


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
    row: dict[str, Any] = {"system": arguments.system}
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
