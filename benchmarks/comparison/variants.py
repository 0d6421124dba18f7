"""What is compared, as options of `preceptor train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...errors import ConfigError
from ...train.alignment import ALIGNMENTS

STUDENTS: Mapping[str, tuple[str, ...]] = {
    "cnn": (
        "student=resnet_micro", "student.name=cnn", "student.options.channels=[24,48,96,192]",
        "recipe.lr=0.008", "recipe.alignment_lr=0.25",
    ),
    "vit": (
        "student=vit_micro", "student.name=vit", "student.size=48", "student.options.patch_size=8",
        "student.options.depth=4", "student.options.embed_dim=128", "student.options.num_heads=4",
        "recipe.lr=0.002",
    ),
}  # fmt: skip
"""A ResNet with a 3 x 3 grid and a ViT with a 6 x 6 grid, both of 48 pixels."""

_LARGER = (
    "recipe.batch_size=128", "recipe.lr=0.0005", "recipe.weight_decay=0.01", "recipe.warmup=0.05",
    "recipe.clip=1",
)  # fmt: skip
"""As the recipe imagenet_100ep, AdamW with 2e-3 at 512 images a step: a quarter of both."""

LARGER: Mapping[str, tuple[str, ...]] = {
    "resnet50": ("student=resnet50", *_LARGER),
    "vit_small": ("student=vit_small", *_LARGER),
}
"""Those that are compared on a GPU (benchmarks/method_gpu.py), at the size of its bed's images. No
rate of theirs was chosen here."""

OURS = "model_token"

TOKENS = ("align=model_token", "align.layers=2", "align.width=64", "align.teacher_stream=0")
"""Model tokens that end with two layers on the last map, without the stream of teachers' tokens."""

STREAM = ("align.teacher_stream=0.3",)
"""In training the tokens also read what the teachers saw."""

SECOND_LOOK = ("align.mask_weight=0.3",)
"""In training the student also looks a second time with patches hidden: a second pass."""

WIDE = ("align.width=128",)
"""For backbones of full width, as `preceptor train` has it by default."""

INSIDE, AFTER = ("align.write_back=3",), ("align.write_back=0",)
"""Whether the tokens also live inside the backbone, visiting three stages."""

PLACE: Mapping[str, tuple[str, ...]] = {"cnn": INSIDE, "vit": AFTER}
"""Where `OURS` has its tokens, and most of its ablations have them."""

CHOSEN: Mapping[str, tuple[str, ...]] = {
    "cnn": (*PLACE["cnn"], *STREAM),
    "vit": (*PLACE["vit"], *STREAM, *SECOND_LOOK),
    "resnet50": (*INSIDE, *STREAM, *WIDE),
    "vit_small": (*AFTER, *STREAM, *SECOND_LOOK, *WIDE),
}
"""What validation chose for `OURS` of the small students (docs/method.md), and the same for the
larger ones, of which nothing was chosen. Ablations have the place alone, but for those named after
it."""


@dataclass(frozen=True)
class Variant:
    """One way to train a student.

    Attributes:
        kind: ours | ablation | rival | control | teacher | reference; a rival is what ours has to
            beat, a control has ours' capacity, a teacher's variant learns from that teacher alone.
        options: of `preceptor train`, beside the student's and the recipe's.
        of_student: further ones, by student. Times are those of 64 images on one thread; what they
            were is in docs/method.md.
        says: what it is.
        students: those that it is another one for; of the larger ones controls and ablations,
            whose sizes are made for the small, have none.
    """

    kind: str
    options: tuple[str, ...]
    says: str
    of_student: Mapping[str, tuple[str, ...]] | None = None
    students: tuple[str, ...] = (*STUDENTS, *LARGER)

    def all_options(self, student: str) -> list[str]:
        own = (self.of_student or {}).get(student, ())
        return [*{**STUDENTS, **LARGER}[student], *self.options, *own]


def variants(teachers: Sequence[str]) -> dict[str, Variant]:
    """Every variant, in the order in which they are worth running."""
    found = {
        OURS: Variant("ours", TOKENS, "model tokens: the CNN's inside its backbone too", CHOSEN),
        "regression": Variant("rival", ("align=regression",), "one projector a space"),
    }
    for name in ALIGNMENTS:
        if name not in ("model_token", "regression"):
            found[name] = Variant("rival", (f"align={name}",), f"train/alignment/{name}.py")
    found |= {
        "regression_wide_head": Variant(
            "control", ("align=regression", "align.hidden=1024"), "regression, a head twice as wide"
        ),
        "regression_wide_backbone": Variant(
            "control",
            ("align=regression",),
            "regression, a backbone wider by at least what tokens inside one add",
            {
                "cnn": ("student.options.channels=[32,64,128,256]",),
                "vit": ("student.options.embed_dim=152", "student.options.num_heads=4"),
            },
        ),
        "regression_same_cost": Variant(
            "control",
            ("align=regression",),
            "regression, a deeper backbone with the parameters and time of one with tokens inside",
            {
                "cnn": (
                    "student.options.channels=[24,48,96,184]",
                    "+student.options.layers=[6,4,2,1]",
                ),
                "vit": ("student.options.depth=6", "student.options.embed_dim=124"),
            },
        ),
        "regression_same_time": Variant(
            "control",
            ("align=regression",),
            "regression, a backbone widened to at least the time of one with tokens inside",
            {
                "cnn": ("student.options.channels=[52,104,208,416]",),
                "vit": ("student.options.embed_dim=168",),
            },
        ),
        "plain_tokens": Variant(
            "ablation", TOKENS, "without stream and second look, as the other ablations", PLACE
        ),
        "after_backbone": Variant(
            "ablation",
            (*TOKENS, *AFTER),
            "no write-back: tokens read the last map and help to predict",
            students=("cnn",),
        ),
        "inside_backbone": Variant(
            "ablation",
            (*TOKENS, *INSIDE),
            "tokens that visit three stages and write back",
            students=("vit",),
        ),
        "inside_only": Variant(
            "ablation",
            (*TOKENS, *INSIDE, "align.layers=0"),
            "tokens end with the last stage they visit",
            students=("cnn",),
        ),
        "no_intra": Variant(
            "ablation",
            (*TOKENS, *INSIDE, "align.intra=false"),
            "no read: learnt constants written back",
            students=("cnn",),
        ),
        "no_inter": Variant(
            "ablation", (*TOKENS, "align.inter=none"), "no exchange of spaces", PLACE
        ),
        "ungated": Variant(
            "ablation", (*TOKENS, "align.gamma=null"), "exchange without gates", PLACE
        ),
        "one_token": Variant("ablation", (*TOKENS, "align.tokens=1"), "M = 1", PLACE),
        "eight_tokens": Variant("ablation", (*TOKENS, "align.tokens=8"), "M = 8", PLACE),
        "four_layers": Variant("ablation", (*TOKENS, "align.layers=4"), "L = 4", PLACE),
        "one_stage": Variant(
            "ablation",
            (*TOKENS, "align.write_back=1"),
            "one stage is visited",
            students=("cnn",),
        ),
        "ours_no_inter": Variant(
            "ablation",
            (*TOKENS, "align.inter=none"),
            "ours but for the exchange of spaces",
            CHOSEN,
        ),
        "ours_after_backbone": Variant(
            "ablation",
            (*TOKENS, *AFTER, *STREAM),
            "ours but for the write-back",
            students=("cnn",),
        ),
        "ours_inside_backbone": Variant(
            "ablation",
            (*TOKENS, *INSIDE, *STREAM, *SECOND_LOOK),
            "ours, inside the backbone too",
            students=("vit",),
        ),
        "ours_no_second_look": Variant(
            "ablation",
            (*TOKENS, *AFTER, *STREAM),
            "ours but for the second look",
            students=("vit",),
        ),
        "ours_no_stream": Variant(
            "ablation",
            (*TOKENS, *AFTER, *SECOND_LOOK),
            "ours but for the stream",
            students=("vit",),
        ),
    }
    for teacher in teachers:
        found[f"only_{teacher}"] = Variant(
            "teacher", ("align=regression", f"align.spaces=[{teacher}]"), f"{teacher} alone"
        )
        found[f"tokens_only_{teacher}"] = Variant(
            "ablation",
            (*TOKENS, f"align.spaces=[{teacher}]"),
            f"{teacher} alone, its space's tokens alone",
            PLACE,
        )
    found["supervised"] = Variant(
        "reference", ("align=regression",), "labels of all tasks' training parts, no teacher"
    )
    found["random"] = Variant("reference", ("align=regression",), "untrained")
    return {
        name: replace(variant, students=tuple(s for s in variant.students if s in STUDENTS))
        if variant.kind in ("control", "ablation")
        else variant
        for name, variant in found.items()
    }


def choose(names: str, known: Mapping[str, Variant]) -> dict[str, Variant]:
    """Variants by names or kinds, separated by commas; ``all`` or ``none``.

    Raises:
        ConfigError: there is no such variant or kind.
    """
    if names == "all":
        return dict(known)
    if names == "none":
        return {}
    kinds = {variant.kind for variant in known.values()}
    found = {}
    for name in names.split(","):
        own = {key: v for key, v in known.items() if name in (key, v.kind)}
        if not own:
            raise ConfigError(
                f"--variants {name}: there is no such variant; there are {', '.join(known)}; and "
                f"the kinds {', '.join(sorted(kinds))}"
            )
        found |= own
    return found
