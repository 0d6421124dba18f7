"""What the loop watches while it runs: finite losses, their means, and where the time goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ..errors import TrainingError
from .alignment import AlignmentOutput
from .batch import TrainBatch
from .checkpoint import Checkpoints


class FiniteWatch:
    """Finds the first step whose loss is not finite, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self.first = torch.full((), -1, dtype=torch.long, device=device)
        self.names: list[str] = []
        self.values: Tensor | None = None

    def see(self, step: int, output: AlignmentOutput) -> None:
        losses = torch.stack([output.loss.detach(), *output.losses.values()])
        new = (self.first < 0) & ~losses.isfinite().all()
        self.first = torch.where(new, step, self.first)
        self.names = list(output.losses)
        self.values = losses if self.values is None else torch.where(new, losses, self.values)

    def check(self, checkpoints: Checkpoints) -> None:
        """Raises TrainingError when a loss was not finite; says what there is to go on from."""
        if int(self.first) < 0 or self.values is None:
            return
        finite = self.values.isfinite().tolist()[1:]
        bad = [name for name, good in zip(self.names, finite, strict=True) if not good]
        raise TrainingError(
            f"the loss is not finite at step {int(self.first)} (spaces: "
            f"{', '.join(bad) or 'none alone, only their sum'}); {checkpoints.kept()}; lower "
            "recipe.lr or recipe.clip and start again"
        )

    @staticmethod
    def check_weights(module: nn.Module, step: int, checkpoints: Checkpoints) -> None:
        """Raises TrainingError where the weights are not finite: a gradient was not, of a loss that
        was, and a checkpoint of them would take the place of a sound one."""
        finite = [value.detach().isfinite().all() for value in module.parameters()]
        if bool(torch.stack(finite).all()):
            return
        bad = [name for name, value in module.named_parameters() if not value.isfinite().all()]
        raise TrainingError(
            f"the weights are not finite after step {step} ({', '.join(bad[:3])}"
            f"{', ...' if len(bad) > 3 else ''}); {checkpoints.kept()}; lower recipe.lr or "
            "recipe.clip and start again"
        )


class Meter:
    """Sums of losses since the last reading, and where the time of the run went.

    Attributes:
        images: that this rank has trained on since the meter began.
        skipped: damaged rows of this rank whose place another took, since the run began.

    Args:
        skips: count such rows over all ranks.
    """

    def __init__(self, fabric: Fabric, skips: bool = False) -> None:
        self._fabric, self._skips = fabric, skips
        self._told: set[str] = set()
        self.skipped = 0
        self._start = self._read_at = time.perf_counter()
        self._waited = self._waited_before = 0.0
        self._sums: dict[str, Tensor] = {}
        self._batches = self._timed = self._images_before = 0
        self.images = 0

    def timed(self, batches: Iterator[TrainBatch]) -> TrainBatch:
        """The next batch; the time until it is there counts as waiting."""
        before = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - before
        self._timed += 1
        return batch

    def count(self, output: AlignmentOutput, batch: TrainBatch) -> None:
        """Take note of a step; what is wrong with its damaged rows is told once a sentence."""
        for name, value in (
            ("loss", output.loss.detach()),
            *((f"loss/{space}", value) for space, value in output.losses.items()),
        ):
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._batches += 1
        self.images += len(batch.rows)
        self.skipped += len(batch.skipped)
        for sentence in dict.fromkeys(batch.skipped):
            if sentence not in self._told:
                self._told.add(sentence)
                print(f"warning: skipped: {sentence}", file=sys.stderr, flush=True)

    def read(self) -> dict[str, float]:
        """Means over all ranks since the last reading: losses, speed, and seconds a step.

        ``seconds/wait`` is the time that a batch was waited for (an upper bound on CUDA, where a
        device may still be at work) and ``seconds/compute`` all the rest, both a batch.
        """
        local = torch.stack(list(self._sums.values())) / self._batches
        means = cast(Tensor, self._fabric.all_reduce(local, reduce_op="mean"))
        scalars = dict(zip(self._sums, means.tolist(), strict=True))
        now = time.perf_counter()
        passed, waited = now - self._read_at, self._waited - self._waited_before
        images = (self.images - self._images_before) * self._fabric.world_size
        scalars |= {
            "images_per_second": images / passed,
            "wait_share": waited / passed,
            "seconds/wait": waited / self._timed,
            "seconds/compute": (passed - waited) / self._timed,
        }
        if self._skips:
            scalars["rows_skipped"] = self._skipped_everywhere()
        self._sums, self._batches, self._timed = {}, 0, 0
        self._read_at, self._waited_before, self._images_before = now, self._waited, self.images
        return scalars

    def _skipped_everywhere(self) -> float:
        own = torch.tensor(float(self.skipped), device=self._fabric.device)
        return float(cast(Tensor, self._fabric.all_reduce(own, reduce_op="sum")))

    def state(self) -> dict[str, Any]:
        """The sums of the window that is open, for a checkpoint; of this rank."""
        sums = torch.stack(list(self._sums.values())) if self._sums else torch.zeros(0)
        return {"names": list(self._sums), "batches": self._batches, "sums": sums}

    def restore(self, names: list[str], batches: int, sums: Tensor) -> None:
        """Open the window that `state` described."""
        values = sums.to(self._fabric.device)
        self._sums = dict(zip(names, values, strict=True))
        self._batches = batches

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def wait_share(self) -> float:
        """Part of all the time that the loop stood still for data (an upper bound on CUDA)."""
        return self._waited / self.seconds
