"""Several processes train one job: what one process trains, to float32's rounding; where one of them ends, the others do."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
from lightning.pytorch.callbacks import LambdaCallback

from qdm_lightning.data.digits import DigitsData
from qdm_lightning.diffusion.spec import DiffusionConfig, NeMConfig
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.models.unet import build_unet
from qdm_lightning.quantization import MSESearch, QuantConfig, calibrate, compiled, prepare
from qdm_lightning.quantization.preparation import Quantizers
from qdm_lightning.quantization.quantizer import LSQActivation, LSQWeight
from qdm_lightning.quantization.taq import EMANormalizedActivation, GroupedActivation
from qdm_lightning.training.checkpoint_io import load_checkpoint
from qdm_lightning.training.module import DiffusionModule
from qdm_lightning.training.network_settings import network_settings
from qdm_lightning.training.spec import OptimizerConfig, TrainerConfig
from qdm_lightning.training.trainer import fit
from qdm_lightning.training.validation_set import ValidationSet

STEPS = 3
NETWORK = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
VARIANTS = {
    "ema": (partial(EMANormalizedActivation, groups=10), {"mode": "add"}),
    "scale": (
        partial(GroupedActivation, groups=10),
        {"on_policy_fraction": 0.7, "on_policy_buffer": 40, "on_policy_refresh": 4},
    ),
}
"""TaQ and NeM. `scale`'s states of its own trajectory end within the second rank's share of the batch."""

LR = 1e-3


def train_variant(name: str, folder: Path, devices: int) -> None:
    """Train a student of W4A4 for a few steps on batches of 16; its checkpoints are left in `folder/name`."""
    taq, nem = VARIANTS[name]
    torch.manual_seed(0)
    teacher, network = build_unet(**NETWORK), build_unet(**NETWORK)
    network.load_state_dict(teacher.state_dict())
    prepare(network, QuantConfig(weight_bits=4, act_bits=4), Quantizers.with_taq(LSQWeight, LSQActivation, taq, "all"))
    network.eval()
    calibrate(network, lambda: Denoiser(network)(torch.randn(32, 1, 8, 8), torch.arange(32) * 31), MSESearch())
    module = DiffusionModule(
        network,
        teacher,
        settings=network_settings({}, DiffusionConfig()),
        diffusion=DiffusionConfig(),
        nem=NeMConfig(**nem),
        optimizer=OptimizerConfig(lr=LR, quantizer_lr=LR, warmup_steps=0, schedule="constant"),
        max_steps=STEPS,
        seed=3,
        flip=True,
    )
    data = DigitsData(batch_size=16)
    data.setup()
    config = TrainerConfig(max_steps=STEPS, val_every=3, accelerator="cpu", devices=devices)
    stage = SimpleNamespace(skip=lambda n: None, advance=lambda n, **fields: None)
    validation_set = ValidationSet.from_images(data.val_images, 1000, 64)
    (folder / name).mkdir(parents=True, exist_ok=True)

    def keep(trainer, kept, *batch):
        torch.save(kept.state_dict(), folder / name / f"{trainer.global_step}-{trainer.global_rank}.pt")

    callbacks = [LambdaCallback(on_train_batch_end=keep)]
    fit(module, data, validation_set, config, folder=folder / name, stage=stage, loggers=[], callbacks=callbacks)


def train_all(folder: Path, devices: int) -> None:
    torch.set_num_threads(1)
    compiled.set_mode("off")
    for name in VARIANTS:
        train_variant(name, folder, devices)


def test_two_processes_train_what_one_trains(tmp_path):
    """Weights, averages, scales and TaQ's statistics, and so each draw of a sample: flip, t, eps, state of the trajectory.

    After the first step, 99 % of the values are equal to lr / 100: Adam moves a weight by lr g / (|g| + 1e-8), and where the
    gradient is zero but for rounding, as that of a key's bias, g is some 1e-10, float32's 1e-7 of terms of 1e-3. Later steps
    add codes that fall to the other side of an edge of their grid, so that half of the values are compared, to lr / 30 a step.
    Other draws move all of them, by about lr a step. The two processes are equal bit for bit.
    """
    command = [sys.executable, __file__, str(tmp_path / "two"), "2"]
    other = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    threads = torch.get_num_threads()
    try:
        train_all(tmp_path / "one", 1)
    finally:
        torch.set_num_threads(threads)
        compiled.set_mode("auto")
    _, err = other.communicate(timeout=240)
    assert other.returncode == 0, err[-3000:]
    for name in VARIANTS:
        for step, share, tolerance in ((1, 0.99, LR / 100), (STEPS, 0.5, STEPS * LR / 30)):
            files = [tmp_path / which / name / f"{step}-{rank}.pt" for which, rank in (("one", 0), ("two", 0), ("two", 1))]
            one, first, other = (torch.load(file, weights_only=True) for file in files)
            assert all(torch.equal(value, other[key]) for key, value in first.items())
            differences = {
                key: (value.float() - first[key].float()).abs() for key, value in one.items() if "teacher" not in key
            }
            values = torch.cat([difference.flatten() for difference in differences.values()])
            worst = max(differences, key=lambda key: float(differences[key].max()))
            print(name, step, worst, *(float(values.quantile(q)) for q in (1, 0.99, 0.5)))
            assert values.quantile(share) <= tolerance, (name, step, worst)
            assert all(bool((difference == 0).all()) for key, difference in differences.items() if key.endswith("seen"))


def arguments(tmp_path: Path) -> list[str]:
    return (
        "trainer=cpu model.block_out_channels=[8,16] model.norm_num_groups=4 data.batch_size=16 "
        "teacher.max_steps=4 trainer.max_steps=4 trainer.val_every=2 trainer.compile=off trainer.threads=1 "
        f"quant.calibration_batches=2 sampler.steps=2 num_samples=16 logger=none paths.cache={tmp_path / 'cache'} "
        f"paths.output={tmp_path / 'runs'}"
    ).split()


def test_two_nodes_train_one_run(tmp_path):
    """Two processes that were started apart, on loopback: each believes to be alone on its node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "qdm_lightning.train",
        "trainer.num_nodes=2",
        *arguments(tmp_path),
        "teacher.retrain=true",
        f"hydra.run.dir={folder}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    nodes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**environment, "NODE_RANK": str(node)}
        )
        for node in (1, 0)
    ]
    (other, err), (first, first_err) = (node.communicate(timeout=240) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], err[-3000:] + first_err[-3000:]
    assert (other, "student: 4/4" in first) == ("", True)
    assert "MEMBER: 1/2" in first_err
    assert "MEMBER: 2/2" in err
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["student"]["steps"] == 4
    assert metrics["teacher_origin"]["trained_now"]
    assert not (tmp_path / "runs").exists()


def test_a_signal_to_one_process_ends_both_with_every_step_in_the_checkpoint(tmp_path):
    folder = tmp_path / "run"
    typed = [
        *arguments(tmp_path),
        "trainer.devices=2",
        "trainer.max_steps=100000",
        "trainer.log_every=1",
        f"hydra.run.dir={folder}",
    ]
    command = [sys.executable, "-m", "qdm_lightning.train", *typed]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        end = time.monotonic() + 240
        while not (folder / "checkpoints" / "last.ckpt").is_file() and first.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        (other,) = psutil.Process(first.pid).children()
        other.terminate()
        err = first.communicate(timeout=120)[1]
        assert first.returncode == 143, err[-3000:]
        assert err.splitlines()[-1].startswith(f"interrupted; to go on: python -m qdm_lightning.train logger=none run={folder}")
        psutil.wait_procs([other], timeout=30)
        assert not other.is_running()
    finally:
        first.kill()
    steps = load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"]
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(steps))


def test_where_a_process_is_killed_the_other_ends_with_one_line(tmp_path):
    folder = tmp_path / "run"
    words = ["trainer.devices=2", *arguments(tmp_path), "trainer.max_steps=1000000", f"hydra.run.dir={folder}"]
    first = subprocess.Popen(
        [sys.executable, "-m", "qdm_lightning.train", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while first.poll() is None and not (folder / "checkpoints" / "last.ckpt").is_file():
        time.sleep(0.1)
    other = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()[0])
    os.kill(other, signal.SIGKILL)
    _, err = first.communicate(timeout=120)  # until both have closed it
    assert first.returncode == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (len(lines), "Traceback" in err) == (1, False), err[-3000:]
    assert lines[0].startswith("error: another of the processes that train together has ended")


if __name__ == "__main__":
    train_all(Path(sys.argv[1]), int(sys.argv[2]))
