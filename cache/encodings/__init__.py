"""How float tokens become codes and scales: one file an encoding, one line to register it."""

from __future__ import annotations

from ...errors import StoreError
from .base import Array, Component, Encoding
from .compact import Compact
from .fp16 import Fp16
from .int4 import Int4
from .int8 import Int8

ENCODINGS: dict[str, Encoding] = {
    encoding.name: encoding
    for encoding in (
        Fp16(),
        Int8(),
        Compact(),
        Int4(),
    )
}


def encoding(name: str) -> Encoding:
    """The encoding of that name.

    Raises:
        StoreError: when there is none; the message lists those that there are.
    """
    if name not in ENCODINGS:
        raise StoreError(f"there is no encoding {name!r}: choose among {', '.join(ENCODINGS)}")
    return ENCODINGS[name]


def holding(peak: float) -> list[str]:
    """Names of the encodings that can hold so many deviations."""
    return [name for name, one in ENCODINGS.items() if peak <= one.limit]


__all__ = ["ENCODINGS", "Array", "Component", "Encoding", "encoding", "holding"]
