"""NeM on policy (ours, beyond the paper): training states from the student's own trajectory, where its error gathers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qdm_lightning.diffusion.sampling import image_seeds
from qdm_lightning.diffusion.spec import DiffusionConfig, NeMConfig, SamplerConfig
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.models.image_sampler import ImageSampler

FIRST_SEED = 100_000_000
"""Index of the first trajectory: far from the images that evaluation draws."""

STEPS = 20
"""DDIM steps of a trajectory; each image leaves one state a step."""


class TrajectoryBuffer:
    """At most `nem.on_policy_buffer` states (x_t, t) of the averaged student's DDIM trajectories, renewed on a schedule.

    Each refresh samples new images and overwrites the whole buffer; it happens at training steps that are multiples of
    `nem.on_policy_refresh`, from seeds that follow from (seed, step).
    """

    def __init__(self, nem: NeMConfig, diffusion: DiffusionConfig, seed: int) -> None:
        self.nem, self.diffusion, self.seed = nem, diffusion, seed
        self.x = torch.empty(0)
        self.t = torch.empty(0, dtype=torch.int64)
        self.labels = torch.empty(0, dtype=torch.int64)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has of it."""
        return {"x": self.x, "t": self.t, **({"labels": self.labels} if len(self.labels) else {})}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up a checkpoint's `state`."""
        self.x, self.t, self.labels = state["x"], state["t"], state.get("labels", self.labels)

    def mix(
        self,
        x: Tensor,
        t: Tensor,
        generator: torch.Generator,
        step: int,
        network: Denoiser,
        place: int = 0,
        total: int = 0,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (B, C, H, W), t (B,) and labels (B,), if any, with the first `fraction * total` samples of the step replaced by
        states of the buffer.

        Args:
            x, t: this rank's share of the step's batch: samples `place` to `place + B` of all `total` (0: B).
            generator: the step's, equal in all ranks.
            step: training step.
            network: whose trajectories the buffer holds.
            place, total: see x.
            labels: of x, where the network takes them.
        """
        if not len(self.x) or step % self.nem.on_policy_refresh == 0:
            self._refresh((x.shape[1], x.shape[2], x.shape[3]), step, network, x.device)
        everywhere = round(self.nem.on_policy_fraction * (total or len(x)))
        pick = torch.randint(len(self.x), (everywhere,), generator=generator)[place : place + len(x)]
        count = len(pick)
        if labels is not None:
            labels = torch.cat([self.labels[pick].to(labels.device), labels[count:]])
        return torch.cat([self.x[pick].to(x.device), x[count:]]), torch.cat([self.t[pick].to(t.device), t[count:]]), labels

    def _refresh(self, shape: tuple[int, int, int], step: int, network: Denoiser, device: torch.device) -> None:
        states: list[tuple[Tensor, Tensor]] = []

        def keep(t: int, x: Tensor, eps: Tensor) -> None:
            states.append((x.cpu(), torch.full((len(x),), t)))

        steps = min(STEPS, self.diffusion.num_train_timesteps)
        images = max(1, self.nem.on_policy_buffer // steps)
        sampler = SamplerConfig(kind="ddim", steps=steps, batch_size=min(images, 64))
        seeds = image_seeds(self.seed, images, start=FIRST_SEED + step * images)
        drawn_by = ImageSampler(network=network, sampler=sampler, diffusion=self.diffusion, shape=shape, device=device)
        drawn_by.draw(seeds, on_state=keep)
        self.x, self.t = (torch.cat(parts)[: self.nem.on_policy_buffer] for parts in zip(*states, strict=True))
        labels = drawn_by.labels(seeds)
        if labels is not None:
            parts = torch.tensor(labels).split(sampler.batch_size)  # each is there at every step, before the next one begins
            self.labels = torch.cat([part.repeat(steps) for part in parts])[: self.nem.on_policy_buffer]
