"""Pictures of chosen seeds: a PNG each that says how it was made, a grid, and the way of some through the steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from qdm_lightning.base.checks import writable
from qdm_lightning.base.files import atomic_path, data_hash, reading, remove_leftovers
from qdm_lightning.diffusion.images import to_uint8
from qdm_lightning.display.image_grids import check_png, save_grid
from qdm_lightning.evaluation.protocol import drawn_on, sampler_name
from qdm_lightning.evaluation.spec import SampleConfig, parse_seeds, parse_shard
from qdm_lightning.evaluation.trajectory import follow

if TYPE_CHECKING:
    from qdm_lightning.evaluation.exported import ExportedSubject
    from qdm_lightning.evaluation.subject import Subject

FIELD = "qdm_lightning"
"""Text field of a PNG that holds its provenance as JSON."""

GRID_IMAGES = 256
TRAJECTORY_STEPS = 12


@dataclass(frozen=True)
class Pictures:
    """What `draw_pictures` left: its folder, how many it drew, how many were present, and the grid (None from a shard)."""

    folder: Path
    drawn: int
    present: int
    grid: Path | None


def draw_pictures(subject: Subject | ExportedSubject, config: SampleConfig, progress: Any) -> Pictures:
    """Draw what is missing of the pictures of `subject` that `config` asks for.

    Raises:
        ValueError: bad input, or pictures of another network or sampler in the folder; nothing is written.
    """
    seeds = parse_seeds(config.seeds)
    for line in subject.warnings:
        progress.say(f"warning: {line}")
    identity, sampler = data_hash(subject.identity()), sampler_name(subject.identity()["sampler"])
    default = subject.folder / f"{subject.network}_{sampler}-{identity[:8]}"
    folder = Path(config.out).expanduser().resolve() if config.out else default
    share = seeds[parse_shard(config.shard)]
    missing = [seed for seed in share if not _is_drawn(folder / f"{seed}.png", identity)]
    grid = folder / "grid.png" if config.shard is None else None
    writable("out" if config.out else "run", folder)
    remove_leftovers(folder / "*", locked=False)
    if missing:
        _draw(subject, missing, folder, progress)
    if grid is not None:
        shown = seeds[:GRID_IMAGES]
        label = f"{subject.network}, {sampler}, {len(shown)} of {len(seeds)} seeds from {seeds[0]} on"
        save_grid(grid, [torch.stack([read_picture(folder / f"{seed}.png")[0] for seed in shown])], [label])
        if config.trajectory:
            _draw_trajectories(subject, seeds[: config.trajectory_seeds], folder, progress)
    return Pictures(folder, len(missing), len(share) - len(missing), grid)


def _is_drawn(path: Path, identity: str) -> bool:
    """True where the picture is there. Raises ValueError where another one is."""
    if not path.exists():
        return False
    provenance = read_picture(path)[1]
    if provenance["identity"] != identity:
        made = f"{provenance['network']}, {sampler_name(provenance['sampler'])}, run {provenance['run']}"
        raise ValueError(f"{path} is a picture of another making ({made}): type out=<another folder>")
    return True


def _draw(subject: Subject | ExportedSubject, seeds: Sequence[int], folder: Path, progress: Any) -> None:
    """Draw and save, batch by batch, so that what was drawn stays when the process is killed."""
    image_sampler, identity = subject.image_sampler, subject.identity()
    size = image_sampler.sampler.batch_size
    with progress.stage("sampling", image_sampler.steps(len(seeds)), "steps") as stage:
        for batch in (seeds[first : first + size] for first in range(0, len(seeds), size)):
            images = to_uint8(image_sampler.draw(batch, stage.advance))
            labels = image_sampler.labels(batch)
            own = [{"seed": seed} for seed in batch]
            if labels is not None:
                own = [{**about, "class_label": label} for about, label in zip(own, labels, strict=True)]
            provenance = {
                "identity": data_hash(identity),
                "run": subject.name,
                "origin": subject.origin,
                **identity,
                "environment": drawn_on(image_sampler),
            }
            for about, image in zip(own, images, strict=True):
                save_picture(folder / f"{about['seed']}.png", image, {**about, **provenance})


def save_picture(path: Path, image: Tensor, provenance: Mapping[str, Any]) -> None:
    """Write an image (C, H, W) uint8, C 1 or 3, as PNG, whole or not at all, with its provenance in the text field `FIELD`."""
    text = PngImagePlugin.PngInfo()
    text.add_text(FIELD, json.dumps(provenance))
    with atomic_path(path, checksum=False) as part:
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(part, format="PNG", pnginfo=text)


def read_picture(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Image (C, H, W) uint8 and provenance of a PNG of ours.

    Raises:
        ValueError: damaged, or not one of ours.
    """
    advice = "was it not made by qdm_lightning? remove it, or type out=<another folder>"
    with reading(path, advice) as stream:
        check_png(stream)
        picture = Image.open(stream)
        pixels = np.atleast_3d(np.array(picture))
        return torch.from_numpy(pixels).permute(2, 0, 1), json.loads(picture.info[FIELD])


def _draw_trajectories(subject: Subject | ExportedSubject, seeds: Sequence[int], folder: Path, progress: Any) -> None:
    """`trajectory_<seed>.png` for each seed: x_t and the predicted x_0, the teacher's above the student's."""
    teacher = subject.teacher()
    image_samplers = ({} if teacher is None else {"teacher": teacher}) | {subject.network: subject.image_sampler}
    total = sum(image_sampler.steps(len(seeds)) for image_sampler in image_samplers.values())
    with progress.stage("trajectories", total, "steps") as stage:
        trajectories = {
            network: follow(image_sampler, seeds, TRAJECTORY_STEPS, stage.advance)
            for network, image_sampler in image_samplers.items()
        }
    t = ", ".join(map(str, trajectories[subject.network].t))
    for index, seed in enumerate(seeds):
        rows = {
            f"{network}: {what}, and the image": to_uint8(torch.stack([*getattr(way, kind)[:, index], way.images[index]]))
            for what, kind in ((f"x_t at t = {t}", "x"), ("predicted x_0", "x0"))
            for network, way in trajectories.items()
        }
        save_grid(folder / f"trajectory_{seed}.png", list(rows.values()), list(rows), columns=TRAJECTORY_STEPS + 1)
