"""JSON documents that carry their own hash, and what tells two of them apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import StoreError

Json = Any  # what json.loads gives: dict, list, str, int, float, bool, None


def canonical(value: Json) -> bytes:
    """The bytes that are hashed: sorted keys, no spaces, ASCII escapes, no NaN.

    Raises:
        StoreError: what JSON cannot hold.
    """
    try:
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreError(
            f"a description of samples, views or a teacher cannot be written as JSON: {error}"
        ) from None
    return text.encode("ascii")


def digest(value: Json) -> str:
    """SHA-256 (hex) of the canonical bytes of a JSON value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def sealed(body: Mapping[str, Json]) -> bytes:
    """A JSON document with the hash of its other members under ``sha256``, as file bytes."""
    document = {**body, "sha256": digest(dict(body))}
    return (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def unsealed(raw: bytes, where: str) -> dict[str, Json]:
    """The members of a document written by :func:`sealed`.

    Raises:
        StoreError: when the bytes are not such a document or its hash differs.
    """
    try:
        document = json.loads(raw)
        stated = document.pop("sha256")
        whole = digest(document) == stated
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, StoreError):
        raise StoreError(
            f"{where} is damaged (not a sealed JSON document): run `preceptor verify`"
        ) from None
    if not whole:
        raise StoreError(f"{where} is damaged (its SHA-256 differs): run `preceptor verify`")
    return dict(document)


def member(entry: Json, name: str, kind: type) -> Any:
    """A member of a JSON object that must be of some kind.

    Raises:
        KeyError: it is not there.
        ValueError: the object is none, or the member is of another kind.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{entry!r} is no object with a member {name!r}")
    value = entry[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {value!r}")
    return value


def only(entry: Mapping[str, Json], names: Iterable[str]) -> None:
    """Refuse members that are not known.

    Raises:
        ValueError: there is such a member.
    """
    if unknown := sorted(entry.keys() - set(names)):
        raise ValueError(f"{unknown[0]} is no member that is known here")


def sides(value: Json, what: str) -> tuple[int, int]:
    """Two positive integers: height and width.

    Raises:
        ValueError: it is something else.
    """
    good = isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value)
    if not good or min(value) < 1:
        raise ValueError(f"{what} is {value!r}")
    return value[0], value[1]


def difference(theirs: Json, ours: Json, path: str = "") -> str | None:
    """The first place where two JSON values differ, both sides named; None when equal. Numbers are
    compared by value: 1 is 1.0. Hashes come last, for what they are of tells more."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in sorted({*theirs, *ours}, key=lambda key: (key == "sha256", key)):
            here = f"{path}.{key}" if path else key
            if key not in theirs or key not in ours:
                side = "the store" if key in theirs else "this configuration"
                return f"only {side} has {here}"
            if found := difference(theirs[key], ours[key], here):
                return found
        return None
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for index, (left, right) in enumerate(zip(theirs, ours, strict=True)):
            label = left.get("name", index) if isinstance(left, Mapping) else index
            if found := difference(left, right, f"{path}[{label}]"):
                return found
        return None
    kinds = {type(theirs), type(ours)}
    if theirs == ours and (len(kinds) == 1 or kinds == {int, float}):
        return None
    if (left := _names(theirs)) and (right := _names(ours)) and {*left} != {*right}:
        return _only(path, left, right)
    return f"{path} is {_short(theirs)} in the store and {_short(ours)} in this configuration"


def _names(value: Json) -> list[str]:
    """The names of a list of mappings; none of anything else."""
    if not isinstance(value, list):
        return []
    names = [one.get("name") for one in value if isinstance(one, Mapping)]
    found = [name for name in names if isinstance(name, str)]
    return found if len(found) == len(value) else []


def _only(path: str, theirs: list[str], ours: list[str]) -> str:
    """What one of two lists of names has and the other has not, three of each at most."""
    told = []
    for side, mine, others in (("the store", theirs, ours), ("this configuration", ours, theirs)):
        known = set(others)
        names = [f"{path}[{name}]" for name in mine if name not in known]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        if names:
            told.append(f"only {side} has {', '.join(names[:3])}{more}")
    return ", ".join(told)


def _short(value: Json) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
