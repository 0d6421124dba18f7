"""Tars that were made to hurt, and those that a file system does not give."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from pathlib import Path

import pytest
from preceptor.cache import SampleIndex, tars
from preceptor.errors import DataError


def write(path: Path, **pax: str) -> str:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(20):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = 3
            if number == 10:
                member.pax_headers = pax
            tar.addfile(member, io.BytesIO(b"png"))
    return str(path)


@pytest.mark.parametrize(
    "pax",
    [
        {"size": "nonsense"},
        {"size": "-2048"},
        {"size": "99999999999999999999999"},
        {"GNU.sparse.map": "a,b"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
    ],
    ids=str,
)
def test_headers_that_cannot_be_are_damage(pax: dict[str, str], tmp_path: Path) -> None:
    shard = write(tmp_path / "odd.tar", **pax)
    with pytest.raises(DataError, match=r"odd\.tar"):
        SampleIndex.from_shards(shard)


def test_headers_that_a_device_does_not_give_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.FileIO):
        def readinto(self, buffer: object) -> int | None:
            if self.tell() > 4000:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().readinto(buffer)  # type: ignore[arg-type]

    monkeypatch.setattr(tars.TarShard, "open", lambda self: io.BufferedReader(Failing(self.path)))
    with pytest.raises(DataError, match=r"far\.tar cannot be read: Input/output error"):
        SampleIndex.from_shards(write(tmp_path / "far.tar"))
