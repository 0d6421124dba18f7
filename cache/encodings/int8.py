"""int8: one scale a token, 255 levels."""

from __future__ import annotations

from collections.abc import Mapping

from .base import (
    LARGEST_SCALE,
    Array,
    Component,
    Encoding,
    cast,
    largest_magnitude,
    quantise,
    scale_for,
)

LEVELS = 127
FILL = -128


class Int8(Encoding):
    """scale = max|z| / 127 rounded up to float16; code = round-half-even(z / scale)."""

    name = "int8"
    levels = "255 levels, one scale a token"
    limit = LEVELS * LARGEST_SCALE

    def components(self, tokens: int, dim: int) -> tuple[Component, ...]:
        return (
            Component("codes", "int8", (tokens, dim), FILL),
            Component("scales", "float16", (tokens,), float("nan")),
        )

    def encode(self, z: Array) -> dict[str, Array]:
        scale = scale_for(largest_magnitude(z), LEVELS)
        return {"codes": quantise(z, scale, LEVELS), "scales": scale[..., 0]}

    def decode(self, parts: Mapping[str, Array], dim: int) -> Array:
        return parts["codes"] * cast(parts["scales"], "float32")[..., None]

    def bound(self, z: Array) -> Array:
        # half a step, and the rounding of z / scale and code * scale in float32
        return cast(scale_for(largest_magnitude(z), LEVELS), "float32") * (0.5 + 2.0**-15)
