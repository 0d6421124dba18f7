"""Ranged reads of a store in object storage or behind a web server, through obstore.

obstore itself retries server errors, dropped connections and timeouts with growing pauses; what is
read is checked like anything else, so a wrong answer is refused, not used.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..errors import StoreError, first_line
from .source import Source

SCHEMES = ("s3", "gs", "az", "http", "https")
_ATTEMPTS = 3  # of whole requests whose answer broke off, on top of obstore's own retries
_PATIENCE = 30.0  # seconds after which obstore's own retries were enough


@dataclass(frozen=True)
class Facts:
    """What a server tells of an object.

    Attributes:
        size: in bytes.
        modified: when it was changed last, in nanoseconds since 1970.
        tag: names its version (ETag); None where the server gives none.
    """

    size: int
    modified: int
    tag: str | None


class RemoteSource(Source):
    """A store at an address.

    Args:
        location: ``s3://bucket/path``, ``gs://...``, ``az://...``, ``http(s)://...``.
        options: keyword arguments of ``obstore.store.from_url``: ``config`` (region, endpoint,
            credentials), ``client_options`` (timeout, proxy, ...), ``retry_config``. Credentials
            and endpoints also come from the usual environment variables. ``client_options`` has
            ``allow_http`` where the address itself begins with ``http://``.
    """

    parallel = 16

    def __init__(self, location: str, options: Mapping[str, Any] | None = None) -> None:
        self.location = location
        self._options = dict(options or {})
        try:
            from obstore.store import from_url
        except ImportError:
            raise StoreError(
                f"{location}: reading from there needs obstore: pip install 'preceptor[remote]'"
            ) from None
        try:
            self._store = from_url(location.rstrip("/"), **self._with_http())
        except (ValueError, TypeError, self._errors()) as error:
            raise StoreError(
                f"{location} cannot be opened: {first_line(error)}; check the address, and the "
                "account and credentials in the options or the environment"
            ) from None

    def _with_http(self) -> dict[str, Any]:
        if not self.location.startswith("http://"):
            return self._options
        given = self._options.get("client_options") or {}
        return {**self._options, "client_options": {"allow_http": True, **given}}

    @staticmethod
    def _errors() -> type[Exception]:
        from obstore.exceptions import BaseError

        return BaseError

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        RemoteSource.__init__(self, **state)

    def read(self, name: str) -> bytes:
        import obstore

        return self._patiently(name, lambda: bytes(obstore.get(self._store, name).bytes()))

    def read_many(self, names: Iterable[str]) -> list[bytes | None]:
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self.read_or_none, names))

    def read_into(self, name: str, offset: int, buffers: Sequence[Any]) -> int:
        import obstore

        views = [memoryview(buffer).cast("B") for buffer in buffers]
        length = sum(len(view) for view in views)
        answer = self._patiently(
            name, lambda: obstore.get_range(self._store, name, start=offset, length=length)
        )
        raw = memoryview(answer)
        at = 0
        for view in views:
            part = raw[at : at + len(view)]
            view[: len(part)] = part
            at += len(part)
        return at

    def facts(self, name: str) -> Facts:
        """The size and version of an object.

        Raises:
            FileNotFoundError: there is no such object.
            StoreError: no good answer.
        """
        import obstore

        found = self._patiently(name, lambda: obstore.head(self._store, name))
        modified = round(found["last_modified"].timestamp()) * 10**9
        return Facts(int(found["size"]), modified, found["e_tag"])

    def read_range(self, name: str, offset: int, size: int, tag: str | None) -> bytes:
        """Bytes of an object from one position on; fewer where it ends.

        Args:
            tag: of the version that is wanted; None, or a weak one: whichever is there.

        Raises:
            FileNotFoundError: there is no such object.
            StoreError: it is of another version, or no good answer.
        """
        import obstore

        options: Any = {"range": (offset, offset + size)}
        if tag is not None and not tag.startswith("W/"):  # which match nothing: RFC 9110, 13.1.1
            options["if_match"] = tag
        return self._patiently(
            name, lambda: bytes(obstore.get(self._store, name, options=options).bytes())
        )

    def sizes(self, directory: str) -> dict[str, int] | None:
        import obstore

        if self.location.startswith("http"):
            return None  # web servers have no common way to list
        prefix = f"{directory}/"

        def listed() -> dict[str, int]:
            pages = obstore.list(self._store, prefix)
            found = {str(entry["path"]): int(entry["size"]) for page in pages for entry in page}
            names = {path.rpartition(prefix)[2]: size for path, size in found.items()}
            return {name: size for name, size in names.items() if "/" not in name}

        return self._patiently(directory, listed)

    def _patiently(self, name: str, request: Any) -> Any:
        """The answer to a request, tried again where it broke off.

        Raises:
            FileNotFoundError: there is no such object.
            StoreError: no good answer.
        """
        from obstore.exceptions import (
            NotSupportedError,
            PermissionDeniedError,
            PreconditionError,
            UnauthenticatedError,
        )

        started, attempts = time.monotonic(), 0
        while True:
            attempts += 1
            try:
                return request()
            except FileNotFoundError:
                raise
            except PreconditionError as error:
                raise StoreError(
                    f"{self.location}/{name} has changed since it was listed; run the command again"
                ) from error
            except NotSupportedError as error:
                raise StoreError(
                    f"{self.location}/{name} cannot be read in parts: {first_line(error)}; copy it "
                    "here, or to a server that gives ranges of files"
                ) from error
            except (PermissionDeniedError, UnauthenticatedError) as error:
                raise StoreError(
                    f"{self.location}/{name} may not be read: {first_line(error)}; check the "
                    "credentials in the options or the environment"
                ) from error
            except (OSError, self._errors()) as error:
                if attempts < _ATTEMPTS and time.monotonic() - started < _PATIENCE:
                    continue
                raise StoreError(
                    f"{self.location}/{name} could not be read after {attempts} "
                    f"attempt{'s' if attempts > 1 else ''}: "
                    f"{first_line(error)}; check the address, the credentials and the network"
                ) from error
