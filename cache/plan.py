"""What a store is made of, before any row is written: its teachers, spaces, pixels and rows."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from ..errors import StoreError
from .documents import Json, canonical, difference, member, only, sides
from .encodings import Encoding, encoding
from .encodings.compact import STEP
from .views import INTERPOLATIONS

ROWS = "rows"  # the unit that holds the facts about rows
PIXELS = "pixels"  # the unit that holds the pixels of the views, where a store has them
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


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
        step: where the encoding has one, as a part of a token's root mean square: a multiple of
            1/128 below 1. It is stated in the manifest, so that a store is continued and repaired
            with its own. None: none is stated and it is 1/8, as in all stores of versions 1 and 2.
    """

    teacher: str
    name: str
    tokens: int
    dim: int
    grid: tuple[int, int] | None
    encoding: str = "int8"
    plain: bool = False
    step: float | None = STEP

    def __post_init__(self) -> None:
        _checked_name(self.teacher, "teacher")
        _checked_name(self.name, "space")
        if self.step is not None and not _is_step(self.step):
            raise StoreError(
                f"space {self.id}: step must be a multiple of 1/128 between 0 and 1, not "
                f"{self.step!r}"
            )
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

    @property
    def how(self) -> Encoding:
        """The encoding, with the step of this space."""
        return encoding(self.encoding).with_step(self.step)

    @property
    def states_step(self) -> bool:
        """Whether its entry in the manifest has a ``step``."""
        return encoding(self.encoding).step is not None and self.step is not None

    @property
    def version(self) -> int:
        """The first version of the format that has such a space."""
        if self.states_step:
            return 3
        return 2 if self.predicted else 1

    def formed_as(self, other: SpaceSpec) -> SpaceSpec:
        """The same in the form that another of its encoding has: predicted or not, and its step.

        To encode, one form is as good as another; a store that was begun keeps the one it has.
        """
        if other.encoding != self.encoding:
            return self
        return replace(self, plain=other.plain, step=other.step)

    def as_json(self) -> Json:
        """The space's entry in the manifest, without its calibration."""
        grid = None if self.grid is None else list(self.grid)
        return {
            "name": self.name,
            "tokens": self.tokens,
            "dim": self.dim,
            "grid": grid,
            "encoding": self.encoding,
            **({"predicted": True} if self.predicted else {}),
            **({"step": self.step} if self.states_step else {}),
        }

    @classmethod
    def from_json(cls, teacher: str, entry: Mapping[str, Json]) -> SpaceSpec:
        """The inverse of :meth:`as_json`.

        Raises:
            KeyError, TypeError, ValueError, StoreError: members that are missing or cannot be.
        """
        name, coding = member(entry, "name", str), member(entry, "encoding", str)
        only(
            entry, ("name", "tokens", "dim", "grid", "encoding", "predicted", "step", "calibration")
        )
        grid = None if entry["grid"] is None else sides(entry["grid"], "grid")
        predicted = "predicted" in entry
        if predicted and not (entry["predicted"] is True and encoding(coding).predicts):
            raise ValueError(
                f"predicted is {entry['predicted']!r} in a space of the encoding {coding}"
            )
        plain = encoding(coding).predicts and not predicted
        steps = encoding(coding).step is not None
        if "step" in entry and not (steps and _is_step(entry["step"])):
            raise ValueError(f"step is {entry['step']!r} in a space of the encoding {coding}")
        step = entry.get("step") if steps else STEP
        tokens, dim = member(entry, "tokens", int), member(entry, "dim", int)
        return cls(teacher, name, tokens, dim, grid, coding, plain, step)


def _is_step(value: Json) -> bool:
    return isinstance(value, float) and 0 < value < 1 and (value * 128).is_integer()


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

    def formed_as(self, other: TeacherRecord, kept: Collection[str] = ()) -> TeacherRecord:
        """The same with its spaces in the forms that another record has of them.

        Args:
            kept: ids of spaces that keep their own form.
        """
        forms = {space.name: space for space in other.spaces}
        spaces = (
            space if space.id in kept else space.formed_as(forms.get(space.name, space))
            for space in self.spaces
        )
        return replace(self, spaces=tuple(spaces))

    def as_json(self) -> Json:
        """The teacher's entry in the manifest, without calibrations."""
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
        if self.interpolation not in INTERPOLATIONS:
            raise StoreError(
                f"pixels: there is no interpolation {self.interpolation!r}: choose among "
                f"{', '.join(INTERPOLATIONS)}"
            )

    def as_json(self) -> Json:
        """The manifest's member ``pixels``."""
        return {"size": list(self.size), "interpolation": self.interpolation}

    @classmethod
    def from_json(cls, entry: Json) -> PixelSpec:
        """The inverse of :meth:`as_json`.

        Raises:
            KeyError, ValueError, StoreError: members that are missing or cannot be.
        """
        interpolation = member(entry, "interpolation", str)
        only(entry, ("size", "interpolation"))
        return cls(sides(entry["size"], "size"), interpolation)


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
        if self.key_bytes < 1:
            raise StoreError(f"a key needs room: key_bytes is {self.key_bytes}")
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
    def views_a_sample(self) -> int:
        """V: row r is view r mod V of sample r // V."""
        return int(self.views.get("count", 1))

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
        return max((space.version for space in self.spaces.values()), default=1)

    def spaces_of(self, unit: str) -> tuple[SpaceSpec, ...]:
        """The spaces of a unit: none unless it is a teacher."""
        if unit == ROWS or (unit == PIXELS and self.pixels is not None):
            return ()
        return self.teacher(unit).spaces

    def rows_of(self, shard: int) -> range:
        """The row numbers of one shard."""
        first = shard * self.shard_rows
        return range(first, first + self.rows_in(shard))

    def rows_in(self, shard: int) -> int:
        """Rows of one shard."""
        return min(self.shard_rows, self.rows - shard * self.shard_rows)

    def teacher(self, name: str) -> TeacherRecord:
        """The teacher of that name.

        Raises:
            StoreError: there is none; the message lists those that there are.
        """
        for teacher in self.teachers:
            if teacher.name == name:
                return teacher
        known = ", ".join(teacher.name for teacher in self.teachers)
        raise StoreError(f"the store has no teacher {name!r}: it has {known}")

    @property
    def converted(self) -> list[str]:
        """The teachers of which `preceptor convert` has made the codes."""
        return [teacher.name for teacher in self.teachers if "converted" in teacher.identity]

    def only(self, units: Collection[str]) -> StorePlan:
        """The plan of these units alone, which ``rows`` is one of, with its teachers in the order
        in which they are given."""
        named = {teacher.name: teacher for teacher in self.teachers}
        return replace(
            self,
            teachers=tuple(named[unit] for unit in units if unit in named),
            pixels=self.pixels if PIXELS in units else None,
        )

    def begun_by(self, units: Collection[str]) -> str:
        """The commands of which one has begun these units, where they are not finished."""
        if self.converted:
            return "`preceptor convert`, or the `preceptor add`,"
        return "`preceptor extract`" + ("" if ROWS in units else " or `preceptor add`")

    def rows_json(self) -> Json:
        """What the configuration of the unit ``rows`` is made of, beside format and version."""
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


def plan_difference(store: StorePlan, ours: StorePlan, kept: Collection[str] = ()) -> str | None:
    """The first difference between the plan of a store and another plan, in words.

    The forms of spaces (``SpaceSpec.formed_as``) are the store's affair and no difference, but for
    the spaces in ``kept``.
    """
    theirs = {teacher.name: teacher for teacher in store.teachers}
    formed = (one.formed_as(theirs.get(one.name, one), kept) for one in ours.teachers)

    def whole(plan: StorePlan) -> Json:
        teachers = [teacher.as_json() for teacher in plan.teachers]
        return {**plan.rows_json(), **plan.pixels_json(), "teachers": teachers}

    left, right = whole(store), whole(replace(ours, teachers=tuple(formed)))
    following = {"rows", "key_bytes"}  # from samples and views
    causes = [{key: side[key] for key in side if key not in following} for side in (left, right)]
    found = difference(causes[0], causes[1]) or difference(left, right)
    if found is not None and found.startswith("samples.sha256 is"):
        found += " (as many images, of other names, sizes or labels, or in another order)"
    return found
