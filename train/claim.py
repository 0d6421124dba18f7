"""A folder that one process works in at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lightning_fabric import Fabric

from ..cache.manifest import MANIFEST
from ..errors import ConfigError

NAME = ".claim"
"""The file that is locked while a process works in its folder, and says which does."""
_open: set[int] = set()
"""Files of the folders that are this process's."""


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[str | None]:
    """Work in a folder alone; it is free again when the process ends, however it does.

    The folder is made where it is not there. A file system without locks keeps nobody out; over NFS
    the machines see each other's where it has locks.

    Yields:
        None, or who works in it already: then it is not this process's.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """
    made = not folder.exists()
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd, other = _locked(path)
    except OSError as error:
        why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ConfigError(f"{folder} cannot be written to: {why}") from error
    if other is not None:
        os.close(fd)
        yield other
        return
    _open.add(fd)
    try:
        with contextlib.suppress(OSError):  # a full disk: it is locked all the same
            os.ftruncate(fd, 0)
            os.pwrite(fd, _ourselves().encode(), 0)
        yield None
    finally:
        path.unlink(missing_ok=True)  # while it is locked: who comes next makes another
        if made:
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()
        _open.discard(fd)
        os.close(fd)


def holder(folder: Path) -> str | None:
    """Who works in a folder, if anybody does."""
    try:
        fd = os.open(folder / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # nobody does
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _said(fd)
    except OSError:  # no locks here
        return None
    finally:
        os.close(fd)
    return None  # its process was killed


@contextlib.contextmanager
def training_alone(fabric: Fabric, folder: Path) -> Iterator[None]:
    """Have all processes of a run refuse a folder that another run is being trained in.

    Raises:
        ConfigError: one is, or it is a store; or as `claimed`.
    """
    with contextlib.ExitStack() as stack:
        found: str | ConfigError | None = None
        if fabric.global_rank == 0:
            try:
                if (folder / MANIFEST).exists():
                    raise ConfigError(
                        f"{folder} is a store of targets ({MANIFEST} is there), no place for a "
                        "run: choose another out=..."
                    )
                found = stack.enter_context(claimed(folder))
                if found is not None:
                    found = ConfigError(
                        f"{folder} is being worked in by {found}: wait for it or stop it, or "
                        "choose another out=..."
                    )
            except ConfigError as error:
                found = error
        found = fabric.broadcast(found)
        if isinstance(found, ConfigError):
            raise found
        yield


def _locked(path: Path) -> tuple[int, str | None]:
    """The file, open, and None where it is locked now, or what the process that has it says."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return fd, _said(fd)
        except OSError:  # no locks here
            return fd, None
        if os.fstat(fd).st_nlink:  # not removed between opening and locking
            return fd, None
        os.close(fd)


def _said(fd: int) -> str:
    return os.pread(fd, 1000, 0).decode(errors="replace") or "another process"


def _close_in_child() -> None:
    """A lock lasts until all that inherited it have ended, and workers outlive a killed run."""
    while _open:
        os.close(_open.pop())


os.register_at_fork(after_in_child=_close_in_child)


def _ourselves() -> str:
    array, task, job = (
        os.environ.get(f"SLURM_{name}") for name in ("ARRAY_JOB_ID", "ARRAY_TASK_ID", "JOB_ID")
    )
    job = f"{array}_{task}" if array and task else job
    of_slurm = f", Slurm's job {job}" if job else ""
    return f"process {os.getpid()} on {socket.gethostname()}{of_slurm}"
