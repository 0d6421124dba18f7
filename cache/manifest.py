"""What a store is made of and made from: the plan, its hashes, and manifest.json.

Every identity is hashed, so a store can be continued only by the configuration that began it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import StoreError
from .encodings import encoding

Json = Any  # what json.loads gives: dict, list, str, int, float, bool, None

FORMAT = "preceptor-cache"
VERSIONS = (1, 2)  # that this program reads; a store states the least that it needs
MANIFEST = "manifest.json"
ROWS = "rows"  # the unit that holds the facts about rows
PIXELS = "pixels"  # the unit that holds the pixels of the views, where a store has them
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


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
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise StoreError(
            f"{where} is damaged (not a sealed JSON document): run `preceptor verify`"
        ) from None
    if not whole:
        raise StoreError(f"{where} is damaged (its SHA-256 differs): run `preceptor verify`")
    return dict(document)


def _checked_name(name: str, what: str) -> None:
    if not _NAME.fullmatch(name) or name == ROWS:
        raise StoreError(
            f"{name!r} cannot name a {what}: use up to 64 letters, digits, '_', '-' and '.', "
            f"beginning with a letter or digit (and not {ROWS!r})"
        )


@dataclass(frozen=True)
class SpaceSpec:
    """One representation of one teacher.

    Attributes:
        teacher: name of the teacher.
        name: name of the space within the teacher.
        tokens: number of tokens N a row.
        dim: number of dimensions D a token.
        grid: (height, width) of the token grid, row-major; None for a global descriptor (N = 1).
        encoding: name of the encoding (see ``cache.encodings``).
        plain: codes are stored without a prediction though the encoding has one, as all stores of
            version 1 do.
    """

    teacher: str
    name: str
    tokens: int
    dim: int
    grid: tuple[int, int] | None
    encoding: str = "int8"
    plain: bool = False

    def __post_init__(self) -> None:
        _checked_name(self.teacher, "teacher")
        _checked_name(self.name, "space")
        if self.tokens < 1 or self.dim < 1:
            raise StoreError(
                f"space {self.id}: tokens and dim must be at least 1, not {self.tokens}, {self.dim}"
            )
        expected = 1 if self.grid is None else self.grid[0] * self.grid[1]
        if expected != self.tokens:
            raise StoreError(
                f"space {self.id}: a grid {self.grid} does not hold {self.tokens} tokens"
            )

    @property
    def id(self) -> str:
        """``teacher/space``."""
        return f"{self.teacher}/{self.name}"

    @property
    def predicted(self) -> bool:
        """Whether its codes are stored as what a prediction leaves."""
        return encoding(self.encoding).predicts and not self.plain

    def as_json(self) -> Json:
        grid = None if self.grid is None else list(self.grid)
        return {
            "name": self.name,
            "tokens": self.tokens,
            "dim": self.dim,
            "grid": grid,
            "encoding": self.encoding,
            **({"predicted": True} if self.predicted else {}),
        }

    @classmethod
    def from_json(cls, teacher: str, entry: Mapping[str, Json]) -> SpaceSpec:
        """The inverse of :meth:`as_json`.

        Raises:
            KeyError, TypeError, ValueError: members that are missing or cannot be.
        """
        grid = None if entry["grid"] is None else (entry["grid"][0], entry["grid"][1])
        name, predicted = entry["encoding"], entry.get("predicted", False)
        if predicted not in (True, False) or (predicted and not encoding(name).predicts):
            raise ValueError(f"predicted is {predicted!r} in a space of the encoding {name}")
        plain = encoding(name).predicts and not predicted
        return cls(teacher, entry["name"], entry["tokens"], entry["dim"], grid, name, plain)


@dataclass(frozen=True)
class TeacherRecord:
    """A teacher, its spaces and what makes it that teacher.

    Attributes:
        identity: JSON: source, SHA-256 of the weights, preprocessing, library versions.
    """

    name: str
    spaces: tuple[SpaceSpec, ...]
    identity: Mapping[str, Json]

    def __post_init__(self) -> None:
        _checked_name(self.name, "teacher")
        names = [space.name for space in self.spaces]
        if not names or len(set(names)) != len(names):
            raise StoreError(f"teacher {self.name}: needs at least one space and distinct names")
        if any(space.teacher != self.name for space in self.spaces):
            raise StoreError(f"teacher {self.name}: a space names another teacher")

    def as_json(self) -> Json:
        return {
            "name": self.name,
            "identity": json.loads(canonical(dict(self.identity))),
            "spaces": [space.as_json() for space in self.spaces],
        }


@dataclass(frozen=True)
class PixelSpec:
    """The pixels of every view, stored exactly at the size of a student.

    Attributes:
        size: (height, width).
        interpolation: how the view was resampled to it, a name of ``views.INTERPOLATIONS``.
    """

    size: tuple[int, int]
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise StoreError(f"pixels: a size of {self.size} pixels holds no image")

    def as_json(self) -> Json:
        return {"size": list(self.size), "interpolation": self.interpolation}


@dataclass(frozen=True)
class StorePlan:
    """All that determines a store, before any row is written.

    Attributes:
        samples: JSON description of the sample index (count, sha256, shards, order).
        views: JSON description of the view policy.
        rows: number of rows: samples times views.
        shard_rows: rows a shard; a multiple of ``group_rows``.
        group_rows: rows a group (the inner chunk).
        teachers: the teachers, in order.
        key_bytes: room for a row's key, UTF-8, NUL padded.
        pixels: the pixels that are stored beside the tokens; None: none.
    """

    samples: Mapping[str, Json]
    views: Mapping[str, Json]
    rows: int
    shard_rows: int
    group_rows: int
    teachers: tuple[TeacherRecord, ...]
    key_bytes: int = 128
    pixels: PixelSpec | None = None

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise StoreError("a store needs at least one row")
        if self.group_rows < 1 or self.shard_rows < 1 or self.shard_rows % self.group_rows:
            raise StoreError(
                f"shard_rows ({self.shard_rows}) must be a positive multiple of "
                f"group_rows ({self.group_rows})"
            )
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise StoreError(f"a teacher is named twice among {', '.join(names)}")
        if self.pixels is not None and PIXELS in names:
            raise StoreError(f"a store with pixels cannot have a teacher named {PIXELS!r}")

    @property
    def shards(self) -> int:
        """Number of shards; the last may be partial."""
        return -(-self.rows // self.shard_rows)

    @property
    def units(self) -> tuple[str, ...]:
        """``rows``, ``pixels`` where there are any, and every teacher: what is committed, added
        and dropped independently."""
        pixels = () if self.pixels is None else (PIXELS,)
        return (ROWS, *pixels, *(teacher.name for teacher in self.teachers))

    @property
    def spaces(self) -> dict[str, SpaceSpec]:
        return {space.id: space for teacher in self.teachers for space in teacher.spaces}

    @property
    def version(self) -> int:
        """The first version of the format whose readers can read the store."""
        return 2 if any(space.predicted for space in self.spaces.values()) else 1

    def spaces_of(self, unit: str) -> tuple[SpaceSpec, ...]:
        """The spaces of a unit: none unless it is a teacher."""
        if unit == ROWS or (unit == PIXELS and self.pixels is not None):
            return ()
        return self.teacher(unit).spaces

    def rows_in(self, shard: int) -> int:
        """Rows of one shard."""
        return min(self.shard_rows, self.rows - shard * self.shard_rows)

    def teacher(self, name: str) -> TeacherRecord:
        for teacher in self.teachers:
            if teacher.name == name:
                return teacher
        known = ", ".join(teacher.name for teacher in self.teachers)
        raise StoreError(f"the store has no teacher {name!r}: it has {known}")

    def rows_json(self) -> Json:
        return {
            "samples": json.loads(canonical(dict(self.samples))),
            "views": json.loads(canonical(dict(self.views))),
            "rows": self.rows,
            "shard_rows": self.shard_rows,
            "group_rows": self.group_rows,
            "key_bytes": self.key_bytes,
        }

    def pixels_json(self) -> Json:
        """The manifest's optional member."""
        return {} if self.pixels is None else {PIXELS: self.pixels.as_json()}


@dataclass(frozen=True)
class Calibration:
    """The frozen calibration of a space: how many rows it came from and its hash.

    ``sha256`` is over the little-endian bytes of mean, then of std, then of weights if there are.
    """

    rows: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A plan with the calibrations frozen so far: what manifest.json holds."""

    plan: StorePlan
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    writer: str = ""

    def calibrated(self, space_id: str, calibration: Calibration) -> Manifest:
        return replace(self, calibrations={**self.calibrations, space_id: calibration})

    def teacher_json(self, name: str) -> Json:
        teacher = self.plan.teacher(name)
        value = teacher.as_json()
        for space, member in zip(teacher.spaces, value["spaces"], strict=True):
            found = self.calibrations.get(space.id)
            member["calibration"] = found and {"rows": found.rows, "sha256": found.sha256}
        return value

    def configuration(self, unit: str) -> str:
        """SHA-256 of all that determines a unit's contents; commit records carry it."""
        # of every version alike: adding a teacher may raise the store's, and the rows stay
        rows = digest({"format": FORMAT, "version": VERSIONS[0], **self.plan.rows_json()})
        if unit == ROWS:
            return rows
        if unit == PIXELS and self.plan.pixels is not None:
            return digest({"rows": rows, **self.plan.pixels_json()})
        return digest({"rows": rows, "teacher": self.teacher_json(unit)})

    def to_bytes(self) -> bytes:
        return sealed(
            {
                "format": FORMAT,
                "version": self.plan.version,
                "writer": self.writer,
                **self.plan.rows_json(),
                **self.plan.pixels_json(),
                "teachers": [self.teacher_json(teacher.name) for teacher in self.plan.teachers],
            }
        )

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Manifest:
        """Parse manifest.json.

        Raises:
            StoreError: another format, a version this program does not know, or damage.
        """
        try:
            head = json.loads(raw)
            name, version = head["format"], head["version"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise StoreError(f"{where} is not the manifest of a {FORMAT} store") from None
        if name != FORMAT:
            raise StoreError(f"{where} states the format {name!r}, not {FORMAT!r}")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise StoreError(
                f"{where} has format version {version!r} and this program reads versions {known}: "
                "use the preceptor release that wrote it, or a newer one"
            )
        body = unsealed(raw, where)
        try:
            manifest = cls._from_json(body)
            if manifest.plan.version != version:
                raise ValueError(f"version is {version} and should be {manifest.plan.version}")
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{where} lacks or misstates a member: {error}") from None
        return manifest

    @classmethod
    def _from_json(cls, body: Mapping[str, Json]) -> Manifest:
        teachers, calibrations = [], {}
        for member in body["teachers"]:
            spaces = []
            for entry in member["spaces"]:
                space = SpaceSpec.from_json(member["name"], entry)
                spaces.append(space)
                if entry["calibration"] is not None:
                    found = entry["calibration"]
                    calibrations[space.id] = Calibration(found["rows"], found["sha256"])
            teachers.append(TeacherRecord(member["name"], tuple(spaces), member["identity"]))
        plan = StorePlan(
            samples=body["samples"],
            views=body["views"],
            rows=body["rows"],
            shard_rows=body["shard_rows"],
            group_rows=body["group_rows"],
            teachers=tuple(teachers),
            key_bytes=body["key_bytes"],
            pixels=_pixels(body.get(PIXELS)),
        )
        return cls(plan, calibrations, body["writer"])


def _pixels(member: Json) -> PixelSpec | None:
    if member is None:
        return None
    height, width = member["size"]
    return PixelSpec((int(height), int(width)), str(member["interpolation"]))


def difference(theirs: Json, ours: Json, path: str = "") -> str | None:
    """The first place where two JSON values differ, both sides named; None when equal."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in sorted({*theirs, *ours}):
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
    if type(theirs) is type(ours) and theirs == ours:
        return None
    return f"{path} is {_short(theirs)} in the store and {_short(ours)} in this configuration"


def _short(value: Json) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def plan_difference(store: StorePlan, ours: StorePlan) -> str | None:
    """The first difference between the plan of a store and another plan, in words."""

    def whole(plan: StorePlan) -> Json:
        teachers = [teacher.as_json() for teacher in plan.teachers]
        return {**plan.rows_json(), **plan.pixels_json(), "teachers": teachers}

    return difference(whole(store), whole(ours))


def read_manifest(path: Path) -> Manifest:
    """The manifest of a local store.

    Raises:
        StoreError: no store there, or a damaged or unknown manifest.
    """
    file = path / MANIFEST
    try:
        raw = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"{path} holds no store ({MANIFEST} is missing): run `preceptor extract` to make one"
        ) from None
    return Manifest.from_bytes(raw, str(file))


def space_ids(teachers: Sequence[TeacherRecord]) -> list[str]:
    return [space.id for teacher in teachers for space in teacher.spaces]
