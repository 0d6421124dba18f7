"""Tar shards in object storage or behind a web server, read by ranges."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import IO
from urllib.parse import unquote

from ..errors import DataError, StoreError
from . import tars
from .remote import RemoteSource
from .tars import TarShard

PARALLEL = RemoteSource.parallel
"""How many reads at a time serve remote shards well."""
_WALK = 2 << 20
"""Bytes of one request while a shard is walked: some images, and the headers between. A request has
half a minute, in which slow links must bring that of `PARALLEL`."""


@lru_cache(maxsize=64)
def _folder(address: str) -> RemoteSource:
    return RemoteSource(address)


@dataclass
class RemoteTarShard(TarShard):
    """A shard at ``s3://``, ``gs://``, ``az://`` or ``http(s)://``.

    Credentials, region and endpoint come from the usual environment variables. What is read is of
    the version that was listed, where the server names versions, as buckets do; elsewhere nobody
    notices that a shard is replaced while a command runs.

    Attributes:
        tag: the name of that version (ETag).
    """

    tag: str | None = None

    @classmethod
    def at(cls, path: str) -> RemoteTarShard:
        """The shard at that address.

        Raises:
            DataError: it cannot be read, or is empty.
        """
        source, name = _source(path)
        try:
            facts = source.facts(name)
            head = source.read_range(name, 0, min(facts.size, 6), facts.tag) if facts.size else b""
        except (FileNotFoundError, StoreError) as error:
            raise _unread(path, error) from error
        packed = tars.compression(path, head)
        # A version that the server does not tell in any way may be a new one every time.
        modified = facts.modified if facts.tag or facts.modified > 0 else time.time_ns()
        return cls(path, facts.size, modified, packed, tag=facts.tag)

    @property
    def place(self) -> bytes:
        return self.path.encode()

    @property
    def version(self) -> bytes:
        return super().version + b"\0" + (self.tag or "").encode()

    def open(self) -> IO[bytes]:
        return io.BufferedReader(_Ranges(self), _WALK)

    def _read(self, offset: int, size: int) -> bytes:
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        source, name = _source(self.path)
        try:
            return source.read_range(name, offset, size, self.tag)
        except (FileNotFoundError, StoreError) as error:
            raise _unread(self.path, error) from error


class _Ranges(io.RawIOBase):
    """A shard as a file: every read is a request."""

    def __init__(self, shard: RemoteTarShard) -> None:
        self._shard, self._at = shard, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._shard.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]  # what io passes
        found = self._shard._read(self._at, len(view))
        view[: len(found)] = found
        self._at += len(found)
        return len(found)


def _source(path: str) -> tuple[RemoteSource, str]:
    scheme, _, rest = path.partition("://")
    if scheme.startswith("http"):  # some hosts are buckets, whose names are in the path
        folder, _, name = path.rpartition("/")
        name = unquote(name)
    else:
        bucket, _, name = rest.partition("/")
        folder = f"{scheme}://{bucket}"
    try:
        return _folder(folder), name
    except StoreError as error:
        raise DataError(f"shard {error}") from error


def _unread(path: str, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"cannot read shard {path}: there is none; check data.shards")
    return DataError(f"shard {error}")  # which begins with the address
