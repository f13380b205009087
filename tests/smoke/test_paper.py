"""The paper's experiments run: two steps each, on a few images in the real formats, with thin networks of the same build."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets import CIFAR10, CelebA

from qdm_lightning import load_student
from qdm_lightning.cli.schema import CONF_DIR
from qdm_lightning.data import imagenet64
from qdm_lightning.display.progress import Progress
from qdm_lightning.train import train

THIN = {
    "cifar10": ["model.block_out_channels=[8,8,8,8]"],
    "celeba": ["model.block_out_channels=[8,8,8,8,8]"],
    "imagenet64": ["model.block_out_channels=[8,8,8,8]", "model.attention_head_dim=4"],
}
TRIAL = [
    "trainer.max_steps=2",
    "trainer.accelerator=cpu",
    "trainer.compile=off",
    "trainer.val_images=16",
    "model.norm_num_groups=4",
    "model.layers_per_block=1",
    "data.batch_size=4",
    "sampler.steps=2",
    "sampler.batch_size=4",
    "num_samples=4",
    "quant.calibration_batches=1",
    "quant.calibrator.steps=2",
    "metrics=custom",
    f"metrics._target_={__name__}.Means",
    "logger=none",
]


class Means(nn.Module):
    """A feature network for the tests: the means of 4x4 regions."""

    name, dim = "means", 48

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, listed = np.random.default_rng(0), []
    (root / CIFAR10.base_folder).mkdir(parents=True)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        content = pickle.dumps({"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0] * 4}, protocol=2)
        (root / CIFAR10.base_folder / name).write_bytes(content)
        listed.append([name, hashlib.md5(content).hexdigest()])
    monkeypatch.setattr(CIFAR10, "train_list", listed[:-1])
    monkeypatch.setattr(CIFAR10, "test_list", listed[-1:])


def write_celeba(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, folder = np.random.default_rng(0), root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    splits = {f"{i:06d}.jpg": int(i > 10) for i in range(1, 13)}
    for name in splits:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
        coarse.resize((178, 218)).save(folder / "img_align_celeba" / name)
    text = "".join(f"{name} {split}\n" for name, split in splits.items()).encode()
    (folder / "list_eval_partition.txt").write_bytes(text)
    md5 = hashlib.md5(text).hexdigest()
    listed = [(i, md5 if n == "list_eval_partition.txt" else m, n) for i, m, n in CelebA.file_list]
    monkeypatch.setattr(CelebA, "file_list", listed)


def write_imagenet64(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    for name in [*imagenet64.TRAIN_FILES, "val_data.npz"]:
        arrays = {"data": rng.integers(0, 256, (2, 12288), dtype=np.uint8), "labels": np.arange(1, 3)}
        np.savez(root / name, **arrays, **({"mean": np.zeros(12288)} if name != "val_data.npz" else {}))
    monkeypatch.setattr(imagenet64, "TRAIN_IMAGES", 20)
    monkeypatch.setattr(imagenet64, "VAL_IMAGES", 2)


WRITE = {"cifar10": write_cifar10, "celeba": write_celeba, "imagenet64": write_imagenet64}
FOLDER = {
    "cifar10": "datasets",
    "celeba": "datasets",
    "imagenet64": "datasets/imagenet64",
}  # below paths.cache, as data.root says


@pytest.mark.parametrize(("data", "quant"), [("cifar10", "w4a4"), ("celeba", "w3a3"), ("imagenet64", "w2a2")])
def test_two_steps(data, quant, tmp_path, monkeypatch):
    WRITE[data](tmp_path / FOLDER[data], monkeypatch)
    trained = []
    for sampler in ("ddpm", "ddim"):
        typed = [f"experiment=paper/{data}_{sampler}", f"quant={quant}", *TRIAL, *THIN[data]]
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = compose("train", [*typed, f"paths.cache={tmp_path}", f"paths.output={tmp_path / 'runs'}"])
        result = train(cfg, Progress("silent"))
        metrics = json.loads((result.run_dir / "metrics.json").read_text())
        assert "fd_means" in metrics["teacher"].keys() & metrics["student"].keys()
        assert metrics["student"]["bits"] == [int(quant[1])] * 2
        assert metrics["num_samples"] == 4
        assert load_student(result.run_dir).config.sample_size == (32 if data == "cifar10" else 64)
        trained.append(metrics["teacher_origin"]["trained_now"])
    assert trained == [True, False]
