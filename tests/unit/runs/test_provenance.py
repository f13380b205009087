"""What a result carries."""

import sys

import pytest
import torch

from qdm_lightning.runs.provenance import peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own peak")
def test_peak_memory_is_of_this_process_and_never_falls():
    before = peak_memory()["resident"]
    held = torch.ones(before // 4 + 2**25)  # of 4 bytes: more than was ever there, all of it touched
    assert peak_memory()["resident"] >= before + 2**26
    del held
    assert peak_memory()["resident"] >= before + 2**26
