"""Traces and exports of a model before and after :func:`deform_attn.accelerate`."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import deform_attn

__all__ = ["EXPORTS", "compare", "difference"]

LARGE = 1e6  # larger numbers are compared as infinite
MOST_ROWS = 2000  # tensors of more rows are compared in order
TOLERANCE = 1e-3  # of an exported float32 model, whose operators run in another order
SAME = 1e-5  # of two exports of the same graph

Inputs = tuple[Tensor, ...]


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


def _trace(model: nn.Module, inputs: Inputs, folder: Path) -> list[Tensor]:
    """Traced, saved, and run in a process that has torch alone."""
    traced = torch.jit.trace(model, inputs, check_trace=False)
    files = [str(folder / name) for name in ("model", "input", "output")]
    traced.save(files[0])
    torch.save(inputs, files[1])
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(int(sys.argv[4]))\n"
        "model = torch.jit.load(sys.argv[1])\n"
        "with torch.no_grad():\n"
        "    torch.save(list(model(*torch.load(sys.argv[2]))), sys.argv[3])"
    )
    command = [sys.executable, "-c", code, *files, str(torch.get_num_threads())]
    subprocess.run(command, check=True, capture_output=True)
    return list(torch.load(files[2]))


def _trace_with_gradients(model: nn.Module, inputs: Inputs, folder: Path) -> list[Tensor]:
    with torch.enable_grad():
        return _trace(model, inputs, folder)


def _run_onnx(path: Path, inputs: dict[str, Tensor] | Tensor) -> list[Tensor]:
    """Outputs in onnxruntime; a file that a library wrote takes an image and perhaps its size."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    feed: dict[str, Any]
    if isinstance(inputs, Tensor):
        size = numpy.array([inputs.shape[-2:]], dtype=numpy.int64)
        feed = dict(zip(names, (inputs.numpy(), size)))
    else:
        feed = {name: inputs[name].numpy() for name in names}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


def _onnx(**options: Any) -> Callable[[nn.Module, Inputs, Path], list[Tensor]]:
    def export(model: nn.Module, inputs: Inputs, folder: Path) -> list[Tensor]:
        path = folder / "model.onnx"
        named = {f"input_{index}": tensor for index, tensor in enumerate(inputs)}
        torch.onnx.export(model, inputs, str(path), verbose=False, input_names=[*named], **options)
        return _run_onnx(path, named)

    return export


def _export(model: nn.Module, inputs: Inputs, folder: Path) -> list[Tensor]:
    path = folder / "model.pt2"
    torch.export.save(torch.export.export(model, inputs), path)
    return list(torch.export.load(path).module()(*inputs))


def _own(model: Any, inputs: Inputs, folder: Path) -> list[Tensor]:
    """By the library's command, with its own defaults and outputs."""
    (image,) = inputs
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


def compare(model: nn.Module, inputs: Inputs, kinds: Sequence[str]) -> dict[str, list[str]]:
    """For each kind, whether the stock and the accelerated model can be exported.

    "yes": the export runs elsewhere and returns what the model returns. "as stock": it returns what
    the export of the stock model returns, which differs from the model: some models order queries
    by scores that random weights make nearly equal. Otherwise: the reason why not.

    Args:
        model: a stock model in evaluation mode that returns a flat tuple of floating tensors.
        inputs: its inputs.
        kinds: keys of :data:`EXPORTS`.
    """
    with torch.no_grad():
        expected = [x.clone() for x in copy.deepcopy(model)(*inputs)]
    rows: dict[str, list[str]] = {}
    for kind in kinds:
        rows[kind] = []
        stock: list[Tensor] | None = None
        for accelerated in (False, True):
            copied = copy.deepcopy(model)
            if accelerated:
                deform_attn.accelerate(copied)
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                try:
                    found = EXPORTS[kind](copied, inputs, Path(folder))
                    found = [x.to(torch.get_default_dtype()) for x in found]
                    if kind != "own ONNX":  # its outputs are not those of the model
                        result = _verdict(difference(found, expected))
                    else:
                        result = "yes" if stock is None else _verdict(difference(found, stock))
                    if result != "yes" and stock is not None and difference(found, stock) <= SAME:
                        result = "as stock"
                    if not accelerated:
                        stock = found
                except Exception as error:
                    text = str(error).strip().splitlines() or [""]
                    result = f"no: {type(error).__name__}: {text[0][:160]}"
            rows[kind].append(result)
    return rows


def _verdict(apart: float) -> str:
    return "yes" if apart <= TOLERANCE else f"differs by {apart:.0e}"
