"""Records of a training beside its checkpoint: ``log.csv``, TensorBoard, and how long it takes."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from deform_attn.detr.evaluate import NAMES
from deform_attn.extras import needs_packages

COLUMNS = ("step", "lr", "loss", "matched_loss", "val_loss", *NAMES)
TIMED_STEPS = 3


class Log:
    """Writes a row for each step to ``log.csv``, and the same numbers for TensorBoard.

    The rows until now are written again from the history, so that a training that goes on from a
    checkpoint has one row for each step.

    Args:
        folder: of the run.
        history: of the training until now.
        steps: of the history that are logged; the next one is added.
        tensorboard: also write events for TensorBoard, in ``tensorboard/``. Those of steps after
            ``steps`` are marked as invalid.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
        OSError: the file cannot be written; the message names it.
    """

    def __init__(
        self, folder: Path, history: dict[str, Any], steps: int, *, tensorboard: bool = False
    ) -> None:
        self.file = folder / "log.csv"
        evaluated = {one["step"]: one for one in _evaluations(history)}
        rows = [_row(history, step, evaluated.get(step, {})) for step in range(1, steps + 1)]
        self._write("w", [dict(zip(COLUMNS, COLUMNS)), *rows])
        self.board = None
        if tensorboard:
            self.board = summary_writer()(str(folder / "tensorboard"), purge_step=steps + 1)

    def add(self, history: dict[str, Any]) -> None:
        """The row of the last step."""
        step = len(history["loss"])
        evaluated = [one for one in _evaluations(history)[-1:] if one["step"] == step]
        row = _row(history, step, *evaluated)
        self._write("a", [row])
        for name, value in row.items():
            if self.board is not None and name != "step" and value is not None:
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what TensorBoard keeps in memory."""
        if self.board is not None:
            self.board.close()

    def _write(self, mode: str, rows: Sequence[dict[str, Any]]) -> None:
        try:
            with open(self.file, mode, newline="") as f:
                csv.DictWriter(f, COLUMNS, lineterminator="\n").writerows(rows)
        except OSError as error:
            raise OSError(f"{self.file}: cannot be written: {error}") from error


def _evaluations(history: dict[str, Any]) -> list[dict[str, Any]]:
    """Numbers of each evaluation by the names of the columns."""
    losses = {one["step"]: one["loss"] for one in history["val_loss"]}
    return [{**one, "val_loss": losses.get(one["step"])} for one in history["ap"]]


def _row(
    history: dict[str, Any], step: int, evaluated: dict[str, Any] | None = None
) -> dict[str, Any]:
    names = ("lr", "loss", "matched_loss")
    row = {"step": step, **{name: history[name][step - 1] for name in names}}
    return {name: (row | (evaluated or {})).get(name) for name in COLUMNS}


def summary_writer() -> Any:
    """PyTorch's writer for TensorBoard.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """
    with needs_packages("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


class Stopwatch:
    """Prints how long steps and evaluations take on this machine, and those that remain.

    Steps are timed after the first one, which has to allocate memory.

    Args:
        show: prints a line.
    """

    def __init__(self, show: Callable[[str], Any]) -> None:
        self.show, self.seconds = show, dict[str, list[float]]()

    @contextmanager
    def time(self, what: str, remaining: int) -> Iterator[None]:
        """Time a ``step`` or an ``evaluation``; the number that remains is that after it."""
        began = perf_counter()
        yield
        seconds = self.seconds.setdefault(what, [])
        seconds.append(perf_counter() - began)
        first, last = (1, 1 + TIMED_STEPS) if what == "step" else (0, 1)
        if len(seconds) == last and remaining:
            self.show(as_hint(seconds[first:last], what, remaining))


def as_duration(seconds: float) -> str:
    """A time in its largest unit.

    Example:
        >>> from deform_attn.detr.logs import as_duration
        >>> [as_duration(seconds) for seconds in (0.0123, 9.5, 90, 5400, 864000)]
        ['0.012 s', '9.5 s', '90 s', '90 min', '240 h']
    """
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 3 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def as_hint(seconds: Sequence[float], what: str, remaining: int) -> str:
    """How long the remaining steps or evaluations take, by the median of those that were timed.

    Example:
        >>> from deform_attn.detr.logs import as_hint
        >>> as_hint([0.3, 0.5, 0.4], "step", 800)
        'a step takes 0.4 s: 5 min for the 800 that remain'
    """
    one, article = statistics.median(seconds), "an" if what[0] in "aeiou" else "a"
    times = as_duration(one), as_duration(one * remaining)
    return f"{article} {what} takes {times[0]}: {times[1]} for the {remaining} that remain"
