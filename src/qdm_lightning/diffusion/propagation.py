"""How far an error of the noise estimate travels: S(t), from one step of the sampler to the finished image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from qdm_lightning.diffusion.sampling import Network, batch_labels, spread, timesteps
from qdm_lightning.diffusion.solvers import Solver, make_solver
from qdm_lightning.diffusion.spec import SEEDS, DiffusionConfig, SamplerConfig

SIZE = 0.1
"""Root mean square of the error that is added: about that of a 4-bit student."""

FIRST_SEED = 200_000_000
"""What the seed of an image's error is beyond the image's own."""


@torch.no_grad()
def error_propagation(
    network: Network,
    sampler: SamplerConfig,
    diffusion: DiffusionConfig,
    *,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    points: int,
    labels: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    on_step: Callable[[], None] = lambda: None,
) -> dict[int, float]:
    """S(t) = E || x(eps + e at t) - x(eps) ||^2 / E || e ||^2 over images x, at timesteps spread over the sampler's, falling.

    e is white noise, another for each image, added to the noise estimates at the one timestep t; a stochastic sampler draws the
    same noise with it and without.

    Args:
        network: the full-precision noise estimator on `device`, in eval mode.
        sampler, diffusion, shape, labels, device: as in `sampling.sample`.
        seeds: one for each image that is looked at.
        points: how many of the sampler's timesteps are tried, the first among them.
        on_step: called after every call of the network.
    """
    calls = timesteps(sampler, diffusion)
    tried = spread(list(dict.fromkeys(calls)), points)

    def estimate(x: Tensor, t: int) -> Tensor:
        eps = network(x, torch.full((len(x),), t, dtype=torch.int64, device=device), *classes).float()
        on_step()
        return eps

    def disturbed(eps: Tensor, error: Tensor) -> Tensor:
        """The estimate, whose variance, if there is one, stays."""
        return torch.cat([eps[:, : shape[0]] + error, eps[:, shape[0] :]], dim=1)

    def finished(solver: Solver, x: Tensor, after: int, error: Tensor, generators: list[torch.Generator]) -> Tensor:
        """The image of the state after call number `after`, with the error at further calls at that timestep."""
        for t in calls[after + 1 :]:
            eps = estimate(solver.network_input(x, t), t)
            x = solver.step(disturbed(eps, error) if t == calls[after] else eps, t, x, generators)
        return x.clamp(-1, 1).double()

    squares, unit = dict.fromkeys(tried, 0.0), 0.0
    for first in range(0, len(seeds), sampler.batch_size):
        part = torch.tensor(list(seeds[first : first + sampler.batch_size]))
        classes = batch_labels(labels, first, len(part), device)
        generators = [torch.Generator().manual_seed(int(seed)) for seed in part]
        drawn = [torch.Generator().manual_seed((FIRST_SEED + int(seed)) % SEEDS) for seed in part]
        error = SIZE * randn_tensor((len(part), *shape), drawn, torch.device(device), torch.float32)
        solver = make_solver(sampler, diffusion)
        x = solver.start(randn_tensor((len(part), *shape), generators, torch.device(device), torch.float32))
        images: dict[int, Tensor] = {}
        for number, t in enumerate(calls):
            eps = estimate(solver.network_input(x, t), t)
            if t in squares and t not in images:
                branch, copies = copy.deepcopy(solver), [generator.clone_state() for generator in generators]
                images[t] = finished(branch, branch.step(disturbed(eps, error), t, x, copies), number, error, copies)
            x = solver.step(eps, t, x, generators)
        exact = x.clamp(-1, 1).double()
        unit += float(error.double().square().sum())
        for t, perturbed in images.items():
            squares[t] += float((perturbed - exact).square().sum())
    return {t: square / unit for t, square in squares.items()}


def network_calls(sampler: SamplerConfig, diffusion: DiffusionConfig, images: int, points: int) -> int:
    """How often `error_propagation` calls the network."""
    calls = timesteps(sampler, diffusion)
    once = len(calls) + sum(len(calls) - 1 - calls.index(t) for t in spread(list(dict.fromkeys(calls)), points))
    return once * -(-images // sampler.batch_size)


def at_every_timestep(measured: dict[int, float], num_train_timesteps: int) -> Tensor:
    """S(t), (T,) float64: log S is linear between the timesteps that were measured, and constant beyond them."""
    t = torch.tensor(sorted(measured), dtype=torch.float64)
    log_s = torch.tensor([measured[int(key)] for key in t], dtype=torch.float64).clamp(min=1e-12).log()
    every = torch.arange(num_train_timesteps, dtype=torch.float64).clamp(t[0], t[-1])
    upper = torch.searchsorted(t, every).clamp(1, max(len(t) - 1, 1))
    if len(t) == 1:
        return log_s.exp().expand(num_train_timesteps).clone()
    share = (every - t[upper - 1]) / (t[upper] - t[upper - 1])
    return torch.lerp(log_s[upper - 1], log_s[upper], share).exp()
