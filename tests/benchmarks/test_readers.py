"""The readers that cache_read.py compares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from preceptor.benchmarks import cache_read, feature_readers
from preceptor.benchmarks.feature_readers import GROUP, SPACE, TensorStore, ZarrPython
from preceptor.cache import Cache


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", [ZarrPython, TensorStore])
def test_a_rival_reads_every_group_of_a_batch_of_rows_once(tmp_path, monkeypatch, kind, threads):
    for module in (cache_read, feature_readers):
        monkeypatch.setattr(module, "DIM", 8)
    cache_read.make_store(tmp_path / "store", 256)
    reader = kind(tmp_path, threads)
    read, taken = reader.arrays[0], []

    class Watched:
        def __getitem__(self, there):
            taken.append(there)
            return read[there]

    reader.arrays[0] = Watched()
    rows = np.array([40, 3, 255, 3, 35])
    assert reader.take_rows(rows) == len(rows)
    expected = Cache.open(tmp_path / "store")[SPACE].read(rows)
    assert torch.equal(torch.from_numpy(reader.codes[:5]), expected.codes)
    assert torch.equal(torch.from_numpy(reader.scales[:5]), expected.parts["scales"])
    assert sorted(part.start // GROUP for part in taken) == [0, 1, 7]
