"""Stores behind a real web server, whose answers are right, wrong, or somewhere else."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from preceptor.cache import Cache
from preceptor.errors import StoreError
from small_stores import VALID, same_as_local

QUICK = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5)}
Fault = Callable[[bytes, int, int], tuple[bytes, str | None, int]]
"""From a file and the range asked for (last included): body, Content-Range and Content-Length."""


def answer(body: bytes, first: int, total: int) -> tuple[bytes, str, int]:
    return body, f"bytes {first}-{first + len(body) - 1}/{total}", len(body)


def right(raw: bytes, first: int, last: int) -> tuple[bytes, str | None, int]:
    return answer(raw[first : last + 1], first, len(raw))


def without_the_last_byte(raw: bytes, first: int, last: int) -> tuple[bytes, str | None, int]:
    return answer(raw[first:last], first, len(raw))


def broken_off(raw: bytes, first: int, last: int) -> tuple[bytes, str | None, int]:
    body, span, length = right(raw, first, last)
    return body[:-1], span, length


def shorter_than_it_says(raw: bytes, first: int, last: int) -> tuple[bytes, str | None, int]:
    body, span, length = right(raw, first, last)
    return body[:-1], span, length - 1


def of_another_range(raw: bytes, first: int, last: int) -> tuple[bytes, str | None, int]:
    return answer(raw[first : last + 1], first + 4, len(raw))


def from_another_place(raw: bytes, first: int, last: int) -> tuple[bytes, str | None, int]:
    moved = raw[1:] + raw[:1]
    return right(moved, first, last)


def without_a_range(raw: bytes, first: int, last: int) -> tuple[bytes, str | None, int]:
    body = raw[first : last + 1]
    return body, None, len(body)


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """The standard library's file server, with ranges.

    Attributes:
        fault: how ranges are answered; None: with the whole file, as servers do without ranges.
        redirect: what a path is redirected to; None: nowhere.
    """

    protocol_version = "HTTP/1.1"
    fault: Fault | None = staticmethod(right)
    redirect: Callable[[str], str | None] = staticmethod(lambda path: None)

    def do_GET(self) -> None:
        if elsewhere := self.redirect(self.path):
            self.send_response(302)
            self.send_header("Location", elsewhere)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        raw = path.read_bytes()
        status, span, length = 200, None, len(raw)
        asked = self.headers.get("Range")
        if asked and self.fault:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            raw, span, length = self.fault(raw, int(first), int(last))
            status = 206
        self.send_response(status)
        if span:
            self.send_header("Content-Range", span)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(raw)
        self.close_connection = len(raw) != length

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def web(finished: Path) -> Iterator[str]:
    """The address of the finished store behind a web server."""
    handler = functools.partial(RangeHandler, directory=str(finished.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/store"
        server.shutdown()
        thread.join()


def test_a_web_server_gives_what_the_disk_gives(web: str, cache: Cache) -> None:
    same_as_local(Cache.open(web), cache)
    with pytest.raises(StoreError, match="holds no store"):
        Cache.open(web + "s", storage={"client_options": {"timeout": timedelta(seconds=30)}})


@pytest.mark.parametrize(
    "fault",
    [
        None,
        without_the_last_byte,
        broken_off,
        shorter_than_it_says,
        of_another_range,
        from_another_place,
        without_a_range,
    ],
)
def test_ranges_that_are_answered_wrongly_are_refused(
    fault: Fault | None, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Cache.open(web)
    assert remote.valid.sum() == len(VALID)
    monkeypatch.setattr(RangeHandler, "fault", fault and staticmethod(fault))
    with pytest.raises(StoreError, match=rf"^{web}.*spaces/vit/patch/codes/c\.0"):
        remote["vit/patch"].read(VALID)
    with pytest.raises(StoreError, match=f"^{web}.*rows/valid"):
        _ = Cache.open(web).valid


def test_redirections_are_followed_and_what_they_lead_to_is_checked(
    web: str, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to(name: str | None) -> None:
        def elsewhere(path: str) -> str | None:
            old = path.startswith("/old/")
            return (name or path.replace("/old/", "/store/", 1)) if old else None

        monkeypatch.setattr(RangeHandler, "redirect", staticmethod(elsewhere))

    old = web.removesuffix("store") + "old"
    to(None)
    same_as_local(Cache.open(old), cache)
    remote = Cache.open(old)
    to("/store/zarr.json")  # as a page to log in would be
    with pytest.raises(StoreError, match=f"^{old} is damaged in shard 0 of"):
        remote["vit/patch"].read([0], threads=1)
    with pytest.raises(StoreError, match=rf"^{old}/manifest\.json is not the manifest of"):
        Cache.open(old)
    to("/old/again")
    with pytest.raises(StoreError, match=rf"^{old}/manifest\.json could not be read"):
        Cache.open(old, storage={"retry_config": {"max_retries": 1, "backoff": QUICK}})
