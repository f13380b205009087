"""The dashboard as code shows what runs log, under the names by which they log it; the sweep file is what W&B's agent types."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from qdm_lightning.cli.schema import CONF_DIR, run_name
from qdm_lightning.cli.validate import validate
from qdm_lightning.dashboard import main

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")


def dashboard(monkeypatch, folder: Path, *typed: str):
    """What the command writes."""
    monkeypatch.setattr(sys, "argv", ["dashboard", "entity=me", f"json={folder / 'd.json'}", *typed])
    main()
    return json.loads((folder / "d.json").read_text())


def used(node, key=None):
    """(kind, name) of every value that the panels and the runs' table of a workspace read."""
    if isinstance(node, dict):
        names = {"metrics": "history", "mediaKeys": "history", "xAxis": "axis", "yAxis": "axis", "groupBy": "config"}
        for name, value in node.items():
            if name in names and value != "_step":
                for one in value if isinstance(value, list) else [value]:
                    yield names[name], one
            if name == "val" and isinstance(value, str):
                yield "history", value
            if name == "columnVisible":
                yield from (tuple(column.split(":")) for column in value)
            if name == "grouping":
                yield from (("config", group["name"]) for group in value)
            yield from used(value, name)
    elif isinstance(node, list):
        for one in node:
            yield from used(one, key)


def test_every_name_on_the_dashboard_is_one_that_a_run_logs(board_run, tmp_path, monkeypatch, offline_runs):
    found = offline_runs(board_run.run_dir)[0]
    names = set(used(dashboard(monkeypatch, tmp_path)))
    wanted = {"student/fd_digits", "student/image_mse", "nem_error/by_timestep", "val/nem", "samples/teacher_above_student"}
    assert wanted | {"quantization/layers", "results/final"} <= {name for _, name in names}
    for kind, name in names - {("run", "displayName")}:
        where, _, plain = name.partition(":") if kind == "axis" and ":" in name else (kind, "", name)
        if where == "config":
            first, *inner = plain.replace(".value.", ".").split(".")
            assert inner[0] in found.config[first], name
        elif where == "summary":
            assert plain in found.summary, name
        else:
            assert plain in found.keys() | found.summary.keys(), name


def test_the_panels_that_the_ablation_needs(tmp_path, monkeypatch):
    made = dashboard(monkeypatch, tmp_path, "sweep=my_sweep", "distance=fid", "project=p")
    section = made["spec"]["section"]
    panels = {s["name"]: [panel["viewType"] for panel in s["panels"]] for s in section["panelBankConfig"]["sections"]}
    assert [kinds.count("Bar Chart") for kinds in panels.values()] == [3, 0, 0, 0, 0]
    assert [kinds.count("Run History Line Plot") for kinds in panels.values()] == [0, 1, 3, 0, 0]
    assert panels["Pictures"] == ["Media Browser"]
    [runs] = section["runSets"]
    conditions = {(f["key"]["name"], f["op"], f["value"]) for f in runs["filters"]["filters"]}
    assert conditions == {("jobType", "!=", "teacher"), ("group", "=", "my_sweep")}
    assert ("history", "student/fid") in set(used(made))
    assert (made["entity"], made["project"]) == ("me", "p")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ([], "entity is missing: type entity="),
        (["entity=me"], "W&B has no key of yours"),
        (["entity=me", "json=file/d.json"], "json=file/d.json cannot be written: "),
        (["entity=me", "sweeep=x"], "sweeep is not a setting: did you mean sweep?"),
    ],
)
def test_bad_input(typed, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["dashboard", *typed])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr("qdm_lightning.dashboard.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["dashboard", "entity=me"])
    with pytest.raises(SystemExit):
        main()
    assert "pip install 'qdm-lightning[dashboards]'" in capsys.readouterr().err


def test_what_the_agent_types_for_the_sweep_file():
    """By W&B's own code: every cell composes, is another run, and together they are the ablation."""
    from itertools import product

    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "experiments" / "ablation_digits" / "sweep.yaml").read_text())
    assert sweep["command"] == ["${env}", "${interpreter}", "-m", "qdm_lightning.train", "${args_no_hyphens}"]
    assert sweep["method"] == "grid"
    choices = {name: settings["values"] for name, settings in sweep["parameters"].items()}
    assert choices.pop("seed") == [0, 1, 2]
    names = set()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        for values in product(*choices.values()):
            args = {name: {"value": value} for name, value in [*zip(choices, values, strict=True), ("seed", 2)]}
            cfg = compose("train", create_sweep_command_args({"args": args})["args_no_hyphens"])
            validate(cfg)
            names.add(run_name(cfg))
    assert len(names) == 3 * 4
    assert {"w4a4_off_off_ddim50_seed2", "w2a2_normalize_replace_ddim50_seed2"} <= names
