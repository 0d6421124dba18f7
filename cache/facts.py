"""The row facts of an open store, read when they are asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import overload

import numpy as np

from ..errors import StoreError
from .layout import Layout
from .plan import ROWS
from .rows import decode_keys
from .shard_index import ChunkReader

_SHARDS_KEPT = 8
_TOLD_OTHERWISE = ("key", "valid")  # fill values are no UTF-8, and make no row valid


class RowFacts:
    """Checked arrays of the ``rows`` unit."""

    def __init__(self, chunks: ChunkReader, layout: Layout, parallel: int) -> None:
        self._parallel = parallel
        self._chunks = chunks
        self._plan = layout.plan
        self._arrays = layout.row_arrays()

    def shard(self, name: str, shard: int) -> np.ndarray:
        """One fact of one shard's rows.

        Raises:
            StoreError: damage, or a row that its writer left out.
        """
        spec = self._arrays[name]
        values = self._chunks.values(ROWS, spec, shard, 0)[: self._plan.rows_in(shard)]
        if name in _TOLD_OTHERWISE:
            return values
        holes = spec.filled(values)
        if holes.any():
            row = self._plan.rows_of(shard)[int(np.argwhere(holes)[0, 0])]
            raise self._chunks.hole(ROWS, row, spec.path)
        return values

    def all(self, name: str) -> np.ndarray:
        """One fact of all rows."""
        shards = range(self._plan.shards)
        if self._parallel > 2:
            with ThreadPoolExecutor(self._parallel) as pool:
                return np.concatenate(list(pool.map(lambda shard: self.shard(name, shard), shards)))
        return np.concatenate([self.shard(name, shard) for shard in shards])

    def keys(self, shard: int) -> list[str]:
        """The keys of one shard.

        Raises:
            StoreError: bytes that are no key.
        """
        try:
            return decode_keys(self.shard("key", shard))
        except ValueError:
            raise StoreError(
                f"shard {shard} of rows has bytes for keys that are not UTF-8: run `preceptor "
                "verify`"
            ) from None

    @property
    def rows(self) -> int:
        return self._plan.rows

    @property
    def shard_rows(self) -> int:
        return self._plan.shard_rows


class Keys(Sequence[str]):
    """The keys of all rows; a few shards of them are kept in memory."""

    def __init__(self, facts: RowFacts) -> None:
        self._facts = facts
        self._kept: OrderedDict[int, list[str]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._facts.rows

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> list[str]: ...

    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard, local = divmod(int(row), self._facts.shard_rows)
        return self._shard(shard)[local]

    def __iter__(self) -> Iterator[str]:
        for shard in range(-(-len(self) // self._facts.shard_rows)):
            yield from self._facts.keys(shard)

    def _shard(self, shard: int) -> list[str]:
        keys = self._kept.get(shard)
        if keys is None:
            keys = self._facts.keys(shard)
            with self._lock:
                self._kept[shard] = keys
                if len(self._kept) > _SHARDS_KEPT:
                    self._kept.popitem(last=False)
        return keys
