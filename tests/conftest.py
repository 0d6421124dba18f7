"""Small real inputs that several rooms share: images in tars, teachers with local checkpoints."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import webdataset
from PIL import Image
from preceptor.cache.shard_list import FOLDER

COUNT, SIZE = 11, 64
"""Images in the shards; side of the teachers' inputs in pixels."""


@pytest.fixture(scope="session", autouse=True)
def own_shard_lists(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests, and processes that they start, keep lists of shards away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("shard_lists")))
        yield


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two tars of small natural-sized images of various shapes, with labels."""
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    for shard, keys in enumerate((range(6), range(6, COUNT))):
        with webdataset.TarWriter(str(folder / f"s-{shard}.tar")) as tar:
            for key in keys:
                height, width = random.integers(40, 90, 2)
                coarse = random.integers(0, 255, (5, 5, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
                data = io.BytesIO()
                image.save(data, "PNG")
                tar.write({"__key__": f"im{key:03d}", "png": data.getvalue(), "cls": str(key % 3)})
    return str(folder / "s-{0..1}.tar")


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a small CNN and a small ViT with local checkpoints."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name in ("resnet10t", "vit_tiny_patch16_224"):
        safetensors.torch.save_file(
            timm.create_model(name).state_dict(), str(folder / f"{name}.safetensors")
        )
    groups = folder / "configs" / "teachers"
    groups.mkdir(parents=True)
    (groups / "tiny.yaml").write_text(
        f"cnn: {{source: 'timm:resnet10t', size: {SIZE}, "
        f"checkpoint: {folder}/resnet10t.safetensors}}\n"
        f"vit: {{source: 'timm:vit_tiny_patch16_224', size: {SIZE}, "
        f"checkpoint: {folder}/vit_tiny_patch16_224.safetensors}}\n"
    )
    return ["--config-dir", str(folder / "configs"), "teachers=tiny"]
