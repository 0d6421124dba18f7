"""What is trained: a student and the alignment that teaches it."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..cache import Cache
from ..errors import ConfigError
from ..options import plain
from .alignment import Alignment, AlignmentOutput, Target, build_alignment
from .alignment.balance import PCGrad
from .crops import RandomCrop, taught
from .students import Student, StudentOutput


class Targets:
    """Standardised targets [B, N, D] by space, in a shell that Fabric does not look into.

    It would round what it finds among a module's arguments to the lower precision of ``mixed``
    ones: targets, and the scales of codes, before a loss that is computed in float32.
    """

    def __init__(self, by_space: Mapping[str, Target]) -> None:
        self.by_space = by_space

    @classmethod
    def of(cls, by_space: Mapping[str, Target], fabric: Fabric) -> Targets:
        """As stored where precision is mixed, else of the one precision that all is computed in."""
        precision = fabric.strategy.precision
        mixed = isinstance(precision, MixedPrecision)
        return cls(by_space if mixed else precision.convert_input(by_space))


class Distiller(nn.Module):
    """Student and alignment as one module, so that every strategy wraps and synchronises both.

    Attributes:
        watched: whether the next forward pass leaves what it computed in `seen`.
        seen: features and losses, with the graph behind them.
    """

    def __init__(self, student: Student, alignment: Alignment) -> None:
        super().__init__()
        self.student, self.alignment = student, alignment
        self.watched = False
        self.seen: tuple[StudentOutput, AlignmentOutput] | None = None

    def compile_parts(self) -> None:
        """Have `torch.compile` make the student's passes and, where it can, the alignment's loss.

        ``align.balance=pcgrad`` takes a gradient for each teacher within the forward pass, of which
        no compiler makes a graph: there the alignment stays as it is.
        """
        self.student.compile()
        if not isinstance(self.alignment.balance, PCGrad):
            self.alignment.compile()

    def forward(self, pixels: Tensor, targets: Targets) -> AlignmentOutput:
        """What the alignment says of normalised pixels [B, 3, H, W] and their targets."""
        features = self.alignment.run_student(self.student, pixels)
        if self.watched:
            # Not as compiled, if it is: gradients are taken several times, and a compiled graph
            # frees at the first what it needs.
            self.seen = (features, self.alignment.forward(features, targets.by_space))
            output = self.seen[1]
        else:
            output = self.alignment(features, targets.by_space)
        # Fabric lets gradients of what it returns be taken by itself alone.
        return output._replace(by_teacher={})

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that stay undecayed, besides all that have one dimension."""
        return {
            f"{part}.{name}"
            for part in ("student", "alignment")
            for name in getattr(self, part).no_weight_decay()
        }


def alignment_of(
    config: DictConfig, student: Student, cache: Cache, crop: RandomCrop | None, *, fitted: bool
) -> Alignment:
    """The alignment of a run, to those of a store's spaces that its crops can be taught by.

    Args:
        config: of ``preceptor train``.
        fitted: whether the units of the targets are fitted to the store, whose tokens are then
            looked at.

    Raises:
        ConfigError: as `taught` and `build_alignment`.
    """
    align = plain(config.align)
    specs = {name: space.spec for name, space in cache.spaces.items()}
    available = taught(crop, specs, align.get("spaces"))
    return build_alignment(align, student, available, cache.__getitem__ if fitted else None)


def check_gradients(module: nn.Module) -> None:
    """Refuse parameters that a step has left without a gradient, where ranks wait for all of them.

    Call it after a step's last backward pass: PyTorch would stop at the next forward pass, and name
    no parameter. Which ones get none depends on what the alignment reads of the student: without
    its pooled feature, whatever lies between that and the last map.

    Args:
        module: what Fabric made of a `Distiller`; wrapped by anything but DDP it is not looked at.

    Raises:
        ConfigError: names the parameters, and the strategy that does without their gradients.
    """
    wrapped = next((m for m in module.modules() if isinstance(m, DistributedDataParallel)), None)
    if wrapped is None or wrapped.find_unused_parameters:
        return
    without = [
        name
        for name, parameter in wrapped.module.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    if without:
        more = f" and {len(without) - 5} more" if len(without) > 5 else ""
        raise ConfigError(
            f"the loss reads nothing of {', '.join(without[:5])}{more}, and the ranks of "
            "engine.strategy=ddp wait for the gradient of every parameter: say "
            "engine.strategy=ddp_find_unused_parameters_true"
        )
