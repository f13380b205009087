import pytest
import torch
from diffusers import UNet2DModel

from qdm_lightning.base.checks import UserError
from qdm_lightning.base.trust import SCHEDULERS
from qdm_lightning.diffusion.images import to_uint8
from qdm_lightning.diffusion.process import add_noise, alphas_cumprod, noise_scheduler
from qdm_lightning.diffusion.sampling import image_seeds, sample, timesteps
from qdm_lightning.diffusion.solvers import predicted_x0
from qdm_lightning.diffusion.spec import SEEDS, SOLVERS, DiffusionConfig, SamplerConfig

DIFFUSION = DiffusionConfig()
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
        ).eval()
    return lambda x, t: unet(x, t).sample


def test_uniform_timesteps():
    assert timesteps(SamplerConfig(steps=4), DIFFUSION) == [750, 500, 250, 0]
    assert timesteps(SamplerConfig(kind="ddpm", steps=1000), DIFFUSION) == list(range(999, -1, -1))
    assert timesteps(SamplerConfig(steps=600), DIFFUSION)[0] == 998  # 600 does not divide 1000; still reaches the noise


def test_quadratic_timesteps_are_distinct():
    calls = timesteps(SamplerConfig(steps=100, spacing="quadratic"), DIFFUSION)
    assert len(calls) == 96
    assert calls[0] in (799, 800)
    assert calls[-3:] == [2, 1, 0]
    assert calls == sorted(set(calls), reverse=True)


@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize("total", [2, 3, 7, 40])
def test_timesteps_fall_to_zero_within_the_process(spacing, total):
    diffusion = DiffusionConfig(num_train_timesteps=total)
    for steps in range(2, total + 1):
        calls = timesteps(SamplerConfig(steps=steps, spacing=spacing), diffusion)
        assert calls == sorted(set(calls), reverse=True)
        assert calls[-1] == 0
        assert calls[0] < total


def test_more_steps_than_timesteps_is_refused(network):
    with pytest.raises(ValueError, match=r"sampler\.steps=11 is not allowed: it must be at most .*=10"):
        sample(network, SamplerConfig(steps=11), DiffusionConfig(num_train_timesteps=10), shape=SHAPE, seeds=[0])


def solver(target, steps=4, **options):
    clips = SOLVERS[target] not in ("euler", "eulerancestral", "pndm")
    scheduler = {"_target_": target, "timestep_spacing": "trailing", **options}
    return SamplerConfig(kind="diffusers", steps=steps, batch_size=4, clip_sample=clips, scheduler=scheduler)


SAMPLERS = {
    "ddim": SamplerConfig(steps=4, batch_size=4),
    "ddim eta": SamplerConfig(steps=4, eta=0.7, batch_size=4),
    "quadratic eta": SamplerConfig(steps=6, eta=1.0, spacing="quadratic", batch_size=4),
    "ddpm": SamplerConfig(kind="ddpm", steps=5, batch_size=4),
    "stochastic dpmsolver": solver("diffusers.DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
    **{name: solver(target) for target, name in SOLVERS.items()},
}


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers under numpy 2
@pytest.mark.parametrize("name", SAMPLERS)
def test_image_depends_on_its_seed_alone(network, name):
    def draw(seeds):
        return sample(network, SAMPLERS[name], DIFFUSION, shape=SHAPE, seeds=seeds)

    images = dict(zip([0, 1, 2, 3, 4, 5], draw([0, 1, 2, 3, 4, 5]), strict=True))  # the last two are padded
    for seeds in ([5], [3, 5, 0, 1, 2, 4], [4, 4, 9, 1, 0]):
        for seed, image in zip(seeds, draw(seeds), strict=True):
            if seed in images:
                assert torch.equal(image, images[seed]), (seeds, seed)
    assert all(not torch.equal(images[0], images[seed]) for seed in range(1, 6))


def test_images_are_clamped_float_and_without_graph(network):
    images = sample(network, SamplerConfig(steps=2, clip_sample=False, batch_size=2), DIFFUSION, shape=SHAPE, seeds=[7, 8, 9])
    assert images.shape == (3, *SHAPE)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert not images.requires_grad
    assert sample(network, SamplerConfig(), DIFFUSION, shape=SHAPE, seeds=[]).shape == (0, *SHAPE)


def test_gradients_are_left_as_they_were(network):
    sample(network, SamplerConfig(steps=2, batch_size=1), DIFFUSION, shape=SHAPE, seeds=[0, 1])
    assert torch.is_grad_enabled()


def test_network_sees_full_batches_and_callbacks_real_images(network):
    batches, states, steps = [], [], []

    def spy(x, t):
        eps = network(x, t)
        batches.append((t.dtype, t.tolist(), x, eps))
        return eps

    sampler = SamplerConfig(steps=3, batch_size=2)
    sample(
        spy,
        sampler,
        DIFFUSION,
        shape=SHAPE,
        seeds=[0, 1, 2],
        on_step=lambda: steps.append(1),
        on_state=lambda *state: states.append(state),
    )
    calls = timesteps(sampler, DIFFUSION) * 2
    assert [batch[:2] for batch in batches] == [(torch.int64, [t, t]) for t in calls]
    assert [t for t, _, _ in states] == calls
    for (_, _, x, eps), (_, state, estimate), real in zip(batches, states, [2, 2, 2, 1, 1, 1], strict=True):
        assert torch.equal(state, x[:real])
        assert torch.equal(estimate, eps[:real])
    assert len(steps) == 6


def test_global_generator_is_neither_read_nor_moved(network):
    before = torch.random.get_rng_state()
    sample(network, SAMPLERS["ddpm"], DIFFUSION, shape=SHAPE, seeds=[0])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("seed", [-1, SEEDS])
def test_seed_that_would_repeat_an_image_is_refused(network, seed):
    with pytest.raises(ValueError, match=f"seed {seed} of an image is not allowed"):
        sample(network, SamplerConfig(), DIFFUSION, shape=SHAPE, seeds=[seed])


@pytest.mark.parametrize(("seed", "count"), [(SEEDS, 1), (-1, 1), (0, SEEDS + 1)])
def test_run_whose_images_would_repeat_is_refused(seed, count):
    with pytest.raises(ValueError, match=r"must lie in \[0, 429496729[56]\]"):
        image_seeds(seed, count)


def test_one_step_is_refused_whose_image_is_the_start_noise():
    with pytest.raises(ValueError, match=r"sampler\.steps=1 is not allowed"):
        SamplerConfig(steps=1)
    for spacing in ("uniform", "quadratic"):
        assert timesteps(SamplerConfig(steps=2, spacing=spacing), DiffusionConfig(num_train_timesteps=2)) == [1, 0]


def test_image_seeds_are_distinct_between_runs():
    assert image_seeds(0, 3) == [0, 1, 2]
    assert image_seeds(5, 4, start=2) == image_seeds(5, 6)[2:]
    runs = [image_seeds(seed, 50_000) for seed in range(4)]
    assert len(set().union(*runs)) == 200_000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_to_uint8_refuses_what_is_not_finite(bad):
    images = torch.zeros(2, 1, 4, 4)
    images[1, 0, 2, 3] = bad
    with pytest.raises(UserError, match="not finite"):
        to_uint8(images)


def test_to_uint8_rounds_and_clamps():
    images = torch.tensor([-3.0, -1.0, -1 + 1.01 / 255, 0.0, 1.0, 3.0])
    assert to_uint8(images).tolist() == [0, 0, 1, 128, 255, 255]
    assert torch.equal(to_uint8(torch.arange(256) / 127.5 - 1), torch.arange(256, dtype=torch.uint8))


def test_the_true_noise_predicts_the_image():
    t = torch.tensor([0, 300, 999])
    x0, eps = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    alpha_bar = alphas_cumprod(DIFFUSION)[t].view(-1, 1, 1, 1)
    x = add_noise(noise_scheduler(DIFFUSION), x0, eps, t)
    torch.testing.assert_close(predicted_x0(x, eps, alpha_bar, clip=False), x0, rtol=0, atol=1e-4)
    torch.testing.assert_close(predicted_x0(x, eps, alpha_bar, clip=True), x0.clamp(-1, 1), rtol=0, atol=1e-4)


HEUN, DPM = "diffusers.HeunDiscreteScheduler", "diffusers.DPMSolverMultistepScheduler"


def test_a_solver_that_corrects_its_steps_calls_twice_and_shows_each_timestep_once(network):
    states, steps = [], []
    sampler = solver(HEUN, steps=4)
    assert timesteps(sampler, DIFFUSION) == [999, 749, 749, 499, 499, 249, 249]
    sample(
        network,
        sampler,
        DIFFUSION,
        shape=SHAPE,
        seeds=[0],
        on_step=lambda: steps.append(1),
        on_state=lambda t, x, eps: states.append((t, float(x.std()))),
    )
    assert [t for t, _ in states] == [999, 749, 499, 249]
    assert len(steps) == 7
    assert all(std < 3 for _, std in states)  # x_t of the process, not of the solver, which counts in units of sigma


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"scheduler": {"_target_": "diffusers.FlowMatchEulerDiscreteScheduler"}},
            r"_target_=.*FlowMatch.*: choose one of",
        ),
        ({"scheduler": {"_target_": "os.system"}}, r"sampler\.scheduler\._target_=os\.system is not allowed: choose one of"),
        ({"scheduler": {}}, r"sampler\.scheduler\._target_=None is not allowed"),
        ({"scheduler": {"_target_": DPM, "prediction_type": "sample"}}, r"scheduler\.prediction_type is the process's"),
        ({"scheduler": {"_target_": DPM, "thresholding": True}}, r"type sampler\.clip_sample=true or false"),
        ({"scheduler": {"_target_": DPM, "solver_order": {"a": 1}}}, "give a number, a word or a list of them"),
        ({"kind": "ddim", "scheduler": {"_target_": DPM}}, r"sampler\.scheduler is not for sampler\.kind=ddim"),
        ({"scheduler": {"_target_": DPM}, "eta": 0.5}, r"sampler\.eta and sampler\.spacing belong to DDIM"),
        ({"scheduler": {"_target_": DPM}, "variance": "fixed_small"}, r"sampler\.variance belongs to DDPM"),
        (
            {"scheduler": {"_target_": DPM, "ordr": 3}},
            "Scheduler refuses these settings: ordr is none of num",
        ),
        ({"scheduler": {"_target_": DPM, "algorithm_type": "ddim"}}, "refuses these settings: ddim is not implemented"),
        ({"scheduler": {"_target_": DPM, "timestep_spacing": "even"}}, "refuses these settings: even is not supported"),
        ({"scheduler": {"_target_": DPM}, "steps": 1001}, r"sampler\.steps=1001 is not allowed: it must be at most"),
        ({"scheduler": {"_target_": "diffusers.PNDMScheduler"}}, r"does not clip .* type sampler\.clip_sample=false"),
        (
            {"scheduler": {"_target_": DPM, "timestep_spacing": "leading"}, "steps": 500},
            "would begin at t=500, where an image is no noise",
        ),
        ({"scheduler": {"_target_": HEUN}, "steps": 7}, r"would call the network at t=832\.5, which is no timestep"),
        ({"scheduler": {"_target_": HEUN, "use_karras_sigmas": True}}, "which is no timestep of its process: type"),
    ],
)
def test_a_scheduler_that_is_not_of_the_process_is_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        timesteps(SamplerConfig(**{"kind": "diffusers", **settings}), DIFFUSION)
    assert "\n" not in str(caught.value)


def test_a_stored_configuration_may_name_just_these():
    assert set(SOLVERS) == set(SCHEDULERS)
    assert SamplerConfig().settings().keys() == {"kind", "steps", "batch_size", "eta", "spacing", "variance", "clip_sample"}
    assert SamplerConfig(**solver(DPM).settings()) == solver(DPM)
