"""Stopping a run in good order: by a signal, or Ctrl-C once, and the command that goes on."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Iterable
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from lightning_fabric import Fabric
from torch import distributed

from ..options import readable

SIGNALS = (signal.SIGTERM, signal.SIGINT)
NOTICES = (signal.SIGUSR1, signal.SIGUSR2)
"""What Slurm sends some time before it ends a job (sbatch --signal; submitit has it send the second
one): they ask a run to stop, and never mean that it must stop at once."""


class FirstSignal:
    """While open, the first signal is noted; the second one acts as it did before. `NOTICES` are
    noted as long as it is open and do not count: the signal that Slurm ends a job with comes second
    to one, while the state may still be being saved.

    Outside the main thread signals cannot be handled, and none is noted.

    Attributes:
        asked: the signal that came.
    """

    def __init__(self, signals: Iterable[signal.Signals] = SIGNALS) -> None:
        self._signals = tuple(signals)
        self._before: dict[signal.Signals, Any] = {}
        self.asked: signal.Signals | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in self._signals}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release(self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        if number not in NOTICES:
            self._release(set(self._before) - set(NOTICES))

    def _release(self, signals: Iterable[signal.Signals]) -> None:
        for number in tuple(signals):
            signal.signal(number, self._before.pop(number))


class StopRequest(FirstSignal):
    """While open, the first of `SIGNALS` or `NOTICES` asks the run to stop after its step.

    Where several processes train together, all of them stop after the same step when any was asked.
    """

    def __init__(self, fabric: Fabric, patience: timedelta | None = None) -> None:
        """`patience`: how long a process waits for the others; None for the half hour of torch."""
        super().__init__((*SIGNALS, *NOTICES))
        self._group: Any = None
        if fabric.world_size > 1:
            # On the CPU, so that asking each other never waits for a device.
            self._group = distributed.new_group(backend="gloo", timeout=patience)

    def agreed(self) -> bool:
        """Whether any process of the run was asked to stop; call it on all after every step."""
        asked = self.asked is not None
        if self._group is not None:
            flag = torch.tensor(int(asked))
            distributed.all_reduce(flag, op=distributed.ReduceOp.MAX, group=self._group)
            asked = bool(flag)
        return asked


def continuing_command(world: int) -> str:
    """The command line that goes on with this run, as the user would type it."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return "train(config) with resume=true"
    hydra = HydraConfig.get()
    words = []
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            words += ["--config-dir", source.path]
    words += [_typed(word) for word in hydra.overrides.task if not word.startswith("resume=")]
    return f"{_launcher(world)} train {shlex.join(words)}"


def _typed(option: str) -> str:
    """An option without the quotes that the command line adds by itself."""
    key, _, value = option.partition("=")
    bare = f"{key}={value[1:-1]}"
    return bare if readable([bare]) == [option] else option


def _launcher(world: int) -> str:
    if world == 1:
        return "preceptor"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return "srun preceptor"
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = f" --nnodes={world // local}" if world > local else ""
    return f"torchrun{nodes} --nproc-per-node={local} -m preceptor"
