"""Packages that an extra of this package installs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Name the extra to install where an import inside the block fails.

    Args:
        extra: of ``deform_attn``, such as "detr".

    Raises:
        ModuleNotFoundError: a package is not installed; the message names it and the command that
            installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "deform_attn"):
            raise
        raise ModuleNotFoundError(
            f'{package}: expected its package to be installed: pip install "deform_attn[{extra}]"',
            name=error.name,
        ) from None
