"""Arguments of functions that users call: their types and ranges, and the device."""

from __future__ import annotations

from numbers import Integral, Real

import torch


def check_integer(name: str, value: object, low: int | None = None) -> None:
    """Check an integer.

    Args:
        name: of the argument.
        value: given.
        low: lowest valid value; None: any.

    Raises:
        TypeError: no integer.
        ValueError: below ``low``.

    Example:
        >>> from deform_attn.detr.arguments import check_integer
        >>> check_integer("batch", 1.5, 1)
        Traceback (most recent call last):
            ...
        TypeError: batch: expected an integer, got 1.5
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if low is not None and value < low:
        expected = "at least 1" if low == 1 else f"a number from {low}"
        raise ValueError(f"{name}: expected {expected}, got {value}")


def check_number(name: str, value: object) -> float:
    """A number; NaN and infinity are numbers.

    Args:
        name: of the argument.
        value: given.

    Raises:
        TypeError: no number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return float(value)


def check_threshold(name: str, value: object) -> None:
    """Check a number from 0 to 1.

    Args:
        name: of the argument.
        value: given.

    Raises:
        TypeError: no number.
        ValueError: outside of that range, or NaN.
    """
    number = check_number(name, value)
    if not 0 <= number <= 1:  # true of NaN too
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")


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
