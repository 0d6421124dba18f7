"""compact: steps as wide as a set part of the token's own spread, compressed channel by channel."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from .base import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    Array,
    Component,
    Encoding,
    cast,
    folded_sum,
    largest_magnitude,
    namespace,
    quantise,
    round_up_to_half,
)

LEVELS = 127
FILL = -128
STEP = 15 / 128  # of the root mean square: a relative error of 15/128 / sqrt(12) = 3.4 %
UNSTATED_STEP = 1 / 8  # of stores of versions 1 and 2


class Compact(Encoding):
    """scale = max(step rms(z), max|z| / 127) rounded up to float16; code = z / scale rounded.

    The step follows each token's root mean square, not its largest value, so every token has
    about the same relative error, step / sqrt(12), whatever its outliers. Most codes need under
    6 bits. What is stored is what their prediction leaves (``prediction``), channels first and
    compressed with Zstandard. Decoding does not need the step: every token has its scale.

    Args:
        step: a multiple of 1/128, which float32 holds exactly.
    """

    name = "compact"
    limit = LEVELS * LARGEST_SCALE
    predicts = True

    def __init__(self, step: float = STEP) -> None:
        self.step: float = step
        self.levels = f"steps of {Fraction(step)} rms, zstd"

    def with_step(self, step: float | None) -> Compact:
        return Compact(UNSTATED_STEP if step is None else step)

    def components(self, tokens: int, dim: int) -> tuple[Component, ...]:
        return (
            Component("codes", "int8", (tokens, dim), FILL, "channel-zstd"),
            Component("scales", "float16", (tokens,), float("nan")),
        )

    def encode(self, z: Array) -> dict[str, Array]:
        scale = self._scale(z)
        return {"codes": quantise(z, scale, LEVELS), "scales": scale[..., 0]}

    def _scale(self, z: Array) -> Array:
        xp = namespace(z)
        peak = largest_magnitude(z)
        # |z| <= peak, so the quotient cannot overflow when squared, nor vanish as a whole
        unit = z / xp.where(peak > 0, peak, xp.ones_like(peak))
        total = folded_sum(unit * unit)
        rms = peak * xp.sqrt(total / xp.full_like(total, z.shape[-1]))
        step = xp.maximum(rms * self.step, peak / xp.full_like(peak, LEVELS))
        return round_up_to_half(xp.clip(step, SMALLEST_SCALE, LARGEST_SCALE))

    def decode(self, parts: Mapping[str, Array], dim: int) -> Array:
        return parts["codes"] * cast(parts["scales"], "float32")[..., None]

    def bound(self, z: Array) -> Array:
        return cast(self._scale(z), "float32") * (0.5 + 2.0**-15)
