import importlib
import sys

import pytest

from qdm_lightning.base.import_hook import after_import


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `watched_package` with a module `tables`, not imported; what is hooked here is unhooked."""
    (tmp_path / "watched_package").mkdir()
    (tmp_path / "watched_package" / "__init__.py").write_text("")
    (tmp_path / "watched_package" / "tables.py").write_text("TABLE = {}\nassert 'seen' not in globals()\n")
    (tmp_path / "watched_package" / "broken.py").write_text("raise KeyError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "watched_package"
    for name in [name for name in sys.modules if name.startswith("watched_package")]:
        del sys.modules[name]


def act(module):
    module.TABLE["ours"] = module.__name__


def test_before_and_after_the_import(package):
    after_import(f"{package}.tables", act)
    assert package not in sys.modules
    module = importlib.import_module(f"{package}.tables")
    assert module.TABLE["ours"] == f"{package}.tables"
    assert importlib.reload(module).TABLE["ours"] == f"{package}.tables"
    module.TABLE.clear()
    after_import(f"{package}.tables", act)
    assert module.TABLE["ours"] == f"{package}.tables"


def test_a_module_that_is_not_there_or_fails_says_so_itself(package):
    after_import(f"{package}.nowhere", act)
    after_import(f"{package}.broken", act)
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        importlib.import_module(f"{package}.nowhere")
    for _ in range(2):
        with pytest.raises(KeyError, match="broken"):
            importlib.import_module(f"{package}.broken")
