"""Where a run computes: Lightning Fabric from an ``engine`` configuration group."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from omegaconf import DictConfig

from .errors import ConfigError, first_line


@contextlib.contextmanager
def _by_version(package: str) -> Iterator[None]:
    """In this context the import of a package gives its version and nothing else."""
    known = package in sys.modules
    with contextlib.suppress(PackageNotFoundError):
        if not known:
            module = ModuleType(package)
            module.__version__ = version(package)  # type: ignore[attr-defined]
            sys.modules[package] = module
    try:
        yield
    finally:
        if not known:
            sys.modules.pop(package, None)


# Fabric asks for that version alone, and would import all of torchmetrics for it: 1.5 seconds.
with _by_version("torchmetrics"):
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from lightning_fabric.strategies import DDPStrategy

T = TypeVar("T")

MOST_WORKERS = 16
"""Processes that ``workers=auto`` starts at most."""
IN_POOL = "PRECEPTOR_IN_POOL"
"""Variable that a process of a pool sets for those that it starts."""


def launch(
    engine: DictConfig, *, exact: str | None = None, patience: timedelta | None = None
) -> Fabric:
    """Fabric for this process, joined with those that torchrun or Slurm started beside it.

    Args:
        engine: the configuration group. Under torchrun and Slurm its default of one device means
            one for each process that they started.
        exact: a precision that must be kept, whatever `engine` says.
        patience: how long a process waits for the others, where it is not the half hour of torch;
            of the strategies ``auto`` and ``ddp``.

    Raises:
        ConfigError: this machine has no such accelerator or not so many devices, an option has a
            value that Fabric does not know or that device cannot do, or several devices were asked
            of a single process.
    """
    devices, nodes = engine.devices, engine.num_nodes
    if devices == 1:
        if TorchElasticEnvironment.detect():
            devices = int(os.environ["LOCAL_WORLD_SIZE"])
            nodes = int(os.environ["WORLD_SIZE"]) // devices
        elif SLURMEnvironment.detect() and "SLURM_NTASKS_PER_NODE" in os.environ:
            devices = int(os.environ["SLURM_NTASKS_PER_NODE"])
            nodes = int(os.environ["SLURM_NNODES"])
    if engine.accelerator in ("cuda", "gpu") and not torch.cuda.is_available():
        built = (
            f"{torch.__version__} finds none here"
            if torch.version.cuda
            else f"{torch.__version__} was built without CUDA"
        )
        raise ConfigError(
            f"engine.accelerator={engine.accelerator}: there is no CUDA device to be used (torch "
            f"{built}); engine=auto takes what there is, engine=cpu the processor"
        )
    accelerator, used = engine.accelerator, exact or precision(engine)
    if accelerator == "auto":  # Fabric might choose MPS, which has no float64 for statistics
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cpu" and used == "16-mixed":  # Fabric would take bf16-mixed in its place
        raise ConfigError(
            "engine.precision=16-mixed: there is no such autocast on the processor; say "
            "engine.precision=bf16-mixed or 32-true"
        )
    parts: dict[str, Any] = {
        "accelerator": accelerator,
        "devices": devices,
        "num_nodes": nodes,
        "precision": used,
    }
    try:
        fabric = Fabric(strategy=engine.strategy, **parts)
        if patience is not None and fabric.world_size > 1 and engine.strategy in ("auto", "ddp"):
            fabric = Fabric(strategy=DDPStrategy(timeout=patience), **parts)
    except Exception as error:  # Fabric raises several kinds for a value that it cannot use
        raise ConfigError(f"engine: {first_line(error)}") from error
    cluster = getattr(fabric.strategy, "cluster_environment", None)
    if fabric.world_size > 1 and cluster is not None and not cluster.creates_processes_externally:
        asked = f"engine.devices={engine.devices}"
        if engine.num_nodes != 1:
            asked += f" engine.num_nodes={engine.num_nodes}"
        raise ConfigError(
            f"{asked}: several processes are started by torchrun "
            f"--nproc-per-node={fabric.world_size} -m preceptor ... (or by Slurm)"
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


def abandon(status: int) -> None:
    """End this process at once, where it has failed and others wait for it through NCCL.

    Leaving NCCL in good order waits for the others, who wait for this one's part of a collective:
    the run would hang until their patience ends, instead of being ended by torchrun or Slurm.
    """
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_backend() == "nccl":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def others_ended(error: BaseException) -> bool:
    """Whether an error is of a collective that another process of the run has left, by its end."""
    group = torch.distributed
    if not (group.is_available() and group.is_initialized() and isinstance(error, RuntimeError)):
        return False
    text = str(error)
    return any(sign in text for sign in ("by peer", "remote process exited", "Broken pipe"))


def lost_decoder(error: BaseException) -> str | None:
    """A sentence for an error by which torch says that a process that decodes images was killed or
    found no memory; None for others."""
    line = first_line(error)
    if isinstance(error, MemoryError):
        what = f"there is no memory left ({line})" if line else "there is no memory left"
    elif (
        isinstance(error, RuntimeError) and line.startswith("DataLoader worker (pid")
    ) or _while_handing_over(error):
        what = (
            f"a process that decodes images was ended from outside ({line.rstrip(' .')}), as a "
            "system does that has no memory left"
        )
    else:
        return None
    return f"{what}: say workers=N for fewer of them, or a smaller batch_size"


def _while_handing_over(error: BaseException) -> bool:
    """Whether a batch was being taken from a process that decodes images when it ended, which torch
    does not tell of in words of its own."""
    if not isinstance(error, EOFError | ConnectionError | FileNotFoundError):
        return False
    walked = traceback.walk_tb(error.__traceback__)
    rooms = {str(frame.f_globals.get("__name__")) for frame, _ in walked}
    ours = any(room.startswith("torch.utils.data.") for room in rooms)
    return ours and any(room.startswith("multiprocessing.") for room in rooms)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left for a tensor."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # What CUDA's libraries and the CPU's allocator raise is of no kind of its own.
    signs = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def not_compiled(error: BaseException) -> bool:
    """Whether an error is of `torch.compile`, whose modules take long to import."""
    own = ("torch._dynamo.", "torch._inductor.")
    return any(kind.__module__.startswith(own) for kind in type(error).__mro__)


def gathered(fabric: Fabric, value: T) -> list[T]:
    """The picklable value of every process, in the order of ranks; a collective call."""
    if fabric.world_size == 1:
        return [value]
    found: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(found, value)
    return cast("list[T]", found)


@contextlib.contextmanager
def one_first(
    fabric: Fabric,
    waits: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Iterator[None]:
    """Of the processes of each machine one runs the block before the others, who find what it has
    kept, if anything; they follow where it fails, too. A collective.

    Args:
        waits: makes a context for a process's waiting.
    """
    if fabric.local_rank > 0:
        with waits():
            fabric.barrier()
    try:
        yield
    finally:
        if fabric.local_rank == 0:
            with waits():
                fabric.barrier()


def refuse_several(verb: str, engine: DictConfig | None = None) -> None:
    """Raises ConfigError where torchrun started several processes of a command that takes one, or
    `engine`, its configuration group, asks for more than one device."""
    if engine is not None and (engine.devices != 1 or engine.num_nodes != 1):
        raise ConfigError(
            f"engine.devices={engine.devices}, engine.num_nodes={engine.num_nodes}: preceptor "
            f"{verb} works in one process, on one device: leave both at 1"
        )
    if TorchElasticEnvironment.detect() and int(os.environ["WORLD_SIZE"]) > 1:
        raise ConfigError(f"preceptor {verb} works in one process: start it without torchrun")


def in_pool() -> bool:
    """Whether this process is one of several that share the cores, such as a sweep's by joblib."""
    return multiprocessing.parent_process() is not None or IN_POOL in os.environ


def decoders(workers: Any) -> int:
    """How many processes the option ``workers`` asks for.

    ``auto`` is the cores that this process may use, shared with those that torchrun or Slurm
    started beside it on this machine: at least 1, at most `MOST_WORKERS`; and 2 `in_pool`.

    Raises:
        ConfigError: neither ``auto`` nor a whole number from 0 up.
    """
    if workers == "auto":
        if in_pool():
            return 2
        listed = getattr(os, "sched_getaffinity", None)  # not on macOS
        cores = len(listed(0)) if listed else os.cpu_count() or 1
        if TorchElasticEnvironment.detect():
            cores //= int(os.environ["LOCAL_WORLD_SIZE"])
        elif "SLURM_CPUS_PER_TASK" in os.environ:
            cores = min(cores, int(os.environ["SLURM_CPUS_PER_TASK"]))
        elif SLURMEnvironment.detect():
            cores //= int(os.environ.get("SLURM_NTASKS_PER_NODE", 1))
        return min(max(cores, 1), MOST_WORKERS)
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 0:
        raise ConfigError(f"workers={workers}: expected auto, or a whole number from 0 up")
    return workers


def precision(engine: DictConfig) -> Any:
    """The precision that ``auto`` stands for: bfloat16 autocast on CUDA, float32 elsewhere."""
    if engine.precision != "auto":
        return engine.precision
    cuda = engine.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    return "bf16-mixed" if cuda else "32-true"
