"""Where TaQ helps without training: calibration alone, at W4A4, by scope, variant, scales by channel and bits of probabilities.

    python experiments/taq_where/post_training.py digits
    python experiments/taq_where/post_training.py cifar10_16 teacher=pretrained teacher.path=FOLDER data=images \\
        data.path=cifar10_test.npz data.image_size=16 data.filter=area
    python experiments/taq_where/post_training.py digits --gains
    python experiments/taq_where/post_training.py --table

What follows the name are settings of `qdm_lightning.train`. For each seed, which draws the calibration, the samples and
the images: L_NeM on 512 held-out samples over all t, and the mean squared deviation of DDIM-50 images from the teacher's. A
row is appended to results.csv as soon as it is measured; the same command goes on with those that are missing. `--table` prints
means and paired differences with 95 % intervals; `--gains` what grids by timestep gain by kind of layer, as `diagnose` does.

A calibration sees the full-precision activations, so the grid of a quantizer does not depend on the other ones: each variant is
calibrated once with TaQ everywhere, and the students of all scopes are put together from those grids.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from scipy import stats
from torch import Tensor, nn

from qdm_lightning.cli.build import build
from qdm_lightning.cli.schema import CONF_DIR
from qdm_lightning.data.module import ImageDataModule
from qdm_lightning.diagnosis.gains import grid_gains
from qdm_lightning.diagnosis.gains import table as gains_table
from qdm_lightning.diffusion.sampling import image_seeds
from qdm_lightning.display.progress import Progress
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.models.diffusers_io import load_unet
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.quantization import ActivationQuantizer, GroupedActivation, NormalizedActivation
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.student import calibrate_student, prepare_student
from qdm_lightning.training.teacher import ASSETS, FITTED
from qdm_lightning.training.validation_set import ValidationSet, nem_error

RESULTS = Path(__file__).with_name("results.csv")
KEY = ("data", "seed", "probs_bits", "channel_scales", "taq", "scope")
FIELDS = (*KEY, "nem", "nem_first_tenth", "image_mse")
SAMPLES = 512
IMAGES = {"digits": 64}
"""Images of a seed; of other data sets 16."""

NOTHING_ELSE = [f"quant.{name}=32" for name in ("weight_bits", "act_bits", "qkv_bits", "first_last_bits")]
METHODS = [("off", "qkv"), *((taq, scope) for taq in ("scale", "normalize") for scope in ("qkv", "attention", "all"))]


def cells() -> Iterator[dict[str, str]]:
    """Settings of all cells, those that matter most first."""
    for probs_bits in ("8", "4"):
        for channel_scales in ("off", "rms"):
            for taq, scope in METHODS:
                yield {"probs_bits": probs_bits, "channel_scales": channel_scales, "taq": taq, "scope": scope}


def experiment(cell: dict[str, str], seed: int, settings: Sequence[str], more: Sequence[str] = ()) -> Experiment:
    overrides = [f"quant.{name}={cell[name]}" for name in ("probs_bits", "channel_scales")]
    overrides += [f"taq={cell['taq']}", f"taq.scope={cell['scope']}", f"seed={seed}"]
    fixed = ["quant.mode=ptq", "quant.calibration_batches=8", "nem=replace", "logger=none", "trainer.accelerator=cpu"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return build(compose("train", [*settings, *fixed, *overrides, *more]))


class Calibrated:
    """States of students that were calibrated by one seed, by their settings."""

    def __init__(self, teacher: Denoiser, data: ImageDataModule, seed: int, settings: Sequence[str]) -> None:
        self.teacher, self.data, self.seed, self.settings = teacher, data, seed, settings
        self.known: dict[tuple[str, ...], dict[str, Tensor]] = {}

    def state(self, taq: str, channel_scales: str, probs_bits: str = "") -> dict[str, Tensor]:
        """With TaQ on everything; with `probs_bits`, probabilities are all that is quantized."""
        key = (taq, channel_scales, probs_bits)
        if key not in self.known:
            cell = {"taq": taq, "scope": "all", "channel_scales": channel_scales, "probs_bits": probs_bits or "32"}
            unet, e = self.prepared(cell, NOTHING_ELSE if probs_bits else ())
            calibrate_student(unet, e, Progress("silent"))
            self.known[key] = unet.state_dict()
        return self.known[key]

    def student(self, cell: dict[str, str]) -> Denoiser:
        unet, _ = self.prepared(cell)
        state = dict(self.state("off", cell["channel_scales"]))
        for name, module in unet.named_modules():
            if isinstance(module, ActivationQuantizer):
                taq = cell["taq"] if isinstance(module, GroupedActivation | NormalizedActivation) else "off"
                only = (cell["probs_bits"],) if name.endswith(".probabilities") else ()
                source = self.state(taq, "off" if only else cell["channel_scales"], *only)
                state |= {f"{name}.{key}": source[f"{name}.{key}"] for key in module.state_dict()}
        own = {key: state[key] for key in unet.state_dict()}
        unet.load_state_dict(own)
        return Denoiser(unet).eval().requires_grad_(False)

    def prepared(self, cell: dict[str, str], more: Sequence[str] = ()) -> tuple[nn.Module, Experiment]:
        e = experiment(cell, self.seed, self.settings, more)
        e.data = self.data
        unet, _ = prepare_student(self.teacher.unet, e)
        return unet.to(memory_format=torch.channels_last), e


def sampler(network: Denoiser, e: Experiment) -> ImageSampler:
    size = int(e.data.image_size or 0)
    return ImageSampler(
        network=network,
        sampler=e.sampler,
        diffusion=e.diffusion,
        shape=(e.data.channels, size, size),
        device=torch.device("cpu"),
    )


def loaded(settings: Sequence[str]) -> tuple[Experiment, Denoiser]:
    """An experiment with its data, and its teacher; without teacher=pretrained that of the digits, which ships."""
    e = experiment(next(cells()), 0, settings)
    e.load_data()
    given = e.teacher.path if e.teacher.source == "pretrained" else next(ASSETS.glob(f"*/{FITTED}")).parent
    return e, Denoiser(load_unet(given).to(memory_format=torch.channels_last)).eval().requires_grad_(False)


def print_gains(settings: Sequence[str]) -> None:
    e, teacher = loaded(settings)
    for bits in (4, 8):
        quant = replace(e.quant, probs_bits=bits)
        found = grid_gains(teacher, quant, e.data.val_images, e.diffusion, device=torch.device("cpu"), batch_size=64, groups=20)
        print(f"probabilities at {bits} bits\n{gains_table(found)}\n")


def rows() -> list[dict[str, str]]:
    if not RESULTS.is_file():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def append(row: dict[str, Any]) -> None:
    new = not RESULTS.is_file()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def measure(data: str, settings: Sequence[str], seeds: Sequence[int], methods: Sequence[str]) -> None:
    """Append what is missing of the cells with these methods (all where there are none), seed by seed."""
    e, teacher = loaded(settings)
    count = IMAGES.get(data, 16)
    e.sampler.batch_size = count
    for seed in seeds:
        wanted: Tensor | None = None
        samples = ValidationSet.from_images(e.data.val_images, e.diffusion.num_train_timesteps, SAMPLES, seed)
        calibrated = Calibrated(teacher, e.data, seed, settings)
        for cell in cells():
            done = {tuple(row[name] for name in KEY) for row in rows()}
            row: dict[str, Any] = {"data": data, "seed": str(seed), **cell}
            if tuple(row[name] for name in KEY) in done or (methods and f"{cell['taq']}:{cell['scope']}" not in methods):
                continue
            begin = time.perf_counter()
            if wanted is None:
                wanted = sampler(teacher, e).draw(image_seeds(seed, count)).double()
            student = calibrated.student(cell)
            errors = nem_error(student, teacher, samples, e.diffusion, 64)
            drawn = sampler(student, e).draw(image_seeds(seed, count)).double()
            row["nem"] = f"{sum(errors) / len(errors):.6g}"
            row["nem_first_tenth"] = f"{errors[0]:.6g}"
            row["image_mse"] = f"{float((drawn - wanted).square().mean()):.6g}"
            append(row)
            print(*row.values(), f"{time.perf_counter() - begin:.1f} s", flush=True)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))


def table(data: str) -> list[str]:
    """Markdown: each cell's means, and its change against no TaQ with the same bits and scales by channel, seed by seed."""
    found = {tuple(row[name] for name in KEY): row for row in rows() if row["data"] == data}
    seeds = sorted({key[1] for key in found}, key=int)
    lines = [
        "| probabilities | channels | TaQ | seeds | L_NeM | change | image_mse | change |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells():
        rest = (cell["probs_bits"], cell["channel_scales"])
        mine, plain = (*rest, cell["taq"], cell["scope"]), (*rest, "off", "qkv")
        paired = [
            (found[data, s, *mine], found[data, s, *plain]) for s in seeds if {(data, s, *mine), (data, s, *plain)} <= {*found}
        ]
        if not paired:
            continue
        texts = []
        for name in ("nem", "image_mse"):
            mean = interval([float(a[name]) for a, _ in paired])[0]
            change, half = interval([100 * (float(a[name]) / float(b[name]) - 1) for a, b in paired])
            bounds = "" if math.isnan(half) else f" ± {half:.1f}"
            texts += [f"{mean:.5f}", "" if cell["taq"] == "off" else f"{change:+.1f} %{bounds}"]
        method = "off" if cell["taq"] == "off" else f"{cell['taq']}, {cell['scope']}"
        lines.append(
            f"| {cell['probs_bits']} bits | {cell['channel_scales']} | {method} | {len(paired)} | {' | '.join(texts)} |"
        )
    for probs_bits in ("8", "4"):
        for taq, scope in (("off", "qkv"), ("scale", "all")):
            pairs = [
                (found[data, s, probs_bits, "rms", taq, scope], found[data, s, probs_bits, "off", "off", "qkv"])
                for s in seeds
                if {(data, s, probs_bits, "rms", taq, scope), (data, s, probs_bits, "off", "off", "qkv")} <= {*found}
            ]
            if pairs:
                texts = []
                for name in ("nem", "image_mse"):
                    change, half = interval([100 * (float(a[name]) / float(b[name]) - 1) for a, b in pairs])
                    texts.append(f"{name} {change:+.1f} % ± {half:.1f}")
                what = "scales by channel" + ("" if taq == "off" else f" and TaQ {taq}, {scope}")
                lines.append(f"\n{what}, against neither, {probs_bits}-bit probabilities: {', '.join(texts)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="name of the data set in results.csv")
    parser.add_argument("settings", nargs="*", help="settings of qdm_lightning.train")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--methods", nargs="+", default=[], help="such as off:qkv scale:all; all where left out")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--gains", action="store_true")
    asked = parser.parse_args()
    if asked.table:
        for data in sorted({row["data"] for row in rows()}):
            print(f"### {data}\n\n" + "\n".join(table(data)) + "\n")
    elif asked.data is None:
        parser.error("give a name for the data set, such as digits")
    elif asked.gains:
        print_gains(asked.settings)
    else:
        measure(asked.data, asked.settings, asked.seeds, asked.methods)


if __name__ == "__main__":
    main()
