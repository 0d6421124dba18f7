"""Which rows of a store that is being written are valid, as far as its shards say already."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError
from .commit import is_whole
from .durable import read_whole
from .layout import CRC, ArraySpec, Layout
from .manifest import Manifest
from .plan import PIXELS, ROWS
from .sharding import crc32c, parse_index, plain_index


def stored_valid(root: Path, manifest: Manifest, shard: int) -> NDArray[np.bool_] | None:
    """Which rows of a shard are valid: by its facts, or by a teacher's tokens, which are fill
    values alone where a row is not valid.

    Returns:
        bool ``[rows of the shard]``; None where no unit that could tell is committed.

    Raises:
        StoreError: the file that says it is damaged.
    """
    layout = Layout(manifest.plan)
    count = manifest.plan.rows_in(shard)
    for unit in manifest.plan.units:
        if unit == PIXELS or not is_whole(root, manifest, layout, unit, shard):
            continue
        if unit == ROWS:
            return _values(root, layout, layout.row_arrays()["valid"], shard)[:count] == 1
        # the last component: codes come first, and of some encodings they use every value there is
        arrays = [
            list(layout.space_arrays(space).values())[-1] for space in manifest.plan.spaces_of(unit)
        ]
        spec = min(arrays, key=lambda one: one.row_bytes)
        values = _values(root, layout, spec, shard)[:count]
        return np.asarray(~spec.filled(values).reshape(count, -1).all(1))
    return None


def _values(root: Path, layout: Layout, spec: ArraySpec, shard: int) -> np.ndarray:
    try:
        return np.concatenate(list(_chunks(root, layout, spec, shard)))
    except (ValueError, OSError) as error:
        raise StoreError(
            f"{root / spec.file(shard)} is damaged ({error}): run `preceptor verify` and then "
            "`preceptor repair`"
        ) from error


def _chunks(root: Path, layout: Layout, spec: ArraySpec, shard: int) -> Iterator[np.ndarray]:
    raw = read_whole(root / spec.file(shard))
    if spec.group is None:
        index = plain_index(spec, len(raw))
    else:
        tail = raw[-spec.index_bytes :]
        index = parse_index(spec, tail, len(raw), layout.chunks_in(spec, shard))
    for offset, length in index.tolist():
        chunk = np.frombuffer(raw, np.uint8, length - CRC, offset)
        end = offset + length
        if crc32c(chunk) != int.from_bytes(raw[end - CRC : end], "little"):
            raise ValueError("another checksum")
        yield spec.decode_chunk(chunk)
