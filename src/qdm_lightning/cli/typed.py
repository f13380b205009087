"""What is typed, before Hydra reads it: its grammar takes `2024_01_05` for a number and `(1)` for nothing, in names too."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.types import Override

from qdm_lightning.base.checks import UserError
from qdm_lightning.cli.help import defaults
from qdm_lightning.cli.messages import quoted
from qdm_lightning.cli.schema import CONF_DIR, SCHEMAS, roots

HYDRAS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
"""Settings of Hydra's own that are text."""

STACKING = ("experiment", "debug", "logger")
"""Groups of which several options may be taken, one over the other."""

_PLAIN = re.compile(
    r"""['"]|\?\?\?$|null$|(choice|range|glob|interval|tag|sort|shuffle|int|float|str|bool|json_str|extend_list)\("""
)
"""Begins a value that says by itself how it is to be read."""

_AS_IT_IS = re.compile(r"[A-Za-z_/.][\w/.:-]*$")
"""What Hydra's grammar reads as text."""

_WORDS = {"true", "false", "nan", "inf"}
"""But for these, in any case."""

_NAMES = re.compile(r"\[[\w.+-]+(,[\w.+-]+)*\]$")


def _of_type(hint: Any, wanted: Any) -> bool:
    union = get_origin(hint) in (Union, types.UnionType)
    return hint == wanted or (union and {*get_args(hint)} <= {wanted, type(None)})


def _settings(schema: type, above: str, wanted: Any) -> Iterator[str]:
    """Dotted names of the settings of `schema` whose type is `wanted`, or that or None."""
    for name, hint in get_type_hints(schema).items():
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _settings(hint, f"{above}{name}.", wanted)
        elif _of_type(hint, wanted):
            yield f"{above}{name}"


@functools.cache
def _named(wanted: Any, roots: tuple[type, ...]) -> frozenset[str]:
    schemas = [(root, "") for root in roots]
    schemas += [(schema, f"{group}.") for group, options in SCHEMAS.items() for schema in options.values()]
    return frozenset(name for schema, above in schemas for name in _settings(schema, above, wanted))


def _is_plain(text: str) -> bool:
    return bool(_AS_IT_IS.match(text)) and not re.match(r"\.\d", text) and text.lower() not in _WORDS


def as_text(word: str) -> str:
    """An override as typed, its value in quotes where its setting is text (or a list of texts) and Hydra would read a number,
    a truth value or another form out of it. Commas and `${...}` keep their meaning.

    >>> as_text("logger.name=2024_01_05"), as_text("data.path=my pics (1)"), as_text("tags=[1e3,007]"), as_text("seed=1_0")
    ("logger.name='2024_01_05'", "data.path='my pics (1)'", "tags=['1e3','007']", 'seed=1_0')
    """
    name, equals, value = word.partition("=")
    key = name.lstrip("+")
    if not equals or not value or _PLAIN.match(value) or "${" in value:
        return word
    if key in _named(str, roots()) or key in HYDRAS:
        if "," not in value:
            return word if _is_plain(value) else f"{name}={quoted(value)}"
        if _NAMES.match(f"[{value}]"):  # of a sweep
            return f"{name}={','.join(text if _is_plain(text) else quoted(text) for text in value.split(','))}"
    if key in _named(list[str], roots()) and _NAMES.match(value):
        return f"{name}=[{','.join(map(quoted, value[1:-1].split(',')))}]"
    return word


def refuse_what_changes_nothing(overrides: Iterable[Override], config_name: str) -> None:
    """Raise UserError at `quant=[w4a4,w3a3]`, of which Hydra would take the last, and at `quant.rules={}`, which it merges."""
    ours = (CONF_DIR / f"{config_name}.yaml").is_file()
    groups = set(defaults(config_name)) - {*STACKING} if ours else set()
    for override in overrides:
        if override.key_or_group in groups and isinstance(override.value(), list):
            raise UserError(
                f"{override.input_line}: {override.key_or_group} takes one option; -m with commas runs each of them"
            )
        if override.value() == {} and not override.is_delete():
            raise UserError(f"{override.input_line} changes nothing, as it is merged into what is there: leave it out")
