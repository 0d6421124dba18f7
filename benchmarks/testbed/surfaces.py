"""Procedural surfaces in nine families, and other things to put behind or onto a figure."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import sources

SIZE = 48
"""Side in pixels of the images of the default bed, and of what the specialists see."""

Pixels = NDArray[np.uint8]
Random = np.random.Generator


@lru_cache(maxsize=4)
def _places(size: int) -> tuple[NDArray, NDArray]:
    """Row and column of every pixel, float64 [size, size] each."""
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float64)
    return rows, columns


def surface(family: str, random: Random, size: int = SIZE) -> Pixels:
    """A surface of a family, in two random colours, at a random angle, frequency and phase.

    A larger image shows as many periods: the same surface, drawn more finely.

    Args:
        family: a key of `FAMILIES`.

    Returns:
        uint8 [size, size, 3].
    """
    angle = random.uniform(0, np.pi)
    rows, columns = _places(size)
    centred = columns - size / 2, rows - size / 2
    u = np.cos(angle) * centred[0] + np.sin(angle) * centred[1] + random.uniform(0, size)
    v = -np.sin(angle) * centred[0] + np.cos(angle) * centred[1] + random.uniform(0, size)
    period = random.uniform(5, 9) * (size / SIZE)
    mix = np.clip(FAMILIES[family](u, v, period, random), 0, 1)
    first, second = two_colours(random)
    return (first + mix[..., None] * (second - first)).astype(np.uint8)


def _stripes(u: NDArray, v: NDArray, period: float, random: Random) -> NDArray:
    return _step(np.sin(2 * np.pi * u / period))


def _checks(u: NDArray, v: NDArray, period: float, random: Random) -> NDArray:
    return _step(np.sin(np.pi * u / period * 1.5) * np.sin(np.pi * v / period * 1.5))


def _dots(u: NDArray, v: NDArray, period: float, random: Random) -> NDArray:
    a, b = (u % period) - period / 2, (v % period) - period / 2
    return _step(0.3 * period - np.hypot(a, b))


def _rings(u: NDArray, v: NDArray, period: float, random: Random) -> NDArray:
    wide = 2.5 * period
    a, b = (u % wide) - wide / 2, (v % wide) - wide / 2
    return _step(np.sin(2 * np.pi * np.hypot(a, b) / (0.6 * period)))


def _waves(u: NDArray, v: NDArray, period: float, random: Random) -> NDArray:
    bent = u + 0.35 * period * np.sin(2 * np.pi * v / (1.6 * period))
    return _step(np.sin(2 * np.pi * bent / period))


def _bricks(u: NDArray, v: NDArray, period: float, random: Random) -> NDArray:
    high = 0.8 * period
    course = np.floor(v / high)
    along = (u + (course % 2) * period) % (2 * period)
    joint = 1.6 * (len(u) / SIZE)
    return ((v % high < joint) | (along < joint)).astype(float)


def _clouds(u: NDArray, v: NDArray, period: float, random: Random) -> NDArray:
    coarse = random.uniform(0, 1, (7, 7)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize(u.shape, Image.Resampling.BICUBIC))


def _grain(u: NDArray, v: NDArray, period: float, random: Random) -> NDArray:
    return random.uniform(0, 1, u.shape)


def _shards(u: NDArray, v: NDArray, period: float, random: Random) -> NDArray:
    size = len(u)
    rows, columns = _places(size)
    count = round((size / (1.3 * period)) ** 2)
    places, values = random.uniform(0, size, (count, 2)), random.uniform(0, 1, count)
    squares = (rows[..., None] - places[:, 0]) ** 2 + (columns[..., None] - places[:, 1]) ** 2
    return values[squares.argmin(-1)]


FAMILIES: dict[str, Callable[[NDArray, NDArray, float, Random], NDArray]] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "rings": _rings,
    "waves": _waves,
    "bricks": _bricks,
    "clouds": _clouds,
    "grain": _grain,
    "shards": _shards,
}
"""Each maps rotated coordinates u, v [size, size], a period in pixels and a generator to the
same shape."""


def any_surface(random: Random, size: int = SIZE) -> Pixels:
    return surface(str(random.choice(list(FAMILIES))), random, size)


def plain(random: Random, size: int = SIZE) -> Pixels:
    """One colour, or a gradient between two."""
    first, second = two_colours(random, contrast=0.0)
    angle = random.uniform(0, 2 * np.pi)
    rows, columns = _places(size)
    mix = (np.cos(angle) * columns + np.sin(angle) * rows) / (2 * size) + 0.5
    mix = np.clip(mix, 0, 1) * random.integers(0, 2)
    return (first + mix[..., None] * (second - first)).astype(np.uint8)


def photograph(split: str, random: Random, size: int = SIZE) -> tuple[str, Pixels]:
    """A random square of a random photograph of a split: (its name, uint8 [size, size, 3])."""
    photographs = sources.photographs(split)
    name = str(random.choice(list(photographs)))
    pixels = photographs[name]
    side = int(random.uniform(0.25, 0.9) * min(pixels.shape[:2]))
    top, left = (int(random.integers(0, edge - side + 1)) for edge in pixels.shape[:2])
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    return name, np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def two_colours(random: Random, contrast: float = 70.0) -> tuple[NDArray, NDArray]:
    """Two random colours, float64 [3] each, whose brightness differs by at least `contrast`."""
    while True:
        first, second = random.uniform(0, 255, (2, 3))
        if abs(first.mean() - second.mean()) >= contrast:
            return first, second


def _step(values: NDArray) -> NDArray:
    """A soft edge at zero."""
    return 0.5 + 1.5 * values
