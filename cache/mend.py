"""Repair: small files from their copies, shards by extracting them again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import StoreError
from . import spare
from .commit import Completion, completion_name, discard, record_name
from .copies import best_completion, best_manifest, completion_bytes, manifest_bytes
from .durable import holds, make_directory, read_whole, write_whole
from .manifest import MANIFEST, Manifest
from .writer import StoreWriter

Refill = Callable[[StoreWriter], object]
"""Extracts every pending shard of a writer."""


@dataclass(frozen=True)
class Repaired:
    """What a repair did.

    Attributes:
        restored: small files written from their copy or from the manifest.
        extracted: (unit, shard) that were extracted again or for the first time.
        different: those whose new bytes are not what was sealed before; the store is sound, but
            its statistics are those of the earlier features.
    """

    restored: tuple[str, ...]
    extracted: tuple[tuple[str, int], ...]
    different: tuple[tuple[str, int], ...]


def mend_files(root: Path) -> tuple[list[str], StoreWriter]:
    """Restore manifest, completions, calibrations, statistics and Zarr metadata; no images needed.

    Returns:
        The paths written, and a writer for what is left to do.

    Raises:
        StoreError: a file and its copy are both damaged.
    """
    written: list[str] = []
    manifest = best_manifest(root)
    if manifest is not None:
        written += _write_both(root, MANIFEST, manifest_bytes(root, manifest))
        for unit in manifest.plan.units:
            done = best_completion(root, manifest, unit)
            if done is not None:
                written += _write_both(root, completion_name(unit), completion_bytes(root, done))
    written += spare.mend(root)
    return written, StoreWriter.open(root)


def repair_store(
    path: str | Path, shards: Sequence[tuple[str, int]], refill: Refill | None
) -> Repaired:
    """Make a damaged store whole again: to the same bytes where the teachers give the same bits.

    A repair that is interrupted leaves a store that is refused, and that can be repaired again.

    Args:
        shards: (unit, shard) to extract again: ``VerifyReport.shards``.
        refill: extracts what is pending; None: only what needs no images is mended.

    Raises:
        StoreError: shards must be extracted and there is nothing to do it with, or both copies of
            a file are damaged.
    """
    root = Path(path)
    restored, writer = mend_files(root)
    sealed = _sealed(root, writer.manifest)
    units = writer.plan.units
    gone = {(unit, shard) for unit, shard in shards if unit in units}
    waiting = {(unit, shard) for shard, names in writer.pending() for unit in names}
    todo = sorted(gone | waiting)
    if todo and refill is None:
        listed = ", ".join(f"{shard} of {unit}" for unit, shard in todo[:8])
        raise StoreError(
            f"{root}: {len(todo)} shards must be extracted again ({listed}"
            f"{', ...' if len(todo) > 8 else ''}): give teachers=... and data.shards=... of the "
            "extraction that made the store"
        )
    for unit, shard in sorted(gone):
        discard(root, writer.manifest, unit, shard)
    if todo and refill is not None:
        refill(writer)
    writer.finish()
    return Repaired(tuple(restored), tuple(todo), tuple(_different(root, sealed, todo)))


def _write_both(root: Path, name: str, raw: bytes) -> list[str]:
    written = []
    for file in (root / spare.SPARE / name, root / name):
        if not holds(file, raw):
            make_directory(file.parent)
            write_whole(file, raw)
            written.append(str(file.relative_to(root)))
    return written


def _sealed(root: Path, manifest: Manifest) -> dict[str, Completion | None]:
    return {unit: best_completion(root, manifest, unit) for unit in manifest.plan.units}


def _different(
    root: Path, sealed: dict[str, Completion | None], todo: Sequence[tuple[str, int]]
) -> list[tuple[str, int]]:
    found = []
    for unit, shard in todo:
        before = sealed[unit]
        record = read_whole(root / record_name(unit, shard))
        if before is not None and hashlib.sha256(record).hexdigest() != before.records[shard]:
            found.append((unit, shard))
    return found
