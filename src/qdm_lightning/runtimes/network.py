"""Exported networks in ONNX Runtime and OpenVINO: eps(x_t, t) as a call, and which kernels it runs on."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qdm_lightning.runtimes.onnx_integers import on_integers
from qdm_lightning.runtimes.spec import installed

INTEGER_OPS = ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "QLinearConv", "QLinearMatMul", "QGemm")
FLOAT_OPS = ("Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
"""ONNX Runtime's operators that multiply: on integers, and in float32."""

OPENVINO_SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "PERFORMANCE_HINT": "LATENCY"}
"""Nothing is rounded that the student does not round: OpenVINO takes bfloat16 by itself where the processor has it."""


class RuntimeNetwork(nn.Module):
    """An exported network as `network(x, t) -> eps`.

    Args:
        model: `onnx.ModelProto`, or `openvino.Model` for `openvino`.
        runtime: `onnxruntime` or `openvino`.
        threads: of the CPU; 0 leaves it to the runtime.
        num_train_timesteps: T; the tables of timestep-dependent grids have nothing beyond it.
        batch: N of every call; None allows any. OpenVINO fuses more where it knows it.
        settings: OpenVINO's, over `OPENVINO_SETTINGS`.

    Attributes:
        provenance: runtime and version, as records have them.

    Raises:
        ValueError: the runtime is not installed, or would be wrong on this processor.
    """

    def __init__(
        self,
        model: Any,
        runtime: str,
        threads: int = 0,
        num_train_timesteps: int = 1000,
        batch: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        installed(runtime)
        self.runtime, self.num_train_timesteps = runtime, num_train_timesteps
        self.provenance = {"runtime": f"{runtime} {version(runtime)}"}
        exact = sums_bytes() or not _quantizes(model)
        if runtime == "openvino":
            if not exact:
                raise ValueError(
                    "runtime=openvino would be wrong on this processor, which has no VNNI: sums of 8-bit products saturate at "
                    "16 bits; type runtime=onnxruntime, which then multiplies in float32"
                )
            self._compiled = _openvino(model, threads, batch, settings or {})
        else:
            self._session, self._optimized = _onnxruntime(on_integers(model) if exact else model, threads, exact)

    def run(self, sample: np.ndarray, timestep: np.ndarray) -> list[np.ndarray]:
        """All outputs of the graph, the noise last where others were added, for `sample` (N, C, H, W) and `timestep` (N,)."""
        inputs = {"sample": np.ascontiguousarray(sample), "timestep": timestep}
        if self.runtime == "openvino":
            results = self._compiled(inputs)
            return [np.array(results[output]) for output in self._compiled.outputs]
        outputs: list[np.ndarray] = self._session.run(None, inputs)
        return outputs

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise estimate, (N, C, H, W) float32, of x_t (N, C, H, W) at timesteps t (N,).

        Raises:
            ValueError: a timestep outside [0, T).
        """
        if not 0 <= int(t.min()) <= int(t.max()) < self.num_train_timesteps:
            raise ValueError(f"timesteps {t.min()}..{t.max()} lie outside [0, {self.num_train_timesteps})")
        return torch.from_numpy(self.run(x.float().numpy(), t.long().numpy())[0])

    def kernels(self) -> Counter[str]:
        """How many products the runtime executes in `int8` and in `float`, as it says itself after its optimizations."""
        if self.runtime == "openvino":
            nodes = [node.get_rt_info() for node in self._compiled.get_runtime_model().get_ops()]
            products = [node for node in nodes if node["layerType"].value in ("Convolution", "FullyConnected", "MatMul")]
            names = [str(node["primitiveType"].value).lower() for node in products]
            return Counter("int8" if name.endswith("i8") else "float" for name in names)
        found = Counter[str]()
        for operator, count in self._optimized.items():
            found.update({"int8": count} if operator in INTEGER_OPS else {"float": count} if operator in FLOAT_OPS else {})
        return found


def sums_bytes() -> bool:
    """True where the processor adds products of 8-bit codes in 32 bits. Without it 255 * 127 * 2 saturates at 16 bits."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return True  # not Linux: what the export checked holds
    return any(flag in text for flag in ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp"))


def _quantizes(model: Any) -> bool:
    if hasattr(model, "graph"):
        return any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    return any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())


def _openvino(model: Any, threads: int, batch: int | None, settings: Mapping[str, Any]) -> Any:
    import openvino

    core = openvino.Core()
    read = model.clone() if isinstance(model, openvino.Model) else core.read_model(model.SerializeToString())
    if batch is not None:
        shapes = {value.get_any_name(): [batch, *list(value.get_partial_shape())[1:]] for value in read.inputs}
        read.reshape(shapes)
    options = {**OPENVINO_SETTINGS, **({"INFERENCE_NUM_THREADS": threads} if threads else {}), **settings}
    return core.compile_model(read, "CPU", options)


def _onnxruntime(model: Any, threads: int, integers: bool) -> tuple[Any, Counter[str]]:
    """A session, and how many nodes of each kind it executes; without `integers` it dequantizes before every product."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_quant_qdq", str(int(not integers)))
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return session, Counter(node.op_type for node in optimized.graph.node)
