"""What a run shows on W&B and TensorBoard in addition to its losses: layers, scales, results, activations by t, files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from qdm_lightning.diffusion.process import add_noise, noise_scheduler
from qdm_lightning.diffusion.spec import DiffusionConfig
from qdm_lightning.loggers import opened
from qdm_lightning.loggers.csv_metrics import CSVMetrics
from qdm_lightning.loggers.media import (
    TIMESTEP,
    cosmetic,
    log_files,
    log_pictures,
    log_summary,
    log_table,
    log_values,
)
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.quantization.cost_report import CostReport
from qdm_lightning.quantization.layers import cached_weights
from qdm_lightning.quantization.quantizer import ActivationQuantizer, WeightQuantizer
from qdm_lightning.quantization.summary import QuantizationReport
from qdm_lightning.runs.naming import labels
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.validation_set import BUCKETS, ValidationSet

SAMPLES = 12
"""Least number of validation samples of a bucket of t, in histograms of activations."""

VALUES = 2**14
"""Greatest number of values of one layer and pass, taken evenly."""


def log_layers(loggers: Sequence[Any], report: QuantizationReport, cost: CostReport) -> None:
    """A table of every layer: what it is, its bits and quantizers, what it costs."""
    quantizers = {row.name: " ".join(row.quantizers) for row in report.rows}
    rows: list[list[Any]] = [
        [x.name, x.kind, x.parameters, x.weight_bits, x.act_bits, quantizers.get(x.name, ""), x.macs, x.bytes, x.float_bytes]
        for x in cost.layers
    ]
    log_table(
        loggers,
        "quantization/layers",
        ["module", "kind", "parameters", "weight_bits", "input_bits", "quantizers", "macs", "bytes", "float_bytes"],
        rows,
    )


def layer_label(name: str) -> str:
    """Name of a quantizer on a dashboard: that of its module inside the U-Net."""
    return name.removeprefix("unet.").replace(".processor.", ".")


def log_scales(trainer: Trainer, module: LightningModule) -> None:
    """Log the student's learned grids at a validation, to W&B and TensorBoard.

    `scale/<layer>` and `zero_point/<layer>` are means of one quantizer; `scales/weights_log2` and `scales/activations_log2` are
    histograms of log2 s over all layers and channels.
    """
    values: dict[str, float | Tensor] = {}
    for kind, quantizer in (("weights", WeightQuantizer), ("activations", ActivationQuantizer)):
        modules = module.get_submodule("student").named_modules()
        found: dict[str, Any] = {layer_label(name): m for name, m in modules if isinstance(m, quantizer)}
        scales = {name: m.scale.detach().flatten() for name, m in found.items() if hasattr(m, "scale")}
        values |= {f"scale/{name}": float(scale.mean()) for name, scale in scales.items()}
        if kind == "activations":
            zeros = {name: m.zero_point for name, m in found.items() if name in scales and hasattr(m, "zero_point")}
            values |= {f"zero_point/{name}": float(zero.detach().mean()) for name, zero in zeros.items()}
        if scales:
            values[f"scales/{kind}_log2"] = torch.cat(list(scales.values())).log2()
    log_values(trainer.loggers, values, trainer.global_step)


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `floor`, `teacher` and `student` in `metrics` (as in metrics.json) by name: `student/fd_digits`.

    How the student was made, in one go or in several, and how fast, is no result.
    """
    named = {name: value for who in ("floor", "teacher", "student") for name, value in _flat(who, metrics.get(who, {}))}
    return {name: value for name, value in named.items() if name not in ("student/resumed_from", "student/step_seconds")}


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}/{key}", inner)
    elif isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, list) and name.endswith("nem_error"):
        yield f"{name}_mean", sum(value) / len(value)


def log_results(
    loggers: Sequence[Any],
    experiment: Experiment,
    metrics: Mapping[str, Any],
    student: Denoiser | None,
    validation_set: ValidationSet,
) -> None:
    """What a finished run comes to: scalars to every logger, the rest to W&B and TensorBoard.

    Args:
        metrics: as in metrics.json.
        student: the student on the device that measures; None for a teacher alone.
    """
    values = scalars(metrics)
    step = experiment.teacher.max_steps if experiment.quant.is_float else experiment.trainer.max_steps
    for logger in loggers:
        logger.log_metrics({f"final/{name}": value for name, value in values.items()}, step)
    if all(isinstance(logger, CSVMetrics) for logger in loggers):
        return
    log_pictures(loggers, "samples/teacher_above_student", experiment.run_dir / "samples.png", step)
    log_table(loggers, "results/final", ["network", "measure", "value"], [[*n.split("/", 1), v] for n, v in values.items()])
    cell = labels(experiment.resolved)
    log_summary(loggers, {**cell, "seed": experiment.seed}, values, {name: metrics[name] for name in ("kernels", "git")})
    if student is not None:
        _log_by_timestep(loggers, experiment, metrics["student"]["nem_error"], student, validation_set)
    with cosmetic("the networks' files", "artifacts"):
        folder = experiment.run_dir / ("teacher" if student is None else "student")
        best = experiment.run_dir / "checkpoints" / "best.ckpt"
        log_files(loggers, "model", [folder], {**cell, "seed": experiment.seed, **values}, [best] if best.is_file() else [])


def _log_by_timestep(
    loggers: Sequence[Any], experiment: Experiment, errors: Sequence[float], student: Denoiser, validation_set: ValidationSet
) -> None:
    """L_NeM and histograms of activations, a point for each bucket of t; the errors as a table too."""
    total = experiment.diffusion.num_train_timesteps
    with cosmetic("activations by timestep", "histograms"):
        rows = [[b * total // BUCKETS, (b + 1) * total // BUCKETS - 1, error] for b, error in enumerate(errors)]
        log_table(loggers, "nem_error/table", ["first_t", "last_t", "nem_error"], rows)
        seen = activations_by_bucket(
            student, experiment.trainer.histograms, validation_set, experiment.diffusion, experiment.sampler.batch_size
        )
        for b, error in enumerate(errors):
            histograms = {f"activations/{name}": buckets[b] for name, buckets in seen.items() if buckets[b].numel()}
            log_values(loggers, {"nem_error/by_timestep": error, **histograms}, (2 * b + 1) * total // (2 * BUCKETS), TIMESTEP)


@torch.no_grad()
def activations_by_bucket(
    network: Denoiser, patterns: Sequence[str], validation_set: ValidationSet, diffusion: DiffusionConfig, batch_size: int
) -> dict[str, list[Tensor]]:
    """Inputs of the activation quantizers whose label matches a pattern, a tensor (N,) on the CPU for each bucket of t.

    Args:
        network: the student, in eval mode.
        patterns: patterns (`fnmatch`) of `layer_label`s; one that matches nothing is left out.
        batch_size: the sampler's, so that nothing is compiled anew.
    """
    quantizers = {layer_label(n): m for n, m in network.named_modules() if isinstance(m, ActivationQuantizer)}
    chosen = {name: m for name, m in quantizers.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if not chosen:
        return {}
    parts: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(BUCKETS)] for name in chosen}
    bucket = torch.zeros(0, dtype=torch.int64)

    def see(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].detach().reshape(len(args[0]), -1)
        rows = rows[:, :: max(1, rows.numel() // VALUES)].float().cpu()
        of_row = bucket.repeat_interleave(len(rows) // len(bucket))  # attention folds its heads into the batch
        for b in range(BUCKETS):
            parts[name][b].append(rows[of_row == b].flatten())

    device = next(network.parameters()).device
    scheduler = noise_scheduler(diffusion)
    order = validation_set.t.argsort()
    count = min(-(-SAMPLES * BUCKETS // batch_size) * batch_size, len(order))
    picked = order[torch.arange(count) * len(order) // count]
    hooks = [module.register_forward_pre_hook(partial(see, name)) for name, module in chosen.items()]
    try:
        with cached_weights(network):
            for part in picked.split(batch_size):
                x0, t, eps = validation_set.x0[part], validation_set.t[part], validation_set.eps[part]
                labels = [] if validation_set.labels is None else [validation_set.labels[part].to(device)]
                bucket = t * BUCKETS // validation_set.num_train_timesteps
                x = add_noise(scheduler, x0, eps, t).to(device, memory_format=torch.channels_last)
                network(x, t.to(device), *labels)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: [torch.cat(values) for values in buckets] for name, buckets in parts.items()}


def log_evaluation(experiment: Experiment, record: Mapping[str, Any], file: Path) -> None:
    """An evaluation to the loggers that the experiment names: its scores, and evaluation.json as an artifact.

    Args:
        record: as in evaluation.json.
        file: that file.
    """
    if not experiment.loggers:
        return
    prefix = f"evaluation/{record['network']}"
    values = dict(_flat(prefix, record["scores"]))
    known = {name: record[name] for name in ("network", "sampler", "protocol", "identity")}
    with opened(experiment.loggers, run_dir=experiment.run_dir, config=experiment.resolved) as loggers:
        log_summary(loggers, {**labels(experiment.resolved), "seed": experiment.seed}, values)
        log_values(loggers, values, experiment.trainer.max_steps)
        log_table(loggers, f"{prefix}/scores", ["score", "value"], [list(item) for item in values.items()])
        log_files(loggers, "evaluation", [file], {**known, **values})
