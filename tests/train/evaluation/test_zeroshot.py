"""Zero-shot classification against open_clip's own towers, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from hydra import compose, initialize_config_module
from preceptor import contrastive
from preceptor.cache import Cache, SampleIndex
from preceptor.cli import main
from preceptor.errors import ConfigError, TeacherError
from preceptor.tests.extract.random_networks import randomised
from preceptor.train.ablate import job
from preceptor.train.batch import normalise
from preceptor.train.checkpoint import load_calibration, load_model
from preceptor.train.evaluation import Features, Words, ZeroShot, build_suite
from preceptor.train.evaluation.features import LabelledRows
from preceptor.train.evaluation.run import evaluate
from preceptor.train.evaluation.words import read_names
from scored import one

ARCHITECTURE = "ViT-words"
NAMES = ["red square", "green  square", "blue square", "café", "{}"]
PROMPTS = ["a photo of a {}.", "{} on a dark field, {unsaid}"]
SPACE = "clip/embedding"


@pytest.fixture(scope="module")
def bed(scenes, tmp_path_factory) -> SimpleNamespace:
    """Stores of a small model with both towers, its checkpoint, and a student of it."""
    folder = tmp_path_factory.mktemp("words")
    (folder / f"{ARCHITECTURE}.json").write_text(
        json.dumps(
            {
                "embed_dim": 24,
                "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
                "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
            }
        )
    )
    open_clip.add_model_config(folder / f"{ARCHITECTURE}.json")
    model = randomised(open_clip.create_model(ARCHITECTURE))
    teach_names(model, scenes[0].shards)
    checkpoint = folder / "clip.pt"
    torch.save(model.state_dict(), checkpoint)
    fill(folder, scenes, checkpoint)
    student = [
        f"cache={folder / 'learn'}", f"data.shards={scenes[0].shards}", f"out={folder / 'run'}",
        "student=resnet_micro", "student.options.channels=[8,8,16,16]", "student.size=32",
        "align=regression", "align.targets=phis", "recipe=short", "recipe.steps=20",
        "recipe.batch_size=16", "engine=cpu", "workers=0", "log.to=[]",
    ]  # fmt: skip
    assert main(["train", *student]) == 0
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")

    def run(*more: str, out: Path = folder / "eval"):
        given = [
            f"train.cache={folder / 'learn'}", f"train.shards={scenes[0].shards}",
            f"test.cache={folder / 'judge'}", f"test.shards={scenes[1].shards}",
            f"students=[{folder / 'run'}]", f"out={out}", "engine=cpu", "workers=0",
            "protocols=[zeroshot]", f"zeroshot.names={folder / 'names.txt'}",
            f"zeroshot.templates={json.dumps(PROMPTS)}", "intervals.resamples=20",
            f"zeroshot.checkpoints={{clip: {checkpoint}}}",
        ]  # fmt: skip
        with initialize_config_module("preceptor.configs", version_base="1.3"):
            return evaluate(compose("eval", [*given, *more]))

    return SimpleNamespace(folder=folder, model=model, run=run, test=scenes[1])


def teach_names(model, shards: str) -> None:
    """Solve for the last layer of the text tower, so that names are near the images they name."""
    index = SampleIndex.from_shards(shards)
    seen = [np.asarray(index.image(n).convert("RGB").resize((32, 32), 3)) for n in range(60)]
    with torch.no_grad():
        images = model.encode_image(shown(np.stack(seen))).double()
        model.text_projection.data = torch.eye(32)
        texts = torch.cat([encoded(model, p.replace("{}", n)) for n in NAMES for p in PROMPTS])
        is_kind = torch.eye(3, dtype=torch.double)[torch.arange(60) % 3]
        kinds = torch.linalg.lstsq(images, is_kind).solution.T
        named = torch.cat([kinds, -kinds[:2]])
        found = torch.linalg.lstsq(texts.double(), named.repeat_interleave(2, 0)).solution
        model.text_projection.data = found.float()


def shown(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] as CLIP takes them."""
    mean, std = (
        torch.tensor(part)[:, None, None]
        for part in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    return (torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255 - mean) / std


def encoded(model, text: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.encode_text(open_clip.get_tokenizer(ARCHITECTURE)(text))
    return found


def fill(folder: Path, scenes, checkpoint: Path) -> None:
    """Extract the stores ``learn`` and ``judge``."""
    (folder / "configs" / "teachers").mkdir(parents=True)
    source = f"clip: {{source: 'open_clip:{ARCHITECTURE}', checkpoint: '{checkpoint}'}}\n"
    (folder / "configs" / "teachers" / "words.yaml").write_text(source)
    for scene, name in zip(scenes, ("learn", "judge"), strict=True):
        given = [
            "--config-dir", str(folder / "configs"), "teachers=words",
            f"data.shards={scene.shards}", f"cache={folder / name}", "calibration.images=20",
            "shard_rows=64", "engine=cpu", "workers=0",
        ]  # fmt: skip
        assert main(["extract", *given]) == 0


def texts(model, names, prompts) -> np.ndarray:
    """[classes, D], every prompt of every class on its own."""
    found = []
    for name in names:
        each = [encoded(model, p.replace("{}", name))[0] for p in prompts]
        each = [(one / one.norm()).double().numpy() for one in each]
        found.append(np.mean(each, axis=0) / np.linalg.norm(np.mean(each, axis=0)))
    return np.stack(found)


def predicted(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    return (images / np.linalg.norm(images, axis=1, keepdims=True) @ texts.T).argmax(1)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [2, 4, 0, 1, 3]])
def test_teacher_and_student_are_compared_with_the_teacher_s_texts(bed, order, tmp_path):
    names = [NAMES[at] for at in order]
    (tmp_path / "names.txt").write_text("\n".join(names), encoding="utf-8-sig")
    result = bed.run(f"zeroshot.names={tmp_path / 'names.txt'}", out=tmp_path / "eval")
    classes = texts(bed.model, names, PROMPTS)
    images = LabelledRows.open(str(bed.folder / "judge"), bed.test.shards)
    student, alignment, _ = load_model(bed.folder / "run")
    mean, std = load_calibration(bed.folder / "run")[SPACE]
    theirs, ours = [], []
    for row in images.rows:
        box = [float(edge) for edge in images.cache.boxes[row]]
        seen = images.index.image(int(row)).convert("RGB").resize((32, 32), 3, box=box)
        pixels = np.asarray(seen)[None]
        with torch.no_grad():
            theirs.append(bed.model.encode_image(shown(pixels))[0])
            taken = normalise(torch.from_numpy(pixels.copy()), torch.device("cpu"))
            output = alignment.run_student(student, taken)
            said = alignment.predict(output, dense=False).descriptors[SPACE]
            ours.append((alignment.standardised(SPACE, said) * std + mean)[0])
    rows = {row["kind"]: row for row in result["rows"]}
    assert list(rows) == ["teacher", "student"]
    assert (rows["teacher"]["name"], rows["student"]["readout"]) == (SPACE, "clip")
    for kind, embeddings in {"teacher": theirs, "student": ours}.items():
        right = predicted(torch.stack(embeddings).double().numpy(), classes) == images.labels
        if order == sorted(order):
            assert right.mean() > 0.5  # chance is a third
        # int8 codes may turn a near tie.
        assert rows[kind]["zeroshot"] == pytest.approx(right.mean(), abs=1.01 / len(right))
        (score,) = rows[kind]["scores"]
        assert score["details"]["images"] == len(right)
        assert score["details"]["top5"] == 1  # of five names


def test_the_texts_are_embedded_once_and_training_images_are_not_looked_at(bed, capsys):
    bed.run(out=bed.folder / "eval")
    capsys.readouterr()
    found = bed.run("zeroshot.checkpoints={clip: gone.pt}")
    assert found["features"]["computed"] == 0
    assert "train:" not in capsys.readouterr().err


def test_beside_other_protocols_it_has_rows_of_its_own(bed, tmp_path):
    found = bed.run(
        "protocols=all", "fewshot.shots=[1]", "robustness.corruptions=[contrast]",
        "robustness.severities=[1]", "width=6", "readouts=[pooled]", out=tmp_path,
    )  # fmt: skip
    own = [row for row in found["rows"] if "zeroshot" in row]
    assert [(row["kind"], row["dim"], row["reduced"]) for row in own] == [
        ("teacher", 24, False),
        ("student", 24, False),
    ]
    assert all(set(row["scores"][0]) and len(row["scores"]) == 1 for row in own)
    others = [row for row in found["rows"] if "zeroshot" not in row]
    assert {row["kind"] for row in others} == {"teacher", "student", "untrained"}
    assert all(row["reduced"] and "knn" in row for row in others)


def test_an_ablation_may_be_ranked_by_it_and_asks_for_the_texts_first(
    bed, scenes, tmp_path, capsys, monkeypatch
):
    student = "student: resnet_micro, student.options.channels: [8, 8, 16, 16], student.size: 32"
    given = [
        f"cache={bed.folder / 'learn'}", f"out={tmp_path / 'ablate'}",
        "factors={align: [regression]}", "score=clip/zeroshot",
        f"train={{data.shards: '{scenes[0].shards}', {student}, recipe: short, recipe.steps: 2, "
        "recipe.batch_size: 16, workers: 0, engine: cpu}",
        f"eval={{test.cache: '{bed.folder / 'judge'}', test.shards: '{scenes[1].shards}', "
        "protocols: [zeroshot], workers: 0, engine: cpu, "
        f"zeroshot: {{names: '{bed.folder / 'names.txt'}', templates: simple, "
        f"checkpoints: {{clip: '{bed.folder / 'clip.pt'}'}}}}}}",
    ]  # fmt: skip

    # This process knows the architecture.
    monkeypatch.setattr(job, "run_apart", lambda folder: job.main(folder) or None)
    assert main(["ablate", *given]) == 0
    assert "clip/zeroshot, in per cent" in capsys.readouterr().out
    assert len(list((tmp_path / "ablate" / "words").iterdir())) == 1
    assert main(["ablate", *(one.replace("clip/zeroshot", "clap/zeroshot") for one in given)]) == 1
    assert "'clap' is no READOUT (did you mean clip?)" in capsys.readouterr().err
    gone = [one.replace("clip.pt", "gone.pt").replace("/ablate", "/other") for one in given]
    assert main(["ablate", *gone]) == 1
    assert "gone.pt is no file" in capsys.readouterr().err
    assert not (tmp_path / "other" / "runs").exists()


def test_images_without_a_class_do_not_count():
    random = np.random.default_rng(0)
    labels = random.integers(-1, 4, size=50)
    names = [f"n{kind}" for kind in range(4)]
    embeddings = random.normal(size=(50, 8)).astype(np.float32)
    classes = random.normal(size=(4, 8)).astype(np.float32)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    side = Features(np.empty((0, 8), np.float32), embeddings, space="t/embedding")
    words = Words("words", test=labels, names=names, texts={"t/embedding": classes})
    (score,) = one("zeroshot", side, words)
    known = labels >= 0
    right = predicted(embeddings, classes)[known] == labels[known]
    assert 0 < known.sum() < 50
    assert score.value == pytest.approx(right.mean(), abs=1e-12)
    assert score.details["images"] == known.sum()
    weights = random.integers(0, 3, size=(1, 50)).astype(np.float64)
    expected = np.average(right, weights=weights[0, known])
    assert score.statistic(weights)[0] == pytest.approx(expected, abs=1e-12)


def test_imagenet_has_its_names_and_prompts():
    assert len(read_names("imagenet")) == 1000
    assert read_names("imagenet")[0] == "tench"
    assert build_suite(["zeroshot"], {"zeroshot": {"templates": "simple"}})


def test_mistakes_are_told(bed, tmp_path, scenes):
    (tmp_path / "few.txt").write_text("a\nb")
    (tmp_path / "gap.txt").write_text("a\n\nb")
    (tmp_path / "empty.txt").write_text("")
    other = randomised(open_clip.create_model(ARCHITECTURE), seed=3)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    cases = {
        ("zeroshot.names=null",): "zeroshot.names is required: imagenet, or a text file",
        (f"zeroshot.names={tmp_path / 'no.txt'}",): "as a file it cannot be read: No such file",
        (f"zeroshot.names={tmp_path / 'few.txt'}",): "has 2 names, and an image .* is of class 2",
        (f"zeroshot.names={tmp_path / 'gap.txt'}",): "line 2 is empty",
        (f"zeroshot.names={tmp_path / 'empty.txt'}",): "it is empty",
        ("zeroshot.templates=opnai",): "expected openai, simple, or a list",
        ("zeroshot.templates=['a photo']",): r"every text takes one \{\}",
        ("zeroshot.task=kind",): "no such classification task; there are class",
        (
            f"zeroshot.checkpoints={{clip: {tmp_path / 'other.pt'}}}",
            "zeroshot.templates=simple",
        ): "is not the model whose image tower filled the store as clip",
        (f"test.cache={scenes[1].cache}", f"train.cache={scenes[0].cache}"): "has vit/",
    }
    for overrides, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            bed.run(*overrides, out=tmp_path)


def test_a_student_of_another_model_of_that_name_is_refused(bed, tmp_path, scenes):
    other = randomised(open_clip.create_model(ARCHITECTURE), seed=3)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    fill(tmp_path, scenes, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"run learnt from clip with other weights"):
        bed.run(
            f"train.cache={tmp_path / 'learn'}", f"test.cache={tmp_path / 'judge'}",
            f"zeroshot.checkpoints={{clip: {tmp_path}/other.pt}}", out=tmp_path / "eval",
        )  # fmt: skip
    assert Cache.open(tmp_path / "judge").plan.teachers[0].name == "clip"


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (ModuleNotFoundError("No module named 'transformers'"), "pip install transformers"),
        (OSError("We couldn't connect. Check"), r"from .* \(We couldn't connect\); try again with"),
    ],
)
def test_a_tokenizer_of_the_hub_that_cannot_be_had_is_told(monkeypatch, raised, told):
    def get(_):
        raise raised

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(open_clip, "get_tokenizer", get)
    with pytest.raises(
        TeacherError, match=rf"teacher t: the tokenizer of .*SigLIP2/webli .*{told}"
    ):
        contrastive.tokenizer("t", "open_clip:ViT-B-16-SigLIP2/webli")


def test_options_are_validated_from_python_too():
    with pytest.raises(ConfigError, match="every text takes one"):
        ZeroShot(templates=["{} {}"])
