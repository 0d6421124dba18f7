"""Batches in shuffled order, read ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from ..errors import StoreError
from .buffers import BufferPool
from .encodings.prediction import Prediction
from .gather import Destination, Gatherer, GroupRows, Task, by_group, tasks
from .layout import Layout
from .order import EpochOrder
from .plan import PIXELS, SpaceSpec
from .tokens import Tokens


@dataclass(frozen=True)
class Batch:
    """One step's rows.

    Attributes:
        rows: int64 ``[b]`` row numbers.
        tokens: encoded tokens by space id, in the same order. Their memory is used again when
            nothing refers to it any more, so it may be kept as long as wanted.
        pixels: uint8 ``[b, height, width, 3]`` of the views, where they were asked for.
        damaged: by place in the batch what is wrong with its row, where the reader was to keep
            going; tokens and pixels there are arbitrary.
    """

    rows: torch.Tensor
    tokens: dict[str, Tokens]
    pixels: torch.Tensor | None = None
    damaged: Mapping[int, str] = field(default_factory=dict)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device; rows too."""
        tokens = {name: part.to(device, non_blocking) for name, part in self.tokens.items()}
        pixels = self.pixels
        if pixels is not None:
            pixels = pixels.to(device, non_blocking=non_blocking)
        rows = self.rows.to(device, non_blocking=non_blocking)
        return Batch(rows, tokens, pixels, self.damaged)


@dataclass
class _Window:
    rows: np.ndarray
    spaces: dict[SpaceSpec, Destination]
    pixels: Destination | None
    work: deque[Task]
    reads: list[Future[None]]
    failed: list[tuple[GroupRows, StoreError]]
    damaged: dict[int, str] = field(default_factory=dict)


def _read(
    gatherer: Gatherer,
    work: deque[Task],
    failed: list[tuple[GroupRows, StoreError]] | None,
) -> None:
    """Do tasks until none is left; several threads share the work.

    Args:
        failed: gets the damaged groups; None: the first of them ends the work and is raised.
    """
    while True:
        try:
            task = work.popleft()
        except IndexError:
            return
        for group in task.groups:
            try:
                gatherer.fill(task.destination, group, task.names)
            except BaseException as error:
                if failed is None or not isinstance(error, StoreError):
                    work.clear()
                    raise
                failed.append((group, error))


class BatchIterator(Iterator[Batch]):
    """Iterates the batches of an epoch; while one window is handed out, the next is read.

    Memory: two windows of the spaces' rows and what the consumer keeps.
    """

    def __init__(
        self,
        layout: Layout,
        gatherer: Gatherer,
        spaces: Sequence[SpaceSpec],
        predictions: Mapping[str, Prediction | None],
        order: EpochOrder,
        *,
        start_step: int,
        threads: int,
        pixels: bool,
        keep_going: bool,
        pool: BufferPool,
    ) -> None:
        self._layout, self._gatherer = layout, gatherer
        self._spaces, self._predictions = spaces, predictions
        self._pixels = pixels
        self._keep_going = keep_going
        self._order = order
        self._step = start_step
        self._a_window = order.window_rows // order.batch_size
        self._pool = pool
        self._parallel = threads
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="cache-read")
        self._ahead: deque[_Window] = deque()
        self._next = start_step // self._a_window
        self._current: _Window | None = None
        self._base = start_step  # step of the current window's first batch
        self._schedule()

    def __len__(self) -> int:
        """Steps that are left."""
        return max(0, self._order.steps - self._step)

    def __iter__(self) -> BatchIterator:
        return self

    def _schedule(self) -> None:
        number = self._next
        if number >= self._order.windows:
            return
        self._next += 1
        rows = self._order.window(number)
        skipped = max(0, self._base - number * self._a_window) * self._order.batch_size
        rows = rows[skipped:]
        if not len(rows):
            return
        size = self._order.batch_size
        plan, layout = self._layout.plan, self._layout
        spaces = {
            space: Destination(
                space.teacher, layout.space_arrays(space), len(rows), size, self._pool
            )
            for space in self._spaces
        }
        pixels = None
        if self._pixels:
            arrays = {PIXELS: layout.pixel_array()}
            pixels = Destination(PIXELS, arrays, len(rows), size, self._pool)
        wanted = [*spaces.values(), *([] if pixels is None else [pixels])]
        groups = list(by_group(rows, plan.shard_rows, plan.group_rows))
        work = deque(tasks(wanted, groups))
        failed: list[tuple[GroupRows, StoreError]] = []
        # one task a thread: handing over every group would keep the interpreter's lock busy
        reads = [
            self._threads.submit(_read, self._gatherer, work, failed if self._keep_going else None)
            for _ in range(self._parallel)
        ]
        self._ahead.append(_Window(rows, spaces, pixels, work, reads, failed))

    def __next__(self) -> Batch:
        if self._step >= self._order.steps:
            self.close()
            raise StopIteration
        number = self._step - self._base
        if self._current is None or number * self._order.batch_size >= len(self._current.rows):
            self._current = None
            self._advance()
            number = 0
        window = self._current
        assert window is not None
        size = self._order.batch_size
        rows = window.rows[number * size : (number + 1) * size]
        first = number * size
        damaged = {
            place - first: why
            for place, why in window.damaged.items()
            if first <= place < first + len(rows)
        }
        tokens = {}
        for space, place in window.spaces.items():
            parts = place.pop(number)
            tokens[space.id] = Tokens.from_parts(
                parts, space.encoding, space.dim, self._predictions[space.id]
            )
        pixels = None if window.pixels is None else window.pixels.pop(number)[PIXELS]
        self._step += 1
        return Batch(torch.from_numpy(rows.copy()), tokens, pixels, damaged)

    def _advance(self) -> None:
        window = self._ahead.popleft()
        self._schedule()  # before waiting: the threads go on to it at once, and all was handed out
        try:
            for read in window.reads:
                read.result()
            for group, error in window.failed:
                for place in group.places.tolist():
                    window.damaged.setdefault(place, str(error))
            self._look_for_holes(window)
        except BaseException:
            self.close()
            raise
        window.reads.clear()
        self._base = self._step
        self._current = window

    def _look_for_holes(self, window: _Window) -> None:
        for destination in window.spaces.values():
            for place, array in destination.holes().items():
                if place in window.damaged:  # was not read, so what is there means nothing
                    continue
                error = self._gatherer.chunks.hole(destination.unit, int(window.rows[place]), array)
                if not self._keep_going:
                    raise error
                window.damaged[place] = str(error)

    def close(self) -> None:
        """Stop reading ahead; no further batch comes."""
        self._step = self._order.steps
        for window in self._ahead:
            window.work.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def __del__(self) -> None:
        if hasattr(self, "_threads"):
            self.close()
