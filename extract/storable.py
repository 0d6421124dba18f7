"""Rows of which a teacher gives tokens that no store can hold: left out, or told with their image.

Such tokens are no numbers, or so far from the calibrated mean that the encoding cannot express
them. They are never clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache import SampleIndex, SpaceSpec, StoreWriter
from ..cache.encoded import to_host
from ..cache.encodings import holding
from ..errors import DataError
from .images import ViewBatch

UNKNOWN, INVALID, VALID = -1, 0, 1
"""What a store says of a row: nothing yet, that it has no tokens, that it has some."""
LARGEST = float(np.finfo(np.float32).max)
_BLOCK = 1 << 18


class StoredRows:
    """What the committed shards of a store say of rows: a row is valid for all teachers or none."""

    def __init__(self, writer: StoreWriter) -> None:
        self._writer = writer
        self.shard_rows = writer.plan.shard_rows
        self._last: tuple[int, NDArray[np.bool_] | None] = (-1, None)

    def __call__(self, rows: Sequence[int]) -> NDArray[np.int8]:
        """UNKNOWN, INVALID or VALID for each row: int8 ``[b]``."""
        found = np.full(len(rows), UNKNOWN, np.int8)
        for place, row in enumerate(rows):
            shard, within = divmod(row, self.shard_rows)
            if shard != self._last[0]:
                self._last = (shard, self._writer.stored_valid(shard))
            if self._last[1] is not None:
                found[place] = self._last[1][within]
        return found


@dataclass(frozen=True)
class Target:
    """Where tokens are to be stored.

    Attributes:
        space: its encoding.
        frozen: its calibration on the device that has the tokens.
    """

    space: SpaceSpec
    frozen: Mapping[str, Tensor]

    def standardised(self, x: Tensor) -> Tensor:
        """As the writer of a shard has them, to the bit."""
        return (x - self.frozen["mean"]) / self.frozen["std"]


@dataclass(frozen=True)
class Refused:
    """Why tokens of an image cannot be stored.

    Attributes:
        space: id of the space that they are of.
        peak: their largest distance from the calibrated mean, in deviations.
        target: where they were to be stored; None: they are not finite.
    """

    space: str
    peak: float
    target: Target | None

    def __str__(self) -> str:
        """The rest of a sentence, after "tokens of a space that"."""
        if self.target is None:
            return "are not finite"
        how = self.target.space.how
        far = f"{self.peak:,.0f}" if np.isfinite(self.peak) else "more than float32 can tell"
        return (
            f"are too far from the calibrated mean for the encoding {how.name}, which holds "
            f"{how.limit:,.0f} deviations (they have {far})"
        )

    @property
    def remedy(self) -> str:
        if self.target is None:
            return "check the image and engine.precision"
        teacher = self.target.space.teacher
        wider = [f"teachers.{teacher}.encoding={name}" for name in holding(self.peak)]
        holds = f" (which {' or '.join(wider)} would hold)" if wider else ""
        return (
            "check the image; if it is sound, make the store anew with a calibration of more "
            f"images, or of such images{holds}"
        )


class Peaks:
    """The largest magnitude of every image's tokens, on its way from the device that has them.

    Args:
        tokens: by space id float32 ``[v, N, D]``.
        targets: by space id where they are to be stored; tokens of a space without one need to be
            finite.
    """

    def __init__(self, tokens: Mapping[str, Tensor], targets: Mapping[str, Target]) -> None:
        self._tokens, self._targets = tokens, targets
        self._await: Callable[[], object] | None = None
        self._peaks: Tensor | None = None
        if tokens:
            peaks = [_peaks(x, targets.get(space)) for space, x in tokens.items()]
            (self._peaks,), self._await = to_host([torch.stack(peaks)])

    def refused(self) -> dict[int, Refused]:
        """By place among the v rows, the first space of which it has tokens that cannot be stored;
        waits for the device."""
        if self._await is not None:
            self._await()
        if self._peaks is None:
            return {}
        found: dict[int, Refused] = {}
        for (space, x), peaks in zip(self._tokens.items(), self._peaks.numpy(), strict=True):
            target = self._targets.get(space)
            limit = LARGEST if target is None else target.space.how.limit
            for place in np.flatnonzero(~(peaks <= limit)).tolist():  # NaN is not, either
                finite = bool(torch.isfinite(x[place]).all())
                why = Refused(space, float(peaks[place]), target if finite else None)
                found.setdefault(place, why)
        return found


def _peaks(x: Tensor, target: Target | None) -> Tensor:
    """The largest magnitudes, float32 ``[v]``, of tokens ``[v, N, D]``."""
    if not x.numel():
        return x.new_zeros(len(x))
    block = len(x)
    if x.device.type == "cpu":  # temporaries that stay in the processor's cache
        block = max(1, _BLOCK // x[0].numel())
    found = []
    for part in x.split(block):
        z = part if target is None else target.standardised(part)
        found.append(z.abs().flatten(1).amax(1))
    return torch.cat(found)


@dataclass(frozen=True)
class Computed:
    """A batch with what the teachers gave for it.

    Attributes:
        numbers: of its rows in the store.
        batch: of b rows, v of them valid.
        tokens: by space id ``[v, N, D]``.
        peaks: of these tokens.
    """

    numbers: Sequence[int]
    batch: ViewBatch
    tokens: dict[str, Tensor]
    peaks: Peaks

    @classmethod
    def of(
        cls,
        numbers: Sequence[int],
        batch: ViewBatch,
        tokens: dict[str, Tensor],
        targets: Mapping[str, Target],
    ) -> Computed:
        """The same, with its tokens looked at; does not wait for the device.

        Args:
            targets: by space id where tokens are to be stored, as far as that is known.
        """
        return cls(numbers, batch, tokens, Peaks(tokens, targets))

    def settled(
        self, index: SampleIndex, stored: StoredRows, *, views: int, skip: bool
    ) -> Computed:
        """Without the rows that have no place in the store: those that it has as invalid, and, if
        it says nothing of them yet and skipping is on, those with tokens that cannot be stored.

        They were in the batch when the teachers ran, so the other rows' tokens are those of the
        first time, to the bit, when a shard is extracted again.

        Args:
            views: of a sample.
            skip: leave out and tell rows with such tokens.

        Raises:
            DataError: there are such tokens and skipping is off, or the store has the row as a
                valid one already.
        """
        known = stored(self.numbers)
        valid = np.flatnonzero(self.batch.rows.valid)
        out = known[valid] == INVALID
        problems = list(self.batch.problems)
        for place, why in self.peaks.refused().items():
            if out[place]:
                continue
            row = self.numbers[valid[place]]
            image = index.where(row // views)
            if known[valid[place]] == VALID or not skip:
                shard = row // stored.shard_rows
                raise DataError(_refusal(why, image, row, shard, known[valid[place]] == VALID))
            out[place] = True
            problems.append(f"image {image}: the tokens of {why.space} {why}")
        if not out.any():
            return self
        still = self.batch.rows.valid.copy()
        still[valid[out]] = False
        keep = torch.from_numpy(~out)
        pixels = {shape: values[keep] for shape, values in self.batch.pixels.items()}
        tokens = {name: values[keep.to(values.device)] for name, values in self.tokens.items()}
        rows = replace(self.batch.rows, valid=still)
        batch = replace(self.batch, rows=rows, pixels=pixels, problems=problems)
        return replace(self, batch=batch, tokens=tokens)


def _refusal(why: Refused, image: str, row: int, shard: int, stored: bool) -> str:
    teacher, _, name = why.space.partition("/")
    way_out = (
        "say on_corrupt=skip, which leaves such images out and counts them"
        if not stored
        else "leave this teacher out, for the store has the row already with tokens of others; or "
        "make the store anew with all of them and on_corrupt=skip"
    )
    return (
        f"teacher {teacher} gives tokens of space {name} that {why} for image {image}, "
        f"row {row} in shard {shard} of the store: {why.remedy}, or {way_out}"
    )
