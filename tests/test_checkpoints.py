"""What is said of files that hold no weights."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from preceptor.checkpoints import read_checkpoint
from preceptor.errors import TeacherError


def _archive() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Detected pickle protocol")
def test_files_that_are_no_weights_are_told_as_what_they_are(tmp_path: Path) -> None:
    """Loaders take any file for their own kind, and torch advises to run what it holds."""
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    array = pickle.dumps({"a": np.zeros(2)}, protocol=2)
    for name, content, told in (
        ("page.pth", b"\xef\xbb\xbf<!DOCTYPE html>", "is a page or a text, no file of weights"),
        ("page.safetensors", b"<html><body>Not Found", "is a page or a text, no file of weights"),
        ("note.bin", b"# a readme\n", "is of another kind, no file of weights"),
        ("lfs.bin", pointer, "is a pointer of Git LFS"),
        ("lfs.safetensors", pointer, "is a pointer of Git LFS"),
        ("model.bin", (64).to_bytes(8, "little") + b'{"a": {"dtype"', "is of safetensors under"),
        ("zip.safetensors", _archive(), "is of torch.save under another name"),
        ("script.pth", _archive(), "holds more than tensors (TorchScript), and code"),
        ("array.pth", array, "_reconstruct), and code in a checkpoint is never run"),
        ("new.pth", pickle.dumps({"a": 1}, protocol=4), "more than tensors (Unsupported operand"),
        ("none.pth", b"", "is empty"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TeacherError) as caught:
            read_checkpoint(tmp_path / name, TeacherError)
        message = str(caught.value)
        assert told in message
        assert "weights_only" not in message
        assert "add_safe_globals" not in message
    with pytest.raises(TeacherError, match="x cannot be read: File name too long"):
        read_checkpoint(tmp_path / ("x" * 300), TeacherError)
