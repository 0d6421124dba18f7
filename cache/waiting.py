"""Waiting for other processes, which may take days, is told."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterator

FIRST, AGAIN = 5.0, 600.0
"""Seconds of waiting after which it is told, and told again."""


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Tell on standard error while the block goes on: soon after it began, then rarely.

    Args:
        what: who waits for what, ``process 0 waits for ...``.
    """
    over = threading.Event()
    speaker = threading.Thread(target=speak, args=(what, over.wait, _tell), daemon=True)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()


def speak(what: str, over: Callable[[float], bool], tell: Callable[[str], object]) -> None:
    """Tell when it is time to, until the waiting is over.

    Args:
        over: waits so many seconds at most; whether the waiting is over then.
        tell: takes a line.
    """
    passed = 0.0
    for pause in itertools.chain([FIRST], itertools.repeat(AGAIN)):
        if over(pause):
            return
        passed += pause
        minutes = f", for {passed / 60:,.0f} minutes now" if passed > FIRST else ""
        tell(f"{what}{minutes}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
