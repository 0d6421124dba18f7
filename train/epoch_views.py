"""Which of an image's stored views an epoch uses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError


class EpochViews:
    """Which stored view of every image an epoch uses: one an image, all of them in turn.

    In cycle c, which is as many epochs as there are views, epoch p uses view (o + p) mod V of an
    image, where the offset o is drawn for each image from (seed, c). Views without tokens are
    passed over.

    Args:
        valid: bool [rows]; row r is view r mod `views` of image r // `views`.
        views: stored views an image.
        seed: of the offsets.
        first: V, of which the first ones are used; None for all.

    Attributes:
        images: how many images have such a view with tokens.

    Raises:
        ConfigError: there are no views, or more than are stored.
    """

    def __init__(
        self, valid: NDArray[np.bool_], views: int, seed: int, first: int | None = None
    ) -> None:
        if first is not None and not 1 <= first <= views:
            most = "one" if views == 1 else f"1 to {views}"
            raise ConfigError(
                f"views={first}: the store has {views} of every image, so {most} can be used"
            )
        self._stored, self._views, self._seed = views, first or views, seed
        table = np.asarray(valid, bool).reshape(-1, views)[:, : self._views]
        self._counts = table.sum(1)
        self._kept = np.flatnonzero(self._counts)
        # The valid views of an image first, in their order.
        self._order = np.argsort(~table, axis=1, kind="stable") if self._views > 1 else None
        self.images = len(self._kept)

    def rows(self, epoch: int) -> NDArray[np.int64]:
        """One row of every image, ascending, int64 [images]."""
        if self._order is None:
            return self._kept * self._stored
        cycle, turn = divmod(epoch, self._views)
        bits = np.random.Philox(np.random.SeedSequence([self._seed, cycle, 2])).random_raw(
            len(self._counts)
        )
        counts = self._counts[self._kept].astype(np.uint64)
        places = (bits[self._kept] + np.uint64(turn)) % counts
        views = self._order[self._kept, places.astype(np.int64)]
        return self._kept * self._stored + views

    def describe(self) -> str:
        """Which views are used, in words after a number of images; none where one is stored."""
        if self._stored == 1:
            return ""
        if self._views == self._stored:
            return f", one of {self._stored} stored views each"
        first = "the first" if self._views == 1 else f"one of the first {self._views}"
        return f", {first} of {self._stored} stored views each"
