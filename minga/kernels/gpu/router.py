"""From a router's logits to the chosen experts and their weights, in one pass over each token's row.

N tokens, E experts, A active experts a token, Q groups
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _route(
    logits_ptr,
    bias_ptr,
    index_ptr,
    weight_ptr,
    score_ptr,
    E,
    scale,
    ACTIVE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """One token. Experts lie in a tile of BLOCK_Q groups × BLOCK_G members, both filled up to powers of two."""
    token = tl.program_id(0).to(tl.int64)
    group_size = E // GROUPS
    group_Q, member_G = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_G)
    expert_QG = group_Q[:, None] * group_size + member_G[None, :]
    there_QG = (group_Q < GROUPS)[:, None] & (member_G < group_size)[None, :]
    logits_QG = tl.load(logits_ptr + token * E + expert_QG, mask=there_QG, other=float("-inf"))
    if SIGMOID:
        score_QG = tl.sigmoid(logits_QG)
    else:
        power_QG = tl.exp(logits_QG - tl.max(tl.max(logits_QG, 1), 0))
        score_QG = power_QG / tl.sum(tl.sum(power_QG, 1), 0)
    tl.store(score_ptr + token * E + expert_QG, score_QG, mask=there_QG)

    choice_QG = score_QG
    if BIASED:
        choice_QG += tl.load(bias_ptr + expert_QG, mask=there_QG, other=0.0)
    # NaN is chosen, as torch does, and so is seen later
    choice_QG = tl.where(choice_QG == choice_QG, choice_QG, float("inf"))
    choice_QG = tl.where(there_QG, choice_QG, float("-inf"))
    if GROUPS > KEPT:
        group_score_Q = tl.max(choice_QG, 1)
        if GROUP_TOP == 2:
            best_Q = tl.argmax(choice_QG, 1)
            group_score_Q += tl.max(tl.where(member_G[None, :] == best_Q[:, None], float("-inf"), choice_QG), 1)
        group_score_Q = tl.where(group_Q < GROUPS, group_score_Q, float("-inf"))
        kept_Q = tl.zeros((BLOCK_Q,), tl.int1)
        for _ in tl.static_range(KEPT):
            best = tl.argmax(group_score_Q, 0)
            kept_Q = kept_Q | (group_Q == best)
            group_score_Q = tl.where(group_Q == best, float("-inf"), group_score_Q)
        choice_QG = tl.where(kept_Q[:, None], choice_QG, float("-inf"))

    choice_P = tl.reshape(choice_QG, (BLOCK_Q * BLOCK_G,))
    score_P = tl.reshape(score_QG, (BLOCK_Q * BLOCK_G,))
    expert_P = tl.reshape(expert_QG, (BLOCK_Q * BLOCK_G,))
    place_P, place_A = tl.arange(0, BLOCK_Q * BLOCK_G), tl.arange(0, BLOCK_A)
    index_A = tl.zeros((BLOCK_A,), tl.int32)
    weight_A = tl.zeros((BLOCK_A,), tl.float32)
    for turn in tl.static_range(ACTIVE):
        best = tl.argmax(choice_P, 0)
        index_A = tl.where(place_A == turn, tl.sum(tl.where(place_P == best, expert_P, 0), 0), index_A)
        weight_A = tl.where(place_A == turn, tl.sum(tl.where(place_P == best, score_P, 0.0), 0), weight_A)
        choice_P = tl.where(place_P == best, float("-inf"), choice_P)
    if NORMALIZE:
        weight_A = weight_A / (tl.sum(weight_A, 0) + 1e-20)
    valid_A = place_A < ACTIVE
    tl.store(index_ptr + token * ACTIVE + place_A, index_A, mask=valid_A)
    tl.store(weight_ptr + token * ACTIVE + place_A, weight_A * scale, mask=valid_A)


def route(
    logits_NE: Tensor,
    bias_E: Tensor | None,
    *,
    num_active: int,
    sigmoid: bool,
    num_groups: int,
    groups_kept: int,
    group_top: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.route`. Chosen experts come best first; of equal ones the first is taken."""
    N, E = logits_NE.shape
    index_NA = torch.empty(N, num_active, dtype=torch.int64, device=logits_NE.device)
    weight_NA, score_NE = torch.empty_like(index_NA, dtype=torch.float32), torch.empty_like(logits_NE)
    if N:
        _route[(N,)](
            *(logits_NE.contiguous(), logits_NE if bias_E is None else bias_E, index_NA, weight_NA, score_NE, E, scale),
            ACTIVE=num_active,
            GROUPS=num_groups,
            KEPT=groups_kept,
            GROUP_TOP=group_top,
            SIGMOID=sigmoid,
            BIASED=bias_E is not None,
            NORMALIZE=normalize,
            BLOCK_Q=triton.next_power_of_2(num_groups),
            BLOCK_G=triton.next_power_of_2(E // num_groups),
            BLOCK_A=triton.next_power_of_2(num_active),
            num_warps=1,
        )
    return index_NA, weight_NA, score_NE
