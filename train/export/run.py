"""preceptor export: a finished student in forms that others load without this package."""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ...cache import Cache
from ...cache.samples import SampleIndex
from ...cache.views import ViewPolicy
from ...engine import refuse_several
from ...errors import ConfigError, DataError, ExportError, StoreError
from ...options import plain
from ...progress import ProgressLine
from ..alignment import Alignment
from ..batch import normalise
from ..checkpoint import KEPT, kept_weights, load_calibration, load_model, write_json
from ..students import IMAGENET_MEAN, IMAGENET_STD, Student
from . import graph, hub
from .graph import Backbone, Outputs, Run, WithHeads

SUMMARY = "summary.json"
FORMATS = ("timm", "onnx", "program")
UNITS = ("teacher", "standardised")
WEIGHTS = {
    "last": "those of the last step",
    "ema": "the exponential moving average of all steps",
    "best": "those of the best checkpoint",
}
"""Keys of `KEPT` in words."""


@dataclass(frozen=True)
class Artefact:
    """One thing to write: how, how it is loaded again, and what it then has to compute."""

    name: str
    write: Callable[[Path], None]
    load: Callable[[Path], Run]
    expected: Outputs


def export(config: DictConfig) -> dict[str, Any]:
    """Write what `config` (configs/export.yaml) asks for, load it again and compare.

    Everything is written aside and renamed at the end: a failed export leaves no folder.

    Returns:
        What ``summary.json`` in the folder holds: per file its bytes, the shapes of its outputs and
        their differences from the student on the images.

    Raises:
        ConfigError: an option cannot be used, or the ``export`` extra is not installed.
        DataError: the folder holds no finished run, or images cannot be read.
        ExportError: a form cannot be written, or does not compute what the student does.
    """
    refuse_several("export")
    _validate(config)
    run = Path(config.run)
    _refuse_part(run)
    name = "export" if config.weights == "last" else f"export-{config.weights}"
    out = run / name if config.out is None else Path(config.out)
    if out.exists():
        raise ConfigError(f"out={out} exists already: name another folder or remove it")
    folder = kept_weights(run, config.weights)
    summary = _read_summary(run)
    student, alignment, model = load_model(folder)
    if alignment.lives_inside and "timm" in config.formats:
        raise ExportError(
            f"{run}: its model tokens live inside the backbone (align.write_back), where timm "
            "cannot run them; say formats=[onnx,program]"
        )
    calibration = load_calibration(folder) if config.units == "teacher" else None
    pixels = _images(config, run, student, model["interpolation"])
    artefacts = _artefacts(config, run, student, alignment, model, summary, calibration, pixels)

    part = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be made: {error.strerror or error}") from error
    files: dict[str, Any] = {}
    try:
        with ProgressLine(f"export {run.name}", len(artefacts), "files") as line:
            for artefact in artefacts:
                files[artefact.name] = _written(artefact, part, pixels, config.check)
                line.advance(1, artefact.name)
        result = {
            "run": str(run),
            "weights": config.weights,
            "units": config.units,
            "images": int(config.check.images),
            "tolerance": float(config.check.tolerance),
            "files": files,
        }
        write_json(part / SUMMARY, result)
        part.rename(out)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):  # of writing: a full disk
            raise ExportError(
                f"out={out} cannot be written: {error.strerror or error}; nothing was kept"
            ) from error
        raise
    for name, entry in files.items():
        told = "not compared"
        if "differences" in entry:
            worst = max(entry["differences"].values())
            told = f"differs by {worst:.1e} at most on {len(pixels)} images"
        print(f"{out / name}: {entry['bytes']:,} bytes, {told}")
    return result


def _artefacts(
    config: DictConfig,
    run: Path,
    student: Student,
    alignment: Alignment,
    model: Mapping[str, Any],
    summary: Mapping[str, Any],
    calibration: Mapping[str, tuple[Tensor, Tensor]] | None,
    pixels: Tensor,
) -> list[Artefact]:
    backbone = Backbone(student, alignment).eval()
    whole = WithHeads(student, alignment, calibration).eval()
    # As trained, before fused operators give way to plain ones for the graphs.
    outputs, all_outputs = _outputs(backbone, pixels), _outputs(whole, pixels)
    blank = torch.zeros(2, 3, *student.size)
    facts = {
        "size": list(student.size),
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "interpolation": model["interpolation"],
        "grid": list(student.grid),
        "spaces": model["spaces"],
        "units": config.units,
    }
    title = run.resolve().name
    card = hub.model_card(title, student, model, summary, WEIGHTS[config.weights])

    def onnx(module: nn.Module, names: Outputs) -> Callable[[Path], None]:
        return lambda path: graph.write_onnx(path, graph.capture(module, blank), list(names), facts)

    known = {
        "timm": [
            Artefact(
                "timm",
                lambda path: hub.write_folder(path, student, model, card),
                hub.open_folder,
                {"pooled": outputs["pooled"]},
            )
        ],
        "onnx": [
            Artefact("backbone.onnx", onnx(backbone, outputs), graph.open_onnx, outputs),
            Artefact("student.onnx", onnx(whole, all_outputs), graph.open_onnx, all_outputs),
        ],
        "program": [
            Artefact(
                "student.pt2",
                lambda path: graph.write_program(path, graph.capture(whole, blank)),
                graph.open_program,
                all_outputs,
            )
        ],
    }
    return [artefact for form in dict.fromkeys(config.formats) for artefact in known[form]]


def _written(artefact: Artefact, folder: Path, pixels: Tensor, check: DictConfig) -> dict[str, Any]:
    path = folder / artefact.name
    artefact.write(path)
    files = [path] if path.is_file() else list(path.iterdir())
    entry: dict[str, Any] = {
        "bytes": sum(file.stat().st_size for file in files),
        "outputs": {name: ["batch", *t.shape[1:]] for name, t in artefact.expected.items()},
    }
    if check.images:
        found = graph.differences(artefact.load(path)(pixels), artefact.expected)
        # NaN is neither more nor less than anything, and worse than all.
        worst = max(found, key=lambda name: (math.isnan(found[name]), found[name]))
        if not found[worst] <= check.tolerance:
            raise ExportError(
                f"{artefact.name} does not compute what the student does: {worst} differs by "
                f"{found[worst]:.2e} of its largest magnitude, more than "
                f"check.tolerance={check.tolerance}; nothing was kept"
            )
        entry["differences"] = found
    return entry


def _outputs(module: nn.Module, pixels: Tensor) -> Outputs:
    with torch.no_grad():
        found: Outputs = module(pixels)
    return found


def _images(config: DictConfig, run: Path, student: Student, interpolation: str) -> Tensor:
    """Central squares of the first images, normalised: float32 [check.images, 3, H, W].

    The first rows' stored pixels, for a run that was trained on those. One blank image where none
    are asked for.
    """
    if not config.check.images:
        return torch.zeros(1, 3, *student.size)
    shards, store = config.check.shards, None
    if shards is None:
        with contextlib.suppress(OSError, AttributeError):
            trained = OmegaConf.load(run / "config.yaml")
            shards, store = trained.data.shards, trained.cache
    try:
        if shards is None and store is not None:  # it was trained on the pixels of its store
            cache = Cache.open(store)
            rows = np.flatnonzero(cache.valid)[: config.check.images]
            return normalise(cache.read_pixels(rows), torch.device("cpu"))
        if shards is None:
            raise DataError(f"{run} does not say which images it was trained on")
        index = SampleIndex.from_shards(plain(shards))
    except (DataError, StoreError) as error:
        raise DataError(
            f"images to compare on: {error}; say check.shards=... or check.images=0"
        ) from error
    policy, found = ViewPolicy(), []
    for sample in range(min(len(index), config.check.images)):
        image = index.image(sample, config.max_pixels)
        view = policy.draw(index.keys[sample], 0, *image.size)
        found.append(torch.tensor(view.pixels(image, student.size, interpolation)))
    return normalise(torch.stack(found), torch.device("cpu"))


def _read_summary(run: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{run / SUMMARY} cannot be read: {error}; train the run again") from error
    return found


def _refuse_part(run: Path) -> None:
    """Raises ConfigError where a folder is that of other weights within a run."""
    for weights, part in KEPT.items():
        if part and run.name == part and (run.parent / SUMMARY).exists():
            raise ConfigError(
                f"run={run} holds some weights of the run around it: say run={run.parent} "
                f"weights={weights}"
            )


def _validate(config: DictConfig) -> None:
    if isinstance(config.formats, str):
        raise ConfigError(f"formats={config.formats}: write a list, formats=[{config.formats}]")
    unknown = [form for form in config.formats if form not in FORMATS]
    if unknown or not config.formats:
        raise ConfigError(
            f"formats={list(config.formats)}: valid are {', '.join(FORMATS)}, at least one"
        )
    if config.weights not in KEPT:
        raise ConfigError(f"weights={config.weights}: valid are {', '.join(KEPT)}")
    if config.units not in UNITS:
        raise ConfigError(f"units={config.units}: valid are {', '.join(UNITS)}")
    if config.check.images < 0 or config.check.tolerance <= 0:
        raise ConfigError("check.images must not be negative, and check.tolerance be positive")
