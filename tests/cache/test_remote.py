"""Remote stores, read from a real S3 server and a real web server that sometimes misbehave."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from preceptor.benchmarks.small_store import contents
from preceptor.cache import Cache
from preceptor.errors import StoreError
from small_stores import CORRUPT, ROWS
from werkzeug.serving import make_server

VALID = np.array([row for row in range(ROWS) if row not in CORRUPT])
Start = Callable[[str, list[tuple[str, str]]], Any]


class Moody:
    """A WSGI application that fails as told before it lets the real one answer.

    Attributes:
        mood: called with the path of each GET; None to answer well, a status line to answer that,
            or an Event to wait for (a slow answer: it is set when the test is over).
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.mood: Callable[[str], str | threading.Event | None] = lambda path: None
        self.lock = threading.Lock()
        self.failed = 0

    def __call__(self, environ: dict[str, Any], start: Start) -> Any:
        if environ["REQUEST_METHOD"] == "GET":
            with self.lock:
                mood = self.mood(environ["PATH_INFO"])
                self.failed += mood is not None
            if isinstance(mood, threading.Event):
                mood.wait(60)
            elif mood is not None:
                start(mood, [("Content-Type", "text/plain")])
                return [b"injected"]
        return self.inner(environ, start)


def client_of(endpoint: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


@pytest.fixture(scope="module")
def s3(finished: Path) -> Iterator[tuple[Moody, str]]:
    """moto's S3 server with the finished store in a bucket, and its endpoint."""
    moody = Moody(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, moody, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    client = client_of(endpoint)
    client.create_bucket(Bucket="bucket")
    for name, raw in contents(finished).items():
        if not name.startswith("spare/"):
            client.put_object(Bucket="bucket", Key=f"path/store/{name}", Body=raw)
    yield moody, endpoint
    server.shutdown()
    thread.join()


@pytest.fixture(autouse=True)
def good_mood(s3: tuple[Moody, str]) -> None:
    s3[0].mood = lambda path: None
    s3[0].failed = 0


def storage(endpoint: str, timeout: float = 30, retries: int = 10) -> dict[str, Any]:
    quick = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5)}
    return {
        "config": {
            "endpoint": endpoint,
            "region": "us-east-1",
            "access_key_id": "test",
            "secret_access_key": "test",
        },
        "client_options": {"allow_http": True, "timeout": timedelta(seconds=timeout)},
        "retry_config": {"max_retries": retries, "backoff": quick},
    }


def same_as_local(cache: Cache, local: Cache) -> None:
    assert list(cache.keys) == list(local.keys)
    assert (cache.valid == local.valid).all()
    for name, space in local.spaces.items():
        theirs = cache[name].read(VALID)
        for part, values in space.read(VALID).parts.items():
            assert theirs.parts[part].numpy().tobytes() == values.numpy().tobytes()
    rows = []
    for batch in cache.batches(list(local.spaces), 8, seed=1, drop_last=False):
        rows += batch.rows.tolist()
        for name, tokens in batch.tokens.items():
            assert (local[name].read(batch.rows).codes.numpy() == tokens.codes.numpy()).all()
    assert sorted(rows) == VALID.tolist()


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


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """The standard library's file server, with ranges."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        raw = path.read_bytes()
        status, asked = 200, self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            total, start = len(raw), int(first)
            raw = raw[start : int(last) + 1 if last else None]
            status = 206
        self.send_response(status)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{start + len(raw) - 1}/{total}")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args: object) -> None:
        pass


def test_a_web_server_gives_what_the_disk_gives(finished: Path, cache: Cache) -> None:
    handler = functools.partial(RangeHandler, directory=str(finished.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        location = f"http://127.0.0.1:{server.server_port}/store"
        remote = Cache.open(location, storage={"client_options": {"allow_http": True}})
        same_as_local(remote, cache)
        with pytest.raises(StoreError, match="holds no store"):
            Cache.open(location + "s", storage={"client_options": {"allow_http": True}})
        server.shutdown()
        thread.join()
