"""`python -m qdm_lightning.publish`: a finished student as a folder with its model card, and its upload to the hub."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdm_lightning.base.checks import UserError, folder, visible
from qdm_lightning.cli.app import Command
from qdm_lightning.cli.command_line import command_of
from qdm_lightning.cli.schema import plain, register_root
from qdm_lightning.cli.validate import refuse_unknown
from qdm_lightning.reporting.hub import FOLDER, Published, check_repo, make_folder, read_run, upload
from qdm_lightning.reporting.model_card import Publication
from qdm_lightning.runs.folder import read_config, run_folder
from qdm_lightning.runs.naming import run_name

EXAMPLES = (
    ("run=outputs/NAME", "the student and its card in outputs/NAME/hub, to look at"),
    ("run=outputs/NAME repo=me/qdm-digits-w4a4 private=true", "and upload it, to a private repository"),
    ("run=outputs/NAME repo=me/qdm-digits-w4a4 dry_run=true", "say what would be uploaded"),
    ("run=outputs/NAME repo=me/qdm-digits-w4a4 license=cc-by-4.0", "under a licence that the card names"),
)
"""For `--help`: arguments, and what they do."""


@dataclass(kw_only=True)
class PublishConfig:
    """Root of `conf/publish.yaml`.

    Args:
        run: folder of a finished run with a student.
        repo: repository on the hub, `name` or `owner/name`; None makes the folder alone.
        private: make the repository private.
        dry_run: make the folder, upload nothing.
        license: identifier of the weights' licence.
        name: heading of the card.
        out: the folder that is made; None takes `<run>/hub`.
    """

    run: str | None = None
    repo: str | None = None
    private: bool = False
    dry_run: bool = False
    license: str | None = None
    name: str | None = None
    out: str | None = None


class Publish(Command):
    """`python -m qdm_lightning.publish`."""

    def adopt(self, args: argparse.Namespace) -> None:
        """One run at a time."""
        if args.multirun:
            raise UserError("publish takes one run: leave out -m")

    def check(self, cfg: Any) -> tuple[PublishConfig, str]:
        """The settings, and what trains the run, unless it cannot be published or the hub would refuse it."""
        refuse_unknown(cfg)
        settings = PublishConfig(**plain(cfg))
        if settings.run is None:
            raise UserError("run is missing: type run=<folder of a finished run>")
        run = run_folder(settings.run)
        read_run(run)
        if settings.private and settings.repo is None:
            raise UserError("private=true is about a repository: type repo=<name> too")
        if settings.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", settings.license):
            raise UserError(f"license={settings.license} is none of the hub's: write it as in license=cc-by-4.0")
        if settings.out is not None:
            folder("out", settings.out)
        if settings.repo is not None and not settings.dry_run:
            check_repo(settings.repo)
        return settings, command_of(read_config(run))

    def work(self, checked: tuple[PublishConfig, str], folder: Path) -> None:
        """Make the folder, and upload it where that was asked for."""
        settings, command = checked
        run = run_folder(str(settings.run))
        config, contents = read_config(run), read_run(run)
        out = Path(settings.out).expanduser().resolve() if settings.out else run / FOLDER
        name = settings.name or (settings.repo or run_name(config)).rpartition("/")[2]
        about = Publication(name=name, repo=settings.repo, command=command, license=settings.license)
        files = make_folder(contents, out, about)
        url = None
        if settings.repo is not None and not settings.dry_run:
            url = upload(out, settings.repo, settings.private, f"{name}, by qdm_lightning")
        self.show(Published(out, files, url), settings)


def show(result: Published, settings: PublishConfig) -> None:
    """Print what was made, and what to type next."""
    from qdm_lightning.display.progress import following_lines

    lines = [f"  {size:>12,}  {name}" for name, size in result.files.items()]
    print(visible("\n".join([f"{result.folder}: {len(lines)} files", *lines])))
    if result.url is not None:
        print(f"uploaded: {result.url}")
        return
    repo = settings.repo or "OWNER/NAME"
    print("nothing was uploaded" if settings.dry_run else "the folder alone was made: look at its README.md")
    print("\n".join(following_lines([(f"python -m qdm_lightning.publish run={settings.run} repo={repo}", "uploads it")])))


register_root("publish", PublishConfig)
main = Publish("publish", EXAMPLES, show).main

if __name__ == "__main__":
    main()
