"""Stores in buckets, read from a real S3 server that sometimes misbehaves, and from its likes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from preceptor.benchmarks.small_store import contents
from preceptor.cache import Cache
from preceptor.errors import StoreError
from preceptor.tests.s3_server import Moody, Start, client_of, moody_s3, serving, storage
from small_stores import VALID, same_as_local


@pytest.fixture(scope="module")
def s3(finished: Path) -> Iterator[tuple[Moody, str]]:
    """moto's S3 server with the finished store in a bucket, and its endpoint."""
    with moody_s3() as (moody, endpoint):
        client = client_of(endpoint)
        client.create_bucket(Bucket="bucket")
        for name, raw in contents(finished).items():
            if not name.startswith("spare/"):
                client.put_object(Bucket="bucket", Key=f"path/store/{name}", Body=raw)
        yield moody, endpoint


@pytest.fixture(autouse=True)
def good_mood(s3: tuple[Moody, str]) -> None:
    s3[0].mood = lambda path: None
    s3[0].failed = 0


def test_s3_gives_what_the_disk_gives(s3: tuple[Moody, str], cache: Cache) -> None:
    remote = Cache.open("s3://bucket/path/store", storage=storage(s3[1]))
    same_as_local(remote, cache)
    assert remote["vit/patch"].statistics().count == cache["vit/patch"].statistics().count


def test_server_errors_are_retried(s3: tuple[Moody, str], cache: Cache) -> None:
    moody, endpoint = s3
    calls = iter(range(10**6))
    errors = ("500 Internal Server Error", "503 Slow Down")
    moody.mood = lambda path: errors[next(calls) % 2] if next(calls) % 6 < 2 else None
    same_as_local(Cache.open("s3://bucket/path/store", storage=storage(endpoint)), cache)
    assert moody.failed > 20


def test_slow_answers_are_asked_for_again(s3: tuple[Moody, str], cache: Cache) -> None:
    moody, endpoint = s3
    over = threading.Event()
    slow = {"path/store/spaces/vit/patch/codes/c.1.0.0", "path/store/manifest.json"}

    def mood(path: str) -> threading.Event | None:
        name = path.removeprefix("/bucket/")
        if name in slow:
            slow.remove(name)
            return over
        return None

    moody.mood = mood
    try:
        remote = Cache.open("s3://bucket/path/store", storage=storage(endpoint, timeout=1.5))
        codes = remote["vit/patch"].read(VALID).codes
    finally:
        over.set()
    assert moody.failed == 2
    assert (codes == cache["vit/patch"].read(VALID).codes).all()


def test_a_server_that_never_answers_well_is_named(s3: tuple[Moody, str]) -> None:
    moody, endpoint = s3
    moody.mood = lambda path: "500 Internal Server Error"
    with pytest.raises(StoreError, match=r"store/manifest.json could not be read after 3"):
        Cache.open("s3://bucket/path/store", storage=storage(endpoint, retries=1))


def test_what_is_missing_or_damaged_is_refused(s3: tuple[Moody, str], finished: Path) -> None:
    endpoint = s3[1]
    with pytest.raises(StoreError, match="s3://bucket/nowhere holds no store"):
        Cache.open("s3://bucket/nowhere", storage=storage(endpoint))
    with pytest.raises(StoreError, match="beginning with s3://"):
        Cache.open("ftp://bucket/store")
    client = client_of(endpoint)
    name = "spaces/cnn/map/codes/c.1.0.0"
    whole = (finished / name).read_bytes()
    flipped = bytes([whole[0] ^ 1]) + whole[1:]
    try:
        client.put_object(Bucket="bucket", Key=f"path/store/{name}", Body=flipped)
        remote = Cache.open("s3://bucket/path/store", storage=storage(endpoint))
        with pytest.raises(StoreError, match="shard 1 of cnn: group 0"):
            remote["cnn/map"].read([16])
        client.put_object(Bucket="bucket", Key=f"path/store/{name}", Body=whole[:-1])
        with pytest.raises(StoreError, match=rf"shard 1 of cnn: {name} has"):
            Cache.open("s3://bucket/path/store", storage=storage(endpoint))
        with pytest.raises(StoreError, match="damaged in shard 1 of cnn"):
            Cache(remote.source, remote.manifest, remote.completions)["cnn/map"].read([16])
        client.delete_object(Bucket="bucket", Key=f"path/store/{name}")
        with pytest.raises(StoreError, match=f"{name} is missing"):
            Cache.open("s3://bucket/path/store", storage=storage(endpoint))
    finally:
        client.put_object(Bucket="bucket", Key=f"path/store/{name}", Body=whole)


def test_google_storage_gives_what_the_disk_gives(s3: tuple[Moody, str], cache: Cache) -> None:
    """Its XML interface is that of S3, so the same server answers; what is signed is another."""
    client = client_of(s3[1])
    for entry in client.list_objects_v2(Bucket="bucket", Prefix="path/store/")["Contents"]:
        client.put_object_acl(Bucket="bucket", Key=entry["Key"], ACL="public-read")
    client.put_bucket_acl(Bucket="bucket", ACL="public-read")
    options = {
        "config": {"base_url": s3[1], "skip_signature": True},
        "client_options": {"allow_http": True},
    }
    same_as_local(Cache.open("gs://bucket/path/store", storage=options), cache)
    with pytest.raises(StoreError, match="gs://bucket/nowhere holds no store"):
        Cache.open("gs://bucket/nowhere", storage=options)


class Blobs:
    """A WSGI application: the two requests of Azure's blob storage that reading needs."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def __call__(self, environ: dict[str, Any], start: Start) -> Any:
        _, account, container, *rest = environ["PATH_INFO"].split("/")
        assert (account, container) == ("account", "container")
        asked = parse_qs(environ["QUERY_STRING"])
        if asked.get("comp") == ["list"]:
            return self.listed(asked["prefix"][0], start)
        raw = self.files.get("/".join(rest))
        if raw is None:
            start("404 The specified blob does not exist.", [])
            return [b""]
        headers = [
            ("ETag", '"1"'),
            ("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT"),
            ("x-ms-blob-type", "BlockBlob"),
        ]
        first, found, last = environ.get("HTTP_RANGE", "").removeprefix("bytes=").partition("-")
        if not found:
            start("200 OK", [*headers, ("Content-Length", str(len(raw)))])
            return [raw]
        part = raw[int(first) : int(last) + 1]
        headers.append(("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(raw)}"))
        start("206 Partial Content", [*headers, ("Content-Length", str(len(part)))])
        return [part]

    def listed(self, prefix: str, start: Start) -> list[bytes]:
        blobs = "".join(
            f"<Blob><Name>{name}</Name><Properties>"
            "<Last-Modified>Mon, 01 Jan 2024 00:00:00 GMT</Last-Modified><Etag>1</Etag>"
            f"<Content-Length>{len(raw)}</Content-Length>"
            "<Content-Type>application/octet-stream</Content-Type></Properties></Blob>"
            for name, raw in sorted(self.files.items())
            if name.startswith(prefix)
        )
        start("200 OK", [("Content-Type", "application/xml")])
        return [
            f"<EnumerationResults><Prefix>{prefix}</Prefix><Blobs>{blobs}</Blobs>"
            "<NextMarker/></EnumerationResults>".encode()
        ]


def test_azure_storage_gives_what_the_disk_gives(finished: Path, cache: Cache) -> None:
    files = {f"path/store/{name}": raw for name, raw in contents(finished).items()}
    options: dict[str, Any] = {
        "config": {"account_name": "account", "skip_signature": True},
        "client_options": {"allow_http": True},
    }
    with serving(Blobs(files)) as address:
        options["config"]["endpoint"] = f"{address}/account"
        same_as_local(Cache.open("az://container/path/store", storage=options), cache)
        with pytest.raises(StoreError, match="az://container/nowhere holds no store"):
            Cache.open("az://container/nowhere", storage=options)
        name = "spaces/cnn/map/codes/c.1.0.0"
        files[f"path/store/{name}"] += b"."
        with pytest.raises(StoreError, match=rf"shard 1 of cnn: {name} has"):
            Cache.open("az://container/path/store", storage=options)


def unreachable() -> str:
    """An address of this machine where nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.parametrize(
    ("location", "config"),
    [
        ("s3://bucket/store", {"endpoint": "", "region": "us-east-1", "skip_signature": True}),
        ("gs://bucket/store", {"base_url": "", "skip_signature": True}),
        (
            "az://container/store",
            {"endpoint": "", "account_name": "account", "skip_signature": True},
        ),
        ("http://", {}),
    ],
)
def test_a_service_that_cannot_be_reached_is_one_sentence(
    location: str, config: dict[str, Any]
) -> None:
    nowhere = unreachable()
    location = f"{nowhere}/store" if location == "http://" else location
    options = storage("", retries=2) | {"config": {k: v or nowhere for k, v in config.items()}}
    with pytest.raises(StoreError) as found:
        Cache.open(location, storage=options)
    why = str(found.value)
    assert why.startswith(f"{location}/manifest.json could not be read after 3 attempts: ")
    assert why.endswith("; check the address, the credentials and the network")
    assert "\n" not in why


def test_options_that_cannot_be_used_are_one_sentence() -> None:
    for location, options, words in (
        ("az://container/store", {}, "Account must be specified"),
        ("gs://bucket/store", {"config": {"service_account_path": "/nowhere"}}, "nowhere"),
        ("s3://bucket/store", {"config": {"no_such_key": "x"}}, "no_such_key"),
        ("http://", {}, ""),
    ):
        with pytest.raises(StoreError, match=f"^{location} cannot be opened: .*{words}") as found:
            Cache.open(location, storage=options)
        assert "; check the address" in str(found.value)
        assert "\n" not in str(found.value)


def test_a_request_that_took_long_is_not_repeated(
    s3: tuple[Moody, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """obstore's own retries, minutes of them by default, are enough where nobody answers."""
    moody, endpoint = s3
    monkeypatch.setattr("preceptor.cache.remote._PATIENCE", 0.5)
    over = threading.Event()
    moody.mood = lambda path: over
    try:
        with pytest.raises(StoreError, match=r"could not be read after 1 attempt:"):
            Cache.open("s3://bucket/path/store", storage=storage(endpoint, 0.6, retries=1))
    finally:
        over.set()
