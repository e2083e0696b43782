"""What was validated of a folder of images, so that the next start need not validate it again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deform_attn import __version__

FOLDER = ".deform_attn"  # in the folder of the images


def stamp(root: Path, names: Iterable[str]) -> tuple[str, float]:
    """A digest of names, sizes and times of files, and the time of the latest change.

    Raises:
        OSError: a file is missing.
        ValueError: a name is invalid.
    """
    found, latest = hashlib.sha256(), 0.0
    for name in names:
        facts = os.stat(os.path.join(root, name))
        found.update(os.fsencode(f"{name}\0{facts.st_size}\0{facts.st_mtime_ns}\n"))
        latest = max(latest, facts.st_mtime)
    return found.hexdigest(), latest


def load(file: Path) -> dict[str, Any] | None:
    """The content of a cache file; None where there is none, or it is damaged."""
    try:
        head, _, text = file.read_bytes().partition(b"\n")
        if head != _head(text):
            return None
        return json.loads(text)
    except (OSError, ValueError):
        return None


def save(file: Path, content: dict[str, Any]) -> None:
    """Write a cache file, in one step; nothing where the folder cannot be written."""
    text = json.dumps(content).encode()
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(exist_ok=True)
        try:
            partial.write_bytes(_head(text) + b"\n" + text)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError:
        return


def _head(text: bytes) -> bytes:
    """What a file begins with; another version of the package may check more."""
    return f"deform_attn {__version__} {hashlib.sha256(text).hexdigest()}".encode()
