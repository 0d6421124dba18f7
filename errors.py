"""The exceptions that are meant for people to read, and what their messages are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def first_line(error: BaseException) -> str:
    """The first line of another library's error, for a message; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:300] if lines else type(error).__name__


def first_sentence(error: BaseException) -> str:
    """The first sentence of another library's error: hubs say a great deal in one line."""
    return first_line(error).split(". ")[0].rstrip(".")[:200]


def counted(number: int, noun: str) -> str:
    """``1 row``, ``1,024 rows``: a number with a noun that takes an s."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def closest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the most similar known ones, or all if few."""
    known = list(known)
    similar = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    if similar:
        return f"; similar: {', '.join(similar)}"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 20 else ""


class PreceptorError(Exception):
    """A bad input or a damaged store, told in one sentence.

    The message names what is wrong and where (file, shard, key, option) and says what to do. The
    command line prints it and exits with status 1; all else is a bug and keeps its traceback.
    """


class PreceptorWarning(UserWarning):
    """Something that a user should know and that stops nothing; the command line prints it."""


class DataError(PreceptorError):
    """An image source is missing, unreadable, or not what the store was made from."""


class DamagedImageError(DataError):
    """The bytes of an image were read, and are none that can be decoded."""


class StoreError(PreceptorError):
    """A store is incomplete, damaged, or made by another configuration."""


class TeacherError(PreceptorError):
    """A teacher cannot be found, loaded, or asked for the space that was named."""


class ConfigError(PreceptorError):
    """An option has a value that cannot be used."""


class TrainingError(PreceptorError):
    """A training run cannot go on."""


class ExportError(PreceptorError):
    """A student cannot be written in a form, or the form does not compute what the student does."""
