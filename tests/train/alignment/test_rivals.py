"""The other alignments against their formulas, written out."""

from __future__ import annotations

import pytest
import torch
from preceptor.train.stages import StageTokens
from torch.nn import functional


def test_the_control_has_the_model_tokens_size(build, run):
    """Within one hidden unit of every space; and nothing passes between spaces."""

    def size(alignment):
        return sum(p.numel() for p in alignment.parameters())

    for options in ({}, {"tokens": 2, "width": 32}, {"dense_weight": 0}):
        pool, token = (
            build("attention_pool", **options),
            build("model_token", teacher_stream=0.0, **options),
        )
        assert abs(size(pool) - size(token)) <= 2 * (2 * options.get("width", 128) + 1) / 2 + 1
    before = pool.attend(run(pool))[:, 0]
    with torch.no_grad():
        pool.model_tokens[1] += 1
        pool.reader.positions[1] += 1
    assert torch.equal(before, pool.attend(run(pool))[:, 0])


def test_ladder_sums_its_projectors(build, run):
    alignment = build("ladder", depths=[0, 1])
    output = run(alignment)
    assert isinstance(output.stages[0], StageTokens)
    found = alignment.predict(output, dense=True)
    first, second = output.stages[0], output.stages[1]
    pooled = {"end": output.pooled, "0": first.tokens.mean(1), "1": second.prefix[:, 0]}
    expected = sum(alignment.heads[f"vit/cls@{name}"](p) for name, p in pooled.items())
    torch.testing.assert_close(found.descriptors["vit/cls"], expected)
    maps = {"end": output.tokens}
    for name, stage, grid in (("0", first, (6, 7)), ("1", second, (4, 4))):
        image = stage.tokens.transpose(1, 2).unflatten(2, grid)
        maps[name] = functional.adaptive_avg_pool2d(image, 3).flatten(2).transpose(1, 2)
    expected = sum(alignment.projectors[f"cnn/map@{name}"](p) for name, p in maps.items())
    torch.testing.assert_close(found.dense["cnn/map"], expected)


def test_masked_is_regression_and_the_hidden_tokens(build, run, student, targets):
    alignment = build("masked", mask_ratio=0.5, mask_weight=0.7, match="student")
    output = run(alignment)
    whole, hidden = student.passes
    assert whole["mask"] is None
    assert hidden["mask_token"] is alignment.hidden_patches.mask_token
    assert hidden["mask"].sum(1).tolist() == [4] * 5  # round(0.5 * 9)
    assert len({tuple(row.tolist()) for row in hidden["mask"]}) > 1
    found = alignment(output, targets)
    said = alignment.hidden_patches.projectors["vit/patch"](output.masked.tokens)
    image = targets["vit/patch"].transpose(1, 2).unflatten(2, (5, 6))
    true = functional.interpolate(image, (3, 3), mode="bilinear", antialias=True)
    true = true.flatten(2).transpose(1, 2)
    terms = []
    for image in range(5):
        for n in range(9):
            if hidden["mask"][image, n]:
                a, b = said[image, n].double(), true[image, n].double()
                h = functional.smooth_l1_loss(a, b)
                terms.append(0.9 * (1 - functional.cosine_similarity(a, b, dim=0)) + 0.1 * h)
    expected = float(torch.stack(terms).mean())
    assert float(found.losses["vit/patch:masked"]) == pytest.approx(expected, rel=1e-5)
    plain = build("regression", match="student")
    plain.load_state_dict(alignment.state_dict(), strict=False)
    base = plain(output, targets)
    extra = 0.7 * sum(float(v) for k, v in found.losses.items() if k.endswith(":masked"))
    assert float(found.loss) == pytest.approx(float(base.loss) + extra, rel=1e-6)
    student.passes.clear()
    assert run(alignment.eval()).masked is None


def test_similarities_are_compared_with_the_batch_and_the_memory(build, run, targets):
    alignment = build("relational", queue=7, temperature=0.2, match="student")
    memory: list[torch.Tensor] = []
    for step in range(3):  # 15 descriptors through a memory of 7
        output = run(alignment)
        wanted = {k: t + step for k, t in targets.items()}
        predicted = alignment.predict(output, dense=True)
        found = alignment(output, wanted).losses
        unit = torch.nn.functional.normalize
        true = unit(wanted["vit/cls"][:, 0].double(), dim=-1)
        said = unit(predicted.descriptors["vit/cls"].double(), dim=-1)
        keys = torch.stack([*true, *memory])
        expected = divergence(true @ keys.t() / 0.2, said @ keys.t() / 0.2)
        assert float(found["vit/cls"]) == pytest.approx(expected, rel=1e-5)
        memory = [*memory, *true][-7:]

        image = wanted["vit/patch"].transpose(1, 2).unflatten(2, (5, 6))
        tokens = functional.interpolate(image, (3, 3), mode="bilinear", antialias=True)
        true = unit(tokens.flatten(2).transpose(1, 2).double(), dim=-1)
        said = unit(predicted.dense["vit/patch"].double(), dim=-1)
        terms = [
            divergence(t @ t.t() / 0.2, s @ s.t() / 0.2) for t, s in zip(true, said, strict=True)
        ]
        assert float(found["vit/patch"]) == pytest.approx(sum(terms) / 5, rel=1e-5)


def divergence(true, said):
    """Mean over rows of KL, from the definition."""
    p, q = true.softmax(-1), said.softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean().detach())


def test_a_full_memory_of_a_small_queue_keeps_the_newest(build, run, targets):
    alignment = build("relational", queue=3)
    alignment(run(alignment), targets)
    kept = alignment.memories["vit/cls"].vectors
    newest = functional.normalize(targets["vit/cls"][-3:, 0], dim=-1)
    torch.testing.assert_close(kept.sort(0).values, newest.sort(0).values)
