"""Progress of what reads many files, on a terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

In = TypeVar("In")
Out = TypeVar("Out")


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar, in the first of several processes.

    Args:
        what: is done.
        total: number of items.

    Yields:
        A function that is called with the number of items that were done since.
    """
    console = Console(stderr=True)
    hidden = not console.is_terminal or os.environ.get("RANK", "0") != "0"
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def mapped(function: Callable[[In], Out], items: Sequence[In], what: str) -> Iterator[Out]:
    """The function of each item, in their order, by a few threads, with a bar.

    Args:
        function: called with an item, such as one that reads a file.
        items: all of them.
        what: is done with them.
    """
    with ThreadPoolExecutor(8) as threads, progress(what, len(items)) as advance:
        for result in threads.map(function, items):
            yield result
            advance(1)
