"""The bytes that a store still needs, against those that it then has."""

from __future__ import annotations

from pathlib import Path

from preceptor.cache import StoreWriter
from preceptor.cache.room import bytes_to_come, lack_of_room
from preceptor.tests.cache.small_stores import (
    SPACES,
    calibrate,
    make_plan,
    write_pending,
    write_shard,
)

PLAN = make_plan(SPACES[:2] + SPACES[3:])  # nothing is compressed but keys


def size(store: Path) -> int:
    """Bytes of shards' files, but of keys, and of moments."""
    folders = ("rows", "spaces", "partial")
    files = [file for folder in folders for file in store.glob(f"{folder}/**/*") if file.is_file()]
    others = {"statistics", "key", "mean", "std"}
    return sum(
        file.stat().st_size
        for file in files
        if (file.name.startswith("c.") or file.suffix == ".f64") and not others & set(file.parts)
    )


def test_what_is_to_come_is_what_comes(tmp_path: Path) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", PLAN)
    calibrate(writer)
    before = size(writer.path)
    assert before == 0
    for done in ((0, ("rows", "vit")), (2, ("cnn",)), None):
        wanted = bytes_to_come(PLAN, writer.pending())
        keys = PLAN.key_bytes * sum(
            PLAN.rows_in(shard) for shard, units in writer.pending() if "rows" in units
        )
        before = size(writer.path)
        if done is not None:
            write_shard(writer, *done)
            continue
        write_pending(writer)
        came = size(writer.path) - before
        # checksums, shard indices and the filling up of the last group are all that is more
        assert wanted - keys <= came < 1.25 * (wanted - keys)
    assert bytes_to_come(PLAN, writer.pending()) == 0


def test_a_file_system_that_does_not_say_is_let_pass(tmp_path: Path) -> None:
    assert lack_of_room(tmp_path / "not there", 2**80) is None
    assert "1,099,511,627,776.00 GiB more" in str(lack_of_room(tmp_path, 2**70))
