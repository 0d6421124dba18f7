"""Reading a finished store: ``Cache.open``, its spaces, and batches of their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import StoreError
from .batches import BatchIterator
from .buffers import BufferPool
from .commit import Completion
from .constants import (
    calibration_files,
    calibration_values,
    statistics_files,
    statistics_values,
)
from .facts import Keys, RowFacts
from .gather import Destination, Gatherer, by_group
from .layout import Layout
from .manifest import ROWS, Manifest, SpaceSpec, StorePlan
from .opening import open_units, read_files
from .order import EpochOrder
from .shard_index import ChunkReader
from .source import Source, open_source
from .statistics import Moments
from .tokens import Tokens


class Space:
    """One space of an open store.

    Attributes:
        spec: name, tokens, dim, grid, encoding.
        mean, std: float32 ``[D]``: the frozen standardisation.
    """

    def __init__(self, cache: Cache, spec: SpaceSpec) -> None:
        self.spec = spec
        self._cache = cache
        self._arrays = cache.layout.space_arrays(spec)
        frozen = cache.manifest.calibrations[spec.id]
        raw = read_files(cache.source, calibration_files(cache.layout, spec))
        mean, std = calibration_values(cache.layout, spec, raw, frozen)
        self.mean, self.std = torch.from_numpy(mean), torch.from_numpy(std)

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, tokens, dim)."""
        return len(self._cache), self.spec.tokens, self.spec.dim

    @property
    def grid(self) -> tuple[int, int] | None:
        return self.spec.grid

    @property
    def encoding(self) -> str:
        return self.spec.encoding

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the codes."""
        return getattr(torch, self._arrays["codes"].dtype)

    def read(
        self, rows: Sequence[int] | np.ndarray | torch.Tensor, threads: int | None = None
    ) -> Tokens:
        """The encoded tokens of rows.

        Args:
            rows: 1-d integers in any order; repetitions are allowed.
            threads: threads that read groups; None: 2, or 16 for a remote store.

        Returns:
            Tokens with rows in the order asked for.

        Raises:
            StoreError: a row outside the store or without tokens, or damage by shard and group.
        """
        wanted = self._cache.checked_rows(rows)
        plan = self._cache.manifest.plan
        place = Destination(
            self._cache.layout, self.spec, len(wanted), max(len(wanted), 1), BufferPool()
        )
        groups = list(by_group(wanted, plan.shard_rows, plan.group_rows))
        gatherer = self._cache.gatherer
        threads = threads or self._cache.source.parallel
        if threads > 1 and len(groups) > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda group: gatherer.fill(place, group), groups))
        else:
            for group in groups:
                gatherer.fill(place, group)
        return place.pop(0)

    def decode(self, tokens: Tokens) -> torch.Tensor:
        """Tokens in the teacher's own units: float32 ``[b, N, D]``."""
        z = tokens.standardised()
        return z * self.std.to(z.device) + self.mean.to(z.device)

    def statistics(self) -> Moments:
        """Exact mean and covariance (float64) of all valid rows' tokens, before encoding.

        Raises:
            StoreError: the arrays are damaged.
        """
        cache, spec = self._cache, self.spec
        done = cache.completions[spec.teacher]
        raw = read_files(cache.source, statistics_files(cache.layout, spec))
        mean, covariance = statistics_values(cache.layout, spec, raw, done.statistics[spec.name])
        count = done.tokens[spec.name]
        return Moments(count, mean, covariance * count)


class Cache:
    """A finished store, opened for reading. Make one by :meth:`open`.

    Attributes:
        location: the path or address.
        manifest: what it is made of and from.
        spaces: the spaces by id.
    """

    def __init__(
        self, source: Source, manifest: Manifest, completions: Mapping[str, Completion]
    ) -> None:
        self.source = source
        self.manifest = manifest
        self.completions = completions
        self.layout = Layout(manifest.plan)
        self.chunks = ChunkReader(source, manifest, completions)
        self.gatherer = Gatherer(self.chunks)
        self.buffers = BufferPool()
        self.pinned_buffers = BufferPool(pinned=True)
        self._facts = RowFacts(self.chunks, self.layout, source.parallel)
        self.spaces: dict[str, Space] = {
            space.id: Space(self, space)
            for teacher in manifest.plan.teachers
            if teacher.name in completions
            for space in teacher.spaces
        }

    @classmethod
    def open(
        cls,
        location: str | Path,
        *,
        teachers: Sequence[str] | None = None,
        storage: Mapping[str, Any] | None = None,
    ) -> Cache:
        """Open a store.

        Args:
            location: a directory, or s3://, gs://, az://, http(s)://.
            teachers: open these alone; the others need not be whole. None: all.
            storage: options of a remote store, see ``remote.RemoteSource``.

        Raises:
            StoreError: no store, unknown version, incomplete (shards named) or damaged.
        """
        source = open_source(location, storage)
        manifest, completions = open_units(source, teachers)
        return cls(source, manifest, completions)

    def __len__(self) -> int:
        """Number of rows, those without tokens included."""
        return self.manifest.plan.rows

    def __getitem__(self, space_id: str) -> Space:
        if space_id not in self.spaces:
            raise StoreError(
                f"{self.location} has no space {space_id!r}: it has {', '.join(self.spaces)}"
            )
        return self.spaces[space_id]

    @property
    def location(self) -> str:
        return self.source.location

    @property
    def plan(self) -> StorePlan:
        return self.manifest.plan

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers that are open."""
        return tuple(unit for unit in self.completions if unit != ROWS)

    @cached_property
    def keys(self) -> Keys:
        """The sample key of every row; read as needed."""
        return Keys(self._facts)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 ``[rows]``; -1 where unknown."""
        return self._facts.all("label")

    @cached_property
    def valid(self) -> np.ndarray:
        """bool ``[rows]``; False where the image was corrupt and there are no tokens."""
        return self._facts.all("valid").astype(bool)

    @cached_property
    def sizes(self) -> np.ndarray:
        """int32 ``[rows, 2]``: height, width of the source image in pixels."""
        return self._facts.all("size")

    @cached_property
    def boxes(self) -> np.ndarray:
        """float32 ``[rows, 4]``: left, top, right, bottom of the view in source pixels."""
        return self._facts.all("box")

    @cached_property
    def flips(self) -> np.ndarray:
        """bool ``[rows]``: whether the view is mirrored."""
        return self._facts.all("flip").astype(bool)

    def checked_rows(self, rows: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
        """Row numbers as int64 ``[n]``.

        Raises:
            StoreError: outside the store, or without tokens (the first is named with its key).
        """
        wanted = np.asarray(rows.cpu() if isinstance(rows, torch.Tensor) else rows)
        if wanted.size == 0:
            return np.zeros(0, np.int64)
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
            raise StoreError(
                f"rows must be one axis of integers, not {wanted.dtype} of shape {wanted.shape}"
            )
        wanted = wanted.astype(np.int64)
        outside = (wanted < 0) | (wanted >= len(self))
        if outside.any():
            raise StoreError(
                f"row {int(wanted[outside][0])} is outside {self.location} with {len(self)} rows"
            )
        if not self.valid[wanted].all():
            row = int(wanted[~self.valid[wanted]][0])
            raise StoreError(
                f"row {row} (key {self.keys[row]!r}) of {self.location} has no tokens, its image "
                "was corrupt: leave out the rows where cache.valid is False"
            )
        return wanted

    def batches(
        self,
        spaces: Iterable[str],
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        rows: Sequence[int] | np.ndarray | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        window_rows: int = 1024,
        threads: int | None = None,
        pinned: bool | None = None,
    ) -> BatchIterator:
        """Batches of an epoch: groups shuffled, rows shuffled within windows.

        The order depends on seed, epoch, rank, world, batch_size, window_rows and the rows alone.
        Every rank gets the same number of rows. Rows without tokens are left out.

        Args:
            spaces: space ids.
            batch_size: rows a batch of this rank.
            start_step: begin here, without reading what comes before.
            rows: read only these (each once); None: all.
            shuffle: False: ascending rows.
            drop_last: leave out a last batch that is not full.
            window_rows: rows that are shuffled together and held in memory (twice).
            threads: reading threads; None: 2, or 16 for a remote store.
            pinned: page-locked memory; None: where CUDA is available.

        Returns:
            An iterator of ``Batch``; its ``len`` is the number of steps left.

        Raises:
            StoreError: an unknown space, impossible numbers, rows that cannot be read.
        """
        chosen = [self[name].spec for name in spaces]
        if not chosen:
            raise StoreError("batches need at least one space")
        threads = self.source.parallel if threads is None else threads
        if batch_size < 1 or window_rows < 1 or threads < 1:
            raise StoreError("batch_size, window_rows and threads must be at least 1")
        if not 0 <= rank < world:
            raise StoreError(f"rank {rank} is not one of {world}")
        eligible = self.valid
        if rows is not None:
            eligible = np.zeros(len(self), bool)
            eligible[self.checked_rows(rows)] = True
        if pinned is None:
            pinned = torch.cuda.is_available()
        order = EpochOrder(
            eligible,
            group_rows=self.plan.group_rows,
            batch_size=batch_size,
            window_rows=window_rows,
            seed=seed,
            epoch=epoch,
            rank=rank,
            world=world,
            shuffle=shuffle,
            drop_last=drop_last,
        )
        if not 0 <= start_step <= order.steps:
            raise StoreError(f"step {start_step} is not within the {order.steps} steps of an epoch")
        return BatchIterator(
            self.layout,
            self.gatherer,
            chosen,
            order,
            start_step=start_step,
            threads=threads,
            pool=self.pinned_buffers if pinned else self.buffers,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "manifest": self.manifest,
            "completions": self.completions,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        Cache.__init__(self, **state)
