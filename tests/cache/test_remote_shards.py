"""Shards in a bucket, read from a real S3 server, against the same files on the disk."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from preceptor.cache import remote_shard, tars
from preceptor.cache.remote import RemoteSource
from preceptor.cache.samples import SampleIndex
from preceptor.cache.shard_list import KeptLists, list_shard
from preceptor.cache.tars import TarShard
from preceptor.errors import DamagedImageError, DataError
from preceptor.tests.s3_server import Moody, Start, client_of, moody_s3, serving, storage

ADDRESS = "s3://bucket/in/images-{0..2}.tar"


def png(number: int, side: int) -> bytes:
    random = np.random.default_rng(number)
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, numbers: range, *kinds: str) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            members = {"png": png(number, 40), "cls": str(number % 5).encode()}
            if number % 2:
                members["json"] = json.dumps({"x": number}).encode()
            for kind, raw in ((kind, members[kind]) for kind in kinds or members):
                header = tarfile.TarInfo(f"{number:03d}.{kind}")
                header.size = len(raw)
                tar.addfile(header, io.BytesIO(raw))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for shard in range(3):
        write_shard(folder / f"images-{shard}.tar", range(20 * shard, 20 * shard + 20))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[Moody, str]]:
    with moody_s3() as (moody, endpoint):
        client = client_of(endpoint)
        client.create_bucket(Bucket="bucket")
        for path in folder.iterdir():
            client.put_object(Bucket="bucket", Key=f"in/{path.name}", Body=path.read_bytes())
        yield moody, endpoint


@pytest.fixture(autouse=True)
def moody(server: tuple[Moody, str], monkeypatch: pytest.MonkeyPatch) -> Moody:
    server[0].mood, server[0].failed = (lambda path: None), 0
    options = storage(server[1], retries=2)
    plain = {name: value for name, value in options.items() if name != "config"}

    def opened(address: str) -> RemoteSource:
        return RemoteSource(address, plain if address.startswith("http") else options)

    monkeypatch.setattr(remote_shard, "_folder", opened)
    monkeypatch.setattr(remote_shard, "_WALK", 3000)  # less than one image
    return server[0]


def put(server: tuple[Moody, str], name: str, raw: bytes) -> str:
    client_of(server[1]).put_object(Bucket="bucket", Key=f"in/{name}", Body=raw)
    return f"s3://bucket/in/{name}"


def test_a_bucket_gives_what_the_disk_gives(folder: Path) -> None:
    local = SampleIndex.from_shards(str(folder / "images-{0..2}.tar"), members=["json"])
    remote = SampleIndex.from_shards(ADDRESS, members=["json"])
    assert remote.describe() == local.describe()
    assert remote.keys == local.keys
    assert remote.labels.tolist() == local.labels.tolist()
    for index in (7, 59, 0, 31):
        assert remote.read(index) == local.read(index)
        assert remote.member(index, "json", 100) == local.member(index, "json", 100)
    order = [*np.random.default_rng(0).permutation(60), 3, 3]
    for theirs, ours in zip(local.images(order), remote.images(order), strict=True):
        assert (np.asarray(theirs) == np.asarray(ours)).all()
    assert remote.permuted(5).keys == local.permuted(5).keys


def test_a_damaged_shard_is_told_without_waiting_for_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, walked, many = threading.Event(), 0, 1_000_000

    def members(path: str, file: Any, passed: Any) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        nonlocal walked
        if path.endswith("images-0.tar"):
            assert begun.wait(60)
            raise DataError(f"shard {path} is damaged")
        for number in range(many):
            yield str(number), "png", tarfile.TarInfo()
            begun.set()
            walked += 1

    monkeypatch.setattr(tars, "members", members)
    with pytest.raises(DataError, match=r"images-0\.tar is damaged"):
        SampleIndex.from_shards(ADDRESS)
    assert walked < many


def test_a_list_is_kept_and_no_shard_is_walked_again(
    moody: Moody, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECEPTOR_SHARD_LISTS", str(tmp_path / "lists"))
    monkeypatch.setattr("preceptor.cache.shard_list.SETTLED", -(10**12))
    asked: list[str] = []
    moody.mood = asked.append  # type: ignore[assignment]  # answers well
    first = SampleIndex.from_shards(ADDRESS)
    assert len(asked) > 60
    asked.clear()
    again = SampleIndex.from_shards(ADDRESS)
    assert len(asked) == 3  # the first bytes of each
    assert again.describe() == first.describe()
    assert again.read(40) == first.read(40)


def test_compressed_shards(
    server: tuple[Moody, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = (folder / "images-1.tar").read_bytes()
    index = SampleIndex.from_shards(put(server, "packed.tar.gz", gzip.compress(raw)))
    local = SampleIndex.from_shards(str(folder / "images-1.tar"))
    assert index.keys == local.keys
    assert index.read(13) == local.read(13)
    unpacked, unpack = [], TarShard.unpack

    def counted(shard: TarShard, limit: int) -> bytes:
        unpacked.append(shard.path)
        return unpack(shard, limit)

    monkeypatch.setattr(TarShard, "unpack", counted)
    there = pickle.loads(pickle.dumps(index))  # noqa: S301  # as a worker gets it
    assert list(there.each(there.read, range(20))) == [local.read(i) for i in range(20)]
    assert len(unpacked) == 1


def test_errors_of_the_server_are_retried(moody: Moody) -> None:
    calls: Counter[str] = Counter()

    def mood(path: str) -> str | None:
        calls[path] += 1
        return "503 Slow Down" if calls[path] % 3 == 0 else None

    moody.mood = mood
    assert len(SampleIndex.from_shards(ADDRESS)) == 60
    assert moody.failed > 20


def test_a_server_that_fails_is_not_taken_for_a_damaged_image(moody: Moody) -> None:
    index = SampleIndex.from_shards(ADDRESS)
    moody.mood = lambda path: "500 Internal Server Error"
    (found,) = index.images([2])
    assert isinstance(found, DataError)
    assert not isinstance(found, DamagedImageError)
    assert str(found).startswith(
        "shard s3://bucket/in/images-0.tar could not be read after 3 attempts: "
    )


def test_a_shard_that_was_replaced_is_refused(server: tuple[Moody, str], folder: Path) -> None:
    raw = (folder / "images-0.tar").read_bytes()
    address = put(server, "changing.tar", raw)
    index = SampleIndex.from_shards(address)
    put(server, "changing.tar", raw[:1000] + bytes([raw[1000] ^ 1]) + raw[1001:])
    with pytest.raises(DataError, match=r"^shard s3://bucket/in/changing.tar has changed since"):
        index.read(0)


def test_what_cannot_be_listed_is_named(server: tuple[Moody, str], folder: Path) -> None:
    raw = (folder / "images-0.tar").read_bytes()
    for name, data, words in (
        ("short.tar", raw[:30_000], "is damaged|is cut short"),
        ("empty.tar", b"", "is empty"),
        ("text.tar", b"no archive" * 100, "is damaged or no tar file"),
    ):
        with pytest.raises(DataError, match=f"^shard s3://bucket/in/{name} .*({words})"):
            SampleIndex.from_shards(put(server, name, data))
    with pytest.raises(DataError, match=r"in/images-3.tar: there is none; check data.shards"):
        SampleIndex.from_shards("s3://bucket/in/images-{2..3}.tar")
    for address, words in (
        ("s3://bucket/in/images-*.tar", r"images-\*.tar.*by braces"),
        ("http://host/x.tar?token=1", r"\? or # cannot be read"),
        ("http://host/a#b/x.tar", r"\? or # cannot be read"),
        ("s3://bucket/in/", "is no file"),
        ("s3://bucket", "is no file"),
    ):
        with pytest.raises(DataError, match=words):
            SampleIndex.from_shards(address)
    with pytest.raises(DataError, match=r"'pipe:aws s3 cp.*neither a local file nor at an address"):
        SampleIndex.from_shards("pipe:aws s3 cp s3://bucket/in/images-0.tar -")


@pytest.mark.parametrize("size", [0, 3, 40])
def test_reads_past_the_end_are_short(server: tuple[Moody, str], folder: Path, size: int) -> None:
    length = (folder / "images-0.tar").stat().st_size
    shard: Any = remote_shard.RemoteTarShard.at("s3://bucket/in/images-0.tar")
    assert len(shard.read(length - 3, size)) == min(size, 3)
    assert shard.read(length + 5, size) == b""
    with shard.open() as file:
        assert file.seek(-7, io.SEEK_END) == length - 7
        assert len(file.read()) == 7
        file.seek(10)
        assert file.read(20) == (folder / "images-0.tar").read_bytes()[10:30]


def test_names_are_taken_as_they_stand(server: tuple[Moody, str], folder: Path) -> None:
    raw = (folder / "images-2.tar").read_bytes()
    for name in ("a#b/c d.tar", "a%20b.tar"):
        client_of(server[1]).put_object(Bucket="bucket", Key=name, Body=raw)
        assert len(SampleIndex.from_shards(f"s3://bucket/{name}")) == 20


def test_one_that_is_missing_is_told_before_any_is_walked(moody: Moody) -> None:
    asked: list[str] = []
    moody.mood = asked.append  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"images-3.tar: there is none"):
        SampleIndex.from_shards("s3://bucket/in/images-{0..3}.tar")
    assert len(asked) <= 4  # the first bytes of each


@pytest.mark.parametrize("kinds", [("png", "cls"), ("cls", "png")])
def test_a_walk_asks_for_every_byte_once(
    tmp_path: Path, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a label lies at the end of one request and its image begins another."""
    write_shard(tmp_path / "x.tar", range(60), *kinds)
    local, asked = TarShard.at(str(tmp_path / "x.tar")), []
    shard = remote_shard.RemoteTarShard(local.path, local.size, local.modified, None)

    def read(self: Any, offset: int, size: int) -> bytes:
        asked.append(min(size, local.size - offset))
        return local.read(offset, size)

    monkeypatch.setattr(remote_shard.RemoteTarShard, "_read", read)
    found = list_shard(shard, kept=KeptLists())
    assert found.labels.tolist() == [number % 5 for number in range(60)]
    assert sum(asked) < 1.1 * local.size


def test_threads_that_cannot_keep_lists_say_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("preceptor.cache.shard_list.SETTLED", -(10**12))
    write_shard(tmp_path / "x.tar", range(3))
    shard = TarShard.at(str(tmp_path / "x.tar"))
    monkeypatch.setenv("PRECEPTOR_SHARD_LISTS", "")
    found = list_shard(shard, kept=KeptLists())
    monkeypatch.setenv("PRECEPTOR_SHARD_LISTS", str(tmp_path / "file"))  # no folder
    kept = KeptLists()
    with warnings.catch_warnings(record=True) as told, ThreadPoolExecutor(16) as pool:
        warnings.simplefilter("always")
        list(pool.map(lambda _: kept.keep(shard, found), range(200)))
    assert len(told) == 1


class Plain:
    """A WSGI application: one file, of a server that names no versions.

    Attributes:
        dated: whether it tells when the file was changed.
        ranges: whether it gives parts of it.
        tag: its ETag; None: none.
    """

    def __init__(self, raw: bytes, *, dated: bool = True, ranges: bool = True) -> None:
        self.raw, self.dated, self.ranges = raw, dated, ranges
        self.tag: str | None = None

    def __call__(self, environ: dict[str, Any], start: Start) -> list[bytes]:
        headers = [("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")] if self.dated else []
        headers += [("ETag", self.tag)] if self.tag else []
        if environ.get("HTTP_IF_MATCH"):  # a weak tag matches nothing
            start("412 Precondition Failed", headers)
            return []
        first, found, last = environ.get("HTTP_RANGE", "").removeprefix("bytes=").partition("-")
        if not (found and self.ranges):
            start("200 OK", [*headers, ("Content-Length", str(len(self.raw)))])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [self.raw]
        part = self.raw[int(first) : int(last) + 1]
        span = f"bytes {first}-{int(first) + len(part) - 1}/{len(self.raw)}"
        start(
            "206 Partial Content",
            [*headers, ("Content-Range", span), ("Content-Length", str(len(part)))],
        )
        return [part]


@pytest.mark.parametrize("tag", [None, 'W/"1"'])
@pytest.mark.parametrize("dated", [True, False])
def test_a_web_server_that_names_no_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dated: bool, tag: str | None
) -> None:
    monkeypatch.setenv("PRECEPTOR_SHARD_LISTS", str(tmp_path / "lists"))
    write_shard(tmp_path / "a.tar", range(4))
    write_shard(tmp_path / "b.tar", range(4, 8))
    app = Plain((tmp_path / "a.tar").read_bytes(), dated=dated)
    app.tag = tag
    with serving(app) as address:
        index = SampleIndex.from_shards(f"{address}/a%20b/x%20y.tar")
        local = SampleIndex.from_shards(str(tmp_path / "a.tar"))
        assert [index.read(i) for i in range(4)] == [local.read(i) for i in range(4)]
        app.raw = (tmp_path / "b.tar").read_bytes()
        if not dated and tag is None:  # another of the same length is not taken for the first
            assert SampleIndex.from_shards(f"{address}/a%20b/x%20y.tar").keys == [
                f"{number:03d}" for number in range(4, 8)
            ]


def test_a_web_server_without_ranges_is_told_at_once(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", range(4))
    with (
        serving(Plain((tmp_path / "a.tar").read_bytes(), ranges=False)) as address,
        pytest.raises(DataError, match=r"^shard http.*/x.tar cannot be read in parts: .*copy it"),
    ):
        SampleIndex.from_shards(f"{address}/x.tar")
