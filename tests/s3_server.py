"""moto's S3 server, which can be told to misbehave, and what reads from it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

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


def environment(endpoint: str) -> dict[str, str]:
    """The same by variables, as commands are told it."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }


@contextlib.contextmanager
def serving(application: Any) -> Iterator[str]:
    """A WSGI application on a port of this machine; its address."""
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def moody_s3() -> Iterator[tuple[Moody, str]]:
    """An S3 server without buckets, and its endpoint."""
    moody = Moody(DomainDispatcherApplication(create_backend_app))
    with serving(moody) as endpoint:
        yield moody, endpoint
