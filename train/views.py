"""Where a student's pixels come from: images decoded at the stored views, or the store itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..cache import Cache
from ..cache.samples import SampleIndex
from ..cache.views import View
from ..errors import ConfigError, DataError, StoreError
from .crops import RandomCrop
from .photometric import ColorJitter

Problems = dict[int, DataError | StoreError]
"""What is wrong with the image at a place of a list of rows."""


class StoredViews(Dataset[Tensor]):
    """The pixels of rows: each row's image, cut and mirrored as the store says, at any size.

    Args:
        cache: the store.
        index: the images; joined by key, so their order is free.
        size: (height, width) of the result in pixels.
        interpolation: how the view is resampled, a name of `cache.views.INTERPOLATIONS`.
        max_pixels: a larger image is refused.
        jitter: applied after the view, from (seed, epoch, row) alone.
        crop: a box of the view in place of all of it.
        seed: of the jitter.

    Attributes:
        unused: how many images have no row in the store.
        left_out: their keys.

    Raises:
        DataError: rows of the store have no image, or another label; says how many, names some.
        ConfigError: crops of a store that does not hold whole images.
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
        crop: RandomCrop | None = None,
        seed: int = 0,
    ) -> None:
        if crop is not None:
            crop.check(cache)
        self.index, self.size, self.interpolation = index, size, interpolation
        self.jitter, self.crop, self.seed = jitter, crop, seed
        self._limit = {} if max_pixels is None else {"max_pixels": max_pixels}
        self._samples, self.left_out = join(cache, index)
        self.unused = len(self.left_out)
        self._boxes, self._flips, self._sizes = cache.boxes, cache.flips, cache.sizes

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, item: int) -> Tensor:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int | tuple[int, int]]) -> Tensor:
        """uint8 [b, H, W, 3] of rows, or of (row, epoch) where the epoch varies jitter and crop.

        Raises:
            DataError: an image cannot be read, or is not of the size that the store recorded.
        """
        pixels, problems = self.take(items)
        if problems:
            raise problems[min(problems)]
        return pixels

    def take(self, items: Sequence[int | tuple[int, int]]) -> tuple[Tensor, Problems]:
        """The same, with the images that cannot be read by place; their pixels are arbitrary.

        Raises:
            DataError: an image is not of the size that the store recorded.
        """
        pixels = np.empty((len(items), *self.size, 3), dtype=np.uint8)
        problems: Problems = {}
        pairs = [item if isinstance(item, tuple) else (item, 0) for item in items]
        images = self.index.images((self._samples[row] for row, _ in pairs), **self._limit)
        for place, ((row, epoch), image) in enumerate(zip(pairs, images, strict=True)):
            if isinstance(image, DataError):
                problems[place] = image
            else:
                pixels[place] = self._pixels(row, epoch, image)
        return torch.from_numpy(pixels), problems

    def _pixels(self, row: int, epoch: int, image: Image.Image) -> NDArray[np.uint8]:
        height, width = (int(edge) for edge in self._sizes[row])
        if image.size != (width, height):
            key = self.index.keys[int(self._samples[row])]
            raise DataError(
                f"image {key!r} is {image.width} x {image.height} pixels and "
                f"the store was made from one of {width} x {height}: data.shards are other images"
            )
        left, top, right, bottom = (float(edge) for edge in self._boxes[row])
        box = (left, top, right, bottom)
        if self.crop is not None:
            box = self.crop.box(row, epoch, width, height)
        view = View(box, bool(self._flips[row]))
        pixels = view.pixels(image, self.size, self.interpolation)
        return self.jitter(pixels, (self.seed, epoch, row)) if self.jitter else pixels

    def regions(self, rows: Sequence[int], epoch: int) -> Tensor | None:
        """float32 [b, 4]: left, top, right, bottom of each crop as shares of the stored view, as
        mirrored as it is; None where there are no crops."""
        if self.crop is None:
            return None
        found = np.empty((len(rows), 4), np.float32)
        for place, row in enumerate(rows):
            height, width = (int(edge) for edge in self._sizes[row])
            left, top, right, bottom = self.crop.box(row, epoch, width, height)
            if self._flips[row]:
                left, right = width - right, width - left
            found[place] = left / width, top / height, right / width, bottom / height
        return torch.from_numpy(found)


class StorePixels:
    """The pixels of rows as the store holds them: nothing is decoded.

    Args:
        cache: a store with pixels.
        jitter, seed: as those of `StoredViews`.

    Attributes:
        size: (height, width).
    """

    crop = None
    unused = 0

    def __init__(self, cache: Cache, *, jitter: ColorJitter | None = None, seed: int = 0) -> None:
        if cache.pixels is None:
            raise DataError(f"{cache.location} holds no pixels")
        self.cache, self.size = cache, cache.pixels.size
        self.interpolation = cache.pixels.interpolation
        self.jitter, self.seed = jitter, seed

    def __len__(self) -> int:
        return len(self.cache)

    def __getitems__(self, items: Sequence[int | tuple[int, int]]) -> Tensor:
        """As `StoredViews.__getitems__`.

        Raises:
            StoreError: damage.
        """
        pairs = [item if isinstance(item, tuple) else (item, 0) for item in items]
        pixels = self.cache.read_pixels([row for row, _ in pairs])
        for place, (row, epoch) in enumerate(pairs):
            self.vary(pixels, place, row, epoch)
        return pixels

    def take(self, items: Sequence[int | tuple[int, int]]) -> tuple[Tensor, Problems]:
        """As `StoredViews.take`, of rows whose group is damaged."""
        with contextlib.suppress(StoreError):
            return self.__getitems__(items), {}
        pixels = torch.zeros((len(items), *self.size, 3), dtype=torch.uint8)
        problems: Problems = {}
        rows = np.array([item[0] if isinstance(item, tuple) else item for item in items])
        groups = rows // self.cache.plan.group_rows
        for group in np.unique(groups):
            places = np.flatnonzero(groups == group).tolist()
            try:
                pixels[places] = self.__getitems__([items[place] for place in places])
            except StoreError as error:
                problems |= dict.fromkeys(places, error)
        return pixels, problems

    def vary(self, pixels: Tensor, place: int, row: int, epoch: int) -> None:
        """Apply the jitter to one image of uint8 [b, H, W, 3], in place."""
        if self.jitter:
            image = pixels[place].numpy()
            image[:] = self.jitter(image, (self.seed, epoch, row))

    def regions(self, rows: Sequence[int], epoch: int) -> None:
        """As `StoredViews.regions`; whole views are stored, so there are none."""
        return None


Views = StoredViews | StorePixels


def choose_views(
    cache: Cache,
    open_index: Callable[[], SampleIndex] | None,
    size: tuple[int, int],
    *,
    interpolation: str = "bicubic",
    max_pixels: int | None = None,
    jitter: ColorJitter | None = None,
    crop: RandomCrop | None = None,
    seed: int = 0,
) -> tuple[Views, str]:
    """The stored pixels where they are what a student needs, and decoded images elsewhere.

    Args:
        open_index: lists the images, where they are needed; None: there are none.

    Returns:
        The views, and a sentence about them for the user.

    Raises:
        ConfigError: no images were named and the store's pixels do not serve.
        DataError: the images are not those of the store.
    """
    stored, why = cache.pixels, "the store holds none"
    if stored is not None:
        shape = f"{stored.size[0]} x {stored.size[1]}, {stored.interpolation}"
        wanted = f"{size[0]} x {size[1]}, {interpolation}"
        if crop is None and (stored.size, stored.interpolation) == (size, interpolation):
            return StorePixels(cache, jitter=jitter, seed=seed), f"pixels: from the store ({shape})"
        why = f"the store's are {shape}, the student takes {wanted}"
        if crop is not None:
            why = "the store's are of whole views and recipe.crop cuts others"
    if open_index is None:
        if crop is not None:  # no pixels that a store can hold would serve
            raise ConfigError(
                "data.shards is null and recipe.crop cuts boxes of the images themselves: name "
                "the images with data.shards=..., or set recipe.crop=null"
            )
        drop = f"`preceptor drop cache={cache.location} teacher=pixels` and "
        instead = "" if stored is None else drop
        raise ConfigError(
            f"data.shards is null and the store's pixels cannot be used ({why}): name the images "
            f"with data.shards=..., or {instead}store pixels with `preceptor add "
            f"cache={cache.location} "
            f"pixels.size=[{size[0]},{size[1]}] pixels.interpolation={interpolation}`"
        )
    views = StoredViews(
        cache,
        open_index(),
        size,
        interpolation=interpolation,
        max_pixels=max_pixels,
        jitter=jitter,
        crop=crop,
        seed=seed,
    )
    told = f"pixels: decoded from data.shards ({why})"
    if views.unused:
        examples = ", ".join(repr(key) for key in views.left_out[:3])
        told += (
            f"; {views.unused:,} images there have no row in the store and are left out, "
            f"such as {examples}"
        )
    return views, told


def join(
    cache: Cache, index: SampleIndex, option: str = "data.shards"
) -> tuple[NDArray[np.int64], list[str]]:
    """For every row of the store the position of its image, and the keys that have no row.

    Args:
        option: what named the images, for messages.

    Raises:
        DataError: rows have no image, or a label that is not the image's; how many, and some.
    """
    positions = {key: position for position, key in enumerate(index.keys)}
    samples = np.fromiter((positions.get(key, -1) for key in cache.keys), np.int64, len(cache))
    missing = sorted({cache.keys[int(row)] for row in np.flatnonzero(samples < 0)})
    if missing:
        examples = ", ".join(repr(key) for key in missing[:3])
        stored = len(set(cache.keys))
        raise DataError(
            f"{len(missing):,} of the {stored:,} images that the store was made from are not in "
            f"{option} ({len(index):,} images), such as {examples}: name the shards that were "
            "extracted"
        )
    ours, theirs = index.labels[samples], np.asarray(cache.labels)
    other = np.flatnonzero((ours != theirs) & (ours >= 0) & (theirs >= 0))
    if len(other):
        named = {cache.keys[int(row)]: int(row) for row in other}
        examples = ", ".join(
            f"{key!r} ({theirs[row]} in the store, {ours[row]} there)"
            for key, row in sorted(named.items())[:3]
        )
        raise DataError(
            f"{len(named):,} images of {option} have another label than in the store, such as "
            f"{examples}: they are other images of the same names, or labels were numbered anew"
        )
    used = np.zeros(len(index), bool)
    used[samples] = True
    return samples, [index.keys[int(position)] for position in np.flatnonzero(~used)]
