"""The teachers of configs/teachers: known to their libraries, and what the files say of them.

No hub is asked: the networks are built on torch's meta device, which has shapes and no numbers.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import yaml
from preceptor import configs, contrastive
from preceptor.cache.encodings import encoding
from preceptor.extract.teachers import (
    Teacher,
    from_timm,
    load_teacher,
    network,
)

FOLDER = Path(next(iter(configs.__path__))) / "teachers"


def shipped() -> list[tuple[str, str]]:
    return [
        (path.stem, name)
        for path in sorted(FOLDER.glob("*.yaml"))
        for name in yaml.safe_load(path.read_text())
    ]


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_timm(teacher: str, model: str) -> Any:
        assert timm.models.is_model_pretrained(model)
        return timm.create_model(model, pretrained=False)

    def of_open_clip(teacher: str, architecture: str, tag: str, options: dict[str, Any]) -> Any:
        options = {**options, "require_pretrained": False}
        return open_clip.create_model(architecture, device="meta", **options)

    monkeypatch.setattr(from_timm, "_from_hub", of_timm)
    monkeypatch.setattr(contrastive, "_from_hub", of_open_clip)
    monkeypatch.setattr(network, "weights_sha256", lambda network: "")


def load(group: str, name: str) -> tuple[Teacher, dict[str, Any]]:
    options = yaml.safe_load((FOLDER / f"{group}.yaml").read_text())[name]
    how = options.pop("encoding")
    with torch.device("meta"):
        return load_teacher(name, **options), {**options, "encoding": how}


@pytest.mark.parametrize("group", sorted({group for group, _ in shipped()}))
def test_shipped_teachers_have_the_spaces_and_the_bytes_that_their_file_says(
    group: str, without_weights: None
) -> None:
    text = (FOLDER / f"{group}.yaml").read_text()
    total = 0
    for name in [name for of, name in shipped() if of == group]:
        teacher, options = load(group, name)
        if options["size"] is not None:
            assert teacher.preprocessing.size == (options["size"], options["size"])
        own = text[text.index(f"\n{name}:") :]
        compared = 0
        for space in teacher.spaces:
            blank = torch.zeros(1, space.tokens, space.dim)
            total += sum(
                part.nbytes for part in encoding(options["encoding"]).encode(blank).values()
            )
            line = next(iter(re.findall(rf"^    {space.name}: .*$", own, re.MULTILINE)))
            told = re.search(r"(\d+) x (\d+)(?: x (\d+))?$|#\D*(\d+), what", line)
            if told is None:
                continue
            compared += 1
            numbers = [int(number) for number in told.groups() if number]
            assert math.prod(numbers) == space.tokens * space.dim, line
            assert numbers[-1] == space.dim, line
        assert compared
    [bytes_a_row] = re.findall(r"([\d,]+) bytes\s+(?:# )?a row", text)
    assert total == int(bytes_a_row.replace(",", ""))
