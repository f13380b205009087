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


def student_errors(nem: NeMConfig, eps: Tensor, eps_fp: Tensor | None, eps_q: Tensor, weights: Tensor | None = None) -> Tensor:
    """The student's training loss before the mean over samples, (B,): `off` L_simple, `replace` L_NeM, `add` the sum.

    L_simple = E || eps - eps_Q ||^2 (DDPM, eq. 14), L_NeM = E w(t) || eps_FP - eps_Q ||^2, the sum L_simple + lambda L_NeM.
    No gradient reaches the teacher.

    Args:
        nem: mode, and lambda as `weight`.
        eps: true noise.
        eps_fp: the teacher's estimate; None where the mode does not read it (`off`).
        eps_q: the student's estimate.
        weights: w(t) of each sample, (B,); None stands for 1. L_simple takes none.

    Raises:
        ValueError: the mode reads `eps_fp`, which is None.
    """
    if nem.mode == "off":
        return per_sample_mse(eps, eps_q)
    if eps_fp is None:
        raise ValueError(f"nem.mode={nem.mode} needs eps_fp, which is None")
    mimicking = per_sample_mse(eps_fp.detach(), eps_q)
    mimicking = mimicking if weights is None else weights * mimicking
    return mimicking if nem.mode == "replace" else per_sample_mse(eps, eps_q) + nem.weight * mimicking
