"""`python -m qdm_lightning.cost` as it is typed."""

import json
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from qdm_lightning.base.checks import UserError
from qdm_lightning.cli.help import defaults
from qdm_lightning.cli.schema import CONF_DIR
from qdm_lightning.cost import cost, main


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "qdm_lightning.cost", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def composed(*overrides, root="cost"):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(root, overrides=list(overrides))


def test_the_papers_speedup(tmp_path):
    ended = run("model=unet_cifar10", "quant.qkv_bits=8", "quant.probs_bits=8", "json=out/cost.json", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "6.222 GMACs" in ended.stdout
    assert "7.78x" in ended.stdout
    figures = json.loads((tmp_path / "out" / "cost.json").read_text("utf-8"))
    assert round(figures["speedup"]["linear"], 2) == 7.78
    assert set(figures["speedup"]) == {"linear", "bops", "bops64"}
    assert (figures["parameters"], figures["quant"]["qkv_bits"]) == (35_746_307, 8)
    assert {"name", "macs", "parameters", "weight_bits", "act_bits", "bytes", "speedup"} <= set(figures["layers"][0])
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "cost.json"]


def test_a_sweep_writes_a_file_each_and_nothing_else(tmp_path):
    ended = run("-m", "quant=w8a8,w2a2", "json='${quant.act_bits}.json'", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["2.json", "8.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+unknown=1"], "unknown is not a setting"),
        (["quant.act_bits=9"], "quant.act_bits=9 is not allowed: choose one of 2, 3"),
        (["image_shape=[3,32]"], "image_shape=[3, 32] is not allowed: give [channels,height,width]"),
        (["model=pretrained"], "type model.path=<folder>"),
        (["json=."], "json=. cannot be written: give the name of a file"),
        (["-m", "quant=w4a4,w2a2", "json=cost.json"], "json=cost.json would hold the last job alone"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cost", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_a_run_is_told_can_be_told_here():
    assert list(defaults("cost")) == list(defaults("train"))
    assert cost(composed("experiment=digits_baseline", root="train")) == cost(composed("taq=off"))
    assert cost(composed("quant=fp32")).speedup()["linear"] == 1


def test_image_shape():
    assert cost(composed("image_shape=[1,16,16]")).macs > 3.9 * cost(composed()).macs
    with pytest.raises(UserError, match=r"image_shape=\[3, 8, 8\] does not fit the network"):
        cost(composed("image_shape=[3,8,8]"))


def test_help_waits_for_no_torch():
    subprocess.run([sys.executable, "-c", "import qdm_lightning.cost, sys; sys.exit('torch' in sys.modules)"], check=True)
