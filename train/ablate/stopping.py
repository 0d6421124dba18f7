"""Stopping runs that a pool does beside one another: they are saved, and the ablation waits."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""That ask an ablation, or one of its runs, to stop."""
_MARKER = ".stop"


class PoolStop:
    """While open, the first signal asks the runs of a pool to save and to end.

    A file beside their folders tells the pool's processes, and they begin no other run. The second
    signal acts as it did before.

    Args:
        runs: the folder of the runs' folders.

    Attributes:
        asked: the signal that came.
    """

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._before: dict[signal.Signals, Any] = {}
        self.asked: signal.Signals | None = None

    def __enter__(self) -> PoolStop:
        self._before = handle(self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()
        forget_stop(self._runs)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        self._release()
        (self._runs / _MARKER).touch()
        print(
            "stopping: the runs in flight are being saved; ask again to wait for none of them",
            file=sys.stderr,
            flush=True,
        )

    def _release(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def handle(handler: Any) -> dict[signal.Signals, Any]:
    """Have `SIGNALS` handled, but for those that are ignored, as hangups are under nohup.

    Outside the main thread none can be.

    Returns:
        What handled them before.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    heeded = [n for n in SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handler) for number in heeded}


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
