"""A sweep made up for reports: run folders as training leaves them, with values that a test knows."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from qdm_lightning.display.image_grids import save_grid

TAQ = "qdm_lightning.quantization.taq.NormalizedActivation"
METHODS = {"none": (None, "off"), "TaQ": (TAQ, "off"), "NeM": (None, "replace"), "TaQ+NeM": (TAQ, "replace")}
BYTES = {2: 170_000, 3: 230_000, 4: 289_104}


class Sweep:
    """Writes run folders below `root`. `value(bits, method, seed)` is the distance that a run is given."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @staticmethod
    def value(bits: int, method: str, seed: int) -> float:
        better = {"none": 0.0, "TaQ": 0.4, "NeM": 0.7, "TaQ+NeM": 0.9}[method]
        return float(
            5 + (4 - bits) ** 2 * 3 - better * (1 + 4 - bits) + np.random.default_rng([bits, seed, len(method)]).normal() / 5
        )

    def run(self, bits: int, method: str, seed: int, name: str | None = None, settings: dict[str, Any] | None = None) -> Path:
        """One finished run; `settings` are dotted names over its configuration."""
        number = len([path for path in self.root.iterdir() if path.is_dir()]) if self.root.is_dir() else 0
        folder = self.root / (name or f"{number:02d}_w{bits}a{bits}_{method}_seed{seed}")
        folder.mkdir(parents=True)
        config = self.config(bits, method, seed)
        for key, value in (settings or {}).items():
            *path, last = key.split(".")
            node = config
            for part in path:
                node = node.setdefault(part, {})
            node[last] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        (folder / "metrics.json").write_text(json.dumps(self.metrics(bits, method, seed), indent=2))
        self.curves(folder, bits, method, seed)
        self.picture(folder, seed, bits)
        return folder

    @staticmethod
    def config(bits: int, method: str, seed: int) -> dict[str, Any]:
        target, mode = METHODS[method]
        taq = {"scope": "attention"} | ({"_target_": target, "psi": 1e-5} if target else {})
        return {
            "seed": seed,
            "num_samples": 1024,
            "tags": [],
            "data": {"_target_": "qdm_lightning.data.digits.DigitsData", "batch_size": 64, "flip": False},
            "diffusion": {"num_train_timesteps": 1000, "beta_schedule": "linear"},
            "quant": {"weight_bits": bits, "act_bits": bits, "qkv_bits": None, "mode": "qat", "rules": {}},
            "taq": taq,
            "nem": {"mode": mode, "weight": 1.0},
            "sampler": {"kind": "ddim", "steps": 50, "eta": 0.0, "batch_size": 128},
            "teacher": {"source": "auto", "seed": 0},
            "trainer": {"max_steps": 600, "threads": 1},
            "metrics": {"_target_": "qdm_lightning.metrics.digits.DigitsFeatures"},
            "paths": {"output": "outputs"},
        }

    def metrics(self, bits: int, method: str, seed: int) -> dict[str, Any]:
        value = self.value(bits, method, seed)
        student = {
            "bits": [bits, bits],
            "steps": 600,
            "val_loss": 0.004,
            "cost": {
                "macs": 11_491_328,
                "bytes": BYTES[bits],
                "float_bytes": 1_852_996,
                "speedup": {"linear": 32 / bits - 0.1, "bops": (32 / bits) ** 2 - 2, "bops64": 16 / bits - 0.1},
            },
            "fd_digits": value,
            "image_mse": value / 300,
            "nem_error": [value / 300 / (k + 1) for k in range(10)],
        }
        return {
            "floor": {"fd_digits": 4.548263548685554},
            "teacher": {"fd_digits": 3.9 + seed / 100},
            "seconds": {"teacher": 0.5, "student": 60.25},
            "seed": seed,
            "student": student,
            "num_samples": 1024,
            "versions": {"torch": "2.15.0"},
            "hardware": {"processor": "some"},
            "git": {"commit": "b50893b02f2727adb0ba66323530cf32690e4ebb", "changed": False},
        }

    def curves(self, folder: Path, bits: int, method: str, seed: int) -> None:
        noise = np.random.default_rng(seed)
        with (folder / "metrics.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["step", "train/loss", "val/loss", "val/simple", "val/nem"])
            for step in range(0, 600, 5):
                loss = self.value(bits, method, seed) / 50 * (np.exp(-step / 150) + 0.1) * noise.uniform(0.8, 1.2)
                held_out = [loss, 0.07 + loss, loss / 3] if step % 100 == 0 else ["", "", ""]
                writer.writerow([step, loss, *held_out])

    @staticmethod
    def picture(folder: Path, seed: int, bits: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randint(0, 256, (16, 1, 8, 8), generator=generator, dtype=torch.uint8)
        student = (teacher.int() + torch.randint(-20, 20, teacher.shape, generator=generator) * (5 - bits)).clamp(0, 255)
        save_grid(folder / "samples.png", [teacher, student.to(torch.uint8)], ["teacher", "student"])

    def whole(self) -> Path:
        """{none, TaQ, NeM, both} x {4, 3, 2 bits} x seeds 0..2; one job failed, one never began."""
        for bits in (4, 3, 2):
            for method in METHODS:
                for seed in range(3):
                    if (bits, method, seed) != (2, "NeM", 2):
                        self.run(bits, method, seed)
        failed = self.root / "34_w2a2_NeM_seed2"
        failed.mkdir()
        (failed / "config.yaml").write_text(yaml.safe_dump(self.config(2, "NeM", 2)))
        (failed / "metrics.csv").write_text("step,train/loss\n0,0.5\n120,0.1\n")
        (self.root / "36_never" / ".hydra").mkdir(parents=True)
        (self.root / "multirun.yaml").write_text("hydra: {}\n")
        return self.root


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """A sweep without runs."""
    return Sweep(tmp_path / "sweep")


@pytest.fixture(scope="session")
def whole_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ablation of 35 runs and two failed ones; tests must not write into it."""
    return Sweep(tmp_path_factory.mktemp("ablation") / "sweep").whole()


def evaluation(run: Path, steps: int, score: float, network: str = "student", **protocol: Any) -> None:
    """An `evaluation.json` below a run, as `evaluate` leaves it."""
    record = {
        "identity": f"{network}{steps}",
        "network": network,
        "origin": {"file": f"checkpoints/{'best.ckpt' if network == 'student' else 'teacher'}", "weights": "ema"},
        "sampler": {"kind": "ddim", "steps": steps, "eta": 0.0},
        "diffusion": {"num_train_timesteps": 1000},
        "protocol": {"version": 1, "rounding": "uint8", "network": "digits", "num_samples": 64, "reference": "ab", **protocol},
        "scores": {"fd_digits": score, "kd_digits": score / 10, "kd_digits_std": 0.1},
        "floor": {"fd_digits": 4.5} if network == "student" and steps != 20 else {},  # only scores of features know it
        "versions": {"torch": "2.15.0"},
    }
    folder = run / "evaluations" / f"{network}_ddim{steps}_{len(protocol)}"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(record))


@pytest.fixture
def evaluate() -> Callable[..., None]:
    return evaluation
