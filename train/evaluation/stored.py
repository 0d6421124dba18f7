"""Frozen features of a store's images, of their teachers from the store."""

from __future__ import annotations

from torch import Tensor

from ...cache import Cache
from ...progress import ProgressLine
from ..alignment.base import descriptor_spaces
from .base import Array
from .feature_cache import FeatureCache
from .features import MAP, LabelledRows, Room, in_memory, quarters

_ROWS = 1024  # that are decoded at once


def descriptors(cache: Cache) -> dict[str, str]:
    """Label of each teacher's descriptor -> the space whose token mean it is.

    A teacher without a global space is described by its last grid, as alignments learn it.
    """
    return descriptor_spaces({name: cache[name].spec for name in cache.spaces})


def space_features(
    images: LabelledRows, space: str, readout: str, kept: FeatureCache | None = None
) -> Array:
    """Tokens of a space in the teacher's own units, as the store holds them.

    Args:
        readout: ``mean`` of the tokens [n, D], ``spatial`` (see `quarters`) [n, 4 D], or ``map``,
            the tokens themselves [n, N, D].
        kept: where the result is kept, and mapped from. None holds it in memory.
    """
    source = images.cache[space]
    identity = {**images.teacher_identity(source.spec.teacher), "space": space, "readout": readout}
    # Of maps the store itself is where they are kept, and takes less room.
    keeps = kept is not None and readout != MAP
    if kept is not None and keeps and (found := kept.get(identity, len(images.rows))) is not None:
        return found
    grid = source.spec.grid

    def reduced(tokens: Tensor) -> Tensor:
        if readout == "mean":
            return tokens.mean(1)
        if readout == "spatial":
            assert grid is not None
            return quarters(tokens, grid)
        return tokens

    room: Room = in_memory if kept is None else kept.room
    features: Array | None = None
    with ProgressLine(f"{space}, {readout}", len(images.rows), "images") as line:
        for start in range(0, len(images.rows), _ROWS):
            rows = images.rows[start : start + _ROWS]
            part = reduced(source.decode(source.read(rows))).float().cpu().numpy()
            if features is None:
                features = room((len(images.rows), *part.shape[1:]))
            features[start : start + len(part)] = part
            line.advance(len(part))
    assert features is not None
    if kept is None or not keeps:
        return features
    kept.put(identity, features)
    return kept.read(identity, len(images.rows))
