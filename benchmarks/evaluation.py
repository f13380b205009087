"""Sampling beside `diffusers.DDIMPipeline`, and distances beside torch-fidelity: same network, images, steps and threads.

    python benchmarks/evaluation.py [--rounds 9] [--threads 2] [--model unet_small]

Three themes, each with its peer as the base: drawing a batch of images; Frechet distance, kernel distance, precision and recall
from pictures to figures (digits network); the Frechet distance from features of Inception's width. Each line ends in a ratio of
times, medians over interleaved rounds; what the sides computed is compared first. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch_fidelity
from diffusers import DDIMPipeline, DDIMScheduler
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from pairs import interleave, ratio
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from qdm_lightning.cli.schema import CONF_DIR
from qdm_lightning.data.digits import load_digits
from qdm_lightning.diffusion.sampling import sample
from qdm_lightning.diffusion.spec import DiffusionConfig, SamplerConfig
from qdm_lightning.metrics.digits import DigitsFeatures
from qdm_lightning.metrics.frechet import features
from qdm_lightning.metrics.moments import Moments, frechet
from qdm_lightning.metrics.protocol import kernel_distance, precision_recall
from qdm_lightning.models.denoiser import Denoiser

Variants = dict[str, Callable[[], Any]]


def sampling(model: str, batch: int, steps: int) -> Variants:
    """Draw `batch` images by DDIM, each with its own generator; the peer in both memory layouts."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("train", overrides=[f"model={model}"])
    networks = []
    for layout in (torch.channels_last, torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        networks.append(instantiate(config.model, dropout=0.0).to(memory_format=layout).eval().requires_grad_(False))
    shape = (networks[0].config.in_channels, networks[0].config.sample_size, networks[0].config.sample_size)
    sampler = SamplerConfig(kind="ddim", steps=steps, batch_size=batch)

    def ours() -> Tensor:
        return sample(Denoiser(networks[0]).eval(), sampler, DiffusionConfig(), shape=shape, seeds=range(batch))

    def theirs(network: Any) -> Callable[[], Tensor]:
        scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=True, set_alpha_to_one=True, timestep_spacing="leading")
        pipeline = DDIMPipeline(network, scheduler)
        pipeline.set_progress_bar_config(disable=True)

        def draw() -> Tensor:
            generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
            images = pipeline(
                batch_size=batch,
                generator=generators,
                num_inference_steps=steps,
                use_clipped_model_output=True,
                output_type="np",
            ).images
            return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

        return draw

    return {"diffusers": theirs(networks[1]), "diffusers_channels_last": theirs(networks[2]), "qdm": ours}


class _Extractor(FeatureExtractorBase):
    """The digits network as torch-fidelity wants one."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self.network = DigitsFeatures()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("features",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.network(images),)


class _Images(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def scores(count: int) -> Variants:
    """Frechet distance, kernel distance, precision and recall of `count` noised digits against the 1,500 real ones."""
    real, _ = load_digits()
    noise = 30 * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generated = (real[torch.arange(count) % len(real)] + noise).round().clamp(0, 255).to(torch.uint8)
    network = DigitsFeatures()
    torch_fidelity.register_feature_extractor("digits-of-the-benchmark", _Extractor)
    multiprocessing.cpu_count = lambda: 0  # type: ignore[assignment] its loader then starts no processes

    def ours() -> Tensor:
        a, b = features(network, generated), features(network, real)
        return torch.tensor([frechet(Moments.of(a), Moments.of(b)), kernel_distance(a, b)[0], *precision_recall(a, b)])

    def theirs() -> Tensor:
        found = torch_fidelity.calculate_metrics(
            input1=_Images(generated),
            input2=_Images(real),
            feature_extractor="digits-of-the-benchmark",
            fid=True,
            kid=True,
            prc=True,
            cuda=False,
            batch_size=256,
            cache=False,
            verbose=False,
        )
        names = ("frechet_inception_distance", "kernel_inception_distance_mean", "precision", "recall")
        return torch.tensor([found[name] for name in names])

    return {"torch_fidelity": theirs, "qdm": ours}


def distance(count: int, dim: int) -> Variants:
    """The Frechet distance between two sets of `count` features of width `dim`."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(dim, dim, generator=generator) / dim**0.5
    a, b = (torch.randn(count, dim, generator=generator) @ mixing + shift for shift in (0.0, 0.1))

    def ours() -> Tensor:
        return torch.tensor(frechet(Moments.of(a), Moments.of(b)))

    def theirs() -> Tensor:
        statistics = [fid_features_to_statistics(rows) for rows in (a, b)]
        return torch.tensor(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])

    return {"torch_fidelity": theirs, "qdm": ours}


def compare(name: str, variants: Variants, rounds: int, close: float) -> dict[str, Any]:
    """Check that all variants computed the same, time them, print a line each; ratios are over the fastest peer."""
    results = {variant: run() for variant, run in variants.items()}
    apart = max(float((result - results["qdm"]).abs().max()) for result in results.values())
    if apart > close:
        raise SystemExit(f"{name}: the variants differ by {apart}, which is more than {close}: their times do not compare")
    pairs = interleave(variants, "qdm", rounds, 1)
    over = {peer: ratio([(theirs, ours) for ours, theirs in own]) for peer, own in pairs.items()}
    for peer, own in pairs.items():
        ours, theirs = (median(side) * 1e3 for side in zip(*own, strict=True))
        print(f"{name:10} {ours:9.1f} ms, {peer} {theirs:.1f} ms   {over[peer]['ratio']:.3f} of it")
    fastest = min(pairs, key=lambda peer: median(theirs for _, theirs in pairs[peer]))
    found = over[fastest]
    return {f"{name}_over_{fastest}": found["ratio"], f"{name}_interval": found["interval"], f"{name}_apart": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="unet_small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=2048)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {"benchmark": "evaluation", **vars(options), "torch": torch.__version__}
    record |= compare("sampling", sampling(options.model, options.batch, options.steps), options.rounds, 1e-3)
    record |= compare("scores", scores(options.images), options.rounds, 1e-3)
    record |= compare("distance", distance(options.images + options.dim, options.dim), min(options.rounds, 3), 1e-2)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
