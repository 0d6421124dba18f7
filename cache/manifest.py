"""manifest.json: the plan of a store, its frozen calibrations, and the hashes of both.

Every identity is hashed, so a store can be continued only by the configuration that began it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import StoreError
from .documents import Json, digest, sealed, unsealed
from .plan import PIXELS, ROWS, PixelSpec, SpaceSpec, StorePlan, TeacherRecord

FORMAT = "preceptor-cache"
VERSIONS = (1, 2)  # that this program reads; a store states the least that it needs
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
