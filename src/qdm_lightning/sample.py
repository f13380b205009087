"""`python -m qdm_lightning.sample`: pictures of chosen seeds. Image i is the same whatever other seeds are asked for.

`sample(run, ["seeds=0-63"])` is the same from Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from qdm_lightning.cli import stored as runs
from qdm_lightning.evaluation.spec import SampleConfig

if TYPE_CHECKING:
    from qdm_lightning.display.progress import Progress
    from qdm_lightning.evaluation.sample import Pictures

NAME = "sample"
EXAMPLES = (
    ("run=outputs/NAME seeds=0-63", "64 pictures of the student and a grid"),
    ("run=outputs/NAME seeds=[7,100-120] sampler.steps=10 out=pictures", "chosen seeds, fewer steps, a folder of your own"),
    ("run=outputs/NAME seeds=0-3 trajectory=true", "and their way through the steps, teacher above student"),
    ("run=outputs/NAME seeds=0-49999 shard=3/8", "the third of eight jobs"),
)
"""For `--help`: arguments, and what they do."""


@dataclass(kw_only=True)
class SampleRootConfig(runs.RunConfig, SampleConfig):
    """Root of `conf/sample.yaml`."""


def sample(run: str | Path, overrides: Sequence[str] = (), progress: Progress | None = None) -> Pictures:
    """Draw pictures of a run, as the command does.

    Args:
        run: folder of the run.
        overrides: what else would be typed.
        progress: where stages are shown; None chooses by the terminal.

    Raises:
        UserError, ValueError, FileNotFoundError: bad input, found before anything was written.
    """
    cfg = runs.compose(NAME, SampleRootConfig, run, overrides)
    runs.check_run(cfg)
    return _sample(cfg, progress)


def _sample(cfg: DictConfig, progress: Progress | None = None) -> Pictures:
    from qdm_lightning.display.progress import Progress
    from qdm_lightning.evaluation.sample import draw_pictures

    def draw(shown: Progress) -> Pictures:
        return draw_pictures(runs.experiment(cfg), runs.settings_of(cfg), shown)

    result: Pictures = runs.guarded(draw, progress or Progress())
    return result


def _task(cfg: DictConfig) -> None:
    from qdm_lightning.display.progress import following_lines

    result = _sample(cfg)
    print(f"{result.drawn} pictures drawn, {result.present} were there: {result.folder}")
    if result.grid is not None:
        print(f"grid: {result.grid}")
    following = [(f"python -m qdm_lightning.evaluate run={cfg.run}", "the run's scores")]
    print("\n".join(following_lines(following)))


runs.register(NAME, SampleRootConfig)


def main() -> None:
    """`python -m qdm_lightning.sample`."""
    runs.main(NAME, SampleRootConfig, _task, EXAMPLES)


if __name__ == "__main__":
    main()
