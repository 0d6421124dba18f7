"""The facts about rows that are known when they are extracted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import StoreError


@dataclass
class RowBatch:
    """Facts about b consecutive rows.

    Attributes:
        keys: b keys of samples.
        labels: int64 ``[b]``; -1 where unknown.
        sizes: int32 ``[b, 2]``: height and width of the source image, pixels.
        boxes: float32 ``[b, 4]``: left, top, right, bottom of the view, source pixels.
        flips: bool ``[b]``: whether the view is mirrored.
        valid: bool ``[b]``; False: the image was corrupt, or a teacher gave tokens of it that
            cannot be stored, and it was skipped: the row has no tokens.
    """

    keys: list[str]
    labels: np.ndarray
    sizes: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray
    valid: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def arrays(self, key_bytes: int) -> dict[str, np.ndarray]:
        """The stored form by array name.

        Raises:
            StoreError: a wrong shape, or a key that is empty, too long or holds a NUL.
        """
        count = len(self.keys)
        stored: dict[str, np.ndarray] = {
            "key": np.zeros((count, key_bytes), np.uint8),
            "label": np.asarray(self.labels, np.int64),
            "size": np.asarray(self.sizes, np.int32),
            "box": np.asarray(self.boxes, np.float32),
            "flip": np.asarray(self.flips, bool).astype(np.uint8),
            "valid": np.asarray(self.valid, bool).astype(np.uint8),
        }
        for position, key in enumerate(self.keys):
            raw = key.encode() if is_text(key) else b""
            if not raw or len(raw) > key_bytes or b"\0" in raw:
                raise StoreError(
                    f"row key {key!r} cannot be stored: it must be 1 to {key_bytes} bytes "
                    "(key_bytes) of UTF-8 without NUL"
                )
            stored["key"][position, : len(raw)] = np.frombuffer(raw, np.uint8)
        shapes = {"label": (), "size": (2,), "box": (4,), "flip": (), "valid": ()}
        for name, shape in shapes.items():
            if stored[name].shape != (count, *shape):
                raise StoreError(
                    f"{name} of {count} rows must have shape {(count, *shape)}, "
                    f"not {stored[name].shape}"
                )
        return stored


def is_text(key: str) -> bool:
    """Whether a key can be written as UTF-8: names of files need not be."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def decode_keys(stored: np.ndarray) -> list[str]:
    """Keys from their stored form, uint8 ``[rows, K]``.

    Raises:
        ValueError: bytes that are not UTF-8: a hole, or damage.
    """
    return [bytes(row).rstrip(b"\0").decode() for row in stored]
