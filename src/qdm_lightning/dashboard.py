"""`python -m qdm_lightning.dashboard`: the ablation's dashboard in a W&B project, as code.

`training.loggers.workspace.workspace(...)` is the object itself.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from qdm_lightning.base.checks import UserError
from qdm_lightning.cli import app as cli
from qdm_lightning.cli import stored  # noqa: F401 - it tells OmegaConf the scratch folder of conf/hydra/no_folder.yaml
from qdm_lightning.cli.build import refuse_unknown

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
        name: of the workspace.
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


def _check(cfg: DictConfig) -> None:
    refuse_unknown(cfg)
    if not cfg.entity:
        raise UserError("entity is missing: type entity=<your W&B user or team>")
    if find_spec("wandb_workspaces") is None:
        raise UserError("the dashboard needs wandb-workspaces: pip install 'qdm-lightning[dashboards]'")
    if cfg.json is None:
        from qdm_lightning.loggers.wandb_run import logged_in

        if not logged_in():
            raise UserError("W&B has no key of yours: type wandb login, or json=FILE to send nothing")


def _task(cfg: DictConfig) -> None:
    from qdm_lightning.loggers.workspace import save, workspace

    settings = dict(cfg)
    file = settings.pop("json")
    made = workspace(**{str(name): value for name, value in settings.items()})
    try:
        if file is None:
            print(f"dashboard: {save(made)}")
            return
        path = Path(file).expanduser()
        path.write_text(json.dumps(made._to_model().model_dump(by_alias=True, exclude_none=True), indent=2) + "\n", "utf-8")
    except (ValueError, OSError) as error:
        why = f"json={file} cannot be written: {error.strerror}" if isinstance(error, OSError) else str(error)
        print(f"error: {why}", file=sys.stderr)
        raise SystemExit(cli.BAD_INPUT) from None
    print(f"written: {path}\nnext:\n  python -m qdm_lightning.dashboard entity={cfg.entity}  sends it to W&B")


ConfigStore.instance().store(name="base_dashboard", node=OmegaConf.structured(DashboardConfig))


def main() -> None:
    """`python -m qdm_lightning.dashboard`."""
    cli.run("dashboard", _task, check=_check, examples=EXAMPLES)


if __name__ == "__main__":
    main()
