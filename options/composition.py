"""Hydra's composition of options, without running anything."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, first_line
from .names import CONFIGS

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


class Composer:
    """Hydra's composition of one verb's configuration, without running anything."""

    def __init__(self, name: str, directories: Sequence[str] = ()) -> None:
        self.name, self._folders = name, [os.path.abspath(path) for path in directories]
        urls = ",".join(_quoted(f"file://{path}") for path in self._folders)
        self._search = [f"hydra.searchpath=[{urls}]"] if self._folders else []
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def __enter__(self) -> Composer:
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
        """The configuration: one object for the same overrides, made once, since each takes a tenth
        of a second of YAML. Not to be changed while the composer is asked for more."""
        key = tuple(overrides)
        if key not in self._composed:
            self._composed[key] = self._compose(key)
        return self._composed[key]

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        from hydra import compose
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        try:
            return compose(self.name, [*self._search, *overrides])
        except YAMLError as error:
            lines = " ".join(str(error).split())
            raise ConfigError(f"a file of options is no YAML: {lines}") from None
        except (HydraException, OmegaConfBaseException, ValueError) as error:
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
        return "." not in key and bool(self.options(key))

    def options(self, group: str) -> list[str]:
        """The choices of a group."""
        if group.startswith("hydra/"):  # plugins bring them
            return sorted(self._loader.get_group_options(group))
        places = [resources.files(CONFIGS), *map(Path, self._folders)]
        folders = [place.joinpath(*group.split("/")) for place in places]
        there = [file.name for folder in folders if folder.is_dir() for file in folder.iterdir()]
        return sorted({name[:-5] for name in there if name.endswith(".yaml")})


def _quoted(text: str) -> str:
    """As Hydra's grammar takes any text: paths may hold = and commas."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return f"'{escaped}'"
