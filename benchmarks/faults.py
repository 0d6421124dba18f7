"""Faults that disks, people and power cuts cause to files; see torture_cache.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from preceptor.cache import Cache
from preceptor.errors import PreceptorError

Random = np.random.Generator


def flip(file: Path, random: Random) -> None:
    """One bit at a random place."""
    raw = bytearray(file.read_bytes())
    raw[random.integers(len(raw))] ^= 1 << int(random.integers(8))
    file.write_bytes(raw)


def truncate(file: Path, random: Random) -> None:
    """A random length below the file's own, zero included."""
    raw = file.read_bytes()
    file.write_bytes(raw[: random.integers(len(raw))])


def zero(file: Path, random: Random) -> None:
    """Zeros of the same length: a block that was never written."""
    file.write_bytes(bytes(file.stat().st_size))


def delete(file: Path, random: Random) -> None:
    file.unlink()


FAULTS: dict[str, Callable[[Path, Random], None]] = {
    "flip": flip,
    "truncate": truncate,
    "zero": zero,
    "delete": delete,
}


def swap(one: Path, other: Path) -> None:
    """Exchange two files."""
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def everything(path: Path) -> dict[str, bytes]:
    """All that a reader can get out of a store, as bytes.

    Raises:
        StoreError: the reader noticed that something is wrong.
    """
    cache = Cache.open(path)
    rows = np.flatnonzero(cache.valid)
    found = {"keys": "\n".join(cache.keys).encode()}
    for name in ("labels", "valid", "sizes", "boxes", "flips"):
        found[name] = getattr(cache, name).tobytes()
    for name, space in cache.spaces.items():
        values: torch.Tensor = space.decode(space.read(rows))
        moments = space.statistics()
        found[name] = values.numpy().tobytes() + moments.mean.tobytes() + moments.scatter.tobytes()
    if cache.pixels is not None:
        found["pixels"] = cache.read_pixels(rows).numpy().tobytes()
    return found


def noticed_by_reader(path: Path, good: dict[str, bytes]) -> bool | None:
    """True: opening or reading was refused; False: all values are right; None: silently wrong."""
    try:
        return False if everything(path) == good else None
    except PreceptorError:
        return True
