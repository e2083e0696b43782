"""Files and folders of commands: checked before the work, and written in one step."""

from __future__ import annotations

import difflib
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from deform_attn.checks import as_path


def nearby(path: Path, names: Sequence[str] = ()) -> str:
    """What exists in the place of a path that does not exist, for errors.

    Args:
        path: does not exist.
        names: that could be meant instead of a path.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from deform_attn.detr.files import nearby
        >>> with TemporaryDirectory() as folder:
        ...     Path(folder, "photos").mkdir()
        ...     text = nearby(Path(folder, "fotos", "train"))
        >>> text.replace(folder, "DATA")
        "'DATA' has no 'fotos'; similar: 'photos'"
    """
    missing, folder = path.name, path.parent
    while not os.path.exists(folder):  # False for invalid names too
        missing, folder = folder.name, folder.parent
    if not os.path.isdir(folder):
        return f"{str(folder)!r} is a file"
    try:
        found = sorted(os.listdir(folder))
    except OSError as error:
        return f"{str(folder)!r} cannot be read: {error.strerror}"
    if os.path.islink(link := folder / missing):
        return f"{str(link)!r} is a link to {os.readlink(link)!r}, which does not exist"
    place = f"{str(folder)!r} has no {missing!r}"
    names = names if folder == path.parent == Path() else ()
    if close := difflib.get_close_matches(missing, {*names, *found}):
        return f"{place}; similar: {', '.join(map(repr, close))}"
    shown = [repr(name) for name in found if name[0] != "."]
    more = f" and {len(shown) - 8} more" if shown[8:] else ""
    return f"{place}; it has {', '.join(shown[:8]) or 'nothing'}{more}"


def make_folder(argument: str, folder: Path) -> Path:
    """Make a folder for results, and check that it can be written to.

    Args:
        argument: names the folder in errors.
        folder: to make; it may exist.

    Returns:
        The folder, with the user's for ``~``.

    Raises:
        OSError: it cannot be made, such as where a file has its name, or not be written to.
    """
    folder = as_path(argument, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"{argument}: expected a folder to write to, got {str(folder)!r}: {reason}"
        ) from error
    return folder


def check_apart(
    argument: str, folder: Path, inputs: Iterable[Path], searched: Iterable[Path] = ()
) -> None:
    """Check that a folder for results is none in which data is found.

    Results there could replace a file, or be taken for one of the data the next time.

    Args:
        argument: names the folder in errors.
        folder: for results.
        inputs: folders of images or annotations.
        searched: folders whose images are found at any depth.

    Raises:
        ValueError: it is one of them, or inside a folder that is searched.
    """
    place = folder.resolve()
    folders = {one.resolve() for one in {*inputs}}
    if place in folders or {place, *place.parents} & {one.resolve() for one in searched}:
        raise ValueError(
            f"{argument}: expected a folder in which no data is found, got {str(folder)!r}; "
            "choose one outside of the data"
        )


def check_file(argument: str, file: Path, suffixes: Sequence[str] = ()) -> Path:
    """Check the name of a file for results, and make its folder.

    Args:
        argument: names the file in errors.
        file: to be written; it may exist.
        suffixes: one of which its name has; by default any.

    Returns:
        The file, with the user's folder for ``~``.

    Raises:
        ValueError: another suffix.
        OSError: it is a folder, or its folder cannot be made or written to.

    Example:
        >>> from pathlib import Path
        >>> from deform_attn.detr.files import check_file
        >>> check_file("sheet", Path("sheet.jpeg"), (".png",))
        Traceback (most recent call last):
            ...
        ValueError: sheet: expected a suffix of .png, got 'sheet.jpeg'
    """
    file = as_path(argument, file)
    if suffixes and file.suffix.lower() not in suffixes:
        raise ValueError(
            f"{argument}: expected a suffix of {', '.join(suffixes)}, got {str(file)!r}"
        )
    if file.is_dir():
        raise OSError(f"{argument}: expected a file to write, got the folder {str(file)!r}")
    return make_folder(argument, file.parent) / file.name


def write(file: Path, write_to: Callable[[BinaryIO], Any], *, sync: bool = True) -> None:
    """Atomic write: temporary file, fsync, rename.

    Args:
        file: to write.
        write_to: called with the open temporary file.
        sync: wait until the disk has the content.

    Raises:
        OSError: the file cannot be written, such as on a full disk; the message names it.
    """
    partial, raw = file.with_name(file.name + ".partial"), None
    try:
        raw = _Raw(partial, "wb")
        with io.BufferedWriter(raw) as f:
            write_to(f)
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):  # where nothing can be written, nothing was
            partial.unlink(missing_ok=True)
        reason = error if raw is None or raw.error is None else raw.error
        text = getattr(reason, "strerror", None) or reason
        raise OSError(f"{file}: cannot be written: {text}") from error
    except BaseException:  # such as Ctrl-C
        partial.unlink(missing_ok=True)
        raise


class _Raw(io.FileIO):
    """Keeps the error of a write: torch.save raises another, which does not name it."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


@contextmanager
def locked(argument: str, folder: Path) -> Iterator[None]:
    """Hold a folder, so that no other process writes to it at the same time.

    The lock ends with the process, however that ends. A file system without locks has none.

    Args:
        argument: names the folder in errors.
        folder: gets a file ``.lock``.

    Raises:
        OSError: another process holds it.
    """
    with open(folder / ".lock", "a+") as f:
        try:
            _lock(f.fileno())
        except (BlockingIOError, PermissionError) as error:
            f.seek(0)
            raise OSError(
                f"{argument}: expected a folder without a running training, got {str(folder)!r}, "
                f"in which process {f.read().strip()} trains; wait for it, or choose another folder"
            ) from error
        except OSError:  # no locks here
            pass
        f.truncate(0)
        f.write(str(os.getpid()))
        f.flush()
        yield


def _lock(number: int) -> None:
    """Lock an open file, or raise BlockingIOError or PermissionError."""
    if os.name == "nt":
        import msvcrt

        os.lseek(number, 2**20, os.SEEK_SET)  # the text at the start stays readable
        msvcrt.locking(number, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
