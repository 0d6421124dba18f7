"""Protocols against scikit-learn, torchmetrics and loops, and against leaks of labels."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from preceptor.errors import ConfigError, DataError
from preceptor.train.evaluation import (
    PROTOCOLS,
    Classes,
    Features,
    Maps,
    Spaces,
    Targets,
    build_suite,
    cka,
)
from preceptor.train.evaluation.base import split
from preceptor.train.evaluation.cka import Alignment, linear_cka
from preceptor.train.evaluation.fewshot import FewShot
from preceptor.train.evaluation.knn import KNN
from preceptor.train.evaluation.regression import Regression
from preceptor.train.evaluation.retrieval import average_precision
from scored import one
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.metrics import r2_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import StandardScaler
from torchmetrics.retrieval import RetrievalMAP

CLASSES = 4


def clusters(count: int, seed: int, dim: int = 12):
    centres = np.random.default_rng(0).normal(size=(CLASSES, dim))
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=count)
    return (centres[labels] + random.normal(size=(count, dim))).astype(np.float32), labels


def both(train: int = 200, test: int = 120) -> tuple[Features, Classes]:
    (x, y), (queries, truth) = clusters(train, 1), clusters(test, 2)
    return Features(x, queries), Classes("class", y, truth)


def test_knn_chooses_on_held_out_training_images():
    features, truth = both()
    (score,) = one("knn", features, truth, k=[1, 5, 40], temperature=[0.07, 1.0])
    fit, held = split(200, 0.2, 0, truth.train)
    found = {}
    for k in (1, 5, 40):
        for t in (0.07, 1.0):
            judge = KNeighborsClassifier(
                k, metric="cosine", algorithm="brute", weights=lambda d, t=t: np.exp((1 - d) / t)
            ).fit(features.train[fit], truth.train[fit])
            found[k, t] = judge.score(features.train[held], truth.train[held])
    best = max(found, key=lambda key: found[key])
    assert len(set(found.values())) > 1
    assert score.chosen == {"k": best[0], "temperature": best[1]}
    assert score.validation == pytest.approx(found[best], abs=1e-12)
    judge = KNeighborsClassifier(
        best[0],
        metric="cosine",
        algorithm="brute",
        weights=lambda d: np.exp((1 - d) / best[1]),
    ).fit(features.train, truth.train)
    assert score.value == pytest.approx(judge.score(features.test, truth.test), abs=1e-12)


@pytest.mark.parametrize("shots", [1, 5])
def test_few_shot_is_the_nearest_centroid_of_the_images_drawn(shots):
    features, truth = both()
    (score,) = one("fewshot", features, truth, shots=[shots], repeats=3)
    assert (score.key, score.images) == (f"fewshot/{shots}-shot", 120)
    protocol, mean = FewShot(shots=[shots], repeats=3), features.train.mean(0)

    def cl2n(x):
        return (x - mean) / np.linalg.norm(x - mean, axis=1, keepdims=True)

    found, drawn_before = [], set()
    for repeat in range(3):
        drawn = protocol.draw(truth.train, shots, repeat)
        assert drawn.shape == (CLASSES, shots)
        assert len(np.unique(drawn)) == drawn.size
        assert (truth.train[drawn] == np.arange(CLASSES)[:, None]).all()
        drawn_before.add(tuple(drawn.ravel()))
        chosen = drawn.ravel()
        judge = NearestCentroid().fit(cl2n(features.train[chosen]), truth.train[chosen])
        found.append(judge.score(cl2n(features.test), truth.test))
    assert len(drawn_before) == 3
    assert score.value == pytest.approx(np.mean(found), abs=1e-9)
    assert score.details["deviation_over_repeats"] == pytest.approx(np.std(found, ddof=1))


def test_average_precision_is_torchmetrics_and_the_loop():
    (gallery, labels), (queries, truth) = clusters(90, 1), clusters(40, 2)
    truth[3] = 77  # a class that the gallery lacks
    found = average_precision(gallery, labels, queries, truth)

    def unit(x):
        return x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)

    similarity = unit(queries) @ unit(gallery).T
    for query in range(len(queries)):
        hits, precisions = 0, []
        for rank, place in enumerate(np.argsort(-similarity[query], kind="stable"), start=1):
            if labels[place] == truth[query]:
                hits += 1
                precisions.append(hits / rank)
        assert found[query] == pytest.approx(np.mean(precisions) if precisions else 0.0, abs=1e-12)
    judge = RetrievalMAP(empty_target_action="neg")
    value = judge(
        torch.from_numpy(1 + similarity).flatten(),  # it takes what is not positive for irrelevant
        torch.from_numpy(labels[None, :] == truth[:, None]).flatten(),
        indexes=torch.arange(len(queries)).repeat_interleave(len(labels)),
    )
    assert found.mean() == pytest.approx(float(value), abs=1e-6)


def test_regression_is_scikit_learns_ridge_and_its_r2():
    random = np.random.default_rng(3)
    x, queries = (random.normal(2, 3, size=(n, 6)).astype(np.float32) for n in (150, 70))
    weight = random.normal(size=(6, 2))
    y, truth = (part @ weight + random.normal(0, 4, size=(len(part), 2)) for part in (x, queries))
    y, truth = y * [1, 100] + 5, truth * [1, 100] + 5
    strengths = [1e-3, 0.3, 30.0]
    (score,) = one(
        "regression", Features(x, queries), Targets("pose", y, truth), strengths=strengths
    )

    def predict(strength, fit, asked):
        scaler, targets = StandardScaler().fit(x[fit]), StandardScaler().fit(y[fit])
        ridge = Ridge(alpha=strength * len(x[fit]))
        ridge.fit(scaler.transform(x[fit]), targets.transform(y[fit]))
        return targets.inverse_transform(ridge.predict(scaler.transform(asked)))

    fit, held = split(150, 0.2, 0)
    found = [r2_score(y[held], predict(s, fit, x[held])) for s in strengths]
    best = int(np.argmax(found))
    assert score.chosen == {"strength": strengths[best]}
    assert score.validation == pytest.approx(found[best], abs=1e-6)
    predicted = predict(strengths[best], slice(None), queries)
    assert score.value == pytest.approx(r2_score(truth, predicted), abs=1e-6)
    assert score.details["rmse"] == pytest.approx(
        np.sqrt(((predicted - truth) ** 2).mean(0)), rel=1e-5
    )
    assert score.key == "regression@pose"


def test_a_target_that_is_the_same_for_all_that_choose_has_no_say():
    random = np.random.default_rng(4)
    x, queries = (random.normal(size=(n, 40)).astype(np.float32) for n in (100, 60))
    weight = random.normal(size=40)
    y, truth = ((p @ weight + random.normal(0, 9, len(p)))[:, None] for p in (x, queries))
    fit, held = split(100, 0.2, 0)
    rare, rare_test = np.zeros((2, 100)), np.zeros((1, 60))
    rare[0, fit[0]] = rare[1, held[0]] = rare_test[0, 3] = 1
    alone, beside = (
        one("regression", Features(x, queries), Targets("t", values, judged))[0]
        for values, judged in (
            (y, truth),
            (np.c_[y, rare[0]], np.c_[truth, rare_test[0]]),
        )
    )
    assert alone.chosen["strength"] > 1e-3
    assert (beside.chosen, beside.validation) == (alone.chosen, pytest.approx(alone.validation))
    assert beside.details["r2"][0] == pytest.approx(alone.value)
    for values in rare[:1], rare[1:]:  # alone: nothing can be chosen by; and all that varies
        (score,) = one("regression", Features(x, queries), Targets("t", values.T, rare_test.T))
        assert (score.validation is None) == (not values[0, held].any())
        json.dumps(score.as_json(), allow_nan=False)


def test_cka_is_its_definition_with_centring_matrices():
    random = np.random.default_rng(5)
    x = random.normal(3, 1, size=(30, 9)).astype(np.float32)
    y = np.concatenate([x[:, :4] * 2, random.normal(size=(30, 40))], 1).astype(np.float32)

    def definition(a, b):
        h = np.eye(len(a)) - 1 / len(a)
        k, l = (h @ (p.astype(np.float64) @ p.astype(np.float64).T) @ h for p in (a, b))
        return np.trace(k @ l) / np.sqrt(np.trace(k @ k) * np.trace(l @ l))

    assert linear_cka(x, y) == pytest.approx(definition(x, y), abs=1e-9)
    rotation = np.linalg.qr(random.normal(size=(9, 9)))[0]
    assert linear_cka(x, (x @ rotation * 7 + 1).astype(np.float32)) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, np.ones_like(y)) == 0
    counts = random.integers(0, 3, size=30)
    repeated = np.repeat(np.arange(30), counts)
    assert Alignment(x, y)(counts[None].astype(float))[0] == pytest.approx(
        definition(x[repeated], y[repeated]), abs=1e-9
    )
    (score,) = one("cka", Features(x, x), Spaces("spaces", {"a/cls": y}))
    assert (score.key, score.value) == ("cka/a/cls", linear_cka(x, y))
    assert score.low < score.high


def test_what_is_kept_of_a_cka_is_no_larger_than_the_features(monkeypatch):
    random = np.random.default_rng(5)
    x, y = random.normal(size=(2, 200, 3)).astype(np.float32)
    for most in (200, 199):  # images of which intervals are computed
        monkeypatch.setattr(cka, "GRAM", most)
        (score,) = one("cka", Features(x, x), Spaces("spaces", {"a": y}))
        assert score.value == linear_cka(x, y)
        held = [np.asarray(part).size for part in vars(score.statistic).values()]
        assert held == ([600, 600] if most == 200 else [1])
        assert (score.low is None) == (most < 200) == np.isnan(score.resampled).all()


CLASSIFICATION = ["knn", "linear", "fewshot", "retrieval", "robustness"]


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_labels_of_the_test_images_do_not_leak_into_training(name):
    # Test features spell out their labels, training features are noise about other labels: who
    # learns from test images is right about all of them, who does not is right by chance.
    random = np.random.default_rng(6)
    labels, truth = random.integers(CLASSES, size=400), random.integers(CLASSES, size=300)
    spelled = np.zeros((300, 10))
    spelled[:, :CLASSES] = 10 * np.eye(CLASSES)[truth]
    spelled = spelled.astype(np.float32)
    noise = random.normal(size=(400, 10)).astype(np.float32)
    options = {"shots": [5]} if name == "fewshot" else {}
    options = {"corruptions": ["jpeg"], "severities": [1]} if name == "robustness" else options
    features = Features(noise, spelled, corrupted={("jpeg", 1): spelled})
    fair = one(name, features, Classes("class", labels, truth), **options)
    # Whole clusters of test images are right or wrong together, so chance is coarse here.
    assert all(score.value < 0.6 for score in fair)
    # And these features do show a leak where there is one.
    again = Features(np.concatenate([noise, spelled]), spelled, corrupted=features.corrupted)
    merged = Classes("class", np.concatenate([labels, truth]), truth)
    leaked = one(name, again, merged, **options)
    assert leaked[0].value > fair[0].value + 0.2


@pytest.mark.parametrize("name", ["knn", "linear", "retrieval", "fewshot"])
def test_validation_images_are_not_those_that_were_fitted(name):
    # Training images that can be memorised and not understood: only a leak makes them right.
    random = np.random.default_rng(7)
    labels, truth = random.integers(CLASSES, size=200), random.integers(CLASSES, size=50)
    features = Features(np.eye(200, 260, dtype=np.float32), np.eye(50, 260, 200, dtype=np.float32))
    options = {"fewshot": {"shots": [10]}, "knn": {"k": [1, 2]}, "linear": {"strengths": [1e-6]}}
    for score in one(name, features, Classes("class", labels, truth), **options.get(name, {})):
        assert score.validation < 0.5


def test_regression_does_not_learn_from_test_or_validation_images():
    random = np.random.default_rng(8)
    y, truth = random.normal(size=(200, 1)), random.normal(size=(80, 1))
    noise, spelled = random.normal(size=(200, 4)), np.repeat(truth, 4, 1)
    features = Features(noise.astype(np.float32), spelled.astype(np.float32))
    (score,) = one("regression", features, Targets("t", y, truth))
    assert score.value < 0.3
    memory = Features(np.eye(200, dtype=np.float32), np.eye(80, 200, dtype=np.float32))
    (score,) = one("regression", memory, Targets("t", y, truth), strengths=[1e-9])
    assert score.validation < 0.3


def test_robustness_judges_the_clean_probe_on_corrupted_features():
    features, truth = both()
    random = np.random.default_rng(1)
    corrupted = {
        (name, level): features.test
        + random.normal(0, 0.8 * level, features.test.shape).astype("f4")
        for name in ("jpeg", "contrast")
        for level in (1, 3)
    }
    features = Features(features.train, features.test, corrupted=corrupted)
    found = one(
        "robustness", features, truth,
        corruptions=["jpeg", "contrast"], severities=[1, 3], strengths=[0.1],
    )  # fmt: skip
    scaler = StandardScaler().fit(features.train)
    judge = RidgeClassifier(alpha=0.1 * 200).fit(scaler.transform(features.train), truth.train)
    expected = {
        key: judge.score(scaler.transform(part), truth.test) for key, part in corrupted.items()
    }
    assert [score.variant for score in found] == ["mean", "jpeg", "contrast"]
    assert found[1].details == {
        "1": pytest.approx(expected["jpeg", 1]), "3": pytest.approx(expected["jpeg", 3])
    }  # fmt: skip
    assert found[0].value == pytest.approx(np.mean(list(expected.values())))
    clean = judge.score(scaler.transform(features.test), truth.test)
    assert found[0].details == {"clean": pytest.approx(clean)}
    # Nobody invents figures of models that were not run on corrupted pixels.
    assert one("robustness", Features(features.train, features.test), truth) == []


def test_images_without_a_label_are_left_out_of_their_task():
    features, truth = both()
    known, known_test = np.arange(200) % 3 > 0, np.arange(120) % 4 > 0
    partly = Classes(
        "class", np.where(known, truth.train, -1), np.where(known_test, truth.test, -1)
    )
    less = Features(features.train[known], features.test[known_test])
    whole = Classes("class", truth.train[known], truth.test[known_test])
    suite = build_suite(["knn", "linear", "fewshot", "retrieval"], {"fewshot": {"shots": [3]}})
    found, expected = suite.score(features, [partly]), suite.score(less, [whole])
    assert found == expected
    assert {score.images for score in found} == {90}


def test_the_only_image_of_a_class_is_fitted_and_never_chooses():
    _, labels = clusters(60, 1)
    lonely = labels.copy()
    lonely[[7, 40]] = 50, 60
    fit, held = split(60, 0.25, 3, lonely)
    assert sorted([*fit, *held]) == list(range(60))
    assert {7, 40} <= set(fit)
    for kind in range(CLASSES):
        share = (lonely[held] == kind).sum() / (lonely == kind).sum()
        assert share == pytest.approx(0.25, abs=0.08)
    features, truth = both(60, 20)
    scores = build_suite(["knn", "linear", "retrieval"], {"knn": {"k": [1, 5]}}).score(
        features, [Classes("class", lonely, truth.test)]
    )
    assert [score.validation is None for score in scores] == [False] * 3


def test_class_numbers_cost_nothing_by_their_size():
    features, truth = both()
    far = np.array([3, 10**6, 2**31 - 1, 2**40])
    suite = build_suite(["knn", "linear", "fewshot", "retrieval"], {"fewshot": {"shots": [3]}})
    found = suite.score(features, [Classes("class", far[truth.train], far[truth.test])])
    assert found == suite.score(features, [truth])


def test_every_protocol_is_repeatable():
    features, truth = both()
    options = {"fewshot": {"shots": [1, 10]}}
    suite = build_suite(["knn", "linear", "fewshot", "retrieval"], options, seed=3)
    suite.check([truth])
    assert suite.score(features, [truth]) == suite.score(features, [truth])


def test_mistakes_are_told():
    features, truth = both(60, 20)
    with pytest.raises(ConfigError, match=r"did you mean knn\?"):
        build_suite(["kn"])
    with pytest.raises(ConfigError, match=r"knn\.q: knn has no such option; it has .*temperature"):
        build_suite(["knn"], {"knn": {"q": 1}})
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        build_suite(["knn"], validation=1.0)
    with pytest.raises(ConfigError, match="validation=0: expected a share above 0 and below 1"):
        build_suite(["knn"], validation=0)
    with pytest.raises(ConfigError, match=r"knn\.k=\[3, 0\]: expected positive"):
        KNN(k=[3, 0])
    with pytest.raises(ConfigError, match="ridge, logistic"):
        build_suite(["linear"], {"linear": {"probe": "svm"}})
    with pytest.raises(ConfigError, match=r"regression\.strengths"):
        Regression(strengths=[-1.0])
    with pytest.raises(ConfigError, match="needs a task of targets; there are class"):
        build_suite(["regression"]).check([truth])
    with pytest.raises(ConfigError, match=r"fewer than 50; ask for fewer"):
        build_suite(["fewshot"]).check([truth])
    nobody = Classes("class", truth.train, np.full(20, -1))
    with pytest.raises(ConfigError, match="task class: no test image has a label"):
        build_suite(["knn"]).check([nobody])
    with pytest.raises(ConfigError, match="60 training labels for 59 images"):
        build_suite(["knn"]).score(Features(features.train[1:], features.test), [truth])
    with pytest.raises(ConfigError, match="cannot split 3 images"):
        one(
            "knn",
            Features(features.train[:3], features.test),
            Classes("c", np.arange(3), truth.test),
            k=[1, 2],
        )
    of_one = Classes("class", np.zeros(60, int), truth.test)
    few = Classes("class", np.arange(60) // 2, truth.test)
    for name in ("linear", "robustness"):
        with pytest.raises(ConfigError, match="task class: the training images are all of one cl"):
            build_suite([name]).check([of_one])
    for name, options in {"linear": {}, "retrieval": {}, "knn": {"k": [1, 2]}}.items():
        build_suite([name], {name: options}).check([few])
    alone = Classes("class", np.arange(60), truth.test)
    for name, options in {"linear": {}, "knn": {"k": [1, 2]}}.items():
        with pytest.raises(
            ConfigError, match="cannot split 60 images of 60 classes into some that"
        ):
            build_suite([name], {name: options}).check([alone])
    with pytest.raises(ConfigError, match="cannot split 1 images"):
        build_suite(["dense"]).check([Maps("m", np.eye(2, dtype=int)[None], np.ones((1, 2, 2)))])
    with pytest.raises(ConfigError, match="same for every test image"):
        build_suite(["regression"]).check([Targets("t", np.arange(9.0)[:, None], np.ones((4, 1)))])
    with pytest.raises(DataError, match="not finite"):
        Features(np.full((3, 2), np.nan, np.float32), np.ones((3, 2), np.float32))
    with pytest.raises(DataError, match="does not fit"):
        Features(np.ones((3, 2), np.float32), np.ones((3, 4), np.float32))
    assert set(PROTOCOLS) >= {"knn", "linear", "fewshot", "retrieval", "regression", "dense"}


@pytest.mark.parametrize("sizes", [[2] * 25, [1, 2, 3] * 9, [1] * 40 + [5], [4] * 12])
def test_few_images_a_class_are_split_so_that_every_class_keeps_one(sizes):
    classes = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    fit, held = split(len(classes), 0.2, 0, classes)
    assert sorted([*fit, *held]) == list(range(len(classes)))
    others = len(classes) - sizes.count(1)
    assert 0 < len(held) <= np.ceil(0.2 * others)
    assert set(classes[fit]) == set(range(len(sizes)))
    again = split(len(classes), 0.2, 0, classes)
    assert all(np.array_equal(a, b) for a, b in zip((fit, held), again, strict=True))
    assert not np.array_equal(held, split(len(classes), 0.2, 1, classes)[1])


def test_retrieval_of_instances_needs_no_second_image():
    features, truth = (
        Features(np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)),
        np.arange(4),
    )
    build_suite(["retrieval"]).check([Classes("class", truth, truth)])
    (score,) = one("retrieval", features, Classes("class", truth, truth))
    assert (score.value, score.validation) == (1.0, None)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_configuration_states_every_option_with_its_default(name):
    with initialize_config_module("preceptor.configs", version_base="1.3"):
        stated = OmegaConf.to_container(compose("eval", ["out=x"])[name])
    protocol = PROTOCOLS[name]()
    own = [f.name for f in fields(protocol) if f.name not in ("validation", "seed", "device")]
    defaults = {key: getattr(protocol, key) for key in own}
    assert stated == {
        key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()
    }
