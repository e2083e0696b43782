"""Files that one of several processes makes, for tests and benchmarks that compile."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Callable
from pathlib import Path


def run(command: list[str]) -> str:
    """The command's output; an error shows its messages."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def made(target: Path, make: Callable[[Path], None]) -> Path:
    """The file, made where it is not there yet, by one of several processes that ask for it.

    Args:
        target: the file; its name tells what it is made of.
        make: writes to the path that it gets.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        with target.with_name(f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                unfinished = target.with_name(f"unfinished.{target.name}")
                make(unfinished)
                unfinished.replace(target)  # atomic: an unfinished file is never used
    return target
