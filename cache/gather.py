"""From chunks on disk to rows of batches: each byte is copied once where that is possible."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from .buffers import BufferPool, aligned_empty
from .layout import ArraySpec
from .plan import PIXELS
from .shard_index import ChunkReader

_LARGE = 8192  # rows of at least so many bytes are read straight into their place
_TOGETHER = 32  # groups whose small rows one thread reads


@dataclass(frozen=True)
class GroupRows:
    """The rows wanted from one group.

    Attributes:
        shard, chunk: where the group is.
        local: int64 ``[k]``, ascending: positions within the group.
        places: int64 ``[k]``: positions in the sequence that was asked for.
        whole: every row of the group is wanted, and once.
    """

    shard: int
    chunk: int
    local: np.ndarray
    places: np.ndarray
    whole: bool


def by_group(rows: np.ndarray, shard_rows: int, group_rows: int) -> Iterator[GroupRows]:
    """Collect rows, int64 ``[n]`` in any order, by the group that holds them."""
    if not len(rows):
        return
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    groups, local = np.divmod(ordered, group_rows)
    distinct = bool((np.diff(ordered) > 0).all())
    cuts = (np.flatnonzero(np.diff(groups)) + 1).tolist()
    a_shard = shard_rows // group_rows
    for start, end in pairwise([0, *cuts, len(rows)]):
        shard, chunk = divmod(int(groups[start]), a_shard)
        whole = distinct and end - start == group_rows
        yield GroupRows(shard, chunk, local[start:end], order[start:end], whole)


class Destination:
    """Buffers for a sequence of rows of some arrays of one unit, cut into batches.

    Args:
        unit: the unit whose commit records vouch for the arrays.
        arrays: by the name they are asked for.
        rows: length of the sequence.
        batch_size: rows a batch; the last may be shorter.
    """

    def __init__(
        self,
        unit: str,
        arrays: Mapping[str, ArraySpec],
        rows: int,
        batch_size: int,
        pool: BufferPool,
    ) -> None:
        self.unit, self.arrays = unit, arrays
        self.batch_size = batch_size
        self._rows = rows
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._bytes: dict[str, list[np.ndarray]] = {}
        for name, spec in self.arrays.items():
            # a buffer for each batch, so that its memory is free when the batch is; small rows
            # share one, into which those of a group are copied at once
            step = batch_size if spec.row_bytes >= _LARGE else max(rows, 1)
            counts = [min(step, rows - at) for at in range(0, max(rows, 1), step)]
            buffers = [pool.take(count * spec.row_bytes) for count in counts]
            dtype = getattr(torch, spec.dtype)
            self._bytes[name] = [
                buffer.numpy().reshape(count, spec.row_bytes)
                for buffer, count in zip(buffers, counts, strict=True)
            ]
            self._parts[name] = [
                part
                for buffer, count in zip(buffers, counts, strict=True)
                for part in buffer.view(dtype).view(count, *spec.shape[1:]).split(batch_size)
            ]

    def rows(self, name: str, places: np.ndarray) -> list[np.ndarray]:
        """The bytes of rows, uint8 ``[row_bytes]`` each."""
        batches = self._bytes[name]
        numbers, within = (places // self.batch_size).tolist(), (places % self.batch_size).tolist()
        return [batches[batch][at] for batch, at in zip(numbers, within, strict=True)]

    def store(self, name: str, places: np.ndarray, values: np.ndarray) -> None:
        """Copy rows, uint8 ``[k, row_bytes]``, to their places."""
        buffers = self._bytes[name]
        if len(buffers) == 1:
            buffers[0][places] = values
            return
        batches, within = np.divmod(places, self.batch_size)
        for batch in np.unique(batches):
            here = batches == batch
            buffers[batch][within[here]] = values[here]

    def holes(self) -> dict[int, str]:
        """The rows that were never written, by place, and an array that shows it.

        No encoded row has the fill value for its first one; pixels alone have no value to spare.
        """
        found: dict[int, str] = {}
        for name, spec in self.arrays.items():
            if spec.path == PIXELS:
                continue
            width = np.dtype(spec.dtype).itemsize
            start = 0
            for buffer in self._bytes[name]:
                empty = spec.filled(buffer[:, :width].view(spec.dtype)[:, 0])
                if empty.any():
                    found |= {start + at: spec.path for at in np.flatnonzero(empty).tolist()}
                start += len(buffer)
        return found

    def pop(self, batch: int) -> dict[str, torch.Tensor]:
        """The arrays of one batch; the destination lets go of them."""
        parts = {name: buffers[batch] for name, buffers in self._parts.items()}
        for name in parts:
            self._parts[name][batch] = None  # type: ignore[call-overload]
            if batch < len(self._bytes[name]):
                self._bytes[name][batch] = None  # type: ignore[call-overload]
        return parts


class Gatherer:
    """Fills destinations from chunks; its calls may run on several threads."""

    def __init__(self, chunks: ChunkReader) -> None:
        self.chunks = chunks
        self._scratch = threading.local()

    def __getstate__(self) -> dict[str, ChunkReader]:
        return {"chunks": self.chunks}

    def __setstate__(self, state: dict[str, ChunkReader]) -> None:
        Gatherer.__init__(self, **state)

    def fill(
        self, destination: Destination, group: GroupRows, names: Iterable[str] | None = None
    ) -> None:
        """Read one group of one space and put its rows in their places.

        Args:
            names: of its arrays; None: all.

        Raises:
            StoreError: damage, by shard and group.
        """
        for name in destination.arrays if names is None else names:
            spec = destination.arrays[name]
            if spec.fixed_size and spec.row_bytes >= _LARGE:
                self._direct(destination, name, spec, group)
            else:
                self._copied(destination, name, spec, group)

    def _direct(
        self, destination: Destination, name: str, spec: ArraySpec, group: GroupRows
    ) -> None:
        here = destination.rows(name, group.places)
        if group.whole:
            self.chunks.scatter(destination.unit, spec, group.shard, group.chunk, here)
            return
        count = spec.chunk[0]
        rows: list[np.ndarray | None] = [None] * count
        again: list[tuple[int, np.ndarray]] = []
        for local, row in zip(group.local.tolist(), here, strict=True):
            if rows[local] is None:
                rows[local] = row
            else:
                again.append((local, row))
        # rows that are not wanted are read for the checksum, into memory that stays in the cache
        distinct = min(count, self.chunks.source.at_once(spec.row_bytes))
        spare = self._buffer(distinct * spec.row_bytes).reshape(distinct, -1)
        into = [spare[at % distinct] if row is None else row for at, row in enumerate(rows)]
        self.chunks.scatter(destination.unit, spec, group.shard, group.chunk, into)
        for local, row in again:
            row[:] = rows[local]

    def _copied(
        self, destination: Destination, name: str, spec: ArraySpec, group: GroupRows
    ) -> None:
        unit = destination.unit
        out = self._buffer(spec.chunk_bytes + 4)
        raw = self.chunks.stored(unit, spec, group.shard, group.chunk, out)
        if not spec.fixed_size:
            values = self.chunks.decoded(unit, spec, group.shard, group.chunk, raw)
            raw = np.ascontiguousarray(values).view(np.uint8)
        rows = raw.reshape(spec.chunk[0], spec.row_bytes)
        destination.store(name, group.places, rows if group.whole else rows[group.local])

    def _buffer(self, length: int) -> np.ndarray:
        buffer = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) < length:
            buffer = self._scratch.buffer = aligned_empty(length)
        return buffer[:length]


@dataclass(frozen=True)
class Task:
    """Some arrays of some groups, for one thread."""

    destination: Destination
    names: tuple[str, ...]
    groups: Sequence[GroupRows]


def tasks(destinations: Iterable[Destination], groups: Sequence[GroupRows]) -> Iterator[Task]:
    """All arrays of all groups: large rows group by group, small ones of many groups together,
    for the interpreter's part of them takes longer than the copying."""
    destinations = list(destinations)
    for one in destinations:
        small = tuple(name for name, spec in one.arrays.items() if spec.row_bytes < _LARGE)
        for start in range(0, len(groups) if small else 0, _TOGETHER):
            yield Task(one, small, groups[start : start + _TOGETHER])
    for group in groups:
        for one in destinations:
            large = tuple(name for name, spec in one.arrays.items() if spec.row_bytes >= _LARGE)
            if large:
                yield Task(one, large, [group])
