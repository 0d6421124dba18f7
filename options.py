"""Options of a command: checked before Hydra runs it, composed, and as plain values.

Mistakes are answered with what is valid.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, first_line

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

CONFIGS = "preceptor.configs"
_MAY_BE_NULL = ("recipe.steps", "recipe.epochs", "recipe.images_a_step", "data.shards")
"""Options of a stated kind that may be left out. Alignments check their own; what needs images, its
images."""
_SIZE = re.compile(r"teachers\.[^.]+\.size")
"""Of a teacher: a side, [height, width], or null for the network's own; the teacher checks it."""
_HOME = re.compile(r"(?<=[=\[,:\s'\"])~(?=/)")
"""The user's folder, where a word of a command line or a part of a list begins with it."""
_MAY_BE_LISTS = ("align.write_back", "align.depths", "knn.k", "knn.temperature")
"""Options of a stated kind that take a list of that kind too."""


def check_options(name: str, options: Sequence[str]) -> None:
    """Refuse a mistyped key, group choice or value, naming the valid ones.

    Every value of a sweep is checked before its first job starts, and so are missing options and
    jobs that would write to the same place.

    Raises:
        ConfigError: with the option that is wrong and what would be right.
    """
    texts = [option for option in options if not option.startswith("-")]
    directories = config_directories(options)
    texts = [text for text in texts if text not in directories]
    for text in texts:
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(f"{text!r} is not an option; options are written key=value")
    overrides = [_parsed(text) for text in texts]
    several = [item.input_line for item in overrides if item.is_sweep_override()]
    if several and not {"-m", "--multirun"} & {*options}:
        raise ConfigError(
            f"{several[0]} is several values: say -m for a run with each; a list is written "
            "key=[a,b], and text with a comma key=\"'a,b'\""
        )
    with _Composer(name, _search(directories)) as composer:
        composer.check_launcher(overrides)
        own = [item for item in overrides if not item.key_or_group.startswith("hydra")]
        groups = [item for item in own if composer.is_group(item.key_or_group)]
        for item in groups:
            for choice in _values(item):
                options_there = composer.options(item.key_or_group)
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
            for choice in _values(group)
        ]
        for item in own:
            if item in groups:
                continue
            _check_value(item, swept or [base])
        _check_whole(own, composer)


def _parsed(text: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(
            f"{text} cannot be read ({first_line(error)}): text with signs such as = ( # ~ , is "
            "quoted for the shell and once more, as in key=\"'a=b'\""
        ) from None


def compose_options(name: str, options: Sequence[str]) -> DictConfig:
    """The configuration that a command would be given, after `check_options`.

    Raises:
        ConfigError: an option is wrong.
    """
    check_options(name, options)
    directories = config_directories(options)
    with _Composer(name, _search(directories)) as composer:
        return composer.compose(
            [text for text in options if not text.startswith("-") and text not in directories]
        )


def plain(config: Any) -> Any:
    """A configuration, or a part of one, as plain containers; another value as it is."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def _search(directories: Sequence[str]) -> list[str]:
    if not directories:
        return []
    paths = ",".join(f"file://{os.path.abspath(path)}" for path in directories)
    return [f"hydra.searchpath=[{paths}]"]


class _Composer:
    """Hydra's composition of one verb's configuration, without running anything."""

    def __init__(self, name: str, search: list[str]) -> None:
        self._name, self._search = name, search

    def __enter__(self) -> _Composer:
        from hydra import initialize_config_module
        from hydra.core.global_hydra import GlobalHydra

        # A command that composes others runs under Hydra itself.
        self._outer = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        self._context = initialize_config_module(CONFIGS, version_base="1.3")
        self._context.__enter__()
        hydra = GlobalHydra.instance().hydra
        if hydra is None:
            raise RuntimeError("Hydra did not initialise")
        self._loader = hydra.config_loader
        if self._search:
            # Only a composition makes Hydra read the extra search path.
            self.compose([])
        return self

    def __exit__(self, *error: object) -> None:
        from hydra.core.global_hydra import GlobalHydra

        self._context.__exit__(*error)
        if self._outer is not None:
            GlobalHydra.instance().initialize(self._outer)

    def compose(self, overrides: Iterable[str]) -> DictConfig:
        from hydra import compose
        from hydra.errors import HydraException

        try:
            return compose(self._name, [*self._search, *overrides])
        except HydraException as error:
            line = first_line(error)
            if found := re.fullmatch(r"Could not override '(\w+)'\.?", line):
                group = found[1]
                line = (
                    f"{group} is one of {', '.join(self.options(group))} here; write options of "
                    f"your own to DIR/{group}/mine.yaml and say --config-dir DIR {group}=mine"
                )
            raise ConfigError(line) from None

    def check_launcher(self, overrides: Sequence[Override]) -> None:
        """Refuse a launcher of jobs that is not installed."""
        for item in overrides:
            if item.key_or_group == "hydra/launcher":
                there, chosen = self.options("hydra/launcher"), str(item.value())
                if chosen not in there:
                    raise ConfigError(
                        f"hydra/launcher={chosen}: no such launcher is installed; there are "
                        f"{', '.join(there)}; pip install 'preceptor[launchers]' brings joblib and "
                        "submitit_slurm, hydra-ray-launcher ray"
                    )

    def is_group(self, key: str) -> bool:
        return bool(self.options(key))

    def options(self, group: str) -> list[str]:
        found = set(self._loader.get_group_options(group))
        for directory in self._directories():
            folder = os.path.join(directory, group)
            if os.path.isdir(folder):
                found |= {f[:-5] for f in os.listdir(folder) if f.endswith(".yaml")}
        return sorted(found)

    def _directories(self) -> list[str]:
        text = self._search[0].split("=", 1)[1].strip("[]") if self._search else ""
        return [path.removeprefix("file://") for path in text.split(",") if path]


def _check_value(item: Override, variants: Sequence[DictConfig]) -> None:
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
                prefix = f"{where}." if where else ""
                raise ConfigError(
                    f"there is no option {key!r}{closest(part, there, prefix)}; valid "
                    f"{'under ' + where if where else 'options'} are: "
                    f"{', '.join(prefix + k for k in there) or 'none'}"
                )
            node = node._get_node(part)
        default = None if isinstance(node, Container) else node._value()
        for value in _values(item):
            if isinstance(node, DictConfig) and isinstance(value, dict):
                _check_parts(key, node, value)
            if isinstance(node, ListConfig):
                default = list(node)
                expected = _mismatch_of_list(default, value)
            elif isinstance(value, list) and key in _MAY_BE_LISTS:
                expected = _mismatch_of_list([default], value)
            else:
                expected = _mismatch(default, value)
            if value is None and not (key in _MAY_BE_NULL or key.startswith("align.")):
                expected = expected or _kind(default)
            if _SIZE.fullmatch(key) and (value is None or isinstance(value, list)):
                expected = None
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
            raise ConfigError(
                f"{key} has no {part!r}{closest(part, there)}; it has "
                f"{', '.join(there) or 'none'}. '+{key}.{part}=...' adds it, '~{key}.NAME' takes "
                "one away"
            )


def _check_whole(overrides: Sequence[Override], composer: _Composer) -> None:
    """Refuse options that are still missing and sweeps whose jobs would overwrite each other."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    fixed = [str(item.input_line) for item in overrides if not item.is_sweep_override()]
    swept = [item for item in overrides if item.is_sweep_override() and item.is_choice_sweep()]
    outputs: dict[str, str] = {}
    for values in itertools.product(*(item.sweep_string_iterator() for item in swept)):
        chosen = [f"{i.key_or_group}={v}" for i, v in zip(swept, values, strict=True)]
        config = composer.compose([*fixed, *chosen])
        try:
            missing, out = sorted(OmegaConf.missing_keys(config)), config.get("out")
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
                f"put what differs into the name, such as out='{out}-${{{swept[-1].key_or_group}}}'"
            )
        outputs[out] = job


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


def _values(item: Override) -> list[Any]:
    if item.is_delete():
        return []
    if item.is_sweep_override() and item.is_choice_sweep():
        return [value for value in item.sweep_iterator()]
    if item.is_sweep_override():
        return []
    return [item.value()]


def readable(options: Sequence[str]) -> list[str]:
    """Options as Hydra reads them: flags before key=value pairs, and ranges of shards quoted.

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
            pairs.append(f"{key}='{value}'" if bare and {"{", "*"} & set(value) else option)
            continue
        flags.append(option)
        if option in ("--config-dir", "-cd"):
            flags += itertools.islice(rest, 1)
    return [*flags, *pairs]


def config_directories(options: Sequence[str]) -> list[str]:
    """The folders of configuration groups that a command was given.

    Raises:
        ConfigError: one is not there.
    """
    found = []
    for position, option in enumerate(options):
        if option in ("--config-dir", "-cd"):
            if position + 1 == len(options):
                raise ConfigError(f"{option} needs a folder of configuration groups")
            found.append(options[position + 1])
        elif option.startswith("--config-dir="):
            found.append(option.split("=", 1)[1])
    for path in found:
        if not os.path.isdir(path):
            raise ConfigError(f"--config-dir {path}: there is no such folder")
    return found


def closest(word: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""
