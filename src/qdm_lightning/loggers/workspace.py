"""The ablation's dashboard as a W&B workspace. Its names are those that `publishing` and the training loop log."""

from __future__ import annotations

from typing import Any

from qdm_lightning.loggers.media import STEP, TIMESTEP

CELL = "cell.name"
"""Setting in a run's config that names its bits, TaQ, NeM and sampler. Seeds of one cell are averaged."""


def workspace(*, project: str, entity: str, name: str, sweep: str | None = None, distance: str = "fd_digits") -> Any:
    """Sections results, timesteps, training, pictures and layers, as a `wandb_workspaces` Workspace; nothing is sent.

    Args:
        sweep: group whose runs are shown, the name of a multirun's folder; None shows all of the project.
        distance: the distance that the runs measured, `fid` where the metric is Inception's.
    """
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.expr import And, Config, Metric

    of_sweep = [] if sweep is None else [Metric("Group") == sweep]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[ws.Section(name=title, panels=panels, is_open=True) for title, panels in _sections(distance).items()],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=And(Metric("JobType") != "teacher", *of_sweep),
            groupby=[Config(CELL)],
            pinned_columns=[
                *(f"config:cell.{part}" for part in ("bits", "taq", "nem")),
                *(f"summary:student/{name}" for name in (distance, "image_mse", "nem_error_mean", "cost/bytes")),
                f"summary:teacher/{distance}",
            ],
        ),
        auto_generate_panels=True,  # every other scalar and histogram, in sections below
    )


def _sections(distance: str) -> dict[str, list[Any]]:
    import wandb_workspaces.reports.v2 as wr

    def bar(title: str, metric: str) -> Any:
        return wr.BarPlot(
            title=title, metrics=[metric], groupby=wr.Config(CELL), groupby_aggfunc="mean", groupby_rangefunc="stddev"
        )

    def line(title: str, metric: str, x: str = STEP) -> Any:
        return wr.LinePlot(
            title=title,
            x=x,
            y=[metric],
            log_y=True,
            groupby=wr.Config(CELL),
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
        )

    def scatter(title: str, x: str) -> Any:
        return wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(f"student/{distance}"))

    return {
        "Results, mean and standard deviation over seeds": [
            bar(f"Student: {distance}", f"student/{distance}"),
            bar("Mean squared error to the teacher's images", "student/image_mse"),
            bar("NeM error on the validation set", "student/nem_error_mean"),
            scatter(f"{distance} against bytes as stored", "student/cost/bytes"),
            scatter(f"{distance} against theoretical speed-up", "student/cost/speedup/linear"),
            wr.WeavePanelSummaryTable(table_name="results/final"),
        ],
        "Over the timesteps": [
            line("NeM error by t", "nem_error/by_timestep", TIMESTEP),
            wr.WeavePanelSummaryTable(table_name="nem_error/table"),
        ],
        "Training": [
            line("Training loss", "train/loss"),
            line("Validation loss", "val/loss"),
            line("Validation L_NeM", "val/nem"),
        ],
        "Pictures": [wr.MediaBrowser(title="Teacher above student, same seeds", media_keys=["samples/teacher_above_student"])],
        "Layers and settings": [
            wr.WeavePanelSummaryTable(table_name="quantization/layers"),
            wr.RunComparer(diff_only="split"),
        ],
    }


def save(made: Any) -> str:
    """Send a workspace to W&B; returns its address.

    Raises:
        ValueError: W&B refuses it, or does not answer.
    """
    import wandb

    try:
        return str(made.save().url)
    except wandb.Error as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"W&B does not take the dashboard: {first}; to look at it without W&B type json=FILE") from error
