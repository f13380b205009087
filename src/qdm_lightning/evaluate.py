"""`python -m qdm_lightning.evaluate`: the scores of a run, a function of its checkpoint, the seeds and a written protocol.

`evaluate(run, ["sampler.steps=100"])` is the same from Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from qdm_lightning.cli import stored as runs
from qdm_lightning.evaluation.spec import EvaluationConfig

if TYPE_CHECKING:
    from qdm_lightning.display.progress import Progress
    from qdm_lightning.evaluation.evaluate import Evaluation

NAME = "evaluate"
EXAMPLES = (
    ("run=outputs/NAME", "the student's scores, with the run's own sampler and number of images"),
    ("run=outputs/NAME network=teacher", "its teacher's, to compare: they share the closing table"),
    ("run=outputs/NAME sampler=ddim sampler.steps=100 num_samples=50000", "another sampler, more images"),
    ("run=outputs/NAME metrics=inception", "FID, Inception Score, KID, precision and recall"),
    ("run=outputs/NAME num_samples=50000 shard=3/8", "the third of eight jobs; the command without shard= scores them all"),
    ("run=outputs/NAME against=[outputs/OTHER]", "beside another run's scores, if its protocol is the same"),
)
"""For `--help`: arguments, and what they do."""


@dataclass(kw_only=True)
class EvaluateConfig(runs.RunConfig, EvaluationConfig):
    """Root of `conf/evaluate.yaml`.

    Args:
        metrics: the feature network.
        logger: as in training.
    """

    metrics: Any = field(default_factory=dict)
    logger: Any = field(default_factory=dict)


def evaluate(run: str | Path, overrides: Sequence[str] = (), progress: Progress | None = None) -> Evaluation:
    """Measure a run, as the command does.

    Args:
        run: folder of the run.
        overrides: what else would be typed.
        progress: where stages are shown; None chooses by the terminal.

    Returns:
        The record (as in evaluation.json) and its folder.

    Raises:
        UserError, ValueError, FileNotFoundError: bad input, found before the first stage began.
    """
    cfg = runs.compose(NAME, EvaluateConfig, run, overrides)
    runs.check_run(cfg)
    return _evaluate(cfg, progress)


def _evaluate(cfg: DictConfig, progress: Progress | None = None) -> Evaluation:
    from qdm_lightning.display.progress import Progress
    from qdm_lightning.evaluation.evaluate import evaluate as work

    def measure(shown: Progress) -> Evaluation:
        return work(runs.experiment(cfg), runs.settings_of(cfg), shown)

    result: Evaluation = runs.guarded(measure, progress or Progress())
    return result


def _task(cfg: DictConfig) -> None:
    from rich.console import Console

    from qdm_lightning.display.progress import following_lines
    from qdm_lightning.evaluation.protocol import table

    result = _evaluate(cfg)
    if result.record is None:
        return
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console = Console(soft_wrap=True, width=200)  # a file or pipe has no width of its own
    console.print(table([result.record, *result.others]))
    lines = [f"left out: {score}: {reason}" for score, reason in result.record["left_out"].items()]
    lines += [f"{key} {value:.4g} between two halves of the real images" for key, value in result.record["floor"].items()]
    lines.append(f"record: {result.folder / 'evaluation.json'}")
    console.print("\n".join([*lines, *following_lines(_following(cfg, result.record))]), markup=False, highlight=False)


def _following(cfg: DictConfig, record: dict[str, Any]) -> list[tuple[str, str]]:
    command = f"python -m qdm_lightning.evaluate run={cfg.run}"
    other = [(f"{command} network=teacher", "the teacher's scores beside them")] if record["network"] == "student" else []
    return [*other, (f"python -m qdm_lightning.diagnose run={cfg.run}", "where in t it errs")]


runs.register(NAME, EvaluateConfig)


def main() -> None:
    """`python -m qdm_lightning.evaluate`."""
    runs.main(NAME, EvaluateConfig, _task, EXAMPLES)


if __name__ == "__main__":
    main()
