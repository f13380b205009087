"""Samplers against the papers' equations in float64 and against diffusers' own pipelines and solvers."""

import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler

from qdm_lightning.diffusion.process import alphas_cumprod
from qdm_lightning.diffusion.sampling import sample, timesteps
from qdm_lightning.diffusion.solvers import ddim_step, make_solver
from qdm_lightning.diffusion.spec import SOLVERS, DiffusionConfig, SamplerConfig
from qdm_lightning.models.unet import build_unet

DIFFUSION = DiffusionConfig()
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def unet():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build_unet(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 16),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
        ).eval()


def analytic(x, t):
    """An estimate that a real data distribution has: x_0 ~ N(0.3, 0.5^2) for each pixel."""
    abar = alphas_cumprod(DIFFUSION).to(x.dtype)[t].view(-1, 1, 1, 1)
    return (1 - abar).sqrt() * (x - 0.3 * abar.sqrt()) / (0.25 * abar + 1 - abar)


def by_the_equations(sampler, seed, clip):
    """One image in float64: DDIM eq. 12 and 16, or DDPM eq. 7 and 11 over the given timesteps."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn((1, *SHAPE), generator=generator).double()

    abars = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).tolist()
    x, calls = draw(), timesteps(sampler, DIFFUSION)
    for i, t in enumerate(calls):
        abar, prev = abars[t], abars[calls[i + 1]] if i + 1 < len(calls) else 1.0
        eps = analytic(x, torch.tensor([t]))
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        x0 = x0.clamp(-1, 1) if clip else x0
        beta = 1 - abar / prev
        posterior = (1 - prev) / (1 - abar) * beta
        if sampler.kind == "ddim":
            sigma = sampler.eta * math.sqrt(posterior)
            eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
            x = math.sqrt(prev) * x0 + math.sqrt(max(1 - prev - sigma**2, 0)) * eps + (sigma * draw() if sigma else 0)
        else:
            mean = (math.sqrt(prev) * beta * x0 + math.sqrt(1 - beta) * (1 - prev) * x) / (1 - abar)
            variance = beta if sampler.variance == "fixed_large" else posterior
            x = mean + (math.sqrt(variance) * draw() if t else 0)
    return x.clamp(-1, 1)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 50},
        {"steps": 50, "eta": 0.5},
        {"steps": 30, "eta": 1.0},
        {"steps": 50, "spacing": "quadratic"},
        {"steps": 50, "spacing": "quadratic", "eta": 1.0},
        {"kind": "ddpm", "steps": 1000},
        {"kind": "ddpm", "steps": 100, "variance": "fixed_small"},
        {"kind": "ddpm", "steps": 30},
    ],
    ids=str,
)
def test_images_follow_the_equations(settings, clip):
    sampler = SamplerConfig(batch_size=2, clip_sample=clip, **settings)
    images = sample(analytic, sampler, DIFFUSION, shape=SHAPE, seeds=[3, 4])
    for seed, image in zip([3, 4], images, strict=True):
        torch.testing.assert_close(image.double(), by_the_equations(sampler, seed, clip)[0], rtol=0, atol=5e-4)


def test_ddpm_equals_diffusers_pipeline(unet):
    scheduler = DDPMScheduler(variance_type="fixed_large", clip_sample=True)
    pipeline = DDPMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    theirs = pipeline(batch_size=2, generator=generators, num_inference_steps=20, output_type="np").images
    sampler = SamplerConfig(kind="ddpm", steps=20, batch_size=2)
    ours = sample(lambda x, t: unet(x, t).sample, sampler, DIFFUSION, shape=SHAPE, seeds=[5, 6])
    torch.testing.assert_close(ours.permute(0, 2, 3, 1) / 2 + 0.5, torch.from_numpy(theirs))


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers under numpy 2
def test_quadratic_ddim_equals_first_order_dpm_solver(unet):
    sampler = SamplerConfig(steps=40, spacing="quadratic", clip_sample=False, batch_size=1)
    solver = DPMSolverMultistepScheduler(solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero")
    solver.set_timesteps(timesteps=timesteps(sampler, DIFFUSION))
    x = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for t in solver.timesteps:
            x = solver.step(unet(x, t).sample, t, x).prev_sample
    ours = sample(lambda x, t: unet(x, t).sample, sampler, DIFFUSION, shape=SHAPE, seeds=[2])
    torch.testing.assert_close(ours, x.clamp(-1, 1), rtol=0, atol=2e-4)


@pytest.mark.parametrize("clip", [True, False])
def test_own_step_equals_diffusers_where_theirs_is_right(clip):
    scheduler = DDIMScheduler(clip_sample=clip, set_alpha_to_one=True, timestep_spacing="leading")
    scheduler.set_timesteps(50)
    abars, generator = alphas_cumprod(DIFFUSION), torch.Generator().manual_seed(0)
    for t in (980, 500, 20, 0):
        eps, x, noise = torch.randn(3, 2, *SHAPE, generator=generator).unbind()
        theirs = scheduler.step(eps, t, x, eta=0.6, use_clipped_model_output=clip, variance_noise=noise).prev_sample
        prev = abars[t - 20] if t else torch.tensor(1.0)
        ours = ddim_step(eps, x, alpha_bar=abars[t], alpha_bar_prev=prev, eta=0.6, clip=clip, noise=noise)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_fixed_small_ddpm_step_equals_ddim_at_eta_1():
    ddpm = make_solver(SamplerConfig(kind="ddpm", steps=40, variance="fixed_small"), DIFFUSION)
    ddim = make_solver(SamplerConfig(steps=40, eta=1.0), DIFFUSION)
    x, eps = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0)).unbind()
    for t in (975, 500, 25, 0):
        first, second = ([torch.Generator().manual_seed(i) for i in range(3)] for _ in range(2))
        torch.testing.assert_close(ddpm.step(eps, t, x, first), ddim.step(eps, t, x, second), rtol=1e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers under numpy 2
@pytest.mark.parametrize(("target", "name"), SOLVERS.items(), ids=SOLVERS.values())
def test_a_scheduler_of_diffusers_makes_the_images_of_its_own_loop(unet, target, name):
    clips = name not in ("euler", "eulerancestral", "pndm")
    theirs = {"thresholding": True} if clips and name != "heun" else {"clip_sample": True} if clips else {}
    scheduler = getattr(diffusers, target.partition(".")[2])(
        beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing", **theirs
    )
    scheduler.set_timesteps(10)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    draws = name in ("eulerancestral", "sasolver", "euler", "dpmsolver")
    with torch.no_grad():
        x = torch.cat([torch.randn((1, *SHAPE), generator=generator) for generator in generators]) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            eps = unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(eps, t, x, **({"generator": generators} if draws else {})).prev_sample
    node = {"_target_": target, "timestep_spacing": "trailing"}
    sampler = SamplerConfig(kind="diffusers", steps=10, batch_size=2, clip_sample=clips, scheduler=node)
    ours = sample(lambda x, t: unet(x, t).sample, sampler, DIFFUSION, shape=SHAPE, seeds=[5, 6])
    assert torch.equal(ours, x.clamp(-1, 1))


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers under numpy 2
def test_dpm_solver_equals_diffusers_pipeline(unet):
    node = {"_target_": "diffusers.DPMSolverMultistepScheduler", "timestep_spacing": "trailing"}
    sampler = SamplerConfig(kind="diffusers", steps=20, batch_size=2, clip_sample=False, scheduler=node)
    pipeline = DDPMPipeline(unet=unet, scheduler=DPMSolverMultistepScheduler(timestep_spacing="trailing"))
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    theirs = pipeline(batch_size=2, generator=generators, num_inference_steps=20, output_type="np").images
    ours = sample(lambda x, t: unet(x, t).sample, sampler, DIFFUSION, shape=SHAPE, seeds=[5, 6])
    torch.testing.assert_close(ours.permute(0, 2, 3, 1) / 2 + 0.5, torch.from_numpy(theirs))


@pytest.mark.parametrize("name", ["dpmsolver", "unipc", "heun"])
def test_a_solver_of_second_order_converges_to_the_exact_flow(name):
    """For x_0 ~ N(m, s^2) the probability flow maps noise z to m + s z (t to T, nearly): halving the steps' length brings
    the solver nearer, and at 50 steps it is nearer than DDIM."""
    targets = {short: target for target, short in SOLVERS.items()}

    def distance(**settings):
        sampler = SamplerConfig(batch_size=8, clip_sample=False, **settings)
        images = sample(analytic, sampler, DIFFUSION, shape=SHAPE, seeds=range(8))
        noise = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in range(8)])
        exact = 0.3 + 0.5 * noise
        inside = exact.abs() < 1
        return float((images - exact)[inside].square().mean().sqrt())

    node = {"_target_": targets[name], "timestep_spacing": "trailing"}
    coarse, fine = (distance(kind="diffusers", steps=steps, scheduler=node) for steps in (10, 40))
    assert fine < coarse / 2
    assert fine < distance(steps=40)
