"""Progress of what reads many files, shown on a terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import track

In = TypeVar("In")
Out = TypeVar("Out")


def mapped(function: Callable[[In], Out], items: Sequence[In], what: str) -> Iterator[Out]:
    """The function of each item, in their order, by a few threads, with a bar.

    Args:
        function: called with an item, such as one that reads a file.
        items: all of them.
        what: they are, for the bar.
    """
    console = Console(stderr=True)
    shown = console.is_terminal and os.environ.get("RANK", "0") == "0"
    with ThreadPoolExecutor(8) as threads:
        yield from track(
            threads.map(function, items),
            f"checks {what}",
            len(items),
            console=console,
            transient=True,
            disable=not shown,
        )
