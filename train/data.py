"""What a student trains on: images at the stored views, joined by key with cached tokens."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..cache import Batch, Cache, Tokens
from ..errors import ConfigError, DataError, PreceptorError
from ..pixels import normalise as normalised
from .photometric import ColorJitter
from .students import IMAGENET_MEAN, IMAGENET_STD
from .views import Problems, StoredViews, StorePixels, Views, choose_views, join

__all__ = [
    "ColorJitter",
    "EpochViews",
    "StorePixels",
    "StoredViews",
    "TrainBatch",
    "TrainData",
    "Views",
    "choose_views",
    "decoded",
    "join",
    "normalise",
    "prefetched",
]

T = TypeVar("T")

AHEAD = 3
"""Batches that are ready before they are asked for."""


@dataclass(frozen=True)
class TrainBatch:
    """Rows of the store with the pixels they were computed from.

    Attributes:
        rows: int64 [b], row numbers of the store.
        pixels: uint8 [b, H, W, 3], the stored views at the student's size.
        tokens: encoded tokens [b, N, D] per space.
        regions: float32 [b, 4], the part of each stored view that the pixels show (left, top,
            right, bottom as shares of it); None where they show all of it.
        grids: (rows, columns) per space of tokens on a grid.
        skipped: what was wrong with each damaged row whose place another row took.
    """

    rows: Tensor
    pixels: Tensor
    tokens: dict[str, Tokens]
    regions: Tensor | None = None
    grids: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


class EpochViews:
    """Which stored view of every image an epoch uses: one an image, all of them in turn.

    In cycle c, which is as many epochs as there are views, epoch p uses view (o + p) mod V of an
    image, where the offset o is drawn for each image from (seed, c). Views without tokens are
    passed over.

    Args:
        valid: bool [rows]; row r is view r mod `views` of image r // `views`.
        views: stored views an image.
        seed: of the offsets.
        first: V, of which the first ones are used; None for all.

    Attributes:
        images: how many images have such a view with tokens.

    Raises:
        ConfigError: there are no views, or more than are stored.
    """

    def __init__(
        self, valid: NDArray[np.bool_], views: int, seed: int, first: int | None = None
    ) -> None:
        if first is not None and not 1 <= first <= views:
            raise ConfigError(
                f"views={first}: the store has {views} of every image, so 1 to {views} can be used"
            )
        self._stored, self._views, self._seed = views, first or views, seed
        table = np.asarray(valid, bool).reshape(-1, views)[:, : self._views]
        self._counts = table.sum(1)
        self._kept = np.flatnonzero(self._counts)
        # The valid views of an image first, in their order.
        self._order = np.argsort(~table, axis=1, kind="stable") if self._views > 1 else None
        self.images = len(self._kept)

    def rows(self, epoch: int) -> NDArray[np.int64]:
        """One row of every image, ascending, int64 [images]."""
        if self._order is None:
            return self._kept * self._stored
        cycle, turn = divmod(epoch, self._views)
        bits = np.random.Philox(np.random.SeedSequence([self._seed, cycle, 2])).random_raw(
            len(self._counts)
        )
        counts = self._counts[self._kept].astype(np.uint64)
        places = (bits[self._kept] + np.uint64(turn)) % counts
        views = self._order[self._kept, places.astype(np.int64)]
        return self._kept * self._stored + views


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
        pin: pinned memory, for copies to a CUDA device beside its work.
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
        count = int(cache.plan.views.get("count", 1))
        self.epoch_views = EpochViews(cache.valid, count, seed, first_views)
        self._described = _views_in_words(count, first_views or count)
        images = self.epoch_views.images
        self.steps_per_epoch = images // (batch_size * world)
        self.left_over = images - self.steps_per_epoch * batch_size * world
        if not self.steps_per_epoch:
            raise DataError(
                f"the store has {images} images with tokens, fewer than one batch of {batch_size} "
                f"for each of {world} rank(s): lower recipe.batch_size"
            )
        self._grids = {name: grid for name in self.spaces if (grid := cache[name].grid)}

    def describe(self) -> str:
        """The length of an epoch in a sentence, with what it leaves out."""
        each = f" of {self.world} ranks" if self.world > 1 else ""
        count = int(self.cache.plan.views.get("count", 1))
        without = int(self.cache.plan.rows // count) - self.epoch_views.images
        told = f"an epoch: {self.epoch_views.images:,} images{self._described}"
        if without:
            told += f" ({without:,} have no tokens)"
        told += f" in {self.steps_per_epoch:,} batches of {self.batch_size}{each}"
        if self.left_over:
            told += f"; {self.left_over:,} fill no batch, other ones every epoch"
        return told

    def batches(self, start: int, stop: int) -> Iterator[TrainBatch]:
        """Batches of steps `start` to `stop` - 1, prepared ahead by a thread and the workers.

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

        images = _loaded(self.views, orders(), self.workers)

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


def _views_in_words(stored: int, used: int) -> str:
    if stored == 1:
        return ""
    if used == stored:
        return f", one of {stored} stored views each"
    first = "the first" if used == 1 else f"one of the first {used}"
    return f", {first} of {stored} stored views each"


def normalise(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 [b, H, W, 3] to float32 [b, 3, H, W] on `device`, by ImageNet's mean and deviation.

    The result is channels-last in memory, which convolutions prefer.
    """
    channels_first = pixels.permute(0, 3, 1, 2)
    return normalised(channels_first, IMAGENET_MEAN, IMAGENET_STD, device)


def prefetched(source: Iterator[T], ahead: int) -> Iterator[T]:
    """The items of an iterator, computed up to `ahead` items early by one thread.

    Closing the generator stops the thread.

    Raises:
        Whatever the source does, where its item would have come.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in source:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:  # handed over, whatever it is
            put((False, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, value = ready.get()
            if more:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stopped.set()
        thread.join()


def decoded(
    views: Views, orders: Iterable[Sequence[tuple[int, int]]], workers: int
) -> Iterator[Tensor]:
    """The pixels of lists of (row, epoch), in order, decoded by worker processes (0: in this one).

    Raises:
        DataError: of the image that cannot be read, as if it had been read here.
    """
    images = _loaded(views, orders, workers)

    def checked() -> Iterator[Tensor]:
        for pixels, problems in images:
            if problems:
                raise problems[min(problems)]
            yield pixels

    return checked()


def _loaded(
    views: Views, orders: Iterable[Sequence[tuple[int, int]]], workers: int
) -> Iterator[tuple[Tensor, Problems]]:
    options: dict[str, Any] = {"prefetch_factor": 2} if workers else {}
    loader = DataLoader(
        _Told(views),
        batch_sampler=orders,  # type: ignore[arg-type]  # any iterable is taken
        num_workers=workers,
        collate_fn=_as_is,
        # Its own generator, or the loader would draw from the one that a run resumes.
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    images = iter(loader)  # the workers start here, in the caller's thread

    def checked() -> Iterator[tuple[Tensor, Problems]]:
        for found in images:
            if isinstance(found, PreceptorError):
                raise found
            yield found

    return checked()


class _Told(Dataset[Any]):
    """Errors as values: a loader would bury their sentence in a worker's traceback."""

    def __init__(self, views: Views) -> None:
        self.views = views

    def __getitems__(
        self, items: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Problems] | PreceptorError:
        try:
            return self.views.take(items)
        except PreceptorError as error:
            return error


def _as_is(batch: Any) -> Any:
    return batch
