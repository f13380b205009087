"""Settings of `export`, and of the commands that take an exported file. Imports neither torch nor a runtime."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

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


def runtime_of(file: str, asked: str | None) -> str:
    """What executes a file: `asked`, or the runtime of its format. Raises ValueError where it cannot, or is not installed."""
    suffix = Path(file).suffix
    able = [name for name, kind in RUNTIMES.items() if suffix == SUFFIXES[kind] or (name, suffix) == ("openvino", ".onnx")]
    if not able:
        raise ValueError(f"file={file} is no exported file: give one that ends in {' or '.join(SUFFIXES.values())}")
    runtime = asked or able[0]
    if runtime not in able:
        raise ValueError(f"runtime={runtime} does not read file={file}: type runtime={able[0]}, or leave it out")
    installed(runtime)
    return runtime
