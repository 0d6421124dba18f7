"""The order in which rows are read: shuffled groups, shuffled again within a window."""

from __future__ import annotations

import numpy as np


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of ``range(count)``, int64, that depends on the non-negative key alone.

    It sorts raw Philox output, which NumPy promises to keep over versions and machines.
    """
    bits = np.random.Philox(np.random.SeedSequence(list(key))).random_raw(count)
    return np.argsort(bits, kind="stable")


class EpochOrder:
    """Which rows a rank reads in an epoch, window by window.

    The groups of rows are permuted by (seed, epoch); the rows of that sequence are dealt to the
    ranks in equal contiguous parts; each part is cut into windows of whole batches, and the rows
    of a window are permuted by (seed, epoch, rank, window). Any step can be found without reading
    those before it. At most ``world - 1`` rows an epoch are left out, with
    ``drop_last`` fewer than a batch of every rank more.

    Args:
        eligible: bool ``[rows]``: rows that may be read.
        group_rows: rows a group.
        batch_size: rows a step.
        window_rows: rows shuffled together, rounded up to whole batches.
        shuffle: False: ascending rows.
        drop_last: leave out a last batch that is not full.
    """

    def __init__(
        self,
        eligible: np.ndarray,
        *,
        group_rows: int,
        batch_size: int,
        window_rows: int,
        seed: int,
        epoch: int,
        rank: int,
        world: int,
        shuffle: bool,
        drop_last: bool,
    ) -> None:
        self._eligible = eligible
        self._group_rows = group_rows
        self._key = (seed, epoch)
        self._rank = rank
        self._shuffle = shuffle
        counts = _eligible_in_groups(eligible, group_rows)
        groups = np.flatnonzero(counts)
        if shuffle:
            groups = groups[permutation(len(groups), seed, epoch, 0)]
        self._groups = groups
        self._ends = np.cumsum(counts[groups])
        total = int(self._ends[-1]) if len(groups) else 0
        self.rows = total // world
        if drop_last:
            self.rows -= self.rows % batch_size
        self.batch_size = batch_size
        self.steps = -(-self.rows // batch_size)
        self._first = rank * (total // world)
        self.window_rows = -(-max(window_rows, 1) // batch_size) * batch_size
        self.windows = -(-self.rows // self.window_rows)

    def window(self, number: int) -> np.ndarray:
        """The rows of a window in the order of their batches, int64 ``[<= window_rows]``."""
        start = self._first + number * self.window_rows
        end = min(start + self.window_rows, self._first + self.rows)
        first = int(np.searchsorted(self._ends, start, "right"))
        last = int(np.searchsorted(self._ends, end, "left"))
        groups = self._groups[first : last + 1]
        rows = (groups[:, None] * self._group_rows + np.arange(self._group_rows)).ravel()
        rows = rows[rows < len(self._eligible)]
        rows = rows[self._eligible[rows]]
        before = int(self._ends[first - 1]) if first else 0
        rows = rows[start - before : end - before]
        if self._shuffle:
            rows = rows[permutation(len(rows), *self._key, 1, self._rank, number)]
        return rows


def _eligible_in_groups(eligible: np.ndarray, group_rows: int) -> np.ndarray:
    """int64 ``[groups]``; the last group may be shorter."""
    whole = len(eligible) // group_rows * group_rows
    counts = np.count_nonzero(eligible[:whole].reshape(-1, group_rows), axis=1)
    if whole < len(eligible):
        counts = np.append(counts, np.count_nonzero(eligible[whole:]))
    return counts.astype(np.int64, copy=False)


def class_sorted(labels: np.ndarray) -> bool:
    """Whether labels in row order show that the rows lie sorted by class.

    True when neighbours share their label far more often than chance would have it: the share of
    equal neighbours is over 0.5 and over five times what a random order of the same labels gives.
    Rows with label -1 are left out. Shuffled groups of such rows would hold one class each.
    """
    known = np.asarray(labels)
    known = known[known >= 0]
    if len(known) < 32:
        return False
    share = np.unique(known, return_counts=True)[1] / len(known)
    chance = float((share**2).sum())
    equal = float((known[1:] == known[:-1]).mean())
    return equal > 0.5 and equal > 5 * chance
