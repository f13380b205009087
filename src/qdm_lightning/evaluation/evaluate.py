"""One evaluation from beginning to end: draw, take features, score, write evaluation.json."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qdm_lightning.base.checks import writable
from qdm_lightning.base.files import data_hash, file_hash, remove_leftovers, sha256, write_json
from qdm_lightning.data.module import content_hash
from qdm_lightning.diffusion.sampling import image_seeds, timesteps
from qdm_lightning.display.progress import Progress
from qdm_lightning.evaluation import protocol, scores
from qdm_lightning.evaluation.chunks import Chunk, ChunkFolder, seeds_hash
from qdm_lightning.evaluation.exported import ExportedSubject
from qdm_lightning.evaluation.feature_cache import Chunks, FeatureCache
from qdm_lightning.evaluation.spec import EvaluationConfig, format_seeds, listed, parse_seeds, parse_shard
from qdm_lightning.evaluation.subject import Subject
from qdm_lightning.metrics.reference import Reference, import_reference, reference
from qdm_lightning.metrics.weights import state_hash
from qdm_lightning.runs.provenance import environment, git_commit, hardware, versions
from qdm_lightning.training.devices import check_processes, set_up, share
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.publishing import log_evaluation
from qdm_lightning.training.spec import TrainerConfig


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns: the record as in evaluation.json (None from a shard), its folder, records of the same table."""

    record: dict[str, Any] | None
    folder: Path
    others: list[dict[str, Any]]


def evaluate(experiment: Experiment, config: EvaluationConfig, progress: Any) -> Evaluation:
    """Measure a network of the run in `experiment.run_dir`, and write `evaluation.json`.

    What was done before, by this command or by shards of it, is taken up; the result has the same bits.

    Args:
        experiment: from the run's own configuration, with the sampler, the feature network and the data of this evaluation.
        config: what else was typed.
        progress: shows the stages.

    Raises:
        FileNotFoundError, ValueError: what is asked for cannot be done, found before an image is drawn. With `merge`, also
            where an image is missing.
    """
    evaluator = Evaluator(experiment, config, progress)
    return evaluator.run() if config.shard is None else evaluator.run_shard()


class Evaluator:
    """The stages of one evaluation; arguments as of `evaluate`.

    Attributes:
        subject: the network that is measured, of the run or from a file that was exported from it.
        seeds, chunks: seeds of its images, as one list, and as lists of those that share a file.
        sets, count: these lists by the set of images that is scored, and the images of a set.
        folder: holds the chunks, and a folder for each result.
        cache: the features of its images.
    """

    def __init__(self, experiment: Experiment, config: EvaluationConfig, progress: Any) -> None:
        self.experiment, self.config, self.progress = experiment, config, progress
        check_processes(config.accelerator, config.devices)
        self.subject = _subject(experiment, config)
        seed = experiment.seed if config.seed is None else config.seed
        count = config.num_samples or experiment.num_samples
        sets = [image_seeds(seed, count, number * count) for number in range(config.repeats)]
        sets = sets if config.seeds is None else [parse_seeds(config.seeds)]
        size = config.images_per_file(experiment.sampler.batch_size)
        self.sets = [[seeds[first : first + size] for first in range(0, len(seeds), size)] for seeds in sets]
        self.chunks = [chunk for chunks in self.sets for chunk in chunks]
        self.seeds, self.count = [seed for seeds in sets for seed in seeds], len(sets[0])
        self.folder = Path(config.out).expanduser().resolve() if config.out else experiment.run_dir / protocol.FOLDER
        if experiment.feature_network is None:
            raise ValueError("metrics=none measures nothing: type the feature network, for example metrics=inception")
        network = experiment.feature_network.to(self.subject.image_sampler.device)
        key, weights = data_hash(self.subject.identity()), state_hash(network)
        folder = self.folder / "chunks" / key[:16]
        self.cache = FeatureCache(
            image_sampler=self.subject.image_sampler,
            feature_network=network,
            images=ChunkFolder(folder / "images", key) if config.keep_images else None,
            features=ChunkFolder(folder / f"features_{network.name}_{weights[:8]}", data_hash([key, weights])),
        )

    def run_shard(self) -> Evaluation:
        """Make this shard's features, and score nothing."""
        features = self.config.reference is None
        scores.choose(listed(self.config.scores), self.count, self.cache.feature_network, None, features)
        self._fill(self.chunks[parse_shard(self.config.shard)])
        made = sum(len(seeds) for seeds in self.chunks if self.cache.features.file(seeds).is_file())
        rest = made < len(self.seeds)
        after = "the other shards draw the rest" if rest else "the same command without shard= scores them"
        self.progress.say(f"shard {self.config.shard} is done: {made} of {len(self.seeds)} images are there; {after}")
        return Evaluation(None, self.folder, [])

    def run(self) -> Evaluation:
        """Make the features that are missing, score them all, and write the result; one of before is returned as it is."""
        config, run_dir, network = self.config, self.experiment.run_dir, self.cache.feature_network
        path = None if config.reference is None else Path(config.reference).expanduser().resolve()
        imported = None if path is None else import_reference(path, network)
        real = self._real_images(imported)
        choice = scores.choose(listed(config.scores), self.count, network, real["count"], imported is None)
        record = self._record(real, choice)
        folder = self.folder if config.out else self.folder / _folder_name(record)
        against = (protocol.comparable(path, record["protocol"], config.force) for path in listed(config.against))
        others = [*_others(run_dir, record), *(other for records in against for other in records)]
        for place in (folder, run_dir):
            remove_leftovers(place / protocol.RESULT, locked=False)
        result = _earlier(folder, record)
        if result is None:
            writable("out" if config.out else "run", folder)
            writable("paths.cache", Path(self.experiment.paths.cache).expanduser())
            if not config.merge:
                self._fill(self.chunks)
            sets = [self.cache.read(chunks) for chunks in self.sets]
            statistics = imported or self._statistics(real["source"], bool(scores.NEED_FEATURES & set(choice.taken)))
            result = self._result(record, sets, statistics, choice)
            write_json(folder / protocol.RESULT, result)
            log_evaluation(self.experiment, result, folder / protocol.RESULT)
        else:
            self.progress.say(f"measured before: {folder / protocol.RESULT}")
        if not config.out and config.file is None:  # the run's own network
            write_json(run_dir / protocol.RESULT, result)
        return Evaluation(result, folder, others)

    def _fill(self, chunks: Chunks) -> None:
        """Make what is missing of `chunks`, in several processes where there are devices for them."""
        for kind in filter(None, (self.cache.images, self.cache.features)):
            kind.sweep()
        missing = self.cache.missing(chunks, self.progress.say)
        if not missing:
            return
        identity = self.cache.features.path.parent / "identity.json"
        if not identity.is_file():
            write_json(identity, self.subject.identity())
        if self.config.devices > 1:
            work = partial(_fill_share, self.cache, missing, self.experiment.trainer, self.progress.mode)
            share(work, self.config.accelerator, self.config.devices)
        else:
            self.cache.fill(missing, self.progress, before=self.cache.steps(chunks) - self.cache.steps(missing))

    def _real_images(self, imported: Reference | None) -> dict[str, Any]:
        """Provenance of the real images: `source` (hash of their content, or of imported statistics), `count`, `from`."""
        if imported is not None:
            return {"source": imported.sha256, "count": imported.moments.count, "from": imported.source}
        self.experiment.load_data()
        images = self.experiment.data.train_images
        origin = f"training images of {self.experiment.resolved['data'].get('_target_')}"
        return {"source": content_hash(images), "count": len(images), "from": origin}

    def _statistics(self, images_hash: str, keep_features: bool) -> Reference:
        """What scores need of the training images, from the cache where it is there."""
        images, batches = self.experiment.data.train_images, list[int]()
        with self.progress.stage("reference", len(images), "images") as stage:

            def on_batch(count: int) -> None:
                batches.append(count)
                stage.advance(count)

            statistics = reference(
                self.cache.feature_network,
                images,
                images_hash=images_hash,
                cache=Path(self.experiment.paths.cache),
                keep_features=keep_features,
                on_batch=on_batch,
                say=self.progress.say,
            )
            if not batches:
                stage.skip(len(images))  # the cache had them
        return statistics

    def _record(self, real: Mapping[str, Any], choice: scores.Choice) -> dict[str, Any]:
        """The record of this evaluation before it is made: all but the scores and what they took."""
        experiment, subject, network = self.experiment, self.subject, self.cache.feature_network
        measured_by = protocol.protocol(network, self.count, real, subject.image_sampler.class_labels)
        images = {"count": len(self.seeds), "seeds": format_seeds(self.seeds), "sha256": seeds_hash(self.seeds)}
        identity = {"protocol": measured_by, "images": images, "scores": choice.taken, **subject.identity()}
        return {
            "format": 1,
            "identity": data_hash(identity),
            "run": str(experiment.run_dir),
            "name": experiment.run_dir.name,
            "network": subject.network,
            "bits": [experiment.quant.weight_bits, experiment.quant.act_bits] if subject.network == "student" else None,
            "origin": subject.origin,
            "execution": subject.execution,
            "sampler": experiment.sampler.settings(),
            "network_calls": len(timesteps(experiment.sampler, experiment.diffusion)),
            "diffusion": experiment.diffusion.settings(),
            "images": {**images, "shape": list(subject.image_sampler.shape)},
            "metric": protocol.metric_provenance(network),
            "reference": real,
            "protocol": measured_by,
            "left_out": choice.left_out,
        }

    def _result(
        self, record: Mapping[str, Any], sets: Sequence[Sequence[Chunk]], statistics: Reference, choice: scores.Choice
    ) -> dict[str, Any]:
        """The record with its scores, means where there are several sets of images."""
        network, begin, chunks = self.cache.feature_network, time.perf_counter(), [chunk for one in sets for chunk in one]
        with self.progress.stage("scores", len(sets) * len(choice.taken), "scores") as stage:
            values = scores.repeated([scores.compute(choice.taken, one, statistics, network, stage.advance) for one in sets])
        floor = scores.floor(statistics, network)
        environments = list({data_hash(chunk.meta["environment"]): chunk.meta["environment"] for chunk in chunks}.values())
        warnings = [*self.subject.warnings, *_warnings(environments, choice, self.count, network)]
        for line in warnings:
            self.progress.say(f"warning: {line}")
        seconds = {name: round(sum(chunk.meta["seconds"][name] for chunk in chunks), 3) for name in ("sampling", "features")}
        here = environment(self.subject.image_sampler.device)
        return {
            **record,
            "scores": {name: value["mean"] for name, value in values.items()},
            **({"repeats": {"count": len(sets), "scores": values}} if len(sets) > 1 else {}),
            "floor": floor,
            "floor_at_size": scores.floor_at_size(floor, statistics.moments.count, self.count),
            "reference": {**record["reference"], "moments_sha256": statistics.sha256},
            "images": {**record["images"], "sha256_of_images": sha256(chunk.arrays["images_sha256"] for chunk in chunks)},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": {**seconds, "scores": round(time.perf_counter() - begin, 3)},
            "drawn_on": environments,
            "scored_on": {name: here[name] for name in here if name != "fake_quantization"},  # scoring quantizes nothing
            "warnings": warnings,
            "versions": versions(),
            "hardware": hardware(),
            "git": git_commit(),
        }


def _subject(experiment: Experiment, config: EvaluationConfig) -> Subject | ExportedSubject:
    """What is measured. Raises ValueError where `file=` was not exported from weights of the run."""
    if config.file is None:
        return Subject.restored(experiment, config)
    set_up(experiment.trainer)
    subject, run_dir = ExportedSubject.opened(config, experiment.sampler), experiment.run_dir
    files = [
        *run_dir.glob("checkpoints/*.ckpt"),
        *run_dir.glob("student/*.safetensors"),
        *run_dir.glob("teacher/unet/*.safetensors"),
    ]
    if subject.file.metadata["origin"]["sha256"] not in map(file_hash, files):
        raise ValueError(
            f"file={config.file} was exported from weights that run={run_dir} has not (it says run {subject.name}): give the "
            "run that it is of, or export it again"
        )
    return subject


def _fill_share(
    cache: FeatureCache, chunks: Chunks, trainer: TrainerConfig, mode: str, device: torch.device, index: int, count: int
) -> None:
    """What one of several processes makes of `chunks`; its arguments are pickled to get there."""
    set_up(trainer)
    cache.image_sampler.device = device
    cache.image_sampler.network.to(device)
    cache.feature_network.to(device)
    cache.fill(chunks[index::count], Progress("silent" if index else mode), f"sampling (1 of {count} processes)")


def _folder_name(record: Mapping[str, Any]) -> str:
    weights, count = record["origin"]["weights"], record["images"]["count"]
    network = record["network"] if weights in ("ema", "calibrated") else f"{record['network']}_{weights}"
    sampler = protocol.sampler_name(record["sampler"])
    each = record["protocol"]["num_samples"]
    images = f"{each}x{count // each}" if count > each else str(count)
    return f"{network}_{sampler}_{record['metric']['network']}_n{images}-{record['identity'][:8]}"


def _others(run_dir: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The run's results of other images by this protocol and sampler: the teacher's for the student's.

    Other scores of the same images are no other result.
    """
    results = map(protocol.read_result, sorted((run_dir / protocol.FOLDER).glob(f"*/{protocol.RESULT}")))
    alike = [result for result in results if all(result[name] == record[name] for name in ("protocol", "sampler"))]
    own = (record["network"], record["origin"], record["images"]["sha256"])
    return [result for result in alike if (result["network"], result["origin"], result["images"]["sha256"]) != own]


def _earlier(folder: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same evaluation, where it was made before. Raises ValueError where another one's result would be overwritten."""
    earlier = protocol.read_result(folder / protocol.RESULT) if (folder / protocol.RESULT).is_file() else None
    if earlier is not None and earlier["identity"] != record["identity"]:
        raise ValueError(
            f"out={folder} holds the result of another evaluation ({earlier['network']}, "
            f"{protocol.sampler_name(earlier['sampler'])}, {earlier['images']['count']} images): give another folder"
        )
    return earlier


def _warnings(
    environments: Sequence[Mapping[str, Any]], choice: scores.Choice, count: int, network: torch.nn.Module
) -> list[str]:
    """Warnings where images were drawn in more than one environment, or are too few for a covariance of full rank."""
    differing = sorted({name for one in environments for name in one if one[name] != environments[0][name]})
    dim = int(network.dim)  # type: ignore[arg-type]
    warnings = {
        f"images were drawn in different surroundings ({', '.join(differing)}): their last bits may differ": bool(differing),
        f"{count} images for {dim} features: their covariance is singular, and the Frechet distance biased upwards": (
            "fd" in choice.taken and count <= dim
        ),
    }
    return [line for line, applies in warnings.items() if applies]
