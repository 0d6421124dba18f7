"""Teachers against timm's own forward passes, with local checkpoints."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from omegaconf import OmegaConf
from preceptor.checkpoints import read_checkpoint
from preceptor.errors import ConfigError, TeacherError
from preceptor.extract.pipeline import load_teachers
from preceptor.extract.teachers import Preprocessing, load_teacher
from preceptor.extract.teachers.from_timm import TimmTeacher
from preceptor.tests.extract.random_networks import images, randomised
from timm.data import resolve_model_data_config
from torch import nn

# Small networks of every layout that timm's features come in.
NETWORKS = ["test_vit", "test_vit3", "test_efficientnet", "test_convnext", "resnet10t"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    paths = {}
    for name in [*NETWORKS, "swin_tiny_patch4_window7_224"]:
        paths[name] = folder / f"{name}.safetensors"
        network = randomised(timm.create_model(name))
        safetensors.torch.save_file(network.state_dict(), str(paths[name]))
    return paths


def reference(name: str, path: Path, **options: object) -> nn.Module:
    network = timm.create_model(name, **options)
    network.load_state_dict(safetensors.torch.load_file(path))
    return network.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_default_spaces_equal_timms_features_and_head(
    name: str, checkpoints: dict[str, Path]
) -> None:
    teacher = load_teacher("t", f"timm:{name}", checkpoint=str(checkpoints[name]))
    network = reference(name, checkpoints[name])
    config = resolve_model_data_config(network)
    assert teacher.preprocessing.size == config["input_size"][1:]
    assert teacher.preprocessing.mean == config["mean"]
    assert teacher.preprocessing.std == config["std"]
    assert teacher.preprocessing.interpolation == config["interpolation"]
    pixels = images(teacher)
    tokens, descriptor = teacher(pixels).values()
    with torch.no_grad():
        features = network.forward_features(pixels)
        expected = network.forward_head(features, pre_logits=True)
    if features.ndim == 3:
        features = features[:, network.num_prefix_tokens :]
    else:
        features = features.flatten(2).transpose(1, 2)
    assert torch.allclose(tokens, features, atol=1e-5)
    assert torch.allclose(descriptor, expected[:, None], atol=1e-5)
    assert not tokens.requires_grad
    shapes = [(s.tokens, s.dim) for s in teacher.spaces]
    assert shapes == [tuple(tokens.shape[1:]), tuple(descriptor.shape[1:])]
    rows, columns = teacher.spaces[0].grid or (0, 0)
    assert rows * columns == tokens.shape[1]
    assert teacher.spaces[1].grid is None


def test_channels_last_layouts_become_a_grid(checkpoints: dict[str, Path]) -> None:
    name = "swin_tiny_patch4_window7_224"
    spaces = {"map": {}, "stage": {"take": "tokens", "block": 1}, "mean": {}}
    teacher = load_teacher("t", f"timm:{name}", checkpoint=str(checkpoints[name]), spaces=spaces)
    network = reference(name, checkpoints[name])
    pixels = images(teacher, 1)
    found = teacher(pixels)
    with torch.no_grad():
        final, (stage,) = network.forward_intermediates(pixels, indices=[1], output_fmt="NCHW")
    assert torch.allclose(found["map"], final.flatten(1, 2), atol=1e-5)
    assert torch.allclose(found["stage"], stage.flatten(2).transpose(1, 2), atol=1e-5)
    assert torch.allclose(found["mean"][:, 0], final.mean((1, 2)), atol=1e-5)
    assert [space.grid for space in teacher.spaces] == [(7, 7), (28, 28), None]


def test_vit_blocks_are_its_own_activations(checkpoints: dict[str, Path]) -> None:
    spaces = {
        "raw": {"take": "tokens", "block": 2, "norm": False},
        "normed": {"take": "tokens", "block": 2},
        "cls": {"block": 2},
        "mean": {"block": -1, "norm": False},
        "pooled": {},
    }
    path = checkpoints["test_vit"]
    teacher = load_teacher("t", "timm:test_vit", checkpoint=str(path), spaces=spaces)
    network = reference("test_vit", path)
    seen: list[torch.Tensor] = []
    for block in network.blocks:  # what timm computes, seen from outside
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    pixels = images(teacher)
    with torch.no_grad():
        pooled = network.forward_head(network.forward_features(pixels), pre_logits=True)
        normed = network.norm(seen[2])
    found = teacher(pixels)
    assert torch.allclose(found["raw"], seen[2][:, 1:], atol=1e-5)
    assert torch.allclose(found["normed"], normed[:, 1:], atol=1e-5)
    assert torch.allclose(found["cls"], normed[:, :1], atol=1e-5)
    assert torch.allclose(found["mean"][:, 0], seen[-1][:, 1:].mean(1), atol=1e-5)
    assert torch.allclose(found["pooled"], pooled[:, None], atol=1e-5)
    early = {"cls": {"block": 1}}  # stops before the end of the network
    teacher = load_teacher("t", "timm:test_vit", checkpoint=str(path), spaces=early)
    with torch.no_grad():
        assert torch.allclose(teacher(pixels)["cls"], network.norm(seen[1])[:, :1], atol=1e-5)


@pytest.mark.parametrize("name", ["cait_xxs24_224", "convit_tiny", "xcit_nano_12_p16_224"])
def test_blocks_of_networks_whose_class_token_comes_late(name: str) -> None:
    spaces = {
        "raw": {"take": "tokens", "block": 1, "norm": False},
        "mean": {"block": -1},
        "cls": {},
    }
    network = randomised(timm.create_model(name))
    teacher = TimmTeacher("t", network, f"timm:{name}", spaces=spaces)
    seen: list[torch.Tensor] = []
    for block in network.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    pixels = images(teacher, 1)
    with torch.no_grad():
        cls = network.forward_features(pixels)[:, :1]
        mean = network.norm(seen[-1][:, -196:]).mean(1, keepdim=True)
    found = teacher(pixels)
    assert torch.allclose(found["raw"], seen[1][:, -196:], atol=1e-4)
    assert torch.allclose(found["mean"], mean, atol=1e-4)
    assert torch.allclose(found["cls"], cls, atol=1e-4)
    with pytest.raises(TeacherError, match=r"teachers\.t\.spaces\.cls: timm gives no class token"):
        TimmTeacher("t", network, f"timm:{name}", spaces={"cls": {"block": 1}})


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext", "resnet10t"])
def test_cnn_stages_together_with_final_features(name: str, checkpoints: dict[str, Path]) -> None:
    spaces = {"stage": {"take": "tokens", "block": -2}, "map": {}, "pooled": {}}
    teacher = load_teacher("t", f"timm:{name}", checkpoint=str(checkpoints[name]), spaces=spaces)
    network = reference(name, checkpoints[name])
    seen: list[torch.Tensor] = []
    module = network.get_submodule(network.feature_info[-2]["module"])
    module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    pixels = images(teacher)
    found = teacher(pixels)
    with torch.no_grad():
        final = network.forward_features(pixels)
        pooled = network.forward_head(final, pre_logits=True)
    assert torch.allclose(found["stage"], seen[0].flatten(2).transpose(1, 2), atol=1e-5)
    assert torch.allclose(found["map"], final.flatten(2).transpose(1, 2), atol=1e-5)
    assert torch.allclose(found["pooled"][:, 0], pooled, atol=1e-5)


@pytest.mark.parametrize("size", [64, (64, 96)])
@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_convnext"])
def test_another_input_size(name: str, size: object, checkpoints: dict[str, Path]) -> None:
    path = checkpoints[name]
    teacher = load_teacher("t", f"timm:{name}", checkpoint=str(path), size=size)  # type: ignore[arg-type]
    height, width = (size, size) if isinstance(size, int) else size  # type: ignore[misc]
    assert teacher.preprocessing.size == (height, width)
    options = {"dynamic_img_size": True} if name.startswith("test_vit") else {}
    network = reference(name, path, **options)  # timm resamples positions in every forward pass
    pixels = images(teacher)
    with torch.no_grad():
        features = network.forward_features(pixels)
    tokens = next(iter(teacher(pixels).values()))
    if features.ndim == 3:
        features = features[:, network.num_prefix_tokens :]
    else:
        features = features.flatten(2).transpose(1, 2)
    assert torch.allclose(tokens, features, atol=1e-5)
    stride = 16 if name.startswith("test_vit") else 32
    assert teacher.spaces[0].grid == (height // stride, width // stride)
    with pytest.raises(TeacherError, match=r"takes images \[B, 3, "):
        teacher(torch.zeros(1, 3, 7, 7))


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "module", "ema"])
def test_checkpoint_forms(wrap: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    state = safetensors.torch.load_file(checkpoints["test_vit"])
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    content = {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state},
        "module": {f"module.{name}": tensor for name, tensor in state.items()},
        "ema": {"state_dict": other, "state_dict_ema": state},
    }[wrap]
    torch.save(content, tmp_path / "weights.pth")
    teacher = load_teacher("t", "timm:test_vit", checkpoint=str(tmp_path / "weights.pth"))
    same = load_teacher("t", "timm:test_vit", checkpoint=str(checkpoints["test_vit"]))
    assert teacher.identity() == same.identity()
    pixels = images(teacher)
    assert torch.equal(teacher(pixels)["patch"], same(pixels)["patch"])


@pytest.mark.parametrize("classes", [0, 7])
def test_checkpoint_of_another_classifier(
    classes: int, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    network = randomised(timm.create_model("test_vit", num_classes=classes))
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(network.state_dict(), str(path))
    teacher = load_teacher("t", "timm:test_vit", checkpoint=str(path))
    pixels = images(teacher)
    with torch.no_grad():
        expected = network.forward_features(pixels)[:, 1:]
    assert torch.allclose(teacher(pixels)["patch"], expected, atol=1e-5)


def test_identity_names_what_tokens_depend_on(checkpoints: dict[str, Path]) -> None:
    path = str(checkpoints["test_vit"])
    teacher = load_teacher("t", "timm:test_vit", checkpoint=path)
    identity = teacher.identity()
    digest = hashlib.sha256()
    for name, tensor in timm.create_model("test_vit").state_dict().items():
        tensor = safetensors.torch.load_file(path)[name]
        digest.update(f"{name} torch.float32 {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.numpy().tobytes())
    assert identity["weights_sha256"] == digest.hexdigest()
    assert identity["source"] == "timm:test_vit"
    assert identity["versions"] == {"timm": version("timm"), "torch": version("torch")}
    assert json.loads(json.dumps(identity)) == identity
    other = load_teacher(
        "t", "timm:test_vit", checkpoint=path, size=64, spaces={"cls": {"block": 1}}
    )
    assert other.identity()["weights_sha256"] == identity["weights_sha256"]
    assert other.identity()["preprocessing"]["size"] == [64, 64]
    assert other.identity()["spaces"] == {"cls": {"take": "cls", "block": 1, "norm": True}}


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code in a checkpoint has run",))


def test_bad_checkpoints_are_named(
    checkpoints: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "absent.pth")
    with pytest.raises(TeacherError, match=r"absent\.pth is no file"):
        load_teacher("t", "timm:test_vit", checkpoint=absent)
    torch.save({"model": _Code()}, tmp_path / "code.pth")
    with pytest.raises(TeacherError, match=r"code\.pth holds more than tensors \((?!Weights)"):
        load_teacher("t", "timm:test_vit", checkpoint=str(tmp_path / "code.pth"))
    assert "has run" not in capfd.readouterr().out
    whole = checkpoints["test_vit"].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TeacherError, match=r"cut\.safetensors cannot be read"):
        load_teacher("t", "timm:test_vit", checkpoint=str(tmp_path / "cut.safetensors"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(TeacherError, match=r"list\.pth holds no dictionary of tensors"):
        read_checkpoint(tmp_path / "list.pth", TeacherError)
    with pytest.raises(TeacherError, match=r"resnet10t\.safetensors does not fit timm:test_vit"):
        load_teacher("t", "timm:test_vit", checkpoint=str(checkpoints["resnet10t"]))
    state = safetensors.torch.load_file(checkpoints["test_vit"])
    del state["blocks.3.norm1.weight"]
    safetensors.torch.save_file(state, str(tmp_path / "part.safetensors"))
    with pytest.raises(TeacherError, match=r"part\.safetensors does not fit.*blocks\.3\.norm1"):
        load_teacher("t", "timm:test_vit", checkpoint=str(tmp_path / "part.safetensors"))


def test_a_network_that_only_the_hub_knows_is_told(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in ("timm:hf-hub:nobody/nothing", f"timm:local-dir:{tmp_path}"):
        with pytest.raises(
            TeacherError, match=r"teacher t: what network timm:.* a checkpoint holds"
        ):
            load_teacher("t", source, checkpoint=str(checkpoints["test_vit"]))


def test_a_folder_of_a_network_is_not_asked_of_the_hub(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    for more in ({}, {"checkpoint": str(checkpoints["test_vit"])}):
        with pytest.raises(
            TeacherError, match=r"from that folder \(.*mend the folder, or"
        ) as caught:
            load_teacher("t", f"timm:local-dir:{tmp_path}", **more)
        assert "try again with a network" not in str(caught.value)


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        ({"stage9": {}}, r"spaces\.stage9: the network has no 'stage9'; it has take=tokens"),
        ({"x": {"take": "embedding"}}, "has no take='embedding'.*pooled"),
        ({"patch": {"block": 99}}, r"no block 99; the network has blocks 0 to \d+"),
        ({"patch": {"blok": 3}}, "take, block and norm, not blok"),
        ({"pooled": {"block": 3}}, "final features; drop block"),
        (["patch", "cls"], r"spaces=\['patch', 'cls'\]: expected names"),
        ({"patch": "tokens"}, r"spaces\.patch='tokens': expected \{take:"),
        (
            {"mid": {"take": "tokens", "block": "last"}},
            "block='last', norm=None: expected",
        ),
        ({"mid": {"take": "tokens", "block": True}}, "block=True"),
        ({"mid": {"take": "tokens", "block": 1, "norm": "no"}}, "norm='no': .* true or false"),
        ({1: {}}, r"spaces\.1: the network has no '1'"),
        ({"patch": {"norm": False}}, "norm belongs to a block"),
        ({}, "is empty"),
    ],
)
def test_unknown_spaces_are_answered_with_those_there_are(
    spaces: dict, message: str, checkpoints: dict[str, Path]
) -> None:
    path = str(checkpoints["test_vit"])
    with pytest.raises(TeacherError, match=message):
        load_teacher("t", "timm:test_vit", checkpoint=path, spaces=spaces)


def test_mistakes_of_a_configuration_are_one_sentence() -> None:
    for given, message in (
        (
            {"source": "timm:test_vit", "sizes": 64},
            r"teachers\.t has no option sizes; similar",
        ),
        ({"source": "timm:test_vit", "name": "x"}, r"teachers\.t has no option name"),
        ({"source": None}, "source=None"),
        ({"source": "timm:test_vit", "checkpoint": 3}, "checkpoint=3: expected text"),
        ({"size": 64}, r"teachers\.t needs a source"),
    ):
        with pytest.raises((ConfigError, TeacherError), match=message):
            load_teachers(OmegaConf.create({"t": given}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"interpolation": "BICUBIC"}, "interpolation 'BICUBIC' is unknown; known: "),
        ({"size": 224}, "size=224; expected two positive"),
        ({"size": (0, 5)}, r"size=\(0, 5\)"),
        ({"mean": (0.5,)}, "mean=.*three numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std="),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(given: dict, message: str) -> None:
    whole = {"size": [8, 6], "mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bilinear"}
    assert Preprocessing(**whole).size == (8, 6)
    with pytest.raises(TeacherError, match=message):
        Preprocessing(**{**whole, **given})


def test_sizes_that_a_network_refuses(checkpoints: dict[str, Path]) -> None:
    path = str(checkpoints["test_vit"])
    for size in (0, [1, 2, 3], "224", 2.5, True):
        with pytest.raises(TeacherError, match="size is one positive number"):
            load_teacher("t", "timm:test_vit", checkpoint=path, size=size)  # type: ignore[arg-type]
    with pytest.raises(TeacherError, match="65 x 65 pixels"):
        load_teacher("t", "timm:test_vit", checkpoint=path, size=65)


def test_final_features_without_a_grid_are_refused_with_spaces_that_there_are() -> None:
    network = timm.create_model("pit_ti_224")
    for spaces in (None, {"mean": {}}):
        told = r"no grid that is known here; .*spaces=\{map: \{block: -1\}, pooled: \{\}\}"
        with pytest.raises(TeacherError, match=told):
            TimmTeacher("t", network, "timm:pit_ti_224", spaces=spaces)
    advised = {"map": {"block": -1}, "pooled": {}}
    teacher = TimmTeacher("t", network, "timm:pit_ti_224", spaces=advised)
    assert [space.grid for space in teacher.spaces] == [(7, 7), None]


def test_a_network_without_a_descriptor_is_refused_with_a_look_at_the_spaces(
    monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, Path]
) -> None:
    """The encoders of timm's language models have none; their size is not at fault."""
    network = reference("resnet10t", checkpoints["resnet10t"])

    def none(*_arguments: object, **_options: object) -> None:
        raise NotImplementedError("it does not support classification")

    monkeypatch.setattr(network, "forward_head", none)
    with pytest.raises(TeacherError, match=r"classification; .* or other teachers\.t\.spaces"):
        TimmTeacher("t", network, "timm:resnet10t")
    assert TimmTeacher("t", network, "timm:resnet10t", spaces={"map": {}}).spaces[0].grid


def test_pixels_that_no_patch_sees_are_refused(checkpoints: dict[str, Path]) -> None:
    path = str(checkpoints["test_vit"])
    told = (
        r"teachers\.t\.size: 72 x 64 pixels are no whole patches of 16 x 16; say 64 x 64 or 80 x 64"
    )
    with pytest.raises(TeacherError, match=told):
        load_teacher("t", "timm:test_vit", checkpoint=path, size=(72, 64))


def test_a_network_that_timm_loads_in_part_is_refused_too(checkpoints: dict[str, Path]) -> None:
    """Of some timm takes any file, and leaves at random whatever that lacks."""
    path, name = str(checkpoints["resnet10t"]), "vit_base_patch16_siglip_gap_224"
    told = (
        rf"resnet10t\.safetensors does not fit timm:{name}: it lacks \d+ of its weights, such as "
    )
    with pytest.raises(TeacherError, match=told):
        load_teacher("t", f"timm:{name}", checkpoint=path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:resnet10q", "no network 'resnet10q'; similar: .*resnet10t"),
        ("timm:test_vit.r161_in1k", "no weights 'r161_in1k' for test_vit; known: r160_in1k"),
        ("open_clip:ViT-B-61/openai", "no architecture 'ViT-B-61'; similar: ViT-B-16"),
        ("open_clip:ViT-B-16/openia", "unknown weights of ViT-B-16; known: openai"),
        ("open_clip:ViT-B-16", "no weights of ViT-B-16; known: openai"),
        ("torchvision:resnet50", "is none of timm:NAME"),
        ("timm:", "is none of timm:NAME"),
        ("call:json", "not of the form call:module:function"),
        ("call:no_such_module:f", "no_such_module cannot be imported"),
        ("call:json:dump_all", "json has no function dump_all; similar: dump"),
        ("call:json:dumps", "json:dumps failed: TypeError"),
        ("call:platform:python_version", "returned str, not a Teacher"),
    ],
)
def test_unknown_sources_are_named(source: str, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        load_teacher("t", source)


def test_function_that_takes_no_option() -> None:
    with pytest.raises(TeacherError, match="takes no size"):
        load_teacher("t", "call:platform:python_version", size=112)
