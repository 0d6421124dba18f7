"""manifest.json: the plan of a store, its frozen calibrations, and the hashes of both.

Every identity is hashed, so a store can be continued only by the configuration that began it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import StoreError
from .documents import Json, digest, member, only, sealed, unsealed
from .durable import read_whole
from .plan import PIXELS, ROWS, PixelSpec, SpaceSpec, StorePlan, TeacherRecord

FORMAT = "preceptor-cache"
VERSIONS = (1, 2, 3)  # that this program reads; a store states the least that it needs
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Calibration:
    """The frozen calibration of a space: how many rows it came from and its hash.

    ``sha256`` is over the little-endian bytes of mean, then of std, then of weights if there are.
    """

    rows: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A plan with the calibrations frozen so far: what manifest.json holds.

    Attributes:
        calibrations: by space id.
        writer: the program that made the store.
        others: members that this version does not know, which it leaves as they are.
    """

    plan: StorePlan
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    writer: str = ""
    others: Mapping[str, Json] = field(default_factory=dict)
    _configurations: dict[str, str] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )  # by unit, as they were asked for; not of a changed copy

    def calibrated(self, space_id: str, calibration: Calibration) -> Manifest:
        return replace(self, calibrations={**self.calibrations, space_id: calibration})

    def teacher_json(self, name: str) -> Json:
        teacher = self.plan.teacher(name)
        value = teacher.as_json()
        for space, entry in zip(teacher.spaces, value["spaces"], strict=True):
            found = self.calibrations.get(space.id)
            entry["calibration"] = found and {"rows": found.rows, "sha256": found.sha256}
        return value

    def configuration(self, unit: str) -> str:
        """SHA-256 of all that determines a unit's contents; commit records carry it."""
        if unit not in self._configurations:
            self._configurations[unit] = digest(self._configured(unit))
        return self._configurations[unit]

    def _configured(self, unit: str) -> Json:
        if unit == ROWS:
            # of every version alike: adding a teacher may raise the store's, and the rows stay
            return {"format": FORMAT, "version": VERSIONS[0], **self.plan.rows_json()}
        rows = self.configuration(ROWS)
        if unit == PIXELS and self.plan.pixels is not None:
            return {"rows": rows, **self.plan.pixels_json()}
        return {"rows": rows, "teacher": self.teacher_json(unit)}

    def to_bytes(self) -> bytes:
        return sealed(
            {
                **self.others,
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
        if type(version) is not int or version not in VERSIONS:
            raise StoreError(
                f"{where} has format version {version!r} and this program reads versions "
                f"{VERSIONS[0]} to {VERSIONS[-1]}: use the preceptor release that wrote it, or a "
                "newer one"
            )
        body = unsealed(raw, where)
        try:
            manifest = cls._from_json(body)
            if manifest.plan.version != version:
                raise ValueError(f"version is {version} and should be {manifest.plan.version}")
        except (KeyError, TypeError, ValueError, StoreError) as error:
            raise StoreError(f"{where} lacks or misstates a member: {error}") from None
        return manifest

    @classmethod
    def _from_json(cls, body: Mapping[str, Json]) -> Manifest:
        teachers: list[TeacherRecord] = []
        calibrations: dict[str, Calibration] = {}
        for entry in member(body, "teachers", list):
            name, spaces = member(entry, "name", str), list[SpaceSpec]()
            only(entry, ("name", "identity", "spaces"))
            for described in member(entry, "spaces", list):
                space = SpaceSpec.from_json(name, described)
                spaces.append(space)
                if described["calibration"] is not None:
                    calibrations[space.id] = _calibration(described["calibration"])
            teachers.append(TeacherRecord(name, tuple(spaces), member(entry, "identity", dict)))
        plan = StorePlan(
            samples=member(body, "samples", dict),
            views=member(body, "views", dict),
            rows=member(body, "rows", int),
            shard_rows=member(body, "shard_rows", int),
            group_rows=member(body, "group_rows", int),
            teachers=tuple(teachers),
            key_bytes=member(body, "key_bytes", int),
            pixels=PixelSpec.from_json(body[PIXELS]) if PIXELS in body else None,
        )
        known = {"format", "version", "writer", "teachers", PIXELS, *plan.rows_json()}
        others = {name: value for name, value in body.items() if name not in known}
        return cls(plan, calibrations, member(body, "writer", str), others)


def _calibration(entry: Json) -> Calibration:
    found = Calibration(member(entry, "rows", int), member(entry, "sha256", str))
    only(entry, ("rows", "sha256"))
    return found


def read_manifest(path: Path) -> Manifest:
    """The manifest of a local store.

    Raises:
        StoreError: no store there, or a damaged or unknown manifest.
    """
    file = path / MANIFEST
    try:
        raw = read_whole(file)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"{path} holds no store ({MANIFEST} is missing): run `preceptor extract` to make one"
        ) from None
    return Manifest.from_bytes(raw, str(file))
