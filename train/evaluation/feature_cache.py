"""Features that were computed once, kept in files that say whose they are."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ...cache.documents import digest
from ...cache.durable import write_whole_of
from ...errors import ConfigError, DataError
from .base import Array

FORMAT = "preceptor-features-1"
"""Of the files; another version is another format."""
_NAME = "features"


class FeatureCache:
    """A folder of ``HASH.safetensors``, one array each, named by a hash of all that determines it.

    A file holds its identity and the SHA-256 of its array beside it. One that is damaged, or that
    is not what its name says, is not used: it is told on standard error, and computed again.

    Arrays are mapped from their files, not read: all readouts of all images would not fit in
    memory. Writing to one changes no file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found = self.computed = 0
        self._whole: set[Path] = set()  # hashed by this process, or written by it and read back

    def get(self, identity: Mapping[str, Any], images: int) -> Array | None:
        """The array of an identity; None where there is none that can be used.

        Args:
            images: rows that it must have.
        """
        path = self._path(identity)
        if not path.exists():
            return None
        try:
            found = self._map(path, identity, images)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            print(f"{path} is not used and computed again: {error}", file=sys.stderr)
            return None
        self.found += 1
        return found

    def read(self, identity: Mapping[str, Any], images: int) -> Array:
        """The array of an identity that was `put` or found before.

        Raises:
            DataError: it cannot be read any more.
        """
        path = self._path(identity)
        try:
            return self._map(path, identity, images)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read any more ({error}): evaluate again") from error

    def room(self, shape: Sequence[int]) -> Array:
        """An empty float32 array of a shape, on the folder's disk; gone with its last reference.

        Raises:
            ConfigError: the folder cannot be written to, or its disk has no room.
        """
        size = 4 * math.prod(shape)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.folder) as file:
                if hasattr(os, "posix_fallocate"):  # a full disk would else end the process later
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                mapped = np.memmap(file, np.float32, "r+", shape=tuple(shape))
        except OSError as error:
            raise ConfigError(
                f"features: {self.folder} has no room for {size / 1e9:.3g} GB of features "
                f"({error.strerror or error}): name a folder on another disk, features=..., or "
                "score fewer readouts"
            ) from error
        return mapped.view(np.ndarray)

    def put(self, identity: Mapping[str, Any], features: Array) -> None:
        """Keep an array.

        Raises:
            StoreError: the file cannot be written.
        """
        self.computed += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(identity)
        write_whole_of(path, [_header(identity, features), features.data])
        self._whole.add(path)

    def _path(self, identity: Mapping[str, Any]) -> Path:
        return self.folder / f"{digest({'format': FORMAT, **identity})}.safetensors"

    def _map(self, path: Path, identity: Mapping[str, Any], images: int) -> Array:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError("it was written by another program or version")
            if json.loads(metadata["identity"]) != json.loads(json.dumps(dict(identity))):
                raise ValueError("it holds the features of something else")
            part = file.get_slice(_NAME)
            shape, dtype = part.get_shape(), part.get_dtype()
        if dtype != "F32" or shape[0] != images:
            raise ValueError(f"it holds {dtype} features of {shape[0]} images")
        start = path.stat().st_size - 4 * math.prod(shape)  # the one array is the end of the file
        features = np.memmap(path, np.float32, "c", start, tuple(shape)).view(np.ndarray)
        if path not in self._whole and _sha256(features) != metadata["sha256"]:
            raise ValueError("it is damaged (its SHA-256 differs)")
        self._whole.add(path)
        return features


def _header(identity: Mapping[str, Any], features: Array) -> bytes:
    """What stands before the array in a safetensors file.

    Written here because the library's own writer holds a second copy of the array in memory.
    """
    described = {
        "__metadata__": {
            "format": FORMAT,
            "identity": json.dumps(dict(identity), sort_keys=True),
            "sha256": _sha256(features),
        },
        _NAME: {
            "dtype": "F32",
            "shape": list(features.shape),
            "data_offsets": [0, features.nbytes],
        },
    }
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)  # the array begins at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text


def _sha256(features: Array) -> str:
    return hashlib.sha256(features.data.cast("B")).hexdigest()
