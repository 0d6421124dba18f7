"""The walk over shards, or a folder, that lists their samples."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from . import tars
from .folders import Folder, list_folder
from .remote_shard import PARALLEL, RemoteTarShard
from .shard_list import IMAGE_KINDS, KeptLists, ShardList, list_shard
from .tars import TarShard


class Walk:
    """What a walk over shards has gathered so far, for a `SampleIndex`.

    Args:
        members: further kinds whose places are wanted.
    """

    def __init__(self, members: Sequence[str] = ()) -> None:
        self.members: dict[str, list[tuple[int, int]]] = {kind: [] for kind in members}
        self.shards: list[TarShard | Folder] = []
        self.ignored: list[str] = []
        self.passed = tars.Passed()
        self.keys: list[str] = []
        self.labels: list[NDArray[np.int64]] = []
        self.offsets: list[NDArray[np.int64]] = []
        self.sizes: list[NDArray[np.int64]] = []
        self._kept = KeptLists()
        self._given_up = threading.Event()
        self._seen: dict[str, int] = {}
        self._unpacked = 0

    def walked(self, paths: Sequence[str]) -> Iterator[tuple[TarShard, ShardList | None]]:
        """Every shard with its list; without, where it has to be unpacked first. Remote ones are
        walked many at a time."""

        def at(path: str) -> TarShard:
            return RemoteTarShard.at(path) if tars.is_remote(path) else TarShard.at(path)

        def walk(shard: TarShard) -> tuple[TarShard, ShardList | None]:
            return shard, self._list(shard) if shard.packed is None else None

        if not any(map(tars.is_remote, paths)):
            yield from map(walk, map(at, paths))
            return
        with ThreadPoolExecutor(PARALLEL) as pool:
            shards = list(pool.map(at, paths))  # one that is missing is told before any is walked
            try:
                yield from pool.map(walk, shards)
            finally:
                self._given_up.set()  # else a damaged shard, or Ctrl-C, waits for the other walks

    def _list(self, shard: TarShard) -> ShardList:
        return list_shard(shard, list(self.members), kept=self._kept, given_up=self._given_up)

    def add_shard(self, shard: TarShard, found: ShardList | None) -> None:
        if found is None:
            shard.plain = shard.unpack(tars.MAX_UNPACKED - self._unpacked)
            self._unpacked += len(shard.plain)
            found = self._list(shard)
        for key in found.keys:
            if key in self._seen:
                before = [*self.shards, shard][self._seen[key]]
                raise DataError(
                    f"key {key!r} in shard {shard.path} occurs before, in shard {before.path}; "
                    "keys must be unique"
                )
            self._seen[key] = len(self.shards)
        self.shards.append(shard)
        shard.samples = len(found.keys)
        self.passed = self.passed.and_then(found.passed)
        self.keys += found.keys
        self.labels.append(found.labels)
        self.offsets.append(found.offsets)
        self.sizes.append(found.sizes)
        for kind, places in self.members.items():
            places += found.members[kind]

    def add_folder(self, path: str) -> None:
        listing = list_folder(path, IMAGE_KINDS)
        folder = listing.folder
        self.shards.append(folder)
        for stem, kind in zip(folder.stems, folder.kinds, strict=True):
            if stem in self._seen:
                raise DataError(
                    f"folder {path} has two images {stem!r} (one is {kind}): keys are paths "
                    "without their extension and must be unique"
                )
            self._seen[stem] = 0
        self.keys = list(folder.stems)
        self.labels.append(np.asarray(listing.labels, np.int64))
        self.sizes.append(np.asarray(listing.sizes, np.int64))
        self.offsets.append(np.arange(len(self.keys)))
        self.members = {kind: [(0, -1)] * len(self.keys) for kind in self.members}
        self.ignored = listing.ignored
        folder.samples = len(self.keys)
