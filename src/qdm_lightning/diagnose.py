"""`python -m qdm_lightning.diagnose`: activations over the timesteps, and the error that gathers over the steps of sampling.

`diagnose(run, ["against=[outputs/OTHER]"])` is the same from Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from qdm_lightning.cli import stored as runs
from qdm_lightning.diagnosis.spec import DiagnosisConfig
from qdm_lightning.evaluation.spec import listed

if TYPE_CHECKING:
    from qdm_lightning.diagnosis.diagnose import Diagnosis
    from qdm_lightning.display.progress import Progress

NAME = "diagnose"
EXAMPLES = (
    ("run=outputs/NAME", "the paper's two claims on this run, as pictures and numbers"),
    ("run=outputs/NAME against=outputs/OTHER", "another run laid over it; several are against=[A,B]"),
    ("run=outputs/NAME layers='*.query'", "chosen layers, by patterns of their names"),
    ("run=outputs/NAME sampler=ddpm points=100 logger=wandb", "another sampler; the pictures to W&B"),
)
"""For `--help`: arguments, and what they do."""


@dataclass(kw_only=True)
class DiagnoseConfig(runs.RunConfig, DiagnosisConfig):
    """Root of `conf/diagnose.yaml`.

    Args:
        logger: as in training.
    """

    logger: Any = field(default_factory=dict)


def diagnose(run: str | Path, overrides: Sequence[str] = (), progress: Progress | None = None) -> Diagnosis:
    """Diagnose a run, as the command does.

    Args:
        run: folder of the run.
        overrides: what else would be typed.
        progress: where stages are shown; None chooses by the terminal.

    Raises:
        UserError, ValueError, FileNotFoundError: bad input, found before anything was computed.
    """
    cfg = runs.compose(NAME, DiagnoseConfig, run, overrides)
    _check(cfg)
    return _diagnose(cfg, progress)


def _check(cfg: DictConfig) -> None:
    for each in _runs(cfg):
        runs.check_run(each)


def _runs(cfg: DictConfig) -> list[DictConfig]:
    """`cfg`, and what it would be for each run that it is laid over."""
    against = listed(runs.settings_of(cfg).against)
    return [cfg, *(runs.another(cfg, folder) for folder in against)]


def _diagnose(cfg: DictConfig, progress: Progress | None = None) -> Diagnosis:
    from qdm_lightning.diagnosis.diagnose import diagnose as work
    from qdm_lightning.display.progress import Progress

    def look(shown: Progress) -> Diagnosis:
        return work([runs.experiment(each) for each in _runs(cfg)], runs.settings_of(cfg), shown)

    result: Diagnosis = runs.guarded(look, progress or Progress())
    return result


def _task(cfg: DictConfig) -> None:
    from qdm_lightning.display.progress import following_lines

    result = _diagnose(cfg)
    for run, found in result.record["runs"].items():
        error = found["error"]
        end = (
            ""
            if error is None
            else f"; images: mean squared error {error['image_mse']:.4g}, cosine {error['image_cosine']:.4f}"
        )
        wander = [o[w]["center"] for o in found["oscillation"].values() for w in ("raw", "grid") if o[w]]
        raw = [o["raw"]["center"] for o in found["oscillation"].values()]
        grid = [o["grid"]["center"] for o in found["oscillation"].values() if o["grid"]]
        seen = f", {sum(grid) / len(grid):.3f} on the quantizer's grid" if grid else ""
        if wander:
            print(f"{run}: activations wander over t by {sum(raw) / len(raw):.3f} of their deviation{seen}{end}")
    for name, path in result.pictures.items():
        print(f"{name}: {path}")
    print(f"numbers: {result.folder / 'diagnosis.json'}")
    following = [(f"python -m qdm_lightning.diagnose run={cfg.run} against=RUN", "another run laid over it")]
    print("\n".join(following_lines(following)))


runs.register(NAME, DiagnoseConfig)


def main() -> None:
    """`python -m qdm_lightning.diagnose`."""
    runs.main(NAME, DiagnoseConfig, _task, EXAMPLES, check=_check)


if __name__ == "__main__":
    main()
