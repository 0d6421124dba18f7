"""Which of two sound copies is the right one: the manifest's and every completion's."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import StoreError
from .commit import COMMITS, Completion, completion_name, record_name
from .layout import Layout
from .manifest import MANIFEST, Manifest
from .plan import PIXELS
from .spare import SPARE


def best_manifest(root: Path) -> Manifest | None:
    """The manifest that knows the units that are there; None when both copies are damaged.

    Of two sound ones manifest.json is taken where nothing else tells, for readers go by it: its
    copy is written first, and one that an interrupted `add` has left names a unit of which there is
    nothing yet.
    """
    found = []
    for path in (root / MANIFEST, root / SPARE / MANIFEST):
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
    layout, found = Layout(manifest.plan), list[Completion]()
    for path, done in _completions(root, unit):
        with contextlib.suppress(StoreError):
            done.refuse_other(manifest, layout, unit, str(path))
            found.append(done)
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


def spelled(root: Path, name: str, ours: bytes, means_the_same: Callable[[bytes], bool]) -> bytes:
    """The bytes that a file and its copy should have.

    Those that this program writes; but another writer may space JSON otherwise, so what both copies
    agree on, byte for byte, is left as it is where it means the same.
    """
    with contextlib.suppress(OSError):
        first, second = (root / name).read_bytes(), (root / SPARE / name).read_bytes()
        if first == second and means_the_same(first):
            return first
    return ours


def manifest_bytes(root: Path, manifest: Manifest) -> bytes:
    """What manifest.json and its copy should hold; see `spelled`."""

    def same(raw: bytes) -> bool:
        with contextlib.suppress(StoreError):
            return Manifest.from_bytes(raw, MANIFEST) == manifest
        return False

    return spelled(root, MANIFEST, manifest.to_bytes(), same)


def completion_bytes(root: Path, done: Completion) -> bytes:
    """What a unit's completion and its copy should hold; see `spelled`."""
    name = completion_name(done.unit)

    def same(raw: bytes) -> bool:
        with contextlib.suppress(StoreError):
            return Completion.from_bytes(raw, name) == done
        return False

    return spelled(root, name, done.to_bytes(), same)


def stray_units(root: Path, manifest: Manifest) -> list[str]:
    """Units of which there are files, but which the manifest does not name."""
    names = {PIXELS} if (root / PIXELS).is_dir() else set()
    for part in (COMMITS, "spaces"):
        for directory in (root / part, root / SPARE / part):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                names |= {entry.name for entry in os.scandir(directory) if entry.is_dir()}
    return sorted(names - set(manifest.plan.units) - set(manifest.others))
