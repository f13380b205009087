"""Settings of `export`, and of the commands that take an exported file. Imports neither torch nor a runtime."""

from __future__ import annotations

from importlib.util import find_spec

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
"""Formats, and how their files end; OpenVINO's weights lie beside it in a .bin."""

RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino"}
"""What executes a file, and the format that it takes by itself; OpenVINO reads both."""

EXTRAS = {"onnx": "onnx", "onnxruntime": "onnx", "openvino": "openvino"}
"""Packages, and the extra of ours that installs each."""


def installed(*packages: str) -> None:
    """Raise ValueError where a package of `EXTRAS` is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install 'qdm-lightning[{EXTRAS[package]}]'")
