"""What zstd frames say of their content before it is decoded (RFC 8878, section 3.1.1)."""

from __future__ import annotations

import numpy as np

_MAGIC = b"\x28\xb5\x2f\xfd"
_RLE, _RESERVED = 1, 3
"""Types of blocks: one byte, repeated; and none that is defined."""


def content_length(raw: np.ndarray) -> int | None:
    """The length of what frames hold, one after the other; None where they do not say, or are none.

    A decoder makes room for what the frames state, and hostile ones may state any length.

    Args:
        raw: uint8 [n].
    """
    data, at, total = memoryview(raw.data), 0, 0
    try:
        while at < len(data):
            if data[at : at + 4] != _MAGIC:
                return None
            descriptor = data[at + 4]
            single, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
            width = (single, 2, 4, 8)[descriptor >> 6]
            if not width:
                return None
            at += 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
            total += int.from_bytes(data[at : at + width], "little") + 256 * (width == 2)
            at = _after_blocks(data, at + width) + 4 * checksum
    except IndexError:  # cut short
        return None
    return total if at == len(data) else None


def _after_blocks(data: memoryview, at: int) -> int:
    """Where the blocks of a frame end that begin at a place."""
    last = 0
    while not last:
        header = data[at] | data[at + 1] << 8 | data[at + 2] << 16
        last, kind = header & 1, header >> 1 & 3
        if kind == _RESERVED:
            raise IndexError
        at += 3 + (1 if kind == _RLE else header >> 3)
    return at
