"""A device for each run of an ablation whose runs are done side by side on one machine."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"
_LOCK = ".place-{}"


def visible_devices() -> list[str]:
    """Names of the CUDA devices that this process may use, as `VISIBLE` has them."""
    count = torch.cuda.device_count()  # does not begin to use one
    named = os.environ.get(VISIBLE)
    return [str(n) for n in range(count)] if named is None else named.split(",")[:count]


@contextlib.contextmanager
def own_device(runs: Path, devices: Sequence[str]) -> Iterator[dict[str, str]]:
    """The environment of a run beside others, who have the other devices: without it all of them
    would take the first one. More runs than devices share them evenly.

    Args:
        runs: the folder of the runs' folders.
        devices: what `visible_devices` gave.
    """
    if len(devices) < 2:
        yield {}
        return
    with _place(runs) as number:
        yield {VISIBLE: devices[number % len(devices)]}


@contextlib.contextmanager
def _place(runs: Path) -> Iterator[int]:
    """The lowest number that no other process holds; free again when this one has ended."""
    for number in itertools.count():
        fd = os.open(runs / _LOCK.format(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            continue
        try:
            yield number
        finally:
            os.close(fd)
        return
