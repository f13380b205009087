"""What a score was measured by, and the rule that results of different protocols do not share a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import nn

from qdm_lightning.base.checks import visible
from qdm_lightning.base.files import read_json
from qdm_lightning.diffusion.spec import solver_name
from qdm_lightning.metrics.constants import PROTOCOL, with_added
from qdm_lightning.metrics.frechet import batch_size_of
from qdm_lightning.metrics.protocol import metric_keys
from qdm_lightning.metrics.weights import state_hash
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.runs.provenance import environment

RESULT = "evaluation.json"
FOLDER = "evaluations"
"""Folder of a run's evaluations, below the run's own."""


def protocol(
    network: nn.Module, num_samples: int, reference: Mapping[str, Any], class_labels: Sequence[int] | None = None
) -> dict[str, Any]:
    """Everything that two scores must share to be compared: the checkpoint and its sampler are what is compared.

    Args:
        network: feature network.
        num_samples: generated images.
        reference: the real images: `source` (hash of their content, or of imported moments) and `count`.
        class_labels: of the generated images, where they were chosen.
    """
    return {
        **with_added(PROTOCOL),
        "network": network.name,
        "network_sha256": state_hash(network),
        "resize": getattr(network, "resize", None),
        "feature_batch_size": batch_size_of(network),
        "num_samples": num_samples,
        "reference": reference["source"],
        "reference_count": reference["count"],
        **({} if class_labels is None else {"class_labels": list(class_labels)}),
    }


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Entries in which two protocols differ.

    >>> differences({"num_samples": 50000, "rng_seed": 2020}, {"num_samples": 10000, "rng_seed": 2020})
    {'num_samples': (50000, 10000)}
    """
    return {name: (a.get(name), b.get(name)) for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)}


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def read_result(file: Path) -> dict[str, Any]:
    """A record from its evaluation.json.

    Raises:
        ValueError: damaged, or no record of ours.
    """
    record = read_json(file)
    if not {"protocol", "scores", "sampler", "identity"} <= set(record):
        raise ValueError(f"{file} is no record of an evaluation")
    return {**record, "protocol": with_added(record["protocol"])}


def comparable(folder: str | Path, wanted: Mapping[str, Any], force: bool) -> list[dict[str, Any]]:
    """Records with the protocol `wanted`; all of them where `force`.

    Args:
        folder: a run (all its evaluations, sorted by their folders), or the folder of one evaluation.

    Raises:
        FileNotFoundError: there is no record.
        ValueError: one is damaged, or none has that protocol; the message says what differs in the nearest.
    """
    path = Path(folder).expanduser().resolve()
    files = sorted((path / FOLDER).glob(f"*/{RESULT}")) or sorted(path.glob(RESULT))
    if not files:
        raise FileNotFoundError(
            f"against={folder} holds no {RESULT}: python -m qdm_lightning.evaluate run={folder} makes one for a run"
        )
    records = {file: read_result(file) for file in files}
    different = {file: differences(with_added(wanted), record["protocol"]) for file, record in records.items()}
    alike = [record for file, record in records.items() if force or not different[file]]
    if alike:
        return alike
    nearest = min(files, key=lambda file: len(different[file]))
    say = ", ".join(f"{name} {_short(a)} against {_short(b)}" for name, (a, b) in different[nearest].items())
    raise ValueError(
        f"{nearest.parent} was measured by another protocol ({say}): its scores do not compare; "
        "measure it alike, or type force=true"
    )


def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Records below one another: what was measured, how it was drawn, its scores.

    Args:
        records: as in evaluation.json. Where their protocols differ, the title says so, and each row says how many images
            and which real ones it is about.
    """
    mixed = any(differences(records[0]["protocol"], record["protocol"]) for record in records)
    keys = list(dict.fromkeys(key for record in records for key in record["scores"] if not key.endswith("_std")))
    shown = Table(title="different protocols: these scores do not compare" if mixed else None)
    for name in ("run", "network", "sampler", *(("protocol",) if mixed else ()), *keys):
        shown.add_column(Text(visible(name)), justify="right" if name in keys else "left", overflow="fold")
    for record in records:
        bits = f" W{record['bits'][0]}A{record['bits'][1]}" if record.get("bits") else ""
        how = f", {record['execution']}" if record.get("execution", "simulated") != "simulated" else ""
        network = f"{record['network']}{bits}, {record['origin']['weights']}{how}"
        measured = f"{record['protocol']['num_samples']} images, {_short(record['protocol']['reference'])}"
        cells = [run_label(record["name"]), network, sampler_name(record["sampler"]), *([measured] if mixed else [])]
        cells += [_score(record, key) for key in keys]
        shown.add_row(*(Text(visible(cell)) for cell in cells))
    return shown


def run_label(name: str) -> str:
    """Name of a run folder without its date and time.

    >>> run_label("2026-01-31_10-11-12-123456_w4a4_normalize_replace_ddim_seed0"), run_label("mine")
    ('w4a4_normalize_replace_ddim_seed0', 'mine')
    """
    return re.sub(r"^\d{4}-\d\d-\d\d_[\d-]+_", "", name)


def sampler_name(sampler: Mapping[str, Any]) -> str:
    """Short name of a sampler, fit for a folder.

    >>> base = {"kind": "ddim", "steps": 50, "spacing": "uniform", "eta": 0.0, "variance": "fixed_large", "clip_sample": True}
    >>> sampler_name(base), sampler_name({**base, "spacing": "quadratic", "eta": 0.5})
    ('ddim50', 'ddim50_quadratic_eta0.5')
    >>> sampler_name({**base, "kind": "ddpm", "steps": 1000, "variance": "fixed_small", "clip_sample": False})
    'ddpm1000_fixed_small_noclip'
    >>> solver = {"_target_": "diffusers.DPMSolverMultistepScheduler", "timestep_spacing": "trailing", "solver_order": 3}
    >>> sampler_name({**base, "kind": "diffusers", "steps": 20, "scheduler": solver})
    'dpmsolver20_trailing_solver_order3'
    """
    parts = [f"{solver_name(sampler)}{sampler['steps']}"]
    if sampler.get("scheduler"):
        options = {name: value for name, value in sampler["scheduler"].items() if name != "_target_"}
        parts += [re.sub(r"[^\w.+-]+", "-", v if isinstance(v, str) else f"{n}{v}") for n, v in options.items()]
    elif sampler["kind"] == "ddim":
        parts += [sampler["spacing"]] if sampler["spacing"] != "uniform" else []
        parts += [f"eta{sampler['eta']:g}"] if sampler["eta"] else []
    else:
        parts.append(sampler["variance"])
    parts += [f"guidance{sampler['guidance']:g}"] if sampler.get("guidance", 1) != 1 else []
    return "_".join(parts if sampler["clip_sample"] else [*parts, "noclip"])


def _score(record: Mapping[str, Any], key: str) -> str:
    """The score, ± half the 95 % interval over several sets of images, or else the deviation that belongs to the score."""
    scores, repeats = record["scores"], record.get("repeats", {}).get("scores", {})
    if key not in scores:
        return "-"
    around = repeats[key]["half_width"] if key in repeats else scores.get(f"{key}_std")
    return f"{scores[key]:.4g}" if around is None else f"{scores[key]:.4g} ± {around:.2g}"


def drawn_on(image_sampler: ImageSampler) -> dict[str, Any]:
    """What the images' last bits depend on, settings aside: machine, versions, threads, and the runtime of an exported file."""
    return {**environment(image_sampler.device), **getattr(image_sampler.network, "provenance", {})}


def metric_provenance(network: nn.Module) -> dict[str, Any]:
    """The feature network: its name, width and weights, and under which keys its scores stand."""
    keys = metric_keys(network)
    return {
        "network": network.name,
        "class": f"{type(network).__module__}.{type(network).__qualname__}",
        "dim": network.dim,
        "weights_sha256": state_hash(network),
        "weights_file_sha256": getattr(network, "weights_sha256", None),
        "batch_size": batch_size_of(network),
        "keys": {
            "fd": keys["frechet"],
            "fd_inf": keys["frechet_inf"],
            "is": keys["score"],
            "kid": keys["kernel"],
            "kid_all": keys["kernel_all"],
            "prc": [keys["precision"], keys["recall"]],
            "dc": [keys["density"], keys["coverage"]],
            **({"cmmd": keys["cmmd"]} if network.name == "clip" else {}),
        },
    }
