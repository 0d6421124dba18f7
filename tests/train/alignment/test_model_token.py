"""The model token's modules with keys, values and groups written out, in float64."""

from __future__ import annotations

import pytest
import torch
from preceptor.train.attention import CrossAttention, ProjectedTokens
from torch.nn import functional


@pytest.fixture
def double(build, given_student):
    """A model token in float64 with nothing left at its initial value, and a student for it; the
    teachers' stream is tested by itself."""

    def make(**options):
        options = {"width": 16, "heads": 2, "teacher_stream": 0.0, **options}
        alignment = build("model_token", **options).double()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in alignment.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.2 * noise
        return alignment, given_student(dtype=torch.float64)

    return make


def heads_of(x, heads=2):
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def attention(query, keys, values, heads=2):
    """Softmax attention of projected rows, head by head."""
    q, k, v = (heads_of(x, heads) for x in (query, keys, values))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)


def linear(module, x, group):
    bias = None if module.bias is None else module.bias[group]
    return functional.linear(x, module.weight[group], bias)


def norm(module, x, group):
    return functional.layer_norm(x, x.shape[-1:], module.weight[group, 0], module.bias[group, 0])


def mlp(sequence, x, group):
    return linear(
        sequence[3], functional.gelu(linear(sequence[1], norm(sequence[0], x, group), group)), group
    )


def intra(layer, x, seen, group):
    if layer.attention is None:
        return x
    a = layer.attention
    read = attention(
        linear(a.q_proj, norm(layer.norm, x, group), group),
        linear(a.k_proj, seen, group),
        linear(a.v_proj, seen, group),
    )
    x = x + linear(a.out_proj, read, group)
    return x if layer.mlp is None else x + mlp(layer.mlp, x, group)


def inter(exchange, together, seen):
    x = exchange.norm(together)
    a = exchange.attention
    if isinstance(a, CrossAttention):
        union = torch.cat(seen, 1)  # what the merge by logsumexp never builds
        update = a.out_proj(attention(a.q_proj(x), a.k_proj(union), a.v_proj(union)))
    else:
        weights, biases = a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3)
        q, k, v = (functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
        update = a.out_proj(attention(q, k, v))
    gate = 1 if exchange.gamma_attention is None else exchange.gamma_attention
    together = together + gate * update
    if exchange.mlp is None:
        return together
    gate = 1 if exchange.gamma_mlp is None else exchange.gamma_mlp
    return together + gate * exchange.mlp(together)


def alternate(reader, start, seen):
    """All layers on a list of model tokens [B, M, d], one a space."""
    m = list(start)
    for layer in reader.layers:
        m = [intra(layer, x, seen[i], i) for i, x in enumerate(m)]
        if layer.inter is not None:
            m = list(inter(layer.inter, torch.cat(m, 1), seen).chunk(len(m), 1))
    return m


@pytest.mark.parametrize(
    "options",
    [
        {"inter": "self"},
        {"inter": "cross", "tokens": 3},
        {"inter": "none", "layers": 1},
        {"inter": "self", "gamma": None, "mlp_ratio": 0, "layers": 3},
        {"inter": "cross", "gamma": None, "residual": False},
        {"inter": "cross", "intra": False, "tokens": 3},
    ],
)
def test_tokens_and_predictions_follow_the_formula(double, run, options):
    alignment, student = double(**options)
    output = run(alignment, student)
    reader = alignment.reader
    seen = [reader.inputs[i](output.tokens) + reader.positions[i] for i in range(2)]
    start = [alignment.model_tokens[i].expand(5, -1, -1) for i in range(2)]
    expected = alignment.norm(torch.stack(alternate(reader, start, seen), 1))
    torch.testing.assert_close(alignment.attend(output), expected, rtol=1e-9, atol=1e-9)

    said = alignment.token_heads["vit/cls"](expected[:, 1].flatten(1))
    if options.get("residual", True):
        said = said + alignment.heads["vit/cls"](output.pooled)
    found = alignment.predict(output, dense=False).descriptors["vit/cls"]
    torch.testing.assert_close(found, said, rtol=1e-9, atol=1e-9)


def visited(alignment, student):
    """Stages 0 and 1: number, stage, site, and random features [4, N, D] as the backbone's."""
    generator = torch.Generator().manual_seed(2)
    for number in (0, 1):
        stage, site = student.stages[number], alignment.write_back.sites[str(number)]
        rows, columns = stage.grid
        shape = (4, stage.prefix + rows * columns, stage.dim)
        yield number, stage, site, torch.randn(shape, generator=generator, dtype=torch.float64)


def pooled_input(site, stage, h):
    """What a site reads of features: their map pooled to 3 x 3, projected, with positions."""
    image = h[:, stage.prefix :].transpose(1, 2).unflatten(2, stage.grid)
    pooled = functional.adaptive_avg_pool2d(image, 3).flatten(2).transpose(1, 2)
    return site.input(pooled) + site.positions


def written(site, z, h):
    """What model tokens z add to features h: a cross-attention whose queries are the features."""
    keys, values = site.key_value(site.norm(z)).chunk(2, -1)
    return site.output(attention(site.query(h), keys, values))


def test_the_backbone_is_read_and_written_as_the_formula_says(double):
    alignment, student = double(write_back=[0, 1], layers=0, pool=3, tokens=2)
    z = alignment.begin(4)
    assert torch.equal(z, alignment.model_tokens.flatten(0, 1).expand(4, -1, -1))
    for number, stage, site, h in visited(alignment, student):
        found_z, found_update = alignment.visit(number, z, h)

        z = inter(site.layer.inter, intra(site.layer, z, pooled_input(site, stage, h), 0), None)
        torch.testing.assert_close(found_z, z, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found_update, written(site, z, h), rtol=1e-9, atol=1e-9)


def test_what_the_backbone_carries_out_is_what_the_heads_read(double, run):
    alignment, student = double(write_back=[0, 2], layers=0)
    output = run(alignment, student)
    tokens = alignment.norm(output.carried.view(5, 2, 4, 16))
    torch.testing.assert_close(alignment.attend(output), tokens)
    said = alignment.heads["cnn/pool"](output.pooled)
    said = said + alignment.token_heads["cnn/pool"](tokens[:, 0].flatten(1))
    found = alignment.predict(output, dense=False).descriptors["cnn/pool"]
    torch.testing.assert_close(found, said)


def test_the_student_begins_untouched(build):
    """The write starts at zero, and its gradient does not."""
    alignment = build("model_token", write_back=1)
    h = torch.randn(3, 11, 20)
    _, update = alignment.visit(2, alignment.begin(3), h)
    assert not update.any()
    update.sum().backward()
    assert alignment.write_back.sites["2"].output.weight.grad.any()


@pytest.mark.parametrize("options", [{"inter": "self"}, {"inter": "cross"}, {"inter": "none"}])
def test_the_teachers_stream_is_the_same_modules_over_the_cached_tokens(
    double, run, targets, options
):
    alignment, student = double(teacher_stream=0.5, **options)
    output = run(alignment, student)
    wanted = {name: t.double() for name, t in targets.items()}
    seen = [
        alignment.stream_inputs[i](wanted[name]) for i, name in enumerate(("cnn/map", "vit/patch"))
    ]
    start = [alignment.model_tokens[i].expand(5, -1, -1) for i in range(2)]
    stream = [alignment.norm(m) for m in alternate(alignment.reader, start, seen)]
    found = alignment(output, wanted)

    def distance(a, b):
        cosine = functional.cosine_similarity(a, b, dim=-1)
        return 0.9 * (1 - cosine).mean() + 0.1 * functional.smooth_l1_loss(a, b)

    own = alignment.attend(output)
    for i, (teacher, label) in enumerate((("cnn", "cnn/pool"), ("vit", "vit/cls"))):
        said = alignment.stream_heads[label](stream[i].flatten(1))
        expected = distance(said, wanted[label][:, 0])
        torch.testing.assert_close(found.losses[f"{label}:stream"], expected.detach())
        expected = distance(own[:, i], stream[i])
        torch.testing.assert_close(found.losses[f"{teacher}:tokens"], expected.detach())
    assert set(alignment.eval()(output, wanted).losses) == set(targets)


def test_tokens_that_predict_alone_have_terms_and_a_gradient_from_the_start(
    build, double, run, targets
):
    alignment, student = double(alone=0.5)
    output = run(alignment, student)
    wanted = {name: t.double() for name, t in targets.items()}
    found, own = alignment(output, wanted), alignment.attend(output)
    extra = 0.0
    for i, label in enumerate(("cnn/pool", "vit/cls")):
        head = alignment.alone_heads[label]
        said, target = own[:, i].flatten(1) @ head.weight.T + head.bias, wanted[label][:, 0]
        cosine = functional.cosine_similarity(said, target, dim=-1)
        expected = 0.9 * (1 - cosine).mean() + 0.1 * functional.smooth_l1_loss(said, target)
        torch.testing.assert_close(found.losses[f"{label}:alone"], expected.detach())
        extra = extra + 0.5 * expected
    alignment.alone = 0.0
    torch.testing.assert_close(found.loss, alignment(output, wanted).loss + extra)
    assert set(alignment.eval()(output, wanted).losses) == set(targets)

    for weight in (0.0, 1.0):
        alignment = build("model_token", alone=weight, teacher_stream=0.0)
        output = run(alignment)
        alignment(output, targets).loss.backward()
        grad = alignment.model_tokens.grad
        assert (grad is not None and bool(grad.any())) == bool(weight)


def test_the_teachers_stream_is_a_target_and_not_pulled_to_the_student(build, run, targets):
    alignment = build("model_token", teacher_stream=1.0)
    output = run(alignment)
    losses = {term.label: term.loss for term in alignment.terms(output, targets)}
    pulled = torch.autograd.grad(
        losses["cnn:tokens"], list(alignment.stream_inputs.parameters()), allow_unused=True
    )
    assert all(gradient is None for gradient in pulled)
    output = run(alignment)
    losses = {term.label: term.loss for term in alignment.terms(output, targets)}
    (reached,) = torch.autograd.grad(losses["cnn:tokens"], output.tokens, retain_graph=True)
    assert reached.any()
    trained = torch.autograd.grad(losses["cnn/pool:stream"], alignment.stream_inputs[0].weight)
    assert trained[0].any()


def test_without_gates_to_open_it_starts_as_regression(build, run, targets):
    plain, tokens = build("regression"), build("model_token", teacher_stream=0.0)
    assert not tokens.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    output = run(plain)
    a, b = plain(output, targets), tokens(output, targets)
    torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=0)


def test_without_exchange_spaces_do_not_see_each_other(build, run):
    for inter_space, expected in (("none", True), ("self", False), ("cross", None)):
        alignment = build("model_token", inter=inter_space)
        output = run(alignment)
        before = alignment.attend(output)[:, 0]
        with torch.no_grad():
            (alignment.model_tokens if expected is not None else alignment.reader.positions)[1] += 1
        assert torch.equal(before, alignment.attend(output)[:, 0]) is bool(expected)


@pytest.mark.parametrize("inter_space", ["self", "cross"])
def test_without_the_intra_space_read_a_stage_is_as_the_formula_says(double, inter_space):
    """ "self": no image reaches the tokens; "cross": the map does, through the exchange alone."""
    alignment, student = double(
        intra=False, inter=inter_space, write_back=[0, 1], layers=0, pool=3, tokens=2
    )
    z = alignment.begin(4)
    for number, stage, site, h in visited(alignment, student):
        found_z, found_update = alignment.visit(number, z, h)
        if inter_space == "cross":
            seen = [pooled_input(site, stage, h)]
        else:
            assert site.input is site.positions is site.pool is None
            seen = None
        z = inter(site.layer.inter, z, seen)
        torch.testing.assert_close(found_z, z, rtol=1e-9, atol=1e-9)
        assert torch.equal(z[0], z[1]) is (inter_space == "self")
        torch.testing.assert_close(found_update, written(site, z, h), rtol=1e-9, atol=1e-9)


def test_without_the_intra_space_read_none_of_its_weights_are_there(build):
    options = {"write_back": 2, "layers": 1, "width": 16, "heads": 2, "teacher_stream": 0.0}
    whole = build("model_token", **options).state_dict()
    kept = build("model_token", intra=False, **options).state_dict()
    own = ("layer.norm.", "layer.attention.", "layer.mlp.", "layers.0.norm.",
           "layers.0.attention.", "layers.0.mlp.", "input.", "inputs.", "positions",
           "sites.1.pool.", "sites.2.pool.")  # fmt: skip
    gone = {name for name in whole if any(part in name for part in own) and ".inter." not in name}
    assert set(kept) == set(whole) - gone
    crossing = build("model_token", intra=False, inter="cross", **options).state_dict()
    assert {name for name in crossing if ".inter." not in name} == {
        name
        for name in whole
        if ".inter." not in name and (name not in gone or any(part in name for part in own[6:]))
    }


def test_tokens_that_are_the_same_for_all_images_are_no_readout(build):
    options = {"write_back": 1, "layers": 1, "teacher_stream": 0.0}
    assert "tokens" in build("model_token", **options).readouts
    assert "tokens" in build("model_token", intra=False, inter="cross", **options).readouts
    constant = build("model_token", intra=False, **options)
    assert list(constant.readouts) == ["pooled", "spatial", "predictions"]


def test_grouped_attention_is_each_groups_own():
    torch.manual_seed(0)
    grouped = CrossAttention(8, 12, 2, groups=3).double()
    query, tokens = torch.randn(4, 3, 2, 8).double(), torch.randn(4, 3, 7, 12).double()
    alone = []
    for group in range(3):
        single = CrossAttention(8, 12, 2).double()
        single.load_state_dict({k: v[group] for k, v in grouped.state_dict().items()})
        alone.append(single(query[:, group], tokens[:, group]))
    torch.testing.assert_close(grouped(query, tokens), torch.stack(alone, 1))
    grouped.implementation = "standard"
    torch.testing.assert_close(grouped(query, tokens), torch.stack(alone, 1))


def test_projected_tokens_are_never_needed():
    """Codes under an absorbed projection against decoded tokens that are projected first."""
    torch.manual_seed(0)
    grouped = CrossAttention(8, 12, 2, groups=2).double()
    shared = CrossAttention(8, 12, 2).double()
    query = torch.randn(4, 2, 3, 8).double()
    standing, plain = [], []
    for count, dim in ((5, 9), (7, 6)):
        codes = torch.randint(-127, 128, (4, count, dim), dtype=torch.int8)
        scale, weight, bias = torch.rand(4, count), torch.randn(12, dim), torch.randn(12)
        parts = scale.double() / 99, weight.double(), bias.double()
        standing.append(ProjectedTokens(codes, *parts))
        decoded = codes.double() * parts[0].unsqueeze(-1)
        plain.append(functional.linear(decoded, *parts[1:]))
    found = grouped(query, standing)
    for group in range(2):
        single = CrossAttention(8, 12, 2).double()
        single.load_state_dict({k: v[group] for k, v in grouped.state_dict().items()})
        torch.testing.assert_close(found[:, group], single(query[:, group], plain[group]))
    everything = shared(query.flatten(1, 2), torch.cat(plain, 1))
    torch.testing.assert_close(shared.over_spaces(query.flatten(1, 2), standing), everything)


def test_model_tokens_look_twice_with_the_same_tokens_inside(build, run, student, targets):
    options = {"write_back": 2, "layers": 1, "width": 16, "mask_ratio": 0.5}
    alignment = build("model_token", mask_weight=0.7, **options)
    output = run(alignment)
    assert output.masked.carried is not None
    found = alignment(output, targets)
    hidden = {k: float(v) for k, v in found.losses.items() if k.endswith(":masked")}
    # The terms are those of `masked`, whose own formula is tested above.
    judge = build("masked", mask_weight=0.7, mask_ratio=0.5)
    judge.hidden_patches.load_state_dict(alignment.hidden_patches.state_dict())
    expected = judge(output, targets).losses
    assert hidden == {k: float(v) for k, v in expected.items() if k.endswith(":masked")}
    assert set(hidden) == {"cnn/map:masked", "vit/patch:masked"}
    plain = build("model_token", **options)
    plain.load_state_dict(alignment.state_dict(), strict=False)
    base = float(plain(output, targets).loss.detach())
    assert float(found.loss.detach()) == pytest.approx(base + 0.7 * sum(hidden.values()), rel=1e-6)
    assert run(alignment.eval()).masked is None
    assert len(student.passes) == 1
