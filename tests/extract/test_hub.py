"""Teachers of a hub that cannot be reached."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
from huggingface_hub import constants
from preceptor.errors import TeacherError
from preceptor.extract.teachers import load_teacher


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub address where nothing listens, and an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("source", ["timm:test_vit.r160_in1k", "open_clip:RN50/yfcc15m"])
def test_absent_hub_is_named_with_the_way_around_it(source: str) -> None:
    with pytest.raises(TeacherError) as caught:
        load_teacher("small", source)
    message = str(caught.value)
    assert source in message
    assert "http://127.0.0.1:9, which does not answer" in message
    assert "teachers.small.checkpoint" in message


@pytest.mark.usefixtures("no_hub")
def test_offline_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(TeacherError, match="the local cache \\(HF_HUB_OFFLINE is set\\)"):
            load_teacher("t", "timm:test_vit.r160_in1k")


def test_network_without_pretrained_weights_is_never_random() -> None:
    bare = next(n for n in timm.list_models() if not timm.list_pretrained(f"{n}.*"))
    with pytest.raises(TeacherError, match=f"no pretrained weights for {bare}; or set"):
        load_teacher("t", f"timm:{bare}")
