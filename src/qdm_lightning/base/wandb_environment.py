"""W&B's environment variables, as W&B documents them. What is typed wins, then the variable, then our default."""

from __future__ import annotations

import os
from collections.abc import Sequence

MODES = ("offline", "online", "disabled")

ALIASES = {"dryrun": "offline", "run": "online"}
"""Older words of W&B's for two of them."""

PROJECT = "qdm-lightning"
"""Where neither a setting nor the environment names a project."""


def wandb_mode(typed: str | None) -> tuple[str | None, str]:
    """One of `MODES`, and what says so; None where nothing does.

    `WANDB_DISABLED=true` (or 1, yes, on) is `WANDB_MODE=disabled`.

    Raises:
        ValueError: WANDB_MODE is another word.
    """
    if typed is not None:
        return typed, f"logger.mode={typed}"
    off, given = os.environ.get("WANDB_DISABLED", ""), os.environ.get("WANDB_MODE", "")
    if off.lower() in ("1", "true", "t", "yes", "y", "on"):
        return "disabled", f"WANDB_DISABLED={off}"
    mode = ALIASES.get(given, given)
    if mode and mode not in MODES:
        raise ValueError(
            f"WANDB_MODE={given} is not allowed: choose one of {', '.join(MODES)}, unset it, or type logger.mode=offline"
        )
    return mode or None, f"WANDB_MODE={given}"


def from_environment(variable: str, typed: str | None, default: str) -> str:
    """`typed`, or the variable where it is set, or the default."""
    return typed or os.environ.get(variable) or default


def tags_from_environment() -> Sequence[str]:
    """Those of WANDB_TAGS, which are separated by commas."""
    return [tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag]
