"""What an encoding is: pure functions between standardised tokens and stored arrays.

Each formula is written once and runs on NumPy arrays and torch tensors (any device) alike. It uses
only operations that IEEE 754 rounds one way (add, multiply, divide, square root, round-half-even,
conversions) in a stated order, so both libraries give the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = Any  # np.ndarray or torch.Tensor; a function returns the kind that it was given

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
LARGEST_SCALE = 65504.0  # the largest finite float16


@dataclass(frozen=True)
class Component:
    """One stored array of an encoding.

    Attributes:
        name: ``codes``, ``scales``.
        dtype: NumPy name of the dtype; little-endian in the store.
        row_shape: shape of one row's part.
        fill: a value that no encoded token has, so that a hole is never taken for data.
        codec: chain of the inner chunk, a key of ``layout.CODECS``.
    """

    name: str
    dtype: str
    row_shape: tuple[int, ...]
    fill: float | int
    codec: str = "raw"


class Encoding(ABC):
    """An encoding of standardised tokens z (float32) as arrays.

    Attributes:
        name: the word that manifests use.
        levels: in words, for tables.
        limit: the largest |z| that can be encoded.
        predicts: whether its codes are stored as what a prediction leaves (see ``prediction``).
        step: of its codes, as a part of a token's root mean square; None: they have none such.
    """

    name: str
    levels: str
    limit: float
    predicts: bool = False
    step: float | None = None

    def with_step(self, step: float | None) -> Encoding:
        """The same with the step that a space states; None: it states none."""
        return self

    @abstractmethod
    def components(self, tokens: int, dim: int) -> tuple[Component, ...]:
        """The arrays of a space with ``tokens`` tokens of ``dim`` dimensions; codes come first."""

    @abstractmethod
    def encode(self, z: Array) -> dict[str, Array]:
        """Arrays by component name for finite float32 z ``[..., N, D]`` with |z| <= limit."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Array], dim: int) -> Array:
        """Float32 z ``[..., N, dim]`` from the arrays by component name."""

    @abstractmethod
    def bound(self, z: Array) -> Array:
        """The largest |decode(encode(z)) - z| possible: float32, broadcastable to z."""

    def refused(self, z: Array) -> tuple[int, ...] | None:
        """Position of the first token of z ``[..., N, D]`` that is not finite or beyond limit."""
        return self.beyond(largest_magnitude(z)[..., 0])

    def beyond(self, peaks: Array) -> tuple[int, ...] | None:
        """The same by the largest magnitude of each token, ``[..., N]``."""
        good = peaks <= self.limit  # false for NaN
        if bool(good.all()):
            return None
        bad = to_numpy(~good)
        return tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))


def namespace(x: Array) -> Any:
    """The library of an array: ``torch`` or ``numpy``."""
    return torch if isinstance(x, torch.Tensor) else np


def cast(x: Array, dtype: str) -> Array:
    """Conversion by NumPy dtype name."""
    return x.to(getattr(torch, dtype)) if isinstance(x, torch.Tensor) else x.astype(dtype)


def view(x: Array, dtype: str) -> Array:
    """The same bits as another dtype of the same width."""
    return x.view(getattr(torch, dtype)) if isinstance(x, torch.Tensor) else x.view(dtype)


def to_numpy(x: Array) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def round_up_to_half(x: Array) -> Array:
    """The smallest float16 that is >= x, for float32 x in [0, 65504]."""
    half = cast(x, "float16")
    low = cast(half, "float32") < x
    return view(view(half, "int16") + cast(low, "int16"), "float16")


def largest_magnitude(z: Array) -> Array:
    """max |z| over the last axis, kept as an axis of length 1."""
    xp = namespace(z)
    return xp.amax(xp.abs(z), -1, keepdims=True)


def scale_for(peak: Array, levels: int) -> Array:
    """float16 scale s: peak / levels rounded up, at least 2^-24, so that |z| / s <= levels."""
    xp = namespace(peak)
    # divided by an array: CUDA would turn a scalar divisor into a multiplication
    return round_up_to_half(
        xp.clip(peak / xp.full_like(peak, levels), SMALLEST_SCALE, LARGEST_SCALE)
    )


def quantise(z: Array, scale: Array, levels: int) -> Array:
    """int8 codes: round-half-even(z / scale), limited to +-levels."""
    xp = namespace(z)
    return cast(xp.clip(xp.round(z / cast(scale, "float32")), -levels, levels), "int8")


def padded(x: Array, length: int) -> Array:
    """The last axis filled up with zeros."""
    xp = namespace(x)
    if x.shape[-1] == length:
        return x
    shape = (*x.shape[:-1], length - x.shape[-1])
    zeros = x.new_zeros(shape) if xp is torch else np.zeros(shape, x.dtype)
    return xp.concatenate([x, zeros], -1)


def folded_sum(x: Array) -> Array:
    """The sum over the last axis, kept as an axis, in a stated order.

    The axis is filled up with zeros to a power of two; then its second half is added to its first
    until one is left.
    """
    length = 1
    while length < x.shape[-1]:
        length *= 2
    x = padded(x, length)
    while length > 1:
        length //= 2
        x = x[..., :length] + x[..., length:]
    return x
