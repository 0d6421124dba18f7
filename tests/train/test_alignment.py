"""Alignments against small implementations of their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from preceptor.errors import ConfigError
from preceptor.train.alignment import ALIGNMENTS, Codes, alignment_options, build_alignment
from preceptor.train.alignment.base import GridResample, Space, select_spaces, token_loss
from preceptor.train.students import StudentOutput
from torch import nn
from torch.nn import functional

SPACES = {
    "cnn/map": Space("cnn", 4, 24, (2, 2)),
    "cnn/pool": Space("cnn", 1, 24, None),
    "vit/patch": Space("vit", 30, 16, (5, 6)),
    "vit/cls": Space("vit", 1, 16, None),
}


class Widths:
    """What `build_alignment` asks of a student."""

    token_dim, grid, pooled_dim = 20, (3, 3), 12


def student_output(batch: int = 5, seed: int = 0) -> StudentOutput:
    generator = torch.Generator().manual_seed(seed)
    return StudentOutput(
        tokens=torch.randn(batch, 9, 20, generator=generator, requires_grad=True),
        grid=(3, 3),
        pooled=torch.randn(batch, 12, generator=generator, requires_grad=True),
    )


def targets(batch: int = 5, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(batch, space.tokens, space.dim, generator=generator)
        for name, space in SPACES.items()
    }


def build(name: str, **options):
    torch.manual_seed(0)
    return build_alignment({"name": name, **options}, Widths(), SPACES)


def loss_in_numpy(prediction: torch.Tensor, target: torch.Tensor) -> float:
    """0.9 (1 - cos) + 0.1 smooth-L1, one token at a time in float64."""
    p = prediction.detach().double().numpy().reshape(-1, prediction.shape[-1])
    t = target.double().numpy().reshape(p.shape)
    terms = []
    for a, b in zip(p, t, strict=True):
        cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        d = np.abs(a - b)
        terms.append(0.9 * (1 - cosine) + 0.1 * np.where(d < 1, 0.5 * d * d, d - 0.5).mean())
    return float(np.mean(terms))


@pytest.mark.parametrize("shape", [(6, 1, 7), (3, 4, 9)])
def test_token_loss_is_its_formula(shape):
    generator = torch.Generator().manual_seed(3)
    a, b = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    assert float(token_loss(a, b)) == pytest.approx(loss_in_numpy(a, b), rel=1e-6)


def test_token_loss_is_float32_under_autocast():
    a, b = torch.randn(4, 1, 8), torch.randn(4, 1, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = token_loss(a.bfloat16(), b)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(loss_in_numpy(a.bfloat16(), b), rel=1e-5)


@pytest.mark.parametrize("match", ["teacher", "student"])
@pytest.mark.parametrize("name", ALIGNMENTS)
def test_loss_is_the_weighted_sum_of_its_terms(name, match):
    alignment, output, wanted = (
        build(name, match=match, dense_weight=0.4),
        student_output(),
        targets(),
    )
    found = alignment(output, wanted)
    predicted = alignment.predict(output, dense=True)
    expected = sum(
        loss_in_numpy(predicted.descriptors[s], wanted[s][:, 0]) for s in ("cnn/pool", "vit/cls")
    )
    for space, grid in (("cnn/map", (2, 2)), ("vit/patch", (5, 6))):
        p, t = predicted.dense[space], wanted[space]
        if match == "teacher":
            p = interpolate(p, (3, 3), grid)
        else:
            t = interpolate(t, grid, (3, 3))
        term = loss_in_numpy(p, t)
        assert float(found.losses[space]) == pytest.approx(term, rel=1e-5)
        expected += 0.4 * term
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert set(found.losses) == set(SPACES)


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_every_teacher_has_its_share_of_the_loss_with_gradient(name):
    alignment, output = build(name, dense_weight=0.4), student_output()
    found = alignment(output, targets())
    assert list(found.by_teacher) == ["cnn", "vit"]
    for teacher, own in (("cnn", ("cnn/pool", "cnn/map")), ("vit", ("vit/cls", "vit/patch"))):
        weighted = float(found.losses[own[0]]) + 0.4 * float(found.losses[own[1]])
        assert float(found.by_teacher[teacher].detach()) == pytest.approx(weighted, rel=1e-6)
    ends = (output.tokens, output.pooled)
    parts = [
        torch.autograd.grad(term, ends, retain_graph=True) for term in found.by_teacher.values()
    ]
    whole = torch.autograd.grad(found.loss, ends)
    for i, gradient in enumerate(whole):
        torch.testing.assert_close(parts[0][i] + parts[1][i], gradient)


def interpolate(tokens, source, target):
    image = tokens.transpose(1, 2).unflatten(2, source)
    image = functional.interpolate(image, target, mode="bilinear", antialias=True)
    return image.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_gradients_reach_student_and_every_parameter(name):
    alignment, output = build(name), student_output()
    for _ in range(2):  # a head that starts at zero passes gradients on from the second step
        alignment(output, targets()).loss.backward()
        with torch.no_grad():
            for parameter in alignment.parameters():
                parameter -= 0.01 * parameter.grad
    for tensor in (output.tokens, output.pooled):
        assert float(tensor.grad.abs().min()) > 0
    idle = [n for n, p in alignment.named_parameters() if not float(p.grad.abs().max()) > 0]
    assert not idle


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_readouts_have_the_stated_widths(name):
    alignment, output = build(name), student_output()
    widths = {"pooled": 12, "predictions": 24 + 16, "tokens": 2 * 4 * 128, "both": 12 + 1024}
    for kind in alignment.readouts:
        assert alignment.readout(output, kind).shape == (5, widths[kind])
    with pytest.raises(ConfigError, match="pooled"):
        alignment.readout(output, "nothing")


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_without_dense_terms_only_descriptors_are_read(name):
    alignment = build(name, dense_weight=0)
    assert alignment.required_spaces == ["cnn/pool", "vit/cls"]
    output = student_output()
    some = {space: targets()[space] for space in alignment.required_spaces}
    assert set(alignment(output, some).losses) == set(some)


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_a_teacher_without_descriptor_is_given_its_mean_token(name):
    torch.manual_seed(0)
    only = {"cnn/map": SPACES["cnn/map"]}
    alignment = build_alignment({"name": name}, Widths(), only)
    output, wanted = student_output(), targets()
    found = alignment(output, {"cnn/map": wanted["cnn/map"]})
    predicted = alignment.predict(output, dense=False).descriptors["cnn/map:mean"]
    assert float(found.losses["cnn/map:mean"]) == pytest.approx(
        loss_in_numpy(predicted, wanted["cnn/map"].mean(1)), rel=1e-5
    )


@pytest.mark.parametrize("match", ["teacher", "student"])
@pytest.mark.parametrize("name", ALIGNMENTS)
def test_codes_give_the_loss_and_gradients_of_their_floats(name, match):
    alignment = build(name, match=match)
    codes = {
        space: Codes(
            (40 * z).round().clamp(-127, 127).to(torch.int8), z.new_full(z.shape[:2], 1 / 40)
        )
        for space, z in targets().items()
    }
    found = []
    for wanted in (codes, {space: c.decode() for space, c in codes.items()}):
        output = student_output()
        loss = alignment(output, wanted).loss
        loss.backward()
        found.append((loss.detach(), output.tokens.grad, output.pooled.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_model_token_starts_as_regression():
    plain, tokens = build("regression"), build("model_token")
    missing = tokens.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    output = student_output()
    a, b = plain(output, targets()), tokens(output, targets())
    torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=0)


def test_model_tokens_follow_the_formula():
    """The whole alternation with keys and values written out, in float64."""
    alignment = build("model_token", layers=2, tokens=3, width=16, heads=2).double()
    with torch.no_grad():
        for parameter in alignment.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    output = student_output()
    output = StudentOutput(output.tokens.double(), output.grid, output.pooled.double())

    def attention(query, tokens, module):
        q, k, v = module.q_proj(query), module.k_proj(tokens), module.v_proj(tokens)
        heads = []
        for part in range(2):
            at = slice(8 * part, 8 * part + 8)
            scores = q[..., at] @ k[..., at].transpose(1, 2) / 8**0.5
            heads.append(scores.softmax(-1) @ v[..., at])
        return module.out_proj(torch.cat(heads, -1))

    m = [alignment.model_tokens[i].expand(5, -1, -1) for i in range(2)]
    for layer in alignment.layers:
        for i in range(2):
            seen = alignment.inputs[i](output.tokens) + alignment.positions[i]
            intra = layer.intra[i]
            m[i] = m[i] + attention(intra.norm(m[i]), seen, intra.attention)
            m[i] = m[i] + intra.mlp(m[i])
        together, inter = torch.cat(m, 1), layer.inter
        plain = nn.MultiheadAttention(16, 2, batch_first=True).double()
        plain.load_state_dict(inter.attention.state_dict())
        x = inter.norm(together)
        q, k, v = (
            functional.linear(x, w, b)
            for w, b in zip(plain.in_proj_weight.chunk(3), plain.in_proj_bias.chunk(3), strict=True)
        )
        mixed = torch.cat(
            [
                (q[..., at] @ k[..., at].transpose(1, 2) / 8**0.5).softmax(-1) @ v[..., at]
                for at in (slice(0, 8), slice(8, 16))
            ],
            -1,
        )
        together = together + inter.gamma_attention * plain.out_proj(mixed)
        together = together + inter.gamma_mlp * inter.mlp(together)
        m = list(together.chunk(2, 1))
    expected = alignment.norm(torch.stack(m, 1))
    torch.testing.assert_close(alignment.attend(output), expected, rtol=1e-10, atol=1e-10)
    descriptor = alignment.predict(output, dense=False).descriptors["vit/cls"]
    by_hand = alignment.heads["vit/cls"](output.pooled) + alignment.token_heads["vit/cls"](
        expected[:, 1].flatten(1)
    )
    torch.testing.assert_close(descriptor, by_hand, rtol=1e-10, atol=1e-10)


def test_without_exchange_spaces_do_not_see_each_other():
    for inter, expected in (("none", True), ("self", False)):
        alignment, output = build("model_token", inter=inter), student_output()
        before = alignment.attend(output)[:, 0]
        with torch.no_grad():
            alignment.model_tokens[1] += 1
        assert torch.equal(before, alignment.attend(output)[:, 0]) is expected


@pytest.mark.parametrize(
    ("source", "target"),
    [((7, 7), (16, 16)), ((16, 16), (7, 7)), ((4, 6), (6, 4)), ((1, 1), (3, 2))],
)
def test_resampling_is_torchs_antialiased_bilinear(source, target):
    tokens = torch.randn(2, source[0] * source[1], 5)
    resample = GridResample(source, target)
    torch.testing.assert_close(
        resample(tokens), interpolate(tokens, source, target), rtol=1e-5, atol=1e-5
    )
    ones = torch.ones(1, source[0] * source[1], 1)
    torch.testing.assert_close(resample(ones), torch.ones(1, target[0] * target[1], 1))
    weight = torch.randn(5, 3)
    torch.testing.assert_close(
        resample(tokens) @ weight, resample(tokens @ weight), rtol=1e-4, atol=1e-5
    )


def test_equal_grids_are_left_alone():
    tokens = torch.randn(2, 12, 5)
    assert GridResample((3, 4), (3, 4))(tokens) is tokens
    with pytest.raises(ValueError, match="12 tokens"):
        GridResample((5, 5), (3, 4))(tokens)


def test_spaces_are_chosen_by_name_or_teacher():
    assert list(select_spaces(SPACES, None)) == list(SPACES)
    assert list(select_spaces(SPACES, ["vit"])) == ["vit/patch", "vit/cls"]
    assert list(select_spaces(SPACES, ["vit/cls", "cnn"])) == ["vit/cls", "cnn/map", "cnn/pool"]
    with pytest.raises(ConfigError, match=r"vit/last.*cnn/map, cnn/pool, vit/patch, vit/cls"):
        select_spaces(SPACES, ["vit/last"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "modeltoken"}, "did you mean model_token"),
        ({"name": "regression", "tokens": 3}, "it has hidden, dense_weight, match"),
        ({"name": "regression", "match": "both"}, "valid are teacher, student"),
        ({"name": "model_token", "inter": "all"}, "valid are none, self"),
        ({"name": "model_token", "width": 30, "heads": 4}, "multiple of heads=4"),
    ],
)
def test_a_mistake_is_told_with_what_is_valid(config, message):
    with pytest.raises(ConfigError, match=message):
        build_alignment(config, Widths(), SPACES)


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_the_configuration_file_states_every_option_and_its_default(name):
    from importlib.resources import files

    from omegaconf import OmegaConf

    text = (files("preceptor.configs") / "align" / f"{name}.yaml").read_text()
    config = OmegaConf.to_container(OmegaConf.create(text))
    assert config.pop("name") == config.pop("method") == name
    assert config.pop("spaces") is None
    assert config == alignment_options(ALIGNMENTS[name])
