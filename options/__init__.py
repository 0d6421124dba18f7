"""Options of a command: checked before Hydra runs it, composed, and as plain values.

Mistakes are answered with what is valid.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, first_line
from .composition import Composer
from .names import CONFIGS, check_key, check_keys, check_removal, closest
from .values import check_value, values_of

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

_HOME = re.compile(r"(?<=[=\[,:\s'\"])~(?=/)")
"""The user's folder, where a word of a command line or a part of a list begins with it."""

_DIRECTORY = ("--config-dir", "-cd")
_FLAGS = ("-m", "--multirun")
"""Flags that stand alone; beside them ``--config-dir``, and ``--help`` before all."""

_WRITTEN = {"extract": "cache"}
"""The option that says where a command writes, if it is not ``out``."""

__all__ = [
    "CONFIGS",
    "check_options",
    "closest",
    "compose_options",
    "config_directories",
    "from_home",
    "plain",
    "readable",
]


def check_options(name: str, options: Sequence[str]) -> None:
    """Refuse a mistyped key, group choice or value, naming the valid ones.

    Every value of a sweep is checked before its first job starts, and so are missing options and
    jobs that would write to the same place.

    Raises:
        ConfigError: with the option that is wrong and what would be right.
    """
    with _composer(name, options) as composer:
        _check(composer, options)


def _composer(name: str, options: Sequence[str]) -> Composer:
    """Of a command and its folders of groups; unknown flags are refused."""
    for flag in (option for option in options if option.startswith("-")):
        if flag.partition("=")[0] not in (*_FLAGS, *_DIRECTORY):
            raise ConfigError(
                f"there is no flag {flag}{closest(flag, ('--help', '--multirun', *_DIRECTORY))}; "
                "there are --help, -m (a run with each of several values) and --config-dir"
            )
    return Composer(name, config_directories(options))


def _texts(options: Sequence[str]) -> list[str]:
    """Options without the flags and their folders."""
    directories = config_directories(options)
    return [text for text in options if not text.startswith("-") and text not in directories]


def _check(composer: Composer, options: Sequence[str]) -> None:
    texts = _texts(options)
    for text in texts:
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(f"{text!r} is not an option; options are written key=value")
    overrides = [_parsed(text) for text in texts]
    _check_once(overrides)
    several = [item.input_line for item in overrides if item.is_sweep_override()]
    if several and not {"-m", "--multirun"} & {*options}:
        raise ConfigError(
            f"{several[0]} is several values: say -m for a run with each; a list is written "
            "key=[a,b], and text with a comma key=\"'a,b'\""
        )
    composer.check_launcher(overrides)
    own = [item for item in overrides if not item.key_or_group.startswith("hydra")]
    for item in own:
        check_key(composer.name, item.key_or_group)
        if item.is_delete():
            check_removal(item.key_or_group)
    groups = [item for item in own if composer.is_group(item.key_or_group)]
    for item in groups:
        for choice in values_of(item):
            options_there = composer.options(item.key_or_group)
            if choice is None:
                raise ConfigError(
                    f"{item.key_or_group}=null: choose one of {', '.join(options_there)}"
                )
            if isinstance(choice, str) and choice not in options_there:
                raise ConfigError(
                    f"{item.key_or_group}={choice}: there is no such choice"
                    f"{closest(choice, options_there)}; valid are {', '.join(options_there)}"
                )
    # One composition for every value of every swept group, since groups bring their own keys.
    fixed = [str(item.input_line) for item in groups if not item.is_sweep_override()]
    base = composer.compose(fixed)
    swept = [
        composer.compose([*fixed, f"{group.key_or_group}={choice}"])
        for group in groups
        if group.is_sweep_override()
        for choice in values_of(group)
    ]
    removed = [item.key_or_group for item in own if item.is_delete()]
    for item in own:
        if item not in groups:
            check_value(item, swept or [base], removed)
    sources = {item.key_or_group: str(item.input_line) for item in groups}
    _check_whole(own, composer, sources)


def _check_once(overrides: Sequence[Override]) -> None:
    """Refuse shards that are given several times: of others the last counts, as Hydra has it, but
    these are what a shell makes of a range without quotes."""
    keys = [item.key_or_group for item in overrides]
    for key in dict.fromkeys(keys):
        if key.rpartition(".")[2] == "shards" and keys.count(key) > 1:
            raise ConfigError(
                f"{key} is given {keys.count(key)} times: a range is quoted, {key}='x-{{000..146}}"
                f".tar', since the shell takes braces apart; several are a list, {key}=[a,b]"
            )


def _parsed(text: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(
            f"{text} cannot be read ({first_line(error)}): text with signs such as = ( # ~ , or "
            "letters with accents is quoted for the shell and once more, as in key=\"'a=b'\""
        ) from None


def compose_options(name: str, options: Sequence[str]) -> DictConfig:
    """The configuration that a command would be given, after `check_options`.

    Raises:
        ConfigError: an option is wrong.
    """
    with _composer(name, options) as composer:
        _check(composer, options)
        return from_home(composer.compose(_texts(options)))


def from_home(config: DictConfig) -> DictConfig:
    """The same configuration, its texts that begin with ~/ as paths of the user's folder.

    On a command line `readable` has done so, files have them still.
    """
    from omegaconf import DictConfig, ListConfig, OmegaConf

    def expand(node: Any) -> None:
        for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
            if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
                continue
            value = node[key]
            if isinstance(value, DictConfig | ListConfig):
                expand(value)
            elif isinstance(value, str) and value.startswith("~/"):
                node[key] = os.path.expanduser(value)

    expand(config)
    return config


def plain(config: Any) -> Any:
    """A configuration, or a part of one, as plain containers; another value as it is."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def _check_whole(
    overrides: Sequence[Override], composer: Composer, sources: Mapping[str, str]
) -> None:
    """Refuse options that nothing reads, that are still missing, and sweeps whose jobs would
    overwrite each other.

    Args:
        sources: see `names.check_keys`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    fixed = [str(item.input_line) for item in overrides if not item.is_sweep_override()]
    swept = [item for item in overrides if item.is_sweep_override() and item.is_choice_sweep()]
    written = _WRITTEN.get(composer.name, "out")
    outputs: dict[str, str] = {}
    for values in itertools.product(*(item.sweep_string_iterator() for item in swept)):
        chosen = [f"{i.key_or_group}={v}" for i, v in zip(swept, values, strict=True)]
        config = composer.compose([*fixed, *chosen])
        check_keys(composer.name, OmegaConf.to_container(config, resolve=False), sources)  # type: ignore[arg-type]
        try:
            missing = sorted(OmegaConf.missing_keys(config))
            out: Any = None if written in missing else config.get(written)
        except OmegaConfBaseException as error:
            raise ConfigError(
                f"an option refers to what is not there: {first_line(error)}"
            ) from None
        if missing:
            raise ConfigError(
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} required: say "
                f"{' '.join(f'{key}=...' for key in missing)}"
            )
        job = " ".join(chosen)
        if out is not None and out in outputs:
            raise ConfigError(
                f"the jobs {outputs[out]!r} and {job!r} of the sweep would both write to {out}; "
                "put what differs into the name, such as "
                f"{written}='{out}-${{{swept[-1].key_or_group}}}'"
            )
        outputs[out] = job


def readable(options: Sequence[str]) -> list[str]:
    """Options as Hydra reads them: flags before key=value pairs; ranges of shards, and letters
    beyond ASCII, quoted.

    The quotes of `data.shards='x-{000..146}.tar'` are taken off by the shell, and to Hydra bare
    braces are a dictionary. ~/ is the user's folder, which a shell leaves alone within a word.
    """
    flags: list[str] = []
    pairs: list[str] = []
    home = os.path.expanduser("~")
    rest = (_HOME.sub(lambda _: home, option) for option in options)
    for option in rest:
        if not option.startswith("-"):
            key, _, value = option.partition("=")
            bare = value[:1] not in ("", "{", "[", "'", '"') and not {"$", "(", "'"} & set(value)
            foreign = not value.isascii() and "," not in value  # letters that Hydra does not know
            quoted = bare and (foreign or {"{", "*"} & set(value))
            pairs.append(f"{key}='{value}'" if quoted else option)
            continue
        flags.append(option)
        if option in _DIRECTORY:
            flags += itertools.islice(rest, 1)
    return [*flags, *pairs]


def config_directories(options: Sequence[str]) -> list[str]:
    """The folders of configuration groups that a command was given.

    Raises:
        ConfigError: one is not there.
    """
    found = []
    for position, option in enumerate(options):
        if option in _DIRECTORY:
            if position + 1 == len(options):
                raise ConfigError(f"{option} needs a folder of configuration groups")
            found.append(options[position + 1])
        elif option.startswith("--config-dir="):
            found.append(option.split("=", 1)[1])
    for path in found:
        if not os.path.isdir(path):
            raise ConfigError(f"--config-dir {path}: there is no such folder")
    return found
