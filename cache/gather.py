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
from .shard_index import ChunkReader

_DIRECT = 8192  # rows of at least so many bytes are read straight into their place


@dataclass(frozen=True)
class GroupRows:
    """The rows wanted from one group.

    Attributes:
        shard, chunk: where the group is.
        local: int64 ``[k]``: positions within the group.
        places: int64 ``[k]``, ascending: positions in the sequence that was asked for.
    """

    shard: int
    chunk: int
    local: np.ndarray
    places: np.ndarray


def by_group(rows: np.ndarray, shard_rows: int, group_rows: int) -> Iterator[GroupRows]:
    """Collect rows, int64 ``[n]`` in any order, by the group that holds them."""
    if not len(rows):
        return
    groups, local = np.divmod(rows, group_rows)
    order = np.argsort(groups, kind="stable")
    groups, local = groups[order], local[order]
    cuts = (np.flatnonzero(np.diff(groups)) + 1).tolist()
    a_shard = shard_rows // group_rows
    for start, end in pairwise([0, *cuts, len(rows)]):
        shard, chunk = divmod(int(groups[start]), a_shard)
        yield GroupRows(shard, chunk, local[start:end], order[start:end])


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
            counts = [min(batch_size, rows - at) for at in range(0, max(rows, 1), batch_size)]
            buffers = [pool.take(count * spec.row_bytes) for count in counts]
            dtype = getattr(torch, spec.dtype)
            self._bytes[name] = [
                buffer.numpy().reshape(count, spec.row_bytes)
                for buffer, count in zip(buffers, counts, strict=True)
            ]
            self._parts[name] = [
                buffer.view(dtype).view(count, *spec.shape[1:])
                for buffer, count in zip(buffers, counts, strict=True)
            ]

    def rows(self, name: str, places: np.ndarray) -> list[np.ndarray]:
        """The bytes of rows, uint8 ``[row_bytes]`` each."""
        batches = self._bytes[name]
        numbers, within = (places // self.batch_size).tolist(), (places % self.batch_size).tolist()
        return [batches[batch][at] for batch, at in zip(numbers, within, strict=True)]

    def store(self, name: str, places: np.ndarray, values: np.ndarray, local: np.ndarray) -> None:
        """Copy the ``local`` ones of rows, uint8 ``[n, row_bytes]``, to their ascending places."""
        batches, within = np.divmod(places, self.batch_size)
        cuts = (np.flatnonzero(np.diff(batches)) + 1).tolist()
        for start, end in pairwise([0, *cuts, len(places)]):
            target = self._bytes[name][int(batches[start])]
            target[within[start:end]] = values[local[start:end]]

    def pop(self, batch: int) -> dict[str, torch.Tensor]:
        """The arrays of one batch; the destination lets go of them."""
        parts = {name: buffers[batch] for name, buffers in self._parts.items()}
        for name in parts:
            self._parts[name][batch] = self._bytes[name][batch] = None  # type: ignore[call-overload]
        return parts


class Gatherer:
    """Fills destinations from chunks; its calls may run on several threads."""

    def __init__(self, chunks: ChunkReader) -> None:
        self._chunks = chunks
        self._scratch = threading.local()

    def __getstate__(self) -> dict[str, ChunkReader]:
        return {"chunks": self._chunks}

    def __setstate__(self, state: dict[str, ChunkReader]) -> None:
        Gatherer.__init__(self, **state)

    def fill(self, destination: Destination, group: GroupRows) -> None:
        """Read one group of one space and put its rows in their places.

        Raises:
            StoreError: damage, by shard and group.
        """
        for name, spec in destination.arrays.items():
            if spec.fixed_size and spec.row_bytes >= _DIRECT:
                self._direct(destination, name, spec, group)
            else:
                self._copied(destination, name, spec, group)

    def _direct(
        self, destination: Destination, name: str, spec: ArraySpec, group: GroupRows
    ) -> None:
        count = spec.chunk[0]
        rows: list[np.ndarray | None] = [None] * count
        again: list[tuple[int, np.ndarray]] = []
        here = destination.rows(name, group.places)
        for local, row in zip(group.local.tolist(), here, strict=True):
            if rows[local] is None:
                rows[local] = row
            else:
                again.append((local, row))
        pieces = self._chunks.rows_a_piece(spec)
        spare = self._buffer(pieces * spec.row_bytes).reshape(pieces, -1)
        self._chunks.scatter(destination.unit, spec, group.shard, group.chunk, rows, spare)
        for local, row in again:
            row[:] = rows[local]

    def _copied(
        self, destination: Destination, name: str, spec: ArraySpec, group: GroupRows
    ) -> None:
        unit = destination.unit
        out = self._buffer(spec.chunk_bytes + 4)
        raw = self._chunks.stored(unit, spec, group.shard, group.chunk, out)
        if not spec.fixed_size:
            values = self._chunks.decoded(unit, spec, group.shard, group.chunk, raw)
            raw = np.ascontiguousarray(values).view(np.uint8)
        rows = raw.reshape(spec.chunk[0], spec.row_bytes)
        destination.store(name, group.places, rows, group.local)

    def _buffer(self, length: int) -> np.ndarray:
        buffer = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) < length:
            buffer = self._scratch.buffer = aligned_empty(length)
        return buffer[:length]


def tasks(
    destinations: Iterable[Destination], groups: Sequence[GroupRows]
) -> Iterator[tuple[Destination, GroupRows]]:
    """Every (destination, group) pair, group by group."""
    wanted = list(destinations)
    return ((one, group) for group in groups for one in wanted)
