"""Packages that are not required: errors that name the command that installs them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata, util


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Name the extra to install where an import inside the block fails.

    Args:
        extra: of ``deform_attn``, such as "detr".

    Raises:
        ModuleNotFoundError: a package is not installed; the message names it and the command that
            installs it.
    """
    with _installed_by(f'"deform_attn[{extra}]"'):
        yield


@contextmanager
def needs_packages(*names: str) -> Iterator[None]:
    """As :func:`needs`, for packages of no extra; they are imported before the block.

    Args:
        names: of packages and of their modules, such as "onnx".

    Raises:
        ModuleNotFoundError: as :func:`needs`.
    """
    with _installed_by(" ".join(names)):
        for name in names:
            importlib.import_module(name)
        yield


@contextmanager
def _installed_by(requirements: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "deform_attn"):
            raise
        raise ModuleNotFoundError(
            f"{package}: expected its package to be installed: pip install {requirements}",
            name=error.name,
        ) from None


def torchvision_of(torch: str) -> str:
    """The requirement of the torchvision that fits a version of torch.

    torchvision is no part of an extra: each one requires one version of torch, so that pip would
    install another torch to fit the newest torchvision.

    Example:
        >>> from deform_attn.extras import torchvision_of
        >>> torchvision_of("2.13.0+cpu")
        'torchvision==0.28.*'
    """
    return f"torchvision==0.{int(torch.split('.')[1]) + 15}.*"


@contextmanager
def needs_torchvision() -> Iterator[None]:
    """Name the torchvision to install where its import inside the block fails.

    Raises:
        ImportError: it is not installed, or not built for the installed torch; the message names
            the command that installs the fitting version and leaves torch as it is.
    """
    try:
        yield
    except Exception as error:  # one of another build raises errors of many types
        found = f"one whose import fails ({error})"
        if isinstance(error, ModuleNotFoundError):
            if (error.name or "").partition(".")[0] != "torchvision":
                raise
            found = "none"
        torch = metadata.version("torch")
        public, _, build = torch.partition("+")
        step = f'pip install "{torchvision_of(torch)}" "torch=={public}"'
        if build:
            step += f", from the package index of torch {torch}"
        raise ImportError(
            f"torchvision: expected the version for torch {torch}, got {found}: {step}",
            name="torchvision",
        ) from error


@contextmanager
def needs_transformers() -> Iterator[None]:
    """Name what to install where an import from transformers inside the block fails.

    transformers imports torchvision where it is installed. One that does not fit torch makes these
    imports fail, with errors that do not name it.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ImportError: torchvision is installed, but does not fit torch.
    """
    with needs_torchvision():
        if util.find_spec("torchvision"):
            import torchvision  # noqa: F401
    with needs("backbones"):
        yield
