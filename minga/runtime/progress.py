"""Progress of long work: a bar with the time left on a terminal, a plain line now and then elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 20.0  # seconds between two plain lines


class ProgressBar:
    """`with ProgressBar("training", total=300) as bar: bar.update(1, "loss 3.1"); bar.note("saved")`."""

    def __init__(self, label: str, total: int, done: int = 0, *, shown: bool = True):
        self._label, self._total, self._done, self._shown = label, total, done, shown
        self._console = Console(stderr=True, highlight=False)
        self._last_line = self._began = time.monotonic()
        self._first = done
        self._bar: Progress | None = None
        if self._console.is_terminal and shown:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(
                *columns, TimeRemainingColumn(), TextColumn("{task.fields[text]}"), console=self._console
            )
            self._task = self._bar.add_task(label, total=total, completed=done, text="")

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, advance: int, text: str) -> None:
        self._done += advance
        if self._bar is not None:
            self._bar.update(self._task, advance=advance, text=text)
        elif self._shown and (self._done >= self._total or time.monotonic() - self._last_line >= LINE_EVERY):
            self._last_line = time.monotonic()
            each = (self._last_line - self._began) / max(1, self._done - self._first)
            left = timedelta(seconds=round(each * (self._total - self._done)))
            end = f"  {left} left" if left else ""
            print(f"{self._label} {self._done}/{self._total}  {text}{end}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        elif self._shown:
            print(text, file=sys.stderr, flush=True)
