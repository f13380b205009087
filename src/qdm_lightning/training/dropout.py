"""Dropout whose mask belongs to a sample's place in the step's whole batch, not to the process that computes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdm_lightning.base.ranks import training_rank


class WholeBatchDropout(nn.Dropout):
    """`nn.Dropout`, but each of several ranks draws the mask of the whole batch, from the same seed, and takes its share."""

    def forward(self, x: Tensor) -> Tensor:
        rank, ranks = training_rank()
        if ranks == 1 or not self.training or not self.p:
            return super().forward(x)
        whole = torch.ones_like(torch.cat([x.detach()] * ranks))
        return x * F.dropout(whole, self.p)[rank * len(x) : (rank + 1) * len(x)]


def share_dropout(network: nn.Module) -> None:
    """Let every `nn.Dropout` of a network be a `WholeBatchDropout`."""
    for module in network.modules():
        if type(module) is nn.Dropout:
            module.__class__ = WholeBatchDropout
