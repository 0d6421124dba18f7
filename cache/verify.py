"""Every checksum of a local store, read from the disk: what is wrong, where, and what mends it."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StoreError
from ..progress import ProgressLine
from . import spare
from .commit import COMMITS, Commit, Completion, FileRecord, completion_name, record_name
from .copies import (
    best_completion,
    best_manifest,
    completion_bytes,
    manifest_bytes,
    stray_units,
)
from .documents import difference
from .finish import shard_moments
from .layout import CRC, ArraySpec, Layout, node_bytes
from .manifest import MANIFEST, Manifest
from .plan import ROWS
from .rows import decode_keys
from .shard_writer import PARTIAL, partial_name
from .sharding import LARGEST_GAP, crc32c, parse_index, plain_index
from .source import local_path, too_many_open
from .verify_report import Problem, VerifyReport, fingerprint

_BLOCK = 512 << 10  # what was read is still in the core's own cache when it is hashed
Told = Callable[[int], None] | None


def verify_store(path: str | Path, *, threads: int = 4, progress: bool = False) -> VerifyReport:
    """Read every file of a store and compare it with every checksum and hash there is of it.

    Checked are the manifest, the Zarr metadata, calibrations, statistics and completions with
    their copies, every commit record, and of every shard's file its length, SHA-256, shard index
    and the checksum of every chunk. Data is read from the device, not from the page cache, where
    the system allows that.

    Args:
        threads: files that are read at once; with more than there are cores, disk and hashing
            overlap.
        progress: show a progress line.

    Raises:
        StoreError: there is no store at all, or this process may open no more files.
    """
    root, started = local_path(path, "verifying"), time.monotonic()
    if threads < 1:
        raise StoreError(f"threads must be at least 1, not {threads}")
    if not (root / MANIFEST).exists() and not (root / spare.SPARE / MANIFEST).exists():
        raise StoreError(
            f"{root} holds no store ({MANIFEST} is missing): run `preceptor extract` to make one"
        )
    before = fingerprint(root)
    problems = [_kept_problem(sentence) for sentence in spare.problems(root)]
    manifest = best_manifest(root)
    if manifest is None:
        return VerifyReport(str(root), before, problems)
    layout = Layout(manifest.plan)
    problems += _manifest_problems(root, manifest)
    problems += _node_problems(root, layout)
    work = _Work(root, manifest, layout)
    for unit in manifest.plan.units:
        problems += work.add_unit(unit)
    if progress:
        with ProgressLine("verify", work.total >> 20, "MiB") as line:
            problems += work.run(threads, line.advance)
    else:
        problems += work.run(threads, lambda mebibytes: None)
    return VerifyReport(
        str(root),
        before,
        problems,
        files=work.files,
        bytes=work.total,
        seconds=time.monotonic() - started,
    )


def _kept_problem(sentence: str) -> Problem:
    file, _, why = sentence.partition(" is ")
    return Problem(file, f"is {why}")


def _manifest_problems(root: Path, manifest: Manifest) -> Iterator[Problem]:
    """Copies that differ though each is sound, and units that the manifest does not know."""
    raw = manifest_bytes(root, manifest)
    for name in (MANIFEST, f"{spare.SPARE}/{MANIFEST}"):
        if _holds_other(root / name, raw):
            why = "a change was cut short, or an older one was put in its place"
            yield Problem(name, f"is not the manifest of what is there: {why}")
    for unit in manifest.plan.units:
        done = best_completion(root, manifest, unit)
        raw = b"" if done is None else completion_bytes(root, done)
        for name in (completion_name(unit), f"{spare.SPARE}/{completion_name(unit)}"):
            if done is not None and _holds_other(root / name, raw):
                yield Problem(name, "is not the completion of the records that are there", unit)
    for unit in stray_units(root, manifest):
        yield Problem(
            f"{COMMITS}/{unit}",
            f"belongs to no teacher of the manifest; `preceptor drop teacher={unit}` removes it",
            unit,
            stray=True,
        )


def _holds_other(file: Path, raw: bytes) -> bool:
    """Whether a file can be read, and has other bytes; what cannot be read is told elsewhere."""
    try:
        return file.read_bytes() != raw
    except OSError:
        return False


def _node_problems(root: Path, layout: Layout) -> Iterator[Problem]:
    units = [(unit, layout.nodes(unit)) for unit in layout.plan.units]
    for unit, nodes in [("", layout.root_nodes()), *units]:
        for path, metadata in nodes:
            name = f"{path}/zarr.json".lstrip("/")
            try:
                raw, own = (root / name).read_bytes(), node_bytes(metadata)
                # Another program may lay it out otherwise; a file of ours without its end is cut.
                other = difference(json.loads(raw), metadata) is not None
                if other or (raw != own and own.startswith(raw)):
                    yield Problem(name, f"is not what {MANIFEST} calls for", unit or None)
            except OSError as error:
                yield Problem(name, _unread(error), unit or None)
            except (ValueError, RecursionError):
                yield Problem(name, "is not JSON", unit or None)


class _Work:
    """The shards' files that are to be read, and what was found about them."""

    def __init__(self, root: Path, manifest: Manifest, layout: Layout) -> None:
        self._root, self._manifest, self._layout = root, manifest, layout
        self._jobs: list[tuple[str, int, ArraySpec, FileRecord]] = []
        self._rows: dict[int, Commit] = {}
        self.files = 0
        self.total = 0

    def add_unit(self, unit: str) -> list[Problem]:
        """Check a unit's records, and plan the reading of the files that they promise."""
        problems: list[Problem] = []
        done = best_completion(self._root, self._manifest, unit)
        missing: list[int] = []
        for shard in range(self._manifest.plan.shards):
            name = record_name(unit, shard)
            try:
                raw = (self._root / name).read_bytes()
            except OSError as error:
                missing.append(shard)
                pending = done is None and isinstance(error, FileNotFoundError)
                state = ": the shard was not extracted yet" if pending else ""
                problems.append(Problem(name, f"{_unread(error)}{state}", unit, shard, pending))
                continue
            try:
                commit = Commit.from_bytes(raw, name)
                commit.refuse_other(self._manifest, self._layout, unit, shard)
            except StoreError as error:
                problems.append(Problem(name, _reason(error, name), unit, shard))
                continue
            if why := self._unsealed(done, unit, shard, raw, commit):
                problems.append(Problem(name, why, unit, shard))
                continue
            if done is None:
                problems += self._moment_problems(unit, commit)
            for path, spec in self._layout.unit_arrays(unit).items():
                self._jobs.append((unit, shard, spec, commit.files[path]))
                self.total += commit.files[path].bytes
        if done is None and not missing:
            why = "is missing: the unit was not finished"
            problems.append(Problem(completion_name(unit), why, unit, pending=True))
        self.files = len(self._jobs)
        return problems

    def _moment_problems(self, unit: str, commit: Commit) -> Iterator[Problem]:
        """Until a unit is finished, every shard's moments lie beside it; not those of one that is
        converted or copied, which gets the statistics of the original."""
        plan = self._manifest.plan
        copied = bool(plan.converted) and not (self._root / PARTIAL / unit).exists()
        for space in plan.spaces_of(unit):
            if copied or not commit.statistics:
                continue
            try:
                shard_moments(self._root, space, commit)
            except ValueError as why:
                name = partial_name(space, commit.shard)
                yield Problem(name, str(why), unit, commit.shard)

    def _unsealed(
        self, done: Completion | None, unit: str, shard: int, raw: bytes, commit: Commit
    ) -> str | None:
        if done is not None and hashlib.sha256(raw).hexdigest() != done.records[shard]:
            return "is not the record that was sealed"
        files = commit.files.items()
        if done is not None and any(done.sizes[path][shard] != f.bytes for path, f in files):
            return f"states other lengths than {completion_name(unit)}"
        if unit == ROWS:
            self._rows[shard] = commit
            return None
        rows = self._rows.get(shard)
        facts = (commit.valid, commit.first_key, commit.last_key)
        if rows is not None and facts != (rows.valid, rows.first_key, rows.last_key):
            return "is of other rows than the store's"
        return None

    def run(self, threads: int, advance: Callable[[int], None]) -> Iterable[Problem]:
        """Read all planned files; ``advance`` is told of every MiB."""
        lock, seen = threading.Lock(), [0]

        def told(count: int) -> None:
            with lock:
                whole = (seen[0] + count) // (1 << 20) - seen[0] // (1 << 20)
                seen[0] += count
                if whole:
                    advance(whole)

        def one(job: tuple[str, int, ArraySpec, FileRecord]) -> list[Problem]:
            unit, shard, spec, record = job
            name = spec.file(shard)
            chunks = self._layout.chunks_in(spec, shard)
            whys = check_file(self._root / name, spec, record, chunks, told)
            if not whys and unit == ROWS:
                whys = self._row_problems(spec, shard)
            return [Problem(name, why, unit, shard) for why in whys]

        with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
            return [problem for found in pool.map(one, self._jobs) for problem in found]

    def _row_problems(self, spec: ArraySpec, shard: int) -> list[str]:
        """Whether keys and validity are those that the record names, and no other fact is left
        out."""
        fact, commit = spec.path.rpartition("/")[2], self._rows[shard]
        try:
            raw = np.frombuffer((self._root / spec.file(shard)).read_bytes()[:-CRC], np.uint8)
            values, good = spec.decode_chunk(raw)[: commit.rows], True
            if fact == "valid":
                good = int(values.sum()) == commit.valid
            elif fact == "key":
                keys = decode_keys(values[[0, -1]])
                good = keys == [commit.first_key, commit.last_key]
            elif spec.filled(values).any():
                return [f"lacks the {fact} of a row: its writer left it out"]
        except OSError as error:  # gone since it was checked
            return [_unread(error)]
        except ValueError as error:
            return [str(error)]
        return [] if good else [f"holds another {fact} than its commit record names"]


def check_file(
    file: Path, spec: ArraySpec, record: FileRecord, chunks: int, told: Told = None
) -> list[str]:
    """What is wrong with one shard's file, a sentence each; the damaged groups are numbered.

    Args:
        chunks: how many chunks of the file hold rows.
        told: called with the number of bytes after every block.
    """
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return [_unread(error)]
    try:
        size = os.fstat(fd).st_size
        if size != record.bytes:
            return [f"has {size} bytes, not {record.bytes}"]
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return _read_problems(fd, spec, record, chunks, told)
    except OSError as error:
        return [f"cannot be read: {error.strerror}"]
    finally:
        os.close(fd)


def _read_problems(
    fd: int, spec: ArraySpec, record: FileRecord, chunks: int, told: Told
) -> list[str]:
    problems = []
    entries = plain_index(spec, record.bytes)
    if spec.group is not None:
        tail = os.pread(fd, spec.index_bytes, record.bytes - spec.index_bytes)
        try:
            entries = parse_index(spec, tail, record.bytes, chunks)
        except ValueError as error:
            problems.append(str(error))
            entries = np.zeros((0, 2), np.int64)
    # Chunks lie one after another, as they were written, with gaps of a few zeros between them.
    whole, at = hashlib.sha256(), 0
    spans = sorted((int(o), int(n), number) for number, (o, n) in enumerate(entries.tolist()))
    buffer = np.empty(_BLOCK, np.uint8)
    for offset, length, number in spans:
        if offset < at:
            problems.append(f"group {number} overlaps another")
            continue
        gap = offset - at
        at, value = _hash_span(fd, whole, at, gap, buffer, told)
        if gap > LARGEST_GAP or value != crc32c(bytes(gap)):
            problems.append(f"has more than a few zeros before group {number}")
        at, value = _hash_span(fd, whole, at, length - CRC, buffer, told)
        stated = os.pread(fd, CRC, at)
        whole.update(stated)
        at += CRC
        if value != int.from_bytes(stated, "little"):
            problems.append(f"group {number} does not match its checksum")
        elif value != record.chunks[number]:
            problems.append(f"group {number} is not what was committed")
    _hash_span(fd, whole, at, record.bytes - at, buffer, told)
    if not problems and whole.hexdigest() != record.sha256:
        problems.append("does not match its SHA-256")
    return problems


def _hash_span(
    fd: int, whole: hashlib._Hash, at: int, length: int, buffer: Any, told: Told
) -> tuple[int, int]:
    """Hash a span of a file; returns where it ends, and its CRC-32C."""
    value, end = 0, at + length
    while at < end:
        part = buffer[: min(len(buffer), end - at)]
        got = os.preadv(fd, [part], at)
        if not got:
            break
        whole.update(part[:got])
        value = crc32c(part[:got], value)
        at += got
        if told is not None:
            told(got)
    return at, value


def _unread(error: OSError) -> str:
    if (told := too_many_open(error)) is not None:  # no damage, and no matter for repair
        raise told from error
    gone = isinstance(error, FileNotFoundError | NotADirectoryError)
    return "is missing" if gone else f"cannot be read: {error.strerror}"


def _reason(error: StoreError, name: str) -> str:
    return str(error).partition(": run `")[0].removeprefix(f"{name} ")
