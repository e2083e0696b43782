"""Files and folders that commands write: checked before the work, and written in one step."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO


def make_folder(argument: str, folder: Path) -> None:
    """Make a folder for results.

    Args:
        argument: names the folder in errors.
        folder: to make; it may exist.

    Raises:
        OSError: it cannot be made, such as where a file has its name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"{argument}: expected a folder to write to, got {str(folder)!r}: {reason}"
        ) from error


def check_file(argument: str, file: Path, suffixes: Sequence[str] = ()) -> None:
    """Check the name of a file for results, and make its folder.

    Args:
        argument: names the file in errors.
        file: to be written; it may exist.
        suffixes: one of which its name has; by default any.

    Raises:
        ValueError: another suffix.
        OSError: it is a folder, or its folder cannot be made.

    Example:
        >>> from pathlib import Path
        >>> from deform_attn.detr.files import check_file
        >>> check_file("sheet", Path("sheet.jpeg"), (".png",))
        Traceback (most recent call last):
            ...
        ValueError: sheet: expected a suffix of .png, got 'sheet.jpeg'
    """
    if suffixes and file.suffix.lower() not in suffixes:
        raise ValueError(
            f"{argument}: expected a suffix of {', '.join(suffixes)}, got {str(file)!r}"
        )
    if file.is_dir():
        raise OSError(f"{argument}: expected a file to write, got the folder {str(file)!r}")
    make_folder(argument, file.parent)


def write(file: Path, write_to: Callable[[BinaryIO], Any], *, sync: bool = True) -> None:
    """Atomic write: temporary file, fsync, rename.

    Args:
        file: to write.
        write_to: called with the open temporary file.
        sync: wait until the disk has the content.

    Raises:
        OSError: the file cannot be written, such as on a full disk; the message names it.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        with open(partial, "wb") as f:
            write_to(f)
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        partial.unlink(missing_ok=True)
        raise OSError(f"{file}: cannot be written: {error}") from error
