"""The soak of tests/faults/soak.py in short: a training and a few sampling calls leave no handle, process, thread or file."""

import gc
import runpy
import tempfile
import weakref
from pathlib import Path

import torch

from qdm_lightning.quantization import compiled
from qdm_lightning.training.module import DiffusionModule

SOAK = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "soak.py"))


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    """No network either: what the memory of a long process would grow by."""
    networks, init = weakref.WeakSet(), DiffusionModule.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        networks.add(self)

    monkeypatch.setattr(DiffusionModule, "__init__", noted)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    compiled.set_mode("off")
    try:
        for round_ in range(2):
            SOAK["sample"](3)
            SOAK["train"](tmp_path / "run" / str(round_), 4)
            left.append(SOAK["left"]())
    finally:
        compiled.set_mode("auto")
        torch.set_num_threads(threads)
    assert left[0] == left[1]
    gc.collect()
    assert len(networks) == 0
