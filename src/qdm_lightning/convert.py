"""`python -m qdm_lightning.convert`: a checkpoint of the code of DDIM, or of openai's, becomes a diffusers folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from qdm_lightning.base.checks import one_line, one_of
from qdm_lightning.diffusion.spec import LEARNED, DiffusionConfig

BAD_INPUT = 2

USUAL_STEPS = 1000


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(
            f"error: {one_line(message)}: type python -m qdm_lightning.convert CHECKPOINT FOLDER; --help says more",
            file=sys.stderr,
        )
        raise SystemExit(BAD_INPUT)


def convert(checkpoint: str | Path, folder: str | Path, image_size: int | None = None, **flags: Any) -> str:
    """Write the U-Net of `checkpoint` as a diffusers folder, with the process that it was trained on.

    Args:
        checkpoint: file of ermongroup/ddim: a state dict, or the training code's list, of which the EMA is taken; or a state
            dict of openai/improved-diffusion or openai/guided-diffusion.
        folder: made, or replaced if it is a diffusers pipeline.
        image_size: in pixels, where it does not follow from the level with attention (16x16 in DDPM's and DDIM's code).
        flags: of the training of a network of openai's, as their commands have them: `diffusion_steps`, `noise_schedule`
            (`linear` or `cosine`), `num_heads` or `num_head_channels`, `use_new_attention_order`, and where there are not 1000
            steps `rescale_timesteps="False"`. DDIM's code has T 1000 and linear betas 1e-4..0.02.

    Returns:
        One line: what was written.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: another layout, missing or unknown keys, a flag that is missing or has no place, heads that `UNet2DModel`
            cannot hold, or a folder that holds something else.
    """
    from qdm_lightning.models.ddim_checkpoint import read_checkpoint, unet_from_ddim
    from qdm_lightning.models.diffusers_io import save_pipeline
    from qdm_lightning.models.guided_checkpoint import Heads, is_guided, unet_from_guided

    state, which = read_checkpoint(checkpoint)
    given = {name: value for name, value in flags.items() if value not in (None, False)}
    if is_guided(state):
        steps, rescaled = given.pop("diffusion_steps", None), given.pop("rescale_timesteps", "True")
        process = _process(steps, given.pop("noise_schedule", None))
        if steps != USUAL_STEPS and rescaled != "False":
            raise ValueError(
                f"over {steps} steps their code gives a network t * {USUAL_STEPS} / {steps}, which UNet2DModel cannot, unless "
                "it was trained with --rescale_timesteps False: give --rescale-timesteps False where it was"
            )
        names = {"num_heads": "count", "num_head_channels": "channels", "use_new_attention_order": "new_order"}
        unet = unet_from_guided(state, image_size, Heads(**{names[name]: value for name, value in given.items()}))
        learned = unet.config.out_channels == 2 * unet.config.in_channels
        process = replace(process, variance_type=LEARNED if learned else "fixed")
    elif given:
        raise ValueError(
            f"--{next(iter(given)).replace('_', '-')} is for networks of openai's code, the checkpoint is of DDIM's"
        )
    else:
        unet, process = unet_from_ddim(state, image_size), DiffusionConfig()
    written = save_pipeline(unet, process, folder)
    config, count = unet.config, sum(parameter.numel() for parameter in unet.parameters())
    facts = [f"{count:,} parameters", f"images {config.in_channels}x{config.sample_size}x{config.sample_size}", which]
    facts += [] if config.num_class_embeds is None else [f"{config.num_class_embeds} classes"]
    facts += ["a learned variance"] if process.variance_type == LEARNED else []
    return f"{written}: {', '.join(filter(None, facts))}"


def _process(steps: int | None, schedule: str | None) -> DiffusionConfig:
    """The process of openai's flags; their linear betas keep the sum over fewer or more steps."""
    if steps is None or schedule is None:
        raise ValueError("the checkpoint does not say its process: give --diffusion-steps and --noise-schedule of its training")
    if schedule == "cosine":
        return DiffusionConfig(num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2")
    one_of("--noise-schedule", schedule, ("linear", "cosine"))
    scale = USUAL_STEPS / steps
    return DiffusionConfig(num_train_timesteps=steps, beta_start=1e-4 * scale, beta_end=0.02 * scale)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (default: `sys.argv`) and convert; returns the exit status, 2 after one line at bad input."""
    parser = _Parser(
        prog="python -m qdm_lightning.convert",
        description="A checkpoint of the code of DDIM (ermongroup/ddim), improved-diffusion or guided-diffusion (openai) "
        "becomes a diffusers folder.",
    )
    parser.add_argument("checkpoint", help="model-790000.ckpt or ckpt.pth of ermongroup/ddim; 64x64_diffusion.pt of openai")
    parser.add_argument("folder", help="diffusers folder to write")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="DDIM's default: what puts the attention at 16x16")
    openai = parser.add_argument_group("of openai's networks, as in the command of their training")
    openai.add_argument("--diffusion-steps", type=int, metavar="T")
    openai.add_argument("--noise-schedule", metavar="linear|cosine")
    openai.add_argument("--num-heads", type=int, metavar="N", help="heads of each attention (there 4 where none is said)")
    openai.add_argument("--num-head-channels", type=int, metavar="N", help="channels of each head instead")
    openai.add_argument("--use-new-attention-order", action="store_true")
    openai.add_argument("--rescale-timesteps", choices=["True", "False"], help="there True where it is not said")
    args = vars(parser.parse_args(argv))
    try:
        print(convert(**args))
    except (OSError, ValueError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    print(f"as a teacher: python -m qdm_lightning.train teacher=pretrained teacher.path={args['folder']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
