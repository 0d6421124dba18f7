"""Reading a finished store: ``Cache.open``, its spaces, and batches of their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import StoreError, counted
from .batches import BatchIterator
from .buffers import BufferPool
from .commit import Completion
from .facts import Keys
from .manifest import Manifest
from .opening import open_units
from .order import EpochOrder
from .plan import PIXELS, PixelSpec, StorePlan
from .source import Source, open_source
from .space import OpenStore, Space


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
        self._store = OpenStore(source, manifest, completions)
        self.source = source
        self.manifest = manifest
        self.completions = completions
        self.layout = self._store.layout
        self.chunks = self._store.chunks
        self.buffers = BufferPool()
        self.pinned_buffers = BufferPool(pinned=True)
        self.spaces: dict[str, Space] = {
            space.id: Space(self._store, space)
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
            teachers: open these alone; the others, and the pixels, need not be whole. None: all.
            storage: options of a remote store, see ``remote.RemoteSource``.

        Raises:
            StoreError: no store, unknown version, incomplete (shards named) or damaged.
        """
        source = open_source(location, storage)
        manifest, completions = open_units(source, teachers)
        return cls(source, manifest, completions)

    def __repr__(self) -> str:
        spaces = ", ".join(self.spaces)
        return f"Cache({self.location!r}: {counted(len(self), 'row')} of {spaces})"

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
        return tuple(t.name for t in self.plan.teachers if t.name in self.completions)

    @property
    def pixels(self) -> PixelSpec | None:
        """The pixels of the views that the store holds; None: it holds none, or some that are not
        whole, where only some teachers were opened."""
        return self.plan.pixels if PIXELS in self.completions else None

    def read_pixels(
        self, rows: Sequence[int] | np.ndarray | torch.Tensor, threads: int | None = None
    ) -> torch.Tensor:
        """The stored pixels of rows: uint8 ``[b, height, width, 3]``, in the order asked for.

        Raises:
            StoreError: the store has none, a row is not there, or damage by shard and group.
        """
        self._need_pixels()
        arrays = {PIXELS: self.layout.pixel_array()}
        return self._store.read(PIXELS, arrays, rows, threads)[PIXELS]

    def _need_pixels(self) -> None:
        if self.plan.pixels is not None and self.pixels is None:
            raise StoreError(
                f"the pixels of {self.location} are not whole: `preceptor verify` says what mends "
                "or finishes them"
            )
        if self.pixels is None:
            raise StoreError(
                f"{self.location} holds no pixels: `preceptor add cache={self.location} "
                "pixels.size=...` stores them"
            )

    @property
    def keys(self) -> Keys:
        """The sample key of every row; read as needed."""
        return self._store.keys

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 ``[rows]``; -1 where unknown."""
        return self._store.facts.all("label")

    @property
    def valid(self) -> np.ndarray:
        """bool ``[rows]``; False where the image was left out and there are no tokens."""
        return self._store.valid

    @cached_property
    def sizes(self) -> np.ndarray:
        """int32 ``[rows, 2]``: height, width of the source image in pixels."""
        return self._store.facts.all("size")

    @cached_property
    def boxes(self) -> np.ndarray:
        """float32 ``[rows, 4]``: left, top, right, bottom of the view in source pixels."""
        return self._store.facts.all("box")

    @cached_property
    def flips(self) -> np.ndarray:
        """bool ``[rows]``: whether the view is mirrored."""
        return self._store.facts.all("flip").astype(bool)

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
        pixels: bool = False,
        keep_going: bool = False,
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
            pixels: read the stored pixels too.
            keep_going: name damaged rows in ``Batch.damaged`` instead of raising.
            shuffle: False: ascending rows.
            drop_last: leave out a last batch that is not full.
            window_rows: rows that are shuffled together and held in memory (twice).
            threads: reading threads; None: 2, or 16 for a remote store.
            pinned: page-locked memory; None: where CUDA is available.

        Returns:
            An iterator of ``Batch``; its ``len`` is the number of steps left.

        Raises:
            StoreError: an unknown space, impossible numbers, rows that cannot be read, or fewer
                rows than one batch of every rank.
        """
        chosen = [self[name].spec for name in spaces]
        if not chosen:
            raise StoreError("batches need at least one space")
        if pixels:
            self._need_pixels()
        threads = self.source.parallel if threads is None else threads
        if batch_size < 1 or window_rows < 1 or threads < 1:
            raise StoreError("batch_size, window_rows and threads must be at least 1")
        if seed < 0 or epoch < 0:
            raise StoreError(f"seed {seed} and epoch {epoch} must not be negative")
        if not 0 <= rank < world:
            raise StoreError(f"rank {rank} is not one of {world}")
        eligible = self.valid
        if rows is not None:
            eligible = np.zeros(len(self), bool)
            eligible[self._store.checked_rows(rows)] = True
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
        asked = np.count_nonzero(eligible)
        if not order.steps and (asked or rows is None):
            each = asked // world
            way_out = "choose a smaller batch_size" + (", or drop_last=False" if each else "")
            raise StoreError(
                f"batch_size={batch_size} is more than the {each:,} rows of each rank "
                f"({asked:,} rows that can be read, {counted(world, 'rank')}): {way_out}"
                if asked
                else f"{self.location} has no row that can be read"
            )
        if not 0 <= start_step <= order.steps:
            raise StoreError(f"step {start_step} is not within the {order.steps} steps of an epoch")
        return BatchIterator(
            self.layout,
            self._store.gatherer,
            chosen,
            {space.id: self[space.id].prediction for space in chosen},
            order,
            start_step=start_step,
            threads=threads,
            pixels=pixels,
            keep_going=keep_going,
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
