"""Stored configurations are plain data, and name in each place only what this package has for it."""

import re
from pkgutil import resolve_name

import pytest

from qdm_lightning.base.trust import ROLES, check_targets, targets
from qdm_lightning.cli.schema import plain
from qdm_lightning.runs.folder import read_config, write_config


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.run",
        "builtins.eval",
        "qdm_lightning",
        "qdm_lightning.cli.app.os.system",  # an import of ours
        "qdm_lightning.cli.app.sys",
        "qdm_lightning.cli.app.hydra.utils.get_method",
        "qdm_lightning.quantization.spec.QuantConfig.__init__",
        "qdm_lightning.cli.app.__builtins__.eval",
        "qdm_lightning..os.system",
        "qdm_lightning/../os.system",
        "qdm_lightning_evil.f",
        "",
    ],
)
def test_foreign_code(target):
    with pytest.raises(ValueError, match="would run"):
        check_targets({"a": [{"_target_": target}]})


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("callbacks.x", "qdm_lightning.cli.jobs._run"),
        ("metrics", "qdm_lightning.base.files.write_json"),
        ("metrics", "qdm_lightning.data.digits.DigitsData"),
        ("data", "qdm_lightning.models.diffusers_io.save_pipeline"),
        ("logger.a", "qdm_lightning.report.main"),
        ("quant.act_quantizer.inner", "qdm_lightning.quantization.quantizer.LSQActivation"),
        ("quant.calibrator", "qdm_lightning.quantization.quantizer.LSQWeight"),
    ],
)
def test_our_own_code_in_a_place_that_is_not_for_it(key, target):
    stored = {"_target_": target}
    for name in reversed(key.split(".")):
        stored = {name: stored}
    with pytest.raises(ValueError, match=f"would run {re.escape(target)} "):
        check_targets(stored)
    check_targets(stored, trusted=[target])


def test_each_of_our_options_is_ours(composed):
    for overrides in (["taq=ema"], ["taq=scale"], ["taq=normalize", "logger=wandb"], ["logger=wandb_tensorboard"]):
        found = list(targets(plain(composed(*overrides))))
        assert len(found) > 5
        check_targets(plain(composed(*overrides)))


def test_what_may_be_stored_is_there_and_has_its_place():
    for names in ROLES.values():
        for name in names:
            assert callable(resolve_name(f"qdm_lightning.{name}"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: '${oc.create:{_target_: torch.hub.load}}'", "line 1 has .*, which no run writes"),
        ("seed: 0\nlogger:\n  name: ${oc.env:HOME}", "line 3 has .*, which no run writes"),
        ("'${oc.env:HOME}': 1", "which no run writes"),
        ("a: &a [x, x]\nb: [*a, *a]", r"line 2 has the alias \*a"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: " + "[" * 100000, "line 1 is nested more than 20 deep"),
        ("a: [" + "1," * 200000 + "]", "more than 262,144 characters"),
        ("[1, 2", "is damaged"),
        ("[1, 2]", "is not the configuration"),
    ],
)
def test_a_stored_configuration_is_plain_data(tmp_path, text, said):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_config(tmp_path)


def test_what_a_run_writes_is_read_back(tmp_path):
    shared = [1, 2]
    values = {"seed": 3, "a": {"b": shared, "c": shared}, "name": "tür $x {y} *z &w"}
    write_config(tmp_path, values)
    assert read_config(tmp_path) == values


def test_trust_is_by_the_exact_name():
    stored = {"quant": {"act_quantizer": {"_target_": "my.Quantizer"}}}
    check_targets(stored, trusted=["my.Quantizer"])
    with pytest.raises(ValueError, match=r"type quant\.act_quantizer\._target_=my\.Quantizer as well"):
        check_targets(stored, trusted=["my.Quantizers"])


@pytest.mark.parametrize("target", [["os", "system"], {"a": 1}, 3, "${oc.env:X}"])
def test_what_is_no_name_is_refused(target):
    with pytest.raises(ValueError, match="would run"):
        check_targets({"_target_": target}, trusted=frozenset({"my.Quantizer"}))
