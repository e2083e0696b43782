"""Export of whole detectors, with postprocessing and a dynamic batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deform_attn.checks import as_path, check_integer, check_module
from deform_attn.detr.files import write
from deform_attn.detr.images import LARGEST_SIZE
from deform_attn.detr.matching import assign
from deform_attn.detr.models import BestScores, Detections, Postprocess

_NONE = 1e9  # a difference, of detections that are not the same
SUFFIXES = (".onnx", ".pt2", ".torchscript")


class Exportable(nn.Module):
    """A detector and its postprocessing as one module."""

    def __init__(self, model: nn.Module, postprocess: Postprocess) -> None:
        super().__init__()
        self.model, self.postprocess = model, postprocess

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and labels in ``images [B, 3, H, W]`` of ``sizes [B, (height, width)]``."""
        found = self.postprocess.detections(self.model(images), sizes)
        return found.boxes, found.scores, found.labels


def export(
    model: nn.Module,
    postprocess: Postprocess,
    file: str | Path,
    size: int | tuple[int, int],
    **options: Any,
) -> float:
    """Write a detector as ONNX, an exported program of PyTorch, or a TorchScript trace.

    The file's suffix decides: ``.onnx``, ``.pt2`` or ``.torchscript``.

    Inputs are ``images [B, 3, H, W]``, float32 RGB in [0, 1], and ``sizes [B, (height, width)]``,
    the images' sizes in pixels before they were resized. Outputs are ``boxes [B, n, 4]``, corners
    in those pixels, ``scores [B, n]`` and ``labels [B, n]``. The batch is dynamic. What was written
    is run with another batch, and compared.

    Args:
        model: on the CPU.
        postprocess: of the same system.
        file: where to write.
        size: of the images, ``(height, width)`` or the side of a square.
        options: of :func:`deform_attn.integrations.onnx.export`, for ``.onnx``.

    Returns:
        The largest difference of boxes (in pixels) and scores from those of the model, see
        :func:`difference`. ONNX is compared if onnxruntime is installed, else it is NaN.

    Raises:
        ValueError: another suffix, or an invalid size.
        TypeError: an argument has another type.
        OSError: the file cannot be written; the message names it.
        ModuleNotFoundError: onnx or onnxscript is not installed, for ``.onnx``.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from deform_attn.detr.export import export
        >>> from deform_attn.detr.recipes import build
        >>> model, _, postprocess = build("detr", 3, width=32, layers=1, queries=5)
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "detector.torchscript")
        ...     export(model.eval(), postprocess, file, size=64) < 1e-3
        True
    """
    file = as_path("file", file)
    check_module("model", model)
    if file.suffix not in SUFFIXES:
        raise ValueError(f"file: expected a suffix of {', '.join(SUFFIXES)}, got {file.name!r}")
    height, width = (size, size) if isinstance(size, Integral) else _pair(size)
    for side in (height, width):
        check_integer("size", side, 1, LARGEST_SIZE)
    whole = Exportable(model, postprocess).eval()

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
        return images, torch.tensor([[height, width]]).repeat(batch, 1)

    # With 2 a stride of expanded queries can equal that of contiguous ones, which fixes the batch.
    batch = torch.export.Dim("batch", min=1, max=1024)
    shapes = {"images": {0: batch}, "sizes": {0: batch}}
    content = BytesIO()  # writing a file on a full disk, these functions end the process
    with torch.no_grad(), _quiet():
        if file.suffix == ".pt2":
            program = torch.export.export(whole, inputs(3), dynamic_shapes=shapes)
            torch.export.save(program, content)
            write(file, lambda f: f.write(content.getbuffer()))
            found = torch.export.load(file).module()(*inputs(2))
        elif file.suffix == ".torchscript":
            torch.jit.save(torch.jit.trace(whole, inputs(3)), content)
            write(file, lambda f: f.write(content.getbuffer()))
            found = torch.jit.load(file)(*inputs(2))
        else:
            found = _export_onnx(whole, inputs(3), inputs(2), file, shapes, options)
        if found is None:
            return float("nan")
        if isinstance(postprocess, BestScores):  # rounding may exchange the last with the next
            whole.postprocess = replace(postprocess, number=2 * postprocess.number)
        expected = Detections(*whole(*inputs(2)))
    return difference(expected, Detections(*map(torch.as_tensor, found)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of PyTorch's exporters: what they wrote is compared with the model."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    with warnings.catch_warnings():
        tracer = torch.jit.TracerWarning  # type: ignore[attr-defined]
        for category in (tracer, DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        exporter.setLevel(logging.ERROR)
        try:
            yield
        finally:
            exporter.setLevel(level)


def _pair(size: Any) -> tuple[int, int]:
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
        raise TypeError(f"size: expected an integer or (height, width), got {size!r}")
    return size[0], size[1]


def difference(expected: Detections, found: Detections) -> float:
    """The largest difference of boxes and scores of detections from the expected ones.

    Scores are compared in their order. Boxes are compared between detections of the same label,
    paired one to one, because rounding exchanges detections of nearly equal scores.

    Args:
        expected: at least as many as found.
        found: of the same images.

    Returns:
        The difference; infinite where a number is not finite or a detection has no counterpart.
    """
    n = found.scores.shape[1]
    worst = (expected.scores[:, :n] - found.scores).abs().amax().item()
    for a, b in zip(zip(*expected), zip(*found)):
        rows, others = (torch.cat([boxes, s[:, None]], 1).double() for boxes, s, _ in (a, b))
        cost = torch.cdist(rows, others, p=float("inf")).nan_to_num(_NONE)
        cost = cost.masked_fill(a[2][:, None] != b[2], _NONE).clamp(max=_NONE)
        worst = max(worst, cost[assign(cost)].max().item())
    return worst if worst < _NONE else float("inf")


def _export_onnx(
    whole: nn.Module,
    example: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    file: Path,
    shapes: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    from deform_attn.integrations import onnx

    # The exporter's optimizer breaks models that clamp one tensor twice.
    names = {"input_names": ["images", "sizes"], "output_names": ["boxes", "scores", "labels"]}
    options = {"optimize": False, "verbose": False, "dynamic_shapes": shapes, **names, **options}
    onnx.export(whole, example, file, **options)
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 3  # only errors
    session = onnxruntime.InferenceSession(str(file), session_options, ["CPUExecutionProvider"])
    return session.run(None, {"images": other[0].numpy(), "sizes": other[1].numpy()})
