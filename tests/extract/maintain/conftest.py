"""A store of real extraction: eleven images, two tiny teachers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from preceptor.benchmarks.small_store import contents, restore
from preceptor.tests.extract.tiny_store import CALL, COUNT, run


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eleven images; the sixth cannot be decoded."""
    path = tmp_path_factory.mktemp("shards") / "s-0.tar"
    random = np.random.default_rng(0)
    with webdataset.TarWriter(str(path)) as tar:
        for key in range(COUNT):
            coarse = random.integers(0, 255, (5, 5, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((50 + key, 40), Image.Resampling.BICUBIC)
            data = io.BytesIO()
            image.save(data, "PNG")
            raw = data.getvalue() if key != 6 else b"no image"
            tar.write({"__key__": f"im{key:03d}", "png": raw, "cls": str(key % 3)})
    return str(path)


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of configuration groups with the choice ``teachers=tiny``."""
    folder = tmp_path_factory.mktemp("groups")
    group = folder / "configs" / "teachers"
    group.mkdir(parents=True)
    (group / "tiny.yaml").write_text(
        f"cnn: {{source: '{CALL}:cnn'}}\nvit: {{source: '{CALL}:vit', encoding: compact}}\n"
    )
    return folder / "configs"


@pytest.fixture(scope="session")
def good(shards: str, configs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a store of two teachers."""
    path = tmp_path_factory.mktemp("store") / "store"
    assert run("extract", path, shards, "--config-dir", str(configs), "teachers=tiny") == 0
    return contents(path)


@pytest.fixture
def store(good: dict[str, bytes], tmp_path: Path) -> Path:
    restore(tmp_path / "store", good)
    return tmp_path / "store"
