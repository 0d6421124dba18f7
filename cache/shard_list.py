"""What lies in a tar shard, by sample: its headers are walked once, and the list is kept.

A walk reads a header for every member: about a second of a core for 20,000 samples of three
members, in every process. So the list of a shard is kept in a folder of the user's, and holds until
the shard's size or time of change is another.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, PreceptorWarning
from . import tars
from .tars import NOTHING_PASSED, Passed, TarShard

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
MAX_LABEL_BYTES = 64
FOLDER = "PRECEPTOR_SHARD_LISTS"
"""Environment variable: where lists are kept; empty: nowhere."""
SETTLED = 10 * 10**9
"""Nanoseconds since a shard's last change after which its list is kept. What is written within one
tick of the file system's clock after the walk would otherwise go unnoticed."""
_VERSION = 2


@dataclass
class ShardList:
    """The samples of one shard, in its order.

    Attributes:
        keys: the key of each.
        labels: int64 [len], the class, or -1 where a sample has none.
        offsets, sizes: int64 [len], where its image lies in the archive.
        members: of further kinds, (offset, size) by sample; (0, -1) where it has none.
        passed: members of the archive that are no regular files.
    """

    keys: list[str]
    labels: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    members: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    passed: Passed = NOTHING_PASSED


class KeptLists:
    """Lists of shards in a folder of the user's, a file each. Processes may share it."""

    def __init__(self) -> None:
        self.folder = _user_folder()
        self._lock = threading.Lock()

    def get(self, shard: TarShard) -> ShardList | None:
        """The list of a shard; None where none is kept of the shard as it is, or it is damaged."""
        folder = self.folder
        if folder is None:
            return None
        try:
            # Checksums of the archive's members are compared as they are read.
            with np.load(self._file(folder, shard), allow_pickle=False) as found:
                if found["shard"].tobytes() != _identity(shard):
                    return None
                names = found["keys"].tobytes().decode("utf-8", "surrogateescape")
                keys = names.split("\0") if names else []
                columns = [found[name] for name in ("labels", "offsets", "sizes")]
                count, _, first = found["passed"].tobytes().partition(b"\0")
                passed = Passed(int(count), first.decode("utf-8", "surrogateescape"))
        except Exception:  # none is there, or damaged bytes: those raise anything at all
            return None
        if any(column.shape != (len(keys),) or column.dtype != np.int64 for column in columns):
            return None
        return ShardList(keys, columns[0], columns[1], columns[2], passed=passed)

    def keep(self, shard: TarShard, found: ShardList) -> None:
        """Keep the list of a shard that has not changed of late. Warns once where it cannot be."""
        folder = self.folder  # another thread may give it up
        if folder is None or time.time_ns() - shard.modified < SETTLED:
            return
        names = "\0".join(found.keys).encode("utf-8", "surrogateescape")
        packed = io.BytesIO()
        np.savez(
            packed,
            shard=np.frombuffer(_identity(shard), np.uint8),
            keys=np.frombuffer(names, np.uint8),
            labels=found.labels,
            offsets=found.offsets,
            sizes=found.sizes,
            passed=np.frombuffer(
                f"{found.passed.count}\0{found.passed.first}".encode("utf-8", "surrogateescape"),
                np.uint8,
            ),
        )
        try:
            self._write(self._file(folder, shard), packed.getbuffer())
        except OSError as error:
            with self._lock:
                given_up, self.folder = self.folder is None, None
            if not given_up:
                warnings.warn(
                    f"lists of shards cannot be kept in {folder} ({error.strerror or error}): "
                    f"every start reads the headers of all shards; set {FOLDER} to a folder that "
                    "can be written",
                    PreceptorWarning,
                    stacklevel=2,
                )

    @staticmethod
    def _file(folder: Path, shard: TarShard) -> Path:
        return folder / f"{hashlib.sha256(shard.place).hexdigest()[:32]}.npz"

    @staticmethod
    def _write(path: Path, data: memoryview) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, aside = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with open(number, "wb") as file:
                file.write(data)
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise


def list_shard(
    shard: TarShard,
    members: Sequence[str] = (),
    *,
    kept: KeptLists,
    given_up: threading.Event | None = None,
) -> ShardList:
    """The samples of a shard: as they are kept, or by walking its headers.

    Args:
        shard: unpacked, if it was compressed.
        members: further kinds whose places are wanted; lists with them are not kept.
        kept: where lists are looked for and kept.
        given_up: set by another thread when nobody waits for the list any more.

    Raises:
        InterruptedError: it was given up.
        DataError: it is damaged; a sample has no image, two images, two members of one kind, or a
            label that is no class number.
    """
    keeps = not members and shard.packed is None
    found = kept.get(shard) if keeps else None
    if found is None:
        found = _walk(shard, members, given_up)
        if keeps:
            kept.keep(shard, found)
    return found


def _walk(
    shard: TarShard, kinds: Sequence[str], given_up: threading.Event | None = None
) -> ShardList:
    keys: list[str] = []
    rows: list[tuple[int, int, int]] = []
    members: dict[str, list[tuple[int, int]]] = {kind: [] for kind in kinds}
    passed = NOTHING_PASSED

    def pass_by(one: Passed) -> None:
        nonlocal passed
        passed = passed.and_then(one)

    def add(key: str | None, own: dict[str, tarfile.TarInfo], label: int) -> None:
        if key is None:
            return
        images = [kind for kind in own if kind in IMAGE_KINDS]
        if len(images) != 1:
            raise DataError(
                f"sample {key!r} in shard {shard.path} has "
                f"{'images ' + ' and '.join(images) if images else 'no image'} "
                f"(members: {', '.join([*own][:8])}{', ...' if len(own) > 8 else ''}); expected "
                f"exactly one of {', '.join(IMAGE_KINDS)}{'' if images else _remedy(key, own)}"
            )
        image = own[images[0]]
        keys.append(key)
        rows.append((label, image.offset_data, image.size))
        for kind, places in members.items():
            found = own.get(kind)
            places.append((found.offset_data, found.size) if found is not None else (0, -1))

    with io.BytesIO(shard.plain) if shard.plain is not None else shard.open() as file:
        key, own, label = None, dict[str, tarfile.TarInfo](), -1
        for found, kind, member in tars.members(shard.path, file, pass_by):
            if given_up is not None and given_up.is_set():
                raise InterruptedError(f"listing {shard.path} was given up")
            if found != key:
                add(key, own, label)
                key, own, label = found, {}, -1
            if kind in own:
                raise DataError(f"sample {found!r} in shard {shard.path} has two members .{kind}")
            own[kind] = member
            if kind == "cls":  # here and now: to come back for it may be another request
                label = _label(shard.path, file, found, member)
        add(key, own, label)
    labels, offsets, sizes = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    return ShardList(keys, labels, offsets, sizes, members, passed)


def _remedy(key: str, kinds: Iterable[str]) -> str:
    """What to do where a name has more dots than the one before its extension, or is of a tar."""
    kinds = list(kinds)
    for kind in kinds:
        stem, _, extension = kind.rpartition(".")
        if extension in IMAGE_KINDS:
            other = f"{key}_{stem.replace('.', '_')}.{extension}"
            return (
                f". In WebDataset's tars a key ends at the first dot of the name: instead of "
                f"{key}.{kind} write {other}, and so its label"
            )
    if {"tar", "tgz"} & {*kinds}:
        return (
            ". A tar of tars, as ILSVRC2012_img_train.tar is: unpack it, and each tar in it into a "
            "folder of its class, and name the folder that holds these"
        )
    return ""


def _label(path: str, file: IO[bytes], key: str, member: tarfile.TarInfo) -> int:
    text = b""
    if member.size <= MAX_LABEL_BYTES:
        file.seek(member.offset_data)
        text = file.read(member.size).strip()
    if not (text.isdigit() and len(text) < 19):
        shown = repr(text.decode("ascii", "replace")) if text else f"{member.size} bytes"
        raise DataError(f"label {key}.cls in shard {path} is {shown}, not a class number from 0 up")
    return int(text)


def _identity(shard: TarShard) -> bytes:
    return b"%d\0%s\0%s" % (_VERSION, shard.version, shard.place)


def _user_folder() -> Path | None:
    named = os.environ.get(FOLDER)
    if named is not None:
        return Path(named) if named else None
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no home
        return None
    return Path(base) / "preceptor" / "shard_lists"
