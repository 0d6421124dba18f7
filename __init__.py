"""preceptor: cache many vision teachers once; train students many times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .cache import Cache
    from .kernels import cross_attention

__all__ = ["Cache", "__version__", "cross_attention"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, so the public names are resolved on first use.
    if name == "Cache":
        from .cache import Cache

        return Cache
    if name == "cross_attention":
        from .kernels import cross_attention

        return cross_attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
