"""Checked reading of chunks: commit records and shard indices are read once and kept."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import StoreError
from .commit import Commit, Completion, record_name
from .layout import CRC, ArraySpec, Layout
from .manifest import Manifest
from .sharding import parse_index, plain_index
from .source import Source

_SHARDS_KEPT = 1 << 17  # files of which the index stays, 1.3 KiB each at 32 chunks
_COMMITS_KEPT = 32


@dataclass(frozen=True)
class ShardIndex:
    """Where the chunks of one file are.

    Attributes:
        name: the file.
        entries: int64 ``[chunks, 2]``: offset and length, checksum included.
        sums: uint32 ``[chunks]``: CRC-32C of each chunk by the commit record.
    """

    name: str
    entries: np.ndarray
    sums: np.ndarray


class ChunkReader:
    """Reads and checks chunks of a store's arrays; safe to use from several threads.

    Attributes:
        source: where the files come from.
    """

    def __init__(
        self, source: Source, manifest: Manifest, completions: Mapping[str, Completion]
    ) -> None:
        self.source = source
        self._manifest = manifest
        self._layout = Layout(manifest.plan)
        self._completions = completions
        self._lock = threading.Lock()
        self._commits: OrderedDict[tuple[str, int], Commit] = OrderedDict()
        self._indices: OrderedDict[tuple[str, int], ShardIndex] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "manifest": self._manifest,
            "completions": self._completions,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        ChunkReader.__init__(self, **state)

    def commit(self, unit: str, shard: int) -> Commit:
        """The record of a shard, checked against the unit's completion.

        Raises:
            StoreError: missing, damaged or not the one that was sealed.
        """
        with self._lock:
            kept = self._commits.get((unit, shard))
        if kept is not None:
            return kept
        name = record_name(unit, shard)
        try:
            raw = self.source.read(name)
        except FileNotFoundError:
            raise self._damaged(unit, shard, f"{name} is missing") from None
        if hashlib.sha256(raw).hexdigest() != self._completions[unit].records[shard]:
            raise self._damaged(unit, shard, f"{name} is not the record that was sealed")
        commit = Commit.from_bytes(raw, f"{self.source.location}/{name}")
        commit.refuse_other(self._manifest, self._layout, unit, shard)
        with self._lock:
            self._commits[unit, shard] = commit
            if len(self._commits) > _COMMITS_KEPT:
                self._commits.popitem(last=False)
        return commit

    def index(self, unit: str, spec: ArraySpec, shard: int) -> ShardIndex:
        """The index of an array's shard.

        Raises:
            StoreError: the file or its record is missing or damaged.
        """
        key = (spec.path, shard)
        with self._lock:
            if key in self._indices:
                self._indices.move_to_end(key)
                return self._indices[key]
        found = self._read_index(unit, spec, shard, self.commit(unit, shard))
        with self._lock:
            self._indices[key] = found
            if len(self._indices) > _SHARDS_KEPT:
                self._indices.popitem(last=False)
        return found

    def _read_index(self, unit: str, spec: ArraySpec, shard: int, commit: Commit) -> ShardIndex:
        name = spec.file(shard)
        record = commit.files[spec.path]
        sums = np.array(record.chunks, np.uint32)
        if spec.group is None:
            return ShardIndex(name, plain_index(spec, record.bytes), sums)
        raw = bytearray(spec.index_bytes)
        try:
            self.source.read_into(name, record.bytes - spec.index_bytes, [raw])
            entries = parse_index(
                spec, bytes(raw), record.bytes, self._layout.chunks_in(spec, shard)
            )
        except FileNotFoundError:
            raise self._damaged(unit, shard, f"{name} is missing") from None
        except OSError as error:
            raise self._damaged(unit, shard, f"{name} fails: {error.strerror}") from error
        except ValueError as error:
            raise self._damaged(unit, shard, f"{name}: {error}") from None
        return ShardIndex(name, entries, sums)

    def scatter(
        self,
        unit: str,
        spec: ArraySpec,
        shard: int,
        chunk: int,
        rows: Sequence[np.ndarray],
    ) -> None:
        """Read one uncompressed chunk straight into its rows' buffers, and check it.

        Rows are filled before the whole chunk is known to be sound: use none of them where this
        raises.

        Args:
            rows: a contiguous uint8 buffer of ``spec.row_bytes`` for each row of the chunk.

        Raises:
            StoreError: damage, by shard and group.
        """
        index = self.index(unit, spec, shard)
        tail = bytearray(CRC)
        offset, length = index.entries[chunk].tolist()
        value = self._read(unit, shard, index.name, offset, rows, tail, length)
        self._compare(unit, shard, index, chunk, value, bytes(tail))

    def stored(
        self, unit: str, spec: ArraySpec, shard: int, chunk: int, out: np.ndarray
    ) -> np.ndarray:
        """Read one chunk's stored bytes, checked, without their checksum.

        Args:
            out: uint8 buffer, used when it is long enough.
        """
        index = self.index(unit, spec, shard)
        offset, length = index.entries[chunk].tolist()
        if len(out) < length:
            out = np.empty(length, np.uint8)
        raw, tail = out[: length - CRC], bytearray(CRC)
        value = self._read(unit, shard, index.name, offset, [raw], tail, length)
        self._compare(unit, shard, index, chunk, value, bytes(tail))
        return raw

    def values(self, unit: str, spec: ArraySpec, shard: int, chunk: int) -> np.ndarray:
        """The decoded values of one chunk.

        Raises:
            StoreError: damage, by shard and group.
        """
        raw = self.stored(unit, spec, shard, chunk, np.empty(0, np.uint8))
        return self.decoded(unit, spec, shard, chunk, raw)

    def decoded(
        self, unit: str, spec: ArraySpec, shard: int, chunk: int, raw: np.ndarray
    ) -> np.ndarray:
        """The values of a chunk from its stored bytes."""
        try:
            return spec.decode_chunk(raw)
        except ValueError as error:
            name = spec.file(shard)
            raise self._damaged(unit, shard, f"group {chunk} of {name}: {error}") from None

    def _read(
        self,
        unit: str,
        shard: int,
        name: str,
        offset: int,
        into: Sequence[np.ndarray],
        tail: bytearray,
        length: int,
    ) -> int:
        """Fill buffers, then the tail; returns the CRC-32C of the buffers."""
        try:
            got, value = self.source.read_summed(name, offset, into, tail)
        except FileNotFoundError:
            raise self._damaged(unit, shard, f"{name} is missing") from None
        except OSError as error:
            raise self._damaged(unit, shard, f"{name} fails: {error.strerror}") from error
        if got != length:
            raise self._damaged(unit, shard, f"{name} ends at byte {offset + got}")
        return value

    def _compare(
        self, unit: str, shard: int, index: ShardIndex, chunk: int, value: int, tail: bytes
    ) -> None:
        where = f"group {chunk} of {index.name}"
        if value != int.from_bytes(tail, "little"):
            raise self._damaged(unit, shard, f"{where} does not match its checksum")
        if value != int(index.sums[chunk]):
            raise self._damaged(unit, shard, f"{where} is not what was committed")

    def hole(self, unit: str, row: int, array: str) -> StoreError:
        """What to say of a row of which a writer stored fill values."""
        shard = row // self._layout.plan.shard_rows
        return StoreError(
            f"row {row} of {self.source.location} is a hole in {array}: its writer left it out; "
            f"remove {record_name(unit, shard)} and run `preceptor repair`"
        )

    def _damaged(self, unit: str, shard: int, what: str) -> StoreError:
        return StoreError(
            f"{self.source.location} is damaged in shard {shard} of {unit}: {what}; run "
            "`preceptor verify` to see all of the damage and `preceptor repair` to mend it"
        )
