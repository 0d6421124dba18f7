"""What verification found: kept beside the store as JSON, for people and for repair."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import StoreError
from .durable import TEMPORARY
from .source import local_path


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        file: path within the store.
        why: the rest of the sentence.
        unit: ``rows`` or a teacher; None where the file belongs to none.
        shard: the shard to extract again; None where the file is mended without images.
        pending: nothing is damaged; an extraction that was begun has not come so far.
        stray: nothing is damaged; there are files of a unit that the manifest does not name.
    """

    file: str
    why: str
    unit: str | None = None
    shard: int | None = None
    pending: bool = False
    stray: bool = False

    def __str__(self) -> str:
        where = "" if self.shard is None else f"shard {self.shard} of {self.unit}: "
        return f"{where}{self.file} {self.why}"


@dataclass
class VerifyReport:
    """The result of ``verify_store``.

    Attributes:
        store: its path.
        fingerprint: names, lengths and times of the files that were read.
        problems: empty for a whole store.
        files, bytes: how many shard files were read, and their length.
        seconds: wall time.
        live: comparison with live teachers by space, where that was asked for.
    """

    store: str
    fingerprint: str
    problems: list[Problem]
    files: int = 0
    bytes: int = 0
    seconds: float = 0.0
    live: Mapping[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return not self.problems

    @property
    def damaged(self) -> bool:
        """Whether there is more than units that are not finished, or that are not the store's."""
        return not all(problem.pending or problem.stray for problem in self.problems)

    @property
    def unfinished(self) -> list[str]:
        """Units that were begun and are not finished; of an undamaged store all there is to do."""
        return sorted({p.unit for p in self.problems if p.pending and p.unit is not None})

    @property
    def strays(self) -> list[str]:
        """Units of which there are files, but which the manifest does not name."""
        return [p.unit for p in self.problems if p.stray and p.unit is not None]

    @property
    def shards(self) -> list[tuple[str, int]]:
        """(unit, shard) to extract again, in order, each once."""
        named = {(p.unit, p.shard) for p in self.problems}
        return sorted((u, s) for u, s in named if u is not None and s is not None)

    def as_json(self) -> dict[str, Any]:
        shards: dict[str, list[int]] = {}
        for unit, shard in self.shards:
            shards.setdefault(unit, []).append(shard)
        rate = self.bytes / self.seconds / 1e6 if self.seconds else None
        return {
            "store": self.store,
            "whole": self.whole,
            "problems": [asdict(problem) for problem in self.problems],
            "shards": shards,
            "files": self.files,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "megabytes_per_second": rate,
            "live": dict(self.live),
            "fingerprint": self.fingerprint,
        }

    def save(self) -> Path:
        """Write ``<store>.verify.json``.

        Raises:
            StoreError: it cannot be written there.
        """
        return write_beside(self.store, "verify", self.as_json())


def beside(store: str | Path, what: str) -> Path:
    """``<store>.<what>.json``, never in the store itself: ``.`` may be its name."""
    return Path(f"{os.path.abspath(local_path(store, 'a report beside it'))}.{what}.json")


def report_path(store: str | Path) -> Path:
    return beside(store, "verify")


def write_beside(store: str | Path, what: str, content: Mapping[str, Any]) -> Path:
    """Write a JSON file beside a store.

    Raises:
        StoreError: it cannot be written there.
    """
    path = beside(store, what)
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error
    return path


def fresh_report(store: str | Path) -> VerifyReport | None:
    """The report beside a store, if no file of the store has changed since."""
    try:
        found = json.loads(report_path(store).read_text(encoding="utf-8"))
        report = VerifyReport(
            str(store),
            found["fingerprint"],
            [Problem(**problem) for problem in found["problems"]],
            found["files"],
            found["bytes"],
            found["seconds"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if report.fingerprint == fingerprint(Path(store)) else None


def fingerprint(root: Path) -> str:
    """SHA-256 over name, length, inode and times of every file of a store, also behind links."""
    hashed, walked = hashlib.sha256(), set[str]()
    for directory, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        real = os.path.realpath(directory)
        if real in walked:  # a link to a folder that it lies in
            folders.clear()
            continue
        walked.add(real)
        for name in sorted(names):
            if name.endswith(TEMPORARY):
                continue
            file = os.path.join(directory, name)
            facts = _facts(file)
            if facts is None:  # gone since it was listed
                continue
            text = (
                f"{os.path.relpath(file, root)}\0{facts.st_size}\0{facts.st_ino}\0"
                f"{facts.st_mtime_ns}\0{facts.st_ctime_ns}\n"
            )
            hashed.update(text.encode("utf-8", "surrogateescape"))
    return hashed.hexdigest()


def _facts(file: str) -> os.stat_result | None:
    """Of what a link points to, or of the link where that is not there."""
    for stat in (os.stat, os.lstat):
        with contextlib.suppress(OSError):
            return stat(file)
    return None
