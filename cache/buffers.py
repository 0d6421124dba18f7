"""Memory for batches, used again as soon as nobody refers to it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch

_PAGE = 4096
_HUGE_PAGE = 2 << 20


def aligned_empty(length: int) -> np.ndarray:
    """uint8 ``[length]`` from the beginning of a page, a huge page where it is that long.

    The kernel's copy into memory that lies a few bytes further into its page than the source does
    is several times slower than any other; malloc puts large blocks at byte 16.
    """
    step = _HUGE_PAGE if length >= _HUGE_PAGE else _PAGE
    memory = np.empty(length + step - 1, np.uint8)
    start = -memory.ctypes.data % step
    return memory[start : start + length]


class _Lease:
    """Memory on loan: goes back to its pool when the last array or tensor over it is gone."""

    def __init__(self, pool: BufferPool, memory: np.ndarray) -> None:
        self._pool, self._memory = pool, memory
        self.__array_interface__: dict[str, Any] = memory.__array_interface__

    def __del__(self) -> None:
        self._pool._give_back(self._memory)


class BufferPool:
    """Byte buffers by length; at most ``idle_bytes`` of them wait to be used again.

    Fresh memory costs a page fault for every 4 KiB, which is as dear as reading into it. Where
    ``pinned``, torch's own caching allocator of page-locked memory is the pool: it also waits for
    copies to the device that are under way.
    """

    def __init__(self, pinned: bool = False, idle_bytes: int = 2 << 30) -> None:
        self._idle_bytes = idle_bytes
        self._pinned = pinned
        # Without a lock: the interpreter makes pop and append atomic, and a lock could be asked for
        # by a lease that dies while it is held.
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)

    def take(self, length: int) -> torch.Tensor:
        """A uint8 tensor ``[length]`` with arbitrary contents."""
        if self._pinned:
            return torch.empty(length, dtype=torch.uint8, pin_memory=True)
        try:
            memory = self._free[length].pop()
        except IndexError:
            memory = aligned_empty(length)
        return torch.from_numpy(np.asarray(_Lease(self, memory)))

    def _give_back(self, memory: np.ndarray) -> None:
        idle = sum(length * len(buffers) for length, buffers in list(self._free.items()))
        for length, buffers in list(self._free.items()):  # lengths that may be wanted no more
            while length != memory.nbytes and idle + memory.nbytes > self._idle_bytes and buffers:
                buffers.pop()
                idle -= length
        if idle + memory.nbytes <= self._idle_bytes:
            self._free[memory.nbytes].append(memory)
