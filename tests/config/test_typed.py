"""Text as it was typed, places that mean the same from everywhere, sizes that fit, and caches that are the user's."""

from pathlib import Path

import pytest

from qdm_lightning.base.checks import memory, visible
from qdm_lightning.cli.compose import composed as composed_by_command
from qdm_lightning.cli.compose import stored, without_hydra
from qdm_lightning.cli.outside import keep_within
from qdm_lightning.cli.schema import plain
from qdm_lightning.cli.sizes import check_sizes, network_memory
from qdm_lightning.cli.typed import as_text
from qdm_lightning.cli.validate import validate
from qdm_lightning.models.unet import build_unet
from qdm_lightning.runs.caches import is_cache, mark_cache
from qdm_lightning.runs.folder import write_config


@pytest.mark.parametrize(
    ("typed", "key", "value"),
    [
        ("logger.name=2024_01_05", "logger.name", "2024_01_05"),
        ("logger.name=1e3", "logger.name", "1e3"),
        ("logger.name=true", "logger.name", "true"),
        ("logger.name=null", "logger.name", None),
        ("logger.name='007'", "logger.name", "007"),
        ("logger.group=1_000", "logger.group", "1_000"),
        ("logger.name=it's (1) [x] {y} #z; a=b", "logger.name", "it's (1) [x] {y} #z; a=b"),
        ("paths.output=2024_01_05", "paths.output", str(Path("2024_01_05").absolute())),
        ("hydra.run.dir=007", "hydra.run.dir", "007"),
        ("tags=[2024_01_05,1e3,007]", "tags", ["2024_01_05", "1e3", "007"]),
        ("seed=1_0", "seed", 10),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
    ],
)
def test_text_stays_as_it_was_typed(typed, key, value):
    cfg = composed_by_command("train", [typed])
    found = plain(without_hydra(cfg)) if not key.startswith("hydra") else {"hydra": {"run": {"dir": cfg.hydra.run.dir}}}
    for name in key.split("."):
        found = found[name]
    assert found == value


def test_values_of_a_sweep_stay_as_they_were_typed():
    assert as_text("logger.name=1e3,a,007") == "logger.name='1e3',a,'007'"
    assert as_text("seed=1_0,2") == "seed=1_0,2"


def test_places_are_absolute(composed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics").mkdir()
    values = plain(composed("data=images", "data.path=pics", "paths.output=runs"))
    assert values["data"]["path"] == str(tmp_path / "pics")
    assert values["paths"] == {"output": str(tmp_path / "runs"), "cache": "~/.cache/qdm_lightning"}
    hub = plain(composed("teacher=pretrained", "teacher.path=google/ddpm"))
    assert hub["teacher"]["path"] == hub["model"]["path"] == "google/ddpm"


def test_estimates_are_below_what_a_network_takes(composed):
    cfg = composed()
    unet = build_unet(**{name: value for name, value in plain(cfg)["model"].items() if name != "_target_"})
    weights, activations = network_memory(plain(cfg)["model"])
    stored_bytes = 4 * sum(parameter.numel() for parameter in unet.parameters())
    assert 0.4 * stored_bytes < weights < stored_bytes
    assert 100_000 < activations < 200_000  # a drawn image takes 200 kB, a training image 1.2 MB


@pytest.mark.parametrize("setting", ["data.batch_size", "sampler.batch_size", "num_samples", "trainer.val_images"])
def test_sizes_are_measured_against_the_machine(composed, setting):
    check_sizes(validate(composed(f"{setting}=64", "trainer=cpu")), plain(composed())["model"])
    count = min(memory() // 64, 2**32 - 2)
    with pytest.raises(
        ValueError, match=rf"{setting}={count} is not allowed: it takes some .* GiB of memory, this machine has"
    ):
        check_sizes(validate(composed(f"{setting}={count}", "trainer=cpu")), plain(composed())["model"])


def test_a_stored_cache_is_the_users_or_none(composed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    elsewhere, mine = tmp_path / "elsewhere", tmp_path / "mine"
    elsewhere.mkdir()
    mark_cache(mine)
    assert (is_cache(mine / "datasets"), is_cache(elsewhere), is_cache("~/.cache/qdm_lightning/x")) == (True, False, True)
    run = tmp_path / "run"
    for cache, taken, told in ((mine, mine, 0), (elsewhere, "~/.cache/qdm_lightning", 1)):
        write_config(run, plain(composed(f"paths.cache={cache}")))
        said = []
        assert stored(run, say=said.append).paths.cache == str(taken)
        assert sum("is no cache of yours" in line for line in said) == told
    assert stored(run, typed=["paths.cache"]).paths.cache == str(elsewhere)
    assert [*elsewhere.iterdir()] == []


def test_what_is_named_outside_is_told():
    values = {"data": {"root": "/x", "download": True, "cache": "/y"}, "paths": {}, "logger": {"entity": "them"}}
    lines = keep_within(values)
    assert values["data"] == {"root": "/x", "download": False, "cache": None}
    assert lines[-1] == "named by the run's configuration: data.root=/x, logger.entity=them"


def test_control_characters_are_written_out():
    assert visible("a\x1b[31m\x9b\u202e\x07b\tc\n") == "a\\x1b[31m\\x9b\\u202e\\x07b\tc\n"
