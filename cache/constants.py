"""Arrays that are one chunk and are written once: calibrations and merged statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from ..errors import StoreError
from .encodings.prediction import problem
from .layout import CRC, ArraySpec, Layout
from .manifest import Calibration
from .plan import SpaceSpec
from .sharding import crc32c, shard_file


def constant_bytes(spec: ArraySpec, values: np.ndarray) -> bytes:
    """The file of such an array."""
    stored = np.ascontiguousarray(values, spec.dtype)
    return b"".join(bytes(part) for part in shard_file(spec, stored)[0])


def constant_values(spec: ArraySpec, raw: bytes) -> np.ndarray:
    """Its values from the bytes of its file.

    Raises:
        StoreError: damage.
    """
    body, tail = raw[:-CRC], raw[-CRC:]
    try:
        if crc32c(body) != int.from_bytes(tail, "little"):
            raise ValueError("another checksum")
        return spec.decode_chunk(np.frombuffer(body, np.uint8)).copy()
    except ValueError:
        raise StoreError(f"{spec.file(0)} is damaged: run `preceptor repair`") from None


def calibration_files(layout: Layout, space: SpaceSpec) -> tuple[str, ...]:
    """Paths of mean, std and, where the space is predicted, weights."""
    return tuple(spec.file(0) for spec in layout.calibration_arrays(space).values())


def calibration_sides(
    space: SpaceSpec, mean: np.ndarray, std: np.ndarray, weights: np.ndarray | None
) -> dict[str, np.ndarray]:
    """What is frozen of a space: float32 ``mean`` and ``std`` ``[D]`` and, where it is predicted,
    int8 ``weights`` ``[D, D]``, of which None stands for zeros.

    Raises:
        StoreError: they cannot standardise, or predict.
    """
    sides = {
        "mean": np.ascontiguousarray(np.asarray(mean, np.float32)),
        "std": np.ascontiguousarray(np.asarray(std, np.float32)),
    }
    for name, values in sides.items():
        if values.shape != (space.dim,) or not np.isfinite(values).all():
            raise StoreError(f"{space.id}: {name} must be {space.dim} finite numbers")
    if not (sides["std"] > 0).all():
        dims = np.flatnonzero(~(sides["std"] > 0))[:5].tolist()
        raise StoreError(f"{space.id}: the deviation of dimension {dims} is not positive")
    if not space.predicted:
        if weights is not None:
            raise StoreError(f"{space.id} is not predicted and takes no weights")
        return sides
    shape = (space.dim, space.dim)
    weights = np.zeros(shape, np.int8) if weights is None else weights
    if weights.shape != shape or weights.dtype != np.int8:
        raise StoreError(f"{space.id}: weights must be int8 of shape {shape}")
    if why := problem(weights, space.grid):
        raise StoreError(f"{space.id}: the weights {why}")
    return {**sides, "weights": weights}


def calibration_values(
    layout: Layout, space: SpaceSpec, raw: Mapping[str, bytes], frozen: Calibration
) -> dict[str, np.ndarray]:
    """``mean`` and ``std``, float32 ``[D]``, and ``weights``, int8 ``[D, D]``, from files by path.

    Raises:
        StoreError: they are not what was frozen, or weights that no writer may freeze.
    """
    arrays = layout.calibration_arrays(space)
    values = {name: constant_values(spec, raw[spec.file(0)]) for name, spec in arrays.items()}
    if calibration_sha256(values) != frozen.sha256:
        raise StoreError(
            f"the calibration of {space.id} is not the one that was frozen: run `preceptor repair`"
        )
    if "weights" in values and (why := problem(values["weights"], space.grid)):
        raise StoreError(f"the weights of {space.id} {why}: the store cannot be read exactly")
    return values


def calibration_sha256(values: Mapping[str, np.ndarray]) -> str:
    """Hash of float32 ``mean``, ``std`` and, where there are any, int8 ``weights``."""
    whole = hashlib.sha256()
    for name, dtype in (("mean", "<f4"), ("std", "<f4"), ("weights", "i1")):
        if name in values:
            whole.update(values[name].astype(dtype).tobytes())
    return whole.hexdigest()


def statistics_files(layout: Layout, space: SpaceSpec) -> tuple[str, ...]:
    """Paths of mean and covariance, in this order."""
    return tuple(spec.file(0) for spec in layout.statistics_arrays(space).values())


def statistics_values(
    layout: Layout, space: SpaceSpec, raw: Mapping[str, bytes], seal: str
) -> tuple[np.ndarray, np.ndarray]:
    """Mean ``[D]`` and covariance ``[D, D]``, float64, from files by path.

    Raises:
        StoreError: they are not what was sealed.
    """
    arrays = layout.statistics_arrays(space)
    values = {name: constant_values(spec, raw[spec.file(0)]) for name, spec in arrays.items()}
    if statistics_sha256(values["mean"], values["covariance"]) != seal:
        raise StoreError(
            f"the statistics of {space.id} are not what was sealed: run `preceptor repair`"
        )
    return values["mean"], values["covariance"]


def statistics_sha256(mean: np.ndarray, covariance: np.ndarray) -> str:
    """Hash of float64 mean, then covariance."""
    raw = mean.astype("<f8").tobytes() + covariance.astype("<f8").tobytes()
    return hashlib.sha256(raw).hexdigest()
