"""How the commands of this package end: without a traceback after Ctrl-C or a closed pipe.

``deform_attn/__init__.py`` imports this module before torch, whose import takes seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["command"]


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


_STARTS = _starts_a_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _STARTS:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the process at once


@contextmanager
def command() -> Iterator[None]:
    """Run a command inside the block.

    Ctrl-C gives the exit status 130. An output whose reader has ended, as in ``command | head``,
    is not written any further.

    Raises:
        SystemExit: after Ctrl-C, with the status 130, or 141 where the output could not be written.
    """
    if _STARTS:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        sys.exit(128 + 13)  # SIGPIPE, which Windows does not have
    finally:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:  # what is waiting is discarded: Python would warn of it at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
