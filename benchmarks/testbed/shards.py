"""WebDataset shards whose bytes depend on their samples alone, and their labels read back.

A sample is ``KEY.png`` and, where it has labels, ``KEY.cls`` (a class), ``KEY.json`` (numbers by
name) or ``KEY.mask.png`` (a class a pixel), as `preceptor eval` reads them.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...cache.durable import write_whole

SHARD = 1000
"""Samples a shard."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One image with what is known of it.

    Attributes:
        source: of which photograph, garment, face or solar cell it was made; what may not be shared
            between splits.
        pixels: uint8 [H, W, 3] or [H, W].
        label: a class, or None.
        targets: numbers by name, or None.
        mask: uint8 [H, W], a class a pixel, or None.
    """

    source: str
    pixels: NDArray[np.uint8]
    label: int | None = None
    targets: Mapping[str, float] | None = None
    mask: NDArray[np.uint8] | None = None


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of one shard set, in the order of its images.

    Attributes:
        keys: of the samples.
        classes: int64 [n], -1 where there is none.
        targets: float64 [n, T]; T is 0 where there are none.
        masks: int64 [n, H, W]; H is 0 where there are none.
    """

    keys: list[str]
    classes: NDArray[np.int64]
    targets: NDArray[np.float64]
    masks: NDArray[np.int64]


def write(folder: Path, prefix: str, samples: Iterable[Sample]) -> list[str]:
    """Write samples as ``folder/000000.tar`` and so on, and ``sources.json`` last.

    Returns:
        The source of every sample, in order.
    """
    sources: list[str] = []
    for number, part in enumerate(_parts(samples)):
        sources += write_shard(folder, prefix, number, part)
    write_sources(folder, sources)
    return sources


def write_shard(folder: Path, prefix: str, number: int, samples: Iterable[Sample]) -> list[str]:
    """Write one shard: its number, and no more than `SHARD` samples.

    Returns:
        The source of every sample, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources: list[str] = []
    shard: list[tuple[str, bytes]] = []
    for place, sample in enumerate(samples, number * SHARD):
        key = f"{prefix}-{place:06d}"
        shard.append((f"{key}.png", _png(sample.pixels)))
        if sample.label is not None:
            shard.append((f"{key}.cls", str(sample.label).encode()))
        if sample.targets is not None:
            shard.append((f"{key}.json", json.dumps(sample.targets).encode()))
        if sample.mask is not None:
            shard.append((f"{key}.mask.png", _png(sample.mask)))
        sources.append(sample.source)
    _write_tar(folder, number, shard)
    return sources


def write_sources(folder: Path, sources: Sequence[str]) -> None:
    """Write ``sources.json``, by which a folder is known to be whole."""
    write_whole(folder / "sources.json", (json.dumps(sources) + "\n").encode())


def pattern(folder: Path) -> str:
    """The shards of a folder as `preceptor` takes them."""
    count = len(list(folder.glob("*.tar")))
    return str(folder / ("000000.tar" if count == 1 else f"{{000000..{count - 1:06d}}}.tar"))


def read_labels(folder: Path) -> Labels:
    """All labels of a folder's shards."""
    keys: list[str] = []
    classes, targets, masks = [], [], []
    for key, parts in _samples(folder):
        keys.append(key)
        classes.append(int(parts.get("cls", b"-1")))
        targets.append(list(json.loads(parts.get("json", b"{}")).values()))
        mask = parts.get("mask.png")
        masks.append(np.asarray(Image.open(io.BytesIO(mask))) if mask else np.zeros((0, 0)))
    return Labels(keys, np.array(classes), np.array(targets, float), np.stack(masks).astype(int))


def digest(folder: Path) -> str:
    """sha256 of all shards of a folder, in order."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.tar")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _parts(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    remaining = iter(samples)
    while part := list(itertools.islice(remaining, SHARD)):
        yield part


def _samples(folder: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    for path in sorted(folder.glob("*.tar")):
        found: dict[str, dict[str, bytes]] = {}
        for name, content in _members(path.read_bytes()):
            key, _, kind = name.partition(".")
            found.setdefault(key, {})[kind] = content
        yield from found.items()


def _members(tar: bytes) -> Iterator[tuple[str, bytes]]:
    """Of a tar that `_write_tar` wrote: plain files of short names. The module tarfile takes many
    times as long for files as small as labels."""
    place = 0
    while name := tar[place : place + 100].rstrip(b"\0"):
        size = int(tar[place + 124 : place + 136].rstrip(b" \0"), 8)
        place += tarfile.BLOCKSIZE
        yield name.decode(), tar[place : place + size]
        place += -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _write_tar(folder: Path, number: int, members: list[tuple[str, bytes]]) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)  # no owner, no time
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    write_whole(folder / f"{number:06d}.tar", archive.getvalue())


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=6)
    return file.getvalue()
