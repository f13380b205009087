"""A student as a file that other runtimes execute on integers: ONNX with QuantizeLinear and DequantizeLinear, or OpenVINO."""
