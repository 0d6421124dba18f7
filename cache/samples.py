"""Image samples in WebDataset shards or folders: listed once, then read by position.

In a shard a sample is the run of tar members that share a key, as WebDataset groups them: the key
is a member's path up to the first dot of its base name and what follows is its kind (``jpg``,
``cls`` and so on). The headers of every shard are walked once; from then on any sample is one
positioned read away, in any order and from any thread or process. Lists of shards are kept from one
start to the next (`shard_list`). Shards may lie in object storage (`remote_shard`).
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..errors import DamagedImageError, DataError
from ..progress import counting
from . import tars
from .folders import Folder
from .remote_shard import PARALLEL, RemoteTarShard
from .shard_list import IMAGE_KINDS
from .tars import NOTHING_PASSED, Passed, TarShard
from .walk import Walk

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels: 256 MiB as RGB, and Pillow's own warning level."""
T = TypeVar("T")

_MANY_SHARDS = 32
_READ_AHEAD = 64
"""Samples of remote shards that are asked for together."""


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Where every sample of an ordered set of shards lies. Cheap to pickle, safe to share.

    Attributes:
        keys: the WebDataset key of each sample, or the path below a folder without the extension,
            in row order; unique.
        labels: int64 ``[len]``; the integer in ``.cls`` or the number of the class folder, or -1
            where a sample has none.
        order: what put the samples in this order, for the record.
        ignored: files of a folder that are no images by their extension.
        passed: members of tars that are no regular files.
    """

    keys: list[str]
    labels: NDArray[np.int64]
    order: dict[str, Any]
    _shards: Sequence[TarShard | Folder]
    _shard: NDArray[np.int32]
    _offset: NDArray[np.int64]
    _size: NDArray[np.int64]
    _members: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    passed: Passed = NOTHING_PASSED

    @classmethod
    def from_shards(
        cls,
        shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        progress: Callable[[int, int], None] | None = None,
        members: Sequence[str] = (),
    ) -> SampleIndex:
        """List the samples of tar shards, in the order of the shards, or of a folder.

        Args:
            shards: one path or several. Braces expand as in WebDataset (``train-{000..146}.tar``,
                ``a.tar::b.tar``), then ``*`` and ``?``. Or addresses (``s3://bucket/...``,
                ``gs://``, ``az://``, ``http(s)://``), which are read once from end to end, many at
                a time, and by ranges from then on. A shard may be compressed (gzip, xz,
                bzip2): it is then held in memory, and all of them together may take
                ``tars.MAX_UNPACKED`` bytes unpacked. Or one folder, of a folder for every class or
                of images alone; classes are numbered in the order of their folders' names.
            progress: called with (shards listed, shards in all) after each shard.
            members: further kinds that `member` is to read, such as ``json`` or ``mask.png``.

        Raises:
            DataError: a shard is missing, not a tar file, or cut short; a sample has no image, two
                images, or a label that is no class number; a key occurs twice; no sample at all;
                or as for ``folders.list_folder``.
        """
        paths = tars.expand_shards(shards)
        lists = Walk(members)
        folders = [path for path in paths if os.path.isdir(path)]
        if folders and len(paths) > 1:
            raise DataError(
                f"folder {folders[0]} is named among {len(paths)} sources: name one folder alone, "
                "for the classes of each are numbered by themselves"
            )
        for number, path in enumerate(paths if folders else []):
            lists.add_folder(path)
            if progress is not None:
                progress(number + 1, len(paths))
        for number, (shard, found) in enumerate(() if folders else lists.walked(paths)):
            lists.add_shard(shard, found)
            if progress is not None:
                progress(number + 1, len(paths))
        if not lists.keys:
            wanted = f"images ({', '.join(IMAGE_KINDS)})" if folders else "members such as key.jpg"
            left_out = ""
            if count := lists.passed.count:
                left_out = f"; {count:,} of the members are links or no regular files"
            if folders and (named := tars.names_of_tars(paths[0], lists.ignored)):
                left_out = f"; of the tars in it write their names: data.shards='{named}'"
            raise DataError(f"no sample in {_several(paths)}; expected {wanted}{left_out}")
        return cls(
            keys=lists.keys,
            labels=np.concatenate(lists.labels),
            order={"kind": "folder" if folders else "shards"},
            _shards=lists.shards,
            _shard=np.repeat(
                np.arange(len(lists.shards), dtype=np.int32), [s.samples for s in lists.shards]
            ),
            _offset=np.concatenate(lists.offsets),
            _size=np.concatenate(lists.sizes),
            _members={
                kind: np.asarray(found, np.int64).reshape(-1, 2)
                for kind, found in lists.members.items()
            },
            ignored=tuple(lists.ignored),
            passed=lists.passed,
        )

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def sha256(self) -> str:
        """Hash over every sample in row order: its shard's name, key, image size and label."""
        names = [shard.name for shard in self._shards]
        digest = hashlib.sha256()
        rows = zip(self._shard, self.keys, self._size, self.labels, strict=True)
        for shard, key, size, label in rows:  # tar names hold no zero byte: it can separate
            line = f"{names[shard]}\0{key}\0{size}\0{label}\0"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What identifies these samples, as JSON: count, sha256, order, shards in listed order."""
        return {
            "count": len(self),
            "sha256": self.sha256,
            "order": dict(self.order),
            "shards": [
                {"name": shard.name, "bytes": shard.size, "samples": shard.samples}
                for shard in self._shards
            ],
        }

    def permuted(self, seed: int) -> SampleIndex:
        """The same samples in a fixed random order.

        Rows are sorted by a keyed hash (BLAKE2b) of their key, so the order depends on the seed and
        the keys alone: neither on the order of the shards nor on any library's generator.
        """
        secret = f"preceptor samples {int(seed)}".encode()
        ranks = np.fromiter(
            (
                int.from_bytes(
                    hashlib.blake2b(
                        key.encode("utf-8", "surrogateescape"), digest_size=8, key=secret
                    ).digest(),
                    "little",
                )
                for key in self.keys
            ),
            np.uint64,
            len(self),
        )
        rows = np.argsort(ranks, kind="stable")
        return replace(self._take(rows), order={"kind": "hashed", "seed": int(seed)})

    def _take(self, rows: NDArray[np.int64]) -> SampleIndex:
        return replace(
            self,
            keys=[self.keys[row] for row in rows],
            labels=self.labels[rows],
            _shard=self._shard[rows],
            _offset=self._offset[rows],
            _size=self._size[rows],
            _members={kind: places[rows] for kind, places in self._members.items()},
        )

    def where(self, i: int) -> str:
        """Names sample ``i`` for a message: its key and its shard or folder."""
        shard = self._shards[self._shard[i]]
        return f"{self.keys[i]!r} in {shard.what} {shard.path}"

    def read(self, i: int) -> bytes:
        """The encoded image of sample ``i``, byte for byte as the shard holds it.

        Raises:
            DataError: the shard is gone, has changed since it was listed, or ends too early.
        """
        return self._read(i, int(self._offset[i]), int(self._size[i]))

    def member(self, i: int, kind: str, max_bytes: int) -> bytes | None:
        """Another member of sample ``i``, byte for byte; None where it has none of that kind.

        Args:
            kind: one of the ``members`` that the index was listed with.

        Raises:
            DataError: it is longer than ``max_bytes``, or as for `read`.
        """
        offset, size = (int(value) for value in self._members[kind][i])
        if size < 0:
            return None
        if size > max_bytes:
            raise DataError(
                f"member .{kind} of sample {self.where(i)} has {size:,} bytes, more than "
                f"{max_bytes:,}"
            )
        return self._read(i, offset, size)

    def _read(self, i: int, offset: int, size: int) -> bytes:
        data = self._shards[self._shard[i]].read(offset, size)
        if len(data) != size:
            raise DataError(f"sample {self.where(i)} ends early: {len(data)} of {size} bytes")
        return data

    @cached_property
    def start_method(self) -> str | None:
        """How `multiprocessing` is to start processes that read these samples; None: by default.

        A forked one would inherit the client of remote shards without its threads, and wait for
        ever.
        """
        remote = any(isinstance(shard, RemoteTarShard) for shard in self._shards)
        return "forkserver" if remote else None

    def images(
        self, samples: Iterable[int], max_pixels: int = MAX_PIXELS
    ) -> Iterator[Image.Image | DataError]:
        """Each sample as `image` gives it, or what is wrong with it; read by `each`."""

        def found(i: int) -> Image.Image | DataError:
            try:
                return self.image(i, max_pixels)
            except DataError as error:
                return error

        return self.each(found, samples)

    def each(self, read: Callable[[int], T], items: Iterable[int]) -> Iterator[T]:
        """What a function that reads samples gives for every item, in their order.

        Where shards are remote it is called from several threads, so that many are on their way.
        """
        wanted = [int(item) for item in items]
        if self.start_method is None:
            yield from map(read, wanted)
            return
        with ThreadPoolExecutor(PARALLEL) as pool:
            for first in range(0, len(wanted), _READ_AHEAD):
                yield from pool.map(read, wanted[first : first + _READ_AHEAD])

    def image(self, i: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """Sample ``i`` decoded to RGB: grey repeated, alpha dropped, EXIF orientation not applied.

        16-bit grey keeps its high byte, as libpng reduces it.

        Raises:
            DamagedImageError: the image has more than ``max_pixels`` pixels, is cut short, or none.
            DataError: its bytes cannot be read, today at least.
        """
        data = self.read(i)
        try:
            image = open_image(data, IMAGE_FORMATS, max_pixels)
            width, height = image.size
            if width * height > max_pixels:
                raise DamagedImageError(
                    f"image {self.where(i)} is {width} x {height}, {_too_many(max_pixels)}"
                )
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode == "RGB":  # which `convert` would copy
                image.load()
                return image
            image.info.pop("transparency", None)  # Pillow warns of a palette's before it drops it
            return image.convert("RGB")
        except (DamagedImageError, MemoryError):
            raise
        except Exception as error:  # decoders of damaged bytes raise anything at all
            why = str(error)
            if isinstance(error, Image.DecompressionBombError):  # knows of no option
                raise DamagedImageError(
                    f"image {self.where(i)} has {_too_many(max_pixels)}"
                ) from error
            if isinstance(error, UnidentifiedImageError):  # names an object in memory
                why = f"they are no {', '.join(IMAGE_FORMATS[:-1])} or {IMAGE_FORMATS[-1]}"
            raise DamagedImageError(
                f"image {self.where(i)} ({len(data):,} bytes) cannot be decoded: {why}; "
                "replace it, or let the extraction skip corrupt images"
            ) from error


def _too_many(max_pixels: int) -> str:
    return (
        f"more than {max_pixels:,} pixels: if it is as it should be, raise max_pixels "
        "(data.max_pixels, where the command has it there)"
    )


def open_image(data: bytes, formats: Sequence[str], max_pixels: int) -> Image.Image:
    """An image of which only the header is read, for the caller to compare with ``max_pixels``.

    Pillow refuses images of more than twice its own limit by itself. That is raised, for all of the
    process, where the user asked for more.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and max_pixels > limit:
        Image.MAX_IMAGE_PIXELS = max_pixels
    return Image.open(io.BytesIO(data), formats=list(formats))


def list_samples(
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    members: Sequence[str] = (),
    *,
    quiet: bool = False,
) -> SampleIndex:
    """`SampleIndex.from_shards`, with a progress line where there are many shards, and warnings of
    what was passed by.

    Args:
        quiet: show none; of several processes one is enough.

    Raises:
        DataError: as `SampleIndex.from_shards`.
    """
    least = sys.maxsize if quiet else _MANY_SHARDS
    with counting("list shards", "shards", least=least) as show:
        index = SampleIndex.from_shards(shards, show, members)
    for warning in () if quiet else passed_by(index):
        print(f"warning: {warning}", file=sys.stderr)
    return index


def passed_by(index: SampleIndex) -> list[str]:
    """What of the shards is not in the index though it may be meant to be, a sentence each."""
    found = []
    if index.passed.count:
        found.append(
            f"{index.passed.count:,} members of the tars are links or no regular files and are "
            f"left out, such as {index.passed.first!r}: write the tars with what the links lead to "
            "(tar -h)"
        )
    lacking = np.flatnonzero(index.labels < 0)
    if 0 < len(lacking) < len(index):
        found.append(
            f"{len(lacking):,} of {len(index):,} images lack a label though others have, such as "
            f"{index.where(int(lacking[0]))}: the tars lack their .cls"
        )
    return found


def _several(paths: Sequence[str]) -> str:
    if len(paths) > 1:
        return f"{len(paths)} shards ({paths[0]}, ...)"
    return f"{'folder' if os.path.isdir(paths[0]) else 'shard'} {paths[0]}"
