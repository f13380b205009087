"""Settings of the diffusion process, its losses and its samplers. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qdm_lightning.base.checks import at_least, between, one_of, positive

SEEDS = 2**32
"""Seeds are 0..SEEDS-1: torch's CPU generator reads no more than 32 bits, so a larger seed would repeat an image."""

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""How beta goes from its start to its end; `squaredcos_cap_v2` is the cosine schedule (arXiv 2102.09672), which has its own."""


PREDICTIONS = ("epsilon", "v_prediction")
"""What a network estimates: the noise, or v = sqrt(abar) eps - sqrt(1 - abar) x_0 (arXiv 2202.00512)."""

LEARNED = "learned_range"
VARIANCES = ("fixed", LEARNED)
"""Of p(x_t-1 | x_t): none is estimated, or where its logarithm lies between the two fixed ones (arXiv 2102.09672, eq. 15)."""


@dataclass(kw_only=True)
class DiffusionConfig:
    """The forward process q(x_t | x_0) (DDPM, eq. 2), and what the network estimates of it.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule: the betas, and how they go from the first to the last, one of `SCHEDULES`.
        prediction_type: what the network estimates, one of `PREDICTIONS`.
        variance_type: one of `VARIANCES`; the network of a learned one has twice the image's channels out, noise and variance.
        label_dropout: share of the class labels that training replaces by the null label, the last of the network's
            `num_class_embeds` (classifier-free guidance, arXiv 2207.12598); 0: the network has no null label.

    Raises:
        ValueError: fewer than two timesteps, betas outside (0, 1) or in falling order, an unknown schedule or prediction, a
            share outside [0, 1).
    """

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    variance_type: str = "fixed"
    label_dropout: float = 0.0

    def __post_init__(self) -> None:
        at_least("diffusion.num_train_timesteps", self.num_train_timesteps, 2)
        positive("diffusion.beta_start", self.beta_start)
        between("diffusion.beta_end", self.beta_end, self.beta_start, 0.999)
        one_of("diffusion.beta_schedule", self.beta_schedule, SCHEDULES)
        one_of("diffusion.prediction_type", self.prediction_type, PREDICTIONS)
        one_of("diffusion.variance_type", self.variance_type, VARIANCES)
        if self.variance_type == LEARNED and self.prediction_type != "epsilon":
            raise ValueError(
                f"diffusion.variance_type={LEARNED} is for networks that estimate the noise: leave out "
                f"diffusion.prediction_type={self.prediction_type}"
            )
        between("diffusion.label_dropout", self.label_dropout, 0.0, 0.99)

    def settings(self) -> dict[str, Any]:
        """As plain data for a record, without the defaults that came after version 0.1, so that older records compare."""
        added = {"prediction_type": "epsilon", "variance_type": "fixed", "label_dropout": 0.0}
        return {name: value for name, value in vars(self).items() if name not in added or value != added[name]}


UNIFORM = "qdm_lightning.diffusion.weighting.Uniform"


@dataclass(kw_only=True)
class NeMConfig:
    """Noise-estimating mimicking (config group `nem`): which loss trains the student.

    Args:
        mode: `replace` trains on L_NeM alone, `add` on L_simple + weight * L_NeM, `off` on L_simple alone.
        weight: lambda of `add`.
        weighting: `_target_` (and options) of L_NeM's weights over t, see `diffusion.weighting`; `nem/weighting=` chooses.
        on_policy_fraction: share of each batch from the student's own sampling trajectory (0: none; `replace` only).
        on_policy_refresh: training steps between two refreshes of the buffer of trajectory states.
        on_policy_buffer: how many trajectory states the buffer holds.
    """

    mode: str = "replace"
    weight: float = 1.0
    weighting: Any = field(default_factory=lambda: {"_target_": UNIFORM})
    on_policy_fraction: float = 0.0
    on_policy_refresh: int = 100
    on_policy_buffer: int = 1024

    def __post_init__(self) -> None:
        one_of("nem.mode", self.mode, ("off", "replace", "add"))
        positive("nem.weight", self.weight)
        if not (isinstance(self.weighting, Mapping) and self.weighting.get("_target_")):
            raise ValueError(
                f"nem.weighting={self.weighting} is not allowed: choose by nem/weighting=uniform, min_snr or propagation, "
                "or name your own by nem.weighting._target_=<package.module.Class>"
            )
        if self.mode == "off" and self.weighting["_target_"] != UNIFORM:
            raise ValueError(
                f"nem.weighting={self.weighting['_target_']} weights L_NeM, which nem.mode=off has not: type nem=replace"
            )
        between("nem.on_policy_fraction", self.on_policy_fraction, 0.0, 1.0)
        at_least("nem.on_policy_refresh", self.on_policy_refresh, 1)
        at_least("nem.on_policy_buffer", self.on_policy_buffer, 1)
        if self.on_policy_fraction and self.mode != "replace":
            raise ValueError(
                f"nem.on_policy_fraction={self.on_policy_fraction} needs nem.mode=replace, not {self.mode}: "
                "a state of the student's own trajectory has no true noise; type nem=on_policy"
            )


SOLVERS = {
    "diffusers.DPMSolverMultistepScheduler": "dpmsolver",
    "diffusers.UniPCMultistepScheduler": "unipc",
    "diffusers.DEISMultistepScheduler": "deis",
    "diffusers.SASolverScheduler": "sasolver",
    "diffusers.HeunDiscreteScheduler": "heun",
    "diffusers.EulerDiscreteScheduler": "euler",
    "diffusers.EulerAncestralDiscreteScheduler": "eulerancestral",
    "diffusers.PNDMScheduler": "pndm",
}
"""Schedulers of diffusers that sample our process, and what records call them. Others are of another process, or call the
network between its timesteps."""

OF_THE_PROCESS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("prediction_type", "variance_type", "use_flow_sigmas", "flow_shift", "use_dynamic_shifting", "time_shift_type"),
)
"""Settings of a scheduler that are the network's."""


def check_variance(kind: str, variance: str, variance_type: str) -> None:
    """Raise ValueError where DDPM would take another variance than the network's own, or one that it does not estimate.

    Args:
        kind, variance: of `SamplerConfig`.
        variance_type: of `DiffusionConfig`.
    """
    if variance == LEARNED and variance_type != LEARNED:
        raise ValueError(f"sampler.variance={LEARNED} needs a network that estimates it: type fixed_large or fixed_small")
    if kind == "ddpm" and variance != LEARNED and variance_type == LEARNED:
        raise ValueError(
            f"sampler.variance={variance} is not allowed with diffusion.variance_type={LEARNED}, whose network estimates it: "
            f"type sampler.variance={LEARNED}"
        )


def check_guidance(guidance: float, label_dropout: float) -> None:
    """Raise ValueError where a sampler would be guided by the null label of a network that was never trained with it."""
    if guidance != 1 and not label_dropout:
        raise ValueError(
            f"sampler.guidance={guidance:g} needs a network that was trained with dropped labels, diffusion.label_dropout=0.1: "
            "leave it out"
        )


def solver_name(sampler: Mapping[str, Any]) -> str:
    """What records call a sampler, from its plain settings: `ddim`, `ddpm`, or as `SOLVERS` has it."""
    target = (sampler.get("scheduler") or {}).get("_target_")
    return SOLVERS.get(str(target), str(target)) if target else str(sampler["kind"])


MOST_GUIDANCE = 100.0


@dataclass(kw_only=True)
class SamplerConfig:
    """How images are drawn (config group `sampler`).

    Args:
        kind: `ddpm` (ancestral), `ddim`, or `diffusers`: a scheduler of diffusers, which `scheduler` names.
        steps: denoising steps, 2 to T; a single one would be at t = 0, whose image is the start noise.
        batch_size: images that go through the network together; the last batch is padded to it.
        eta: DDIM's noise, 0 (deterministic) to 1.
        spacing: DDIM's timesteps, `uniform` or `quadratic`.
        variance: DDPM's, `fixed_large` (beta_t), `fixed_small` (the posterior's), or `learned_range`, the network's own.
        clip_sample: clip the predicted x_0 to [-1, 1] at every step.
        guidance: w of classifier-free guidance, eps_null + w (eps_label - eps_null): 1 takes the label's estimate alone, more
            follows it further. For networks that were trained with `diffusion.label_dropout`.
        scheduler: `_target_`, one of `SOLVERS`, and arguments of it that are not the process's own.

    Raises:
        ValueError: a setting outside its range, that belongs to another sampler, or a scheduler that is not supported.
    """

    kind: str = "ddim"
    steps: int = 50
    batch_size: int = 128
    eta: float = 0.0
    spacing: str = "uniform"
    variance: str = "fixed_large"
    clip_sample: bool = True
    guidance: float = 1.0
    scheduler: Any = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("sampler.kind", self.kind, ("ddim", "ddpm", "diffusers"))
        at_least("sampler.steps", self.steps, 2)
        at_least("sampler.batch_size", self.batch_size, 1)
        between("sampler.eta", self.eta, 0.0, 1.0)
        one_of("sampler.spacing", self.spacing, ("uniform", "quadratic"))
        one_of("sampler.variance", self.variance, ("fixed_large", "fixed_small", LEARNED))
        if self.variance == LEARNED and self.kind == "ddim":
            raise ValueError(f"sampler.variance={LEARNED} belongs to DDPM: type sampler=ddpm, or leave it out")
        between("sampler.guidance", self.guidance, 0.0, MOST_GUIDANCE)
        if self.kind != "ddim" and (self.eta or self.spacing != "uniform"):
            raise ValueError("sampler.eta and sampler.spacing belong to DDIM: type sampler=ddim, or leave them out")
        if self.kind == "diffusers":
            self._check_scheduler()
        elif self.scheduler:
            raise ValueError(f"sampler.scheduler is not for sampler.kind={self.kind}: type sampler=dpmsolver, unipc or heun")

    def _check_scheduler(self) -> None:
        target = self.scheduler.get("_target_") if isinstance(self.scheduler, Mapping) else self.scheduler
        one_of("sampler.scheduler._target_", target, SOLVERS)
        if self.variance != "fixed_large":
            raise ValueError("sampler.variance belongs to DDPM: type sampler=ddpm, or leave it out")
        for name, value in self.scheduler.items():
            if name in OF_THE_PROCESS:
                raise ValueError(f"sampler.scheduler.{name} is the process's, which the network was trained on: leave it out")
            if name in ("thresholding", "clip_sample"):
                raise ValueError(f"sampler.scheduler.{name} is not allowed: type sampler.clip_sample=true or false")
            if not isinstance(value, bool | int | float | str | list | None):
                raise ValueError(f"sampler.scheduler.{name}={value} is not allowed: give a number, a word or a list of them")

    def settings(self) -> dict[str, Any]:
        """As plain data for a record, without the defaults that came after version 0.1, so that older records compare."""
        added: dict[str, Any] = {"scheduler": {}, "guidance": 1.0}
        return {name: value for name, value in asdict(self).items() if name not in added or value != added[name]}
