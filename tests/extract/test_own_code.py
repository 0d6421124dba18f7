"""Errors of teachers name the teacher and its option, whoever raised them."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from preceptor.cache import Cache
from preceptor.errors import TeacherError
from preceptor.extract.images import ViewBatch, geometry
from preceptor.extract.pipeline import load_teachers, teacher_record
from preceptor.extract.runner import TeacherRunner
from preceptor.extract.teachers import LOADERS, load_teacher
from preceptor.extract.teachers.base import SpaceShape
from preceptor.tests.extract import awkward_teachers
from preceptor.tests.extract.tiny_store import run

CALL = "call:preceptor.tests.extract.awkward_teachers"


def extract(function: str, shards: str, folder: Path) -> int:
    """Extract one teacher into ``folder/FUNCTION``."""
    group = folder / f"{function}.configs" / "teachers"
    group.mkdir(parents=True)
    (group / "of_test.yaml").write_text(f"mine: {{source: '{CALL}:{function}'}}\n")
    chosen = ("--config-dir", str(group.parent), "teachers=of_test")
    return run("extract", folder / function, shards, *chosen)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("fails_in_call", "its network, for 3 images, failed: RuntimeError: "),
        ("fails_in_identity", "its identity() failed: KeyError: 'weights'"),
        ("fails_in_json", "its identity() failed: TypeError: Object of type object is not JSON"),
        ("fails_in_to", "its move to cpu failed: NotImplementedError: NotImplementedError"),
        ("fails_in_construction", "fails_in_construction failed: ZeroDivisionError: by nothing ("),
        ("fails_in_preprocessing", "preprocessing: size=(0, 0); expected two positive numbers"),
    ],
)
def test_what_a_teacher_of_ones_own_raises_is_told_with_its_name(
    function: str, told: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract(function, shards, tmp_path) == 1
    message = capsys.readouterr().err
    assert "teachers.mine.source: " in message
    assert told in message


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("in_a_list", "teacher mine: it gave list, not tensors by the names of its spaces"),
        (
            "of_numpy",
            "teacher mine: its space patch is ndarray, not a torch tensor of real numbers",
        ),
        ("complex_ones", "teacher mine: its space patch is torch.complex64, not a torch tensor"),
    ],
)
def test_what_is_no_tensor_of_real_numbers_is_refused(
    function: str, told: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract(function, shards, tmp_path) == 1
    assert told in capsys.readouterr().err


def test_tokens_are_what_was_returned_whatever_the_next_call_writes(
    shards: str, tmp_path: Path
) -> None:
    """A captured graph, or a session with bound outputs, gives the same memory every time."""
    found = {}
    for function in ("fresh", "reused", "with_gradient"):
        assert extract(function, shards, tmp_path) == 0
        cache = Cache.open(tmp_path / function)
        codes = [cache[space].read(np.arange(len(cache))) for space in cache.spaces]
        found[function] = [part for one in codes for part in (one.codes, one.scales)]
    for function in ("reused", "with_gradient"):
        pairs = zip(found["fresh"], found[function], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_tokens_lie_on_the_device_wherever_they_were_computed() -> None:
    """A session of another runtime may compute on the CPU beside teachers on a GPU."""
    device = torch.device("meta")  # which every machine has
    place = SimpleNamespace(device=device, autocast=contextlib.nullcontext)
    teacher = load_teacher("mine", f"{CALL}:elsewhere")
    options = {"batch_size": 2, "workers": 0, "on_corrupt": "stop", "data": {"max_pixels": 1}}
    runner = TeacherRunner(place, [teacher], None, None, OmegaConf.create(options))  # type: ignore[arg-type]
    shape = geometry(teacher.preprocessing)
    pixels = torch.zeros(2, 3, *shape[0], dtype=torch.uint8)
    found = runner.tokens(ViewBatch(None, {shape: pixels}, []))  # type: ignore[arg-type]
    assert {tokens.device for tokens in found.values()} == {device}


def test_a_space_s_numbers_may_be_numpy_s() -> None:
    space = SpaceShape("patch", np.int64(6), np.int32(12), (np.int64(2), np.int64(3)))  # type: ignore[arg-type]
    assert json.dumps(asdict(space)) == json.dumps(asdict(SpaceShape("patch", 6, 12, (2, 3))))


def test_the_error_that_it_was_is_kept_with_the_line_of_the_users_code() -> None:
    with pytest.raises(TeacherError) as caught:
        load_teacher("mine", f"{CALL}:fails_in_construction")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    line = caught.value.__cause__.__traceback__.tb_next.tb_next.tb_lineno  # type: ignore
    assert f"({awkward_teachers.__file__}, line {line})" in str(caught.value)


def test_a_teacher_without_spaces_is_refused() -> None:
    with pytest.raises(TeacherError, match=r"teacher mine: .*`spaces` are no SpaceShapes"):
        load_teacher("mine", f"{CALL}:without_spaces")


def test_encodings_and_checkpoints_are_told_with_their_teacher(tmp_path: Path) -> None:
    options = OmegaConf.create({"mine": {"source": f"{CALL}:still", "encoding": "int9"}})
    (teacher,) = load_teachers(options)
    with pytest.raises(TeacherError, match=r"teachers\.mine\.encoding: there is no .*'int9'"):
        teacher_record(teacher, options.mine, "32-true")
    (tmp_path / "a.pth").write_bytes(b"no checkpoint")
    for source in ("timm:test_vit", "open_clip:RN50/openai"):
        for name in ("a.pth", "none.pth"):
            with pytest.raises(TeacherError, match=rf"teachers\.mine\.checkpoint: .*{name}"):
                load_teacher("mine", source, checkpoint=str(tmp_path / name))


def test_every_scheme_is_named_where_there_is_none_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOADERS, "newest", ("from_newest", "NAME"))
    with pytest.raises(TeacherError) as caught:
        load_teacher("mine", "torchvision:resnet50")
    assert all(f"{scheme}:" in str(caught.value) for scheme in LOADERS)
