"""`python -m qdm_lightning.evaluate`: the scores of a run, a function of its checkpoint, the seeds and a written protocol.

`evaluate(run, ["sampler.steps=100"])` is the same from Python.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qdm_lightning.cli.earlier_run import RunCommand, RunConfig
from qdm_lightning.evaluation.spec import EvaluationConfig

if TYPE_CHECKING:
    from qdm_lightning.evaluation.evaluate import Evaluation

EXAMPLES = (
    ("run=outputs/NAME", "the student's scores, with the run's own sampler and number of images"),
    ("run=outputs/NAME network=teacher", "its teacher's, to compare: they share the closing table"),
    ("run=outputs/NAME sampler=ddim sampler.steps=100 num_samples=50000", "another sampler, more images"),
    ("run=outputs/NAME metrics=inception", "FID, Inception Score, KID, precision and recall"),
    ("run=outputs/NAME repeats=3", "of three disjoint sets of images: mean and 95 % interval"),
    ("run=outputs/NAME num_samples=50000 shard=3/8", "the third of eight jobs; the command without shard= scores them all"),
    ("run=outputs/NAME file=student.onnx", "of a file that was exported from the run, beside the run's own"),
    ("run=outputs/NAME against=[outputs/OTHER]", "beside another run's scores, if its protocol is the same"),
)
"""For `--help`: arguments, and what they do."""


@dataclass(kw_only=True)
class EvaluateConfig(RunConfig, EvaluationConfig):
    """Root of `conf/evaluate.yaml`.

    Args:
        metrics: the feature network.
        logger: as in training.
    """

    metrics: Any = field(default_factory=dict)
    logger: Any = field(default_factory=dict)


def do(*arguments: Any) -> Evaluation:
    """See `evaluation.evaluate.evaluate`."""
    from qdm_lightning.evaluation.evaluate import evaluate

    return evaluate(*arguments)


def show(result: Evaluation, settings: EvaluateConfig) -> None:
    """Print the scores in a table, and what to type next."""
    from qdm_lightning.display.progress import console, following_lines
    from qdm_lightning.evaluation.protocol import table

    record = result.record
    if record is None:
        return
    screen = console()
    screen.print(table([record, *result.others]))
    lines = [f"left out: {score}: {reason}" for score, reason in record["left_out"].items()]
    if "repeats" in record:
        lines.append(f"mean ± 95 % interval over {record['repeats']['count']} disjoint sets of images")
    lines += [f"{key} {value:.4g} of as many real images" for key, value in record.get("floor_at_size", {}).items()]
    lines.append(f"record: {result.folder / 'evaluation.json'}")
    command = f"python -m qdm_lightning.evaluate run={settings.run}"
    following = [(f"{command} network=teacher", "the teacher's scores beside them")] if record["network"] == "student" else []
    following.append((f"python -m qdm_lightning.diagnose run={settings.run}", "where in t it errs"))
    screen.print("\n".join([*lines, *following_lines(following)]), markup=False, highlight=False)


evaluate = RunCommand("evaluate", EvaluateConfig, do, show, EXAMPLES)
main = evaluate.main

if __name__ == "__main__":
    main()
