"""A processor without VNNI adds two products in 16 bits: 8-bit layers must stay float there, and say so, not be wrong."""

import json
import os
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import json, torch
from torch import nn
from qdm_lightning.integer import to_integer
from qdm_lightning.quantization import MSESearch, MinMax, QuantConfig, calibrate, compiled, prepare
compiled.set_mode("off")
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3))
prepare(model, QuantConfig(weight_bits=4, act_bits=7))
x = torch.randn(4, 8, 9, 9)
calibrate(model, lambda: model(x), MinMax())
integer, report = to_integer(model.eval())
with torch.no_grad():
    error = float((integer(x) - model(x)).abs().max() / model(x).abs().max())
print(json.dumps({"error": error, "float": report.float_layers}))
"""


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="the other half needs a processor with VNNI")
def test_without_vnni_8_bit_layers_stay_float_and_nothing_is_wrong():
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment).stdout
    found = json.loads(out.splitlines()[-1])
    assert [name for name, _ in found["float"]] == ["0", "4"]  # 7-bit codes times 4-bit weights are exact
    assert all("saturate at 16 bits" in reason for _, reason in found["float"])
    assert found["error"] < 1e-4
