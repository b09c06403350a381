"""Losses as pure functions of tensors.

B batch, T tokens, V vocabulary, N = B·T tokens, E experts, A active experts a token
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minga.data.packing import MASKED
from minga.kernels import ops
from minga.model.transformer import Transformer


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, *, reduction: str = "mean") -> Tensor:
    """Nats per counted token ("mean") or in all ("sum"). A batch with nothing to count gives 0, not NaN."""
    total = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=MASKED, reduction="sum")
    return total if reduction == "sum" else total / (targets_BT != MASKED).sum().clamp(min=1)


def head_loss(model: Transformer, hidden_BTD: Tensor, targets_BT: Tensor, *, precision: str = "float32") -> Tensor:
    """`cross_entropy` of the head's logits, in nats a counted token, without ever holding all logits."""
    rows = (hidden_BTD.flatten(0, 1), model.head_weight, targets_BT.flatten())
    return ops.linear_cross_entropy(*rows, precision=precision) / (targets_BT != MASKED).sum().clamp(min=1)


def sequence_balance(index_NA: Tensor, score_NE: Tensor, batch_size: int) -> Tensor:
    """Sequence-wise balance loss of one layer (V3 section 2.1.2, equations 17-20), without its weight alpha.

    sum_i f_i P_i, with f_i the share of a sequence's tokens that chose expert i (times E/A, so 1 is even) and P_i its
    mean normalised score; averaged over sequences. 1.0 is perfect balance.
    """
    experts, active = score_NE.shape[1], index_NA.shape[1]
    chosen_NE = torch.zeros_like(score_NE).scatter_(1, index_NA, 1.0)
    f_BE = chosen_NE.view(batch_size, -1, experts).mean(1) * experts / active
    share_NE = score_NE / score_NE.sum(-1, keepdim=True)
    return (f_BE * share_NE.view(batch_size, -1, experts).mean(1)).sum(-1).mean()


def router_z(logits_NE: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 of one router (ST-MoE, arXiv 2202.08906, equation 5), without its weight.

    It keeps a router's logits small, whose rounding errors grow with them. It reads the logits, so it is the same for
    routers that score by sigmoid, where it draws large logits towards the sigmoid's slope.
    """
    return torch.logsumexp(logits_NE, -1).square().mean()
