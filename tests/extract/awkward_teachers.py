"""Teachers with awkward tokens, such as ``call:preceptor.tests.extract.awkward_teachers:dark``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from preceptor.extract.teachers.base import Preprocessing
from preceptor.tests.extract.tiny_teachers import Tiny
from torch import Tensor

DIM = 12


class Awkward(Tiny):
    """A tiny network's patches after a change; ``cls`` is their mean."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(DIM, 0)
        self._change = change

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        patches = self._change(super().__call__(pixels)["patch"])
        return {"patch": patches, "cls": patches.mean(1, keepdim=True)}


def dark() -> Awkward:
    """Zeros, as a map that nothing lights."""
    return Awkward(torch.zeros_like)


def still() -> Awkward:
    """The same tokens whatever the image."""
    return Awkward(lambda x: (0.1 * torch.arange(1, DIM + 1)).expand_as(x).clone())


def stray() -> Awkward:
    """Said to be the same as `still`, and very far from it."""
    return Awkward(lambda x: 1e9 + 0 * x)


def trembling() -> Awkward:
    """The same tokens but for rounding, which depends on what else is in the batch."""
    return Awkward(lambda x: (1 + torch.arange(DIM)) * (1 + 1e-7 * (x - x.mean()).sign()))


def sparse() -> Awkward:
    """A rectified map of which most tokens are zeros."""
    return Awkward(lambda x: (x - 1.1).clamp_min(0))


def faint() -> Awkward:
    return Awkward(lambda x: 1e-12 * x)


def choosy() -> Awkward:
    """No numbers for some images."""
    return Awkward(lambda x: torch.where(x[:, :1, :1] > 0, torch.nan, x))


def massive() -> Awkward:
    """Two dimensions are some million times as large as the others."""
    return Awkward(lambda x: x * torch.where(torch.arange(DIM) % 7 == 3, 1e4, 1e-2))


class Contrast(Tiny):
    """Divides by the span of an image's pixels, which is zero for a blank one."""

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        span = pixels.flatten(1).amax(1) - pixels.flatten(1).amin(1)
        return {name: x / span[:, None, None] for name, x in super().__call__(pixels).items()}


def contrast() -> Contrast:
    return Contrast(DIM, 0)


class Beacon(Tiny):
    """Its tokens of a blank image are finite and a million times as large as they should be."""

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        blank = pixels.flatten(1).amax(1) == pixels.flatten(1).amin(1)
        factor = torch.where(blank, 1e6, 1.0)[:, None, None]
        return {name: factor * x for name, x in super().__call__(pixels).items()}


def beacon() -> Beacon:
    return Beacon(DIM, 0)


class Mistaken(Tiny):
    """Gives other spaces than it states."""

    def __init__(self, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        super().__init__(DIM, 0)
        self._change = change

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        return self._change(super().__call__(pixels))


def flat() -> Mistaken:
    return Mistaken(lambda x: {**x, "cls": x["cls"].squeeze(1)})


def broad() -> Mistaken:
    """Twice the dimensions, so that half the tokens' values would pass for as many tokens more."""
    return Mistaken(lambda x: {**x, "patch": x["patch"].repeat(1, 1, 2)})


def lacking() -> Mistaken:
    return Mistaken(lambda x: {"cls": x["cls"]})


def generous() -> Mistaken:
    return Mistaken(lambda x: {**x, "map": x["patch"]})


def in_a_list() -> Mistaken:
    return Mistaken(lambda x: list(x.values()))  # type: ignore[arg-type, return-value]


def of_numpy() -> Mistaken:
    return Mistaken(lambda x: {name: tokens.numpy() for name, tokens in x.items()})  # type: ignore[misc]


def complex_ones() -> Mistaken:
    return Mistaken(lambda x: {name: tokens.to(torch.complex64) for name, tokens in x.items()})


class Bound(Tiny):
    """Its outputs lie in the same memory every time."""

    def __init__(self) -> None:
        super().__init__(DIM, 0)
        self._bound = {space.name: torch.empty(16, space.tokens, DIM) for space in self.spaces}

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        for name, tokens in super().__call__(pixels).items():
            self._bound[name][: len(tokens)] = tokens
        return {name: memory[: len(pixels)] for name, memory in self._bound.items()}


class Learning(Tiny):
    """Its tokens ask for a gradient."""

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode(False):
            return super().__call__(pixels.clone())


class Elsewhere(Tiny):
    """On the CPU, whatever device it is told."""

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        return super().__call__(torch.zeros(pixels.shape))

    def to(self, device: torch.device | str) -> Tiny:
        return self


elsewhere = partial(Elsewhere, DIM, 0)
fresh = partial(Tiny, DIM, 0)
reused = Bound
with_gradient = partial(Learning, DIM, 0)


class Failing(Tiny):
    """Raises where it is told to."""

    def __init__(self, where: str) -> None:
        super().__init__(DIM, 0)
        self._where = where

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        return super().__call__(pixels[:, :2] if self._where == "call" else pixels)

    def identity(self) -> dict[str, Any]:
        if self._where == "identity":
            raise KeyError("weights")
        return {"weights": object()} if self._where == "json" else super().identity()

    def to(self, device: torch.device | str) -> Failing:
        if self._where == "to":
            raise NotImplementedError
        return self


fails_in_call = partial(Failing, "call")
fails_in_identity = partial(Failing, "identity")
fails_in_json = partial(Failing, "json")
fails_in_to = partial(Failing, "to")


def fails_in_construction() -> Failing:
    raise ZeroDivisionError("by nothing\nand more")


def fails_in_preprocessing() -> Failing:
    Preprocessing((0, 0), (0.5,) * 3, (0.25,) * 3, "bicubic")
    return Failing("")


def without_spaces() -> Failing:
    teacher = Failing("")
    teacher.spaces = ()
    return teacher
