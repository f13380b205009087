"""`python -m qdm_lightning.diagnose`: activations over the timesteps, and the error that accumulates over sampling.

`diagnose(run, ["against=[outputs/OTHER]"])` is the same from Python.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qdm_lightning.base.checks import visible
from qdm_lightning.cli.earlier_run import RunCommand, RunConfig
from qdm_lightning.diagnosis.spec import DiagnosisConfig
from qdm_lightning.evaluation.spec import listed

if TYPE_CHECKING:
    from qdm_lightning.diagnosis.diagnose import Diagnosis

EXAMPLES = (
    ("run=outputs/NAME", "the paper's two claims on this run, as pictures and numbers"),
    ("run=outputs/NAME against=outputs/OTHER", "another run laid over it; several are against=[A,B]"),
    ("run=outputs/NAME layers='*.query'", "chosen layers, by patterns of their names"),
    ("run=outputs/NAME sampler=ddpm points=100 logger=wandb", "another sampler; the pictures to W&B"),
)
"""For `--help`: arguments, and what they do."""


@dataclass(kw_only=True)
class DiagnoseConfig(RunConfig, DiagnosisConfig):
    """Root of `conf/diagnose.yaml`.

    Args:
        logger: as in training.
    """

    logger: Any = field(default_factory=dict)


def do(*arguments: Any) -> Diagnosis:
    """See `diagnosis.diagnose.diagnose`."""
    from qdm_lightning.diagnosis.diagnose import diagnose

    return diagnose(*arguments)


def show(result: Diagnosis, settings: DiagnoseConfig) -> None:
    """Print how far activations wander and images err, where the pictures are, and what to type next."""
    from qdm_lightning.display.progress import following_lines

    for name, found in result.record["runs"].items():
        run = visible(name)
        raw, grid = ([o[which]["center"] for o in found["oscillation"].values() if o[which]] for which in ("raw", "grid"))
        seen = f", {sum(grid) / len(grid):.3f} on the quantizer's grid" if grid else ""
        error = found["error"]
        images = f"; images: mean squared error {error['image_mse']:.4g}, cosine {error['image_cosine']:.4f}" if error else ""
        if raw:
            print(f"{run}: activations wander over t by {sum(raw) / len(raw):.3f} of their std{seen}{images}")
    print("signal to quantization noise in dB: one grid for all t, and what other grids gain")
    print(result.gains)
    for name, path in result.pictures.items():
        print(f"{name}: {path}")
    print(f"numbers: {result.folder / 'diagnosis.json'}")
    following = [(f"python -m qdm_lightning.diagnose run={settings.run} against=RUN", "another run laid over it")]
    print("\n".join(following_lines(following)))


diagnose = RunCommand("diagnose", DiagnoseConfig, do, show, EXAMPLES, others=lambda settings: listed(settings.against))
main = diagnose.main

if __name__ == "__main__":
    main()
