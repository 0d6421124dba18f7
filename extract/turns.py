"""Where processes of one launch wait for each other: their shares may end hours apart."""

from __future__ import annotations

import contextlib
from typing import TypeVar

from lightning_fabric import Fabric

from .. import engine
from ..cache.waiting import waiting
from ..engine import gathered

T = TypeVar("T")


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


def await_calibration(fabric: Fabric) -> None:
    """Process 0 comes here when it has calibrated, the others at once. A collective.

    Of those that wait the first tells it: one line is enough.
    """
    last = fabric.world_size - 1
    who = "process 1 waits" if last == 1 else f"processes 1 to {last} wait"
    what = f"{who} for process 0, which calibrates"
    with waiting(what) if fabric.global_rank == 1 else contextlib.nullcontext():
        fabric.barrier()


def shares_of_all(fabric: Fabric, value: T) -> list[T]:
    """The picklable value of every process once it has done its share of the shards. A collective.

    Process 0 tells that it waits; where another does, process 0 shows how far it is.
    """
    last = fabric.world_size - 1
    whose = "that of process 1" if last == 1 else f"those of processes 1 to {last}"
    what = f"process 0 has done its share of the shards and waits for {whose}"
    with waiting(what) if fabric.global_rank == 0 and last else contextlib.nullcontext():
        return gathered(fabric, value)
