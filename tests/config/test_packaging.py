"""The wheel: `conf/` ships inside, and the command runs from any folder with a user's own options."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from omegaconf import OmegaConf

import qdm_lightning

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_version_is_that_of_the_package_and_of_the_changelog(installed):
    [metadata] = installed.glob("qdm_lightning-*.dist-info/METADATA")
    assert f"\nVersion: {qdm_lightning.__version__}\n" in metadata.read_text()
    released = re.findall(r"^## \[(\d.*?)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == qdm_lightning.__version__


def test_what_is_compiled_and_typed_ships(installed):
    package = ROOT / "src" / "qdm_lightning"
    sources = {str(file.relative_to(package)) for file in package.glob("integer/cpp/*")} | {"py.typed"}
    assert len(sources) > 1
    assert all((installed / "qdm_lightning" / name).is_file() for name in sources)


def test_every_configuration_ships(installed):
    shipped = {path.relative_to(installed / "qdm_lightning" / "conf") for path in (installed / "qdm_lightning").rglob("*.yaml")}
    assert shipped == {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}


def test_data_and_weights_ship(installed):
    def files(package: Path) -> dict[str, bytes]:
        return {str(f.relative_to(package)): f.read_bytes() for f in package.glob("*/assets/**/*") if f.is_file()}

    shipped = files(installed / "qdm_lightning")
    assert shipped == files(ROOT / "src" / "qdm_lightning")
    teacher = "training/assets/teacher_digits/unet/diffusion_pytorch_model.safetensors"
    assert {"data/assets/digits.npz", "metrics/assets/digits.safetensors", teacher} <= set(shipped)


def test_the_sweeper_ships_where_hydra_looks_for_it(installed):
    assert (installed / "hydra_plugins/qdm_lightning_sweeper.py").is_file()
    assert not (installed / "hydra_plugins/__init__.py").exists()  # a namespace that other plugins share


def test_runs_from_any_folder_with_options_of_ones_own(installed, tmp_path):
    mine = tmp_path / "mine" / "sampler"
    mine.mkdir(parents=True)
    (mine / "quick.yaml").write_text("# Mine.\nkind: ddim\nsteps: 3\n")
    ran = subprocess.run(
        [sys.executable, "-m", "qdm_lightning.train", "--config-dir=mine", "sampler=quick", "--cfg", "job"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert OmegaConf.create(ran.stdout).sampler.steps == 3
    where = subprocess.run(
        [sys.executable, "-c", "from qdm_lightning.cli.schema import CONF_DIR; print(CONF_DIR)"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert where.stdout.strip() == str(installed / "qdm_lightning" / "conf")
