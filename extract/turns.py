"""How processes of one launch share the shards out, and where they wait for each other."""

from __future__ import annotations

import contextlib
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from lightning_fabric import Fabric
from torch.distributed import distributed_c10d

from .. import engine
from ..cache.waiting import waiting


def one_first(fabric: Fabric, what: str) -> contextlib.AbstractContextManager[None]:
    """As `engine.one_first`, and told: by process 1 that it waits for the first of its machine, and
    by process 0 that it waits for the first of each other machine.

    Args:
        what: the block does, ``lists the images``.
    """
    first = fabric.local_rank == 0
    who = "the first process of every machine" if first else "the first process of its machine"
    line = f"process {fabric.global_rank} waits for {who}, which {what}"
    tells = fabric.world_size > 1 and fabric.global_rank < 2
    return engine.one_first(fabric, lambda: waiting(line) if tells else contextlib.nullcontext())


class WorkList:
    """Numbers below a count, ascending, each for one process of a launch: whoever is free takes the
    next, so that none waits for a slower one for longer than one piece of work takes.

    Made by all processes together. What one took and did not do, for it has ended, is not handed
    out again: the others end, too, and the next launch begins with what is pending then.
    """

    def __init__(self, fabric: Fabric, count: int) -> None:
        self._count = count
        self._name: str = fabric.broadcast(uuid.uuid4().hex)
        self._counters: _Counters = _OwnCounters()
        if fabric.world_size > 1:
            self._counters = distributed_c10d._get_default_store()

    def __iter__(self) -> Iterator[int]:
        while (taken := self._counters.add(f"{self._name}/taken", 1)) <= self._count:
            yield taken - 1

    def advance(self, rows: int) -> int:
        """Count rows as done; those that all processes have done together by now."""
        return self._counters.add(f"{self._name}/rows", rows)


class _Counters(Protocol):
    def add(self, key: str, amount: int, /) -> int:
        """Add to a number that begins with 0, as one step of all processes; the sum."""


class _OwnCounters:
    """Of a single process."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()

    def add(self, key: str, amount: int) -> int:
        self._sums[key] += amount
        return self._sums[key]


def await_calibration(fabric: Fabric) -> None:
    """Process 0 comes here when it has calibrated, the others at once. A collective.

    Of those that wait the first tells it: one line is enough.
    """
    last = fabric.world_size - 1
    who = "process 1 waits" if last == 1 else f"processes 1 to {last} wait"
    what = f"{who} for process 0, which calibrates"
    with waiting(what) if fabric.global_rank == 1 else contextlib.nullcontext():
        fabric.barrier()


def await_others(fabric: Fabric) -> None:
    """Every process comes here when no shard is left for it. A collective.

    Process 0 tells that it waits; where another does, process 0 shows how far it is.
    """
    last = fabric.world_size - 1
    whose = "that of process 1" if last == 1 else f"those of processes 1 to {last}"
    what = f"process 0 finds no more shards to do and waits for {whose}"
    with waiting(what) if fabric.global_rank == 0 and last else contextlib.nullcontext():
        fabric.barrier()
