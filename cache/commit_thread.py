"""Commits on a thread of their own, while the next shard is filled."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from .shard_writer import ShardWriter


class CommitThread:
    """Commits shards in the order in which they come, one at a time, beside the caller.

    What a device is still copying of a shard is waited for on that thread, too: the caller, who has
    begun with the next shard, goes on at once.

    Used as a context: leaving it waits for the last commit. An error of a commit is raised where
    the next shard is handed over, or on leaving, and no shard is committed after it. Leaving by an
    exception lets the commit under way end too, for its shard is whole; should it fail as well,
    that shard is pending and the exception is the one that is told.

    A caller who fills one shard at a time holds the codes of two at most: of the one that he fills
    and of the one in commit.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._last: Future[None] | None = None

    def commit(self, shard: ShardWriter) -> None:
        """Hand over a shard that has all its rows, once the commit before has ended.

        Raises:
            StoreError: rows are missing, or the commit before failed; its shard is named.
            DataError: tokens of the shard before cannot be stored.
        """
        shard.close()
        self._wait()
        self._last = self._pool.submit(shard.commit)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def __enter__(self) -> CommitThread:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        if kind is None:
            self._wait()
