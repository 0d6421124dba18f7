"""What a student trains on: images at the stored views, joined by key with cached tokens."""

from __future__ import annotations

import queue
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from torch import Tensor

from ..cache import Batch, Cache
from ..errors import DataError, counted
from .batch import TrainBatch
from .epoch_views import EpochViews
from .loading import loaded, prefetched
from .views import Problems, StorePixels, Views

AHEAD = 3
"""Batches that are ready before they are asked for."""


def epoch_of(
    cache: Cache,
    batch_size: int,
    *,
    seed: int = 0,
    world: int = 1,
    first_views: int | None = None,
) -> EpochViews:
    """Which views an epoch uses; see `TrainData`.

    Raises:
        ConfigError: `first_views` is more than the store has.
        DataError: the store has fewer images than one batch for every rank.
    """
    count = cache.plan.views_a_sample
    found = EpochViews(cache.valid, count, seed, first_views)
    if found.images < batch_size * world:
        raise DataError(
            f"the store has {found.images} images with tokens, fewer than one batch of "
            f"{batch_size} for each of {counted(world, 'rank')}: lower recipe.batch_size"
        )
    return found


class TrainData:
    """An endless, repeatable sequence of joined batches.

    An epoch is a pass over the images, whatever the number of stored views: each epoch takes one
    view of every image (see `EpochViews`). Step k of a run is the same batch whatever was run
    before it: rows come from the store's shuffled groups by (seed, epoch), so a run can go on at
    any step. Every rank gets the same number of batches an epoch.

    With `first_views` only that many of the stored views of every image are used, the first ones,
    which are those that a store of so many would hold.

    A group of the store is read whole and checked whole, so with V views an image an epoch reads
    up to V bytes for each that it uses; stores with small groups (`group_rows`) read less.

    Args:
        cache: the store.
        views: the pixels of its rows.
        spaces: whose tokens to read.
        batch_size: rows a batch and a rank.
        seed: of the order.
        workers: processes that decode images (threads, where the store holds the pixels); 0
            decodes in the thread that prepares batches.
        rank, world: this process among those that share the rows.
        pin: pinned memory, for copies to a CUDA device that nobody waits for.
        first_views: how many of the stored views of an image to use; None for all.
        on_damaged: "stop" raises what is wrong with a damaged shard or image when it is met;
            "skip" gives the place of a damaged row to a sound one of the same batch, so that
            steps stay equal on all ranks, and tells of it in `TrainBatch.skipped`.

    Attributes:
        steps_per_epoch: batches an epoch.
        left_over: images an epoch that fill no batch; other ones in every epoch.

    Raises:
        ConfigError: `first_views` is more than the store has.
        DataError: the store has fewer images than one batch for every rank.
    """

    def __init__(
        self,
        cache: Cache,
        views: Views,
        spaces: Sequence[str],
        batch_size: int,
        *,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
        first_views: int | None = None,
        on_damaged: Literal["stop", "skip"] = "stop",
    ) -> None:
        self.cache, self.views, self.spaces = cache, views, list(spaces)
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.rank, self.world, self.pin = rank, world, pin
        self.skip = on_damaged == "skip"
        self.epoch_views = epoch_of(
            cache, batch_size, seed=seed, world=world, first_views=first_views
        )
        images = self.epoch_views.images
        self.steps_per_epoch = images // (batch_size * world)
        self.left_over = images - self.steps_per_epoch * batch_size * world
        self._grids = {name: grid for name in self.spaces if (grid := cache[name].grid)}

    def describe(self) -> str:
        """The length of an epoch in a sentence, with what it leaves out."""
        each = f" of {self.world} ranks" if self.world > 1 else ""
        count = self.cache.plan.views_a_sample
        without = int(self.cache.plan.rows // count) - self.epoch_views.images
        told = f"an epoch: {self.epoch_views.images:,} images{self.epoch_views.describe()}"
        if without:
            told += f" ({without:,} have no tokens)"
        told += f" in {self.steps_per_epoch:,} batches of {self.batch_size}{each}"
        if self.left_over:
            told += f"; {self.left_over:,} fill no batch, other ones every epoch"
        return told

    def batches(self, start: int, stop: int) -> Generator[TrainBatch, None, None]:
        """Batches of steps `start` to `stop` - 1, prepared ahead by a thread and the workers.
        Closing the generator stops them.

        Raises:
            StoreError, DataError: a damaged shard or image, named, where they stop the run; or a
                batch without one sound row.
        """
        if isinstance(self.views, StorePixels):
            return prefetched(self._with_stored_pixels(self.views, start, stop), AHEAD)
        waiting: queue.SimpleQueue[tuple[int, Batch]] = queue.SimpleQueue()

        def orders() -> Iterator[list[tuple[int, int]]]:
            # The loader asks for orders ahead of the images it returns, and returns them in order.
            for epoch, batch in self._token_batches(start, stop):
                waiting.put((epoch, batch))
                yield [(int(row), epoch) for row in batch.rows]

        images = loaded(self.views, orders(), self.workers)

        def joined() -> Iterator[TrainBatch]:
            for pixels, problems in images:
                epoch, batch = waiting.get()
                if problems and not self.skip:
                    raise problems[min(problems)]
                # Mended before it is pinned: pinned memory may be on its way to the device.
                yield self._whole(batch, pixels, epoch, problems)

        return prefetched(joined(), AHEAD)

    def _with_stored_pixels(
        self, views: StorePixels, start: int, stop: int
    ) -> Iterator[TrainBatch]:
        with ThreadPoolExecutor(max(1, self.workers), thread_name_prefix="jitter") as threads:
            for epoch, batch in self._token_batches(start, stop):
                pixels = batch.pixels
                assert pixels is not None  # asked for in _token_batches
                if views.jitter:
                    rows = batch.rows.tolist()

                    def vary(
                        place: int,
                        pixels: Tensor = pixels,
                        rows: list[int] = rows,
                        epoch: int = epoch,
                    ) -> None:
                        views.vary(pixels, place, rows[place], epoch)

                    list(threads.map(vary, range(len(rows))))
                yield self._whole(batch, pixels, epoch, {})

    def _whole(self, batch: Batch, pixels: Tensor, epoch: int, problems: Problems) -> TrainBatch:
        """The batch, with sound rows in the places of damaged ones."""
        wrong = {**{place: str(error) for place, error in problems.items()}, **batch.damaged}
        rows = batch.rows
        if wrong:
            sound = [place for place in range(len(rows)) if place not in wrong]
            if not sound:
                raise DataError(
                    f"every row of a batch is damaged, so that none can take another's place: "
                    f"{wrong[min(wrong)]}"
                )
            places = sorted(wrong)
            donors = [sound[number % len(sound)] for number in range(len(places))]
            parts = [part for tokens in batch.tokens.values() for part in tokens.parts.values()]
            for part in (rows, pixels, *parts):
                part[places] = part[donors]
        regions = self.views.regions(rows.tolist(), epoch)
        if self.pin:
            # What the reader read is pinned already.
            pixels = pixels if pixels.is_pinned() else pixels.pin_memory()
            regions = None if regions is None else regions.pin_memory()
        return TrainBatch(
            rows=rows,
            pixels=pixels,
            tokens=dict(batch.tokens),
            regions=regions,
            grids=self._grids,
            skipped=tuple(wrong[place] for place in sorted(wrong)),
        )

    def _token_batches(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        step = start
        while step < stop:
            epoch, first = divmod(step, self.steps_per_epoch)
            batches = self.cache.batches(
                self.spaces,
                self.batch_size,
                seed=self.seed,
                epoch=epoch,
                rank=self.rank,
                world=self.world,
                start_step=first,
                rows=self.epoch_views.rows(epoch),
                pixels=isinstance(self.views, StorePixels),
                keep_going=self.skip,
                pinned=self.pin,
            )
            for _, batch in zip(
                range(min(stop - step, self.steps_per_epoch - first)), batches, strict=False
            ):
                yield epoch, batch
                step += 1
