"""Trackio: scalars and the configuration, in Trackio's own folder, or on a Space of the hub."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from qdm_lightning.base.files import read_text, write_whole
from qdm_lightning.loggers.media import cosmetic

MARK = "trackio_run"
"""File of a run's folder: the name of its Trackio run, which a resumed run takes up again."""


class TrackioRun(Logger):
    """Scalars of one run, with their steps. A fault of Trackio's in the middle of a job is a warning, not the job's end.

    Args:
        run: as `trackio.init` returns it.
    """

    name = "trackio"
    version = "0"

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with cosmetic("metrics", "Trackio"):
            self.run.log({name: value for name, value in metrics.items() if name != "epoch"}, step=step)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is there from the beginning."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        with cosmetic("the end", "Trackio"), redirect_stdout(io.StringIO()):
            import trackio

            trackio.finish()  # of the run that was begun last: Trackio has one a process


def trackio_logger(
    *,
    run_dir: Path,
    config: Mapping[str, Any],
    project: str = "qdm-lightning",
    name: str | None = None,
    group: str | None = None,
    space_id: str | None = None,
) -> Logger:
    """A Trackio run; `trackio show --project PROJECT` shows it. Trackio keeps it in its own folder (TRACKIO_DIR).

    Args:
        run_dir: its name names the run where `name` is None.
        config: resolved configuration.
        project, group, space_id: as `trackio.init` takes them; with `space_id` the run goes to that Space of the hub.

    Raises:
        ValueError: Trackio refuses the run, or the file of its name is damaged.
    """
    import trackio

    mark = run_dir / MARK
    earlier = read_text(mark, "remove it to begin another Trackio run").strip() if mark.exists() else ""
    known = earlier or name or run_dir.name
    write_whole(mark, f"{known}\n".encode())
    try:
        with redirect_stdout(io.StringIO()):  # what it says is about its dashboard
            run = trackio.init(
                project,
                name=known,
                group=group,
                space_id=space_id,
                config=dict(config),
                resume="allow" if earlier else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
    except Exception as error:
        first = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"Trackio refuses this run: {first}; to go without: logger=none") from error
    return TrackioRun(run)
