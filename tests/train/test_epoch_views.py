"""Which stored views of the images an epoch shows."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from preceptor.train.epoch_views import EpochViews


@settings(max_examples=60, deadline=None)
@given(
    views=st.integers(1, 5),
    images=st.integers(1, 12),
    seed=st.integers(0, 3),
    cycle=st.integers(0, 2),
    data=st.data(),
)
def test_an_epoch_has_one_view_of_every_image_and_a_cycle_has_all(
    views: int, images: int, seed: int, cycle: int, data: st.DataObject
) -> None:
    valid = np.array(
        data.draw(st.lists(st.booleans(), min_size=views * images, max_size=views * images))
    )
    chosen = EpochViews(valid, views, seed)
    alive = [i for i in range(images) if any(valid[i * views : (i + 1) * views])]
    assert chosen.images == len(alive)
    used: set[int] = set()
    for epoch in range(cycle * views, (cycle + 1) * views):
        shown = chosen.rows(epoch).tolist()
        assert [row // views for row in shown] == alive
        assert valid[shown].all()
        assert shown == EpochViews(valid, views, seed).rows(epoch).tolist()
        used |= set(shown)
    assert used == set(np.flatnonzero(valid).tolist())


@settings(max_examples=60, deadline=None)
@given(views=st.integers(1, 5), images=st.integers(1, 12), seed=st.integers(0, 3), data=st.data())
def test_the_first_views_are_those_of_a_store_that_has_no_others(
    views: int, images: int, seed: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(1, views))
    valid = np.array(
        data.draw(st.lists(st.booleans(), min_size=views * images, max_size=views * images))
    )
    chosen = EpochViews(valid, views, seed, first)
    alone = EpochViews(valid.reshape(images, views)[:, :first].ravel(), first, seed)
    assert chosen.images == alone.images
    for epoch in range(2 * first):
        image, view = np.divmod(alone.rows(epoch), first)
        assert chosen.rows(epoch).tolist() == (image * views + view).tolist()


def test_images_differ_in_the_view_that_an_epoch_shows() -> None:
    chosen = EpochViews(np.ones(4000, bool), 4, 0)
    shares = np.bincount(chosen.rows(0) % 4, minlength=4) / 1000
    assert (abs(shares - 0.25) < 0.05).all()
    assert (chosen.rows(0) != EpochViews(np.ones(4000, bool), 4, 1).rows(0)).any()
    assert (chosen.rows(0) != chosen.rows(4)).any()  # the next cycle has other offsets
