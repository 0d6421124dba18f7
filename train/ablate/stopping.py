"""Stopping runs that a pool does beside one another: they are saved, and the ablation waits."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from ..stop import NOTICES, FirstSignal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""That ask an ablation, or one of its runs, to stop."""
_MARKER = ".stop"


class PoolStop(FirstSignal):
    """While open, the first signal asks the runs of a pool to save and to end.

    A file beside their folders tells the pool's processes, and they begin no other run.

    Args:
        runs: the folder of the runs' folders.
    """

    def __init__(self, runs: Path) -> None:
        super().__init__(heeded())
        self._runs = runs

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        forget_stop(self._runs)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        super()._ask(number, frame)
        (self._runs / _MARKER).touch()
        print(
            "stopping: the runs in flight are being saved; ask again to wait for none of them",
            file=sys.stderr,
            flush=True,
        )


def heeded() -> list[signal.Signals]:
    """Those of `SIGNALS` that are not ignored, as hangups are under nohup."""
    return [n for n in SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]


def handle(handler: Any) -> dict[signal.Signals, Any]:
    """Have `SIGNALS` handled, but for those that are ignored, and the notices of a cluster that
    somebody handles already, such as submitit.

    Outside the main thread none can be.

    Returns:
        What handled them before.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    notices = [number for number in NOTICES if callable(signal.getsignal(number))]
    return {number: signal.signal(number, handler) for number in (*heeded(), *notices)}


def leave_to_the_pool() -> None:
    """Have this process, which works for a pool, heed none of `SIGNALS` from here on.

    Ctrl-C reaches all processes of a terminal, and one that ends, idle or not, breaks the pool,
    which kills whatever the others have started.
    """
    handle(lambda number, frame: None)  # what is ignored would be in the programs it starts, too


def stop_asked(folder: Path) -> bool:
    """Whether the ablation that a run's folder belongs to was asked to stop."""
    return (folder.parent / _MARKER).exists()


def forget_stop(runs: Path) -> None:
    """Let runs begin again, whatever an ablation that was killed has left there.

    Args:
        runs: the folder of the runs' folders.
    """
    (runs / _MARKER).unlink(missing_ok=True)
