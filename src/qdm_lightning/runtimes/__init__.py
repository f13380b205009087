"""Exported students in other runtimes: files that are checked before they are read, ONNX Runtime and OpenVINO as networks."""
