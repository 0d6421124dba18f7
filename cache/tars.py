"""Tar shards: opened by name, unpacked where they are compressed, read by position.

Names expand and members are walked as WebDataset does it.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import resource
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import IO, Any

from ..errors import DataError, first_line
from .remote import SCHEMES

MAX_UNPACKED = 256 * 2**20
"""Largest total size of compressed shards after unpacking, in bytes; they are held in memory."""
OPEN_SHARDS = min(max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4), 4096)
"""Shards that stay open in a process: rows in permuted order come from all of them in turn."""

_COMPRESSED: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"BZh": bz2.open,
}
_BLOCK = tarfile.BLOCKSIZE
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_UNPACKING = threading.Lock()


class _Descriptor:
    """A file descriptor that closes when its last user lets go of it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=OPEN_SHARDS)
def _descriptor(path: str, size: int, modified: int) -> _Descriptor:
    # This cache holds no lock of Python's, so a fork at any moment leaves it usable; positioned
    # reads use no file offset, so parent and children may share the descriptor too.
    descriptor = _Descriptor(path)
    status = os.fstat(descriptor.number)
    if (status.st_size, status.st_mtime_ns) != (size, modified):
        raise DataError(f"shard {path} has changed since it was listed; run the command again")
    return descriptor


@dataclass
class TarShard:
    """One shard: its file, and its contents where they had to be unpacked.

    Attributes:
        path: its name.
        size: bytes of the file.
        modified: its time of change, in nanoseconds since 1970.
        packed: how it is compressed; None: it is not.
        samples: how many samples lie in it.
        plain: the unpacked bytes.
    """

    path: str
    size: int
    modified: int
    packed: bytes | None
    samples: int = 0
    plain: bytes | None = None

    what = "shard"

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def place(self) -> bytes:
        """Where it lies, whatever the working directory."""
        return os.fsencode(os.path.abspath(self.path))

    @property
    def version(self) -> bytes:
        """What is another when its bytes are others."""
        return b"%d\0%d" % (self.size, self.modified)

    @classmethod
    def at(cls, path: str) -> TarShard:
        """The shard of that name.

        Raises:
            DataError: it cannot be read, or is empty.
        """
        try:
            with open(path, "rb") as file:
                head = file.read(6)
                status = os.fstat(file.fileno())
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"cannot read shard {path}: {reason}; check data.shards") from error
        return cls(path, status.st_size, status.st_mtime_ns, compression(path, head))

    def open(self) -> IO[bytes]:
        """The file, to be walked from its beginning.

        Raises:
            DataError: it is gone.
        """
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise DataError(f"cannot read shard {self.path}: {error.strerror or error}") from error

    def unpack(self, limit: int) -> bytes:
        """The archive without its compression.

        Raises:
            DataError: it is damaged, or longer than ``limit`` bytes.
        """
        try:
            with self.open() as packed, _COMPRESSED[self.packed or b""](packed, "rb") as file:
                plain: bytes = file.read(limit + 1)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"shard {self.path} cannot be unpacked: {error}") from error
        if len(plain) > limit:
            raise DataError(
                f"shard {self.path} brings the compressed shards over {MAX_UNPACKED:,} bytes "
                "unpacked, and they are held in memory; unpack large shards to plain .tar files"
            )
        return plain

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the archive; fewer where it ends.

        Raises:
            DataError: the file is gone or has changed.
        """
        if self.packed is not None:
            with _UNPACKING:  # of a worker's threads the first one alone
                if self.plain is None:  # after unpickling in a worker process
                    self.plain = self.unpack(MAX_UNPACKED)
            return self.plain[offset : offset + size]
        return self._read(offset, size)

    def _read(self, offset: int, size: int) -> bytes:
        try:
            descriptor = _descriptor(self.path, self.size, self.modified)
            return _read_all(descriptor.number, offset, size)
        except OSError as error:
            raise DataError(f"cannot read shard {self.path}: {error.strerror or error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plain": None}


def compression(path: str, head: bytes) -> bytes | None:
    """How a shard is compressed that begins with these six bytes; None: it is not.

    Raises:
        DataError: there are none.
    """
    if not head:
        raise DataError(f"shard {path} is empty (0 bytes); fetch or write it again")
    return next((magic for magic in _COMPRESSED if head.startswith(magic)), None)


def _read_all(descriptor: int, offset: int, size: int) -> bytes:
    pieces = []
    while size:  # one read returns at most 2 GiB, and less over some network file systems
        piece = os.pread(descriptor, size, offset)
        if not piece:
            break
        pieces.append(piece)
        offset += len(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def expand_shards(
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> list[str]:
    """Names of shards: WebDataset's own brace expansion, then of local ones ``*`` and ``?``, in
    name order.

    Raises:
        DataError: nothing was named, the braces do not match, or a name is neither a local path nor
            an address that can be read.
    """
    from webdataset.shardlists import expand_urls  # imports torch

    given = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
    paths: list[str] = []
    for item in given:
        if isinstance(item, Path):  # a path is meant as it stands
            paths.append(str(item))
            continue
        try:
            expanded = expand_urls(os.fspath(item))
        except Exception as error:
            raise DataError(f"shards {item!r} cannot be expanded: {error}") from error
        for path in expanded:
            if is_remote(path):
                _refuse_address(path)
                paths.append(path)
                continue
            matches = sorted(glob(path)) if any(c in path for c in "*?") else [path]
            if not matches:
                raise DataError(f"no shard matches {path!r}; check data.shards")
            paths.extend(matches)
    if not any(paths):
        raise DataError("no shard is named; set data.shards, for example to 'x-{000..146}.tar'")
    for path in paths:
        scheme = path.split(":", 1)[0] if ":" in path and not is_remote(path) else ""
        if scheme and not os.path.exists(path) and scheme.isalnum():
            known = ", ".join(f"{name}://" for name in SCHEMES)
            raise DataError(
                f"shard {path!r} is neither a local file nor at an address that can be read "
                f"({known}); download or mount it first"
            )
    return paths


def names_of_tars(folder: str, files: Iterable[str]) -> str | None:
    """How ``data.shards`` names the tars of a folder, such as ``folder/train-{000..127}.tar``; None
    where it has none.

    Args:
        files: paths below the folder; of several folders those in the first one are named.
    """
    found = sorted(name for name in files if name.endswith(_TARS))
    if not found:
        return None
    within = os.path.dirname(found[0])
    own = [os.path.basename(name) for name in found if os.path.dirname(name) == within]
    place = os.path.join(folder, within, "") if within else os.path.join(folder, "")
    if len(own) == 1:
        return place + own[0]
    numbered = [re.fullmatch(r"(.*?)(\d+)(\.[a-z.]+)", name) for name in own]
    parts = [match.groups() for match in numbered if match]
    if len(parts) == len(own) and len({(before, after) for before, _, after in parts}) == 1:
        (before, first, after), last = parts[0], parts[-1][1]
        run = [f"{int(first) + step:0{len(first)}}" for step in range(len(own))]
        if [number for _, number, _ in parts] == run:
            return f"{place}{before}{{{first}..{last}}}{after}"
    kinds = sorted({next(kind for kind in _TARS if name.endswith(kind)) for name in own})
    return f"{place}*{kinds[0]}"


def _refuse_address(path: str) -> None:
    if path.startswith("http") and any(character in path for character in "?#"):
        raise DataError(f"shard {path!r}: addresses with ? or # cannot be read")
    if any(character in path for character in "*?"):
        raise DataError(
            f"shard {path!r}: shards at an address are named one by one or by braces, such as "
            "train-{000..146}.tar; * and ? are for local files"
        )
    if path.endswith("/") or path.count("/") < 3:
        raise DataError(f"shard {path!r} is no file: name the tars in it, by braces")


def is_remote(path: str) -> bool:
    """Whether a name is an address in object storage or of a web server."""
    scheme, found, _ = path.partition("://")
    return bool(found) and scheme in SCHEMES


@dataclass(frozen=True)
class Passed:
    """Members of tars that are passed by, since they are links or no regular files.

    Attributes:
        count: how many.
        first: name of the first one.
    """

    count: int = 0
    first: str = ""

    def and_then(self, later: Passed) -> Passed:
        """Those of both."""
        return Passed(self.count + later.count, self.first if self.count else later.first)


NOTHING_PASSED = Passed()


def members(
    path: str, file: IO[bytes], passed: Callable[[Passed], object] | None = None
) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, kind, header) of the members that WebDataset would read, in their order.

    Args:
        passed: told of every member that is neither a regular file nor a folder.
    """
    from webdataset.tariterators import base_plus_ext  # imports torch

    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else millions of headers stay
                if _is_metadata(member.name) or member.isdir():
                    continue
                if not member.isreg():
                    if passed is not None:
                        passed(Passed(1, member.name))
                    continue
                if member.issparse():
                    raise DataError(f"member {member.name!r} of shard {path} is stored sparse")
                key, kind = base_plus_ext(member.name)
                if key is not None:
                    yield key, kind.lower(), member
            end = tar.offset
    except InterruptedError:  # the reader's own: nobody waits for the list any more
        raise
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror or error}") from error
    # A header may state a size that no memory holds, or stand before thousands of its kind.
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise DataError(f"shard {path} is damaged or no tar file: {first_line(error)}") from error
    # tarfile takes a file that stops between two members, or a header it cannot read, for the end.
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise DataError(
            f"shard {path} is cut short or damaged at byte {end}: no end-of-archive block there; "
            "fetch it again"
        )
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise DataError(
                f"shard {path} goes on after its end at byte {end}, as archives that were joined "
                "by cat do: name them one by one, or join them with tar -A"
            )


def _is_metadata(name: str) -> bool:
    """WebDataset keeps names such as ``__meta__/...`` for itself."""
    first = name.split("/", 1)[0]
    return len(first) >= 4 and first.startswith("__") and first.endswith("__")
