"""What a stored configuration may name outside its folder: a closed list, told when it is used, and never a place to write.

A run's folder may come from anybody. It may say where its images lie. Where something is written is its own folder and the
user's cache: the default one, one that is typed, or one that a command of ours marked as a cache when the user typed it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from qdm_lightning.cli.schema import PLACES
from qdm_lightning.runs.caches import DEFAULT, is_cache


def keep_within(values: dict[str, Any], typed: Collection[str] = ()) -> list[str]:
    """Take from a stored configuration what would write elsewhere, in place.

    Args:
        values: as it was stored, as plain data.
        typed: dotted names of the settings that the user gave.

    Returns:
        What the user is told: the places that it names, and what was not taken, a line each.
    """
    paths, data, lines = values.setdefault("paths", {}), values.get("data"), list[str]()
    if "paths.cache" not in typed and isinstance(paths, dict) and not _may_be_cache(paths.get("cache")):
        lines.append(f"paths.cache={paths.get('cache')} is no cache of yours: {DEFAULT} is taken; to take it, type it")
        paths["cache"] = DEFAULT
    if isinstance(data, dict):
        if "data.cache" not in typed and data.get("cache") is not None and not _may_be_cache(data["cache"]):
            lines.append(f"data.cache={data['cache']} is no cache of yours: it is not used; to use it, type it")
            data["cache"] = None
        if "data.download" not in typed and data.get("download"):
            data["download"] = False
    named = {place: _at(values, place) for place in PLACES if place not in ("paths.output", "paths.cache", "data.cache")}
    named |= {name: _at(values, name) for name in ("logger.entity", "logger.tracking_uri", "logger.space_id")}
    told = [f"{place}={path}" for place, path in named.items() if path and place not in typed]
    return [*lines, *([f"named by the run's configuration: {', '.join(told)}"] if told else [])]


def _may_be_cache(path: Any) -> bool:
    return path is None or (isinstance(path, str) and is_cache(path))


def _at(values: Mapping[str, Any], place: str) -> Any:
    group, _, name = place.partition(".")
    node = values.get(group)
    return node.get(name) if isinstance(node, dict) else None
