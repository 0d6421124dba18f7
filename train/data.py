"""What a student trains on: images at the stored views, joined by key with cached tokens."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms

from ..cache import Cache, Tokens
from ..cache.samples import SampleIndex
from ..cache.views import View
from ..errors import DataError, PreceptorError
from .students import IMAGENET_MEAN, IMAGENET_STD

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
    """

    rows: Tensor
    pixels: Tensor
    tokens: dict[str, Tokens]


@dataclass(frozen=True)
class ColorJitter:
    """Random brightness, contrast and saturation, each by a factor from [1 - x, 1 + x].

    Teachers did not see the change: small values ask the student to be invariant to it.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __call__(self, pixels: NDArray[np.uint8], entropy: Sequence[int]) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] to the same; equal entropy gives equal pixels."""
        random = np.random.default_rng(list(entropy))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        for strength, adjust in (
            (self.brightness, transforms.adjust_brightness),
            (self.contrast, transforms.adjust_contrast),
            (self.saturation, transforms.adjust_saturation),
        ):
            if strength:
                image = adjust(image, float(random.uniform(max(0.0, 1 - strength), 1 + strength)))
        return np.asarray(image.permute(1, 2, 0).contiguous().numpy())

    def __bool__(self) -> bool:
        return bool(self.brightness or self.contrast or self.saturation)


class StoredViews(Dataset[Tensor]):
    """The pixels of rows: each row's image, cut and mirrored as the store says, at any size.

    Args:
        cache: the store.
        index: the images; joined by key, so their order is free.
        size: (height, width) of the result in pixels.
        interpolation: how the view is resampled, a name of `cache.views.INTERPOLATIONS`.
        max_pixels: a larger image is refused.
        jitter: applied after the view, from (seed, epoch, row) alone.
        seed: of the jitter.

    Attributes:
        unused: how many images have no row in the store.

    Raises:
        DataError: rows of the store have no image; says how many and names some.
    """

    def __init__(
        self,
        cache: Cache,
        index: SampleIndex,
        size: tuple[int, int],
        *,
        interpolation: str = "bicubic",
        max_pixels: int | None = None,
        jitter: ColorJitter | None = None,
        seed: int = 0,
    ) -> None:
        self.index, self.size, self.interpolation = index, size, interpolation
        self.jitter, self.seed = jitter, seed
        self._limit = {} if max_pixels is None else {"max_pixels": max_pixels}
        self._samples, self.unused = join(cache, index)
        self._boxes, self._flips, self._sizes = cache.boxes, cache.flips, cache.sizes

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, item: int) -> Tensor:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int | tuple[int, int]]) -> Tensor:
        """uint8 [b, H, W, 3] of rows, or of (row, epoch) where the epoch varies the jitter.

        Raises:
            DataError: an image cannot be read, or is not of the size that the store recorded.
        """
        pixels = np.empty((len(items), *self.size, 3), dtype=np.uint8)
        for place, item in enumerate(items):
            row, epoch = item if isinstance(item, tuple) else (item, 0)
            pixels[place] = self._pixels(row, epoch)
        return torch.from_numpy(pixels)

    def _pixels(self, row: int, epoch: int) -> NDArray[np.uint8]:
        sample = int(self._samples[row])
        image = self.index.image(sample, **self._limit)
        height, width = (int(edge) for edge in self._sizes[row])
        if image.size != (width, height):
            raise DataError(
                f"image {self.index.keys[sample]!r} is {image.width} x {image.height} pixels and "
                f"the store was made from one of {width} x {height}: data.shards are other images"
            )
        left, top, right, bottom = (float(edge) for edge in self._boxes[row])
        view = View((left, top, right, bottom), bool(self._flips[row]))
        pixels = view.pixels(image, self.size, self.interpolation)
        return self.jitter(pixels, (self.seed, epoch, row)) if self.jitter else pixels


class TrainData:
    """An endless, repeatable sequence of joined batches.

    Step k of a run is the same batch whatever was run before it: rows come from the store's
    shuffled groups by (seed, epoch), so a run can go on at any step. Every rank gets the same
    number of batches an epoch.

    Args:
        cache: the store.
        views: its images.
        spaces: whose tokens to read.
        batch_size: rows a batch and a rank.
        seed: of the order.
        workers: processes that decode images; 0 decodes in the thread that prepares batches.
        rank, world: this process among those that share the rows.
        pin: pinned memory, for copies to a CUDA device beside its work.

    Raises:
        DataError: the store has fewer valid rows than one batch for every rank.
    """

    def __init__(
        self,
        cache: Cache,
        views: StoredViews,
        spaces: Sequence[str],
        batch_size: int,
        *,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
    ) -> None:
        self.cache, self.views, self.spaces = cache, views, list(spaces)
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.rank, self.world, self.pin = rank, world, pin
        count = int(cache.valid.sum())
        self.steps_per_epoch = count // (batch_size * world)
        if not self.steps_per_epoch:
            raise DataError(
                f"the store has {count} valid rows, fewer than one batch of {batch_size} for each "
                f"of {world} rank(s): lower recipe.batch_size"
            )

    def batches(self, start: int, stop: int) -> Iterator[TrainBatch]:
        """Batches of steps `start` to `stop` - 1, prepared ahead by a thread and the workers."""
        waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def orders() -> Iterator[list[tuple[int, int]]]:
            # The loader asks for orders ahead of the images it returns, and returns them in order.
            for epoch, batch in self._token_batches(start, stop):
                waiting.put(batch)
                yield [(int(row), epoch) for row in batch.rows]

        images = decoded(self.views, orders(), self.workers)

        def joined() -> Iterator[TrainBatch]:
            for pixels in images:
                batch = waiting.get()
                yield TrainBatch(
                    rows=torch.as_tensor(batch.rows),
                    pixels=pixels.pin_memory() if self.pin else pixels,
                    tokens=dict(batch.tokens),
                )

        return prefetched(joined(), AHEAD)

    def _token_batches(self, start: int, stop: int) -> Iterator[tuple[int, Any]]:
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
            )
            for _, batch in zip(
                range(min(stop - step, self.steps_per_epoch - first)), batches, strict=False
            ):
                yield epoch, batch
                step += 1


def join(cache: Cache, index: SampleIndex) -> tuple[NDArray[np.int64], int]:
    """For every row of the store the position of its image, and how many images have no row.

    Raises:
        DataError: rows have no image; says how many and names some.
    """
    positions = {key: position for position, key in enumerate(index.keys)}
    samples = np.fromiter((positions.get(key, -1) for key in cache.keys), np.int64, len(cache))
    missing = sorted({cache.keys[int(row)] for row in np.flatnonzero(samples < 0)})
    if missing:
        examples = ", ".join(repr(key) for key in missing[:3])
        stored = len(set(cache.keys))
        raise DataError(
            f"{len(missing):,} of the {stored:,} images that the store was made from are not in "
            f"data.shards ({len(index):,} images), such as {examples}: name the shards that were "
            "extracted"
        )
    return samples, len(index) - len(np.unique(samples))


def normalise(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 [b, H, W, 3] to float32 [b, 3, H, W] on `device`, by ImageNet's mean and deviation.

    The result is channels-last in memory, which convolutions prefer.
    """
    mean = torch.tensor(IMAGENET_MEAN, device=device) * 255.0
    std = torch.tensor(IMAGENET_STD, device=device) * 255.0
    scaled = (pixels.to(device, non_blocking=True).float() - mean) / std
    return scaled.permute(0, 3, 1, 2)


def prefetched(source: Iterator[T], ahead: int) -> Iterator[T]:
    """The items of an iterator, computed up to `ahead` items early by one thread.

    An exception of the source is raised where its item would have come. Closing the generator stops
    the thread.
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
    views: StoredViews, orders: Iterable[Sequence[tuple[int, int]]], workers: int
) -> Iterator[Tensor]:
    """The pixels of lists of (row, epoch), in order, decoded by worker processes (0: in this one).

    Raises:
        DataError: of the image that cannot be read, as if it had been read here.
    """
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

    def checked() -> Iterator[Tensor]:
        for pixels in images:
            if isinstance(pixels, PreceptorError):
                raise pixels
            yield pixels

    return checked()


class _Told(Dataset[Any]):
    """Errors as values: a loader would bury their sentence in a worker's traceback."""

    def __init__(self, views: StoredViews) -> None:
        self.views = views

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> Tensor | PreceptorError:
        try:
            return self.views.__getitems__(items)
        except PreceptorError as error:
            return error


def _as_is(batch: Any) -> Any:
    return batch
