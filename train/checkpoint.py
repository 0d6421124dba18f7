"""What a run leaves on disk: checkpoints to go on from, and the finished student."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..cache import Cache
from ..cache.durable import remove_torn, write_whole
from ..errors import ConfigError, DataError, StoreError
from .alignment import ALIGNMENTS, Alignment, alignment_options, build_alignment
from .alignment.base import Space
from .students import (
    CHECKPOINTS,
    MODEL,
    WEIGHTS,
    Student,
    load_backbone,
    load_weights,
    read_model_json,
)

ALIGNMENT = "alignment.safetensors"
TARGETS = "targets.safetensors"
"""Mean and deviation of every space that was learnt: from standardised to the teacher's units."""
AVERAGE, BEST = "ema", "best"
"""Folders within a run's: the averaged weights and the best ones, each a finished run in itself."""
_LATER = {"recipe.alignment_lr": 1.0}
"""Keys of a recipe that checkpoints of earlier versions lack, with what they did."""
KEPT = {"last": "", "ema": AVERAGE, "best": BEST}
"""Which weights of a finished run -> their folder within it."""


class Checkpoints:
    """The checkpoints of a run: ``step-N.pt`` for the last ones, and ``best.pt``.

    Args:
        out: the run's folder.
        keep: how many of the last ones stay.
    """

    def __init__(self, out: Path, keep: int) -> None:
        self._folder, self._keep = out / CHECKPOINTS, keep
        self.best = self._folder / "best.pt"

    def steps(self) -> dict[int, Path]:
        """The checkpoints that there are by their step, in order."""
        found = self._folder.glob("step-*.pt")
        return dict(sorted((int(path.stem.removeprefix("step-")), path) for path in found))

    @property
    def last(self) -> Path | None:
        """The one to go on from."""
        return next(reversed(self.steps().values()), None)

    def held_as_best(self) -> dict[str, Any]:
        """The metric, value and step of the best one that could be written; empty without one. The
        last one may tell of another: of an earlier one, or of one that did not fit on the disk."""
        return dict(load_checkpoint(self.best)["best"]) if self.best.exists() else {}

    def kept(self) -> str:
        """In words, for a message about what went wrong."""
        if (last := self.last) is None:
            return "there is no earlier checkpoint"
        return f"the last good checkpoint is {last} (step {next(reversed(self.steps()))})"

    def keep(self, state: Mapping[str, Any], *, last: bool, best: bool, must: bool) -> None:
        """Write a state as the last one, as the best one, or as both.

        Where it cannot be written the earlier checkpoints stay as they were, and the run hears of
        it: by a warning, since the next one may succeed, or by an error.

        Args:
            must: whether the run ends here, so that there is no next one.

        Raises:
            StoreError: it could not be written and `must` be.
        """
        try:
            if best:
                save_checkpoint(self.best, state)
            if last:
                save_checkpoint(self._folder / f"step-{state['step']:08d}.pt", state)
                steps = self.steps()
                # Higher numbers are of fewer ranks, whose steps were of fewer images: this run went
                # on from there, and counts from a lower number.
                later = [step for step in steps if step > state["step"]]
                for path in [*map(steps.pop, later), *list(steps.values())[: -self._keep]]:
                    path.unlink(missing_ok=True)
        except StoreError as error:
            if must:
                raise StoreError(f"{error}; {self.kept()}") from error
            print(f"warning: {error}; {self.kept()}; training goes on", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove all of them, to start anew."""
        for path in (*self.steps().values(), self.best):
            path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what a killed writer left half written."""
        if self._folder.is_dir():
            remove_torn(self._folder)


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a training state so that `path` holds a whole one, or what it held before.

    The state holds tensors, numbers, strings and plain containers only; it is written aside,
    synced, read back and renamed. When that fails (a full disk), the earlier checkpoint stays.

    Raises:
        StoreError: the file could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_whole(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training state onto the CPU, without running anything that the file holds.

    Raises:
        DataError: the file is not a checkpoint of this program.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged files make the unpickler raise anything at all
        raise DataError(
            f"{path} is not a checkpoint of preceptor, or is damaged; remove it or say resume=false"
        ) from error
    if not isinstance(state, dict) or "step" not in state:
        raise DataError(f"{path} is not a checkpoint of preceptor; say resume=false to start anew")
    return state


_WHAT = (".method", ".model", ".name")
"""Ends of the options that say what something is, and so why others differ: they come first."""


def check_same_run(path: Path, stored: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse to continue a checkpoint under another configuration.

    An option of an alignment or a recipe that one of them lacks, being older than it, has its
    default there.

    Args:
        stored, ours: what determines a run, as nested plain containers.

    Raises:
        ConfigError: names the options that differ, with both values.
    """
    theirs, mine = _with_defaults(flat(stored)), _with_defaults(flat(ours))
    if mine.get("align.spaces") is not None:  # an earlier release kept all teachers of the store
        theirs = {k: v for k, v in theirs.items() if k in mine or not k.startswith("store.")}
    differing = [
        f"{key} ({theirs.get(key, 'absent')} there, {mine.get(key, 'absent')} here)"
        for key in sorted({*theirs, *mine}, key=lambda key: (not key.endswith(_WHAT), key))
        if theirs.get(key) != mine.get(key)
    ]
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ConfigError(
            f"{path} belongs to another configuration: {', '.join(differing[:5])}{more}; use the "
            "same options, another out=..., or resume=false to start anew"
        )


def _with_defaults(flattened: Mapping[str, Any]) -> dict[str, Any]:
    kind = ALIGNMENTS.get(str(flattened.get("align.method")))
    known = alignment_options(kind) if kind else {}
    defaults = {f"align.{name}": value for name, value in known.items()}
    return {**defaults, **_LATER, **flattened}


def save_model(
    out: Path, student: Student, alignment: Alignment, config: Mapping[str, Any], cache: Cache
) -> None:
    """Write the trained student and its alignment, loadable by `load_model` without the store.

    Args:
        config: the ``student``, ``align`` and ``recipe`` groups and the ``seed``, as plain
            containers.
        cache: the store, of which the teachers' identities, the views and the calibration are kept.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / WEIGHTS, save(_contiguous(student.model)))
    write_whole(out / ALIGNMENT, save(_contiguous(alignment)))
    calibration: dict[str, Tensor] = {}
    for name in alignment.spaces:
        space = cache[name]
        calibration |= {f"{name}.mean": space.mean.clone(), f"{name}.std": space.std.clone()}
    write_whole(out / TARGETS, save(calibration))
    learnt = {space.teacher for space in alignment.spaces.values()}
    spaces = {
        name: {"teacher": s.teacher, "tokens": s.tokens, "dim": s.dim, "grid": s.grid}
        for name, s in alignment.spaces.items()
    }
    write_json(
        out / MODEL,
        {
            "student": config["student"],
            "align": config["align"],
            "seed": config["seed"],
            "interpolation": config["recipe"]["interpolation"],
            "spaces": spaces,
            "views": cache.manifest.plan.views,
            "teachers": {
                record.name: dict(record.identity)
                for record in cache.manifest.plan.teachers
                if record.name in learnt
            },
        },
    )


def remove_model(out: Path) -> None:
    """Remove what `save_model` wrote there: model.json first, which says that the rest is whole."""
    for name in (MODEL, WEIGHTS, ALIGNMENT, TARGETS):
        (out / name).unlink(missing_ok=True)


def load_model(out: Path) -> tuple[Student, Alignment, dict[str, Any]]:
    """The student and alignment of a finished run, in evaluation mode, and its model.json.

    Raises:
        DataError: the folder holds no finished run, or its files do not fit each other.
    """
    config = read_model_json(out)
    student = load_backbone(out, config)
    spaces = {
        name: Space(s["teacher"], s["tokens"], s["dim"], s["grid"] and (*s["grid"],))
        for name, s in config["spaces"].items()
    }
    alignment = build_alignment({**config["align"], "spaces": None}, student, spaces)
    load_weights(alignment, out / ALIGNMENT)
    return student, alignment.eval(), config


def kept_weights(run: Path, which: str) -> Path:
    """The folder of some weights (a key of `KEPT`) of a finished run.

    Raises:
        DataError: the run is not finished, or kept no such weights.
    """
    read_model_json(run)
    folder = run / KEPT[which]
    if not (folder / MODEL).exists():
        there = [name for name, part in KEPT.items() if (run / part / MODEL).exists()]
        raise DataError(f"weights={which}: {run} kept none of these; it has {', '.join(there)}")
    return folder


def load_calibration(out: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and deviation, float32 [D] each, of every space that a finished run learnt.

    Raises:
        DataError: the file is missing (an older run) or damaged.
    """
    try:
        tensors = load_file(out / TARGETS)
        names = [name.removesuffix(".mean") for name in tensors if name.endswith(".mean")]
        return {name: (tensors[f"{name}.mean"], tensors[f"{name}.std"]) for name in names}
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(
            f"{out / TARGETS} cannot be read ({error}); train the run again, or say "
            "units=standardised"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def _contiguous(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in module.state_dict().items()}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found
