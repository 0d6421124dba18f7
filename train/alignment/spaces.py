"""The spaces that an alignment learns: what it knows of one, and which are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...errors import ConfigError

Grid = tuple[int, int]


class SpaceTarget(Protocol):
    """What an alignment needs to know of a space; ``cache.SpaceSpec`` is one."""

    @property
    def teacher(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def grid(self) -> Grid | None: ...


@dataclass(frozen=True)
class Space:
    """The plainest `SpaceTarget`."""

    teacher: str
    tokens: int
    dim: int
    grid: Grid | None


def module_key(space: str) -> str:
    """A space's name as a key of `nn.ModuleDict`, which takes no dots."""
    return space.replace(".", "_dot_")


def select_spaces(
    available: Mapping[str, SpaceTarget], wanted: Sequence[str] | None, where: str = "the store"
) -> dict[str, SpaceTarget]:
    """The spaces that a configuration asks for; all that there are where it names none.

    A name may be a space (``dinov2_b/patch``) or a teacher (``dinov2_b``: all of its spaces).

    Raises:
        ConfigError: a name is neither; the message lists what is there.
    """
    if wanted is None:
        return dict(available)
    chosen: dict[str, SpaceTarget] = {}
    for name in wanted:
        found = {key: space for key, space in available.items() if name in (key, space.teacher)}
        if not found:
            raise ConfigError(
                f"align.spaces names {name!r}, which {where} does not hold; there are "
                f"{', '.join(available) or 'none'}"
            )
        chosen |= found
    return chosen


def descriptor_spaces(spaces: Mapping[str, SpaceTarget]) -> dict[str, str]:
    """Label of each teacher's descriptor -> the space whose token mean it is.

    A global space stands for itself; a teacher without one is given the label ``SPACE:mean`` of its
    last dense space.
    """
    found = {name: name for name, space in spaces.items() if space.grid is None}
    with_own = {spaces[name].teacher for name in found}
    stand_ins: dict[str, str] = {}
    for name, space in spaces.items():
        if space.teacher not in with_own:
            stand_ins[space.teacher] = name  # the last one stays
    return found | {f"{name}:mean": name for name in stand_ins.values()}


def dense_spaces(spaces: Mapping[str, SpaceTarget]) -> dict[str, Grid]:
    """The spaces that have a grid, with it."""
    return {name: space.grid for name, space in spaces.items() if space.grid is not None}
