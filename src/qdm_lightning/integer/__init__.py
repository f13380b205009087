"""Integer execution: a prepared, trained model as one whose layers multiply integer codes. No Lightning, no Hydra.

from qdm_lightning.integer import to_integer
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {"to_integer": "conversion", "IntegerReport": "report", "provenance": "kernels", "verify": "verification"}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
