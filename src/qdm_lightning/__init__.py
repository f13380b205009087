"""Low-bit quantized diffusion models: Q-DM on PyTorch Lightning and Hydra."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qdm_lightning.base.import_hook import after_import

if TYPE_CHECKING:
    from types import ModuleType

__version__ = "0.2.0"

_PUBLIC = {
    "run_training": "cli.training:train",
    "load_student": "training.student_files:load_student",
    "draw_images": "models.image_sampler:draw_images",
    "prepare": "quantization.preparation:prepare",
    "calibrate": "quantization.calibration:calibrate",
    "QuantConfig": "quantization.spec:QuantConfig",
    "SamplerConfig": "diffusion.spec:SamplerConfig",
}
"""The names of `import qdm_lightning`, and where they are defined."""

__all__ = sorted(["__version__", *_PUBLIC])


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for."""
    if name in _PUBLIC:
        place, _, own = _PUBLIC[name].partition(":")
        return getattr(import_module(f"{__name__}.{place}"), own)
    raise AttributeError(f"module {__name__} has no attribute {name}")


def _register(auto: "ModuleType") -> None:
    import_module(f"{__name__}.training.diffusers_quantizer").register(auto)


after_import("diffusers.quantizers.auto", _register)  # so that diffusers' `from_pretrained` reads a student
