"""Extraction of two tiny teachers through the command line."""

from __future__ import annotations

from pathlib import Path

from preceptor.cli import main

COUNT = 11
CALL = "call:preceptor.tests.extract.tiny_teachers"


def teachers(**functions: str) -> str:
    chosen = ", ".join(
        f"{name}: {{source: '{CALL}:{function}'}}" for name, function in functions.items()
    )
    return f"teachers={{{chosen}}}"


def run(verb: str, store: Path, shards: str, *options: str) -> int:
    if verb in ("extract", "add"):
        options = ("calibration.images=6", *options)
    if verb == "extract":
        options = ("shard_rows=4", "group_rows=2", "on_corrupt=skip", *options)
    given = [f"cache={store}", f"data.shards='{shards}'", "batch_size=3", "workers=0"]
    return main([verb, *options, *given, "engine=cpu"])
