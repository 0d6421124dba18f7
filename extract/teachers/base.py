"""What every teacher is: a frozen network that maps normalised images to named spaces."""

from __future__ import annotations

import contextlib
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache.views import INTERPOLATIONS
from ...errors import PreceptorError, TeacherError, closest, first_line


@dataclass(frozen=True)
class Preprocessing:
    """How pixels reach a teacher.

    Attributes:
        size: (height, width) of the input in pixels.
        mean, std: of the red, green and blue channel, for pixels in [0, 1].
        interpolation: name of the resampling filter, as in ``cache.views.INTERPOLATIONS``.

    Raises:
        TeacherError: other values.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std"):
            value = getattr(self, name)
            kind, count = ((int, np.integer), 2) if name == "size" else ((int, float, np.number), 3)
            if (
                not isinstance(value, list | tuple)
                or len(value) != count
                or not all(
                    isinstance(part, kind) and (name == "mean" or part > 0) for part in value
                )
            ):
                wanted = "two positive numbers of pixels" if count == 2 else "three numbers"
                raise TeacherError(f"preprocessing: {name}={value!r}; expected {wanted}")
            numbers = tuple(int(part) if count == 2 else float(part) for part in value)
            object.__setattr__(self, name, numbers)
        if self.interpolation not in INTERPOLATIONS:
            raise TeacherError(
                f"preprocessing: interpolation {self.interpolation!r} is unknown"
                + closest(str(self.interpolation), INTERPOLATIONS)
            )

    def describe(self) -> dict[str, Any]:
        """The preprocessing as JSON, for the manifest."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


@dataclass(frozen=True)
class SpaceShape:
    """One space of a teacher: ``tokens`` vectors of ``dim`` numbers an image.

    ``grid`` is (rows, columns) of the tokens, which follow each other row by row, or None for a
    global descriptor, which is one token.
    """

    name: str
    tokens: int
    dim: int
    grid: tuple[int, int] | None

    def __post_init__(self) -> None:
        for name in ("tokens", "dim"):
            object.__setattr__(self, name, int(getattr(self, name)))  # NumPy's are no JSON
        if self.grid is not None:
            object.__setattr__(self, "grid", (int(self.grid[0]), int(self.grid[1])))


class Teacher(ABC):
    """A frozen pretrained network.

    ``own_code`` is set by the adapter of the user's own functions: what such a teacher raises is no
    bug of this package.

    Attributes:
        name: of the teacher, as in the configuration and the store.
        preprocessing: what ``__call__`` expects of its input.
        spaces: shapes of what ``__call__`` returns, in its order.
    """

    name: str
    preprocessing: Preprocessing
    spaces: tuple[SpaceShape, ...]
    own_code = False

    @abstractmethod
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """Tokens of normalised images: ``[B, 3, H, W]`` to ``[B, N, D]`` a space, without gradient.

        The dtype of the result follows the input, the weights and autocast. The next call may write
        over it where ``own_code`` is set.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a store must be made from to hold this teacher's tokens, as JSON.

        Holds the source, the sha256 of the weights, the preprocessing, what every space takes, and
        the versions of the libraries that compute it.
        """

    @abstractmethod
    def to(self, device: torch.device | str) -> Teacher:
        """Moves the weights and returns the teacher itself."""


@contextlib.contextmanager
def named(teacher: str, option: str = "source", *, doing: str | None = None) -> Iterator[None]:
    """Errors of the block name the teacher and its option; what they were is kept as their cause.

    Args:
        doing: what the user's own code does in the block, so that whatever it raises is told; None:
            it has none there, and other errors than ours are bugs.

    Raises:
        TeacherError: instead of them.
    """
    try:
        yield
    except PreceptorError as error:
        if f"teacher {teacher}" in str(error) or f"teachers.{teacher}" in str(error):
            raise
        raise TeacherError(f"teachers.{teacher}.{option}: {error}") from error
    except Exception as error:
        if doing is None:
            raise
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename != __file__ and "site-packages" not in frame.filename
        ]
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        raise TeacherError(
            f"teachers.{teacher}.{option}: {doing} failed: {type(error).__name__}: "
            f"{first_line(error)}{where}"
        ) from error


def refuse_other_shapes(teacher: Teacher, given: Mapping[str, Tensor], rows: int) -> None:
    """What a teacher gave for ``rows`` images is what it states: one of the user's own may err.

    Raises:
        TeacherError: other spaces, of other shapes, or no tensors of real numbers.
    """
    if not isinstance(given, Mapping):
        raise TeacherError(
            f"teacher {teacher.name}: it gave {type(given).__name__}, not tensors by the names of "
            "its spaces"
        )
    for name, tokens in given.items():
        if not isinstance(tokens, Tensor) or tokens.is_complex() or tokens.dtype == torch.bool:
            kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TeacherError(
                f"teacher {teacher.name}: its space {name} is {kind}, not a torch tensor of real "
                "numbers"
            )
    stated = {space.name: (rows, space.tokens, space.dim) for space in teacher.spaces}
    shapes = {name: tuple(tokens.shape) for name, tokens in given.items()}
    for name in (*stated, *shapes):
        if stated.get(name) != shapes.get(name):
            raise TeacherError(
                f"teacher {teacher.name}: its space {name} is "
                f"{shapes.get(name, 'not there')} for {rows} images, and by its attribute `spaces` "
                f"{stated.get(name, 'not there')}: mend the one or the other"
            )
