"""Which of two sound copies is the right one: the manifest's and every completion's."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import StoreError
from .commit import COMMITS, Completion, completion_name, record_name
from .manifest import MANIFEST, Manifest
from .spare import SPARE


def best_manifest(root: Path) -> Manifest | None:
    """The manifest that knows the units that are there; None when both copies are damaged.

    Of two sound ones the copy is taken where nothing else tells: it is written first, so after
    an interrupted change it is the newer.
    """
    found = []
    for path in (root / SPARE / MANIFEST, root / MANIFEST):
        with contextlib.suppress(OSError, StoreError):
            found.append(Manifest.from_bytes(path.read_bytes(), str(path)))
    return max(found, key=lambda manifest: _known(root, manifest), default=None)


def _known(root: Path, manifest: Manifest) -> tuple[int, int]:
    """How many finished units the manifest describes, and how many it calibrates."""
    matching = 0
    for unit in manifest.plan.units:
        states = {done.configuration for _, done in _completions(root, unit)}
        matching += manifest.configuration(unit) in states
    return matching, len(manifest.calibrations)


def best_completion(root: Path, manifest: Manifest, unit: str) -> Completion | None:
    """The completion of this manifest that seals most of the records that are there."""
    configuration = manifest.configuration(unit)
    found = [
        done
        for _, done in _completions(root, unit)
        if (done.unit, done.configuration) == (unit, configuration)
        and len(done.records) == manifest.plan.shards
    ]
    if len(found) < 2 or found[0] == found[1]:
        return found[0] if found else None
    hashes = [_sha256(root / record_name(unit, shard)) for shard in range(manifest.plan.shards)]
    return max(
        found, key=lambda done: sum(a == b for a, b in zip(done.records, hashes, strict=True))
    )


def _completions(root: Path, unit: str) -> Iterator[tuple[Path, Completion]]:
    for path in (root / SPARE / completion_name(unit), root / completion_name(unit)):
        with contextlib.suppress(OSError, StoreError):
            yield path, Completion.from_bytes(path.read_bytes(), str(path))


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def stray_units(root: Path, manifest: Manifest) -> list[str]:
    """Names under commits/ and spaces/ that are no unit of the manifest."""
    names: set[str] = set()
    for directory in (root / COMMITS, root / "spaces"):
        if directory.is_dir():
            names |= {entry.name for entry in os.scandir(directory) if entry.is_dir()}
    return sorted(names - set(manifest.plan.units))
