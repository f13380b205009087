"""Q-attention: diffusers' self- or cross-attention with quantized q, k, v and probabilities."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdm_lightning.quantization.quantizer import ActivationQuantizer


def is_attention(module: nn.Module) -> bool:
    """True for diffusers' `Attention` and whatever else takes a processor as it does."""
    return all(hasattr(module, name) for name in ("to_q", "to_k", "to_v", "to_out", "set_processor", "heads"))


_PLAIN = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
"""diffusers' processors of plain attention, which `QuantizedAttention` may take the place of."""


def unsupported(module: nn.Module) -> str | None:
    """Why this attention can't be quantized faithfully, or None."""
    for name in ("spatial_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim"):
        if getattr(module, name, None):
            return f"its {name} is set"
    processor = type(getattr(module, "processor", None)).__name__
    return None if processor in _PLAIN else f"its processor is a {processor}"


class AttentionProcessor(nn.Module):
    """What diffusers' attention calls: all of it but `attended`, which a subclass writes."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As diffusers calls a processor; it reads the accepted arguments from this signature."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    def forward(self, attn: Any, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """Of x, (B, C, H, W) or (B, N, C), with keys and values of its own or of `context` (B, M, C'): what has x's shape."""
        batch, spatial = x.shape[0], x.shape[2:] if x.ndim == 4 else None
        if mask is not None:
            keys = context.shape[1] if context is not None else x.shape[1] if spatial is None else spatial.numel()
            mask = attn.prepare_attention_mask(mask, keys, batch)
            mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
        out = attn.to_out[1](attn.to_out[0](self.attended(attn, x, context, mask)))
        if spatial is not None:
            out = out.transpose(1, 2).reshape(batch, -1, *spatial)
        if attn.residual_connection:
            out = out + x
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor

    def attended(self, attn: Any, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """probs v, (B, N, heads d); `mask` is (B, heads, N or 1, M)."""
        raise NotImplementedError


class QuantizedAttention(AttentionProcessor):
    """An attention processor, probs = softmax(q_hat k_hat^T / sqrt(d)), out = probs_hat v_hat, with learned-step quantizers.

    Args:
        query, key, value: quantizers of the operands, (B, heads, N, d); None leaves one in float.
        probabilities: quantizer of the probabilities, (B, heads, N, N); None leaves them in float.
    """

    def __init__(
        self,
        query: ActivationQuantizer | None,
        key: ActivationQuantizer | None,
        value: ActivationQuantizer | None,
        probabilities: ActivationQuantizer | None,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.probabilities = query, key, value, probabilities

    def attended(self, attn: Any, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2).contiguous()  # once for q, k, v
        context = x if context is None else context
        q, k, v = (
            quantizer(heads) if quantizer is not None else heads
            for quantizer, heads in zip(
                (self.query, self.key, self.value),
                (
                    projection.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
                    for projection in (attn.to_q(x), attn.to_k(context), attn.to_v(context))
                ),
                strict=True,
            )
        )
        out = self._attend(q, k, v, mask)
        return out.transpose(1, 2).reshape(x.shape[0], -1, out.shape[1] * out.shape[3])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.probabilities is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        # One pass for product and factor; softmax in float32 under autocast too.
        unused = q.new_zeros(())
        scores = torch.baddbmm(unused, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=q.shape[-1] ** -0.5)
        scores = scores.view(*q.shape[:3], k.shape[2])
        if mask is not None:
            scores = scores + mask
        return self.probabilities(scores.float().softmax(dim=-1).to(v.dtype)) @ v
