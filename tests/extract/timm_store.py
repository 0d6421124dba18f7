"""Extraction of two small timm teachers through the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def options(shards: str, teachers: Sequence[str], store: Path, *more: str) -> list[str]:
    return [
        *teachers, f"data.shards='{shards}'", f"cache={store}", "shard_rows=4", "group_rows=2",
        "batch_size=3", "workers=0", "calibration.images=10", "engine=cpu",
        "+teachers.vit.encoding=compact", *more,
    ]  # fmt: skip


def corrupted(shards: str, folder: Path) -> str:
    """The same shards with the bytes of one PNG's data overwritten."""
    source = Path(shards).parent
    for name in ("s-0.tar", "s-1.tar"):
        data = bytearray((source / name).read_bytes())
        if name == "s-1.tar":
            start = data.index(b"IDAT")
            data[start + 4 : start + 40] = bytes(36)
        (folder / name).write_bytes(data)
    return str(folder / "s-{0..1}.tar")
