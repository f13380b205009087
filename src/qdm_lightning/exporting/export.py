"""A network of a run as one file that other runtimes execute, checked in them before it is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qdm_lightning.evaluation.subject import Subject
from qdm_lightning.exporting.operators import Translator
from qdm_lightning.exporting.spec import ExportConfig
from qdm_lightning.exporting.verify import Verified, verify
from qdm_lightning.exporting.write import write_onnx, write_openvino
from qdm_lightning.runs.provenance import versions
from qdm_lightning.runtimes.files import FIELD, FORMAT, read_exported
from qdm_lightning.runtimes.network import sums_bytes
from qdm_lightning.runtimes.spec import RUNTIMES, SUFFIXES
from qdm_lightning.training.experiment import Experiment

QUANT = ("weight_bits", "act_bits", "qkv_bits", "probs_bits", "first_last_bits", "rules")
"""Settings of `quant` that the file carries."""


@dataclass(frozen=True)
class Export:
    """What `export` wrote: the file, its bytes (with OpenVINO's .bin), what it says of itself, products that stay float."""

    file: Path
    size: int
    metadata: dict[str, Any]
    floating: list[str]


def export(experiment: Experiment, config: ExportConfig, progress: Any) -> Export:
    """Write a network of the run in `experiment.run_dir` as a file for other runtimes.

    Args:
        experiment: from the run's own configuration.
        config: which network, which format, where to.
        progress: shows the stages.

    Raises:
        FileNotFoundError, ValueError: bad input, or a network that a graph cannot hold; nothing is written.
        RuntimeError: a runtime computes something else; nothing is written.
    """
    if experiment.diffusion.variance_type != "fixed":
        raise ValueError("a network that estimates its variance is not exported: graphs give the noise")
    subject = Subject.restored(experiment, config)
    if subject.simulated.classes is not None:
        raise ValueError("a class-conditional network is not exported: graphs take no labels")
    default = experiment.run_dir / "export" / f"{subject.network}{SUFFIXES[config.format]}"
    file = Path(config.out).expanduser().resolve() if config.out else default
    if file.exists():
        read_exported(file)  # raises where it is not ours to replace
    total = experiment.diffusion.num_train_timesteps
    translator = Translator(subject.image_sampler.network.cpu(), subject.image_sampler.shape, total)
    runtimes = [name for name in RUNTIMES if find_spec(name) and (name == "onnxruntime" or sums_bytes())]
    with progress.stage("checking", len(runtimes), "runtimes") as stage:
        checked: list[Verified] = []
        for runtime in runtimes:
            checked.append(verify(translator, runtime, total))
            stage.advance(1)
    metadata = _metadata(subject, checked)
    model = translator.translate({FIELD: json.dumps(metadata)})
    if config.format == "onnx":
        write_onnx(file, model)
    else:
        write_openvino(file, model, metadata)
    files = [file, *([file.with_suffix(".bin")] if config.format == "openvino" else [])]
    size = sum(part.stat().st_size for part in files)
    return Export(file, size, metadata, [product.name for product in translator.products if not product.integer])


def _metadata(subject: Subject, checked: list[Verified]) -> dict[str, Any]:
    """All that sampling and the records of it need."""
    experiment, student = subject.experiment, subject.network == "student"
    settings = experiment.resolved
    return {
        "format": FORMAT,
        "run": experiment.run_dir.name,
        "network": subject.network,
        "origin": subject.origin,
        "quant": {name: settings["quant"][name] for name in QUANT} if student else None,
        "taq": settings["taq"] if student else None,
        "settings_sha256": subject.identity()["settings_sha256"],
        "sampler": experiment.sampler.settings(),
        "diffusion": experiment.diffusion.settings(),
        "shape": list(subject.image_sampler.shape),
        "verified": [one.as_dict() for one in checked],
        "versions": versions(),
    }
