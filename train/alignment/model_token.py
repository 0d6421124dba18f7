"""Model token: learnable tokens read each space, exchange across spaces, and help to predict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ConfigError
from ..attention import ProjectedTokens
from ..stages import choose_stages
from ..students import StudentOutput
from .base import Alignment, Predictions, Runs, StudentShape, Term, token_loss
from .heads import dense_projector, descriptor_mlp
from .hidden_patches import HiddenPatches
from .spaces import SpaceTarget, module_key
from .targets import Codes, Target
from .token_layers import Inter, TokenReader, check_tokens, reads
from .write_back import WriteBack


class ModelToken(Alignment):
    """Gated, residual alignment through model tokens.

    Every space s (a dense space, or a teacher that has none) owns M model tokens m_s of width d,
    learnable and equal for all images at the start. With the student's tokens S [B, N, C] and
    descriptor p [B, P], and L layers (`TokenLayer`) of

        intra-space   X_s = P_s LN S + pos_s                              [B, N, d], once
                      m_s <- m_s + CrossAttention_s(LN m_s, X_s)          own weights a space
                      m_s <- m_s + MLP_s(LN m_s)
        inter-space   m   <- m + gamma_1 * Exchange(LN m)                 all S * M tokens together
                      m   <- m + gamma_2 * MLP(LN m)                      gamma [d], from 0.1

    where Exchange is self-attention among the tokens (`inter` "self") or their cross-attention to
    the X_s of all spaces under one softmax ("cross"), the predictions are

        d^_t = W2_t GELU(W1_t LN p) + W_t vec(LN m_t)                     W_t from zero
        x^_s = W_s LN S

    where m_t are the model tokens of all spaces of teacher t. At the start this is exactly
    `Regression` with the same projectors: the tokens earn their part. Without `residual` the first
    part is left out and W_t is initialised as usual. The intra-space attention of all spaces is one
    call of `kernels.cross_attention`, which never builds keys and values of the student's tokens.

    `write_back`: the tokens live inside the backbone as well. They start there, read its stages and
    are read back by them (`WriteBack`); the L layers, which may then be none, go on from there.

    Without `intra` there is no intra-space module: with `inter` "cross" the tokens see the student
    through the inter-space module alone; with "self" they are the same for all images, learnt
    constants that `write_back` gives the backbone to read, and so are no readout.

    `teacher_stream`: in training the same layers also read the cached tokens T_s of each teacher,
    X'_s = P'_s T_s (int8 codes stay codes: P' is absorbed by the kernel), from the same learnt
    tokens, which gives m'. With U_t a readout of its own, each teacher has two terms more, weighted
    by `teacher_stream`:

        l(U_t vec(LN m'_t), d_t)              trains P', U and the layers; label SPACE:stream
        l(LN m_t, stop(LN m'_t))              draws the student's tokens;  label TEACHER:tokens

    `alone`: in training each descriptor has one term more, weighted by `alone`, in which the tokens
    predict without the pooled feature,

        l(V_t vec(LN m_t), d_t)               label DESCRIPTOR:alone

    W_t and O of `WriteBack` start from zero, so that without it the tokens' modules begin without
    a gradient and go on to learn what the pooled feature leaves over.

    `mask_weight`: in training the student, tokens inside included, sees each image a second time
    with patches hidden, and predicts the teachers' tokens there: the terms of `HiddenPatches`.

    The reading of the model token is this project's own, after the abstract of "Unified
    Multi-Teacher Distillation Across Hybrid Neural Architectures": intra-space and inter-space
    modules in alternation. Its alternation is that of frame-wise and global attention in VGGT (Wang
    et al. 2025, arXiv:2503.11651); gates from a small constant are LayerScale (Touvron et al. 2021,
    arXiv:2103.17239).

    Args:
        layers: L after the backbone; at least 1, or 0 with `write_back`.
        tokens: M, model tokens a space.
        width: d; a multiple of `heads`.
        heads: attention heads, in all modules.
        mlp_ratio: hidden width of the modules' MLPs over d; 0 leaves them out.
        intra: whether there is the intra-space module.
        inter: "self", "cross" or "none".
        gamma: where the gates of the inter-space module start; None for no gates.
        residual: whether the descriptors are predicted from the pooled feature too.
        write_back: how many stages of the backbone, or their numbers; see `stages.choose_stages`.
        pool: most rows and columns of a stage's map that the tokens read.
        teacher_stream: weight of the teacher-side stream; 0 for none.
        alone: weight of the descriptors that tokens predict alone; 0 for none.
        mask_ratio: share of the cells that is hidden in the second look, between 0 and 1.
        mask_weight: weight of the hidden tokens' terms; 0 for no second look.
        hidden: width of the descriptor projectors' hidden layer.
        **options: those of `Alignment`.
    """

    undecayed = ("model_tokens",)
    readouts: Mapping[str, str] = {
        **Alignment.readouts,
        "tokens": "the normalised model tokens of all spaces, side by side",
        "both": "pooled and tokens, each scaled to unit length, side by side",
    }

    def __init__(
        self,
        student: StudentShape,
        spaces: Mapping[str, SpaceTarget],
        *,
        layers: int = 2,
        tokens: int = 4,
        width: int = 128,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        intra: bool = True,
        inter: Inter = "self",
        gamma: float | None = 0.1,
        residual: bool = True,
        write_back: int | Sequence[int] = 0,
        pool: int = 8,
        teacher_stream: float = 0.3,
        alone: float = 0.0,
        mask_ratio: float = 0.4,
        mask_weight: float = 0.0,
        hidden: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(student, spaces, **options)
        visited = choose_stages(student.stages, write_back, "write_back")
        check_tokens(
            layers,
            tokens,
            width,
            heads,
            inter,
            mlp_ratio,
            intra=intra,
            gamma=gamma,
            least_layers=0 if visited else 1,
        )
        if not reads(intra, inter):
            _check_constants(bool(visited), residual, teacher_stream, alone)
            self.readouts = Alignment.readouts
        if pool < 1 or not all(0 <= weight < float("inf") for weight in (teacher_stream, alone)):
            raise ConfigError(
                f"align: pool={pool} must be at least 1, and teacher_stream={teacher_stream} and "
                f"alone={alone} weights of at least 0"
            )
        if teacher_stream and not layers:
            raise ConfigError(
                f"align.teacher_stream={teacher_stream} reads the cached tokens with the layers "
                "after the backbone: it needs align.layers of at least 1; or say "
                "align.teacher_stream=0"
            )
        self.residual, self.teacher_stream, self.alone = residual, teacher_stream, alone
        self.streams = _streams(spaces)
        self.streams_of = {
            space.teacher: [
                i for i, name in enumerate(self.streams) if spaces[name].teacher == space.teacher
            ]
            for space in self.spaces.values()
        }
        count = student.grid[0] * student.grid[1]
        modules = (len(self.streams), width, heads, mlp_ratio, inter, gamma, intra)
        self.model_tokens = nn.Parameter(torch.empty(len(self.streams), tokens, width))
        nn.init.trunc_normal_(self.model_tokens, std=0.02)
        self.write_back = (
            WriteBack(
                width,
                student.stages,
                visited,
                heads=heads,
                mlp_ratio=mlp_ratio,
                inter=inter,
                gamma=gamma,
                intra=intra,
                pool=pool,
            )
            if visited
            else None
        )
        self.hidden_patches = None
        if mask_weight:
            dense = {name: spaces[name] for name in self.dense}
            self.hidden_patches = HiddenPatches(
                student, dense, ratio=mask_ratio, weight=mask_weight
            )
        self.reader = TokenReader(student.token_dim, count, layers, *modules) if layers else None
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict()
        self.token_heads = nn.ModuleDict()
        self.stream_heads = nn.ModuleDict()
        self.alone_heads = nn.ModuleDict()
        for label, space in self.descriptors.items():
            key, dim = module_key(label), spaces[space].dim
            if residual:
                self.heads[key] = descriptor_mlp(self.pooled_dim, hidden, dim)
            size = len(self.streams_of[spaces[space].teacher]) * tokens * width
            read = nn.Linear(size, dim, bias=not residual)
            if residual:
                nn.init.zeros_(read.weight)
            self.token_heads[key] = read
            if teacher_stream:
                self.stream_heads[key] = nn.Linear(size, dim)
            if alone:
                self.alone_heads[key] = nn.Linear(size, dim)
        self.stream_inputs = nn.ModuleList(
            nn.Linear(spaces[name].dim, width) for name in (self.streams if teacher_stream else ())
        )
        self.projectors = nn.ModuleDict(
            {
                module_key(name): dense_projector(student.token_dim, spaces[name].dim)
                for name in (self.dense if self.dense_weight else ())
            }
        )

    def _required(self) -> list[str]:
        spaces = super()._required()
        also = self.streams if self.teacher_stream else []
        return list(dict.fromkeys([*spaces, *also, *(self.dense if self.hidden_patches else [])]))

    def run_student(self, student: Runs, pixels: Tensor) -> StudentOutput:
        run = partial(student, interaction=None if self.write_back is None else self)
        output = run(pixels)
        if self.hidden_patches is None or not self.training:
            return output
        return self.hidden_patches.look(run, pixels, output)

    @property
    def lives_inside(self) -> bool:
        return self.write_back is not None

    @property
    def stages(self) -> tuple[int, ...]:
        """Numbers of the backbone's stages that the tokens visit."""
        return () if self.write_back is None else self.write_back.stages

    def begin(self, batch: int) -> Tensor:
        """The learnt tokens of all spaces [batch, S * M, d]; see `stages.Interaction`."""
        return self.model_tokens.flatten(0, 1).expand(batch, -1, -1)

    def visit(self, stage: int, carried: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Read and write one stage; see `stages.Interaction`."""
        assert self.write_back is not None
        return self.write_back.visit(stage, carried, tokens)

    def attend(self, output: StudentOutput) -> Tensor:
        """The model tokens after all layers, normalised: [B, S, M, d], S as in `streams`."""
        if output.carried is None:
            tokens = self.model_tokens.expand(output.tokens.shape[0], -1, -1, -1)
        else:
            tokens = output.carried.unflatten(1, self.model_tokens.shape[:2])
        if self.reader is not None:
            tokens = self.reader(tokens, self.reader.seen(output.tokens))
        return self.norm(tokens)

    def predict(self, output: StudentOutput, *, dense: bool) -> Predictions:
        return self._predict(output, self.attend(output), dense)

    def terms(self, output: StudentOutput, targets: Mapping[str, Target]) -> Iterator[Term]:
        tokens = self.attend(output)
        predicted = self._predict(output, tokens, dense=bool(self.dense_weight))
        yield from self.compared(predicted, targets)
        if not self.training:
            return
        if self.hidden_patches is not None:
            yield from self.hidden_patches.terms(self, output, targets)
        if self.alone:
            yield from self._said(self.alone_heads, tokens, targets, "alone", self.alone)
        if self.teacher_stream:
            yield from self._streamed(output, tokens, targets)

    def _streamed(
        self, output: StudentOutput, tokens: Tensor, targets: Mapping[str, Target]
    ) -> Iterator[Term]:
        """The terms of the teacher-side stream."""
        assert self.reader is not None
        batch = output.tokens.shape[0]
        start = self.model_tokens.expand(batch, -1, -1, -1)
        stream = self.norm(self.reader(start, self._stream_sees(targets)))
        yield from self._said(self.stream_heads, stream, targets, "stream", self.teacher_stream)
        ours, goals = self._by_teacher(tokens), self._by_teacher(stream.detach())
        for teacher, goal in goals.items():
            loss = token_loss(ours[teacher], goal)
            yield Term(f"{teacher}:tokens", teacher, self.teacher_stream, loss)

    def _said(
        self,
        heads: nn.ModuleDict,
        tokens: Tensor,
        targets: Mapping[str, Target],
        kind: str,
        weight: float,
    ) -> Iterator[Term]:
        """The terms of descriptors that tokens [B, S, M, d] alone predict, by heads for that."""
        own = self._by_teacher(tokens)
        for label, space in self.descriptors.items():
            read = own[self.spaces[space].teacher].flatten(1)
            said = heads[module_key(label)](read).unsqueeze(1)
            loss = self.descriptor_loss(label, said, self.descriptor_target(label, targets))
            yield Term(f"{label}:{kind}", self.spaces[space].teacher, weight, loss)

    def _predict(self, output: StudentOutput, tokens: Tensor, dense: bool) -> Predictions:
        descriptors, own = {}, self._by_teacher(tokens)
        for label, space in self.descriptors.items():
            key = module_key(label)
            said = self.token_heads[key](own[self.spaces[space].teacher].flatten(1))
            descriptors[label] = self.heads[key](output.pooled) + said if self.residual else said
        return Predictions(
            descriptors=descriptors,
            dense={
                name: self.projectors[module_key(name)](output.tokens)
                for name in (self.dense if dense else ())
            },
        )

    def _stream_sees(self, targets: Mapping[str, Target]) -> list[ProjectedTokens]:
        seen = []
        for name, project in zip(self.streams, self.stream_inputs, strict=True):
            assert isinstance(project, nn.Linear)
            target, weight = targets[name], project.weight
            tokens, scales, gain = target if isinstance(target, Codes) else (target, None, None)
            if gain is not None:
                weight = weight * gain
            seen.append(ProjectedTokens(tokens, scales, weight, project.bias))
        return seen

    def _by_teacher(self, tokens: Tensor) -> dict[str, Tensor]:
        """A teacher's own tokens [B, k * M, d], k its streams, of tokens [B, S, M, d].

        Not ``tokens[:, own]``: a list of numbers is copied to the device, which is waited for.
        """
        parts = tokens.unbind(1)
        return {
            teacher: parts[own[0]] if len(own) == 1 else torch.cat([parts[i] for i in own], 1)
            for teacher, own in self.streams_of.items()
        }

    def _readout(self, output: StudentOutput, kind: str) -> Tensor:
        if kind not in ("tokens", "both"):
            return super()._readout(output, kind)
        tokens = self.attend(output).flatten(1)
        if kind == "tokens":
            return tokens
        return torch.cat(
            [functional.normalize(output.pooled, dim=-1), functional.normalize(tokens, dim=-1)], -1
        )

    def _readout_parts(self, kind: str) -> Iterable[nn.Module | nn.Parameter]:
        if self.write_back is not None:
            yield self.write_back
            yield self.model_tokens
        if kind in ("pooled", "spatial"):
            return
        yield self.model_tokens
        yield self.norm
        if self.reader is not None:
            yield self.reader
        if kind == "predictions":
            yield self.heads
            yield self.token_heads


def _streams(spaces: Mapping[str, SpaceTarget]) -> list[str]:
    """The spaces that own model tokens: the dense ones, and global ones of teachers without."""
    with_grid = {space.teacher for space in spaces.values() if space.grid is not None}
    return [
        name
        for name, space in spaces.items()
        if space.grid is not None or space.teacher not in with_grid
    ]


def _check_constants(write_back: bool, residual: bool, teacher_stream: float, alone: float) -> None:
    """Refuse model tokens that read nothing where they would have no part in the student either."""
    reason = "align.intra=false with align.inter=self makes model tokens the same for all images"
    if not write_back:
        raise ConfigError(f"{reason}: without align.write_back nothing of them is left to learn")
    if not residual or alone:
        asked = f"align.alone={alone}" if residual else "align.residual=false"
        raise ConfigError(f"{reason}: they cannot predict alone, as {asked} asks")
    if teacher_stream:
        raise ConfigError(
            f"{reason}: align.teacher_stream={teacher_stream} would read nothing: say "
            "align.teacher_stream=0"
        )
