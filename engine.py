"""Where a run computes: Lightning Fabric from an ``engine`` configuration group."""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from omegaconf import DictConfig

from .errors import ConfigError


def launch(engine: DictConfig, *, exact: str | None = None) -> Fabric:
    """Fabric for this process, joined with those that torchrun or Slurm started beside it.

    Args:
        engine: the configuration group. Under torchrun and Slurm its default of one device means
            one for each process that they started.
        exact: a precision that must be kept, whatever `engine` says.

    Raises:
        ConfigError: this machine has no such accelerator or not so many devices, an option has a
            value that Fabric does not know, or several devices were asked of a single process.
    """
    devices, nodes = engine.devices, engine.num_nodes
    if devices == 1:
        if TorchElasticEnvironment.detect():
            devices = int(os.environ["LOCAL_WORLD_SIZE"])
            nodes = int(os.environ["WORLD_SIZE"]) // devices
        elif SLURMEnvironment.detect() and "SLURM_NTASKS_PER_NODE" in os.environ:
            devices = int(os.environ["SLURM_NTASKS_PER_NODE"])
            nodes = int(os.environ["SLURM_NNODES"])
    try:
        fabric = Fabric(
            accelerator=engine.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=engine.strategy,
            precision=exact or precision(engine),  # type: ignore[arg-type]
        )
    except Exception as error:  # Fabric raises several kinds for a value that it cannot use
        line = str(error).strip().splitlines()[0]
        raise ConfigError(f"engine: {line}") from error
    cluster = getattr(fabric.strategy, "cluster_environment", None)
    if fabric.world_size > 1 and cluster is not None and not cluster.creates_processes_externally:
        raise ConfigError(
            f"engine.devices={engine.devices}: several processes are started by torchrun "
            f"--nproc-per-node={fabric.world_size} -m preceptor.cli ... (or by Slurm)"
        )
    fabric.launch()
    if fabric.world_size > 1:
        atexit.register(_leave)
    return fabric


def _leave() -> None:
    """Take leave of the other processes. Fabric does where NCCL joins them; gloo's threads, if they
    are left running, now and then abort a process that has done all its work."""
    group = torch.distributed
    if group.is_initialized() and group.get_backend() == "gloo":
        group.destroy_process_group()


def precision(engine: DictConfig) -> Any:
    """The precision that ``auto`` stands for: bfloat16 autocast on CUDA, float32 elsewhere."""
    if engine.precision != "auto":
        return engine.precision
    cuda = engine.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    return "bf16-mixed" if cuda else "32-true"
