"""`python -m qdm_lightning.convert`: a checkpoint of the original DDIM code becomes a diffusers folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from qdm_lightning.base.checks import one_line
from qdm_lightning.diffusion.spec import DiffusionConfig

BAD_INPUT = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(
            f"error: {one_line(message)}: type python -m qdm_lightning.convert CHECKPOINT FOLDER; --help says more",
            file=sys.stderr,
        )
        raise SystemExit(BAD_INPUT)


def convert(checkpoint: str | Path, folder: str | Path, image_size: int | None = None) -> str:
    """Write the U-Net of `checkpoint` as a diffusers folder, with DDPM's process (T 1000, linear beta 1e-4..0.02).

    Args:
        checkpoint: file of ermongroup/ddim: a state dict, or the training code's list, of which the EMA is taken.
        folder: made, or replaced if it is a diffusers pipeline.
        image_size: in pixels, where it does not follow from the level with attention (16x16 in DDPM and DDIM).

    Returns:
        One line: what was written.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: another layout, missing or unknown keys, or a folder that holds something else.
    """
    from qdm_lightning.models.ddim_checkpoint import read_checkpoint, unet_from_ddim
    from qdm_lightning.models.diffusers_io import save_pipeline

    state, which = read_checkpoint(checkpoint)
    unet = unet_from_ddim(state, image_size)
    written = save_pipeline(unet, DiffusionConfig(), folder)
    config, count = unet.config, sum(parameter.numel() for parameter in unet.parameters())
    size = f"{config.in_channels}x{config.sample_size}x{config.sample_size}"
    return f"{written}: {count:,} parameters, images {size}{', ' if which else ''}{which}"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (default: `sys.argv`) and convert; returns the exit status, 2 after one line at bad input."""
    parser = _Parser(
        prog="python -m qdm_lightning.convert",
        description="A checkpoint of the original DDIM code (ermongroup/ddim) becomes a diffusers folder.",
    )
    parser.add_argument("checkpoint", help="model-790000.ckpt of ermongroup/ddim, or a ckpt.pth of its training")
    parser.add_argument("folder", help="diffusers folder to write")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="default: what puts the attention at 16x16")
    args = parser.parse_args(argv)
    try:
        print(convert(args.checkpoint, args.folder, args.image_size))
    except (OSError, ValueError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    print(f"as a teacher: python -m qdm_lightning.train teacher=pretrained teacher.path={args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
