"""What a run cost, read from the operating system."""

from __future__ import annotations

import resource
import sys


def peak_memory_mb() -> float:
    """Largest resident memory of this process or of one finished child, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(own, children) / unit
