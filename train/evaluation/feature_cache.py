"""Features that were computed once, kept in files that say whose they are."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ...cache.documents import digest
from ...cache.durable import write_whole
from ...errors import DataError
from .base import Array

FORMAT = "preceptor-features-1"
"""Of the files; another version is another format."""


class FeatureCache:
    """A folder of ``HASH.safetensors``, one array each, named by a hash of all that determines it.

    A file holds its identity and the SHA-256 of its array beside it. One that is damaged, or that
    is not what its name says, is not used: it is told on standard error, and computed again.

    Args:
        folder: None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.found = self.computed = 0

    def get(self, identity: Mapping[str, Any], images: int) -> Array | None:
        """The array of an identity; None where there is none that can be used.

        Args:
            images: rows that it must have.
        """
        if self.folder is None:
            return None
        path = self._path(identity)
        if not path.exists():
            return None
        try:
            found = _read(path, identity, images)
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
            return _read(path, identity, images)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read any more ({error}): evaluate again") from error

    @contextmanager
    def aside(self) -> Iterator[Path | None]:
        """A folder on the same disk for what is not finished, removed afterwards; None without a
        folder of its own."""
        if self.folder is None:
            yield None
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="unfinished-", dir=self.folder) as found:
            yield Path(found)

    def put(self, identity: Mapping[str, Any], features: Array) -> None:
        """Keep an array.

        Raises:
            StoreError: the file cannot be written.
        """
        self.computed += 1
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        metadata = {
            "format": FORMAT,
            "identity": json.dumps(dict(identity), sort_keys=True),
            "sha256": _sha256(features),
        }
        write_whole(self._path(identity), save({"features": features}, metadata))

    def _path(self, identity: Mapping[str, Any]) -> Path:
        assert self.folder is not None
        return self.folder / f"{digest({'format': FORMAT, **identity})}.safetensors"


def _read(path: Path, identity: Mapping[str, Any], images: int) -> Array:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError("it was written by another program or version")
        if json.loads(metadata["identity"]) != json.loads(json.dumps(dict(identity))):
            raise ValueError("it holds the features of something else")
        features: Array = file.get_tensor("features")
    if features.dtype != "float32" or len(features) != images:
        raise ValueError(f"it holds {features.dtype} features of {len(features)} images")
    if _sha256(features) != metadata["sha256"]:
        raise ValueError("it is damaged (its SHA-256 differs)")
    return features


def _sha256(features: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(features).data.cast("B")).hexdigest()
