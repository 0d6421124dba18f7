"""Where a run computes: Lightning Fabric from an ``engine`` configuration group."""

from __future__ import annotations

from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig

from ..errors import ConfigError


def launch(engine: DictConfig) -> Fabric:
    """Start the processes that the group asks for (or join those of torchrun).

    Raises:
        ConfigError: this machine has no such accelerator or not so many devices, or an option has a
            value that Fabric does not know.
    """
    try:
        fabric = Fabric(
            accelerator=engine.accelerator,
            devices=engine.devices,
            num_nodes=engine.num_nodes,
            strategy=engine.strategy,
            precision=precision(engine),
        )
    except Exception as error:  # Fabric raises several kinds for a value that it cannot use
        line = str(error).strip().splitlines()[0]
        raise ConfigError(f"engine: {line}") from error
    fabric.launch()
    return fabric


def precision(engine: DictConfig) -> Any:
    """The precision that ``auto`` stands for: bfloat16 autocast on CUDA, float32 elsewhere."""
    if engine.precision != "auto":
        return engine.precision
    cuda = engine.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    return "bf16-mixed" if cuda else "32-true"
