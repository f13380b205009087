"""Hydra by its public face: what the package imports of it is on a list (import-linter cannot look inside other packages)."""

import ast

from qdm_lightning.cli.schema import PACKAGE

ALLOWED = ("hydra.core.", "hydra.plugins.", "hydra.errors.")
NAMES = {"hydra", "hydra.main", "hydra.compose", "hydra.initialize", "hydra.initialize_config_dir", "hydra.utils.instantiate"}


def imported() -> dict[str, str]:
    """Dotted name to file, of every import of Hydra in the package and its plugin."""
    found = {}
    for file in PACKAGE.parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            found |= {name: file.name for name in names if name.partition(".")[0] == "hydra"}
    return found


def test_every_import_of_hydra_is_public():
    found = imported()
    assert len(found) > 5
    assert [(name, file) for name, file in found.items() if not (name in NAMES or name.startswith(ALLOWED))] == []
