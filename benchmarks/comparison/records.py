"""Finished runs in one file, which outlives the folders that they were made in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...cache.durable import write_whole
from ...errors import ConfigError
from .judge import DIGITS
from .options import trained_with
from .plan import Plan
from .runs import RESULT, belongs, finished

Record = Mapping[str, Any]
"""What a run has left, and ``options``, by dotted name what it was trained with."""


def identity(record: Record) -> tuple[str, str, int]:
    """Student, variant and seed."""
    return record["student"], record["variant"], record["seed"]


def read(plan: Plan, kept: Path | None) -> dict[tuple[str, str, int], Record]:
    """The runs of a file, by identity; none without a file.

    Raises:
        ConfigError: one is none of this plan (`belongs`), or a line of the file is no run.
    """
    found: dict[tuple[str, str, int], Record] = {}
    if kept is None or not kept.exists():
        return found
    for number, line in enumerate(kept.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{kept}, line {number}"
        try:
            record = json.loads(line)
            found[identity(record)] = record
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{where} is no finished run of a comparison") from None
        belongs(plan, record, where)
    return found


def gather(plan: Plan, kept: Path | None = None) -> list[Record]:
    """All finished runs of a plan: those of its folder, and of a file those that it lacks.

    Raises:
        ConfigError: as `read`; or a run of the folder is none of this plan.
    """
    found = read(plan, kept)
    for path in sorted(plan.out.glob(f"*/*/s*/{RESULT}")):
        result = finished(plan, path.parent)
        found[identity(result)] = {**result, "options": trained_with(path.parent)}
    return sorted(found.values(), key=identity)


def keep(path: Path, records: Iterable[Record]) -> None:
    """Write a file that `gather` reads: a line a run, JSON."""
    lines = [json.dumps(_rounded(record), separators=(",", ":")) for record in records]
    write_whole(path, "".join(line + "\n" for line in lines).encode())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, Mapping):
        return {key: _rounded(own) for key, own in value.items()}
    return [_rounded(own) for own in value] if isinstance(value, list) else value
