"""What a terminal shows: one progress line for everything that takes more than a few seconds, and
the console of tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError, as print does, which the command line knows what to do with."""
        raise


def plain_console(elsewhere: int | None = None, **options: Any) -> Console:
    """A console that shows text as it is: what rich takes for its markup may be part of a path, a
    key or a name, such as ``run[v2]``.

    Args:
        elsewhere: width in columns where there is no terminal.
        **options: of `rich.console.Console`.
    """
    console = _Console(markup=False, emoji=False, **options)
    if elsewhere is not None and not console.is_terminal:
        console.width = elsewhere
    return console


class ProgressLine:
    """A bar with rate and time left on a terminal, a plain line every ten seconds elsewhere.

    Use it as a context manager and call `advance` with the number of finished units. Output goes to
    standard error, so that standard output stays for results.
    """

    def __init__(self, title: str, total: int, unit: str, *, every_seconds: float = 10.0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self._every = every_seconds
        self._console = plain_console(stderr=True)
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressLine:
        self._start = self._last = time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task(self.title, total=self.total, rate="", note="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and (self.total or self.done):
            self._print("")

    @property
    def seconds(self) -> float:
        """Wall time since the line was opened, in seconds."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Finished units a second since the line was opened."""
        return self.done / max(self.seconds, 1e-9)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` finished units; `note` is a short text such as the loss."""
        self.done += count
        if self._bar is not None:
            rate = f"{self.rate:,.1f} {self.unit}/s"
            self._bar.update(self._task, completed=self.done, rate=rate, note=note)
        elif time.monotonic() - self._last >= self._every and self.done < self.total:
            self._last = time.monotonic()
            self._print(note)

    def _print(self, note: str) -> None:
        left = (self.total - self.done) / max(self.rate, 1e-9)
        parts = [
            f"{self.title}: {self.done}/{self.total} {self.unit}",
            f"{self.rate:,.1f} {self.unit}/s",
            f"{self.seconds:.0f} s" + (f", {left:.0f} s left" if self.done < self.total else ""),
        ]
        print(", ".join([*parts, note] if note else parts), file=sys.stderr, flush=True)


@contextmanager
def counting(title: str, unit: str, *, least: int = 1) -> Iterator[Callable[[int, int], None]]:
    """A callback of (done, total) that shows a `ProgressLine` where the total is `least` or
    more."""
    with ExitStack() as stack:
        lines: list[ProgressLine] = []

        def show(done: int, total: int) -> None:
            if total < least:
                return
            if not lines:
                lines.append(stack.enter_context(ProgressLine(title, total, unit)))
            lines[0].advance(done - lines[0].done)

        yield show
