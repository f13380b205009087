"""What there is to type: config groups, their options with a line each, and the commands. Read from the YAML files alone."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from qdm_lightning.cli.schema import CONF_DIR

COMMANDS = {
    "train": "a full-precision teacher, its quantized student, images of both and a distance for each",
    "evaluate": "scores of a run, with their record: Frechet distance, Inception Score, kernel distance, precision, recall",
    "sample": "pictures of chosen seeds, and their way through the steps, teacher above student",
    "diagnose": "activations over the timesteps and the error that accumulates over the steps, of one run or several",
    "report": "finished runs as one HTML page, Markdown and CSV: intervals over seeds, differences to a baseline, figures",
    "dashboard": "the ablation's dashboard in a W&B project, as code",
    "convert": "a checkpoint of DDIM's, improved-diffusion's or guided-diffusion's code becomes a diffusers folder",
    "publish": "a finished student as a folder with its model card, and its upload to the hub of Hugging Face",
    "export": "a student as one file, ONNX or OpenVINO, that other runtimes execute on integers",
    "cost": "what a student costs before it is trained: multiplications, bits, bytes, theoretical speed-up by layer",
}
"""Entry points: `python -m qdm_lightning.<name>`."""

FLAGS = {
    "--cfg job": "print the configuration instead of running; --resolve fills in its ${...}",
    "-m, --multirun": "run every combination of comma-separated values: -m seed=0,1,2 quant=w4a4,w3a3",
    "hydra/launcher=": "how jobs of -m are started: basic (one after another), joblib (at once), submitit_local, slurm",
    "hydra.sweep.dir=": "their folder: the same command with the same folder runs only what is missing there",
    "--config-dir DIR": "options of your own, as DIR/<group>/<name>.yaml",
    "--shell-completion": "install=bash (or zsh, fish) prints what completes these names in your shell",
    "--hydra-help": "everything else that Hydra understands",
}


@dataclass(frozen=True)
class Option:
    """One YAML file of a group: `name` is what to type, `line` what its first comment says."""

    name: str
    line: str


def first_comment(file: Path) -> str:
    """The comment that a YAML file begins with (Hydra's `# @package` aside), up to the end of its first sentence."""
    words: list[str] = []
    for line in file.read_text("utf-8").splitlines():
        if not line.startswith("#") or (words and words[-1].endswith(".")):
            break
        if "@package" not in line:
            words += line.lstrip("# ").split()
    return " ".join(words)


def options(group: str, folders: Sequence[Path] = (CONF_DIR,)) -> list[Option]:
    """Options of `group`, in folders below it too (`paper/cifar10`) but those of other groups (`nem/weighting`), sorted.

    The first folder that has a name describes it.
    """
    found: dict[str, Option] = {}
    others = tuple(f"{other}/" for other in defaults("train") if other.startswith(f"{group}/"))
    for folder in folders:
        for file in sorted((folder / group).rglob("*.yaml")):
            name = file.relative_to(folder / group).with_suffix("").as_posix()
            if not f"{group}/{name}".startswith(others):
                found.setdefault(name, Option(name, first_comment(file)))
    return [found[name] for name in sorted(found)]


def defaults(config_name: str) -> dict[str, str | None]:
    """Groups of a root configuration, in its order, with the option that is taken when none is typed (None: none)."""
    chosen: dict[str, str | None] = {}
    for entry in OmegaConf.load(CONF_DIR / f"{config_name}.yaml").defaults:
        if not isinstance(entry, str):
            chosen |= entry
    return chosen


def help_text(config_name: str, examples: Sequence[tuple[str, str]], folders: Sequence[Path] = (CONF_DIR,)) -> str:
    """What `--help` prints.

    Args:
        config_name: root configuration and command, such as `train`.
        examples: (arguments, what they do).
        folders: where options lie; the user's `--config-dir` comes after ours.
    """
    command = f"python -m qdm_lightning.{config_name}"
    wide = max(len(arguments) for arguments, _ in examples)
    lines = [
        first_comment(CONF_DIR / f"{config_name}.yaml"),
        "",
        f"usage: {command} [group=option ...] [setting=value ...] [flags]",
        "",
        f"Examples (after {command}):",
        *(f"  {arguments:{wide}}  {what}" for arguments, what in examples),
    ]
    groups = {group: chosen for group, chosen in defaults(config_name).items() if group != "hydra"}
    if groups:
        lines += ["", "Groups and their options (* is taken when nothing is typed):"]
    for group, chosen in groups.items():
        stored = [Option(chosen, "what the run itself used")] if chosen == "stored" else []
        lines += ["", f"  {group}=", *_option_lines([*stored, *options(group, folders)], chosen)]
    wide = max(map(len, FLAGS))
    lines += [
        "",
        "Settings: every name that --cfg job prints, for example sampler.steps=20 trainer.max_steps=300 paths.output=runs",
        "",
        "Flags:",
        *(f"  {flag:{wide}}  {what}" for flag, what in FLAGS.items()),
    ]
    return "\n".join(lines)


def _option_lines(found: Sequence[Option], chosen: str | None) -> list[str]:
    wide = max((len(option.name) for option in found), default=0)
    rows = [f"  {'*' if option.name == chosen else ' '} {option.name:{wide}}  {option.line}" for option in found]
    return [line for row in rows for line in textwrap.wrap(row, 118, subsequent_indent=" " * (wide + 6))]


def overview() -> str:
    """What `python -m qdm_lightning` prints: the commands and the experiments, a line each."""
    found = options("experiment")
    wide = max(len(name) for name in [*COMMANDS, *(option.name for option in found)])
    return "\n".join(
        [
            "Commands (each has --help):",
            *(f"  python -m qdm_lightning.{name:{wide}}  {what}" for name, what in COMMANDS.items()),
            "",
            "Experiments (python -m qdm_lightning.train experiment=<name>):",
            *(f"  {option.name:{wide}}  {option.line}" for option in found),
        ]
    )
