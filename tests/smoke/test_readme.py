"""What the README shows works: its code runs, its commands compose, its user-defined quantizer trains and is counted."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import qdm_lightning
from qdm_lightning import load_student
from qdm_lightning.base.checks import UserError
from qdm_lightning.cli.help import COMMANDS
from qdm_lightning.cli.schema import CONF_DIR
from qdm_lightning.cli.validate import validate
from qdm_lightning.integer import to_integer
from qdm_lightning.train import main

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
TINY = [
    "model.block_out_channels=[8,16]",
    "model.norm_num_groups=4",
    "data.batch_size=16",
    "teacher.max_steps=2",
    "trainer.max_steps=2",
    "trainer.compile=off",
    "trainer.accelerator=cpu",
    "quant.calibration_batches=2",
    "sampler.steps=2",
    "num_samples=24",
    "logger=none",
]


def block(name: str) -> str:
    """The code between two markers of the README."""
    found = re.search(rf"<!-- {name}:begin -->\n```\w+\n(.*?)```\n<!-- {name}:end -->", README, re.S)
    assert found, name
    return found.group(1)


def commands() -> list[str]:
    return re.findall(r"^python -m qdm_lightning\.train +(.*?) *(?:#.*)?$", README, re.M)


def test_the_readme_has_its_commands():
    assert len(commands()) >= 6


@pytest.mark.parametrize("command", [c for c in commands() if c])
def test_every_train_command_composes(command, tmp_path, monkeypatch):
    monkeypatch.setattr("qdm_lightning.data.spec.find_spec", bool)  # as where the extra that a command names is installed
    overrides = [word for word in shlex.split(command) if word != "-m" and not word.startswith("run=")]
    for name in ("PICTURES", "DIFFUSERS_FOLDER"):
        (tmp_path / name).mkdir()
        overrides = [o.replace(f"={name}", f"={tmp_path / name}") for o in overrides]
    (tmp_path / "DIFFUSERS_FOLDER" / "config.json").write_text('{"sample_size": 16, "in_channels": 3}')
    single = [re.sub(r"=([^\[]*?),.*", r"=\1", word) for word in overrides]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        validate(compose("train", overrides=single))


def test_every_command_that_is_named_exists():
    named = set(re.findall(r"python -m qdm_lightning\.(\w+)", README))
    assert named <= set(COMMANDS)


def test_the_plain_loop_learns():
    scope: dict[str, object] = {}
    exec(block("plain-loop"), scope)
    assert float(scope["loss"].detach()) < 1.5  # type: ignore[attr-defined]
    assert len(scope["report"].quantized) == 3  # type: ignore[attr-defined]


def test_the_python_api(tmp_path):
    scope: dict[str, object] = {}
    words = [*TINY, f"paths.cache={tmp_path}", f"paths.output={tmp_path / 'o'}"]
    words += ["num_samples=8", "sampler.batch_size=8", "trainer.val_images=32", "quant.calibrator.steps=2"]
    exec(block("python").replace('"debug=trial"', ", ".join(map(repr, words))), scope)
    images, result = scope["images"], scope["result"]
    assert images.shape == (16, 1, 8, 8)  # type: ignore[attr-defined]
    assert result.metrics["student"]["image_mse"] > 0  # type: ignore[attr-defined]
    assert all(callable(getattr(qdm_lightning, name)) for name in qdm_lightning.__all__ if name != "__version__")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("quant=w3a3", r"give a list of overrides, such as train\(\['quant=w3a3'\]\)"),
        (["seed=0,1"], "seed=0,1: one run at a time from Python"),
        (["hydra.run.dir=x"], "one run at a time from Python, in a new folder below"),
        (["run=x", "seed=1"], "run=x goes on as the run's own config.yaml says"),
        (["quant=w5"], "quant=w5"),
    ],
)
def test_what_python_may_not_ask_for_is_one_line(words, message):
    with pytest.raises(UserError, match=message):
        qdm_lightning.run_training(words)


def test_a_quantizer_of_the_users_own(tmp_path, monkeypatch, capsys):
    """From a config folder: it trains, checkpoints, is named in the report, counts in the cost, and loads again."""
    (tmp_path / "my_quantizers.py").write_text(block("quantizer"))
    (tmp_path / "conf" / "quant").mkdir(parents=True)
    (tmp_path / "conf" / "quant" / "fixed.yaml").write_text(block("quantizer-config"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    arguments = [
        f"--config-dir={tmp_path / 'conf'}",
        "quant=fixed",
        "taq=off",
        *TINY,
        f"paths.cache={tmp_path}",
        f"paths.output={tmp_path / 'o'}",
    ]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    main()
    (folder,) = (tmp_path / "o").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["student"]["image_mse"] > 0
    assert "FixedRange" in (folder / "quantization.txt").read_text()
    assert metrics["student"]["cost"]["speedup"]["linear"] > 6
    with pytest.raises(ValueError, match="my_quantizers"):
        load_student(folder / "student")
    student = load_student(folder / "student", trusted=["my_quantizers.FixedRange"])
    assert any(type(m).__name__ == "FixedRange" for m in student.modules())
    assert to_integer(student)[1].float_layers == []
