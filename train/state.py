"""The state of a run in a checkpoint: all that its rest depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..errors import counted
from .meter import Meter

METRICS = {"loss": -1, "knn": 1}
"""What ``keep.best`` may name, and whether more of it is better."""


def judged_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of a checkpoint the weights that ``keep.best`` judged it by: k-NN asks the average where
    there is one, the loss is of the weights that were trained."""
    average = state["average"] if state["best"].get("metric") == "knn" else None
    found: dict[str, Tensor] = average or state["module"]
    return found


@dataclass
class RunState:
    """What a run changes as it goes, beside its configuration and the store.

    The learning rate and the order of rows are functions of the step, so the step stands for them.

    Attributes:
        identity: what determines the run, see `check_same_run`.
        latest: scalars as they were last read.
        best: of the metric that ``keep.best`` names the best value, and the step it was seen at.
    """

    fabric: Fabric
    module: nn.Module
    optimizer: Any
    average: ModelEmaV3 | None
    meter: Meter
    identity: Mapping[str, Any]
    best: dict[str, Any] = field(default_factory=dict)
    latest: dict[str, float] = field(default_factory=dict)

    def improves(self, metric: str | None, latest: Mapping[str, float], step: int) -> bool:
        """Whether the metric is better than it ever was; then it is the best from now on."""
        if metric is None or metric not in latest:
            return False
        sign, value = METRICS[metric], latest[metric]
        if self.best.get("metric") == metric and sign * value <= sign * self.best["value"]:
            return False
        self.best = {"metric": metric, "value": value, "step": step}
        return True

    def collect(self, step: int, images: int, seconds: float) -> dict[str, Any]:
        """Everything, as plain containers and tensors; a collective call.

        Args:
            step: optimiser steps that are done.
            images: that all ranks have trained on.
            seconds: that it took, over all starts.
        """
        fabric = self.fabric
        window = self.meter.state()
        local = {
            "cpu": torch.get_rng_state(),
            "skipped": torch.tensor([self.meter.skipped]),
        }
        if window["batches"]:
            local["sums"] = window.pop("sums")
        if fabric.device.type == "cuda":
            local["cuda"] = torch.cuda.get_rng_state(fabric.device)
        world = fabric.world_size
        gathered = {
            name: cast(Tensor, fabric.all_gather(own.to(fabric.device))).cpu().view(world, -1)
            for name, own in local.items()
        }
        return {
            "step": step,
            "images": images,
            "seconds": seconds,
            "ranks": world,
            "module": self.module.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": fabric.strategy.precision.state_dict(),
            "window": {"names": window["names"], "batches": window["batches"]},
            "local": gathered,
            "best": dict(self.best),
            "latest": dict(self.latest),
            "identity": dict(self.identity),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `collect` gave; says so where the number of ranks has changed."""
        fabric = self.fabric
        self.module.load_state_dict(state["module"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        fabric.strategy.precision.load_state_dict(state["precision"])
        self.best = dict(state["best"])
        self.latest |= state["latest"]
        rank, local, window = fabric.global_rank, state["local"], state["window"]
        if state["ranks"] != fabric.world_size:
            fabric.print(
                f"warning: the checkpoint was written by {counted(state['ranks'], 'rank')} and "
                f"this run has {fabric.world_size}: the rest of the run is valid but not the same"
            )
            self.meter.skipped = 0 if rank else int(local["skipped"].sum())
            return
        self.meter.skipped = int(local["skipped"][rank])
        # Copies: PyTorch reads a view of a row from another place than the row.
        torch.set_rng_state(local["cpu"][rank].clone())
        if fabric.device.type == "cuda" and "cuda" in local:
            torch.cuda.set_rng_state(local["cuda"][rank].clone(), fabric.device)
        if window["batches"]:
            self.meter.restore(window["names"], window["batches"], local["sums"][rank])
