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


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_without_measure_are_damage(kind: bytes, tmp_path: Path) -> None:
    """One of more bytes than any memory has, and more of them than a stack takes."""
    header = tarfile.TarInfo("header")
    header.type = kind
    for name, size, times in (("huge", 1 << 60, 1), ("chained", 0, 3000)):
        header.size = size
        shard = tmp_path / f"{name}.tar"
        shard.write_bytes(header.tobuf(tarfile.GNU_FORMAT) * times + bytes(10240))
        with pytest.raises(DataError, match=rf"{name}\.tar is damaged or no tar file: \w"):
            SampleIndex.from_shards(str(shard))
