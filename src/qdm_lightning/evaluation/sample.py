"""Pictures of chosen seeds: a PNG each that tells how it was made, a grid, and the way of some through the steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from qdm_lightning.base.files import atomic_path
from qdm_lightning.diffusion.images import to_uint8
from qdm_lightning.diffusion.process import alphas_cumprod
from qdm_lightning.diffusion.sampling import sample, timesteps
from qdm_lightning.display.image_grids import save_grid
from qdm_lightning.evaluation.chunks import data_hash
from qdm_lightning.evaluation.plan import identity, image_sampler, restored_sampler
from qdm_lightning.evaluation.protocol import sampler_name
from qdm_lightning.evaluation.spec import SampleConfig, parse_seeds, parse_shard
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.runs.provenance import environment
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.restore import restore_teacher

FIELD = "qdm_lightning"
"""Text field of a PNG that holds its record as JSON."""

GRID_IMAGES = 256
TRAJECTORY_STEPS = 12


@dataclass(frozen=True)
class Pictures:
    """What `draw_pictures` left: its folder, how many it drew and found, and the grid (None from a shard)."""

    folder: Path
    drawn: int
    found: int
    grid: Path | None


def save_picture(path: Path, image: Tensor, record: Mapping[str, Any]) -> None:
    """Write an image (C, H, W) uint8, C 1 or 3, as PNG, whole or not at all, with its record in the text field `FIELD`."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    text = PngImagePlugin.PngInfo()
    text.add_text(FIELD, json.dumps(record))
    with atomic_path(path) as beside:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(beside, format="PNG", pnginfo=text)


def read_picture(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Image (C, H, W) uint8 and record of a PNG of ours.

    Raises:
        ValueError: damaged, or not one of ours.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            record = json.loads(picture.info[FIELD])
            pixels = np.array(picture)
    except (OSError, KeyError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"{path} is damaged or was not made by qdm_lightning: remove it, or type out=<another folder>"
        ) from error
    return torch.from_numpy(pixels[..., None] if pixels.ndim == 2 else pixels).permute(2, 0, 1), record


def draw_pictures(experiment: Experiment, config: SampleConfig, progress: Any) -> Pictures:
    """Draw what is missing of the pictures that `config` asks for.

    Raises:
        FileNotFoundError, ValueError: bad input, or pictures of another network or sampler in the folder; nothing is written.
    """
    which, restored, drawn_by = restored_sampler(experiment, config)
    seeds = parse_seeds(config.seeds)
    known = identity(experiment, which, restored.origin, drawn_by.shape)
    key = data_hash(known)
    folder = Path(config.out).expanduser().resolve() if config.out else experiment.run_dir / "images" / _name(known, key)
    index, count = parse_shard(config.shard)
    mine = seeds[index::count]
    missing = [seed for seed in mine if not _there(folder / f"{seed}.png", key)]
    record = {"identity": key, "run": experiment.run_dir.name, "origin": restored.origin, **known}
    if missing:
        with progress.stage("sampling", drawn_by.steps(len(missing)), "steps") as stage:
            size = experiment.sampler.batch_size
            for chunk in (missing[first : first + size] for first in range(0, len(missing), size)):
                images = to_uint8(drawn_by.draw(chunk, lambda: stage.advance(1)))
                told = {**record, "environment": environment(drawn_by.device)}
                for seed, image in zip(chunk, images, strict=True):
                    save_picture(folder / f"{seed}.png", image, {"seed": seed, **told})
    if config.shard is not None:
        return Pictures(folder, len(missing), len(mine) - len(missing), None)
    shown = seeds[:GRID_IMAGES]
    label = f"{which}, {sampler_name(known['sampler'])}, {len(shown)} of {len(seeds)} seeds from {seeds[0]} on"
    save_grid(folder / "grid.png", [torch.stack([read_picture(folder / f"{seed}.png")[0] for seed in shown])], [label])
    if config.trajectory:
        _trajectories(experiment, which, drawn_by, seeds[: config.trajectory_seeds], folder, progress)
    return Pictures(folder, len(missing), len(mine) - len(missing), folder / "grid.png")


def _name(known: Mapping[str, Any], key: str) -> str:
    return f"{known['network']}_{sampler_name(known['sampler'])}-{key[:8]}"


def _there(path: Path, key: str) -> bool:
    """True where the picture is there. Raises ValueError where another one is."""
    if not path.is_file():
        return False
    record = read_picture(path)[1]
    if record["identity"] != key:
        made = f"{record['network']}, {sampler_name(record['sampler'])}, run {record['run']}"
        raise ValueError(f"{path} is a picture of another making ({made}): type out=<another folder>")
    return True


@dataclass(frozen=True)
class Trajectory:
    """Images at some steps: `t` (S,), states `x` and predictions `x0` (S, N, C, H, W), and the `images` (N, C, H, W)."""

    t: list[int]
    x: Tensor
    x0: Tensor
    images: Tensor


def trajectory(drawn_by: ImageSampler, seeds: Sequence[int], points: int, on_step: Any = None) -> Trajectory:
    """Follow images through at most `points` of their steps, the first and the last among them.

    The prediction is x0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t) (DDIM, eq. 9), clipped where the sampler clips.
    """
    chosen = set(spread(timesteps(drawn_by.sampler, drawn_by.diffusion), points))
    alpha_bars = alphas_cumprod(drawn_by.diffusion)
    states: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def keep(t: int, x: Tensor, eps: Tensor) -> None:
        if t in chosen:
            alpha_bar = alpha_bars[t]
            x0 = (x.cpu() - (1 - alpha_bar).sqrt() * eps.cpu()) / alpha_bar.sqrt()
            states.setdefault(t, []).append((x.cpu(), x0.clamp(-1, 1) if drawn_by.sampler.clip_sample else x0))

    images = sample(
        drawn_by.network,
        drawn_by.sampler,
        drawn_by.diffusion,
        shape=drawn_by.shape,
        seeds=seeds,
        device=drawn_by.device,
        on_step=on_step,
        on_state=keep,
    )
    x, x0 = (torch.stack([torch.cat([pair[k] for pair in states[t]]) for t in states]) for k in (0, 1))
    return Trajectory(list(states), x, x0, images)


def spread(values: Sequence[int], points: int) -> list[int]:
    """At most `points` of `values`, evenly spread, first and last among them.

    >>> spread([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], 4)
    [9, 6, 3, 0]
    """
    if len(values) <= points:
        return list(values)
    return [values[round(i * (len(values) - 1) / (points - 1))] for i in range(points)]


def _trajectories(
    experiment: Experiment, which: str, drawn_by: ImageSampler, seeds: Sequence[int], folder: Path, progress: Any
) -> None:
    """`trajectory_<seed>.png` for each seed: x_t and the predicted x_0, the teacher's above the student's."""
    image_samplers = {which: drawn_by}
    if which == "student":
        teacher = image_sampler(experiment, restore_teacher(experiment, drawn_by.device), drawn_by.device)
        image_samplers = {"teacher": teacher, "student": drawn_by}
    with progress.stage("trajectories", len(image_samplers) * drawn_by.steps(len(seeds)), "steps") as stage:
        ways = {
            who: trajectory(each, seeds, TRAJECTORY_STEPS, lambda: stage.advance(1)) for who, each in image_samplers.items()
        }
    t = ", ".join(map(str, next(iter(ways.values())).t))
    for index, seed in enumerate(seeds):
        rows = {f"{who}: x_t at t = {t}, and the image": _row(way.x, way.images, index) for who, way in ways.items()}
        rows |= {f"{who}: predicted x_0, and the image": _row(way.x0, way.images, index) for who, way in ways.items()}
        save_grid(folder / f"trajectory_{seed}.png", list(rows.values()), list(rows), columns=TRAJECTORY_STEPS + 1)


def _row(states: Tensor, images: Tensor, index: int) -> Tensor:
    return to_uint8(torch.cat([states[:, index], images[index : index + 1]]))
