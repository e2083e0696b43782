"""How the commands of this package end: no traceback after Ctrl-C, a closed pipe or a full disk.

``deform_attn/__init__.py`` imports this module before torch, whose import takes seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["command", "without_traceback"]


def _starts_a_command() -> bool:
    """Whether Python imports the package to run a command of it.

    While Python looks for the module of ``-m``, the first argument is "-m". The module is the word
    before the other arguments: ``-m deform_attn.info``, or ``-Imdeform_attn.info`` with an option.
    """
    if sys.argv[:1] == ["-m"]:
        module = "".join(sys.orig_argv[-len(sys.argv) :][:1])
        if module.startswith("-"):
            module = module.partition("m")[2]
        return module.startswith("deform_attn.")
    return bool(sys.argv) and Path(sys.argv[0]).stem == "deform-attn-detr"


_IS_COMMAND = _starts_a_command()
_STARTS = _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _STARTS:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the process at once


@contextmanager
def without_traceback() -> Iterator[None]:
    """For the imports of a command: a ValueError inside the block ends it with one line.

    A program that imports the package gets the ValueError.
    """
    try:
        yield
    except ValueError as error:
        if _IS_COMMAND:
            sys.exit(str(error))
        raise


@contextmanager
def command() -> Iterator[None]:
    """Run a command inside the block.

    Ctrl-C gives the exit status 130. An output whose reader has ended, as in ``command | head``,
    is not written any further. One that cannot be written otherwise, as on a full disk, is an error
    of one line.

    Raises:
        SystemExit: after Ctrl-C, with the status 130; where the output could not be written, 141
            after a closed pipe, else 1.
    """
    if _STARTS:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        sys.exit(128 + 13)  # SIGPIPE, which Windows does not have
    except OSError as error:
        if error.filename is not None:
            raise
        sys.exit(_not_written(error))
    finally:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError as error:  # what is waiting is discarded: Python would warn of it at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ended = isinstance(error.__context__, SystemExit | None)
            if ended and not isinstance(error, BrokenPipeError):
                sys.exit(_not_written(error))


def _not_written(error: OSError) -> str:
    return f"output: cannot be written: {error.strerror or error}"
