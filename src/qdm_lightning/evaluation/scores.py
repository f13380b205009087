"""Which scores images, network and reference allow, and their computation from features that were taken once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdm_lightning.evaluation.chunks import Chunk
from qdm_lightning.evaluation.spec import SCORES
from qdm_lightning.metrics.constants import ADDED_PROTOCOL, PROTOCOL
from qdm_lightning.metrics.estimate import Estimate
from qdm_lightning.metrics.few_images import cmmd, distance_of_equals, extrapolated_frechet, unbiased_kernel_distance
from qdm_lightning.metrics.frechet import halves_distance
from qdm_lightning.metrics.moments import Moments, frechet
from qdm_lightning.metrics.protocol import density_coverage, inception_score, kernel_distance, metric_keys, precision_recall
from qdm_lightning.metrics.reference import Reference

NEED_FEATURES = {"kid", "kid_all", "prc", "dc", "cmmd"}
"""Scores that need features of the real images, not their moments alone."""


@dataclass(frozen=True)
class Choice:
    """Scores to compute, and those that cannot be, each with the reason."""

    taken: list[str]
    left_out: dict[str, str]


def choose(wanted: Sequence[str], count: int, network: nn.Module, real_count: int | None, real_features: bool) -> Choice:
    """Decide which of `SCORES` to compute.

    Args:
        wanted: what the user wants, all of it; none takes whatever can be had.
        count: generated images.
        network: feature network.
        real_count: images behind the reference; None where it is not known.
        real_features: whether the reference has features, not moments alone.

    Raises:
        ValueError: a score that was asked for cannot be had.
    """
    least = {
        "fd": 2,
        "fd_inf": 2 * (int(network.dim) + 1),  # type: ignore[arg-type]
        "is": PROTOCOL["isc_splits"],
        "kid": PROTOCOL["kid_subset_size"],
        "kid_all": 2,
        "prc": PROTOCOL["prc_neighborhood"] + 1,
        "dc": ADDED_PROTOCOL["density_neighborhood"] + 1,
        "cmmd": 2,
    }
    reasons: dict[str, str] = {}
    for score in SCORES:
        if count < least[score]:
            reasons[score] = f"{least[score]} images are needed, not {count}: type num_samples={least[score]} or more"
        elif score == "is" and not hasattr(network, "features_and_logits"):
            reasons[score] = f"{network.name} has no class logits"
        elif score == "cmmd" and network.name != "clip":
            reasons[score] = f"it is defined over CLIP's embeddings, not over {network.name}: type metrics=clip"
        elif score in NEED_FEATURES and not real_features:
            reasons[score] = "the reference holds mean and covariance alone: leave out reference="
        elif score in NEED_FEATURES and real_count is not None and real_count < least[score]:
            reasons[score] = f"{least[score]} real images are needed, not {real_count}"
    for score in wanted:
        if score in reasons:
            raise ValueError(f"scores={score} cannot be had: {reasons[score]}")
    taken = [score for score in SCORES if score in (wanted or SCORES) and score not in reasons]
    reasons.pop("cmmd", None)  # it belongs to one network: nobody misses it over another
    return Choice(taken, {} if wanted else reasons)


def compute(
    taken: Sequence[str], chunks: Sequence[Chunk], reference: Reference, network: nn.Module, on_score: Callable[[], None]
) -> dict[str, float]:
    """The scores by the keys under which they are logged.

    Args:
        taken: names of scores, as `choose` allows them.
        chunks: features of the generated images, in the order of their seeds.
        reference: statistics of the real images, with features where a score needs them.
        network: feature network that they come from.
        on_score: called after every score.

    Raises:
        ValueError: features that are not finite.
    """
    values: dict[str, float] = {}
    for score in taken:
        values |= {key: float(value) for key, value in _score(score, chunks, reference, network).items()}
        on_score()
    return values


def _score(score: str, chunks: Sequence[Chunk], reference: Reference, network: nn.Module) -> dict[str, float]:
    keys = metric_keys(network)
    if score == "fd":
        moments = Moments.of_batches(torch.from_numpy(chunk.arrays["features"]) for chunk in chunks)
        return {keys["frechet"]: frechet(moments, reference.moments)}
    if score == "is":
        return dict(zip((keys["score"], keys["score_std"]), inception_score(_joined(chunks, "logits")), strict=True))
    generated, real = _joined(chunks, "features"), reference.features
    if score == "fd_inf":
        return {keys["frechet_inf"]: extrapolated_frechet(generated, reference.moments)}
    assert real is not None
    if score == "kid":
        return dict(zip((keys["kernel"], keys["kernel_std"]), kernel_distance(generated, real), strict=True))
    if score == "kid_all":
        return {keys["kernel_all"]: unbiased_kernel_distance(generated, real)}
    if score == "cmmd":
        return {keys["cmmd"]: cmmd(generated, real)}
    if score == "dc":
        return dict(zip((keys["density"], keys["coverage"]), density_coverage(generated, real), strict=True))
    return dict(zip((keys["precision"], keys["recall"]), precision_recall(generated, real), strict=True))


def repeated(sets: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Scores of several sets of images by name: mean, standard deviation, half the mean's 95 % interval, and the values."""
    estimates = {name: Estimate.of(values[name] for values in sets) for name in sets[0]}
    return {name: {**asdict(one), "values": [values[name] for values in sets]} for name, one in estimates.items()}


def floor(reference: Reference, network: nn.Module) -> dict[str, float]:
    """The Frechet distance between two halves of the real images, where their features are there."""
    if reference.features is None or len(reference.features) < 4:
        return {}
    return {metric_keys(network)["frechet"]: halves_distance(reference.features)}


def floor_at_size(floor: Mapping[str, float], real_count: int | None, count: int) -> dict[str, float]:
    """The floor of a score of `count` images: what so many further real images would have (see `distance_of_equals`)."""
    return {name: distance_of_equals(halves, real_count or 0, count) for name, halves in floor.items()}


def _joined(chunks: Sequence[Chunk], name: str) -> Tensor:
    return torch.cat([torch.from_numpy(chunk.arrays[name]) for chunk in chunks])
