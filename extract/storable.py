"""Rows of which a teacher gives tokens that are no numbers: left out, or told with their image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache import SampleIndex, StoreWriter
from ..cache.encoded import to_host
from ..errors import DataError
from .images import ViewBatch

UNKNOWN, INVALID, VALID = -1, 0, 1
"""What a store says of a row: nothing yet, that it has no tokens, that it has some."""


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


class Finite:
    """Whether tokens are finite, on its way from the device that has them.

    Args:
        tokens: by space id ``[v, N, D]``.
    """

    def __init__(self, tokens: Mapping[str, Tensor]) -> None:
        self._spaces = list(tokens)
        self._await: Callable[[], object] | None = None
        self._flags: Tensor | None = None
        if tokens:
            flags = [torch.isfinite(values).flatten(1).all(1) for values in tokens.values()]
            (self._flags,), self._await = to_host([torch.stack(flags)])

    def lacking(self) -> dict[int, str]:
        """By place among the v rows, the first space of which it has tokens that are not finite;
        waits for the device."""
        if self._await is not None:
            self._await()
        if self._flags is None or bool(self._flags.all()):
            return {}
        bad = ~self._flags.numpy()
        return {int(row): self._spaces[bad[:, row].argmax()] for row in np.flatnonzero(bad.any(0))}


@dataclass(frozen=True)
class Computed:
    """A batch with what the teachers gave for it.

    Attributes:
        numbers: of its rows in the store.
        batch: of b rows, v of them valid.
        tokens: by space id ``[v, N, D]``.
        finite: of these tokens.
    """

    numbers: Sequence[int]
    batch: ViewBatch
    tokens: dict[str, Tensor]
    finite: Finite

    @classmethod
    def of(cls, numbers: Sequence[int], batch: ViewBatch, tokens: dict[str, Tensor]) -> Computed:
        """The same, with its tokens looked at; does not wait for the device."""
        return cls(numbers, batch, tokens, Finite(tokens))

    def settled(
        self, index: SampleIndex, stored: StoredRows, *, views: int, skip: bool
    ) -> Computed:
        """Without the rows that have no place in the store: those that it has as invalid, and, if
        it says nothing of them yet and skipping is on, those with tokens that are not finite.

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
        for place, space in self.finite.lacking().items():
            if out[place]:
                continue
            row = self.numbers[valid[place]]
            image = index.where(row // views)
            if known[valid[place]] == VALID or not skip:
                shard = row // stored.shard_rows
                raise DataError(_refusal(space, image, row, shard, known[valid[place]] == VALID))
            out[place] = True
            problems.append(f"image {image}: the tokens of {space} are not finite")
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


def _refusal(space: str, image: str, row: int, shard: int, stored: bool) -> str:
    teacher, _, name = space.partition("/")
    way_out = (
        "say on_corrupt=skip, which leaves such images out and counts them"
        if not stored
        else "leave this teacher out, for the store has the row already with tokens of others; or "
        "make the store anew with all of them and on_corrupt=skip"
    )
    return (
        f"teacher {teacher} gives tokens of space {name} that are not finite for image {image}, "
        f"row {row} in shard {shard} of the store: check the image and engine.precision, or "
        f"{way_out}"
    )
