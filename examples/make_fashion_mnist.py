"""Writes the Fashion-MNIST shards in examples/data from the Debian package dataset-fashion-mnist.

    python examples/make_fashion_mnist.py
    python examples/make_fashion_mnist.py source=/path/to/idx out=/tmp/fashion-mnist

4,000 training and 1,000 test images, the same number of each class, in an order that does not
depend on the class. Shards are tar files of PNG (grey, 28 x 28, pixels untouched) and .cls,
gzipped: the headers and padding of so small members are four fifths of a plain tar. Two runs with
the same versions of Pillow and zlib write the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SOURCE = Path("/usr/share/datasets/fashion-mnist")
OUT = Path(__file__).parent / "data" / "fashion-mnist"
CLASSES = 10
SHARD = 1000
SPLITS = {"train": ("train", 400), "test": ("t10k", 100)}


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The uint8 array in a gzipped idx file: zero, type, rank, dimensions, values."""
    try:
        data = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise SystemExit(
            f"{path} is missing; install it with: apt-get install dataset-fashion-mnist"
        ) from None
    zeros, kind, rank = struct.unpack(">HBB", data[:4])
    if zeros or kind != 0x08:
        raise SystemExit(f"{path} is not an idx file of unsigned bytes")
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def choose(labels: NDArray[np.uint8], each: int, split: str) -> list[int]:
    """The first ``each`` images of every class, ordered by a hash of their names."""
    first = np.concatenate([np.flatnonzero(labels == label)[:each] for label in range(CLASSES)])
    if len(first) != each * CLASSES:
        raise SystemExit(f"{split}: fewer than {each} images of some class")
    return sorted(first.tolist(), key=lambda i: hashlib.sha256(name(split, i).encode()).digest())


def name(split: str, i: int) -> str:
    """Key of image ``i`` of the original split."""
    return f"{split}-{i:05d}"


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=9)
    return file.getvalue()


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            header = tarfile.TarInfo(member)  # no owner, no time
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    path.write_bytes(gzip.compress(archive.getvalue(), 9, mtime=0))


def make(source: Path = SOURCE, out: Path = OUT) -> list[Path]:
    """Writes all shards and returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, (prefix, each) in SPLITS.items():
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        chosen = choose(labels, each, split)
        for shard, start in enumerate(range(0, len(chosen), SHARD)):
            members = []
            for i in chosen[start : start + SHARD]:
                members.append((f"{name(split, i)}.png", png(images[i])))
                members.append((f"{name(split, i)}.cls", str(labels[i]).encode()))
            paths.append(out / f"{split}-{shard:06d}.tar.gz")
            write_shard(paths[-1], members)
    return paths


def main() -> None:
    options = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    if set(options) - {"source", "out"}:
        raise SystemExit(__doc__)
    for path in make(Path(options.get("source", SOURCE)), Path(options.get("out", OUT))):
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
