"""Every YAML file below `conf/` composes, passes the checks, and can be instantiated."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from qdm_lightning.cli import build as building
from qdm_lightning.cli.build import build
from qdm_lightning.cli.help import defaults, first_comment, options
from qdm_lightning.cli.schema import CONF_DIR, located
from qdm_lightning.cli.validate import refuse_unknown, validate

GROUPS = [group for group in defaults("train") if group != "hydra"]
OPTIONS = [(group, option.name) for group in GROUPS for option in options(group)]
ROOTS = sorted(file.stem for file in CONF_DIR.glob("*.yaml"))

UNET_FOR = {
    "hf": "model=unet_small data.path=PATH data.image_size=16",
    "images": "model=unet_small data.path=PATH data.image_size=16",
    "cifar10": "model=unet_cifar10",
    "celeba": "model=unet_celeba",
    "imagenet64": "model=unet_imagenet64",
}
DATA_FOR = {
    "unet_small": "data=images data.path=PATH data.image_size=16",
    "unet_cifar10": "data=cifar10",
    "unet_celeba": "data=celeba",
    "unet_imagenet64": "data=imagenet64",
    "pretrained": "data=images data.path=PATH data.image_size=16 model.path=some/network",
}
WEIGHTS = (
    "inception",
    "resnet20",
    "dinov2",
    "clip",
)  # networks whose weights are the user's: their own tests write some and load them


def companions(group: str, name: str) -> str:
    """What must be typed with an option so that the whole makes sense."""
    own = {
        ("teacher", "checkpoint"): "teacher.path=PATH",
        ("teacher", "pretrained"): "teacher.path=some/network data=images data.path=PATH data.image_size=16",
        ("metrics", "custom"): "metrics._target_=qdm_lightning.metrics.digits.DigitsFeatures",
        ("metrics", "resnet20"): "metrics.weights=PATH",
        ("sampler", "diffusers"): "sampler.scheduler._target_=diffusers.DEISMultistepScheduler",
        ("metrics", "dinov2"): "metrics.weights=FOLDER",
        ("metrics", "clip"): "metrics.weights=FOLDER",
        ("data", name): UNET_FOR.get(name, ""),
        ("model", name): DATA_FOR.get(name, ""),
        ("experiment", name): "metrics=digits" if name.startswith("paper/") else "",
    }
    return own.get((group, name), "")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "images.npz"
    np.savez(path, images=np.zeros((4, 16, 16, 3), np.uint8))
    return path


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=["=".join(option) for option in OPTIONS])
def test_option(group, name, composed, pictures, monkeypatch):
    words = companions(group, name).replace("PATH", str(pictures)).replace("FOLDER", str(pictures.parent))
    for place in ("data.spec", "metrics.spec", "cli.logger_schema"):  # whatever extras are installed
        monkeypatch.setattr(f"qdm_lightning.{place}.find_spec", bool)
    cfg = composed(f"{group}={name}", *words.split())
    settings = validate(cfg)
    if name in WEIGHTS:
        return
    monkeypatch.setattr(building, "accelerators", lambda: {"gpu"})
    experiment = build(cfg)
    assert experiment.quant == settings.quant
    assert experiment.resolved == located(OmegaConf.to_container(cfg, resolve=True))


@pytest.mark.parametrize("root", ROOTS)
def test_root(root, composed):
    import_module(f"qdm_lightning.{root}")  # the command of that name registers its schema
    cfg = composed(root=root)
    refuse_unknown(cfg)
    OmegaConf.resolve(cfg)


def test_each_begins_with_a_line_that_says_what_it_is():
    silent = [str(file) for file in CONF_DIR.rglob("*.yaml") if not first_comment(file).endswith(".")]
    assert silent == []


def test_no_override_is_the_documented_main_job(composed):
    explicit = composed("data=digits", "model=unet_digits", "quant=w4a4", "taq=scale", "nem=replace", "sampler=ddim")
    assert composed() == explicit
