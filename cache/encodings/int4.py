"""int4: 15 levels with one scale for every 64 dimensions, two codes a byte."""

from __future__ import annotations

from collections.abc import Mapping

from .base import (
    LARGEST_SCALE,
    Array,
    Component,
    Encoding,
    cast,
    largest_magnitude,
    namespace,
    padded,
    quantise,
    scale_for,
)

LEVELS = 7
GROUP = 64
OFFSET = 8  # nibbles are 1 to 15: zero never occurs, so a byte of zeros is a hole


class Int4(Encoding):
    """Groups of 64 dimensions, the last filled up with zeros and stored in full.

    scale = max|z| of the group / 7 rounded up to float16; code = round-half-even(z / scale); byte
    k of a token holds code 2k + 8 in its low half and code 2k+1 + 8 in its high half.
    """

    name = "int4"
    levels = "15 levels, one scale for 64 dimensions"
    limit = LEVELS * LARGEST_SCALE

    def components(self, tokens: int, dim: int) -> tuple[Component, ...]:
        groups = -(-dim // GROUP)
        return (
            Component("codes", "uint8", (tokens, (dim + 1) // 2), 0),
            Component("scales", "float16", (tokens, groups), float("nan")),
        )

    def encode(self, z: Array) -> dict[str, Array]:
        grouped = _grouped(z)
        scale = scale_for(largest_magnitude(grouped), LEVELS)
        codes = _flat(quantise(grouped, scale, LEVELS))
        nibbles = cast(codes + OFFSET, "uint8")[..., : z.shape[-1] + z.shape[-1] % 2]
        return {"codes": nibbles[..., 0::2] + nibbles[..., 1::2] * 16, "scales": scale[..., 0]}

    def decode(self, parts: Mapping[str, Array], dim: int) -> Array:
        codes = parts["codes"]
        xp = namespace(codes)
        nibbles = _flat(xp.stack([codes & 15, codes >> 4], -1))
        signed = cast(nibbles[..., :dim], "int8") - OFFSET
        z = _grouped(signed) * cast(parts["scales"], "float32")[..., None]
        return _flat(z)[..., :dim]

    def bound(self, z: Array) -> Array:
        scale = cast(scale_for(largest_magnitude(_grouped(z)), LEVELS), "float32")
        wide = scale + namespace(z).zeros_like(_grouped(z))
        return _flat(wide)[..., : z.shape[-1]] * (0.5 + 2.0**-18)


def _grouped(z: Array) -> Array:
    """``[..., D]`` as ``[..., groups, 64]``, filled up with zeros."""
    groups = -(-z.shape[-1] // GROUP)
    return padded(z, groups * GROUP).reshape(*z.shape[:-1], groups, GROUP)


def _flat(x: Array) -> Array:
    """``[..., a, b]`` as ``[..., a * b]``, even where there are no tokens at all."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
