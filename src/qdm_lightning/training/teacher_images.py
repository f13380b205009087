"""The teacher's images, drawn once and shared by the runs that measure against them: those of a sweep, mostly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qdm_lightning.base.checksums import remove_checked
from qdm_lightning.base.files import atomic_path, data_hash, reading, remove_leftovers
from qdm_lightning.data.module import content_hash
from qdm_lightning.metrics.weights import state_hash
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.models.spec import key_settings
from qdm_lightning.runs.provenance import environment


def teacher_images(
    image_sampler: ImageSampler,
    seeds: Sequence[int],
    model: Any,
    cache: Path,
    draw: Callable[[], Tensor],
    say: Callable[[str], None],
) -> Tensor:
    """The full-precision teacher's images of `seeds`, (len(seeds), C, H, W) float32 in [-1, 1] on the CPU, drawn or cached.

    They are cached by everything that their last bits depend on: weights, sampler, noise schedule, seeds, processor, threads,
    version of torch. Runs that draw them at the same time write the same file.

    Args:
        image_sampler: draws with the teacher.
        model: resolved settings of the network.
        cache: folder of all caches, `paths.cache`.
        draw: draws the images, where they are not in the cache.
        say: prints a line.
    """
    file = cache / "teacher_images" / f"{images_key(image_sampler, seeds, key_settings(model))}.safetensors"
    if file.exists():
        try:
            cached = _read(file, (len(seeds), *image_sampler.shape))
            say(f"the teacher's images come from {file}")
            return cached
        except ValueError as error:
            say(f"{error}; the teacher's images are drawn again")
            remove_checked(file)
    images = draw()
    remove_leftovers(file, locked=False)
    with atomic_path(file) as temporary:
        save_file({"images": images.contiguous()}, temporary, metadata={"sha256": content_hash(images)})
    return images


def images_key(drawn_by: ImageSampler, seeds: Sequence[int], model: Any) -> str:
    """A short hash of everything that the images of `seeds` depend on, to their last bits."""
    unet: Any = drawn_by.network.unet
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}  # `_` marks where it came from
    where = {name: value for name, value in environment(drawn_by.device).items() if name != "fake_quantization"}
    settings = [state_hash(drawn_by.network), drawn_by.sampler.settings(), drawn_by.diffusion.settings(), model, config]
    labels = drawn_by.labels(seeds)
    return data_hash([*settings, drawn_by.shape, seeds, where, *([] if labels is None else [labels])])[:24]


def _read(file: Path, shape: tuple[int, ...]) -> Tensor:
    """The images of a file. Raises ValueError where it is damaged."""
    with reading(file), safe_open(file, "pt") as archive:
        images: Tensor = archive.get_tensor("images")
        if images.shape != shape or archive.metadata()["sha256"] != content_hash(images):
            raise ValueError("its checksum, or its shape, is wrong")
    return images
