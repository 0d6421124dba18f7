"""Arrays that are one chunk and are written once: calibrations and merged statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from ..errors import StoreError
from .layout import CRC, ArraySpec, Layout
from .manifest import Calibration, SpaceSpec
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
    if len(body) != spec.chunk_bytes or crc32c(body) != int.from_bytes(tail, "little"):
        raise StoreError(f"{spec.file(0)} is damaged: run `preceptor repair`")
    return np.frombuffer(body, spec.dtype).reshape(spec.shape).copy()


def calibration_files(layout: Layout, space: SpaceSpec) -> tuple[str, ...]:
    """Paths of mean and std, in this order."""
    return tuple(spec.file(0) for spec in layout.calibration_arrays(space).values())


def calibration_values(
    layout: Layout, space: SpaceSpec, raw: Mapping[str, bytes], frozen: Calibration
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, float32 ``[D]``, from files by path.

    Raises:
        StoreError: they are not what was frozen.
    """
    arrays = layout.calibration_arrays(space)
    values = {name: constant_values(spec, raw[spec.file(0)]) for name, spec in arrays.items()}
    if calibration_sha256(values["mean"], values["std"]) != frozen.sha256:
        raise StoreError(
            f"the calibration of {space.id} is not the one that was frozen: run `preceptor repair`"
        )
    return values["mean"], values["std"]


def calibration_sha256(mean: np.ndarray, std: np.ndarray) -> str:
    """Hash of float32 mean, then deviation."""
    return hashlib.sha256(mean.astype("<f4").tobytes() + std.astype("<f4").tobytes()).hexdigest()


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
