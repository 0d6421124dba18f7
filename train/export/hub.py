"""A folder in the layout of the Hugging Face Hub that timm loads: weights, config.json, a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import ModelCardData
from safetensors.torch import save

from ...errors import ExportError, counted
from ...version import __version__
from ..students import IMAGENET_MEAN, IMAGENET_STD, Student, timm_options
from .graph import Outputs, Run

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


def write_folder(folder: Path, student: Student, model: Mapping[str, Any], card: str) -> None:
    """Write what ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads.

    Args:
        model: the run's model.json.
        card: text of the model card.
    """
    folder.mkdir(parents=True)
    tensors = {name: t.cpu().contiguous() for name, t in student.model.state_dict().items()}
    # Not by safetensors' own writer: its files are the user's alone to read.
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    text = json.dumps(timm_config(student, model), indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")


def timm_config(student: Student, model: Mapping[str, Any]) -> dict[str, Any]:
    """config.json: architecture, what timm builds it with, and how its pixels are prepared."""
    name = str(model["student"]["model"]).split(".")[0]
    backbone = student.model
    source = dict(backbone.pretrained_cfg or {})
    options = timm_options(name, student.size, model["student"].get("options"))
    pretrained = {
        "tag": model["align"]["name"],
        "custom_load": False,
        "input_size": [3, *student.size],
        "fixed_input_size": "img_size" in options,
        "pool_size": list(student.grid),
        **_crop(model.get("views")),
        "interpolation": model["interpolation"],
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "num_classes": 0,
        # Names of layers: timm replaces them for another number of channels or classes.
        "first_conv": source.get("first_conv"),
        "classifier": source.get("classifier"),
    }
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": backbone.num_features,
        "model_args": options,
        "pretrained_cfg": pretrained,
    }
    pool = getattr(backbone, "global_pool", None)
    if isinstance(pool, str) and pool:
        config["global_pool"] = pool
    return config


def _crop(views: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of an image that the student was shown, in timm's words.

    timm scales the shorter side to input / crop_pct and cuts the middle, so ``crop_pct`` is the
    side of the central square as a share of the shorter side. Random views lie anywhere.
    """
    if views is not None and views["name"] == "full":
        return {"crop_pct": 1.0, "crop_mode": "squash"}
    share = views["crop"] if views is not None and views["name"] == "center" else 1.0
    return {"crop_pct": float(share), "crop_mode": "center"}


def open_folder(folder: Path) -> Run:
    """The folder as timm loads it; output ``pooled`` is what the model returns.

    Raises:
        ExportError: timm cannot load it.
    """
    try:
        model = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True).eval()
    except Exception as error:  # timm raises many kinds
        raise ExportError(f"timm does not load {folder}: {error}") from error

    def run(pixels: torch.Tensor) -> Outputs:
        with torch.no_grad():
            return {"pooled": model(pixels)}

    return run


def model_card(
    name: str,
    student: Student,
    model: Mapping[str, Any],
    summary: Mapping[str, Any],
    weights: str,
) -> str:
    """README.md: what the student is, what it learnt from and how, and how to load it.

    Facts of the run alone. The licence is the user's to state: it depends on teachers and images.
    """
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=["timm", "image-feature-extraction", "distillation", "preceptor"],
    )
    architecture = str(model["student"]["model"])
    height, width = student.size
    options = {k: v for k, v in model["align"].items() if k not in ("name", "method")}
    losses = "\n".join(f"| {space} | {loss:.4f} |" for space, loss in summary["losses"].items())
    teachers = "\n".join(_teacher_row(teacher, model) for teacher in _teachers(model))
    config = timm_config(student, model)["pretrained_cfg"]
    return f"""---
{data.to_yaml()}
---
# {name}

A `{architecture}` of {summary["parameters"]["student"]:,} parameters without a classifier, \
trained with [timm](https://github.com/huggingface/pytorch-image-models) and preceptor \
{__version__} to reproduce the features of {counted(len(_teachers(model)), "teacher")}.

```python
import timm

model = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

It takes images of {height} x {width} pixels ({config["crop_mode"]} crop of \
{config["crop_pct"]:g}, {config["interpolation"]}), normalised by ImageNet's mean and deviation, \
and gives {student.pooled_dim} features; `forward_features` gives {student.token_dim} channels on \
a grid of {student.grid[0]} x {student.grid[1]}. Its heads and readouts are not part of this folder.

## Teachers

| teacher | source | sha256 of its weights | spaces |
|---|---|---|---|
{teachers}

## Training

- alignment: `{model["align"].get("method") or model["align"]["name"]}`, {json.dumps(options)}
- seed {summary["seed"]}, {summary["steps"]:,} steps, {summary["epochs"]:.2f} passes over the \
images, {summary["images"]:,} images
- {summary["seconds"]:,.0f} s on {summary["ranks"]} x {summary["device"]}, {summary["precision"]}
- weights: {weights}

Loss at the end, {summary["loss"]:.4f} in all, per space:

| space | loss |
|---|---|
{losses}

## Licence

Not stated. It depends on the licences of the teachers and of the images; state it here and in the \
header before you publish this folder.
"""


def _teachers(model: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(space["teacher"] for space in model["spaces"].values()))


def _teacher_row(teacher: str, model: Mapping[str, Any]) -> str:
    identity = model.get("teachers", {}).get(teacher, {})
    weights = identity.get("weights_sha256", "unknown")
    spaces = [name for name, space in model["spaces"].items() if space["teacher"] == teacher]
    return f"| {teacher} | {identity.get('source', 'unknown')} | {weights} | {', '.join(spaces)} |"
