"""Buffers are used again, but never while somebody still looks at them."""

from __future__ import annotations

import threading

import torch
from preceptor.cache.buffers import BufferPool


def test_memory_is_used_again_only_when_every_view_is_gone() -> None:
    pool = BufferPool()
    first = pool.take(64)
    address = first.data_ptr()
    row = first.view(torch.int16)[3:5]
    del first
    assert pool.take(64).data_ptr() != address
    looking = row.numpy()
    del row
    assert pool.take(64).data_ptr() != address
    del looking
    taken = [pool.take(64) for _ in range(3)]
    assert address in {buffer.data_ptr() for buffer in taken}


def test_idle_memory_is_bounded() -> None:
    pool = BufferPool(idle_bytes=100)
    taken = [pool.take(40) for _ in range(5)]
    del taken
    assert sum(length * len(free) for length, free in pool._free.items()) == 80


def test_lengths_of_the_past_make_room() -> None:
    pool = BufferPool(idle_bytes=100)
    for length in (40, 60, 70):
        buffer = pool.take(length)
        address = buffer.data_ptr()
        del buffer
        assert pool.take(length).data_ptr() == address
    assert sum(length * len(free) for length, free in pool._free.items()) <= 100


def test_buffers_begin_with_a_page() -> None:
    pool = BufferPool()
    assert all(pool.take(length).data_ptr() % 4096 == 0 for length in (1, 5000, 1 << 17))
    assert pool.take(3 << 20).data_ptr() % (2 << 20) == 0


def test_many_threads_never_share_a_buffer() -> None:
    pool = BufferPool()
    wrong = []

    def work(value: int) -> None:
        for _ in range(500):
            buffer = pool.take(16)
            buffer.fill_(value)
            if (buffer != value).any():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
