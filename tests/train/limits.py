"""Limits of the system that tests set for a while."""

from __future__ import annotations

import contextlib
import resource


@contextlib.contextmanager
def largest_file(size: int):
    """Files cannot grow beyond so many bytes: the kernel refuses, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
