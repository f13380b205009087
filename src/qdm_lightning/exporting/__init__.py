"""A student as a file for other runtimes: ONNX with QuantizeLinear and DequantizeLinear around every product, or OpenVINO."""
