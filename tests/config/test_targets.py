"""Stored configurations may name only what this package itself defines."""

import pytest

from qdm_lightning.base.trust import check_targets, is_ours, targets
from qdm_lightning.cli.schema import plain


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
    assert not is_ours(target)
    with pytest.raises(ValueError, match="would run"):
        check_targets({"a": [{"_target_": target}]})


def test_each_of_our_options_is_ours(composed):
    for overrides in (["taq=ema"], ["taq=scale"], ["taq=normalize", "logger=wandb"]):
        found = list(targets(plain(composed(*overrides))))
        assert len(found) > 5
        check_targets(plain(composed(*overrides)))


def test_trust_is_by_the_exact_name():
    stored = {"quant": {"act_quantizer": {"_target_": "my.Quantizer"}}}
    check_targets(stored, trusted=["my.Quantizer"])
    with pytest.raises(ValueError, match=r"type quant\.act_quantizer\._target_=my\.Quantizer as well"):
        check_targets(stored, trusted=["my.Quantizers"])


@pytest.mark.parametrize("target", [["os", "system"], {"a": 1}, 3, "${oc.env:X}"])
def test_what_is_no_name_is_refused(target):
    with pytest.raises(ValueError, match="would run"):
        check_targets({"_target_": target}, trusted=frozenset({"my.Quantizer"}))
