"""The device that a detector runs on."""

from __future__ import annotations

import torch


def default_device() -> str:
    """A GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def find_device(device: str | torch.device = "") -> torch.device:
    """A device by name; by default a GPU, if there is one.

    Raises:
        ValueError: it is not there.
        TypeError: no name.
    """
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device: expected a name such as cpu or cuda, got {device!r}")
    name = str(device) or default_device()
    try:
        found = torch.empty(0, device=name).device
        if found.type != "meta":
            return found
        reason = "it keeps no values"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    raise ValueError(f"device: expected cpu, cuda or another of PyTorch, got {name!r}: {reason}")
