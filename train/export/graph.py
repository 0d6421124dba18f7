"""A student as a graph: what it computes, written as ONNX or as a torch.export program."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ConfigError, ExportError, first_line
from ..alignment import Alignment
from ..alignment.base import module_key
from ..attention import CrossAttention
from ..students import Student

Outputs = dict[str, Tensor]
Run = Callable[[Tensor], Outputs]
"""From pixels [B, 3, H, W] to named outputs."""

MISSING = "onnx, onnxscript and onnxruntime write and check ONNX: pip install 'preceptor[export]'"


class Backbone(nn.Module):
    """A student's two outputs by name.

    ``pooled`` [B, P], what the backbone's own classifier would read; ``grid`` [B, N, C], the tokens
    of the last feature map in row-major order.
    """

    def __init__(self, student: Student, alignment: Alignment) -> None:
        super().__init__()
        self.student, self.alignment = student, alignment

    def forward(self, pixels: Tensor) -> Outputs:
        """Normalised pixels [B, 3, H, W] to named outputs."""
        output = self.alignment.run_student(self.student, pixels)
        return {"pooled": output.pooled, "grid": output.tokens}


class WithHeads(nn.Module):
    """A student with all that its alignment says about it, by name.

    ``grid`` [B, N, C] as in `Backbone`; ``readout/NAME`` [B, K] of every readout of the alignment;
    ``descriptor/LABEL`` [B, D] of every teacher's descriptor; ``tokens/SPACE`` [B, N_s, D_s] of
    every space with a grid, on the grid that the loss was taken on. The readout ``predictions``
    stays in the units of ``align.targets``, as evaluation reads it.

    Args:
        calibration: mean and deviation [D] per space, to give descriptors and tokens in their
            teacher's own units; None gives them standardised, as the store holds them. Either way
            whatever ``align.targets`` was.
    """

    def __init__(
        self,
        student: Student,
        alignment: Alignment,
        calibration: Mapping[str, tuple[Tensor, Tensor]] | None,
    ) -> None:
        super().__init__()
        self.student, self.alignment = student, alignment
        self.units = nn.ModuleDict()
        if calibration is not None:
            for space in alignment.spaces:
                if space not in calibration:
                    raise ExportError(f"the run holds no mean and deviation of {space}")
                self.units[module_key(space)] = _Units(*calibration[space])

    def forward(self, pixels: Tensor) -> Outputs:
        """Normalised pixels [B, 3, H, W] to named outputs."""
        alignment = self.alignment
        output = alignment.run_student(self.student, pixels)
        found = {"grid": output.tokens}
        for kind in alignment.readouts:
            found[f"readout/{kind}"] = alignment.readout(output, kind)
        predicted = alignment.predict(output, dense=bool(alignment.dense_weight))
        for label, descriptor in predicted.descriptors.items():
            found[f"descriptor/{label}"] = self._in_units(alignment.descriptors[label], descriptor)
        for space, tokens in predicted.dense.items():
            if alignment.match == "teacher":
                tokens = alignment.grids[module_key(space)](tokens)
            found[f"tokens/{space}"] = self._in_units(space, tokens)
        return found

    def _in_units(self, space: str, prediction: Tensor) -> Tensor:
        prediction = self.alignment.standardised(space, prediction)
        if not self.units:
            return prediction
        scaled: Tensor = self.units[module_key(space)](prediction)
        return scaled


class _Units(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, standardised: Tensor) -> Tensor:
        return standardised * self.std + self.mean


def portable(module: nn.Module) -> nn.Module:
    """The module with plain PyTorch operators in the place of the fused ones, changed in place."""
    for part in module.modules():
        if isinstance(part, CrossAttention):
            part.implementation = "standard"
    return module


def capture(module: nn.Module, pixels: Tensor) -> torch.export.ExportedProgram:
    """The module as a graph of ATen operators, for any number of images of that size.

    Raises:
        ExportError: it cannot be captured.
    """
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1)}}
    try:
        return torch.export.export(portable(module), (pixels,), dynamic_shapes=shapes)
    except Exception as error:  # the exporter raises many kinds
        raise ExportError(
            f"this student cannot be captured as a graph: {first_line(error)}; formats=[timm] "
            "needs none"
        ) from error


def write_program(path: Path, program: torch.export.ExportedProgram) -> None:
    """Write a program that `torch.export.load` reads; its outputs are a dictionary."""
    # The example inputs would be pickled into the file, and nobody needs them.
    program.example_inputs = None
    torch.export.save(program, path)


def write_onnx(
    path: Path,
    program: torch.export.ExportedProgram,
    outputs: list[str],
    facts: Mapping[str, Any],
) -> None:
    """Write a program as ONNX with input ``pixels`` and a batch axis of any length.

    Args:
        facts: JSON that goes into the model's metadata under ``preceptor``.

    Raises:
        ConfigError: the ``export`` extra is not installed.
        ExportError: an operator has no ONNX form.
    """
    try:
        import onnxscript  # noqa: F401  (torch's exporter is written in it)
    except ImportError as error:
        raise ConfigError(MISSING) from error
    import onnx

    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                program,
                f=str(path),
                dynamo=True,
                input_names=["pixels"],
                output_names=outputs,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds
        raise ExportError(f"this student has no ONNX form: {first_line(error)}") from error
    finally:
        quiet.setLevel(level)
    model = onnx.load(str(path))
    _name_batch(model)
    entry = model.metadata_props.add()
    entry.key, entry.value = "preceptor", json.dumps(dict(facts))
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def open_onnx(path: Path) -> Run:
    """An ONNX file in ONNX Runtime on the CPU.

    Raises:
        ConfigError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(MISSING) from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(pixels: Tensor) -> Outputs:
        values = session.run(names, {"pixels": pixels.numpy()})
        return {n: torch.from_numpy(np.asarray(v)) for n, v in zip(names, values, strict=True)}

    return run


def open_program(path: Path) -> Run:
    """A written program, read back."""
    module = torch.export.load(path).module()

    def run(pixels: Tensor) -> Outputs:
        with torch.no_grad():
            found: Outputs = module(pixels)
        return found

    return run


def differences(found: Outputs, expected: Outputs) -> dict[str, float]:
    """Largest absolute difference of every output over the largest magnitude that it should have.

    Raises:
        ExportError: names or shapes differ.
    """
    if list(found) != list(expected):
        raise ExportError(f"outputs are {', '.join(found)}, expected {', '.join(expected)}")
    result = {}
    for name, right in expected.items():
        if found[name].shape != right.shape:
            raise ExportError(
                f"output {name} is {tuple(found[name].shape)}, expected {tuple(right.shape)}"
            )
        gap = (found[name].double() - right.double()).abs().max()
        result[name] = float(gap / right.double().abs().max().clamp_min(1e-12))
    return result


def _name_batch(model: Any) -> None:
    """Call the free axis ``batch``; the exporter names it after a symbol of its own."""
    (free,) = {d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim if d.dim_param}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param == free:
                axis.dim_param = "batch"
