"""The order of rows: complete, disjoint over ranks, the same for ever."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from preceptor.cache.order import EpochOrder, class_sorted, permutation


def order(eligible: np.ndarray, **changes: int | bool) -> EpochOrder:
    options = dict(group_rows=4, batch_size=3, window_rows=7, seed=0, epoch=0, rank=0, world=1)
    return EpochOrder(eligible, **{**options, "shuffle": True, "drop_last": False, **changes})


def rows_of(one: EpochOrder) -> np.ndarray:
    parts = [one.window(number) for number in range(one.windows)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


@settings(max_examples=150, deadline=None)
@given(
    eligible=st.lists(st.booleans(), min_size=1, max_size=90),
    group_rows=st.integers(1, 9),
    batch_size=st.integers(1, 6),
    window_rows=st.integers(1, 30),
    world=st.integers(1, 4),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_ranks_share_the_rows_equally(eligible: list[bool], world: int, **options: int) -> None:
    mask = np.array(eligible)
    wanted = set(np.flatnonzero(mask).tolist())
    ranks = [order(mask, rank=rank, world=world, **options) for rank in range(world)]
    parts = [rows_of(one).tolist() for one in ranks]
    each = len(wanted) // world
    if options["drop_last"]:
        each -= each % options["batch_size"]
    assert [len(part) for part in parts] == [each] * world
    assert [one.rows for one in ranks] == [each] * world
    together = [row for part in parts for row in part]
    assert len(set(together)) == len(together)
    assert set(together) <= wanted
    if not options["shuffle"]:
        assert together == sorted(together)
    for one in ranks:
        assert one.window_rows % one.batch_size == 0
        lengths = [len(one.window(number)) for number in range(one.windows)]
        assert all(length == one.window_rows for length in lengths[:-1])


def test_the_order_is_the_same_on_every_machine_and_release() -> None:
    assert permutation(10, 1, 2).tolist() == [7, 1, 3, 0, 4, 8, 9, 2, 6, 5]
    rows = rows_of(order(np.ones(20, bool), seed=5, epoch=1, window_rows=9))
    assert rows.tolist() == [3, 11, 0, 2, 9, 8, 4, 10, 1, 19, 17, 7, 12, 13, 16, 6, 18, 5, 14, 15]


def test_epochs_seeds_and_ranks_differ() -> None:
    mask = np.ones(200, bool)
    orders = [
        rows_of(order(mask, seed=seed, epoch=epoch)).tolist()
        for seed in range(2)
        for epoch in range(2)
    ]
    assert len({tuple(one) for one in orders}) == 4
    assert all(sorted(one) == list(range(200)) for one in orders)


def test_a_window_needs_few_groups() -> None:
    one = order(np.ones(4000, bool), group_rows=8, batch_size=16, window_rows=64)
    groups = [len(set((one.window(number) // 8).tolist())) for number in range(one.windows)]
    assert max(groups) == 8


def test_rows_are_spread_evenly_over_positions() -> None:
    first = [rows_of(order(np.ones(40, bool), seed=seed))[0] for seed in range(2000)]
    counts = np.bincount(first, minlength=40)
    assert counts.min() > 20  # 50 expected, deviation 7
    assert counts.max() < 90


def test_class_sorted_labels_are_noticed() -> None:
    rng = np.random.default_rng(0)
    by_class = np.repeat(np.arange(10), 50)
    assert class_sorted(by_class)
    assert class_sorted(np.where(rng.random(500) < 0.1, rng.integers(0, 10, 500), by_class))
    assert not class_sorted(rng.permutation(by_class))
    assert not class_sorted(np.zeros(500, np.int64))
    assert not class_sorted(np.full(500, -1))
    assert not class_sorted(np.arange(500) % 2)
    assert not class_sorted(by_class[:20])
