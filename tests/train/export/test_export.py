"""What is exported is loaded where there is no preceptor, and computes what the student does."""

from __future__ import annotations

import json
import shutil
import site
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf
from preceptor.cache import Cache, Space
from preceptor.cache.samples import SampleIndex
from preceptor.errors import DataError, ExportError
from preceptor.train.alignment import build_alignment
from preceptor.train.batch import normalise
from preceptor.train.checkpoint import load_model
from preceptor.train.export import graph, hub, run
from preceptor.train.loop import train
from preceptor.train.students import IMAGENET_MEAN, IMAGENET_STD, Student
from safetensors.torch import load_file

from ..conftest import SMALL_CNN, compose
from .exporting import IMAGES, config

CLOSE = {"rtol": 1e-4, "atol": 1e-5}

# Without `site` no .pth file is read, so an editable installation stays out of reach.
PRELUDE = f"""
import sys
sys.path += {site.getsitepackages()!r}
import importlib.util
assert importlib.util.find_spec("preceptor") is None
import numpy as np
source, pixels, result = sys.argv[1:]
pixels = np.load(pixels)
"""
READERS = {
    "timm": """
import timm, torch
model = timm.create_model(f"local-dir:{source}", pretrained=True).eval()
with torch.no_grad():
    np.savez(result, pooled=model(torch.from_numpy(pixels)).numpy())
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
(entry,) = session.get_inputs()
assert entry.name == "pixels" and entry.shape[0] == "batch", (entry.name, entry.shape)
assert all(output.shape[0] == "batch" for output in session.get_outputs())
names = [output.name for output in session.get_outputs()]
np.savez(result, **dict(zip(names, session.run(None, {"pixels": pixels}))))
""",
    "program": """
import torch
module = torch.export.load(source).module()
with torch.no_grad():
    np.savez(result, **{k: v.numpy() for k, v in module(torch.from_numpy(pixels)).items()})
""",
}


@pytest.fixture(scope="module")
def exported(runs: Path) -> Path:
    """The same folder after both runs were exported in every form."""
    for name in ("cnn", "vit"):
        run.export(config(runs / name, "formats=[timm,onnx,program]", f"check.shards={IMAGES}"))
    return runs


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Five embedded images as the students take them, by Pillow and NumPy alone."""
    index = SampleIndex.from_shards(IMAGES)
    images = [np.asarray(index.image(i).convert("RGB").resize((32, 32), 3)) for i in range(5)]
    scaled = (np.stack(images) / 255.0 - IMAGENET_MEAN) / IMAGENET_STD
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), dtype=np.float32)


def read_apart(form: str, source: Path, pixels: np.ndarray, tmp_path: Path) -> dict:
    """Outputs of an exported form, from a fresh interpreter that cannot import preceptor."""
    np.save(tmp_path / "pixels.npy", pixels)
    result = tmp_path / "result.npz"
    command = [sys.executable, "-I", "-S", "-c", PRELUDE + READERS[form], str(source)]
    done = subprocess.run(
        [*command, str(tmp_path / "pixels.npy"), str(result)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with np.load(result) as found:
        return dict(found)


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_timm_loads_the_folder_without_preceptor(exported, pixels, tmp_path, name):
    found = read_apart("timm", exported / name / "export/timm", pixels, tmp_path)
    student, _, _ = load_model(exported / name)
    with torch.no_grad():
        expected = student(torch.from_numpy(pixels)).pooled
    torch.testing.assert_close(torch.from_numpy(found["pooled"]), expected, **CLOSE)


def deviation(space: Space) -> torch.Tensor:
    """What a prediction of 1 stands for, float32 [D]: the root mean square about the centre, which
    is not the s that the store has."""
    moments, centre = space.statistics(), space.mean.double().numpy()
    square = np.diag(moments.covariance) + (moments.mean - centre) ** 2
    found = torch.from_numpy(np.sqrt(square)).float()
    assert not torch.allclose(found, space.std, rtol=0.02)
    return found


@pytest.mark.parametrize("form", ["onnx", "program"])
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_student_with_heads_runs_without_preceptor(exported, bed, pixels, tmp_path, form, name):
    """Any number of images; readouts as evaluation has them, predictions in the teacher's units."""
    file = {"onnx": "student.onnx", "program": "student.pt2"}[form]
    found = read_apart(form, exported / name / "export" / file, pixels, tmp_path)
    found = {key: torch.from_numpy(value) for key, value in found.items()}
    student, alignment, _ = load_model(exported / name)
    space = {key: Cache.open(bed.cache)[key] for key in ("vit/cls", "vit/patch")}
    with torch.no_grad():
        output = student(torch.from_numpy(pixels))
        predicted = alignment.predict(output, dense=True)
        tokens = predicted.dense["vit/patch"]
        if name == "cnn":  # 2 x 2 tokens predict 4 x 4
            square = tokens.transpose(1, 2).unflatten(2, (2, 2))
            tokens = torch.nn.functional.interpolate(square, (4, 4), mode="bilinear")
            tokens = tokens.flatten(2).transpose(1, 2)
        expected = {
            "grid": output.tokens,
            **{f"readout/{kind}": alignment.readout(output, kind) for kind in alignment.readouts},
            "descriptor/vit/cls": predicted.descriptors["vit/cls"] * deviation(space["vit/cls"])
            + space["vit/cls"].mean,
            "tokens/vit/patch": tokens * deviation(space["vit/patch"]) + space["vit/patch"].mean,
        }
    assert set(found) == set(expected)
    assert ("readout/tokens" in found) == (name == "cnn")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **CLOSE, msg=lambda m, k=key: f"{k}: {m}")


def test_backbone_onnx_runs_without_preceptor(exported, pixels, tmp_path):
    found = read_apart("onnx", exported / "vit/export/backbone.onnx", pixels[:1], tmp_path)
    student, _, _ = load_model(exported / "vit")
    with torch.no_grad():
        output = student(torch.from_numpy(pixels[:1]))
    assert set(found) == {"pooled", "grid"}
    torch.testing.assert_close(torch.from_numpy(found["pooled"]), output.pooled, **CLOSE)
    torch.testing.assert_close(torch.from_numpy(found["grid"]), output.tokens, **CLOSE)


def test_timm_prepares_images_as_the_student_saw_them(exported, pixels):
    """timm's own transform, from what config.json says, gives the pixels of training."""
    model = timm.create_model(f"local-dir:{exported / 'cnn/export/timm'}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["input_size"]) == (3, 32, 32)
    assert (data["crop_pct"], data["interpolation"]) == (1.0, "bicubic")
    transform = timm.data.create_transform(**data)
    index = SampleIndex.from_shards(IMAGES)
    found = torch.stack([transform(index.image(i)) for i in range(5)])
    torch.testing.assert_close(found, torch.from_numpy(pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        ({"name": "center", "crop": 0.875}, {"crop_pct": 0.875, "crop_mode": "center"}),
        ({"name": "full", "crop": 1.0}, {"crop_pct": 1.0, "crop_mode": "squash"}),
        ({"name": "random", "crop": 1.0}, {"crop_pct": 1.0, "crop_mode": "center"}),
    ],
)
def test_the_view_policy_in_timms_words(exported, views, expected):
    student, _, model = load_model(exported / "cnn")
    found = hub.timm_config(student, {**model, "views": views})["pretrained_cfg"]
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("convnext_atto", (64, 96), {"drop_path_rate": 0.1}),
        ("vit_tiny_patch16_224", (32, 64), {"patch_size": 16, "depth": 1, "reg_tokens": 2}),
        ("swin_tiny_patch4_window7_224", (64, 64), {"depths": [1, 1], "num_heads": [2, 4],
                                                    "embed_dim": 16, "window_size": 4}),
        ("efficientvit_b0", (64, 64), {}),
        ("levit_128s", (224, 224), {}),
    ],
)  # fmt: skip
def test_any_backbone_survives_timms_layout(tmp_path, name, size, options):
    """Also with a classifier on top, which is what most people load it for."""
    torch.manual_seed(3)
    student = Student(name, size=size, **options).eval()
    model = {
        "student": {"model": name, "options": options},
        "align": {"name": "regression"},
        "interpolation": "bicubic",
    }
    hub.write_folder(tmp_path / "timm", student, model, "card")
    images = torch.randn(2, 3, *size)
    found = hub.open_folder(tmp_path / "timm")(images)["pooled"]
    with torch.no_grad():
        torch.testing.assert_close(found, student(images).pooled, **CLOSE)
    source = f"local-dir:{tmp_path / 'timm'}"
    classifier = timm.create_model(source, pretrained=True, num_classes=7).eval()
    with torch.no_grad():
        assert classifier(images).shape == (2, 7)
        torch.testing.assert_close(
            classifier.forward_features(images), student.model.forward_features(images), **CLOSE
        )


def test_card_and_summary_say_what_the_run_says(exported):
    card = (exported / "cnn/export/timm/README.md").read_text()
    summary = json.loads((exported / "cnn/summary.json").read_text())
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "license:" not in card
    for fact in (
        f"| vit/cls | {summary['losses']['vit/cls']:.4f} |",
        "`model_token`",
        f"{summary['parameters']['student']:,} parameters",
        f"seed 0, 4 steps, {summary['epochs']:.2f} passes over the images, ",
        "| vit | random |",
    ):
        assert fact in card
    files = json.loads((exported / "cnn/export/summary.json").read_text())["files"]
    assert list(files) == ["timm", "backbone.onnx", "student.onnx", "student.pt2"]
    assert all(0 <= gap < 1e-4 for file in files.values() for gap in file["differences"].values())
    assert load_file(exported / "cnn/export/timm/model.safetensors").keys() == (
        load_file(exported / "cnn/student.safetensors").keys()
    )


ALIGNED = [
    ("cnn", "regression", {"targets": "phis"}),
    ("cnn", "ladder", {}),
    ("vit", "masked", {"targets": "none"}),
    ("vit", "relational", {"match": "student"}),
    ("cnn", "attention_pool", {"dense_weight": 0.0}),
    ("vit", "model_token", {"inter": "cross", "gamma": None}),
    ("cnn", "model_token", {"write_back": 2, "layers": 0, "teacher_stream": 0.0}),
    ("vit", "model_token", {"write_back": 2}),
]


@pytest.mark.parametrize(
    ("kind", "name", "options", "units"),
    [(*case, "teacher") for case in ALIGNED]
    + [(*case, "standardised") for case in ALIGNED if "targets" in case[2]],
)
def test_any_alignment_is_captured_for_any_number_of_images(bed, kind, name, options, units):
    """With weights that are not those of the start, whose gates and updates are zero."""
    if kind == "cnn":
        student = Student("resnet10t", size=32, channels=[8, 8, 16, 16], output_stride=16)
    else:
        student = Student(
            "vit_tiny_patch16_224", size=32, patch_size=8, depth=3, embed_dim=24, num_heads=2
        )
    cache = Cache.open(bed.cache)
    spaces = {key: cache[key].spec for key in cache.spaces}
    small = {"width": 16, "heads": 2} if name == "model_token" else {}
    alignment = build_alignment(
        {"method": name, **small, **options}, student, spaces, stored=lambda key: cache[key]
    )
    torch.manual_seed(5)
    for parameter in (*student.parameters(), *alignment.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    student.eval(), alignment.eval()
    calibration = {key: (cache[key].mean, cache[key].std) for key in cache.spaces}
    wanted = calibration if units == "teacher" else None
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        output = alignment.run_student(student, images)
        readouts = {kind: alignment.readout(output, kind) for kind in alignment.readouts}
        learnt = alignment.predict(output, dense=False).descriptors["vit/cls"]
    module = graph.WithHeads(student, alignment, wanted).eval()
    program = graph.capture(module, torch.zeros(2, 3, 32, 32))
    assert "preceptor" not in str(program.graph)  # no operator that others lack
    with torch.no_grad():
        found = program.module()(images)
    for key, value in readouts.items():
        torch.testing.assert_close(found[f"readout/{key}"], value, **CLOSE)
    assert any(key.startswith("tokens/") for key in found) == (
        bool(alignment.dense_weight) and bool(alignment.predict(output, dense=True).dense)
    )

    # Learning such a descriptor exactly would give the same units back: targets are an affine map.
    exact = found["descriptor/vit/cls"]
    if units == "teacher":
        exact = (exact - cache["vit/cls"].mean) / cache["vit/cls"].std
    again = alignment.units["vit/cls"](exact.unsqueeze(1))
    torch.testing.assert_close(again.squeeze(1), learnt, rtol=1e-3, atol=1e-3)


def test_tokens_inside_the_backbone_are_carried_or_refused(bed, pixels, tmp_path):
    train(
        compose(
            "train", f"cache={bed.cache}", f"data.shards={bed.shards}", f"out={tmp_path / 'run'}",
            "student.size=32", *SMALL_CNN, "align=model_token", "align.write_back=2",
            "align.layers=0", "align.width=16", "align.heads=2", "align.teacher_stream=0",
            "recipe=short", "recipe.steps=6", "recipe.lr=0.02", "recipe.batch_size=16",
            "engine=cpu", "workers=0",
        )
    )  # fmt: skip
    with pytest.raises(ExportError, match=r"live inside the backbone.*formats=\[onnx,program\]"):
        run.export(config(tmp_path / "run", "formats=[timm]"))
    run.export(config(tmp_path / "run", "formats=[onnx]", f"check.shards={IMAGES}"))
    found = read_apart("onnx", tmp_path / "run/export/backbone.onnx", pixels, tmp_path)
    student, alignment, _ = load_model(tmp_path / "run")
    with torch.no_grad():
        trained = alignment.run_student(student, torch.from_numpy(pixels)).pooled
        plain = student(torch.from_numpy(pixels)).pooled
    torch.testing.assert_close(torch.from_numpy(found["pooled"]), trained, **CLOSE)
    assert not torch.allclose(trained, plain, rtol=1e-3)


def test_standardised_predictions_need_no_calibration(runs, bed, pixels, tmp_path):
    shutil.copytree(runs / "vit", tmp_path / "old")
    (tmp_path / "old/targets.safetensors").unlink()
    out = tmp_path / "out"
    wanted = ("formats=[onnx]", "check.images=0", f"out={out}")
    with pytest.raises(DataError, match="units=standardised"):
        run.export(config(tmp_path / "old", *wanted))
    run.export(config(tmp_path / "old", *wanted, "units=standardised"))
    found = read_apart("onnx", out / "student.onnx", pixels, tmp_path)
    student, alignment, _ = load_model(runs / "vit")
    with torch.no_grad():
        output = student(torch.from_numpy(pixels))
        learnt = alignment.predict(output, dense=False).descriptors["vit/cls"]
    space = Cache.open(bed.cache)["vit/cls"]
    expected = learnt * deviation(space) / space.std  # in the units of the store
    torch.testing.assert_close(torch.from_numpy(found["descriptor/vit/cls"]), expected, **CLOSE)


def test_averaged_weights(runs, pixels, tmp_path):
    run.export(config(runs / "vit", "weights=ema", "formats=[timm]", f"check.shards={IMAGES}"))
    found = read_apart("timm", runs / "vit/export-ema/timm", pixels, tmp_path)["pooled"]
    for folder, same in ((runs / "vit/ema", True), (runs / "vit", False)):
        student, _, _ = load_model(folder)
        with torch.no_grad():
            expected = student(torch.from_numpy(pixels)).pooled.numpy()
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-5) == same
    assert "exponential moving average" in (runs / "vit/export-ema/timm/README.md").read_text()


def test_who_learnt_from_stored_pixels_is_compared_on_them(runs, pixel_bed, tmp_path, monkeypatch):
    without = shutil.ignore_patterns("export*")
    shutil.copytree(runs / "cnn", tmp_path / "run", ignore=without)
    trained = OmegaConf.load(tmp_path / "run/config.yaml")
    trained.cache, trained.data.shards = pixel_bed.cache, None
    OmegaConf.save(trained, tmp_path / "run/config.yaml")
    seen = []
    monkeypatch.setattr(run, "normalise", lambda *given: seen.append(given[0]) or normalise(*given))
    run.export(config(tmp_path / "run", "formats=[timm]"))
    cache = Cache.open(pixel_bed.cache)
    rows = [row for row in range(len(cache)) if cache.valid[row]][: len(seen[0])]
    assert 5 < len(rows) < rows[-1] + 1  # one row has none
    assert torch.equal(seen[0], cache.read_pixels(rows))
    shutil.rmtree(tmp_path / "run/export")
    trained.cache = str(tmp_path / "gone")
    OmegaConf.save(trained, tmp_path / "run/config.yaml")
    with pytest.raises(DataError, match=r"compare on: .*gone.*; say check\.shards=\.\.\. or check"):
        run.export(config(tmp_path / "run", "formats=[timm]"))
