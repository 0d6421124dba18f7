"""Second copies of the few small files that no re-extraction would bring back bit for bit.

The manifest, calibrations, merged statistics and completions lie a second time under ``spare/``.
Shards and their commit records do not: they are extracted again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StoreError
from .commit import COMMITS, Completion, completion_name
from .constants import (
    calibration_files,
    calibration_values,
    statistics_files,
    statistics_values,
)
from .durable import make_directory, write_whole
from .layout import Layout
from .manifest import MANIFEST, Manifest
from .plan import SpaceSpec
from .source import too_many_open

SPARE = "spare"


def write_twice(root: Path, name: str, raw: bytes) -> None:
    """Write a file of the store and its copy, each atomically; the copy first."""
    for path in (root / SPARE / name, root / name):
        make_directory(path.parent)
        write_whole(path, raw)


def lost_manifest(root: Path) -> str | None:
    """What to do of a store whose manifest is missing or damaged, where a sound copy of it is left
    and a shard was written already; None: there is no such copy, or no need of it."""
    copy = _read(root / SPARE / MANIFEST)
    begun = any((root / COMMITS).glob("*/*.json"))
    if not begun or copy is None or _manifest(root, copy) is None:
        return None
    return f"a sound copy of that file is kept, which `preceptor repair cache={root}` puts back"


@dataclass(frozen=True)
class Kept:
    """Files that are judged together.

    Attributes:
        names: paths within the store.
        good: whether contents, by name, are what the store's hashes call for.
    """

    names: tuple[str, ...]
    good: Callable[[Mapping[str, bytes]], bool]


def problems(root: Path) -> list[str]:
    """The kept files that are missing or damaged, copies included; one sentence each."""
    found = []
    for kept in _kept(root):
        first = {name: _read(root / name) for name in kept.names}
        second = {name: _read(root / SPARE / name) for name in kept.names}
        for where, ours, other in (("", first, second), (f"{SPARE}/", second, first)):
            if not _all_good(kept, ours):
                # the other copy, if it is sound, tells which of the files it is
                sound = _all_good(kept, other)
                names = [n for n in kept.names if not sound or ours[n] != other[n]]
                found += [f"{where}{name} is missing or damaged" for name in names]
    return found


def mend(root: Path) -> list[str]:
    """Restore each kept file, or its copy, from the other; returns what was written.

    Raises:
        StoreError: both are damaged.
    """
    written = []
    for kept in _kept(root):
        choices = [
            [raw for path in (root / name, root / SPARE / name) if (raw := _read(path)) is not None]
            for name in kept.names
        ]
        for choice in itertools.product(*choices):
            contents = dict(zip(kept.names, choice, strict=True))
            if not contents or kept.good(contents):
                break
        else:
            raise StoreError(
                f"{root}: {' or '.join(kept.names)} and its copy under {SPARE}/ are both damaged: "
                "restore one of them from a backup, or extract the store anew"
            )
        for name, raw in contents.items():
            for path in (root / SPARE / name, root / name):
                if _read(path) != raw:
                    make_directory(path.parent)
                    write_whole(path, raw)
                    written.append(str(path.relative_to(root)))
    return written


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError as error:  # what cannot be read is as good as gone: the other copy replaces it
        if (told := too_many_open(error)) is not None:
            raise told from error
        return None


def _all_good(kept: Kept, contents: Mapping[str, bytes | None]) -> bool:
    present = {name: raw for name, raw in contents.items() if raw is not None}
    return len(present) == len(kept.names) and (not present or kept.good(present))


def _kept(root: Path) -> Iterator[Kept]:
    """The manifest first, and what it calls for once that is known to be good or mended."""
    yield Kept((MANIFEST,), lambda contents: _manifest(root, contents[MANIFEST]) is not None)
    manifest = None
    for path in (root / MANIFEST, root / SPARE / MANIFEST):
        raw = _read(path)
        manifest = manifest or (None if raw is None else _manifest(root, raw))
    if manifest is None:
        return
    yield from (_kept_completion(root, manifest, unit) for unit in manifest.plan.units)
    yield from _kept_constants(root, manifest)


def _manifest(root: Path, raw: bytes) -> Manifest | None:
    """The manifest, unless it is damaged or older than the completions."""
    with contextlib.suppress(StoreError):
        manifest = Manifest.from_bytes(raw, MANIFEST)
        for unit in manifest.plan.units:
            for path in (root / completion_name(unit), root / SPARE / completion_name(unit)):
                with contextlib.suppress(StoreError):
                    done = _read(path)
                    if done is not None:
                        stated = Completion.from_bytes(done, str(path)).configuration
                        if stated != manifest.configuration(unit):
                            return None
        return manifest
    return None


def _completion(root: Path, unit: str) -> Completion | None:
    for path in (root / completion_name(unit), root / SPARE / completion_name(unit)):
        raw = _read(path)
        if raw is not None:
            with contextlib.suppress(StoreError):
                return Completion.from_bytes(raw, str(path))
    return None


def _kept_completion(root: Path, manifest: Manifest, unit: str) -> Kept:
    name = completion_name(unit)
    copies = [root / name, root / SPARE / name]

    def good(contents: Mapping[str, bytes]) -> bool:
        with contextlib.suppress(StoreError):
            done = Completion.from_bytes(contents[name], name)
            done.refuse_other(manifest, Layout(manifest.plan), unit, name)
            return True
        return False

    return Kept((name,) if any(copy.exists() for copy in copies) else (), good)


def _kept_constants(root: Path, manifest: Manifest) -> Iterator[Kept]:
    layout = Layout(manifest.plan)
    for space in manifest.plan.spaces.values():
        frozen = manifest.calibrations.get(space.id)
        if frozen is not None:
            judge = _judge(calibration_values, layout, space, frozen)
            yield Kept(calibration_files(layout, space), judge)
        done = _completion(root, space.teacher)
        if done is not None and space.name in done.statistics:
            judge = _judge(statistics_values, layout, space, done.statistics[space.name])
            yield Kept(statistics_files(layout, space), judge)


def _judge(
    parse: Callable[..., Any], layout: Layout, space: SpaceSpec, seal: Any
) -> Callable[[Mapping[str, bytes]], bool]:
    def good(contents: Mapping[str, bytes]) -> bool:
        with contextlib.suppress(StoreError):
            parse(layout, space, contents, seal)
            return True
        return False

    return good
