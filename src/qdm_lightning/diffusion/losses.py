"""Losses of the student: L_simple (DDPM, eq. 14) and L_NeM, noise-estimating mimicking.

eps is the true noise, eps_fp the full-precision teacher's estimate, eps_q the quantized student's, all (B, C, H, W).
Errors are taken in float32, whatever the precision of the networks.
"""

from __future__ import annotations

from torch import Tensor

from qdm_lightning.diffusion.spec import NeMConfig


def per_sample_mse(target: Tensor, estimate: Tensor) -> Tensor:
    """Mean over C, H, W of (target - estimate)^2: one error for each sample, (B,), float32."""
    return (target.float() - estimate.float()).square().flatten(1).mean(1)


def simple_loss(eps: Tensor, eps_q: Tensor) -> Tensor:
    """L_simple = E || eps - eps_Q ||^2 as the mean over all elements (DDPM, eq. 14)."""
    return per_sample_mse(eps, eps_q).mean()


def nem_loss(eps_fp: Tensor, eps_q: Tensor) -> Tensor:
    """L_NeM = E || eps_FP - eps_Q ||^2 as the mean over all elements; no gradient reaches the teacher."""
    return per_sample_mse(eps_fp.detach(), eps_q).mean()


def student_errors(nem: NeMConfig, eps: Tensor | None, eps_fp: Tensor | None, eps_q: Tensor) -> Tensor:
    """What `student_loss` averages: one value for each sample, (B,). Arguments and errors as there."""
    if nem.mode == "off":
        return per_sample_mse(_needed("eps", eps, nem), eps_q)
    mimicking = per_sample_mse(_needed("eps_fp", eps_fp, nem).detach(), eps_q)
    if nem.mode == "replace":
        return mimicking
    return per_sample_mse(_needed("eps", eps, nem), eps_q) + nem.weight * mimicking


def student_loss(nem: NeMConfig, eps: Tensor | None, eps_fp: Tensor | None, eps_q: Tensor) -> Tensor:
    """The student's training loss: `off` L_simple, `replace` L_NeM, `add` L_simple + lambda L_NeM.

    Args:
        nem: mode, and lambda as `weight`.
        eps: true noise; None where the mode does not read it (`replace`).
        eps_fp: the teacher's estimate; None where the mode does not read it (`off`).
        eps_q: the student's estimate.

    Raises:
        ValueError: the mode reads a tensor that is None.
    """
    return student_errors(nem, eps, eps_fp, eps_q).mean()


def _needed(name: str, value: Tensor | None, nem: NeMConfig) -> Tensor:
    if value is None:
        raise ValueError(f"nem.mode={nem.mode} needs {name}, which is None")
    return value
