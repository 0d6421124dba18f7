"""Commit records: a shard of a unit exists when its record does, and is what its record says."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import StoreError
from .documents import Json, member, only, sealed, unsealed
from .durable import directory_lock, read_whole, sync_directory
from .layout import Layout
from .manifest import MANIFEST, Manifest

COMMITS = "commits"


@dataclass(frozen=True)
class FileRecord:
    """What one array's file of a shard is.

    Attributes:
        bytes: length of the file.
        sha256: of the file.
        chunks: CRC-32C of every chunk that holds rows, in order. Two shards of an array have
            valid checksums inside; these tell one from the other.
    """

    bytes: int
    sha256: str
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class Commit:
    """The commit record of one shard of one unit.

    Attributes:
        configuration: ``Manifest.configuration(unit)`` of the writer.
        rows: rows of the shard; ``valid`` of them have tokens.
        first_key, last_key: keys of its first and last row.
        files: by array path.
        statistics: SHA-256 of the shard's packed moments, by space name.
    """

    unit: str
    shard: int
    configuration: str
    rows: int
    valid: int
    first_key: str
    last_key: str
    files: Mapping[str, FileRecord]
    statistics: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        files = {
            path: {
                "bytes": file.bytes,
                "sha256": file.sha256,
                "chunks": "".join(f"{value:08x}" for value in file.chunks),
            }
            for path, file in self.files.items()
        }
        return sealed(
            {
                "unit": self.unit,
                "shard": self.shard,
                "configuration": self.configuration,
                "rows": self.rows,
                "valid": self.valid,
                "first_key": self.first_key,
                "last_key": self.last_key,
                "files": files,
                "statistics": dict(self.statistics),
            }
        )

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Commit:
        """Parse a record.

        Raises:
            StoreError: damage.
        """
        body = unsealed(raw, where)
        try:
            entries = member(body, "files", dict)
            only(body, cls.__dataclass_fields__)
            return cls(
                member(body, "unit", str),
                member(body, "shard", int),
                member(body, "configuration", str),
                member(body, "rows", int),
                member(body, "valid", int),
                member(body, "first_key", str),
                member(body, "last_key", str),
                {path: _file_record(entry) for path, entry in entries.items()},
                _all_of(body, "statistics", str),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{where} lacks or misstates a member: {error}") from None

    def refuse_other(self, manifest: Manifest, layout: Layout, unit: str, shard: int) -> None:
        """Refuse a record that is not of this shard of this store.

        Raises:
            StoreError: naming the shard.
        """
        where = f"the commit record of shard {shard} of {unit}"
        if (self.unit, self.shard) != (unit, shard):
            raise StoreError(
                f"{where} is that of shard {self.shard} of {self.unit}: run `preceptor repair`"
            )
        if self.configuration != manifest.configuration(unit):
            raise StoreError(
                f"{where} was made by another configuration ({self.configuration[:12]}, the "
                f"manifest has {manifest.configuration(unit)[:12]}): run `preceptor repair`"
            )
        arrays = layout.unit_arrays(unit)
        chunks = {path: layout.chunks_in(spec, shard) for path, spec in arrays.items()}
        if {path: len(file.chunks) for path, file in self.files.items()} != chunks:
            raise StoreError(f"{where} lists other files than the manifest: run `preceptor repair`")
        if self.rows != layout.plan.rows_in(shard):
            raise StoreError(f"{where} states {self.rows} rows: run `preceptor repair`")


def _file_record(entry: Json) -> FileRecord:
    only(entry, FileRecord.__dataclass_fields__)
    sums = bytes.fromhex(member(entry, "chunks", str))
    if len(sums) % 4 or sums.hex() != entry["chunks"]:
        raise ValueError("chunk checksums are not 8 hexadecimal digits each")
    chunks = tuple(int.from_bytes(sums[at : at + 4], "big") for at in range(0, len(sums), 4))
    return FileRecord(member(entry, "bytes", int), member(entry, "sha256", str), chunks)


def _all_of(body: Json, name: str, kind: type) -> dict[str, Any]:
    """A member that is an object whose members are all of some kind; see `member`."""
    found = member(body, name, dict)
    return {key: member(found, key, kind) for key in found}


def record_name(unit: str, shard: int) -> str:
    """Path of a shard's record within the store."""
    return f"{COMMITS}/{unit}/{shard}.json"


def completion_name(unit: str) -> str:
    """Path of a unit's completion within the store."""
    return f"{COMMITS}/{unit}/complete.json"


def committed(path: Path, unit: str) -> set[int]:
    """The shards of a unit that have a record.

    Raises:
        StoreError: the device fails.
    """
    directory = path / COMMITS / unit
    try:
        names = [entry.name for entry in os.scandir(directory)]
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise StoreError(f"{directory} cannot be listed: {error.strerror}") from error
    stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return {int(stem) for stem in stems if stem.isdecimal() and str(int(stem)) == stem}


def read_commit(path: Path, manifest: Manifest, layout: Layout, unit: str, shard: int) -> Commit:
    """The record of a shard of a local store, checked against the manifest.

    Raises:
        StoreError: missing, damaged, or of another shard or configuration.
    """
    file = path / record_name(unit, shard)
    try:
        raw = read_whole(file)
    except FileNotFoundError:
        raise StoreError(f"shard {shard} of {unit} in {path} is not committed") from None
    commit = Commit.from_bytes(raw, str(file))
    commit.refuse_other(manifest, layout, unit, shard)
    return commit


def is_whole(path: Path, manifest: Manifest, layout: Layout, unit: str, shard: int) -> bool:
    """Whether a shard of a local store has its record, and files of the lengths that it states."""
    try:
        commit = read_commit(path, manifest, layout, unit, shard)
        return all(
            (path / spec.file(shard)).stat().st_size == commit.files[array].bytes
            for array, spec in layout.unit_arrays(unit).items()
        )
    except (StoreError, OSError):
        return False


def discard(path: Path, manifest: Manifest, unit: str, shard: int) -> None:
    """Delete one shard of one unit, its record first; it is then pending again.

    Raises:
        StoreError: nothing can be deleted there.
    """
    directory = path / COMMITS / unit
    arrays = Layout(manifest.plan).unit_arrays(unit).values()
    with directory_lock(directory):
        try:
            (path / record_name(unit, shard)).unlink(missing_ok=True)
            sync_directory(directory)
            for spec in arrays:
                (path / spec.file(shard)).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"shard {shard} of {unit} in {path} cannot be removed: {error.strerror}"
            ) from error


@dataclass(frozen=True)
class Completion:
    """The seal of a whole unit, so that opening reads one file a unit.

    Attributes:
        records: SHA-256 of each shard's commit record.
        sizes: length of each shard's file, by array path.
        tokens: tokens counted in the statistics, by space name.
        statistics: SHA-256 of mean and covariance (float64 bytes), by space name.
        exact: whether the statistics are of exactly the committed shards; false after a repair
            whose teacher gave other bits than the first time.
    """

    unit: str
    configuration: str
    records: tuple[str, ...]
    sizes: Mapping[str, Sequence[int]]
    tokens: Mapping[str, int] = field(default_factory=dict)
    statistics: Mapping[str, str] = field(default_factory=dict)
    exact: bool = True

    def to_bytes(self) -> bytes:
        return sealed(
            {
                "unit": self.unit,
                "configuration": self.configuration,
                "records": list(self.records),
                "sizes": {path: _run_lengths(sizes) for path, sizes in self.sizes.items()},
                "tokens": dict(self.tokens),
                "statistics": dict(self.statistics),
                "exact": self.exact,
            }
        )

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Completion:
        """Parse a completion.

        Raises:
            StoreError: damage.
        """
        body = unsealed(raw, where)
        try:
            only(body, cls.__dataclass_fields__)
            records = tuple(member(body, "records", list))
            sizes = {
                path: _expanded(runs, len(records))
                for path, runs in member(body, "sizes", dict).items()
            }
            return cls(
                member(body, "unit", str),
                member(body, "configuration", str),
                records,
                sizes,
                _all_of(body, "tokens", int),
                _all_of(body, "statistics", str),
                member(body, "exact", bool),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{where} lacks or misstates a member: {error}") from None

    def refuse_other(self, manifest: Manifest, layout: Layout, unit: str, where: str) -> None:
        """Refuse a completion that does not seal this unit of this store.

        Raises:
            StoreError: naming the file, ``where``.
        """
        if self.unit != unit or self.configuration != manifest.configuration(unit):
            raise StoreError(
                f"{where} was made by another configuration than {MANIFEST}: run `preceptor repair`"
            )
        shards, spaces = manifest.plan.shards, manifest.plan.spaces_of(unit)
        lengths = {len(self.records), *(len(sizes) for sizes in self.sizes.values())}
        listed = set(self.sizes) == set(layout.unit_arrays(unit))
        names = {space.name for space in spaces}
        if lengths != {shards} or not listed or not names == {*self.tokens} == {*self.statistics}:
            raise StoreError(f"{where} does not list the {shards} shards: run `preceptor repair`")
        for space in spaces:
            if space.id not in manifest.calibrations:
                raise StoreError(
                    f"{where} seals {unit}, and {MANIFEST} has no calibration of {space.id}: run "
                    "`preceptor repair`"
                )


def _run_lengths(values: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return runs


def _expanded(runs: Sequence[Sequence[int]], shards: int) -> tuple[int, ...]:
    """The lengths that runs stand for; refused before they are spread out, if they are not as many
    as there are shards."""
    whole = all(type(size) is int and type(count) is int and count > 0 for size, count in runs)
    if not whole or sum(count for _, count in runs) != shards:
        raise ValueError(f"its sizes are not those of {shards} shards")
    return tuple(size for size, count in runs for _ in range(count))
