"""The written protocol of every score: torch-fidelity computes each of them from features that were taken once.

Real and generated images are uint8 and go through `frechet.features` in batches of one size; features are float32, moments
float64. Settings are torch-fidelity's defaults, written down in `constants.PROTOCOL` and kept with every result.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from qdm_lightning.metrics.constants import ADDED_PROTOCOL, PROTOCOL
from qdm_lightning.metrics.frechet import check_network, frechet_key


def metric_keys(network: nn.Module) -> dict[str, str]:
    """Names under which the scores over `network` are logged, by what they are.

    Inception alone bears the names that the literature knows; any other network's name is part of the key.

    Returns:
        `frechet`, `frechet_inf`, `score`, `score_std`, `kernel`, `kernel_std`, `kernel_all`, `precision`, `recall`, `density`,
        `coverage`, and `cmmd`, which is of CLIP alone, to key.
    """
    name = str(check_network(network).name)
    inception = name == "inception"
    score, kernel = ("inception_score", "kid") if inception else (f"score_{name}", f"kd_{name}")
    return {
        "frechet": frechet_key(network),
        "frechet_inf": f"{frechet_key(network)}_inf",
        "score": score,
        "score_std": f"{score}_std",
        "kernel": kernel,
        "kernel_std": f"{kernel}_std",
        "kernel_all": f"{kernel}_all",
        "precision": f"precision_{name}",
        "recall": f"recall_{name}",
        "density": f"density_{name}",
        "coverage": f"coverage_{name}",
        "cmmd": "cmmd",
    }


def check_features(what: str, wanted: int, **sets: Tensor) -> None:
    """Raise ValueError unless each set has at least `wanted` rows, finite and of one width; `what` names the score."""
    for name, rows in sets.items():
        if rows.ndim != 2 or len(rows) < wanted:
            raise ValueError(
                f"{what} needs at least {wanted} {name} images, not {len(rows)}: type num_samples={wanted} or more"
            )
        if not torch.isfinite(rows).all():
            raise ValueError(f"{what}: {name} features are not finite, the images or the network's weights are broken")
    if len({rows.shape[1] for rows in sets.values()}) > 1:
        raise ValueError(f"{what} compares features of one width, not {', '.join(str(tuple(r.shape)) for r in sets.values())}")


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Inception Score (Salimans et al. 2016, arXiv 1606.03498): exp of the mean KL(p(y|x) || p(y)), over ten parts.

    Args:
        logits: (N, classes) of the generated images, N >= 10, in the order of their seeds.

    Returns:
        Mean and standard deviation over the parts.

    Raises:
        ValueError: too few images, or logits that are not finite.
    """
    splits = PROTOCOL["isc_splits"]
    check_features("the Inception Score", splits, generated=logits)
    scores = isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=PROTOCOL["rng_seed"])
    return scores[KEY_METRIC_ISC_MEAN], scores[KEY_METRIC_ISC_STD]


def kernel_distance(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Kernel Inception Distance (Binkowski et al. 2018, arXiv 1801.01401): unbiased MMD^2, cubic kernel, 100 subsets of 1,000.

    Args:
        generated: features (N, dim), N >= 1000.
        real: features (M, dim), M >= 1000.

    Returns:
        Mean and standard deviation over the subsets; the mean may be below 0.

    Raises:
        ValueError: too few images, different widths, or features that are not finite.
    """
    size = PROTOCOL["kid_subset_size"]
    check_features("the kernel distance", size, generated=generated, real=real)
    scores = kid_features_to_metric(
        generated,
        real,
        kid_subsets=PROTOCOL["kid_subsets"],
        kid_subset_size=size,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1,
        rng_seed=PROTOCOL["rng_seed"],
        verbose=False,
    )
    return scores[KEY_METRIC_KID_MEAN], scores[KEY_METRIC_KID_STD]


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), third nearest neighbors.

    Args:
        generated: features (N, dim), N >= 4.
        real: features (M, dim), M >= 4.

    Returns:
        Share of the generated images within the real manifold, and of the real ones within the generated, each in [0, 1].

    Raises:
        ValueError: too few images, different widths, or features that are not finite.
    """
    neighbors = PROTOCOL["prc_neighborhood"]
    check_features("precision and recall", neighbors + 1, generated=generated, real=real)
    scores = prc_features_to_metric(generated, real, prc_neighborhood=neighbors, save_cpu_ram=True, verbose=False)
    return scores[KEY_METRIC_PRECISION], scores[KEY_METRIC_RECALL]


def density_coverage(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797, eq. 3 and 4), fifth nearest neighbors.

    A real image's ball reaches to its k-th nearest real neighbor. Density is the mean number of balls that a generated image
    lies in, over k; coverage the share of balls that hold a generated image.

    Args:
        generated: features (N, dim), N >= 1.
        real: features (M, dim), M >= 6.

    Returns:
        Density, at least 0, which may exceed 1; coverage in [0, 1].

    Raises:
        ValueError: too few images, different widths, or features that are not finite.
    """
    k = ADDED_PROTOCOL["density_neighborhood"]
    check_features("density and coverage", k + 1, real=real)
    check_features("density and coverage", 1, generated=generated, real=real)
    inside, covered = 0, 0
    for block in real.double().split(512):
        radii = torch.cdist(block, real.double()).kthvalue(k + 1, dim=1).values  # itself is the first
        within = torch.cdist(block, generated.double()) < radii[:, None]
        inside += int(within.sum())
        covered += int(within.any(1).sum())
    return inside / (k * len(generated)), covered / len(real)
