"""The recipe of the demo keeps up with the recipes that are shipped."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf
from preceptor import configs, examples


def keys(package: object, *path: str) -> list[str]:
    folder = Path(next(iter(package.__path__)))  # type: ignore[attr-defined]
    return [str(key) for key in OmegaConf.load(folder.joinpath(*path))]


def test_the_demo_s_recipe_has_every_key_of_a_recipe() -> None:
    ours = keys(examples, "configs", "recipe", "fashion_mnist.yaml")
    assert ours == keys(configs, "recipe", "short.yaml")
