"""What runs log, and where: read back with the readers of each format."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from omegaconf import OmegaConf
from preceptor.cache import Cache
from preceptor.errors import ConfigError
from preceptor.tests.train.limits import largest_file
from preceptor.train.alignment import AlignmentOutput, build_alignment
from preceptor.train.alignment.base import Space
from preceptor.train.batch import normalise
from preceptor.train.checkpoint import Checkpoints, load_model
from preceptor.train.diagnosis import Diagnosis, spread, teacher_gradients
from preceptor.train.loop import train
from preceptor.train.students import StudentOutput, build_student
from preceptor.train.views import StoredViews
from sklearn.neighbors import KNeighborsClassifier
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def rows_of(out) -> list[dict[str, str]]:
    with (out / "logs" / "csv" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_logs_go_on_where_an_interrupted_run_stopped(train_config, tmp_path, interrupted):
    options = ("recipe.checkpoint_every=3", "recipe.log_every=1", "log.to=[tensorboard,csv]")
    train(train_config(*options, out="whole"))
    with interrupted(5):  # steps 4 and 5 are logged, and done again later
        train(train_config(*options, out="parts"))
    assert [row["step"] for row in rows_of(tmp_path / "parts")] == list("12345")
    train(train_config(*options, out="parts"))
    whole, parts = (
        [(row["step"], row["loss"], row["lr"]) for row in rows_of(tmp_path / run) if row["loss"]]
        for run in ("whole", "parts")
    )
    assert parts == whole
    assert [step for step, *_ in whole] == list("12345678")
    # Files of one second are read by their names, of which ".10" comes before ".9": here as one.
    files = sorted((tmp_path / "parts/logs").glob("events.*"), key=lambda f: f.stat().st_mtime_ns)
    assert len(files) == 2
    (tmp_path / "events.out.tfevents.whole").write_bytes(b"".join(f.read_bytes() for f in files))
    events = EventAccumulator(str(tmp_path / "events.out.tfevents.whole")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))


def test_a_log_that_was_cut_short_is_gone_on_with(train_config, tmp_path, interrupted):
    options = ("recipe.checkpoint_every=3", "recipe.log_every=1", "log.to=[csv]")
    with interrupted(5):
        train(train_config(*options))
    path = tmp_path / "run" / "logs" / "csv" / "metrics.csv"
    raw = path.read_bytes()
    second = raw.index(b"\n", raw.index(b"\n", raw.index(b"\n") + 1) + 1)
    path.write_bytes(raw[: second - 20])  # within the row of step 2
    train(train_config(*options))
    steps = [row["step"] for row in rows_of(tmp_path / "run") if row["loss"]]
    assert steps == list("145678")
    assert not list(tmp_path.rglob("*before*"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
@pytest.mark.parametrize("name", ["csv", "tensorboard"])
def test_without_space_a_log_ends_and_the_run_goes_on(
    train_config, tmp_path, at_step, capsys, name
):
    limit = largest_file(10)
    at_step({3: limit.__enter__, 6: lambda: limit.__exit__(None, None, None)})
    options = ("recipe.log_every=1", "recipe.checkpoint_every=2", "keep.last=9")
    try:
        summary = train(train_config(*options, f"log.to=[{name}]"))
    finally:
        limit.__exit__(None, None, None)
    assert summary["steps"] == 8
    assert f"the log {name} ends here: File too large" in capsys.readouterr().err
    assert list(Checkpoints(tmp_path / "run", 9).steps()) == [2, 8]


def test_where_the_time_goes_is_logged(train_config, tmp_path):
    train(train_config("log.to=[csv]", "recipe.log_every=4"))
    rows = [row for row in rows_of(tmp_path / "run") if row["loss"]]
    assert [row["step"] for row in rows] == ["4", "8"]
    for row in rows:
        wait, compute = float(row["seconds/wait"]), float(row["seconds/compute"])
        assert wait / (wait + compute) == pytest.approx(float(row["wait_share"]))
        # 16 images a step, and one batch a step.
        assert 16 / (wait + compute) == pytest.approx(float(row["images_per_second"]))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_without_its_package_is_told_before_anything_is_written(
    train_config, tmp_path, monkeypatch, name
):
    from preceptor.train import logs

    monkeypatch.setattr(logs, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=rf"log.to names {name}.*'preceptor\[{name}\]'"):
        train(train_config(f"log.to=[{name}]"))
    with pytest.raises(ConfigError, match="valid are tensorboard, csv, wandb, mlflow"):
        train(train_config("log.to=[tensorbord]"))
    with pytest.raises(ConfigError, match=r"log\.to=csv: write a list, log\.to=\[csv\]"):
        train(train_config("log.to=csv"))
    assert not (tmp_path / "run").exists()


def test_wandb_offline_keeps_one_run(train_config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("pytorch_lightning")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(train_config("log.to=[wandb]"))
    runs = list((tmp_path / "run" / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))
    known = OmegaConf.load(tmp_path / "run" / "logs" / "run.json").run
    assert [path.name for path in runs] == [f"run-{known}.wandb"]
    assert runs[0].stat().st_size > 1000


def test_mlflow_gets_every_scalar(train_config, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("pytorch_lightning")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    train(train_config("log.to=[mlflow,csv]", "log.project=trial"))
    client = mlflow.tracking.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("trial").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    rows = [row for row in rows_of(tmp_path / "run") if row["loss"]]
    assert [metric.step for metric in history] == [int(row["step"]) for row in rows]
    assert [metric.value for metric in history] == [float(row["loss"]) for row in rows]
    assert run.data.params["seed"] == "0"


# -- gradients and spread


def test_shares_and_angles_of_gradients_are_those_of_plain_algebra():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    pooled = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    weights = [torch.randn(3, 25, generator=generator, dtype=torch.float64) for _ in range(3)]

    def term(weight):  # linear, so that its gradient is the weight itself
        return (weight[:, :20] * tokens.flatten(1)).sum() + (weight[:, 20:] * pooled).sum()

    terms = dict(zip("abc", map(term, weights), strict=True))
    found = teacher_gradients(terms, (tokens, pooled))
    flat = [weight.flatten().numpy() for weight in weights]
    norms = [np.linalg.norm(weight) for weight in flat]
    for i, a in enumerate("abc"):
        assert found[f"share/{a}"] == pytest.approx(norms[i] / sum(norms), rel=1e-5)
    factors = dict(zip("abc", torch.tensor([10.0, 0.0, 1.0]), strict=True))
    weighed = teacher_gradients(terms, (tokens, pooled), factors=factors)
    assert weighed["share/a"] == pytest.approx(10 * norms[0] / (10 * norms[0] + norms[2]), rel=1e-5)
    assert weighed["share/b"] == 0
    assert all(weighed[name] == value for name, value in found.items() if "conflict" in name)
    cosines = {
        f"conflict/{'abc'[i]}~{'abc'[j]}": flat[i] @ flat[j] / norms[i] / norms[j]
        for i in range(3)
        for j in range(i + 1, 3)
    }
    for name, cosine in cosines.items():
        assert found[name] == pytest.approx(cosine, rel=1e-4)
    assert found["conflict/least"] == pytest.approx(min(cosines.values()), rel=1e-4)
    sum(terms.values()).backward()  # the graph is still there
    assert tokens.grad is not None


def test_one_teacher_has_no_conflict():
    shared = torch.ones(2, requires_grad=True)
    assert teacher_gradients({"a": shared.sum()}, [shared]) == {}


def test_spread_tells_equal_from_different_features():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4096, 8, generator=generator)
    assert spread(features) == pytest.approx(1, abs=0.01)
    assert spread(features[:1].expand(16, -1)) == 0
    assert spread(3 + features) == pytest.approx(1 / math.sqrt(10), abs=0.01)


def test_sampling_changes_no_weight(train_config, tmp_path):
    options = ("align=model_token", "recipe.accumulate=2", "log.to=[csv]")
    train(train_config(*options, "log.gradients_every=0", out="plain"))
    train(train_config(*options, "log.gradients_every=2", "log.knn_every=3", out="watched"))
    plain, watched = (
        (tmp_path / run / "student.safetensors").read_bytes() for run in ("plain", "watched")
    )
    assert watched == plain
    rows = [row for row in rows_of(tmp_path / "watched") if row["spread/model_tokens"]]
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"]
    assert all(0 < float(row["spread/pooled"]) < 2 for row in rows)
    assert [row["step"] for row in rows_of(tmp_path / "watched") if row["knn"]] == ["3", "6", "8"]


def test_collapsed_tokens_are_an_alarm_once(capsys):
    fabric = Fabric(accelerator="cpu", devices=1)
    student = build_student({"model": "resnet10t", "size": 64}, 0)
    space = Space("vit", 4, 4, (2, 2))
    alignment = build_alignment({"name": "regression"}, student, {"vit/p": space})
    seen = (
        StudentOutput(torch.ones(4, 2, 3), (1, 2), torch.ones(4, 3)),
        AlignmentOutput(torch.zeros(()), {}, {}),
    )
    diagnosis = Diagnosis(fabric, alignment, after=10)
    diagnosis.sample(5, seen)
    assert capsys.readouterr().err == ""  # in the warm-up all is still alike
    for step in (10, 11):
        assert diagnosis.sample(step, seen)["spread/pooled"] == 0
    assert capsys.readouterr().err.count("spread/pooled is 0.0000 at step 10") == 1


def test_knn_on_the_way_is_that_of_scikit_learn(train_config, tmp_path, bed):
    config = train_config("log.knn_every=8", "log.knn_images=30", "log.knn_neighbours=5")
    summary = train(config)
    student, _, _ = load_model(tmp_path / "run")
    cache = Cache.open(bed.cache)
    labels = np.asarray(cache.labels)
    rows = np.array([row for row in range(0, 80, 2)])  # first views; the row without tokens is odd
    rows = np.random.default_rng(0).permutation(rows)[:30]
    pixels = StoredViews(cache, bed.index, (32, 32)).__getitems__([int(row) for row in rows])
    with torch.no_grad():
        features = student(normalise(pixels, torch.device("cpu"))).pooled.double().numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    judge = KNeighborsClassifier(
        5, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute"
    ).fit(features[6:], labels[rows[6:]])
    accuracy = (judge.predict(features[:6]) == labels[rows[:6]]).mean()
    assert summary["knn"] == pytest.approx(accuracy)


def test_a_store_without_labels_has_no_knn_and_says_so(train_config, monkeypatch, capsys):
    unlabelled = property(lambda self: np.full(80, -1))
    monkeypatch.setattr(Cache, "labels", unlabelled)
    assert train(train_config("log.knn_every=2", "recipe.steps=2"))["knn"] is None
    assert "the store has no labels" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="too few to hold some out"):
        train(train_config("log.knn_every=2", "keep.best=knn", out="other"))
