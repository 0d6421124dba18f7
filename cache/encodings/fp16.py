"""fp16: the standardised tokens as IEEE half floats."""

from __future__ import annotations

from collections.abc import Mapping

from .base import LARGEST_SCALE, Array, Component, Encoding, cast, namespace


class Fp16(Encoding):
    """code = z rounded to float16 (half-even); no scales."""

    name = "fp16"
    levels = "half floats"
    limit = LARGEST_SCALE

    def components(self, tokens: int, dim: int) -> tuple[Component, ...]:
        return (Component("codes", "float16", (tokens, dim), float("nan")),)

    def encode(self, z: Array) -> dict[str, Array]:
        return {"codes": cast(z, "float16")}

    def decode(self, parts: Mapping[str, Array], dim: int) -> Array:
        return cast(parts["codes"], "float32")

    def bound(self, z: Array) -> Array:
        # half a unit in the last place: 11 significant bits, or the spacing of subnormals
        return namespace(z).clip(namespace(z).abs(z) * 2.0**-11, 2.0**-25, None)
