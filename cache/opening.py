"""What has to hold before a store is read: whole, undamaged as far as names and lengths tell."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import StoreError
from .commit import COMMITS, Completion, completion_name
from .documents import difference
from .layout import Layout
from .manifest import MANIFEST, Manifest
from .plan import PIXELS, ROWS
from .source import LocalSource, Source
from .spare import lost_manifest


def open_units(
    source: Source, teachers: Sequence[str] | None
) -> tuple[Manifest, dict[str, Completion]]:
    """The manifest and the completions of the rows, of the teachers asked for and, where they are
    whole, of the pixels.

    Raises:
        StoreError: see ``Cache.open``.
    """
    if isinstance(teachers, str):
        raise StoreError(f"teachers={teachers!r} is a text: give a list, such as ['{teachers}']")
    manifest = _manifest(source)
    plan = manifest.plan
    named = (plan.teacher(name).name for name in teachers or ())
    units = [*plan.units] if teachers is None else [ROWS, *named]
    completions: dict[str, Completion] = {}
    unfinished: list[str] = []
    for unit in units:
        done = _completion(source, manifest, unit)
        if done is None:
            unfinished.append(unit)
        else:
            completions[unit] = done
    if unfinished:
        raise _incomplete(source, manifest, unfinished)
    layout = Layout(plan)
    problems = [
        problem for unit in units for problem in _problems(source, layout, unit, completions[unit])
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise StoreError(
            f"{source.location} is damaged: {'; '.join(problems[:5])}{more}; run `preceptor "
            "verify` to see all of the damage and `preceptor repair` to mend it"
        )
    if plan.pixels is not None and PIXELS not in units:
        with contextlib.suppress(StoreError):  # they need not be whole; told to who asks for them
            done = _completion(source, manifest, PIXELS)
            if done is not None and not _problems(source, layout, PIXELS, done):
                completions[PIXELS] = done
    return manifest, completions


def _completion(source: Source, manifest: Manifest, unit: str) -> Completion | None:
    """Of a unit of this manifest; None: it is not finished."""
    raw = source.read_or_none(completion_name(unit))
    if raw is None:
        return None
    where = f"{source.location}/{completion_name(unit)}"
    found = Completion.from_bytes(raw, where)
    found.refuse_other(manifest, Layout(manifest.plan), unit, where)
    return found


def _problems(source: Source, layout: Layout, unit: str, completion: Completion) -> list[str]:
    return [
        *_metadata_problems(source, layout, unit),
        *_file_problems(source, layout, unit, completion),
    ]


def _manifest(source: Source) -> Manifest:
    where = f"{source.location}/{MANIFEST}"
    try:
        return Manifest.from_bytes(source.read(MANIFEST), where)
    except (FileNotFoundError, StoreError) as error:
        if isinstance(source, LocalSource) and (copy := lost_manifest(Path(source.location))):
            wrong = error if isinstance(error, StoreError) else f"{where} is missing"
            raise StoreError(f"{wrong}; {copy}") from error
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{source.location} holds no store ({MANIFEST} is missing): run `preceptor extract` "
            "to make one"
        ) from None


def _incomplete(source: Source, manifest: Manifest, units: list[str]) -> StoreError:
    missing = []
    for unit in units:
        names = source.sizes(f"{COMMITS}/{unit}")
        if names is None:
            missing.append(f"{unit} is not finished")
            continue
        shards = [s for s in range(manifest.plan.shards) if f"{s}.json" not in names]
        listed = ", ".join(str(shard) for shard in shards[:8]) + (", ..." if shards[8:] else "")
        missing.append(
            f"{unit} lacks {len(shards)} of {manifest.plan.shards} shards ({listed})"
            if shards
            else f"{unit} is committed but not finished"
        )
    return StoreError(
        f"{source.location} is incomplete: {'; '.join(missing)}; run the "
        f"{manifest.plan.begun_by(units)} that began it again, it does only what is missing"
    )


def _metadata_problems(source: Source, layout: Layout, unit: str) -> list[str]:
    problems = []
    nodes = [*layout.nodes(unit), *(layout.root_nodes() if unit == ROWS else ())]
    names = [f"{path}/zarr.json".lstrip("/") for path, _ in nodes]
    for name, raw, (_, metadata) in zip(names, source.read_many(names), nodes, strict=True):
        if raw is None:
            problems.append(f"{name} is missing")
            continue
        try:
            if difference(json.loads(raw), metadata) is not None:
                problems.append(f"{name} is not what {MANIFEST} calls for")
        except (ValueError, RecursionError):
            problems.append(f"{name} is not JSON")
    return problems


def _file_problems(source: Source, layout: Layout, unit: str, completion: Completion) -> list[str]:
    """Shards whose record is missing, or whose file is missing or of another length."""
    problems = []
    records = source.sizes(f"{COMMITS}/{unit}")
    if records is not None:
        problems += [
            f"shard {shard} of {unit} has no commit record"
            for shard in range(layout.plan.shards)
            if f"{shard}.json" not in records
        ]
    for path, spec in layout.unit_arrays(unit).items():
        found = source.sizes(path)
        if found is None:
            continue  # cannot be listed: every read is checked all the same
        for shard, size in enumerate(completion.sizes[path]):
            name = spec.file(shard)
            got = found.get(name.rpartition("/")[2])
            if got is None:
                problems.append(f"shard {shard} of {unit}: {name} is missing")
            elif got != size:
                problems.append(f"shard {shard} of {unit}: {name} has {got} bytes, not {size}")
    return problems


def read_files(source: Source, names: Iterable[str]) -> dict[str, bytes]:
    """Whole files by path.

    Raises:
        StoreError: one is missing.
    """
    names = list(names)
    found = dict(zip(names, source.read_many(names), strict=True))
    for name, raw in found.items():
        if raw is None:
            raise StoreError(f"{source.location}/{name} is missing: run `preceptor repair`")
    return {name: raw for name, raw in found.items() if raw is not None}
