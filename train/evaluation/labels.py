"""Where labels come from: the store's classes, fields of a JSON member, maps in a PNG member."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...cache import Cache
from ...cache.samples import MAX_PIXELS, SampleIndex, open_image
from ...errors import ConfigError, DataError
from .truths import Classes, Maps, Targets, Truth, ValueMaps

KINDS: dict[str, type[Truth]] = {
    "classification": Classes,
    "regression": Targets,
    "dense": Maps,
    "dense_regression": ValueMaps,
}
UNLABELLED = {"L": 255, "P": 255, "I;16": 65535}
"""By the mode of a map, the value of pixels without a label."""

_JSON_BYTES = 1 << 16
_MAP_BYTES = 1 << 24


@dataclass(frozen=True)
class Task:
    """What is to be read off the features of a store's images, and where its labels are.

    Sources of ``label``, beside the image ``KEY.jpg`` of a sample:

    - ``cls``: the class number that the store keeps (from ``KEY.cls``);
    - ``json:FIELD``: a number in ``KEY.json``, ``{"FIELD": 3, ...}``; a list of such names gives
      several regression targets. An absent or null field is no label;
    - ``NAME.png``: the class numbers of pixels in ``KEY.NAME.png``, 8 bits (grey or palette; 255 is
      no label) or 16 bits grey (65535 is none), of the image's own framing at any resolution. It is
      cut and mirrored as the image was, without interpolation. For ``dense_regression`` they are
      numbers, 8 or 16 bits grey, all of them values but `unknown`.

    Attributes:
        name: for people; ``class`` is left out of the names of scores.
        kind: ``classification``, ``regression``, ``dense`` or ``dense_regression``.
        label: see above.
        size: side in pixels of the maps of a dense task.
        unknown: of ``dense_regression``, the number in a map that stands for no value, such as 0 in
            maps of depth; None where all are values.

    Raises:
        ConfigError: an unknown kind, or a source that does not suit it.
    """

    name: str
    kind: str
    label: str | Sequence[str]
    size: int = 56
    unknown: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            close = difflib.get_close_matches(str(self.kind), KINDS, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(
                f"tasks.{self.name}.kind={self.kind}{hint}: valid are {', '.join(KINDS)}"
            )
        suits = {
            "classification": self.label == "cls" or (self._is_json and len(self.fields) == 1),
            "regression": self._is_json and bool(self.fields),
            "dense": self._is_map,
            "dense_regression": self._is_map,
        }
        if not suits[self.kind]:
            expected = {
                "classification": "cls or json:FIELD",
                "regression": "json:FIELD or a list of such",
                "dense": "the ending of a PNG member, such as mask.png",
                "dense_regression": "the ending of a PNG member, such as depth.png",
            }
            raise ConfigError(
                f"tasks.{self.name}.label={self.label}: a {self.kind} task takes "
                f"{expected[self.kind]}"
            )
        if not isinstance(self.size, int) or self.size < 1:
            raise ConfigError(
                f"tasks.{self.name}.size={self.size}: expected a positive whole number"
            )
        if self.unknown is not None and self.kind != "dense_regression":
            raise ConfigError(
                f"tasks.{self.name}.unknown={self.unknown}: only a dense_regression task has it"
            )
        if not isinstance(self.unknown, int | None):
            raise ConfigError(
                f"tasks.{self.name}.unknown={self.unknown!r}: expected a whole number, as maps hold"
            )

    @classmethod
    def parse(cls, name: str, options: Any) -> Task:
        """A task from a configuration: keys ``kind``, ``label`` and optionally ``size`` and
        ``unknown``.

        Raises:
            ConfigError: a key is missing or unknown, or as for `Task`.
        """
        if not isinstance(options, Mapping) or not {"kind", "label"} <= set(options):
            raise ConfigError(f"tasks.{name}={options}: give it a kind and a label")
        if unknown := set(options) - {"kind", "label", "size", "unknown"}:
            raise ConfigError(
                f"tasks.{name} has no option {', '.join(map(str, sorted(unknown)))}: valid are "
                "kind, label, size, unknown"
            )
        return cls(name, **options)

    @property
    def truth(self) -> type[Truth]:
        """What protocols are given."""
        return KINDS[self.kind]

    @property
    def member(self) -> str | None:
        """The kind of the tar member that holds the labels; None for the store's own."""
        if self.label == "cls":
            return None
        return "json" if self._is_json else str(self.label).lower()

    @property
    def fields(self) -> list[str]:
        """Names of the JSON fields."""
        return [str(label).removeprefix("json:") for label in self._labels]

    @property
    def _labels(self) -> list[str]:
        several = isinstance(self.label, Sequence) and not isinstance(self.label, str)
        return list(self.label) if several else [str(self.label)]

    @property
    def _is_map(self) -> bool:
        return isinstance(self.label, str) and self.label.endswith(".png")

    @property
    def _is_json(self) -> bool:
        return all(
            str(label).startswith("json:") and str(label) != "json:" for label in self._labels
        )

    def read(
        self,
        cache: Cache,
        index: SampleIndex,
        rows: NDArray[np.int64],
        samples: NDArray[np.int64],
        max_pixels: int = MAX_PIXELS,
    ) -> NDArray[Any]:
        """The labels of rows, in the form and with the marks that `Truth`'s kinds describe.

        Args:
            index: listed with `member`.
            samples: int64 [n], the position of each row's image in the index.
            max_pixels: a larger map is refused.

        Raises:
            DataError: a member is damaged or holds something else; names the sample.
        """
        if self.label == "cls":
            return np.asarray(cache.labels, dtype=np.int64)[rows]
        if self._is_map:

            def shown(place: int) -> NDArray[Any]:
                return self._map(cache, index, int(rows[place]), int(samples[place]), max_pixels)

            return np.stack(list(index.each(shown, range(len(rows)))))

        def values(sample: int) -> list[float]:
            return [self._number(index, sample, field) for field in self.fields]

        numbers = np.array(list(index.each(values, samples)))
        if self.kind == "regression":
            return numbers
        return self._classes(index, samples, numbers[:, 0])

    def _number(self, index: SampleIndex, sample: int, field: str) -> float:
        raw = index.member(sample, "json", _JSON_BYTES)
        if raw is None:
            return math.nan
        where = f"member .json of sample {index.where(sample)}"
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is no JSON: {error}") from error
        if not isinstance(found, Mapping):
            raise DataError(f"{where} is no JSON object with the field {field!r}")
        value = found.get(field)
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            raise DataError(f"{where}: the field {field!r} is {value!r}, not a number")
        return float(value)

    def _classes(
        self, index: SampleIndex, samples: NDArray[np.int64], numbers: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        known = np.isfinite(numbers)
        whole = (numbers >= 0) & (numbers == np.floor(numbers)) & (numbers < 2**31)
        for place in np.flatnonzero(known & ~whole)[:1]:
            raise DataError(
                f"member .json of sample {index.where(int(samples[place]))}: the field "
                f"{self.fields[0]!r} is {numbers[place]}, not a class number from 0 up"
            )
        return np.where(known, numbers, -1).astype(np.int64)

    def _map(
        self, cache: Cache, index: SampleIndex, row: int, sample: int, max_pixels: int
    ) -> NDArray[Any]:
        raw, numbers = index.member(sample, str(self.member), _MAP_BYTES), self.kind != "dense"
        if raw is None:
            shape = (self.size, self.size)
            return np.full(shape, math.nan) if numbers else np.full(shape, -1, dtype=np.int64)
        where = f"member .{self.member} of sample {index.where(sample)}"
        image = _decode(raw, where, max_pixels)
        if numbers and image.mode == "P":
            raise DataError(f"{where} has a palette: numbers are 8 or 16 bits grey")
        height, width = (float(edge) for edge in cache.sizes[row])
        scale = np.array([image.width / width, image.height / height] * 2)
        left, top, right, bottom = (float(edge) for edge in cache.boxes[row] * scale)
        box = (left, top, min(right, image.width), min(bottom, image.height))
        # Not by Pillow's resize: it refuses boxes of some modes, and nearest needs no filter.
        columns = _nearest(box[0], box[2], self.size, image.width)
        lines = _nearest(box[1], box[3], self.size, image.height)
        found: NDArray[Any] = np.asarray(image).astype(np.int64)[lines][:, columns]
        if numbers:
            found = found.astype(np.float64)
            if self.unknown is not None:
                found[found == self.unknown] = math.nan
        else:
            found = np.where(found == UNLABELLED[image.mode], -1, found)
        return found[:, ::-1].copy() if cache.flips[row] else found


def check_same_classes(train: SampleIndex, test: SampleIndex) -> None:
    """Refuse two folders of class folders that number a class differently.

    Classes are numbered in the order of their folders' names, so a class that one side lacks moves
    the numbers of those after it.

    Raises:
        ConfigError: names a number, and its class on both sides.
    """
    ours, theirs = _class_folders(train), _class_folders(test)
    for number in sorted(ours.keys() & theirs.keys()):
        if ours[number] != theirs[number]:
            raise ConfigError(
                f"class {number} is the folder {ours[number]!r} in train.shards and "
                f"{theirs[number]!r} in test.shards: classes are numbered in the order of their "
                "folders' names, so give both the same class folders (those of the test images may "
                "end earlier), or shards with class numbers of your own"
            )


def _class_folders(index: SampleIndex) -> dict[int, str]:
    """Class numbers to the names of their folders; empty for shards."""
    if index.order["kind"] != "folder":
        return {}
    found: dict[int, str] = {}
    for key, label in zip(index.keys, index.labels.tolist(), strict=True):
        if label >= 0:
            found.setdefault(label, key.split("/")[0])
    return found


def _decode(raw: bytes, where: str, max_pixels: int) -> Image.Image:
    try:
        image = open_image(raw, ["PNG"], max_pixels)
        if image.width * image.height > max_pixels:
            raise DataError(
                f"{where} is {image.width} x {image.height}, more than {max_pixels:,} pixels"
            )
        if image.mode not in UNLABELLED:
            raise DataError(
                f"{where} has the mode {image.mode}: class numbers are 8 bits grey or palette, or "
                "16 bits grey"
            )
        image.load()
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders of damaged bytes raise anything at all
        raise DataError(f"{where} cannot be decoded: {error}") from error
    return image


def _nearest(low: float, high: float, count: int, edge: int) -> NDArray[np.int64]:
    centres = low + (np.arange(count) + 0.5) * (high - low) / count
    return np.clip(np.floor(centres), 0, edge - 1).astype(np.int64)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False
