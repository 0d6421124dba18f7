"""The file of one shard: Zarr's chunks one after another, then their index."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

# (data, start=0): CRC-32C of a contiguous uint8 array or bytes, continuing ``start``. This library
# lets other threads run meanwhile, and uses AVX-512 where the processor has it.
from awscrt.checksums import crc32c

from .layout import CRC, ArraySpec

MISSING = 2**64 - 1
ALIGNMENT = 64
"""Large chunks begin at multiples of this many bytes: the processor copies them faster."""
LARGEST_GAP = 4095  # that the format allows
_LARGE = 1 << 16  # a gap then costs less than a thousandth


def alignment(spec: ArraySpec) -> int:
    """What the offsets of an array's chunks are multiples of."""
    return ALIGNMENT if spec.group is not None and spec.chunk_bytes >= _LARGE else 1


def shard_file(
    spec: ArraySpec, values: np.ndarray, aligned: int | None = None
) -> tuple[list[Any], list[int]]:
    """The buffers whose concatenation is the file of one shard, and its chunks' checksums.

    Zeros come before a chunk where it would not begin at a multiple of :func:`alignment`.

    Args:
        values: ``[n, ...]`` with n a whole number of chunks, filled up with the fill value.
            Chunks after them are stated as missing in the shard's index.
        aligned: begin chunks at multiples of this instead.
    """
    step = aligned or alignment(spec)
    rows = spec.chunk[0]
    if len(values) % rows or not 0 < len(values) <= spec.shard[0]:
        raise ValueError(f"{spec.path}: {len(values)} rows are not a whole number of chunks")
    buffers: list[Any] = []
    sums: list[int] = []
    index = np.full((spec.chunks_a_shard, 2), MISSING, "<u8")
    offset = 0
    for number in range(len(values) // rows):
        raw = spec.encode_chunk(values[number * rows : (number + 1) * rows])
        sums.append(crc32c(raw))
        gap = -offset % step
        offset += gap
        buffers += [bytes(gap), raw, sums[-1].to_bytes(CRC, "little")]
        index[number] = offset, raw.nbytes + CRC
        offset += raw.nbytes + CRC
    if spec.group is not None:
        raw = index.tobytes()
        buffers += [raw, crc32c(raw).to_bytes(CRC, "little")]
    return buffers, sums


def shard_file_as_sealed(
    spec: ArraySpec, values: np.ndarray, length: int | None
) -> tuple[list[Any], list[int]]:
    """:func:`shard_file`, of the length of one that was sealed.

    Args:
        length: of the file that was sealed in its place, in a store that is being repaired; None
            in others. Stores of before chunks were aligned have no gaps; the file is then written
            without them, so that it is the one that was there to the byte.
    """
    found = shard_file(spec, values)
    if length is None or length == _length(found[0]):
        return found
    packed = shard_file(spec, values, aligned=1)
    return packed if length == _length(packed[0]) else found


def _length(buffers: Iterable[Any]) -> int:
    return sum(memoryview(buffer).nbytes for buffer in buffers)


def parse_index(spec: ArraySpec, raw: bytes, file_bytes: int, chunks: int) -> np.ndarray:
    """The index of a shard: int64 ``[chunks, 2]`` of offset and length, for its first ``chunks``.

    Args:
        raw: the last ``spec.index_bytes`` bytes of the file.
        file_bytes: length of the file.
        chunks: how many chunks hold rows; the others must be missing.

    Raises:
        ValueError: checksum, a hole where rows should be, or an entry outside the file.
    """
    body, stated = raw[:-CRC], int.from_bytes(raw[-CRC:], "little")
    if len(raw) != spec.index_bytes or crc32c(body) != stated:
        raise ValueError("the shard index does not match its checksum")
    entries = np.frombuffer(body, "<u8").reshape(-1, 2)
    if (entries[chunks:] != MISSING).any():
        raise ValueError("the shard index lists chunks past the last row")
    used = entries[:chunks]
    end = file_bytes - spec.index_bytes
    if (used > end).any() or (used.sum(1) > end).any():
        raise ValueError("the shard index points outside the file, or a chunk is missing")
    if (used[:, 1] < CRC).any():
        raise ValueError("the shard index states an impossible length")
    if spec.fixed_size and (used[:, 1] != spec.chunk_bytes + CRC).any():
        raise ValueError("the shard index states a wrong length")
    return used.astype(np.int64)


def plain_index(spec: ArraySpec, file_bytes: int) -> np.ndarray:
    """The same for a file that is one plain chunk."""
    return np.array([[0, file_bytes]], np.int64)
