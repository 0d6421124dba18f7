"""Sealing a unit whose shards are all committed: its completion and its merged statistics."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import StoreError
from .commit import COMMITS, Commit, Completion, completion_name, record_name
from .constants import constant_bytes, statistics_sha256
from .durable import directory_lock, read_whole, remove_directory, sync_directory
from .layout import Layout
from .manifest import Manifest
from .plan import SpaceSpec
from .shard_writer import PARTIAL, partial_name
from .spare import SPARE, write_twice
from .statistics import Moments


def finish_unit(root: Path, manifest: Manifest, unit: str) -> None:
    """Write the completion of a unit, unless the one that is there holds already, and remove the
    moments of its shards. Of several processes one does it and the others find it done.

    Raises:
        StoreError: a record or a shard's statistics are missing or damaged.
    """
    with directory_lock(root / COMMITS / unit):
        _seal(root, manifest, unit)
        with contextlib.suppress(StoreError):  # left behind, they do no harm
            remove_directory(root / PARTIAL / unit)


def _seal(root: Path, manifest: Manifest, unit: str) -> None:
    layout = Layout(manifest.plan)
    names = [record_name(unit, shard) for shard in range(manifest.plan.shards)]
    try:
        raws = [read_whole(root / name) for name in names]
    except FileNotFoundError as error:
        raise StoreError(f"{error.filename} is missing: run the extraction again") from None
    records = tuple(hashlib.sha256(raw).hexdigest() for raw in raws)
    before = _completion(root, manifest, unit)
    if before is not None and before.records == records:
        return
    commits = [Commit.from_bytes(raw, name) for name, raw in zip(names, raws, strict=True)]
    sizes = {
        path: [commit.files[path].bytes for commit in commits] for path in layout.unit_arrays(unit)
    }
    done = Completion(unit, manifest.configuration(unit), records, sizes)
    spaces = manifest.plan.spaces_of(unit)
    moments = [partial_name(space, commit.shard) for space in spaces for commit in commits]
    if before is not None and all((root / name).exists() for name in moments):
        # Every shard was extracted again. Interrupted among the new statistics, the unit is to
        # count as not finished, which it can be at any time, not as one with damaged statistics.
        _unseal(root, unit)
        before = None
    for space in spaces:
        if before is None:
            merged = _merged(root, space, commits)
            values = {"mean": merged.mean, "covariance": merged.covariance}
            for name, spec in layout.statistics_arrays(space).items():
                write_twice(root, spec.file(0), constant_bytes(spec, values[name]))
            tokens, seal = merged.count, statistics_sha256(**values)
        else:
            # A repair: the moments of the other shards were merged and dropped long ago.
            tokens, seal = before.tokens[space.name], before.statistics[space.name]
            done = replace(done, exact=False)
        done = replace(
            done,
            tokens={**done.tokens, space.name: tokens},
            statistics={**done.statistics, space.name: seal},
        )
    write_twice(root, completion_name(unit), done.to_bytes())


def _unseal(root: Path, unit: str) -> None:
    """Remove a completion, its copy first: until both are gone it holds, and can be restored."""
    for path in (root / SPARE / completion_name(unit), root / completion_name(unit)):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{path} cannot be removed: {error.strerror}") from error
        if path.parent.is_dir():
            sync_directory(path.parent)


def _completion(root: Path, manifest: Manifest, unit: str) -> Completion | None:
    """The completion that is there, if it is of this configuration and undamaged."""
    try:
        raw = read_whole(root / completion_name(unit))
        found = Completion.from_bytes(raw, completion_name(unit))
    except (FileNotFoundError, StoreError):
        return None
    return found if found.configuration == manifest.configuration(unit) else None


def _merged(root: Path, space: SpaceSpec, commits: list[Commit]) -> Moments:
    """The moments of all shards merged in order."""
    merged = Moments.empty(space.dim)
    for commit in commits:
        try:
            merged = merged.merged(shard_moments(root, space, commit))
        except ValueError as why:
            raise StoreError(
                f"{root / partial_name(space, commit.shard)}, the statistics of shard "
                f"{commit.shard} of {space.id}, {why}: run `preceptor repair`"
            ) from None
    return merged


def shard_moments(root: Path, space: SpaceSpec, commit: Commit) -> Moments:
    """The moments that the writer of a shard left for whoever finishes its unit.

    Raises:
        ValueError: what is wrong with them, as the rest of a sentence.
    """
    try:
        raw = (root / partial_name(space, commit.shard)).read_bytes()
    except OSError:
        raise ValueError("is missing") from None
    if hashlib.sha256(raw).hexdigest() != commit.statistics.get(space.name):
        raise ValueError("is damaged")
    tokens = commit.valid * space.tokens
    try:
        moments = Moments.unpacked(np.frombuffer(raw, "<f8"), space.dim)
    except ValueError:
        moments = None
    if moments is None or moments.count != tokens or not moments.possible:
        raise ValueError(f"does not hold the moments of {tokens} tokens")
    return moments
