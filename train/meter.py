"""What the loop watches while it runs: finite losses, their means, and where the time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor

from ..errors import TrainingError
from .alignment import AlignmentOutput
from .data import TrainBatch


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

    def check(self, saved: int | None, checkpoint: Path) -> None:
        """Raises TrainingError when a loss was not finite."""
        if int(self.first) < 0 or self.values is None:
            return
        finite = self.values.isfinite().tolist()[1:]
        bad = [name for name, good in zip(self.names, finite, strict=True) if not good]
        kept = "there is no earlier checkpoint"
        if saved is not None:
            kept = f"the last good checkpoint is {checkpoint} (step {saved})"
        raise TrainingError(
            f"the loss is not finite at step {int(self.first)} (spaces: "
            f"{', '.join(bad) or 'none alone, only their sum'}); {kept}; lower recipe.lr or "
            "recipe.clip and start again"
        )


class Meter:
    """Sums of losses since the last reading, and where the time of the run went."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._start = self._last = time.perf_counter()
        self._waited = 0.0
        self._sums: dict[str, Tensor] = {}
        self._batches = self._images_read = 0
        self.images = 0

    def timed(self, batches: Iterator[TrainBatch]) -> TrainBatch:
        """The next batch; the time until it is there counts as waiting."""
        before = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - before
        return batch

    def count(self, output: AlignmentOutput, images: int) -> None:
        for name, value in (
            ("loss", output.loss.detach()),
            *((f"loss/{space}", value) for space, value in output.losses.items()),
        ):
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._batches += 1
        self.images += images

    def read(self) -> dict[str, float]:
        """Mean losses over all ranks and images a second since the last reading."""
        local = torch.stack(list(self._sums.values())) / self._batches
        means = cast(Tensor, self._fabric.all_reduce(local, reduce_op="mean"))
        scalars = dict(zip(self._sums, means.tolist(), strict=True))
        now = time.perf_counter()
        fresh = (self.images - self._images_read) * self._fabric.world_size
        scalars["images_per_second"] = fresh / (now - self._last)
        scalars["wait_share"] = self.wait_share
        self._sums, self._batches, self._last, self._images_read = {}, 0, now, self.images
        return scalars

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def wait_share(self) -> float:
        """Part of the time that the loop stood still for data (an upper bound on CUDA)."""
        return self._waited / self.seconds
