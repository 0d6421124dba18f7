"""Which options there are: the keys of this package's own files, whatever files a user adds."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

from ..errors import ConfigError

CONFIGS = "preceptor.configs"
_ANY = ("teachers", "tasks", "student.options", "recipe.optimizer_options")
"""Mappings to which keys of any name may be added; what reads them knows its own."""
_CHECKED_LATER = (*_ANY, "align")
"""Those whose keys are not known here: an alignment of the user's own has options of its own."""
_NEEDED = {
    "data": {"shards", "max_pixels"},
    "student": {"name", "model", "size"},
    "engine": {"accelerator", "devices", "num_nodes", "strategy", "precision", "channels_last"},
}
"""What a group's file must say; a recipe is checked where it is read."""
_ELSEWHERE = {
    ("train", "teachers"): (
        "the teachers were run when the store was made; align.spaces=[...] names those to learn"
    ),
}
"""Options that another command has, and what does here what is meant."""


def check_key(verb: str, key: str) -> None:
    """Refuse an option whose first part the command does not have.

    Raises:
        ConfigError: with the closest that there is.
    """
    first = key.split(".")[0]
    if first not in (known := _known(verb)):
        if (verb, first) in _ELSEWHERE:
            raise ConfigError(f"{verb} has no option {first!r}: {_ELSEWHERE[verb, first]}")
        raise no_such_option(first, known)


def check_keys(verb: str, config: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Refuse what a composed configuration has and nothing reads, and what it lacks.

    Args:
        config: plain containers.
        sources: the file that each group was chosen from, as the user wrote it, by group.

    Raises:
        ConfigError: names the option, and the closest that there is.
    """
    if found := next(_unknown(config, _known(verb)), None):
        key, there = found
        group = key.split(".")[0]
        raise no_such_option(key, there, f" (in {sources[group]})" if group in sources else "")
    for group, needed in _NEEDED.items():
        part = config.get(group)
        if isinstance(part, Mapping) and (lacking := sorted(needed - set(part))):
            raise ConfigError(
                f"{sources.get(group, group)} lacks {', '.join(lacking)}: let its file begin with "
                f"the options of another, 'defaults: [{_choices(group)[0]}, _self_]'"
            )


def check_removal(key: str) -> None:
    """Refuse to take away an option that what reads it needs.

    Raises:
        ConfigError: says so.
    """
    if not takes_any(key.rpartition(".")[0]):
        raise ConfigError(
            f"~{key}: this option has a value and cannot be taken away; ~ takes away teachers, "
            "their spaces, tasks, and options that are passed on to timm"
        )


def no_such_option(key: str, there: Collection[str], more: str = "") -> ConfigError:
    """What to tell of an option that is not there.

    Args:
        there: names beside it, without those of the groups above.
        more: what else to say of it.
    """
    where, _, name = key.rpartition(".")
    prefix = f"{where}." if where else ""
    return ConfigError(
        f"there is no option {key!r}{closest(name, there, prefix)}{more}; valid "
        f"{'under ' + where if where else 'options'} are: "
        f"{', '.join(prefix + option for option in there) or 'none'}"
    )


def takes_any(key: str) -> bool:
    """Whether an option is a mapping, or within one, to which keys of any name may be added."""
    return any(f"{key}.".startswith(f"{path}.") for path in _ANY)


def closest(word: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def _unknown(
    config: Mapping[str, Any], known: Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, list[str]]]:
    for name, value in config.items():
        key = f"{path}{name}"
        if name not in known:
            yield key, list(known)
        elif (
            key not in _CHECKED_LATER
            and isinstance(value, Mapping)
            and isinstance(known[name], Mapping)
        ):
            yield from _unknown(value, known[name], f"{key}.")


@cache
def _known(verb: str) -> dict[str, Any]:
    """Every option of a command with some default, those of all choices of its groups as well."""
    tree = _read(f"{verb}.yaml")
    groups = [
        str(name)
        for entry in tree.pop("defaults")
        if isinstance(entry, dict)
        for name in entry
        if not str(name).startswith("override ")
    ]
    tree.pop("hydra")
    for group in groups:
        for choice in _choices(group):
            options = _read(f"{group}/{choice}.yaml")
            options.pop("defaults", None)
            tree[group] = _merged(tree.get(group) or {}, options)
    return tree


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The keys of both; None where one of them has it: what may be null may have any parts."""
    found = {**one, **other}
    for key in one.keys() & other.keys():
        if isinstance(one[key], dict) and isinstance(other[key], dict):
            found[key] = _merged(one[key], other[key])
        elif one[key] is None:
            found[key] = None
    return found


def _choices(group: str) -> list[str]:
    folder = resources.files(CONFIGS) / group
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))


def _read(name: str) -> dict[str, Any]:
    import yaml

    text = (resources.files(CONFIGS) / name).read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found
