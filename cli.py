"""`preceptor VERB key=value ...`: finds the verb, checks its options, and runs it under Hydra.

Nothing heavy is imported before a verb is known to have good options, so that help and mistakes are
answered at once.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, PreceptorError
from .version import __version__

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

CONFIGS = "preceptor.configs"


@dataclass(frozen=True)
class Verb:
    """One command: what it does, the function `module:function` behind it, an example."""

    summary: str
    target: str
    example: str

    def run(self, config: DictConfig) -> object:
        """Import the function behind the verb and call it with the composed configuration."""
        module, function = self.target.split(":")
        return getattr(importlib.import_module(f"preceptor.{module}"), function)(config)


VERBS: dict[str, Verb] = {
    "extract": Verb(
        "run every teacher once over the images and write their tokens to a store",
        "extract.pipeline:extract",
        "preceptor extract data.shards='/data/in1k/train-{000000..001281}.tar' cache=/data/store",
    ),
    "info": Verb(
        "what a store holds, how faithful it is, and what it lacks",
        "cache.report:info",
        "preceptor info cache=/data/store picture=tokens.png",
    ),
    "verify": Verb(
        "read every file of a store against every checksum, and ask the teachers again",
        "extract.maintain:verify",
        "preceptor verify cache=/data/store teachers=imagenet_hub "
        "data.shards='/data/in1k/train-{000000..001281}.tar' sample=256",
    ),
    "repair": Verb(
        "extract again exactly the shards that verify named",
        "extract.maintain:repair",
        "preceptor repair cache=/data/store teachers=imagenet_hub "
        "data.shards='/data/in1k/train-{000000..001281}.tar'",
    ),
    "add": Verb(
        "add teachers to a store without touching the others",
        "extract.maintain:add",
        "preceptor add cache=/data/store 'teachers={dinov2_l: {source: "
        "timm:vit_large_patch14_dinov2}}' data.shards='/data/in1k/train-{000000..001281}.tar'",
    ),
    "drop": Verb(
        "remove a teacher from a store without touching the others",
        "extract.maintain:drop",
        "preceptor drop cache=/data/store teacher=dinov2_l",
    ),
    "convert": Verb(
        "write a store again with another encoding",
        "cache.convert:convert",
        "preceptor convert cache=/data/store out=/data/store-compact encoding=compact",
    ),
    "train": Verb(
        "train a student from a store",
        "train.loop:train",
        "preceptor train cache=/data/store data.shards='/data/in1k/train-{000000..001281}.tar' "
        "student=resnet50 align=model_token seed=1",
    ),
    "eval": Verb(
        "k-NN and linear probes of students, teachers and the untrained floor",
        "train.evaluation.run:evaluate",
        "preceptor eval train.cache=/data/store test.cache=/data/store-val "
        "students=[outputs/train/resnet50-model_token-s1]",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"preceptor {__version__}")
        return 0
    name, options = arguments[0], arguments[1:]
    try:
        if name not in VERBS:
            raise ConfigError(
                f"there is no command {name!r}{_closest(name, VERBS)}; the commands are "
                f"{', '.join(VERBS)} (preceptor --help)"
            )
        if any(option in ("-h", "--help") for option in options):
            print(_help(name))
            return 0
        check_options(name, options)
        _run_under_hydra(name, options)
    except PreceptorError as error:
        print(f"preceptor {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"preceptor {name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _run_under_hydra(name: str, options: Sequence[str]) -> None:
    import hydra

    failure: list[PreceptorError] = []

    def job(config: DictConfig) -> object:
        try:
            return VERBS[name].run(config)
        except PreceptorError as error:
            # Hydra prints a traceback for whatever leaves a job; a told error is not a bug.
            failure.append(error)
            raise SystemExit(1) from None

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    run = hydra.main(version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name=name)(job)
    before = sys.argv
    sys.argv = [f"preceptor {name}", *options]
    try:
        run()
    except SystemExit:
        if failure:
            raise failure[0] from None
        raise
    finally:
        sys.argv = before


# -- options ---------------------------------------------------------------------------------------


def check_options(name: str, options: Sequence[str]) -> None:
    """Refuse a mistyped key, group choice or value, naming the valid ones.

    Every value of a sweep is checked before its first job starts, and so are missing options and
    jobs that would write to the same place.

    Raises:
        ConfigError: with the option that is wrong and what would be right.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    texts = [option for option in options if not option.startswith("-")]
    directories = _config_directories(options)
    texts = [text for text in texts if text not in directories]
    for text in texts:
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(f"{text!r} is not an option; options are written key=value")
    try:
        overrides = OverridesParser.create().parse_overrides(texts)
    except HydraException as error:
        raise ConfigError(f"an option cannot be read: {_first_line(error)}") from None
    if directories:
        paths = ",".join(f"file://{os.path.abspath(path)}" for path in directories)
        search = [f"hydra.searchpath=[{paths}]"]
    else:
        search = []
    with _Composer(name, search) as composer:
        own = [item for item in overrides if not item.key_or_group.startswith("hydra")]
        groups = [item for item in own if composer.is_group(item.key_or_group)]
        for item in groups:
            for choice in _values(item):
                options_there = composer.options(item.key_or_group)
                if isinstance(choice, str) and choice not in options_there:
                    raise ConfigError(
                        f"{item.key_or_group}={choice}: there is no such choice"
                        f"{_closest(choice, options_there)}; valid are {', '.join(options_there)}"
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


class _Composer:
    """Hydra's composition of one verb's configuration, without running anything."""

    def __init__(self, name: str, search: list[str]) -> None:
        self._name, self._search = name, search

    def __enter__(self) -> _Composer:
        from hydra import initialize_config_module
        from hydra.core.global_hydra import GlobalHydra

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
        self._context.__exit__(*error)

    def compose(self, overrides: Iterable[str]) -> DictConfig:
        from hydra import compose
        from hydra.errors import HydraException

        try:
            return compose(self._name, [*self._search, *overrides])
        except HydraException as error:
            raise ConfigError(_first_line(error)) from None

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
    from omegaconf import Container, DictConfig

    key = item.key_or_group
    if item.is_add() or item.is_force_add():
        return
    for config in variants:
        node: Any = config
        for depth, part in enumerate(key.split(".")):
            if not isinstance(node, DictConfig) or part not in list(node.keys()):
                where = ".".join(key.split(".")[:depth])
                there = [str(k) for k in node] if isinstance(node, DictConfig) else []
                prefix = f"{where}." if where else ""
                raise ConfigError(
                    f"there is no option {key!r}{_closest(part, there, prefix)}; valid "
                    f"{'under ' + where if where else 'options'} are: "
                    f"{', '.join(prefix + k for k in there) or 'none'}"
                )
            node = node._get_node(part)
        default = None if isinstance(node, Container) else node._value()
        for value in _values(item):
            expected = _mismatch(default, value)
            if expected:
                raise ConfigError(
                    f"{key}={value}: expected {expected}, such as the default {default!r}"
                )


def _check_whole(overrides: Sequence[Override], composer: _Composer) -> None:
    """Refuse options that are still missing and sweeps whose jobs would overwrite each other."""
    from omegaconf import OmegaConf

    fixed = [str(item.input_line) for item in overrides if not item.is_sweep_override()]
    swept = [item for item in overrides if item.is_sweep_override() and item.is_choice_sweep()]
    outputs: dict[str, str] = {}
    for values in itertools.product(*(item.sweep_string_iterator() for item in swept)):
        chosen = [f"{i.key_or_group}={v}" for i, v in zip(swept, values, strict=True)]
        config = composer.compose([*fixed, *chosen])
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ConfigError(
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} required: say "
                f"{' '.join(f'{key}=...' for key in missing)}"
            )
        job, out = " ".join(chosen), config.get("out")
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
    if value is None or not isinstance(default, bool | int | float):
        return None
    if isinstance(value, str) and value.startswith("${"):
        return None
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return None if whole else "a whole number"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if number else "a number"


def _values(item: Override) -> list[Any]:
    if item.is_delete():
        return []
    if item.is_sweep_override() and item.is_choice_sweep():
        return [value for value in item.sweep_iterator()]
    if item.is_sweep_override():
        return []
    return [item.value()]


def _config_directories(options: Sequence[str]) -> list[str]:
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


# -- texts -----------------------------------------------------------------------------------------


def _closest(word: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name.ljust(width)}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "preceptor: cache many vision teachers once; train students many times.",
            "",
            "usage: preceptor COMMAND key=value ... [-m] [--config-dir DIR]",
            "",
            *lines,
            "",
            "preceptor COMMAND --help shows every option; -m runs a sweep (seed=0,1,2).",
            "",
            f"example: {VERBS['train'].example}",
        ]
    )


def _help(name: str) -> str:
    root = resources.files(CONFIGS)
    text = (root / f"{name}.yaml").read_text(encoding="utf-8")
    groups = []
    for folder in sorted(root.iterdir(), key=lambda entry: entry.name):
        if folder.is_dir() and f"- {folder.name}:" in text:
            choices = sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))
            groups.append(f"  {folder.name}={' | '.join(choices)}")
    options = text.split("\nhydra:")[0].rstrip()
    return "\n".join(
        [
            f"preceptor {name}: {VERBS[name].summary}",
            "",
            f"example: {VERBS[name].example}",
            "",
            *(["choices (files under configs/ and --config-dir):", *groups, ""] if groups else []),
            "options and their defaults, written key=value or key.subkey=value:",
            "",
            *(f"  {line}" for line in options.splitlines()),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
