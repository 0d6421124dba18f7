"""Depths of real backbones: what is read, what is written, what is hidden."""

from __future__ import annotations

import copy

import pytest
import torch
from preceptor.errors import ConfigError
from preceptor.train.alignment import build_alignment
from preceptor.train.alignment.base import Space
from preceptor.train.stages import choose_stages, mask_pixels
from preceptor.train.students import Student

SMALL = {
    "resnet10t": {"size": 64, "channels": [16, 16, 32, 32], "output_stride": 16},
    "vit_tiny_patch16_224": {"size": (32, 48), "patch_size": 8, "depth": 3, "embed_dim": 48},
    "vit_small_patch16_dinov3": {"size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3},
    "convnext_atto": {"size": 64},
    "efficientnet_lite0": {"size": 64},
    "swin_tiny_patch4_window7_224": {"size": 56, "depths": [1, 1, 1, 1], "embed_dim": 24},
}
SPACES = {"vit/patch": Space("vit", 4, 8, (2, 2)), "vit/cls": Space("vit", 1, 8, None)}
every_student = pytest.mark.parametrize("name", SMALL)


def make(name: str) -> tuple[Student, torch.Tensor]:
    torch.manual_seed(0)
    student = Student(name, **SMALL[name]).eval()
    return student, torch.randn(2, 3, *student.size)


@every_student
def test_what_is_read_is_timms_intermediate_map(name):
    student, pixels = make(name)
    wanted = tuple(range(len(student.stages)))
    assert wanted
    maps = student.model.forward_intermediates(pixels, output_fmt="NCHW", intermediates_only=True)
    output = student(pixels, stages=wanted)
    for number, (stage, expected) in enumerate(zip(student.stages, maps, strict=True)):
        assert expected.shape[1:] == (stage.dim, *stage.grid)
        read = output.stages[number]
        torch.testing.assert_close(read.tokens, expected.flatten(2).transpose(1, 2))
        assert read.prefix.shape == (2, stage.prefix, stage.dim)
    plain = student(pixels)
    assert torch.equal(plain.pooled, output.pooled)
    assert plain.stages == {}


class Adds:
    """Adds a ramp over the channels at some stages and counts them."""

    def __init__(self, stages, value):
        self.stages, self.value, self.met = stages, value, []

    def begin(self, batch):
        return torch.zeros(batch)

    def visit(self, stage, carried, tokens):
        self.met.append((stage, tuple(tokens.shape)))
        added = torch.linspace(-self.value, self.value, tokens.shape[-1])
        return carried + stage, added.expand_as(tokens)


@every_student
def test_what_is_written_goes_through_the_rest_of_the_backbone(name):
    student, pixels = make(name)
    last = len(student.stages) - 1
    before = student(pixels)
    nothing = student(pixels, interaction=Adds((0, last), 0.0))
    assert torch.equal(nothing.pooled, before.pooled)
    adds = Adds((0, last), 0.5)
    after = student(pixels, interaction=adds, stages=(0,))
    assert [stage for stage, _ in adds.met] == [0, last]
    for stage, shape in adds.met:
        there = student.stages[stage]
        assert shape == (2, there.prefix + there.grid[0] * there.grid[1], there.dim)
    assert after.carried.tolist() == [last, last]
    shift = after.stages[0].tokens - student(pixels, stages=(0,)).stages[0].tokens
    expected = torch.linspace(-0.5, 0.5, shift.shape[-1]).expand_as(shift)
    torch.testing.assert_close(shift, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after.tokens, before.tokens)
    assert torch.equal(student(pixels).pooled, before.pooled)


@every_student
def test_a_copy_has_hooks_of_its_own(name):
    student, pixels = make(name)
    other = copy.deepcopy(student)
    expected = student(pixels, interaction=Adds((0,), 0.5)).pooled
    assert torch.equal(other(pixels, interaction=Adds((0,), 0.5)).pooled, expected)


def test_a_pass_that_fails_leaves_nothing_behind():
    student, pixels = make("resnet10t")

    class Broken(Adds):
        def visit(self, stage, carried, tokens):
            raise RuntimeError("broken")

    before = student(pixels).pooled
    with pytest.raises(RuntimeError, match="broken"):
        student(pixels, interaction=Broken((0,), 1.0))
    assert torch.equal(student(pixels).pooled, before)


@every_student
def test_a_hidden_cell_is_not_seen(name):
    """Whatever the pixels of the hidden cells are, the output stays the same."""
    student, pixels = make(name)
    rows, columns = student.grid
    mask = torch.zeros(2, rows * columns, dtype=torch.bool)
    mask[0, 0] = mask[1, -1] = True
    token = None if student.patch_dim is None else torch.randn(student.patch_dim)
    assert (token is not None) is name.startswith("vit")
    changed = pixels.clone()
    height, width = student.size[0] // rows, student.size[1] // columns
    changed[0, :, :height, :width] += 1
    changed[1, :, -height:, -width:] -= 2
    a = student(pixels, mask=mask, mask_token=token).tokens
    assert torch.equal(a, student(changed, mask=mask, mask_token=token).tokens)
    assert not torch.equal(a, student(pixels).tokens)
    if token is not None:
        embedded = student.model.patch_embed(pixels).flatten(1, -2)
        other = student(pixels, mask=mask, mask_token=token + 1).tokens
        assert not torch.equal(a, other)
        assert embedded.shape == (2, rows * columns, student.patch_dim)


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_small_r26_s32_224"])
def test_a_stem_whose_windows_overlap_is_shown_no_hidden_pixel(name):
    """Its embeddings of the cells around a hidden one would tell what lies there."""
    torch.manual_seed(0)
    student = Student(name, size=96, depth=1).eval()
    assert student.patch_dim is None
    pixels = torch.randn(1, 3, 96, 96)
    rows, columns = student.grid
    mask = torch.zeros(1, rows * columns, dtype=torch.bool)
    mask[0, 1] = True
    height, width = 96 // rows, 96 // columns
    changed = pixels.clone()
    changed[:, :, :height, width : 2 * width] += 1
    assert not torch.equal(student(pixels).tokens, student(changed).tokens)
    assert torch.equal(student(pixels, mask=mask).tokens, student(changed, mask=mask).tokens)


@pytest.mark.parametrize("compiled", [False, True])
def test_batch_norms_keep_the_statistics_of_whole_images(compiled):
    student, pixels = make("resnet10t")
    student.train()
    if compiled:
        student.compile(backend="eager")
    mask = torch.rand(2, student.grid[0] * student.grid[1]) < 0.5

    def statistics():
        return {k: v.clone() for k, v in student.model.named_buffers() if "running" in k}

    start = statistics()
    student(pixels)
    moved = statistics()
    assert not any(torch.equal(start[name], moved[name]) for name in start)
    student(pixels, mask=mask)
    assert all(torch.equal(moved[name], value) for name, value in statistics().items())
    student(pixels)
    assert not any(torch.equal(moved[name], value) for name, value in statistics().items())


def test_hidden_blocks_are_the_mean_colour():
    pixels = torch.ones(1, 3, 6, 8)
    mask = torch.tensor([[False, True, False, False, False, False]])
    hidden = mask_pixels(pixels, mask, (3, 2))
    assert hidden[0, :, :2, 4:].sum() == 0
    assert hidden.sum() == 3 * (6 * 8 - 2 * 4)


def test_stages_are_chosen_by_number_or_how_many():
    vit, _ = make("vit_tiny_patch16_224")
    cnn, _ = make("resnet10t")
    assert choose_stages(vit.stages, 0, "x") == ()
    assert choose_stages(vit.stages * 4, 3, "x") == (3, 7, 11)
    assert choose_stages(vit.stages * 4, 3, "x", before_last=True) == (2, 5, 8)
    assert choose_stages(cnn.stages, 2, "x") == (3, 4)
    assert choose_stages(cnn.stages, 2, "x", before_last=True) == (2, 3)
    assert choose_stages(cnn.stages, [-1, 1, 1], "x") == (1, 4)
    with pytest.raises(ConfigError, match=r"no depth 5; it has 0 act1 \(32 x 32, 64\), 1 layer1"):
        choose_stages(cnn.stages, [5], "depths")


@pytest.mark.parametrize(
    "name", ["resnet10t", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
)
@pytest.mark.parametrize(
    "config",
    [
        {"name": "model_token", "write_back": 2, "layers": 1, "width": 32},
        {"name": "ladder"},
        {"name": "masked"},
    ],
    ids=lambda config: config["name"],
)
def test_every_weight_is_trained_and_gradients_of_the_end_exclude_one_another(name, config):
    student, pixels = make(name)
    student.train()
    alignment = build_alignment({**config, "balance": "fixed"}, student, SPACES)
    targets = {key: torch.randn(2, space.tokens, space.dim) for key, space in SPACES.items()}
    optimizer = torch.optim.SGD([*student.parameters(), *alignment.parameters()], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        output = alignment.run_student(student, pixels)
        loss = alignment(output, targets).loss
        loss.backward(retain_graph=True)
        optimizer.step()
    idle = [
        key
        for module in (student, alignment)
        for key, p in module.named_parameters()
        if p.grad is None
    ]
    assert idle == []

    # The backbone's gradient is what its ends pass on, each counted once.
    output = alignment.run_student(student, pixels)
    loss = alignment(output, targets).loss
    weight = next(student.parameters())
    (whole,) = torch.autograd.grad(loss, weight, retain_graph=True)
    ends = output.ends()
    pulls = torch.autograd.grad(
        loss, ends, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    passed = torch.autograd.grad(ends, weight, [p.detach() for p in pulls], allow_unused=True)
    torch.testing.assert_close(passed[0], whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_a_compiled_student_reads_and_writes_the_same(name):
    student, pixels = make(name)
    alignment = build_alignment(
        {
            "name": "model_token", "write_back": 2, "layers": 0, "width": 32, "teacher_stream": 0.0
        },
        student, SPACES,
    )  # fmt: skip
    with torch.no_grad():
        for site in alignment.write_back.sites.values():
            site.output.weight.normal_(std=0.1)
    expected = alignment.run_student(student, pixels)
    plain = student(pixels)
    student.compile(backend="eager")
    found = alignment.run_student(student, pixels)
    torch.testing.assert_close(found.carried, expected.carried)
    torch.testing.assert_close(found.tokens, expected.tokens)
    again = alignment.run_student(student, pixels + 1)
    assert not torch.allclose(again.carried, found.carried)
    torch.testing.assert_close(student(pixels).tokens, plain.tokens)
