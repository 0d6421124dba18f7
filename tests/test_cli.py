"""The command line: help, mistakes, and the time that importing takes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import preceptor
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from preceptor.cli import VERBS, main
from preceptor.errors import ConfigError
from preceptor.options import check_options, compose_options, from_home, readable


def test_import_and_help_do_not_import_torch() -> None:
    code = (
        "import sys, preceptor, preceptor.cli; preceptor.cli.main(['--help']); "
        "preceptor.cli.main(['train', '--help']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'timm', 'zarr', 'hydra')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_help_need_not_be_read_to_its_end(words: list[str]) -> None:
    there, end = os.pipe()
    os.close(there)
    with os.fdopen(end, "wb") as unread:
        command = [sys.executable, "-m", "preceptor", *words]
        done = subprocess.run(command, stdout=unread, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_package_is_a_program() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "preceptor", "trian"], capture_output=True, text=True
    )
    assert found.returncode == 1
    assert "trian" in found.stderr


def test_help_shows_choices_of_the_user_s_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "student").mkdir()
    own = "defaults:\n  - vit_small\n  - _self_\n\nsize: 448  # pixels\n"
    (tmp_path / "student" / "mine.yaml").write_text(own)
    assert main(["train", "--config-dir", str(tmp_path), "student=mine", "--help"]) == 0
    text = capsys.readouterr().out
    assert "mine | resnet10t" in text
    assert "student.KEY=..., as student=vit_small has them:" in text
    assert "as student=mine has them, over those of vit_small:" in text
    assert "size: 448  # pixels" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"example: preceptor {verb} " in text
    assert "options and their defaults" in text


def test_help_shows_every_option_of_every_group(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*options: str) -> str:
        assert main(["train", *options, "--help"]) == 0
        return capsys.readouterr().out

    def leaves(node: object) -> set[str]:
        if not isinstance(node, dict):
            return set()
        return {str(key) for key in node} | {leaf for one in node.values() for leaf in leaves(one)}

    with initialize_config_module("preceptor.configs", version_base="1.3"):
        config = compose("train", ["recipe=vit_small_300ep", "align=ladder"])
    text = shown("recipe=vit_small_300ep", "align=ladder")
    for group in ("data", "student", "align", "recipe", "engine"):
        names = leaves(OmegaConf.to_container(config[group]))
        assert len(names) > 2
        assert [name for name in names if f"{name}:" not in text] == []
    assert "rung:" not in shown()  # of align=ladder alone
    order = [text.index(f"recipe={c}") for c in ("imagenet_100ep has", "vit_small_100ep has")]
    assert order == sorted(order)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_composes_its_defaults(verb: str) -> None:
    with pytest.raises(ConfigError, match="required"):
        check_options(verb, [])


def test_unknown_verb_names_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 1
    assert "did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["studnt=resnet10t"], ["studnt", "did you mean student?"]),
        (["student=resnet10"], ["did you mean resnet10t?", "vit_tiny"]),
        (["align=model_tokn"], ["did you mean model_token?", "regression"]),
        (["align.tokns=3"], ["did you mean align.tokens?", "valid under align"]),
        (["seed=abc"], ["seed=abc", "a whole number"]),
        (["seed=-1"], ["seed=-1", "a number from 0 up"]),
        (["seed=0,1,x", "-m"], ["seed=x", "a whole number"]),
        (["recipe.batch_size=null"], ["recipe.batch_size=null", "a whole number", "default 512"]),
        (["align=model_token,regresion", "-m"], ["regresion", "did you mean regression?"]),
        (["cache=null"], ["cache=null", "expected text"]),
        (["data.shards=7"], ["data.shards=7", "expected text"]),
        (["seed"], ["key=value"]),
        (["seed=0,1"], ["seed=0,1 is several values", "say -m"]),
        (["cache=/lr=0.1/x", "seed=1"], ["cache=/lr=0.1/x cannot be read", "quoted"]),
        (["cache=/x/${y}", "data.shards=b"], ["refers to what is not there", "'y'"]),
        (["--config-dir", "/nowhere"], ["/nowhere", "no such folder"]),
    ],
)
def test_a_mistyped_option_is_answered_with_the_valid_ones(
    options: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *options]) == 1
    message = capsys.readouterr().err
    for part in expected:
        assert part in message
    assert len(message.strip().splitlines()) == 1


def test_what_nothing_reads_is_refused_wherever_it_was_written(tmp_path: Path) -> None:
    for group, text in {
        "recipe/mine": "defaults: [short, _self_]\nlrr: 0.1\n",
        "recipe/broken": "defaults: [short, _self_]\nlr: [0.1\n",
        "student/mine": "{name: m, model: resnet18, size: 64, pretraind: true}\n",
        "data/mine": "shards: x.tar\n",
    }.items():
        (tmp_path / group).parent.mkdir(exist_ok=True)
        (tmp_path / f"{group}.yaml").write_text(text)
    for options, expected in {
        ("recipe=mine",): r"'recipe\.lrr' \(did you mean recipe\.lr\?\) \(in recipe=mine\)",
        ("recipe=short,mine", "-m"): r"'recipe\.lrr'",
        ("student=mine",): r"'student\.pretraind' \(did you mean student\.pretrained\?\)",
        ("data=mine",): "data=mine lacks max_pixels: .* 'defaults: \\[imagenet, _self_\\]'",
        ("recipe=broken",): r"no YAML: .*broken\.yaml\", line 2",
        ("+recipe.imags_a_step=4",): r"did you mean recipe\.images_a_step\?",
        ("++recipe.imags_a_step=4",): r"did you mean recipe\.images_a_step\?",
        ("+foo=1",): "no option 'foo'",
        ("+keep.bst=knn",): r"did you mean keep\.best\?",
        ("recipe.color_jitter={brightnes: 1}",): r"did you mean brightness\?\); it has .*solarize$",
        ("~recipe.lr",): "~recipe.lr: .* cannot be taken away",
        ("align=null",): "align=null: choose one of .*regression",
        ("teachers.vit.size=4",): r"train has no option 'teachers': .*align\.spaces=",
        ("recipe.crop.scale=[0.3,1]",): r"'\+recipe\.crop\.scale=\.\.\.' adds it",
        ("student.options.drop_rate=0.1",): r"'\+student\.options\.drop_rate=\.\.\.' adds it",
        ("student.size=null",): "expected a whole number",
    }.items():
        given = [f"--config-dir={tmp_path}", "cache=a", "data.shards=b", *options]
        with pytest.raises(ConfigError, match=expected):
            check_options("train", given)


@pytest.mark.parametrize(
    "option",
    [
        "+recipe.images_a_step=512",
        "+recipe.crop={scale: [0.3, 1]}",
        "+recipe.optimizer_options.betas=[0.9,0.98]",
        "+student.options.drop_rate=0.1",
        "+align.weights.tv=2",
        "student.size=[32,64]",
    ],
)
def test_what_is_read_though_no_default_has_it_is_taken(option: str) -> None:
    check_options("train", ["cache=a", "data.shards=b", "recipe=short", option])


def test_folders_of_options_have_any_name_and_their_paths_begin_at_home(tmp_path: Path) -> None:
    folder = tmp_path / "a=b, it's \\'c"
    (folder / "student").mkdir(parents=True)
    own = "{name: m, model: resnet18, size: 64, checkpoint: ~/w.pt}\n"
    (folder / "student/mine.yaml").write_text(own)
    given = ["--config-dir", str(folder), "student=mine", "cache=a", "data.shards=b"]
    assert compose_options("train", given).student.checkpoint == os.path.expanduser("~/w.pt")


def test_home_is_found_wherever_a_text_stands() -> None:
    found = from_home(
        OmegaConf.create(
            {"a.b": "~/x", "c": ["~/y", {"d": "~/z"}], "e": "${c}", "f": "???", "g": None, "h": "~"}
        )
    )
    home = os.path.expanduser("~")
    assert (found["a.b"], found.c) == (f"{home}/x", [f"{home}/y", {"d": f"{home}/z"}])
    assert (found.e, found.g, found.h) == (found.c, None, "~")
    assert OmegaConf.is_missing(found, "f")


def test_mistakes_in_hydra_s_own_options_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["eval", "students=[a]", *EVALUATED, "out='${seed}'"]
    assert main([*given, "seed=0,1", "-m", "hydra.launcher.n_jbs=2"]) == 1
    told = capsys.readouterr().err
    assert "n_jbs" in told
    assert "Traceback" not in told
    (tmp_path / "file").touch()
    assert main([*given, "seed=0,1", "-m", f"hydra.sweep.dir={tmp_path}/file/x"]) == 1
    told = capsys.readouterr().err
    assert f"{tmp_path}/file/x" in told
    assert "Traceback" not in told


def test_a_store_with_pixels_is_enough_for_training() -> None:
    check_options("train", ["cache=a", "data.shards=null"])


def test_teachers_need_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"cache={tmp_path / 'store'}", "data.shards=null", "teachers=imagenet_hub"]
    assert main(["extract", *given]) == 1
    assert "data.shards=null: teachers need the images" in capsys.readouterr().err


def test_a_group_written_in_place_is_told_to_be_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["cache=a", "data.shards=b", "teachers={mine: {source: 'timm:resnet50'}}"]
    assert main(["extract", *given]) == 1
    message = capsys.readouterr().err
    assert "teachers is one of foundation_b, foundation_l, imagenet_hub here" in message
    assert "DIR/teachers/mine.yaml and say --config-dir DIR teachers=mine" in message


def test_spaces_of_a_teacher_are_added_and_taken_away() -> None:
    """Hydra merges mappings, so that one written in place of another would say nothing of it."""
    given = ["cache=a", "data.shards=b", "teachers=imagenet_hub"]
    of = "teachers.dinov2_b.spaces"
    with pytest.raises(ConfigError, match=r"has no 'mid'; it has patch, cls\. '\+teachers\.dinov2"):
        check_options("extract", [*given, f"{of}={{mid: {{take: tokens, block: 5}}}}"])
    with pytest.raises(ConfigError, match=rf"there is an option {of}\.cls: write it without"):
        check_options("extract", [*given, f"+{of}.cls={{norm: false}}"])
    changed = [f"+{of}.mid={{take: tokens, block: 5}}", f"~{of}.cls", "~teachers.clip_b16"]
    with pytest.raises(ConfigError, match=rf"{of}=.* would keep cls, .*: say ~{of}\.cls to leave"):
        check_options("extract", [*given, f"{of}={{patch: {{}}}}"])
    with pytest.raises(ConfigError, match=rf"{of}=.* would keep patch, "):
        check_options("extract", [*given, "teachers.dinov2_b={spaces: {cls: {}}}"])
    only = compose_options("extract", [*given, f"{of}={{patch: {{}}}}", f"~{of}.cls"])
    assert only.teachers.dinov2_b.spaces == {"patch": {}}
    with pytest.raises(ConfigError, match=r"no option 'teachers\.nope'; valid"):
        check_options("extract", [*given, "~teachers.nope"])
    teachers = compose_options("extract", [*given, *changed]).teachers
    assert list(teachers) == ["dinov2_b", "convnext_b"]
    assert teachers.dinov2_b.spaces == {"patch": {}, "mid": {"take": "tokens", "block": 5}}


@pytest.mark.parametrize("size", ["448", "null", "[224,448]"])
def test_a_teacher_s_size_is_a_side_two_sides_or_the_network_s_own(
    size: str, tmp_path: Path
) -> None:
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers/mine.yaml").write_text("vit: {source: 'timm:vit', size: 224}\n")
    given = ["--config-dir", str(tmp_path), "teachers=mine", "cache=a", "data.shards=b"]
    check_options("extract", [*given, f"teachers.vit.size={size}"])
    with pytest.raises(ConfigError, match=r"teachers\.vit\.size=big: expected a whole number"):
        check_options("extract", [*given, "teachers.vit.size=big"])


EVALUATED = ("train.cache=a", "train.shards=b", "test.cache=c", "test.shards=d")
TRAINED = ("cache=a", "data.shards=b")


@pytest.mark.parametrize(
    ("verb", "options", "expected"),
    [
        ("eval", ["knn.k=[5,20]"], None),  # "or a list to choose from"
        ("eval", ["knn.temperature=[0.07,1]"], None),
        ("train", ["align=model_token", "align.write_back=[1,3]"], None),
        ("train", ["align=ladder", "align.depths=[0,2]"], None),
        ("eval", ["knn.k=[5,x]"], "expected a list of whole numbers, such as the default 20"),
        ("eval", ["knn.k=[5,null]"], "expected a list of whole numbers"),
        ("eval", ["knn.k=x"], "expected a whole number"),
        ("eval", ["batch_size=[5,20]"], "expected a whole number"),
        ("eval", ["linear.strengths=[1,a]"], "expected a list of numbers"),
        ("eval", ["linear.strengths=0.1"], "expected a list, such as the default [10.0"),
        ("eval", ["linear.strengths=null"], "expected a list"),
        ("eval", ["fewshot.shots=[1.5]"], "expected a list of whole numbers"),
        ("eval", ["protocols=all"], None),
    ],
)
def test_what_takes_a_list_is_given_one(
    verb: str, options: list[str], expected: str | None
) -> None:
    given = [*options, *(EVALUATED if verb == "eval" else TRAINED)]
    if expected is None:
        check_options(verb, given)
        return
    with pytest.raises(ConfigError, match=re.escape(f"{options[-1].split('=')[0]}=")) as told:
        check_options(verb, given)
    assert expected in str(told.value)


def test_text_with_signs_is_read_where_it_is_quoted() -> None:
    path = "/lr=0.1,b(1)~é#"
    found = compose_options("train", [f"cache='{path}'", "data.shards=b"])
    assert found.cache == path


def test_a_swept_group_brings_its_own_keys() -> None:
    needed = ["cache=a", "data.shards=b", "-m"]
    check_options("train", ["align=model_token,regression", "seed=0,1", *needed])
    with pytest.raises(ConfigError, match=r"align\.tokens"):
        check_options("train", ["align=model_token,regression", "align.tokens=2", *needed])


def test_a_required_option_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", "cache=x"]) == 1
    assert "data.shards is required" in capsys.readouterr().err


def test_jobs_of_a_sweep_that_would_overwrite_each_other_are_refused() -> None:
    options = ["cache=a", "data.shards=b", "align.tokens=2,4", "-m"]
    with pytest.raises(ConfigError, match=r"align\.tokens=2.*align\.tokens=4.*both write"):
        check_options("train", options)
    check_options("train", [*options, "out='x-${align.tokens}'"])


def test_extractions_of_a_sweep_that_would_fill_one_store_are_refused() -> None:
    options = ["data.shards=b", "seed=0,1", "-m"]
    told = r"seed=0.*seed=1.*both write to a; .* such as cache='a-\$\{seed\}'"
    with pytest.raises(ConfigError, match=told):
        check_options("extract", ["cache=a", *options])
    check_options("extract", ["cache='a-${seed}'", *options])
    check_options("verify", ["cache=a", "seed=0,1", "-m"])


@pytest.mark.parametrize("place", range(3))
def test_flags_may_stand_anywhere(place: int, tmp_path: Path) -> None:
    given = ["cache=a", "seed=0,1"]
    given[place:place] = ["-m", "--config-dir", str(tmp_path)]
    assert readable(given) == ["-m", "--config-dir", str(tmp_path), "cache=a", "seed=0,1"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("data.shards=/x-{0..3}.tar", "data.shards='/x-{0..3}.tar'"),
        ("data.shards=x-*.tar", "data.shards='x-*.tar'"),
        ("data.shards='x-{0..3}.tar'", "data.shards='x-{0..3}.tar'"),
        ("a={b: 1}", "a={b: 1}"),
        ("out=x-${seed}", "out=x-${seed}"),
        ("seed=1,2", "seed=1,2"),
    ],
)
def test_ranges_of_shards_need_no_quotes_of_their_own(given: str, expected: str) -> None:
    assert readable([given]) == [expected]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("cache=~/store", "cache=/home/me/store"),
        ("data.shards=~/x-{0..3}.tar", "data.shards='/home/me/x-{0..3}.tar'"),
        ("students=[~/a,~/b]", "students=[/home/me/a,/home/me/b]"),
        ("train={data.shards: '~/a.tar'}", "train={data.shards: '/home/me/a.tar'}"),
        ("--config-dir=~/own", "--config-dir=/home/me/own"),
        ("~teachers.clip_b16", "~teachers.clip_b16"),
        ("data.shards=https://a.org/~me/x.tar", "data.shards=https://a.org/~me/x.tar"),
        ("data.shards=https://a.org/~/x.tar", "data.shards=https://a.org/~/x.tar"),
        ("cache=/a~/store", "cache=/a~/store"),
    ],
)
def test_the_folder_of_the_user_is_found_within_an_option(
    given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves ~ alone there, and a folder of that name is not what anybody means."""
    monkeypatch.setenv("HOME", "/home/me")
    assert readable([given]) == [expected]


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_every_verb_is_accepted(verb: str) -> None:
    words = shlex.split(VERBS[verb].example)
    check_options(verb, readable(words[2:]))


def readme_commands() -> list[list[str]]:
    text = (Path(preceptor.__file__).parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for b in blocks for line in b.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    called = (re.sub(r"^torchrun .* -m preceptor ", "preceptor ", shlex.join(w)) for w in words)
    return [shlex.split(line) for line in called if line.startswith("preceptor ")]


@pytest.mark.parametrize("words", readme_commands(), ids=lambda words: words[1])
def test_every_command_of_the_readme_is_accepted(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "mine.yaml").write_text("mine: {source: 'call:mine:mine'}\n")
    options = [str(tmp_path) if word == "my/configs" else word for word in words[2:]]
    check_options(words[1], readable(options))


def test_the_readme_has_commands_for_every_verb() -> None:
    assert {words[1] for words in readme_commands()} == set(VERBS)
