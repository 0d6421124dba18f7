"""Whether the value of an option is of the kind that it takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .names import closest, no_such_option, takes_any

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

_MAY_BE_NULL = ("recipe.steps", "recipe.epochs", "recipe.images_a_step", "data.shards")
"""Options of a stated kind that may be left out. Alignments check their own; what needs images, its
images."""
_SIZE = re.compile(r"teachers\.[^.]+\.size|student\.size")
"""A side or [height, width], which is checked where it is used; of a teacher also null."""
_MAY_BE_LISTS = ("align.write_back", "align.depths", "knn.k", "knn.temperature")
"""Options of a stated kind that take a list of that kind too."""


def check_value(item: Override, variants: Sequence[DictConfig], removed: Sequence[str]) -> None:
    """Refuse a value of the wrong kind, and one for an option that is not there.

    Args:
        variants: what the option would change, for every choice of the groups that are swept.
        removed: options that are taken away.

    Raises:
        ConfigError: with what was expected.
    """
    from omegaconf import Container, DictConfig, ListConfig, OmegaConf

    key = item.key_or_group
    if item.is_force_add():
        return
    if item.is_add():
        if any(OmegaConf.select(config, key) is not None for config in variants):
            raise ConfigError(f"there is an option {key}: write it without the +")
        return
    for config in variants:
        node: Any = config
        for depth, part in enumerate(key.split(".")):
            if not isinstance(node, DictConfig) or part not in list(node.keys()):
                where = ".".join(key.split(".")[:depth])
                there = [str(k) for k in node] if isinstance(node, DictConfig) else []
                unset = not isinstance(node, Container) and node._value() is None
                asked = f"{where}.{part}".removeprefix(".")
                may_be = where and (unset or takes_any(where)) and not item.is_delete()
                raise no_such_option(asked, there, f": '+{key}=...' adds it" if may_be else "")
            node = node._get_node(part)
        default = None if isinstance(node, Container) else node._value()
        for value in values_of(item):
            if getattr(value, "text", value) == "" != default:
                raise ConfigError(f"{key}= is empty: say a value, or null where there may be none")
            if isinstance(node, DictConfig) and isinstance(value, dict):
                _check_parts(key, node, value)
                _check_spaces(key.split("."), node, value, removed)
            if isinstance(node, ListConfig):
                default = list(node)
                expected = _mismatch_of_list(default, value)
            elif isinstance(value, list) and key in _MAY_BE_LISTS:
                expected = _mismatch_of_list([default], value)
            else:
                expected = _mismatch(default, value)
            if value is None and not (key in _MAY_BE_NULL or key.startswith("align.")):
                expected = expected or _kind(default)
            if _SIZE.fullmatch(key) and (isinstance(value, list) or value is None):
                expected = None if value is not None or key.startswith("teachers.") else expected
            if key == "seed" and type(value) is int and value < 0:
                expected = "a number from 0 up"
            if expected:
                such = "" if default == "???" else f", such as the default {default!r}"
                given = "null" if value is None else value
                raise ConfigError(f"{key}={given}: expected {expected}{such}")


def _check_parts(key: str, node: DictConfig, value: dict[Any, Any]) -> None:
    """Refuse parts of a mapping that it does not have: Hydra would merge, and says only that."""
    there = [str(part) for part in node]
    for part in map(str, value):
        if part not in there and node._get_flag("struct"):
            change = f". '+{key}.{part}=...' adds it, '~{key}.NAME' takes one away"
            raise ConfigError(
                f"{key} has no {part!r}{closest(part, there)}; it has "
                f"{', '.join(there) or 'none'}{change if takes_any(key) else ''}"
            )


def _check_spaces(
    path: list[str], node: DictConfig, value: dict[Any, Any], removed: Sequence[str]
) -> None:
    """Refuse the spaces of a teacher in place of others: Hydra would add them, and keep the others.

    Args:
        path: of the mapping that is written in place: of teachers, of one, or of its spaces.
    """
    if path[0] != "teachers" or len(path) > 3:
        return
    if len(path) < 3:
        for name, part in value.items():
            if isinstance(part, dict) and name in node:
                _check_spaces([*path, str(name)], node[name], part, removed)
    elif path[2] == "spaces":
        key = ".".join(path)
        kept = [s for s in map(str, node) if s not in value and f"{key}.{s}" not in removed]
        if kept:
            raise ConfigError(
                f"{key}={{...}} would keep {', '.join(kept)}, for mappings are merged: say "
                f"{' '.join(f'~{key}.{space}' for space in kept)} to leave "
                f"{'it' if len(kept) == 1 else 'them'} out"
            )


def _mismatch(default: Any, value: Any) -> str | None:
    """What was expected, when `value` is not of the kind of the option's default."""
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):
        value = value.text
    expected = _kind(default)
    if value is None or expected is None:
        return None
    if default == "???":
        return None if isinstance(value, str | list) else expected
    if isinstance(value, str) and value.startswith("${"):
        return None
    if isinstance(default, bool):
        return None if isinstance(value, bool) else expected
    kind = int if isinstance(default, int) else int | float
    return None if isinstance(value, kind) and not isinstance(value, bool) else expected


def _mismatch_of_list(default: list[Any], value: Any) -> str | None:
    """What was expected, when `value` is no list, or has a part that is not of `default`'s kind.

    Text is left to what reads it: ``protocols=all``, and parts that refer to other options.
    """
    if value is None or isinstance(value, int | float):
        return "a list"
    if not isinstance(value, list) or not default:
        return None
    kind = _kind(default[0])
    if kind and any(part is None or _mismatch(default[0], part) for part in value):
        return f"a list of {kind.removeprefix('a ')}s"
    return None


def _kind(default: Any) -> str | None:
    """What an option of this default takes; None where that may be many things."""
    if default == "???":  # a path or a name, or several paths
        return "text (a number in quotes: \"'7'\")"
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, int):
        return "a whole number"
    return "a number" if isinstance(default, float) else None


def values_of(item: Override) -> list[Any]:
    if item.is_delete():
        return []
    if item.is_sweep_override() and item.is_choice_sweep():
        return [value for value in item.sweep_iterator()]
    if item.is_sweep_override():
        return []
    return [item.value()]
