"""Runs of which torch.compile makes the steps."""

from __future__ import annotations

import pytest
import torch
from preceptor.errors import TrainingError
from preceptor.train.loop import train
from safetensors.torch import load_file
from torch._inductor import config as inductor

CNN = ("student=resnet_micro", "student.options.channels=[8,8,16,16]")


@pytest.mark.parametrize(
    ("align", "parts"),
    [
        (("align=regression", "align.balance=pcgrad"), ["Student"]),
        (("align=model_token", "align.write_back=1"), ["Student", "ModelToken"]),
    ],
    ids=["regression", "model tokens inside"],
)
def test_a_compiled_run_learns_the_same(train_config, tmp_path, align, parts, monkeypatch):
    compile_module, compiled_parts = torch.nn.Module.compile, []

    def traced(module: torch.nn.Module) -> None:  # all but the slow making of machine code
        compiled_parts.append(type(module).__name__)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    # Gradients of each teacher are looked at in the second step of three.
    options = (*align, "align.targets=phis", "recipe.steps=3", "recipe.lr=1e-4",
               "log.gradients_every=2", "engine.precision=64-true")  # fmt: skip
    for out, compiled in (("plain", "false"), ("compiled", "true")):
        train(train_config(*options, f"engine.compile={compiled}", student=CNN, out=out))
    plain, compiled = (
        load_file(tmp_path / out / "student.safetensors") for out in ("plain", "compiled")
    )
    assert list(plain) == list(compiled)
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-6, atol=1e-9)
    assert compiled_parts == parts


def test_a_compiler_that_is_not_there_is_told_with_the_way_around_it(train_config, monkeypatch):
    monkeypatch.setattr(inductor.cpp, "cxx", ("/nowhere/g++",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    with pytest.raises(
        TrainingError, match=r"No working C\+\+ compiler.*: say engine.compile=false"
    ):
        train(train_config("align=regression", "recipe.steps=2", "engine.compile=true"))
