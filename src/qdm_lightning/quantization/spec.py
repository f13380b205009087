"""What is quantized and how finely: bit-widths, scopes, quantizers. Imports no torch, so that a command's help stays quick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qdm_lightning.base.checks import at_least, between, one_of, positive

BITS = (2, 3, 4, 5, 6, 7, 8, 32)
"""Allowed bit-widths; 32 leaves a tensor in floating point."""

SCOPES = ("qkv", "attention", "all", "all_but_probs")
"""Where TaQ acts: on q, k, v; on all four operands of attention, the probabilities too; on every quantized activation; on every
one but the probabilities, which version 0.1 called `all`, as it called q, k, v alone `attention`."""

EXECUTIONS = ("simulated", "integer")
"""How a student computes what it draws: quantization simulated in float, or on integer codes. The first is the usual one."""

CHANNEL_SCALES = ("off", "rms", "learned")
"""Whether each input channel of a layer has a scale of its own beside the learned one."""


def check_scope(scope: Any) -> None:
    """Raise ValueError unless `scope` is one of `SCOPES` or a list of name patterns."""
    patterns = isinstance(scope, Sequence) and not isinstance(scope, str)
    if not (patterns and scope and all(isinstance(p, str) for p in scope)) and scope not in SCOPES:
        raise ValueError(
            f"taq.scope={scope} is not allowed: choose one of {', '.join(SCOPES)}, or a list of name patterns, for example "
            "'taq.scope=[*probabilities,*.conv2]'"
        )


@dataclass(kw_only=True)
class QuantConfig:
    """Bit-widths of a student (config group `quant`).

    Args:
        weight_bits: bits of every weight but those of the first and last layers.
        act_bits: bits of every layer input but those of the first and last layers.
        qkv_bits: bits of the attention operands q, k, v; None follows `act_bits`.
        probs_bits: bits of the attention probabilities (unsigned, zero point 0).
        first_last_bits: bits (weights and inputs) of the first and last convolution and of the time embedding's layers.
        rules: module-name patterns (`fnmatch`) to bits, applied in order over everything above; a pattern that matches
            nothing is an error. `{"down_blocks.0.*": 8}`.
        mode: `qat` trains the student; `ptq` only calibrates it.
        weight_quantizer, act_quantizer: `_target_` (and options) of a quantizer, see `quantization.quantizer`.
        calibrator: `_target_` (and options) of the search for the first scales, see `quantization.calibration`.
        calibration_batches: batches that calibration sees, spread over all timesteps.
        calibration_timesteps: `uniform` over t (Q-Diffusion) or `normal` (PTQ4DM).
        channel_scales: `rms` divides each input channel of a layer by r_c, the root of its root mean square in calibration,
            before it is quantized, and multiplies the weight by it; `learned` starts there, and trains log r_c with the
            quantizers' learning rate; `off` leaves both as they are.

    Raises:
        ValueError: a bit-width outside {2..8, 32}, an unknown mode, fewer than one calibration batch.
    """

    weight_bits: int = 4
    act_bits: int = 4
    qkv_bits: int | None = None
    probs_bits: int = 8
    first_last_bits: int = 8
    rules: dict[str, int] = field(default_factory=dict)
    mode: str = "qat"
    weight_quantizer: Any = field(default_factory=lambda: {"_target_": "qdm_lightning.quantization.quantizer.LSQWeight"})
    act_quantizer: Any = field(default_factory=lambda: {"_target_": "qdm_lightning.quantization.quantizer.LSQActivation"})
    calibrator: Any = field(default_factory=lambda: {"_target_": "qdm_lightning.quantization.calibration.MSESearch"})
    calibration_batches: int = 16
    calibration_timesteps: str = "uniform"
    channel_scales: str = "off"

    def __post_init__(self) -> None:
        for name, bits in self._widths.items():
            one_of(f"quant.{name}", bits, BITS)
        one_of("quant.mode", self.mode, ("qat", "ptq"))
        one_of("quant.calibration_timesteps", self.calibration_timesteps, ("uniform", "normal"))
        one_of("quant.channel_scales", self.channel_scales, CHANNEL_SCALES)
        at_least("quant.calibration_batches", self.calibration_batches, 1)
        for name in ("weight_quantizer", "act_quantizer", "calibrator"):
            node = getattr(self, name)
            if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
                raise ValueError(f"quant.{name} needs a _target_: type quant.{name}._target_=<package.module.Class>")
            given = sorted({"bits", "padded", "weight"} & set(node)) if name != "calibrator" else []
            if given:
                raise ValueError(
                    f"quant.{name}.{given[0]} is not a setting: each layer gives it; bits are quant.weight_bits and so on"
                )

    @property
    def attention_bits(self) -> int:
        """Bits of q, k, v: `qkv_bits`, or `act_bits` where it is None."""
        return self.act_bits if self.qkv_bits is None else self.qkv_bits

    @property
    def is_float(self) -> bool:
        """True where nothing is quantized: the run is a full-precision teacher."""
        return all(bits == 32 for bits in self._widths.values())

    @property
    def _widths(self) -> dict[str, int]:
        fixed = {name: getattr(self, name) for name in ("weight_bits", "act_bits", "probs_bits", "first_last_bits")}
        return fixed | {"qkv_bits": self.attention_bits} | {f"rules.{name}": bits for name, bits in self.rules.items()}


@dataclass(kw_only=True)
class TaQOff:
    """`taq=off`: one scale and zero point for all timesteps. `scope`: one of `SCOPES`, or a list of name patterns."""

    scope: Any = "qkv"

    def __post_init__(self) -> None:
        check_scope(self.scope)


@dataclass(kw_only=True)
class TaQNormalize(TaQOff):
    """`taq=normalize`: the quantizer follows each sample's own mean and standard deviation; `psi` is added to the variance.

    Attention probabilities, whose zero point is 0, follow their greatest value.
    """

    _target_: str = "qdm_lightning.quantization.taq.NormalizedActivation"
    psi: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("taq.psi", self.psi)


@dataclass(kw_only=True)
class TaQEma(TaQNormalize):
    """`taq=ema`: as `normalize`, with moments from tables over `groups` timestep groups, averaged in training."""

    _target_: str = "qdm_lightning.quantization.taq.EMANormalizedActivation"
    groups: int = 20
    momentum: float = 0.95
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("taq.groups", self.groups, 1)
        at_least("taq.num_train_timesteps", self.num_train_timesteps, 2)
        between("taq.momentum", self.momentum, 0.0, 1.0)


@dataclass(kw_only=True)
class TaQScale(TaQOff):
    """`taq=scale`: a learned scale and zero point for each of `groups` timestep groups, on every quantized activation."""

    _target_: str = "qdm_lightning.quantization.taq.GroupedActivation"
    scope: Any = "all"
    groups: int = 20
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("taq.groups", self.groups, 1)
        at_least("taq.num_train_timesteps", self.num_train_timesteps, 2)


TAQ: dict[str, type[TaQOff]] = {"off": TaQOff, "normalize": TaQNormalize, "ema": TaQEma, "scale": TaQScale}
"""TaQ's variants by the name that is typed."""
