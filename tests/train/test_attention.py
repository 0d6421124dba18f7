"""CrossAttention against torch.nn.MultiheadAttention holding the same weights."""

import pytest
import torch
from preceptor.kernels import merge_spaces
from preceptor.train.attention import CrossAttention
from torch import nn

BATCH, MODEL_TOKENS, TOKENS, DIM, TOKEN_DIM, HEADS = 3, 2, 13, 12, 20, 4


def modules(norm, implementation):
    torch.manual_seed(0)
    ours = CrossAttention(DIM, TOKEN_DIM, HEADS, norm=norm, implementation=implementation).double()
    theirs = nn.MultiheadAttention(
        DIM, HEADS, kdim=TOKEN_DIM, vdim=TOKEN_DIM, batch_first=True, dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        theirs.q_proj_weight.copy_(ours.q_proj.weight)
        theirs.k_proj_weight.copy_(ours.k_proj.weight)
        theirs.v_proj_weight.copy_(ours.v_proj.weight)
        theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, torch.zeros(DIM), ours.v_proj.bias]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    return ours, theirs


@pytest.mark.parametrize("implementation", ["absorbed", "standard", "auto"])
@pytest.mark.parametrize("norm", [False, True])
def test_outputs_and_gradients_match_multihead_attention(implementation, norm):
    ours, theirs = modules(norm, implementation)
    model_tokens = torch.randn(BATCH, MODEL_TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(BATCH, TOKENS, TOKEN_DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(BATCH, TOKENS) > 0.3
    mask[:, 0] = True
    y = ours(model_tokens, tokens, mask=mask)
    x = tokens if ours.norm is None else ours.norm(tokens)
    expected, _ = theirs(model_tokens, x, x, key_padding_mask=~mask, need_weights=False)
    torch.testing.assert_close(y, expected)

    cotangent = torch.randn_like(y)
    shared = [model_tokens, tokens]
    got = torch.autograd.grad(
        y, [*shared, ours.k_proj.weight, ours.v_proj.weight, ours.q_proj.bias], cotangent
    )
    wanted = torch.autograd.grad(
        expected,
        [*shared, theirs.k_proj_weight, theirs.v_proj_weight, theirs.in_proj_bias],
        cotangent,
    )
    for ours_grad, their_grad in zip(got[:4], wanted[:4], strict=True):
        torch.testing.assert_close(ours_grad, their_grad)
    torch.testing.assert_close(got[4], wanted[4][:DIM])


@pytest.mark.parametrize(
    ("count", "heads", "token_dim", "implementation", "projects"),
    [
        # At M H = 0.6 D it still absorbs.
        (3, 4, 20, "auto", False),
        (4, 4, 20, "auto", True),
        (4, 6, 48, "auto", False),
        (5, 6, 48, "auto", True),
        (5, 6, 48, "absorbed", False),
        (1, 1, 48, "standard", True),
    ],
)
def test_auto_projects_keys_and_values_where_there_are_many_rows(
    monkeypatch, count, heads, token_dim, implementation, projects
):
    module = CrossAttention(12, token_dim, heads, implementation=implementation)
    forms = {False: module._attend_absorbed, True: module._attend_standard}
    used = []
    for kind, form in forms.items():
        name = form.__name__

        def spy(*arguments, form=form, kind=kind):
            used.append(kind)
            return form(*arguments)

        monkeypatch.setattr(module, name, spy)
    module(torch.randn(2, count, 12), torch.randn(2, 7, token_dim))
    assert used == [projects]


@pytest.mark.parametrize("implementation", ["absorbed", "standard"])
@pytest.mark.parametrize("norm", [False, True])
def test_spaces_merge_into_one_softmax(implementation, norm):
    ours, _ = modules(norm, implementation)
    model_tokens = torch.randn(BATCH, MODEL_TOKENS, DIM, dtype=torch.float64)
    tokens = torch.randn(BATCH, TOKENS, TOKEN_DIM, dtype=torch.float64)
    parts = [ours.attend(model_tokens, piece) for piece in tokens.split([5, 8], dim=1)]
    merged, _ = merge_spaces([v for v, _ in parts], [lse for _, lse in parts])
    whole, _ = ours.attend(model_tokens, tokens)
    torch.testing.assert_close(merged, whole)
    spaces = tokens[:, :12].unflatten(1, (3, 4))
    torch.testing.assert_close(
        ours.over_spaces(model_tokens, spaces), ours(model_tokens, tokens[:, :12])
    )


@pytest.mark.parametrize("implementation", ["absorbed", "standard"])
def test_the_logsumexp_is_not_of_half_precision(implementation):
    ours, _ = modules(True, implementation)
    model_tokens, tokens = torch.randn(BATCH, MODEL_TOKENS, DIM), torch.randn(BATCH, 9, TOKEN_DIM)
    with torch.autocast("cpu", torch.bfloat16):
        values, lse = ours.float().attend(model_tokens, tokens)
    assert values.dtype == torch.bfloat16
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("implementation", ["absorbed", "standard"])
def test_a_sample_without_tokens_gets_the_output_bias(implementation):
    ours, _ = modules(True, implementation)
    model_tokens = torch.randn(BATCH, MODEL_TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(BATCH, TOKENS, TOKEN_DIM, dtype=torch.float64)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[1] = False
    y = ours(model_tokens, tokens, mask=mask)
    torch.testing.assert_close(y[1], ours.out_proj.bias.expand(MODEL_TOKENS, -1))
    (gradient,) = torch.autograd.grad(y.square().sum(), model_tokens)
    assert torch.isfinite(gradient).all()
    assert not gradient[1].any()
    assert gradient[0].any()


def test_a_mask_hides_no_number_that_is_none():
    ours, _ = modules(True, "absorbed")
    model_tokens = torch.randn(BATCH, MODEL_TOKENS, DIM, dtype=torch.float64)
    model_tokens[0, 1, 0] = torch.nan
    tokens = torch.randn(BATCH, TOKENS, TOKEN_DIM, dtype=torch.float64)
    y = ours(model_tokens, tokens, mask=torch.ones(BATCH, TOKENS, dtype=torch.bool))
    assert y[0, 1].isnan().all()
    assert torch.isfinite(y[1:]).all()


@pytest.mark.parametrize("norm", [False, True])
def test_int8_codes_equal_their_decoded_tokens(norm):
    ours, _ = modules(norm, "absorbed")
    codes = torch.randint(-127, 128, (BATCH, TOKENS, TOKEN_DIM), dtype=torch.int8)
    scale = torch.rand(BATCH, TOKENS, dtype=torch.float64) * 0.02
    model_tokens = torch.randn(BATCH, MODEL_TOKENS, DIM, dtype=torch.float64)
    decoded = codes * scale.unsqueeze(-1)
    torch.testing.assert_close(
        ours(model_tokens, codes, scale), ours(model_tokens, decoded), rtol=1e-6, atol=1e-6
    )


def test_state_dict_has_the_usual_names():
    names = set(CrossAttention(8, 6, 2, norm=True).state_dict())
    assert names == {
        "norm.weight",
        "norm.bias",
        "q_proj.weight",
        "q_proj.bias",
        "k_proj.weight",
        "v_proj.weight",
        "v_proj.bias",
        "out_proj.weight",
        "out_proj.bias",
    }


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="multiple of heads"):
        CrossAttention(10, 6, 3)
