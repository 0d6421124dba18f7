"""Files that are whole or absent: written aside, synced, read back, renamed into place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import StoreError
from .waiting import waiting

TEMPORARY = ".tmp"
_BLOCK = 8 << 20
_NO_SUCH_CALL = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # by a file system that lacks it


def make_directory(path: Path) -> None:
    """Make a directory and those above it; their names are durable.

    Raises:
        StoreError: it cannot be made.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        raise StoreError(f"{path} cannot be made: {error.strerror}") from error


def remove_directory(path: Path) -> None:
    """Remove a directory with all that is in it, or a link to one; nothing where it is not there.

    Raises:
        StoreError: something of it cannot be removed.
    """
    try:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StoreError(f"{path} cannot be removed: {error.strerror}") from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable.

    Some file systems sync no directories and say so. That is let pass: a power cut may then take
    names away, and a shard of which one is gone counts as pending.

    Raises:
        StoreError: the device fails.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in _NO_SUCH_CALL:
            raise StoreError(f"{path} cannot be synced: {error.strerror}") from error


@contextlib.contextmanager
def directory_lock(path: Path) -> Iterator[None]:
    """Hold the directory's advisory lock; released by the kernel when the process dies.

    NFS locks directories among the processes of one machine alone. What two machines can then
    still do to one shard, the hashes in its record tell.

    Raises:
        StoreError: it is not there, or the file system has no locks.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise StoreError(f"{path} cannot be locked: {error.strerror}") from error
    try:
        _lock(fd, path)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, path: Path) -> None:
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with waiting(f"waiting for another process that holds {path}"):
                fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be locked ({error.strerror}), and without locks two writers could mix "
            "their files: mount the file system with locks (Lustre: flock), or write to another"
        ) from error


class Staged:
    """A file written beside its final name, not yet visible under it.

    The temporary file is locked while its writer lives, so that :func:`remove_torn` never takes
    the file of a running process for the leftover of a dead one.

    Attributes:
        final: the name that :meth:`publish` gives it.
        bytes: its length.
        sha256: hex digest of what was handed over (not of what the disk holds: see verify).
    """

    def __init__(self, final: Path, buffers: Iterable[Any]) -> None:
        self.final = final
        self.bytes = 0
        self._fd, self._path = _create_locked(final)
        hashed = hashlib.sha256()
        try:
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                hashed.update(view)
                self.bytes += len(view)
                while view:
                    view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
        except BaseException as error:
            self.discard()
            if isinstance(error, OSError):
                raise StoreError(
                    f"writing {final} failed: {error.strerror}; nothing was committed"
                ) from error
            raise
        self.sha256 = hashed.hexdigest()

    def verify(self) -> None:
        """Read the file back from the device and compare.

        Raises:
            StoreError: when what is read differs from what was written.
        """
        if hasattr(os, "posix_fadvise"):  # so that the disk answers, not the page cache
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            same = file_sha256(self._path) == self.sha256
        except OSError as error:
            self.discard()
            raise StoreError(f"{self.final} cannot be read back: {error.strerror}") from error
        if not same:
            self.discard()
            raise StoreError(f"{self.final}: the disk gave back other bytes than were written")

    def publish(self) -> None:
        """Rename to the final name; the caller syncs the directory.

        Raises:
            StoreError: the file system refuses.
        """
        try:
            os.replace(self._path, self.final)
        except OSError as error:
            raise StoreError(f"{self.final} cannot be replaced: {error.strerror}") from error
        self._close()

    def discard(self) -> None:
        """Remove the temporary file, unless it was published or discarded before."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        self._close()

    def _close(self) -> None:
        """Once: the number may by now be that of another thread's file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _create_locked(final: Path) -> tuple[int, Path]:
    while True:
        path = final.with_name(f".{final.name}.{secrets.token_hex(8)}{TEMPORARY}")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(
                f"writing {final} failed: {error.strerror}; nothing was committed"
            ) from error
        try:
            _lock(fd, path)
        except StoreError:
            path.unlink(missing_ok=True)
            os.close(fd)
            raise
        if os.fstat(fd).st_nlink:  # not removed between creation and lock
            return fd, path
        os.close(fd)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file, read in blocks."""
    hashed = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            hashed.update(block)
    return hashed.hexdigest()


def read_whole(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        FileNotFoundError, NotADirectoryError: it is not there.
        StoreError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error


def file_sizes(root: Path) -> dict[str, int]:
    """Length of every file below a directory, by path within it; not of those that a writer at work
    renames or removes meanwhile."""
    found = {}
    for directory, _, names in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)
            with contextlib.suppress(FileNotFoundError):
                found[os.path.relpath(path, root)] = os.stat(path).st_size
    return found


def holds(path: Path, raw: bytes) -> bool:
    """Whether a file is there, can be read, and holds these bytes."""
    try:
        return path.read_bytes() == raw
    except OSError:
        return False


def write_whole(path: Path, raw: bytes | memoryview) -> None:
    """Replace a file atomically and durably.

    Raises:
        StoreError: it cannot be written, or the device fails; no temporary file is left.
    """
    write_whole_of(path, [raw])


def write_whole_of(path: Path, buffers: Iterable[Any]) -> None:
    """As `write_whole`, of the buffers one after the other.

    Raises:
        StoreError: it cannot be written, or the device fails; no temporary file is left.
    """
    staged = Staged(path, buffers)
    try:
        staged.verify()
        staged.publish()
    finally:
        staged.discard()
    sync_directory(path.parent)


def remove_torn(root: Path) -> int:
    """Remove the temporary files below a directory of writers that died; returns how many."""
    removed = 0
    for directory, _, names in os.walk(root):
        for name in names:
            if not (name.startswith(".") and name.endswith(TEMPORARY)):
                continue
            path = Path(directory, name)
            try:
                fd = os.open(path, os.O_RDWR)  # NFS locks only what is open for writing
            except OSError:
                continue  # gone meanwhile, or another user's
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                removed += 1
            except OSError:
                pass  # its writer lives, or nothing can be removed here
            finally:
                os.close(fd)
    return removed
