"""Work that is done before it is asked for: by one thread, or by processes that decode images."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import PreceptorError
from .views import Problems, StorePixels, Views

T = TypeVar("T")


def prefetched(source: Iterator[T], ahead: int) -> Generator[T, None, None]:
    """The items of an iterator, computed up to `ahead` items early by one thread.

    Closing the generator stops the thread.

    Raises:
        Whatever the source does, where its item would have come.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in source:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:  # handed over, whatever it is
            put((False, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, value = ready.get()
            if more:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stopped.set()
        thread.join()


def decoded(
    views: Views, orders: Iterable[Sequence[tuple[int, int]]], workers: int
) -> Iterator[Tensor]:
    """The pixels of lists of (row, epoch), in order, decoded by worker processes (0: in this one).

    Raises:
        DataError, StoreError: of the image that cannot be read, as if it had been read here.
    """
    images = loaded(views, orders, workers)

    def checked() -> Iterator[Tensor]:
        for pixels, problems in images:
            if problems:
                raise problems[min(problems)]
            yield pixels

    return checked()


def loaded(
    views: Views, orders: Iterable[Sequence[tuple[int, int]]], workers: int
) -> Iterator[tuple[Tensor, Problems]]:
    """As `decoded`, each with what is wrong with its damaged images, by place, instead of raising.

    Pixels at those places are arbitrary. Those that a store holds need no workers.
    """
    options: dict[str, Any] = {}
    if isinstance(views, StorePixels):
        workers = 0  # nothing to decode; and a process that is forked cannot read a remote store
    elif workers:
        start = views.index.start_method
        options = {"prefetch_factor": 2, "multiprocessing_context": start}
    loader = DataLoader(
        _Told(views),
        batch_sampler=orders,  # type: ignore[arg-type]  # any iterable is taken
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_heed_the_run_alone,
        # Its own generator, or the loader would draw from the one that a run resumes.
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    with _term_blocked():
        images = iter(loader)  # the workers start here, in the caller's thread

    def checked() -> Iterator[tuple[Tensor, Problems]]:
        for found in images:
            if isinstance(found, PreceptorError):
                raise found
            yield found

    return checked()


class _Told(Dataset[Any]):
    """Errors as values: a loader would bury their sentence in a worker's traceback."""

    def __init__(self, views: Views) -> None:
        self.views = views

    def __getitems__(
        self, items: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Problems] | PreceptorError:
        try:
            return self.views.take(items)
        except PreceptorError as error:
            return error


def _as_is(batch: Any) -> Any:
    return batch


@contextlib.contextmanager
def _term_blocked() -> Iterator[None]:
    """Let a process that starts workers (``forkserver``) outlive SIGTERM as they do: it keeps the
    mask of signals that it begins with, and workers end when it does."""
    if not hasattr(signal, "sigwaitinfo"):  # workers would be deaf to the run, too
        yield
        return
    resource_tracker.ensure_running()  # which, on its first start, unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed_the_run_alone(_: int) -> None:
    """Let a worker outlive signals that are the run's to act on: it needs images until its step is
    done. Ctrl-C reaches every process of a terminal, what torchrun, Slurm and timeout send all of a
    group or a job. What the run itself sends ends the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = multiprocessing.parent_process()
    if run is None or not hasattr(signal, "sigwaitinfo"):  # not on macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait(run: int) -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
            pass
        os._exit(0)

    threading.Thread(target=wait, args=(run.pid,), name="signals", daemon=True).start()
