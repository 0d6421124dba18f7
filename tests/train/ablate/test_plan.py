"""Which runs there are, what they are called, and what each is compared with."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from preceptor.errors import ConfigError
from preceptor.train.ablate.plan import Variant, baseline_of, option, plan_runs


def test_every_combination_of_levels_seed_by_seed():
    factors = {"seeds": [0, 1], "alignment": ["a", "b"], "teachers": ["x", ["x", "y"]]}
    runs = plan_runs(factors)
    assert [run.name for run in runs] == [
        "a-x-s0", "a-x+y-s0", "b-x-s0", "b-x+y-s0", "a-x-s1", "a-x+y-s1", "b-x-s1", "b-x+y-s1",
    ]  # fmt: skip
    assert runs[1].options == {"align": "a", "align.spaces": ["x", "y"], "seed": 0}
    assert runs[1].variant.levels == {"align": "a", "align.spaces": "x+y"}


def test_labels_stand_for_values_and_for_sets_of_options():
    factors = {
        "method": {
            "full": {"align": "model_token"},
            "alone": {"align": "a", "align.inter": "none"},
        },
        "recipe.lr": [0.1, 0.2],
        "student": {"small": "resnet_micro"},
    }
    runs = plan_runs(factors)
    assert [run.name for run in runs] == [
        "full-lr=0.1-small", "full-lr=0.2-small", "alone-lr=0.1-small", "alone-lr=0.2-small",
    ]  # fmt: skip
    assert runs[2].options == {
        "align": "a",
        "align.inter": "none",
        "recipe.lr": 0.1,
        "student": "resnet_micro",
    }


def test_names_of_folders_hold_nothing_but_letters_digits_and_signs():
    (run,) = plan_runs({"cache": ["/data/../x y"]})
    assert "/" not in run.name
    assert " " not in run.name


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"align": "regression"}, r"factors.align: expected a list .*\{align: \[A, B\]\}"),
        ({"align": []}, "factors.align: expected a list"),
        ({"seed": [0, "x"]}, "factors.seed: 'x' is not a whole number"),
        ({"seed": [0, -1]}, "factors.seed: -1 is not a whole number from 0 up"),
        ({"out": ["a", "b"]}, "factors.out: out is no factor, every run has a folder of its own"),
        ({"kind": {"a": {"out": "x"}}}, "factors.kind: out is no factor"),
        ({"align": ["a", "a"]}, "several runs would be called a; label them"),
        ({"cache": ["/a b", "/a_b"]}, "several runs would be called"),
        ({"align": {}}, "factors.align: expected a list"),
        ({"teachers": ["x"], "spaces": ["y"]}, "teachers and factors.spaces both decide align.sp"),
        ({"align": ["x"], "alignment": ["y"]}, "align and factors.alignment both decide align:"),
        (
            {"method": {"plain": {"align.inter": "none"}}, "align.inter": ["self"]},
            "factors.method and factors.align.inter both decide align.inter",
        ),
        ({"method": {"plain": {"seed": 5}}, "seed": [0]}, "method and factors.seed both decide"),
        ({"encoding": ["int4"], "cache": ["/a"]}, "encoding and factors.cache both decide cache"),
        ({"seed": {"one": {"seed": 1, "recipe.lr": 2}}}, "seed: one sets recipe.lr too"),
    ],
)
def test_factors_that_cannot_be_used(factors, message):
    with pytest.raises(ConfigError, match=message):
        plan_runs(factors)


def _variants(*levels: dict[str, str]) -> list[Variant]:
    return [Variant(level, {}) for level in levels]


def test_a_baseline_is_the_level_that_differs_and_all_else_the_same():
    variants = _variants(
        {"align": "a", "student": "cnn"}, {"align": "b", "student": "cnn"},
        {"align": "a", "student": "vit"}, {"align": "b", "student": "vit"},
    )  # fmt: skip
    of_align = {"a, cnn": None, "b, cnn": "a, cnn", "a, vit": None, "b, vit": "a, vit"}
    assert baseline_of(variants, None) == of_align
    assert baseline_of(variants, "a") == baseline_of(variants, "align=a") == of_align
    assert baseline_of(variants, "vit") == {
        "a, cnn": "a, vit", "b, cnn": "b, vit", "a, vit": None, "b, vit": None,
    }  # fmt: skip
    assert baseline_of(_variants({"align": "a"}), None) == {"a": None}


def test_a_missing_baseline_is_answered_with_what_there_is():
    variants = _variants({"align": "regression"}, {"align": "ladder"})
    with pytest.raises(ConfigError, match=r"did you mean ladder.*align: regression, ladder"):
        baseline_of(variants, "lader")
    twice = _variants({"a": "x", "b": "x"}, {"a": "y", "b": "x"})
    with pytest.raises(ConfigError, match="several factors have it; write FACTOR=LABEL"):
        baseline_of(twice, "x")


words = st.text(
    st.characters(codec="utf-8", exclude_characters="$", exclude_categories=["C", "Z"]), min_size=1
)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(values)
def test_an_option_is_read_by_hydra_as_it_was_meant(value):
    (parsed,) = OverridesParser.create().parse_overrides([option("key", value)])

    def plain(found):
        if isinstance(found, dict):
            return {plain(key): plain(item) for key, item in found.items()}
        if isinstance(found, list):
            return [plain(item) for item in found]
        return found.text if hasattr(found, "text") else found

    assert plain(parsed.value()) == value
