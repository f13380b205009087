"""A student in diffusers: `from_pretrained` of its networks and pipelines reads one, `save_pretrained` writes it back.

    import qdm_lightning
    pipeline = DDPMPipeline.from_pretrained("outputs/<run>/student")

Where its config.json says `"execution": "integer"`, it runs on integer codes, on a CPU: so do copies of an integer student.

By diffusers' own interface of quantizers. It is registered while diffusers is imported, so that what is heavy, or needs all of
diffusers, is imported when a student is read.
"""

from __future__ import annotations

import inspect
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from qdm_lightning.base.checks import one_line
from qdm_lightning.quantization.spec import EXECUTIONS
from qdm_lightning.training.network_settings import (
    DROPPED,
    KEY,
    METHOD,
    check_format,
    check_settings,
    checked_execution,
    network_settings,
    quantization_config,
    unet_config,
)


class Method(StrEnum):
    """The `quant_method`, as diffusers has those of others."""

    QDM_LIGHTNING = METHOD


class StudentConfig(QuantizationConfigMixin):
    """The `quantization_config` in a student's config.json: `format`, `quant`, `taq` and more, see `student_files`."""

    def __init__(self, **settings: Any) -> None:
        self.quant_method = Method.QDM_LIGHTNING
        self.format, self.quant, self.taq = (settings.get(name) for name in ("format", "quant", "taq"))
        if DROPPED in settings:
            self.label_dropout = settings[DROPPED]
        if settings.get("execution", EXECUTIONS[0]) != EXECUTIONS[0]:
            self.execution = settings["execution"]

    def to_dict(self) -> dict[str, Any]:
        """As in config.json."""
        return {**super().to_dict(), "quant_method": METHOD}

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`, for diffusers' own messages."""
        return self.to_dict()


class StudentQuantizer(DiffusersQuantizer):
    """Reads a student's packed weights into a network that diffusers made, on any device, in float32 and eval mode.

    Attributes:
        settings: of the network, as `network_settings` has them, once it is read.
        execution: of the network, one of `EXECUTIONS`.
        packed: what is written of a network on integer codes, which has no weights in float any more.
    """

    requires_calibration = True  # a network at full precision becomes a student by training
    required_packages = ["accelerate"]  # noqa: RUF012 (diffusers' own form)
    supports_parallel_loading = False

    def __init__(self, quantization_config: StudentConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.settings: dict[str, Any] = {}
        self.execution = checked_execution(getattr(quantization_config, "execution", None), "quantization_config")
        self.packed: dict[str, Tensor] = {}
        self.model: Any = None
        self._files: list[Path] = []
        self._state: dict[str, Tensor] = {}

    def validate_environment(
        self, *args: Any, torch_dtype: torch.dtype | None = None, device_map: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Raise ImportError without accelerate, ValueError at another precision than float32, or integers off the CPU."""
        if find_spec("accelerate") is None:
            raise ImportError("diffusers reads a quantized network by accelerate alone: pip install accelerate")
        if torch_dtype not in (None, torch.float32):
            raise ValueError(f"torch_dtype={torch_dtype} is not allowed: a student is read in float32, leave torch_dtype out")
        elsewhere = [str(place) for place in (device_map or {}).values() if str(place) != "cpu"]
        if elsewhere and self.execution == "integer":
            raise ValueError(
                f"device_map={elsewhere[0]} is not allowed: a student on integer codes runs on the CPU, leave it out"
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """No weight is left to diffusers, which would compare names and shapes that are packed."""
        self._files = [Path(file) for file in checkpoint_files]
        return []

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """See `maybe_update_loaded_keys`: what is missing is an error of `load_packed`."""
        return []

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Keep what a file holds, for when all are read."""
        self._state.update(state_dict)
        return {}

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        from qdm_lightning.training.named_quantizers import checked_quantization, named_quantizers, prepare_by
        from qdm_lightning.training.student_weights import CONFIG, own_settings

        file, given = self._files[0].parent / CONFIG, self.quantization_config
        check_format(given.format, file)
        quantization = checked_quantization({"quant": given.quant, "taq": given.taq}, file)
        quantizers = named_quantizers(quantization, file)
        for weights in self._files:
            self.settings = own_settings(weights)
            wanted = network_settings(unet_config(model), None, quantization)
            check_settings(self.settings, {**wanted, "diffusion": self.settings.get("diffusion")}, weights)
        _allocate(model)
        prepare_by(model, quantization, quantizers)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
        from qdm_lightning.quantization.packing import load_packed

        state, self._state = self._state, {}
        try:
            load_packed(model, state)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{self._files[0]} does not make a student: {one_line(error)}") from error
        self._keep(model)

    def _keep(self, model: Any) -> None:
        self.model = model.to(memory_format=torch.channels_last).eval()
        if self.execution == "integer":
            from qdm_lightning.integer.conversion import convert_in_place
            from qdm_lightning.quantization.packing import packed_state

            self.packed = packed_state(model)
            convert_in_place(model)
        model.save_pretrained = _SavePretrained(model)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `save_pretrained` writes: weights at their bits, and whose they are."""
        import json

        from qdm_lightning.quantization.packing import packed_state

        if not safe_serialization:
            raise ValueError("safe_serialization=False is not allowed: a student is safetensors, leave it out")
        return self.packed or packed_state(self.model), {KEY: json.dumps(self.settings)}

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _allocate(model: nn.Module) -> None:
    """Memory for the parameters, which diffusers leaves out until their values are read; quantizers are made beside them."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)


class _SavePretrained:
    """A student's `save_pretrained`: diffusers' own, after which the files are as a run writes them, byte for byte."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).save_pretrained.__get__(self.model))

    def __call__(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        from qdm_lightning.base.files import write_json, write_whole
        from qdm_lightning.quantization.layers import QuantizedLayer
        from qdm_lightning.training.student_weights import CONFIG, WEIGHTS, in_order, student_config

        model: Any = self.model
        quantizer: StudentQuantizer = model.hf_quantizer
        if not quantizer.packed and not any(isinstance(module, QuantizedLayer) for module in model.modules()):
            raise ValueError(
                "to_integer's result has no weights to write: save the student that it was made of, or what "
                'load_student(..., execution="integer") returns'
            )
        type(model).save_pretrained(model, save_directory, *args, **options)
        folder, stem = Path(save_directory), WEIGHTS.partition(".")[0]
        for file in folder.glob(f"{stem}*.safetensors"):
            write_whole(file, in_order(file.read_bytes()))
        write_json(folder / CONFIG, student_config(model, quantizer.settings, quantizer.execution))


def as_loaded(model: Any, settings: dict[str, Any], execution: str) -> None:
    """Let a student that this package read be to diffusers what its own `from_pretrained` returns.

    Args:
        model: the prepared `UNet2DModel`; with `execution="integer"` it runs on integer codes afterwards.
        settings: as `network_settings` has them.
        execution: one of `EXECUTIONS`.

    Raises:
        ValueError: a layer that can't be integer.
    """
    quantizer = StudentQuantizer(StudentConfig(**quantization_config(settings), execution=execution))
    quantizer.settings = settings
    model.is_quantized, model.quantization_method = True, Method.QDM_LIGHTNING
    model.hf_quantizer = quantizer
    quantizer._keep(model)


def register(auto: ModuleType) -> None:
    """Add both classes to the tables of `diffusers.quantizers.auto`. Versions that lack the interface are left as they are."""
    if hasattr(DiffusersQuantizer, "maybe_update_state_dict") and hasattr(DiffusersQuantizer, "get_state_dict_and_metadata"):
        auto.AUTO_QUANTIZER_MAPPING[METHOD] = StudentQuantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = StudentConfig
