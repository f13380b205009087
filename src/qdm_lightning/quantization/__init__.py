"""Quantization-aware training of any `nn.Module`: learned-step quantizers, TaQ, layer swap. Imports torch only, and lazily.

from qdm_lightning.quantization import QuantConfig, calibrate, prepare, timesteps
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "QuantConfig": "spec",
    "prepare": "preparation",
    "Quantizers": "preparation",
    "QuantizationReport": "summary",
    "calibrate": "calibration",
    "MSESearch": "calibration",
    "MinMax": "calibration",
    "Percentile": "calibration",
    "timesteps": "timestep",
    "cached_weights": "layers",
    "fake_quantize": "functional",
    "ActivationQuantizer": "quantizer",
    "WeightQuantizer": "quantizer",
    "LSQActivation": "quantizer",
    "LSQWeight": "quantizer",
    "NormalizedActivation": "taq",
    "EMANormalizedActivation": "taq",
    "GroupedActivation": "taq",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
