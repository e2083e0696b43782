"""torchvision for the tests of augmentations: installed, or in the folder that `make` fills.

PyPI's torchvision has operators for a torch with CUDA. Beside a torch without it they cannot be
loaded, and `import torchvision` fails, as does transformers, which imports it where it is
installed. Augmentations need no operators. So `make` installs it to a folder of its own, and
`enabled` declares the operators whose absence fails the import.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deform_attn.extras import torchvision_of

FOLDER = Path(sys.prefix) / "torchvision"
_modules: dict[str, Any] = {}  # of an earlier `enabled`: operators cannot be registered again
_library = torch.library.Library("torchvision", "FRAGMENT")


def why_not() -> str | None:
    """Why torchvision cannot be imported."""
    if importlib.util.find_spec("torchvision") or (FOLDER / "torchvision").is_dir():
        return None
    return f"{torchvision_of(torch.__version__)} is not installed"


@contextmanager
def enabled() -> Iterator[None]:
    """torchvision, if there is one, can be imported inside of the block, and not outside."""
    if importlib.util.find_spec("torchvision") or why_not():
        yield
        return
    sys.path.append(str(FOLDER))
    sys.modules.update(_modules)
    try:
        _import()
        yield
    finally:
        ours = ("torchvision", "deform_attn.detr.transforms")
        names = [name for name in sys.modules if name.startswith(ours)]
        _modules.update({name: sys.modules.pop(name) for name in names})
        sys.path.remove(str(FOLDER))


def _import() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in ("nms", "qnms"):
            schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            _library.define(schema)
        importlib.import_module("torchvision")
