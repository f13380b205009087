"""A seeded run is what it was: losses of 16 student steps and the images of 16 seeds, kept in tests/assets/trace.npz.

`python tests/oracle/test_trace.py` writes the file anew. Equality is exact where instruction set and version of torch are those
that the file tells, and to a tolerance elsewhere.
"""

import csv
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qdm_lightning.cli.schema import CONF_DIR
from qdm_lightning.diffusion.sampling import sample
from qdm_lightning.display.progress import Progress
from qdm_lightning.train import train

FILE = Path(__file__).parents[1] / "assets" / "trace.npz"
MIN_MAX = "quant.calibrator._target_=qdm_lightning.quantization.calibration.MinMax"
VARIANTS = {
    "default": ["taq=normalize"],  # as it was when the file was made
    "ema": [MIN_MAX, "taq=ema", "nem=add", "quant=w3a3"],
    "scale": [
        MIN_MAX,
        "taq=scale",
        "taq.scope=all_but_probs",
        "nem=on_policy",
        "nem.on_policy_buffer=64",
        "nem.on_policy_refresh=8",
    ],
    "plain": [MIN_MAX, "taq=off", "nem=off", "quant=w2a2", "sampler=ddpm"],
}
RUN = [
    "model.block_out_channels=[8,16]",
    "model.norm_num_groups=4",
    "model.layers_per_block=1",
    "data.batch_size=16",
    "teacher.max_steps=6",
    "trainer=cpu",
    "trainer.max_steps=16",
    "trainer.val_every=8",
    "trainer.val_images=64",
    "trainer.log_every=1",
    "trainer.compile=off",
    "trainer.threads=1",
    "quant.calibration_batches=2",
    "sampler.steps=5",
    "sampler.batch_size=16",
    "num_samples=16",
    "logger=none",
]


def surroundings() -> str:
    return f"{torch.backends.cpu.get_cpu_capability()} {torch.__version__}"


def run(variant: str, folder: Path) -> dict[str, np.ndarray]:
    """Losses (16,) float64 and images (16, 1, 8, 8) float32 of one variant."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("train", [*RUN, *VARIANTS[variant], f"paths.cache={folder / 'cache'}", f"paths.output={folder / 'runs'}"])
    result = train(cfg, Progress("silent"))
    with (result.run_dir / "metrics.csv").open(newline="") as stream:
        losses = [float(row["train/loss"]) for row in csv.DictReader(stream) if row.get("train/loss")]
    sampler = OmegaConf.to_object(cfg.sampler)
    images = sample(result.student, sampler, result.module.diffusion, shape=(1, 8, 8), seeds=range(100, 116))
    return {f"{variant}/losses": np.array(losses), f"{variant}/images": images.numpy()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_trace(variant, tmp_path):
    with np.load(FILE, allow_pickle=False) as kept:
        expected = {name: kept[name] for name in kept.files}
    found = run(variant, tmp_path)
    assert found[f"{variant}/losses"].shape == (16,)
    for name, values in found.items():
        if str(expected["surroundings"]) == surroundings():
            np.testing.assert_array_equal(values, expected[name])
        else:
            np.testing.assert_allclose(values, expected[name], atol=2e-2, rtol=2e-2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        arrays = {name: values for variant in VARIANTS for name, values in run(variant, Path(folder)).items()}
    np.savez_compressed(FILE, surroundings=np.array(surroundings()), **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes, {surroundings()}")
