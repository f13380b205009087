"""Settings of `diagnose`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qdm_lightning.base.checks import at_least, between, folder
from qdm_lightning.evaluation.spec import MOST_SEEDS, RestoreConfig, checked, listed


@dataclass(kw_only=True)
class DiagnosisConfig(RestoreConfig):
    """The paper's two claims on a run: activations that oscillate over t, and an error that accumulates over the steps.

    Args:
        against: one or several folders of further runs, laid over this one.
        layers: one or several name patterns of the layers whose inputs are shown; None picks six, spread over the network.
        num_images: validation images that are noised for the activations, and images whose trajectories are compared.
        timesteps: how many timesteps the activations are shown at, spread evenly.
        points: at most so many steps of the trajectory are compared, spread evenly.
        out: folder of the pictures; None takes `<run>/diagnosis`.
    """

    against: Any = None
    layers: Any = None
    num_images: int = checked(64, between, low=2, high=MOST_SEEDS)
    timesteps: int = checked(10, at_least, minimum=2)
    points: int = checked(50, at_least, minimum=2)
    out: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None:
            folder("out", self.out)
        if self.against is not None and not listed(self.against):
            raise ValueError("against=[] names no run: leave it out")
        if self.layers is not None and not listed(self.layers):
            raise ValueError("layers=[] shows nothing: leave it out, or type for example layers='[*attentions*]'")
