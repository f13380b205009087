"""A run is a folder: the names of its files, its configuration, and the lock that one process holds while it trains there."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from qdm_lightning.base.checks import UserError
from qdm_lightning.base.files import reading, remove_leftovers, write_whole
from qdm_lightning.base.ranks import rank
from qdm_lightning.runs.formats import upgraded

CONFIG, METRICS, LOCK = "config.yaml", "metrics.json", ".lock"
"""The resolved configuration, the results (a run's last file), and what is held while a process trains in the folder."""

WRITTEN = (
    *(CONFIG, METRICS, "metrics.csv", "quantization.txt", "samples.png", "wandb_id", "teacher", "student"),
    *("teacher/*", "checkpoints/*", "samples/*"),
)
"""What a process that trains writes: whoever holds the lock removes what a killed one left of it, half-written."""

MAY_CHANGE = ("run", "logger", "paths")
"""Settings that make no other run: where it lies, and who is told of it."""


LARGEST, DEEPEST = 2**18, 20
"""Characters and levels of a configuration: many times what it has. YAML takes half a minute to read a megabyte."""


def is_finished(folder: Path) -> bool:
    """True where a run has left its results."""
    return (folder / METRICS).is_file() and (folder / CONFIG).is_file()


def run_folder(run: str | Path) -> Path:
    """Absolute folder of an earlier run. Raises FileNotFoundError where there is none, or none of ours."""
    folder = Path(run).expanduser().resolve()
    if not (folder / CONFIG).is_file():
        what = f"has no {CONFIG}" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(f"run={run} {what}: give the folder of an earlier run, the one that holds {CONFIG}")
    return folder


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def plain_yaml(text: str) -> Any:
    """YAML as plain data, as this version names it: scalars, lists and dicts, nothing that would be looked up or computed.

    Raises:
        ValueError: tags, aliases (a few lines can stand for gigabytes), or an interpolation `${...}`, which is resolved before
            a configuration is written.
        yaml.YAMLError: no YAML.
    """
    if len(text) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} characters, which no configuration has")
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"line {event.start_mark.line + 1} is nested more than {DEEPEST} deep, which no configuration is")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {event.start_mark.line + 1} has the alias *{event.anchor}, which no run writes")
        if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
            raise ValueError(f"line {event.start_mark.line + 1} has {event.value}, which no run writes: its values are plain")
    return upgraded(yaml.safe_load(text))


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration that a run of any version left in its folder, as plain data and as this version names it.

    Raises:
        ValueError: the file is damaged, or no configuration.
    """
    file = folder / CONFIG
    with reading(file) as stream:
        plain = plain_yaml(stream.read().decode())
    if not isinstance(plain, dict) or not all(isinstance(name, str) for name in plain):
        raise ValueError(f"{file} is not the configuration of a run")
    return plain


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a resolved configuration whole or not at all. Raises ValueError where it is not plain data (see `plain_yaml`)."""
    text = yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    plain_yaml(text)
    write_whole(folder / CONFIG, text.encode())


def check_same(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError where the run that lies in `folder` has other settings than `config`, `MAY_CHANGE` aside.

    What an older version did not store is no difference.
    """
    for difference in _differences(read_config(folder), config):
        if difference.partition("=")[0].partition(".")[0] not in MAY_CHANGE:
            raise UserError(
                f"{folder} holds a run with another configuration ({difference}): "
                f"give another folder, or go on with that run by run={folder} alone"
            )


def _differences(stored: Mapping[str, Any], given: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name, value in stored.items():
        other = given.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from _differences(value, other, f"{above}{name}.")
        elif value != other:
            yield f"{above}{name}={value}, not {other}"


@contextmanager
def opened(folder: Path, config: Mapping[str, Any]) -> Iterator[bool]:
    """Hold a run's folder, its configuration in it, and yield whether the run goes on. The first rank holds it for all.

    Raises:
        UserError: another process trains there, or the folder holds a run with other settings.
    """
    with held(folder):
        goes_on = (folder / CONFIG).is_file()
        if goes_on:
            check_same(folder, config)
        elif not rank():
            write_config(folder, config)
        yield goes_on


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made if need be, and remove what killed processes left half-written there.

    Ranks but the first hold nothing.

    Raises:
        UserError: another process holds it.
    """
    if rank():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder} is being trained by another process: wait for it, or end it") from error
    try:
        for name in WRITTEN:
            remove_leftovers(folder / name)
        yield
    finally:
        lock.release()


def check_there(folder: Path) -> None:
    """Raise FileNotFoundError where a run's folder is gone: who writes on would leave half a run in a new one."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(errno.ENOENT, "the run's folder was removed or moved while it was in use", str(folder))


def check_free(folder: Path) -> None:
    """Raise UserError where another process trains in a run's folder; nothing is written. For the first rank: the others
    find that one."""
    if not rank() and (folder / LOCK).is_file():
        with held(folder):
            pass
