"""`python -m qdm_lightning.dashboard`: the ablation's dashboard in a W&B project, as code.

`loggers.workspace.workspace(...)` is the object itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qdm_lightning.base.checks import UserError
from qdm_lightning.base.files import write_json
from qdm_lightning.cli.app import Command
from qdm_lightning.cli.schema import plain, register_root
from qdm_lightning.cli.validate import refuse_unknown

EXAMPLES = (
    ("entity=ME", "a workspace in the project qdm-lightning of ME; prints its address"),
    ("entity=ME sweep=2026-01-31_sweep", "the runs of one multirun alone, by the name of its folder"),
    ("entity=ME json=dashboard.json", "the workspace as plain data; nothing is sent"),
)
"""For `--help`: arguments, and what they do."""


@dataclass(kw_only=True)
class DashboardConfig:
    """Root of `conf/dashboard.yaml`.

    Args:
        entity, project: where the runs are.
        name: name of the workspace.
        sweep: group of runs that is shown, the name of a multirun's folder; None shows all.
        distance: name of the runs' distance.
        json: file for the workspace as plain data, instead of sending it.
    """

    entity: str | None = None
    project: str = "qdm-lightning"
    name: str = "Ablation"
    sweep: str | None = None
    distance: str = "fd_digits"
    json: str | None = None


class Dashboard(Command):
    """`python -m qdm_lightning.dashboard`."""

    def check(self, cfg: Any) -> DashboardConfig:
        """The settings, unless something is missing that the dashboard needs."""
        refuse_unknown(cfg)
        settings = DashboardConfig(**plain(cfg))
        if not settings.entity:
            raise UserError("entity is missing: type entity=<your W&B user or team>")
        if find_spec("wandb_workspaces") is None:
            raise UserError("the dashboard needs wandb-workspaces: pip install 'qdm-lightning[dashboards]'")
        if settings.json is None:
            from qdm_lightning.loggers.wandb_run import logged_in

            if not logged_in():
                raise UserError("W&B has no key of yours: type wandb login, or json=FILE to send nothing")
        return settings

    def work(self, settings: DashboardConfig, folder: Path) -> None:
        """Send the workspace, or write it."""
        from qdm_lightning.loggers.workspace import save, workspace

        file, arguments = settings.json, asdict(settings)
        del arguments["json"]
        board = workspace(**arguments)
        try:
            if file is None:
                self.show(f"dashboard: {save(board)}")
                return
            write_json(
                Path(file).expanduser(),
                board._to_model().model_dump(by_alias=True, exclude_none=True, mode="json"),
                checksum=False,
            )
        except OSError as error:
            raise UserError(f"json={file} cannot be written: {error.strerror}") from error
        except ValueError as error:
            raise UserError(str(error)) from error
        self.show(f"written: {file}\nnext:\n  python -m qdm_lightning.dashboard entity={settings.entity}  sends it to W&B")


register_root("dashboard", DashboardConfig)
main = Dashboard("dashboard", EXAMPLES, print).main

if __name__ == "__main__":
    main()
