"""Hydra's and OmegaConf's errors in one line: what was given, what is allowed, what to type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from qdm_lightning.base.checks import one_line
from qdm_lightning.runs.formats import RENAMED

TYPES = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false", "bool": "true or false"}


def quoted(value: object) -> str:
    """A path or name as a value in Hydra's grammar."""
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def to_type(override: str) -> str:
    """What to type in a shell so that the setting of an override gets the very text behind its `=`."""
    name, _, value = override.partition("=")
    text = value.strip("'\"")
    return shlex.quote(f"{name}={quoted(text)}" if {'"', "\\"} & {*text} else f'{name}="{text}"')


def is_bad_input(error: BaseException) -> bool:
    """True for errors that composing, checking and building raise at bad input; everything else is a fault of ours."""
    if isinstance(error, InstantiationException):
        return _instantiation_cause(error) is not None
    return isinstance(error, ValueError | OSError | HydraException | OmegaConfBaseException | YAMLError)


def is_about_a_file(error: BaseException) -> bool:
    """True for an error of the system that names a file or folder: no permission, a full disk, another kind of file."""
    return isinstance(error, OSError) and error.errno is not None and error.filename is not None


def explain(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """One line for the user about an error for which `is_bad_input` holds.

    Args:
        error: raised while composing, checking or building.
        overrides: as typed, to name the culprit where the error does not.
    """
    if isinstance(error, InstantiationException):
        return one_line(_instantiation_cause(error))
    if isinstance(error, MissingConfigException):
        return _unknown_option(error)
    if isinstance(error, OverrideParseException):
        detail = one_line(error).removeprefix(f"Error parsing override '{error.override}' ").partition(" See http")[0]
        return f"{error.override!r} is not understood ({detail}): {_instead_of(str(error.override))}"
    if isinstance(error, ConfigCompositionException):
        return _composition(error)
    if isinstance(error, OmegaConfBaseException):
        return _omegaconf(error, "")
    if is_about_a_file(error):
        return about_a_file(error)
    if "Config group override must be a string" in str(error):
        return _not_an_option(error, overrides)
    return one_line(error)


def _instead_of(override: str) -> str:
    """What to type instead of an override that Hydra's grammar has not: in its mappings names stand without quotes."""
    bare = re.sub("['\"]", "", override)
    if "={" in bare and bare != override:
        with suppress(OverrideParseException):
            OverridesParser.create().parse_override(bare)
            return f"in {{...}} names stand without quotes, type {shlex.quote(bare)}"
    as_text = f"; if it is one text, type {to_type(override)}" if "=" in override else ""
    return f"write name=value, for example sampler.steps=20{as_text}"


def about_a_file(error: Any) -> str:
    """One line about an error for which `is_about_a_file` holds."""
    return f"{error.filename}: {error.strerror}"


def unknown_setting(key: str, known: Iterable[str]) -> str:
    """One line about a setting that does not exist. `known`: dotted names of all settings, and of the groups above them."""
    known = list(known)
    parent, _, name = key.rpartition(".")
    if name in RENAMED:
        return f"{key} is not a setting: it is called {f'{parent}.' if parent else ''}{RENAMED[name]}"
    leaves = get_close_matches(name, {k.rpartition(".")[2] for k in known}, n=1, cutoff=0.8)
    close = get_close_matches(key, known, n=1, cutoff=0.8) or [k for k in known if k.rpartition(".")[2] in leaves]
    siblings = sorted(k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{key} is not a setting: {hint}{parent or 'the root'} has {', '.join(siblings)}"


def setting_names(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings in `cfg`, and of the nodes above them; Hydra's own are left out."""
    for key in map(str, cfg):
        name = f"{prefix}{key}"
        if name == "hydra":
            continue
        yield name
        if not OmegaConf.is_missing(cfg, key) and not OmegaConf.is_interpolation(cfg, key) and isinstance(cfg[key], DictConfig):
            yield from setting_names(cfg[key], f"{name}.")


def _unknown_option(error: MissingConfigException) -> str:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    if not group:
        return f"--config-name={name}: there is no {name}.yaml in the configuration folders"
    allowed = [option for option in error.options or () if not option.startswith("base_")]
    close = get_close_matches(name, allowed, n=1)
    example = close[0] if close else next(iter(allowed), "<option>")
    return f"{group}={name} is not an option: choose one of {', '.join(allowed)}, for example {group}={example}"


def _not_an_option(error: BaseException, overrides: Sequence[str]) -> str:
    """A group was given a number, null or a list: Hydra does not say which, so the shape of the value must."""
    value = re.compile(r"(null|true|false|[\d.]+)$", re.IGNORECASE)
    culprit = next((o for o in overrides if "." not in o.partition("=")[0] and value.match(o.partition("=")[2])), "")
    return f"{culprit or one_line(error)}: a group takes the name of an option, --help lists them; leave it out for the default"


def _composition(error: ConfigCompositionException) -> str:
    text = one_line(error)
    cause = error.__cause__ or error.__context__
    if match := re.match(r"Ambiguous value for argument '(.*?)' 1\.", text):
        name = match[1].partition("=")[0]
        return (
            f"{match[1]} gives several values: add -m to run each of them; if it is one list, type '{name}=[...]', "
            f"if it is one text, {to_type(match[1])}"
        )
    if match := re.match(r"Error merging override (.*)", text):
        return _omegaconf(cause, match[1]) if isinstance(cause, OmegaConfBaseException) else text
    if match := re.match(r"Could not override '([^']*)'", text):
        if isinstance(cause, ConfigAttributeError | ConfigKeyError):
            return _unknown_key(cause, match[1])
        return f"{match[1]} is not a group that can be chosen here: --help lists the groups"
    if match := re.match(r"In '([^']*)': \w+ raised while composing config: (.*)", text):
        own = (
            "teacher=pretrained brings its own network: leave out the other model; beside an experiment, type model=pretrained"
        )
        return own if match[1] == "teacher/pretrained" else f"{match[1]}.yaml: {match[2]}"
    return re.sub(r" ?To append to your (config|default list) use \S+", "", text) or one_line(cause)


def _unknown_key(cause: OmegaConfBaseException, key: str) -> str:
    node: Any = cause.parent_node
    root = node._get_root() if node is not None else None
    full = str(cause.full_key or key)
    if isinstance(root, DictConfig) and not full.startswith("hydra"):
        return unknown_setting(full, setting_names(root))
    return f"{full} is not a setting" + (
        f": there are {', '.join(sorted(map(str, node)))}" if isinstance(node, DictConfig) else ""
    )


def _omegaconf(error: OmegaConfBaseException, override: str) -> str:
    key = str(error.full_key or error.key or "")
    what = one_line(error.msg or error).split(" full_key:")[0]
    if isinstance(error, MissingMandatoryValue):
        return f"{key} is missing: type {key}=<value>"
    if isinstance(error, InterpolationKeyError | InterpolationResolutionError):
        cause = error.__cause__
        return one_line(cause) if isinstance(cause, ValueError) else f"{key}: {what}"
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        return _unknown_key(error, key)
    if match := re.search(r"interpolation '\$\{([\w.]+)\}': Incompatible value 'None'", what):
        return f"{key} follows {match[1]}, which has no value: type {match[1]}=<value>"
    if not isinstance(error, ValidationError):
        return f"{override}: {what}" if override else what
    why = f"{what[0].lower()}{what[1:]}"
    if match := re.search(
        r"(?:could not be converted to|is not a valid) (\w+)|incompatible with type hint '(?:Optional|Union)?\[?([^]']*)", what
    ):
        kind = TYPES.get(match[1], match[1]) if match[1] else " or ".join(match[2].split(", "))
        why = f"{key} must be {kind}"
    elif "is not Optional" in what:
        why = f"{key} needs a value"
    return f"{override or f'{key}={error.value}'} is not allowed: {why}"


def _instantiation_cause(error: InstantiationException) -> str | None:
    """What bad input made a `_target_` fail: a path that leads nowhere, arguments that it does not take, or a value it refuses.

    None where the cause is another error, which is then a fault of the code that the `_target_` names.
    """
    text = one_line(error)
    key = text.rpartition("full_key: ")[2] if "full_key: " in text else ""
    cause = error.__cause__
    if isinstance(cause, InstantiationException):
        return _instantiation_cause(cause)
    if text.startswith(("Error locating target", "Expected a callable")):
        reason = one_line(cause).partition(" Are you sure")[0] if cause is not None else text
        return f"{key}._target_ cannot be imported: {reason}"
    if isinstance(cause, ValueError | OSError):
        return one_line(cause)
    if isinstance(cause, TypeError) and re.search(
        r"unexpected keyword|required (positional|keyword)|takes (no|exactly|\d+) ", str(cause)
    ):
        return f"{key}._target_ does not take these settings: {one_line(cause)}"
    return None if cause is not None else text
