"""A training step on a device that holds nothing: what it reads of it, or leaves elsewhere, fails.

PyTorch's ``meta`` device stands in for a GPU. It has no values, so a step that waits for one, as
`Tensor.item` does, raises; and operations refuse tensors of two devices.
"""

from __future__ import annotations

import contextlib
from importlib.resources import files

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from preceptor.cache import Tokens
from preceptor.cache.encodings import ENCODINGS, encoding
from preceptor.cache.encodings.prediction import Prediction
from preceptor.kernels import op
from preceptor.tests.train.alignment.conftest import SPACES
from preceptor.tests.train.alignment.test_contract import VARIANTS
from preceptor.train.alignment import Codes, build_alignment
from preceptor.train.batch import TrainBatch, to_device
from preceptor.train.distiller import Distiller, Targets
from preceptor.train.students import build_student

BALANCES = ("fixed", "normalised", "drop", "pcgrad")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    # Which looks at no scales there, and autocast does not know this device.
    monkeypatch.setattr(op, "_check_scale", lambda *tensors: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "__getitem__", by_number_or_slice)


def by_number_or_slice(tensor, index, taken=torch.Tensor.__getitem__):
    """As indexing is, but for what is copied to the device, which is waited for."""
    for part in index if isinstance(index, tuple) else (index,):
        listed = isinstance(part, list | np.ndarray)
        assert not listed, f"{tensor.device} is waited for by an index of {part}"
        assert not isinstance(part, torch.Tensor) or part.device == tensor.device
    return taken(tensor, index)


def student_of(name):
    path = files("preceptor.configs") / "student" / f"{name}.yaml"
    return build_student(OmegaConf.to_container(OmegaConf.load(str(path)), resolve=True), 0)


def step(student, variant, balance, codes):
    options = {"name": variant.split(",")[0], "balance": balance, **VARIANTS[variant]}
    distiller = Distiller(student, build_alignment(options, student, SPACES)).to("meta").train()
    optimizer = torch.optim.AdamW(distiller.parameters(), foreach=False)
    pixels = torch.empty(5, 3, *student.size, device="meta")
    targets = {
        name: Codes(
            torch.empty(5, space.tokens, space.dim, dtype=torch.int8, device="meta"),
            torch.empty(5, space.tokens, device="meta"),
        )
        if codes
        else torch.empty(5, space.tokens, space.dim, device="meta")
        for name, space in SPACES.items()
    }
    output = distiller(pixels, Targets(targets))
    output.loss.backward()
    optimizer.step()
    return output


@pytest.mark.parametrize(
    ("variant", "balance"),
    [
        *((variant, "fixed") for variant in VARIANTS),
        *(("regression", balance) for balance in BALANCES[1:]),
    ],
)
@pytest.mark.parametrize("codes", [False, True], ids=["floats", "codes"])
def test_a_step_stays_on_its_device_and_waits_for_nothing(variant, balance, codes):
    # One kind of student for each kind of target: they are of no account to one another.
    name = "vit_micro" if codes else "resnet_micro"
    output = step(student_of(name), variant, balance, codes)
    assert output.loss.device.type == "meta"
    assert {loss.device.type for loss in output.losses.values()} == {"meta"}


def test_what_is_left_on_the_cpu_is_refused():
    student = student_of("resnet_micro")
    distiller = Distiller(student, build_alignment({"name": "regression"}, student, SPACES))
    distiller.student.to("meta")
    targets = {name: torch.empty(5, s.tokens, s.dim, device="meta") for name, s in SPACES.items()}
    with pytest.raises(RuntimeError, match="meta"):
        distiller(torch.empty(5, 3, *student.size, device="meta"), Targets(targets))


@pytest.mark.parametrize("cropped", [False, True], ids=["whole", "cropped"])
@pytest.mark.parametrize("name", [*ENCODINGS, "predicted"])
def test_a_batch_is_decoded_on_the_device(name, cropped):
    parts = encoding("compact" if name == "predicted" else name).encode(torch.randn(4, 9, 16))
    prediction = None
    if name == "predicted":
        name, weights = "compact", np.tril(np.ones((16, 16), np.int8))
        prediction = Prediction(torch.from_numpy(weights), (3, 3))
    batch = TrainBatch(
        rows=torch.arange(4),
        pixels=torch.zeros(4, 8, 8, 3, dtype=torch.uint8),
        tokens={"vit/patch": Tokens.from_parts(parts, name, 16, prediction)},
        regions=torch.tensor([[0.0, 0.0, 0.5, 1.0]]).expand(4, 4) if cropped else None,
        grids={"vit/patch": (3, 3)},
    )
    pixels, targets = to_device(batch, torch.device("meta"))
    found = targets["vit/patch"]
    tensors = found[:2] if isinstance(found, Codes) else (found,)
    assert {each.device.type for each in (pixels, *tensors)} == {"meta"}
