"""One evaluation from beginning to end: draw, take features, score, write the record."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdm_lightning.base.files import write_json
from qdm_lightning.diffusion.sampling import timesteps
from qdm_lightning.display.progress import Progress
from qdm_lightning.evaluation import protocol, scores
from qdm_lightning.evaluation.chunks import Chunk, ChunkFolder, data_hash, seeds_hash
from qdm_lightning.evaluation.feature_cache import FeatureCache
from qdm_lightning.evaluation.plan import Plan, plan_evaluation
from qdm_lightning.evaluation.real import RealImages, real_images, statistics
from qdm_lightning.evaluation.spec import EvaluationConfig, format_seeds, listed, parse_shard
from qdm_lightning.metrics.reference import Reference
from qdm_lightning.metrics.weights import state_hash
from qdm_lightning.runs.provenance import environment, git_commit, hardware, versions
from qdm_lightning.training.devices import set_up, share
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.publishing import log_evaluation
from qdm_lightning.training.spec import TrainerConfig

FORMAT = 1
CHUNKS = "chunks"


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns: the record as in evaluation.json (None from a shard), its folder, records to stand beside."""

    record: dict[str, Any] | None
    folder: Path
    beside: list[dict[str, Any]]


def evaluate(experiment: Experiment, config: EvaluationConfig, progress: Any) -> Evaluation:
    """Measure a network of the run in `experiment.run_dir`, and write `evaluation.json`.

    What was done before, by this command or by shards of it, is taken up; the result has the same bits.

    Args:
        experiment: from the run's own configuration, with the sampler, the feature network and the data of this evaluation.
        config: the rest of what was asked for.
        progress: shows the stages.

    Raises:
        FileNotFoundError, ValueError: what is asked for cannot be done; told before an image is drawn. With `merge`, also
            where an image is missing.
    """
    plan = plan_evaluation(experiment, config)
    index, count = parse_shard(config.shard)
    asked = listed(config.scores) or None
    network = experiment.feature_network.to(plan.image_sampler.device)
    base = Path(config.out).expanduser().resolve() if config.out else experiment.run_dir / protocol.FOLDER
    feature_cache = _feature_cache(plan, network, base, config.keep_images)
    if config.shard is not None:
        scores.choose(asked, len(plan.seeds), network, None, config.reference is None)
        _fill(feature_cache, plan, plan.chunks[index::count], experiment, config, progress)
        progress.say(_shard_line(feature_cache, plan.chunks, config))
        return Evaluation(None, base, [])
    real = real_images(experiment, config.reference)
    choice = scores.choose(asked, len(plan.seeds), network, real.count, real.images is not None)
    record = _record(experiment, plan, real, choice)
    folder = base if config.out else base / _name(record)
    others = _beside(experiment.run_dir, record)
    others += [r for against in listed(config.against) for r in protocol.comparable(against, record["protocol"], config.force)]
    done = _earlier(folder, record)
    if done is None:
        if config.merge:
            _gather(feature_cache, plan.chunks)
        else:
            _fill(feature_cache, plan, plan.chunks, experiment, config, progress)
        done = _score(record, feature_cache, plan, statistics(experiment, real, choice, progress), choice, progress)
        write_json(folder / protocol.RESULT, done)
        log_evaluation(experiment, done, folder / protocol.RESULT)
    else:
        progress.say(f"measured before: {folder / protocol.RESULT}")
    if not config.out:
        write_json(experiment.run_dir / protocol.RESULT, done)
    return Evaluation(done, folder, others)


def _feature_cache(plan: Plan, network: nn.Module, base: Path, keep_images: bool) -> FeatureCache:
    key, weights = data_hash(plan.identity), state_hash(network)
    folder = base / CHUNKS / key[:16]
    return FeatureCache(
        image_sampler=plan.image_sampler,
        feature_network=network,
        images=ChunkFolder(folder / "images", key) if keep_images else None,
        features=ChunkFolder(folder / f"features_{network.name}_{weights[:8]}", data_hash([key, weights])),
    )


class _Share:
    """What one of several processes does; pickled to get there. No dataclass: Lightning would take it apart."""

    def __init__(self, feature_cache: FeatureCache, chunks: Sequence[Sequence[int]], trainer: TrainerConfig, mode: str) -> None:
        self.feature_cache, self.chunks, self.trainer, self.mode = feature_cache, chunks, trainer, mode

    def __call__(self, device: torch.device, index: int, count: int) -> None:
        set_up(self.trainer)
        self.feature_cache.image_sampler.device = device
        self.feature_cache.image_sampler.network.to(device)
        self.feature_cache.feature_network.to(device)
        progress = Progress(self.mode if index == 0 else "silent")
        _make(self.feature_cache, self.chunks[index::count], f"sampling (1 of {count} processes)", 0, progress)


def _fill(
    feature_cache: FeatureCache,
    plan: Plan,
    chunks: Sequence[Sequence[int]],
    experiment: Experiment,
    config: EvaluationConfig,
    progress: Any,
) -> None:
    """Make what is missing of the chunks, which are all of the plan's or a shard of them."""
    missing = feature_cache.missing(chunks, progress.say)
    told = feature_cache.features.path.parent / "identity.json"
    if missing and not told.is_file():
        write_json(told, plan.identity)
    if missing and config.devices > 1:
        share(_Share(feature_cache, missing, experiment.trainer, progress.mode), config.accelerator, config.devices)
    elif missing:
        before = sum(feature_cache.image_sampler.steps(len(seeds)) for seeds in chunks)
        before -= sum(feature_cache.image_sampler.steps(len(seeds)) for seeds in missing)
        _make(feature_cache, missing, "sampling", before, progress)


def _make(feature_cache: FeatureCache, chunks: Sequence[Sequence[int]], name: str, before: int, progress: Any) -> None:
    """Make chunks under a stage, in which `before` steps were done already."""
    total = before + sum(feature_cache.image_sampler.steps(len(seeds)) for seeds in chunks)
    with progress.stage(name, total, "steps") as stage:
        if before:
            stage.skip(before)
        for seeds in chunks:
            feature_cache.make(seeds, lambda: stage.advance(1), progress.say)


def _shard_line(feature_cache: FeatureCache, chunks: Sequence[Sequence[int]], config: EvaluationConfig) -> str:
    there = sum(len(seeds) for seeds in chunks if feature_cache.features.file(seeds).is_file())
    total = sum(len(seeds) for seeds in chunks)
    after = "the same command without shard= scores them" if there == total else "the other shards draw the rest"
    return f"shard {config.shard} is done: {there} of {total} images are there; {after}"


def _record(experiment: Experiment, plan: Plan, real: RealImages, choice: scores.Choice) -> dict[str, Any]:
    """The record of an evaluation before it is made: all but the scores and what they took."""
    quant = experiment.quant
    reference_record = {"source": real.source, "count": real.count, "from": real.origin}
    measured = protocol.protocol(experiment.feature_network, len(plan.seeds), reference_record)
    seeds = {"count": len(plan.seeds), "seeds": format_seeds(plan.seeds), "sha256": seeds_hash(plan.seeds)}
    what = {"protocol": measured, "images": seeds, "scores": choice.taken, **plan.identity}
    return {
        "format": FORMAT,
        "identity": data_hash(what),
        "run": str(experiment.run_dir),
        "name": experiment.run_dir.name,
        "network": plan.which,
        "bits": [quant.weight_bits, quant.act_bits] if plan.which == "student" else None,
        "origin": plan.restored.origin,
        "sampler": asdict(experiment.sampler),
        "network_calls": len(timesteps(experiment.sampler, experiment.diffusion)),
        "diffusion": asdict(experiment.diffusion),
        "images": {**seeds, "shape": list(plan.image_sampler.shape)},
        "metric": protocol.metric_record(experiment.feature_network),
        "reference": reference_record,
        "protocol": measured,
        "left_out": choice.left_out,
    }


def _name(record: Mapping[str, Any]) -> str:
    weights = record["origin"]["weights"]
    who = record["network"] if weights in ("ema", "calibrated") else f"{record['network']}_{weights}"
    metric, count = record["metric"]["network"], record["images"]["count"]
    return f"{who}_{protocol.sampler_name(record['sampler'])}_{metric}_n{count}-{record['identity'][:8]}"


def _beside(run_dir: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The run's other results of this protocol and sampler: the teacher's beside the student's."""
    found = [protocol.read_result(file) for file in sorted((run_dir / protocol.FOLDER).glob(f"*/{protocol.RESULT}"))]
    alike = [r for r in found if r["protocol"] == record["protocol"] and r["sampler"] == record["sampler"]]
    return [r for r in alike if _measured(r) != _measured(record)]


def _measured(record: Mapping[str, Any]) -> list[Any]:
    """Which images were measured; other scores of the same ones are no other result."""
    return [record["network"], record["origin"], record["images"]["sha256"]]


def _earlier(folder: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same evaluation, where it was made before. Raises ValueError where another one's result would be overwritten."""
    if not (folder / protocol.RESULT).is_file():
        return None
    found = protocol.read_result(folder / protocol.RESULT)
    found.pop("folder")
    if found["identity"] != record["identity"]:
        raise ValueError(
            f"out={folder} holds the result of another evaluation ({found['network']}, "
            f"{protocol.sampler_name(found['sampler'])}, {found['images']['count']} images): give another folder"
        )
    return found


def _score(
    record: Mapping[str, Any], feature_cache: FeatureCache, plan: Plan, real: Reference, choice: scores.Choice, progress: Any
) -> dict[str, Any]:
    """The record with its scores.

    Raises:
        ValueError: an image is missing.
    """
    chunks = _gather(feature_cache, plan.chunks)
    begin = time.perf_counter()
    with progress.stage("scores", len(choice.taken), "scores") as stage:
        found = scores.compute(choice.taken, chunks, real, feature_cache.feature_network, lambda: stage.advance(1))
    distinct = list({data_hash(one): one for one in (chunk.meta["environment"] for chunk in chunks)}.values())
    warnings = [*_mixed(distinct), *scores.few(choice.taken, len(plan.seeds), feature_cache.feature_network)]
    for line in warnings:
        progress.say(f"warning: {line}")
    digests = b"".join(chunk.arrays["images_sha256"].tobytes() for chunk in chunks)
    seconds = {name: round(sum(chunk.meta["seconds"][name] for chunk in chunks), 3) for name in ("sampling", "features")}
    feature_cache.features.sweep()
    here = environment(plan.image_sampler.device)
    here.pop("fake_quantization")  # scoring quantizes nothing
    return {
        **record,
        "scores": found,
        "floor": scores.floor(real, feature_cache.feature_network),
        "reference": {**record["reference"], "moments_sha256": real.sha256},
        "images": {**record["images"], "sha256_of_images": hashlib.sha256(digests).hexdigest()},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {**seconds, "scores": round(time.perf_counter() - begin, 3)},
        "drawn_on": distinct,
        "scored_on": here,
        "warnings": warnings,
        "versions": versions(),
        "hardware": hardware(),
        "git": git_commit(),
    }


def _mixed(environments: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning where the images were drawn in more than one environment."""
    differing = sorted({name for one in environments for name in one if one[name] != environments[0][name]})
    if not differing:
        return []
    return [f"images were drawn in different surroundings ({', '.join(differing)}): their last bits may differ"]


def _gather(feature_cache: FeatureCache, chunks: Sequence[Sequence[int]]) -> list[Chunk]:
    """Features of all images. Raises ValueError unless each of them is there: 50,000 means 50,000."""
    found = [feature_cache.features.read(seeds) for seeds in chunks]
    missing = [seeds for seeds, chunk in zip(chunks, found, strict=True) if chunk is None]
    if missing:
        lacking, total = sum(map(len, missing)), sum(map(len, chunks))
        raise ValueError(
            f"{lacking} of {total} images are missing, the first has seed {missing[0][0]}: the shards are not done; "
            "leave out merge=true to draw them here"
        )
    return [chunk for chunk in found if chunk is not None]
