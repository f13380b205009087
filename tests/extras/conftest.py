"""Tests that need extras: `make test-extras`. Else they are not even imported, as what they need need not be installed."""


def pytest_ignore_collect(collection_path, config):
    return True if config.option.markexpr == "not extras" else None
