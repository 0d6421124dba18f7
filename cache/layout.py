"""Where things lie in a store, and the bytes of its Zarr v3 arrays.

The normative description is cache_format.md; names here are the Zarr specification's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import StoreError
from .documents import Json
from .encodings import encoding
from .manifest import FORMAT
from .plan import PIXELS, ROWS, SpaceSpec, StorePlan
from .zstd_frames import content_length

INDEX_ENTRY = 16  # offset and length, two little-endian uint64
CRC = 4
ZSTD_LEVEL = 3
_PANEL = 256
# Of residuals: they hold no repetitions, and those that a higher level finds make them larger.
ZSTD_LEVEL_PREDICTED = 1

# The inner codecs of a chunk by name; crc32c comes last in all.
CODECS: dict[str, tuple[str, ...]] = {
    "raw": ("bytes",),
    "zstd": ("bytes", "zstd"),
    "channel-zstd": ("transpose", "bytes", "zstd"),
}


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array of a store.

    Attributes:
        path: its node path, ``spaces/dinov2_b/patch/codes``.
        dtype: NumPy name; the bytes are little-endian.
        shape: of the whole array.
        shard: shape of one stored file's chunk.
        group: shape of the inner chunk; None where the file holds one plain chunk.
        fill: fill value.
        codec: key of CODECS.
        attributes: Zarr attributes.
        level: of Zstandard, where the codec has it.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    shard: tuple[int, ...]
    group: tuple[int, ...] | None
    fill: float | int
    codec: str = "raw"
    attributes: Mapping[str, Json] = field(default_factory=dict)
    level: int = ZSTD_LEVEL

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of what one checksum covers: the inner chunk, or the whole plain chunk."""
        return self.group or self.shard

    @cached_property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * math.prod(self.shape[1:]))

    @property
    def chunk_bytes(self) -> int:
        """Decoded bytes of one chunk."""
        return self.row_bytes * self.chunk[0]

    @property
    def chunks_a_shard(self) -> int:
        return self.shard[0] // self.chunk[0]

    @property
    def index_bytes(self) -> int:
        """Bytes of the shard index at a file's end, its checksum included; 0 for a plain chunk."""
        return 0 if self.group is None else self.chunks_a_shard * INDEX_ENTRY + CRC

    @property
    def fixed_size(self) -> bool:
        """Whether stored chunks have one length: nothing is compressed."""
        return self.codec == "raw"

    def file(self, shard: int) -> str:
        """Path of a shard's file within the store."""
        return f"{self.path}/c.{shard}" + ".0" * (len(self.shape) - 1)

    def filled(self, values: np.ndarray) -> np.ndarray:
        """Where values of the array, of any shape, are the fill value: bool of that shape."""
        return np.isnan(values) if isinstance(self.fill, float) else values == self.fill

    def metadata(self) -> Json:
        """The array's zarr.json."""
        chain = [*self._codecs(), {"name": "crc32c"}]
        if self.group is not None:
            index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
            sharding = {
                "chunk_shape": list(self.group),
                "codecs": chain,
                "index_codecs": index,
                "index_location": "end",
            }
            chain = [{"name": "sharding_indexed", "configuration": sharding}]
        fill = "NaN" if isinstance(self.fill, float) and math.isnan(self.fill) else self.fill
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": list(self.shard)},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": fill,
            "codecs": chain,
            "attributes": dict(self.attributes),
            "storage_transformers": [],
        }

    def _codecs(self) -> list[Json]:
        known: dict[str, Json] = {
            "transpose": {"name": "transpose", "configuration": {"order": self._order()}},
            "bytes": {"name": "bytes", "configuration": {"endian": "little"}},
            "zstd": {"name": "zstd", "configuration": {"level": self.level, "checksum": True}},
        }
        return [known[name] for name in CODECS[self.codec]]

    def _order(self) -> list[int]:
        """Last axis (the channels) first."""
        last = len(self.shape) - 1
        return [last, *range(last)]

    def encode_chunk(self, values: np.ndarray) -> Any:
        """The stored bytes of a chunk, without their checksum."""
        codecs = CODECS[self.codec]
        if "transpose" in codecs:
            values = values.transpose(self._order())
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        if "zstd" in codecs:
            return np.frombuffer(_zstd(self.level).encode(raw), np.uint8)
        return raw

    def decode_chunk(self, raw: np.ndarray) -> np.ndarray:
        """A chunk's values from its stored bytes (uint8, checksum removed).

        Raises:
            ValueError: when they do not decode to the chunk's length.
        """
        codecs = CODECS[self.codec]
        if "zstd" in codecs:
            length = content_length(raw)
            if length is None:
                raise ValueError("damaged, or frames that do not state their length")
            if length != self.chunk_bytes:  # room is made for what they state, whatever it is
                raise ValueError(f"{length} bytes instead of {self.chunk_bytes}")
            try:
                raw = np.frombuffer(_zstd(self.level).decode(raw), np.uint8)
            except RuntimeError as error:
                raise ValueError(str(error)) from None
        if raw.nbytes != self.chunk_bytes:
            raise ValueError(f"{raw.nbytes} bytes instead of {self.chunk_bytes}")
        values = raw.view(self.dtype)
        if "transpose" not in codecs:
            return values.reshape(self.chunk)
        return _channels_last(values.reshape(self.chunk[-1], -1)).reshape(self.chunk)


def _channels_last(stored: np.ndarray) -> np.ndarray:
    """``[D, n]`` as contiguous ``[n, D]``, some columns at a time.

    The columns are copied to rows of another length first: where rows lie a power of two of bytes
    apart, as they do for 32 rows of 256 tokens, all values of a column share a few lines of the
    processor's cache, and transposing takes eight times as long.
    """
    dim, count = stored.shape
    out = np.empty((count, dim), stored.dtype)
    panel = np.empty((dim, _PANEL + 8), stored.dtype)
    for start in range(0, count, _PANEL):
        part = out[start : start + _PANEL]
        columns = panel[:, : len(part)]
        columns[:] = stored[:, start : start + _PANEL]
        part[:] = columns.T
    return out


def _zstd(level: int) -> Any:
    from numcodecs.zstd import Zstd

    return Zstd(level=level, checksum=True)


class Layout:
    """The arrays and groups of a store with a given plan."""

    def __init__(self, plan: StorePlan) -> None:
        self.plan = plan

    def row_arrays(self) -> dict[str, ArraySpec]:
        """Facts about rows by name; one plain chunk a shard."""
        plan = self.plan

        def array(
            name: str, dtype: str, fill: float | int, *shape: int, codec: str = "raw"
        ) -> ArraySpec:
            whole, chunk = (plan.rows, *shape), (plan.shard_rows, *shape)
            return ArraySpec(f"{ROWS}/{name}", dtype, whole, chunk, None, fill, codec)

        arrays = (
            array("key", "uint8", 255, plan.key_bytes, codec="zstd"),
            array("label", "int64", -(2**63)),
            array("size", "int32", -1, 2),
            array("box", "float32", float("nan"), 4),
            array("flip", "uint8", 255),
            array("valid", "uint8", 255),
        )
        return {spec.path.rpartition("/")[2]: spec for spec in arrays}

    def pixel_array(self) -> ArraySpec:
        """The pixels of every view: uint8 ``[rows, height, width, 3]``.

        Raises:
            StoreError: the store has none.
        """
        plan = self.plan
        if plan.pixels is None:
            raise StoreError("the store has no pixels: extract or add them with pixels.size=...")
        image = (*plan.pixels.size, 3)
        attributes = {"interpolation": plan.pixels.interpolation}
        return ArraySpec(
            PIXELS,
            "uint8",
            (plan.rows, *image),
            (plan.shard_rows, *image),
            (plan.group_rows, *image),
            0,
            attributes=attributes,
        )

    def space_arrays(self, space: SpaceSpec) -> dict[str, ArraySpec]:
        """The encoded arrays of a space by component name."""
        plan = self.plan
        attributes = {
            "encoding": space.encoding,
            "grid": None if space.grid is None else list(space.grid),
            "dim": space.dim,
        }
        return {
            part.name: ArraySpec(
                f"{space_path(space)}/{part.name}",
                part.dtype,
                (plan.rows, *part.row_shape),
                (plan.shard_rows, *part.row_shape),
                (plan.group_rows, *part.row_shape),
                part.fill,
                part.codec,
                attributes,
                ZSTD_LEVEL_PREDICTED if space.predicted else ZSTD_LEVEL,
            )
            for part in encoding(space.encoding).components(space.tokens, space.dim)
        }

    def calibration_arrays(self, space: SpaceSpec) -> dict[str, ArraySpec]:
        """``mean`` and ``std`` of the standardisation, float32 ``[D]``; ``weights`` of the
        prediction, int8 ``[D, D]``, where the space is predicted."""
        path, dim = space_path(space), space.dim
        arrays = {
            name: self._constant(f"{path}/{name}", "float32", dim) for name in ("mean", "std")
        }
        if space.predicted:
            both = (dim, dim)
            arrays["weights"] = ArraySpec(f"{path}/weights", "int8", both, both, None, -128, "zstd")
        return arrays

    def statistics_arrays(self, space: SpaceSpec) -> dict[str, ArraySpec]:
        """Exact moments over all valid rows: float64 mean ``[D]`` and covariance ``[D, D]``."""
        path = f"{space_path(space)}/statistics"
        return {
            "mean": self._constant(f"{path}/mean", "float64", space.dim),
            "covariance": self._constant(f"{path}/covariance", "float64", space.dim, space.dim),
        }

    @staticmethod
    def _constant(path: str, dtype: str, *shape: int) -> ArraySpec:
        return ArraySpec(path, dtype, shape, shape, None, float("nan"))

    def unit_arrays(self, unit: str) -> dict[str, ArraySpec]:
        """The arrays, by path, whose shards a unit's commit records cover."""
        if unit == ROWS:
            return {spec.path: spec for spec in self.row_arrays().values()}
        if self._is_pixels(unit):
            return {PIXELS: self.pixel_array()}
        spaces = self.plan.teacher(unit).spaces
        arrays = (spec for space in spaces for spec in self.space_arrays(space).values())
        return {spec.path: spec for spec in arrays}

    def nodes(self, unit: str) -> Iterator[tuple[str, Json]]:
        """(node path, zarr.json) of a unit's groups and arrays."""
        if unit == ROWS:
            yield ROWS, group_metadata({})
            for spec in self.row_arrays().values():
                yield spec.path, spec.metadata()
            return
        if self._is_pixels(unit):
            yield PIXELS, self.pixel_array().metadata()
            return
        yield f"spaces/{unit}", group_metadata({})
        for space in self.plan.teacher(unit).spaces:
            yield space_path(space), group_metadata(space.as_json())
            yield f"{space_path(space)}/statistics", group_metadata({})
            makers: tuple[Callable[[SpaceSpec], dict[str, ArraySpec]], ...] = (
                self.space_arrays,
                self.calibration_arrays,
                self.statistics_arrays,
            )
            for maker in makers:
                for spec in maker(space).values():
                    yield spec.path, spec.metadata()

    def _is_pixels(self, unit: str) -> bool:
        return unit == PIXELS and self.plan.pixels is not None

    def root_nodes(self) -> Iterator[tuple[str, Json]]:
        """(node path, zarr.json) of the groups that belong to no unit."""
        yield "", group_metadata({"format": FORMAT, "version": self.plan.version})
        yield "spaces", group_metadata({})

    def chunks_in(self, spec: ArraySpec, shard: int) -> int:
        """How many chunks of a shard hold rows."""
        return 1 if spec.group is None else -(-self.plan.rows_in(shard) // spec.chunk[0])


def space_path(space: SpaceSpec) -> str:
    return f"spaces/{space.teacher}/{space.name}"


def group_metadata(attributes: Mapping[str, Json]) -> Json:
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def node_bytes(metadata: Json) -> bytes:
    """A zarr.json as file bytes."""
    return (json.dumps(metadata, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def pad_to_chunks(spec: ArraySpec, rows: int) -> np.ndarray:
    """A buffer for ``rows`` rows, which are not set yet, rounded up to whole chunks with fill
    values."""
    count = -(-rows // spec.chunk[0]) * spec.chunk[0]
    if count > spec.shard[0]:
        raise StoreError(f"{spec.path}: {rows} rows do not fit into a shard of {spec.shard[0]}")
    buffer = np.empty((count, *spec.shape[1:]), spec.dtype)
    buffer[rows:] = spec.fill
    return buffer
