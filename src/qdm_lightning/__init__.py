"""Low-bit quantized diffusion models: Q-DM on PyTorch Lightning and Hydra."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {"load_student": "training.student_files"}

__all__ = sorted(["__version__", *_PUBLIC])


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for."""
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
