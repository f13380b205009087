"""`python -m qdm_lightning.train`: a teacher, its quantized student, and a measurement of both.

`train(cfg)` is the same from Python:

    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        result = train(compose("train", overrides=["quant=w3a3"]))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from omegaconf import DictConfig

from qdm_lightning.base.checks import UserError
from qdm_lightning.base.trust import targets
from qdm_lightning.cli import app as cli
from qdm_lightning.cli.build import CONFIG_FILE, LOCK_FILE, build, plain, same_settings, stored, write_config
from qdm_lightning.cli.messages import explain, is_bad_input

if TYPE_CHECKING:
    from qdm_lightning.display.progress import Progress
    from qdm_lightning.training.run import Result

EXAMPLES = (
    ("(nothing)", "the W4A4 student with TaQ and NeM on the embedded digits, minutes on a CPU"),
    ("quant=w3a3 seed=1", "fewer bits, another seed; the teacher is shared"),
    ("experiment=digits_baseline", "the same budget without TaQ and NeM"),
    ("data=images data.path=DIR data.image_size=16 model=unet_small", "your own pictures"),
    ("teacher=pretrained teacher.path=DIR", "a diffusers folder as teacher"),
    ("quant=fp32", "a teacher alone"),
    ("-m seed=0,1,2 quant=w4a4,w3a3", "six runs; hydra.sweep.dir=DIR gives them a folder, where the same command goes on"),
    ("-m experiment=ablation/taq_nem seed=0,1,2 hydra/launcher=joblib", "a table of the paper, a job for each core"),
    ("run=outputs/NAME", "go on with an interrupted run"),
)
"""For `--help`: arguments, and what they do."""


def train(cfg: DictConfig, progress: Progress | None = None) -> Result:
    """Build the experiment that `cfg` describes and run it.

    Args:
        cfg: composed from `conf/train.yaml`, or what `config.stored(folder)` returns, to go on with that run.
        progress: where stages are shown; None chooses by the terminal.

    Returns:
        Metrics (as in `metrics.json`), run folder and networks.

    Raises:
        UserError: bad input, found before the first stage began.
    """
    from qdm_lightning.display.progress import Progress
    from qdm_lightning.training.run import run

    progress = progress or Progress()
    try:
        experiment = build(cfg)
        with _alone(experiment.run_dir):
            _keep(cfg, experiment.run_dir / CONFIG_FILE)
            return run(experiment, progress)
    except Exception as error:
        if progress.started or not is_bad_input(error):
            raise
        raise UserError(explain(error)) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the run's folder, so that no second process trains in it; the first of several ranks holds it for all.

    Raises:
        UserError: another process does.
    """
    from qdm_lightning.base.ranks import rank

    if rank():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder} is being trained by another process: wait for it, or end it") from error
    try:
        yield
    finally:
        lock.release()


def _keep(cfg: DictConfig, file: Path) -> None:
    """Write the resolved configuration into the run's folder; a run that goes on must have the same one there.

    Raises:
        UserError: it has another one.
    """
    if cfg.run:
        if not same_settings(cfg, stored(cfg.run, trusted=[target for _, target in targets(plain(cfg))])):
            raise UserError(
                f"run={cfg.run} holds another configuration: leave out what was changed, or in Python use stored(folder)"
            )
        return
    write_config(cfg, file)


def _task(cfg: DictConfig) -> None:
    from qdm_lightning.display.progress import print_closing

    result = train(cfg)
    print_closing(result.metrics, result.run_dir, _following(result))


def _following(result: Result) -> list[tuple[str, str]]:
    """What to type after a run: (command, what it does)."""
    command = "python -m qdm_lightning.train"
    if "student" not in result.metrics:
        return [(f"{command} teacher=checkpoint teacher.path={result.run_dir}", "a student of this teacher")]
    return [
        (f"{command} taq=off nem=off", "the same student without TaQ and NeM, same teacher"),
        (f"{command} quant=w3a3", "fewer bits, same teacher"),
        (f"{command} --help", "everything else"),
    ]


def main() -> None:
    """Console script `qdm-train`."""
    cli.run("train", _task, check=build, examples=EXAMPLES, sweeps=True)


if __name__ == "__main__":
    main()
