"""Which `_target_`s a stored configuration may name: configurations travel with checkpoints, and a `_target_` runs code.

What the user types or keeps in their own `--config-dir` is theirs and free. What comes out of a run folder may only name
classes and functions that this package defines itself, plus those that the user trusts by naming them again.
Nothing is imported to find out: the package's source is parsed.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = __name__.partition(".")[0]
PACKAGE_DIR = Path(__file__).parents[1]


@cache
def _defined_in(module: str) -> frozenset[str]:
    """Names of the classes and functions that `module` of this package defines at its top level (imports do not count)."""
    file = PACKAGE_DIR.joinpath(*module.split(".")[1:])
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    if not file.is_file():
        return frozenset()
    definitions = (ast.ClassDef, ast.FunctionDef)
    return frozenset(node.name for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, definitions))


def is_ours(target: str) -> bool:
    """True where `target` is the dotted path of a public class or function that this package defines.

    >>> is_ours("qdm_lightning.base.checks.one_of"), is_ours("os.system"), is_ours("qdm_lightning.base.trust.ast.parse")
    (True, False, False)
    """
    module, _, name = target.rpartition(".")
    parts = module.split(".")
    return parts[0] == PACKAGE and all(part.isidentifier() for part in parts) and name in _defined_in(module)


def targets(plain: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each (`key` of the node, its `_target_`) in a plain configuration of dicts and lists, to any depth."""
    if isinstance(plain, dict):
        if "_target_" in plain:
            yield key, plain["_target_"]
        for name, value in plain.items():
            yield from targets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(plain, list):
        for index, value in enumerate(plain):
            yield from targets(value, f"{key}[{index}]")


def check_targets(plain: Any, trusted: Collection[str] = ()) -> None:
    """Refuse a stored configuration that names code which is neither ours nor trusted.

    Args:
        plain: configuration as dicts and lists, as read from a run folder or a checkpoint.
        trusted: further targets, exactly as they must be named.

    Raises:
        ValueError: a `_target_` (None aside) is not allowed; the message says how to trust it.
    """
    for key, target in targets(plain):
        allowed = target is None or (isinstance(target, str) and (target in trusted or is_ours(target)))
        if not allowed:
            raise ValueError(
                f"the stored configuration would run {target} ({key}._target_), which is not part of {PACKAGE}: "
                f"if you trust it, type {key}._target_={target} as well, or --config-dir=<the folder that names it>"
            )
