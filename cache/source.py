"""Positioned reads of a local store's files."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..errors import StoreError
from .sharding import crc32c

T = TypeVar("T")

OPEN_FILES = min(max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4), 4096)
"""Files of stores that stay open in a process, of all stores together."""
_NUMBERS = itertools.count()
_VECTOR = 1000  # below the IOV_MAX of Linux and macOS
_PIECE = 800 << 10  # what was read is still in the core's own cache when it is summed


def too_many_open(error: OSError) -> StoreError | None:
    """What to tell of a file that is not opened since too many are, which says nothing of the file;
    None for another error."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    return StoreError(
        f"{error.filename}: this process has as many files open as it may have; raise its limit "
        "(ulimit -n), or close what else it holds"
    )


def _summed(buffers: Sequence[np.ndarray], value: int) -> int:
    """CRC-32C of bytes that lie in several buffers, continuing ``value``."""
    for buffer in buffers:
        value = crc32c(buffer, value)
    return value


class Source(ABC):
    """Where a store's files come from. All methods may be called from several threads.

    Attributes:
        location: what the user called it.
        parallel: how many reads at a time serve it well.
    """

    location: str
    parallel: int = 2

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: it does not exist.
            StoreError: it cannot be read.
        """

    def read_or_none(self, name: str) -> bytes | None:
        """A whole file, or None when it does not exist."""
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def read_many(self, names: Iterable[str]) -> list[bytes | None]:
        """Whole files; None for those that do not exist."""
        return [self.read_or_none(name) for name in names]

    @abstractmethod
    def read_into(self, name: str, offset: int, buffers: Sequence[Any]) -> int:
        """Fill writable byte buffers, in order, from one position on; returns the bytes read.

        Args:
            buffers: bytearrays, or uint8 arrays of one contiguous axis.

        Fewer than asked means that the file ends there. Raises FileNotFoundError, or OSError where
        the device fails.
        """

    def read_summed(
        self, name: str, offset: int, buffers: Sequence[np.ndarray], tail: bytearray
    ) -> tuple[int, int]:
        """As ``read_into`` of the buffers and then the tail; also the CRC-32C of the buffers.

        Buffers have one length; two that are ``at_once`` or more apart may be the same memory.
        """
        got = self.read_into(name, offset, [*buffers, tail])
        return got, _summed(buffers, 0)

    def at_once(self, length: int) -> int:
        """How many buffers of a length ``read_summed`` fills before it sums them."""
        return 1 << 62

    @abstractmethod
    def sizes(self, directory: str) -> dict[str, int] | None:
        """Length by name of the files in a directory; None where that cannot be listed."""


class _File:
    """An open file; closed when the last thread that uses it lets go."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


@lru_cache(maxsize=OPEN_FILES)
def _opened(source: int, path: str) -> _File:
    # This cache holds no lock of Python's, so a fork at any moment leaves it usable.
    return _File(path)


class LocalSource(Source):
    """Files below a directory; those of all such sources that were used last stay open.

    Files are read, not mapped: a mapped file that is cut short, or whose device fails, kills the
    process where a read only fails.
    """

    def __init__(self, root: str | Path) -> None:
        self.location = str(root)
        self._root = str(root)
        self._number = next(_NUMBERS)
        self._keeps = False

    def __getstate__(self) -> dict[str, str]:
        return {"root": self._root}

    def __setstate__(self, state: dict[str, str]) -> None:
        LocalSource.__init__(self, state["root"])

    def read(self, name: str) -> bytes:
        try:
            with self._room(lambda: open(f"{self._root}/{name}", "rb")) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(name) from None
        except OSError as error:
            raise StoreError(f"{self._root}/{name} cannot be read: {error.strerror}") from error

    def read_into(self, name: str, offset: int, buffers: Sequence[Any]) -> int:
        file = self._open(name)
        total = 0
        for start in range(0, len(buffers), _VECTOR):
            part = buffers[start : start + _VECTOR]
            done, wanted = self._fill(file.fd, offset + total, part)
            total += done
            if done < wanted:
                break
        return total

    def read_summed(
        self, name: str, offset: int, buffers: Sequence[np.ndarray], tail: bytearray
    ) -> tuple[int, int]:
        file = self._open(name)
        step = self.at_once(len(buffers[0]))
        total = value = 0
        for start in range(0, len(buffers), step):
            part = buffers[start : start + step]
            into = part if start + step < len(buffers) else [*part, tail]
            done, wanted = self._fill(file.fd, offset + total, into)
            total += done
            if done < wanted:
                break
            value = _summed(part, value)
        return total, value

    def at_once(self, length: int) -> int:
        return max(1, min(_VECTOR - 1, _PIECE // max(length, 1)))

    @staticmethod
    def _fill(fd: int, offset: int, buffers: Sequence[Any]) -> tuple[int, int]:
        wanted = sum(map(len, buffers))
        done = got = os.preadv(fd, buffers, offset)
        if done == wanted:
            return done, wanted
        views = [memoryview(buffer) for buffer in buffers]
        while got and done < wanted:  # a short read: go on in the middle of a buffer
            while got >= len(views[0]):
                got -= len(views.pop(0))
            views[0] = views[0][got:]
            got = os.preadv(fd, views, offset + done)
            done += got
        return done, wanted

    def sizes(self, directory: str) -> dict[str, int] | None:
        found: dict[str, int] = {}
        try:
            with os.scandir(f"{self._root}/{directory}") as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # a writer's, gone meanwhile
                        if entry.is_file():
                            found[entry.name] = entry.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise StoreError(
                f"{self._root}/{directory} cannot be listed: {error.strerror}"
            ) from error
        return found

    def _room(self, opens: Callable[[], T]) -> T:
        """What a function opens, if need be in place of what is kept open.

        Raises:
            StoreError: this process, or the system, may have no more files open.
        """
        for again in (True, False):
            try:
                return opens()
            except OSError as error:
                if (told := too_many_open(error)) is None:
                    raise
                if not again:
                    raise told from error
            _opened.cache_clear()
        raise AssertionError

    def _open(self, name: str) -> _File:
        if not self._keeps:  # files of a store that is let go of and deleted would hold their room
            self._keeps = True
            weakref.finalize(self, _opened.cache_clear).atexit = False
        return self._room(lambda: _opened(self._number, f"{self._root}/{name}"))


def local_path(location: str | Path, what: str) -> Path:
    """The directory of a store that is to be changed or read whole.

    Args:
        what: is to be done to it, for the message.

    Raises:
        StoreError: it lies elsewhere.
    """
    text = str(location)
    scheme, found, rest = text.partition("://")
    if not found:
        return Path(text)
    if scheme != "file":
        raise StoreError(
            f"{text} is remote, and {what} needs a local store: copy it here, or run it there"
        )
    return Path("/" + rest.lstrip("/"))


def open_source(location: str | Path, options: Mapping[str, Any] | None = None) -> Source:
    """The source of a store: a directory, or s3://, gs://, az://, http(s)://.

    Args:
        options: for remote stores, see ``remote.RemoteSource``.

    Raises:
        StoreError: a scheme that is not known, or an address that cannot be used.
    """
    text = str(location)
    scheme, found, _ = text.partition("://")
    if not found or scheme == "file":
        return LocalSource(local_path(text, "reading"))
    from .remote import SCHEMES, RemoteSource

    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise StoreError(f"{text}: a store is a directory or an address beginning with {known}")
    return RemoteSource(text, options)
