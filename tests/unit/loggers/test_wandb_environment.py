"""W&B's environment variables: what is typed wins, then the variable, then our default."""

import pytest

from qdm_lightning.cli.validate import validate
from qdm_lightning.loggers import opened, wandb_logger


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """`settings(typed, VARIABLE=...)`: what `wandb.init` is given; None where it is not called."""

    def ask(typed=None, **variables):
        for name in ("MODE", "DISABLED", "PROJECT", "NAME", "RUN_GROUP", "TAGS"):
            monkeypatch.delenv(f"WANDB_{name}", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        given = []

        class Asked(Exception):
            pass

        def init(**settings):
            given.append(settings)
            raise Asked

        monkeypatch.setattr("wandb.init", init)
        try:
            logger = wandb_logger(run_dir=tmp_path / "run", config={}, **(typed or {}))
        except Asked:
            return given[0]
        assert logger is None
        return None

    return ask


def test_names(settings):
    given = settings(MODE="offline", PROJECT="theirs", NAME="mine", RUN_GROUP="ours", TAGS="a,b")
    assert [given[name] for name in ("project", "name", "group", "tags")] == ["theirs", "mine", "ours", ["a", "b"]]
    typed = {"project": "p", "name": "n", "group": "g", "tags": ["t"]}
    given = settings(typed, MODE="offline", PROJECT="theirs", NAME="mine", RUN_GROUP="ours", TAGS="a,b")
    assert [given[name] for name in typed] == ["p", "n", "g", ["t", "a", "b"]]
    given = settings(MODE="offline")
    assert [given[name] for name in typed] == ["qdm-lightning", "run", None, None]


@pytest.mark.parametrize(
    ("typed", "variables", "mode"),
    [
        (None, {}, "offline"),  # nobody is logged in
        (None, {"MODE": "online"}, "online"),
        (None, {"MODE": "dryrun"}, "offline"),
        (None, {"MODE": "disabled"}, None),
        (None, {"DISABLED": "true"}, None),
        (None, {"DISABLED": "1", "MODE": "online"}, None),
        (None, {"DISABLED": "false", "MODE": "online"}, "online"),
        ("offline", {"MODE": "disabled"}, "offline"),
        ("online", {"DISABLED": "true"}, "online"),
        ("disabled", {"MODE": "online"}, None),
    ],
)
def test_modes(settings, monkeypatch, tmp_path, typed, variables, mode):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr("qdm_lightning.loggers.logged_in", lambda: False)
    given = settings({"mode": typed}, **variables)
    assert (given and given["mode"]) == mode


def test_a_wrong_mode_is_one_line(composed, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offlin")
    for option in ("wandb", "wandb_tensorboard"):
        with pytest.raises(ValueError, match="WANDB_MODE=offlin is not allowed: choose one of offline, online, disabled"):
            validate(composed(f"logger={option}"))
    validate(composed("logger=wandb", "logger.mode=offline"))
    validate(composed("logger=none"))


def test_disabled_is_no_logger(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_DISABLED", "true")
    with opened([wandb_logger], run_dir=tmp_path, config={}) as loggers:
        assert loggers == []
    assert not list(tmp_path.iterdir())
