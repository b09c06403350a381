"""Speculation: cheap guesses of the next tokens, checked by the model in one call. A right guess is a token for free.

The guess is by the model's own multi-token prediction module (V3 section 5.4.3): from the hidden state h_i that chose
token t_{i+1}, and t_{i+1} itself, it guesses t_{i+2}. The model then reads t_{i+1} and the guess together, and its
logits after t_{i+1} say whether the guess stands. Reading two tokens costs hardly more than reading one, because it is
the weights that have to be fetched.

Nothing is lost: greedily, a guess stands if it is the token the model would have chosen. When sampling, a guess x drawn
from q stands with probability min(1, p(x)/q(x)), and where it falls the token is drawn from max(p - q, 0); together
that is a draw from p (arXiv 2211.17192, section 2.3).

More than one guess comes from feeding the module its own output and guess (as vLLM and SGLang do). Only the first of a
model's modules guesses; every published model has one.

The module attends over its own layer of the cache, row i made from h_i and t_{i+1}. Rows made from guesses are written
over, before anything looks at them, by the rows of the tokens that came out.

  B sequences, T tokens that came out of the last step, K guesses, D model dim, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minga.engine.compiled import CompiledModel
from minga.engine.sampler import distribution, sample, uniform
from minga.engine.sequence import Sequence
from minga.model.cache import Cache
from minga.model.transformer import Transformer


@dataclass(frozen=True)
class Draft:
    """K guesses for each sequence, and what each was drawn from: (K, V), None for a greedy sequence."""

    ids_BK: Tensor
    probs: list[Tensor | None]


class Payoff:
    """Remembers for waves of about one size whether guessing made them faster. Where it did not, it is tried again ever more
    rarely: reading several tokens wakes more experts, and a batch that keeps the processor busy leaves nothing to gain.
    """

    def __init__(self) -> None:
        self._left: dict[int, int] = {}  # waves to go without, by the number of bits of a wave's size
        self._losses: dict[int, int] = {}  # in a row

    def worth_a_try(self, batch: int) -> bool:
        size = batch.bit_length()
        self._left[size] = self._left.get(size, 0) - 1
        return self._left[size] < 0

    def note(self, batch: int, *, paid: bool) -> None:
        size = batch.bit_length()
        self._losses[size] = 0 if paid else self._losses.get(size, 0) + 1
        self._left[size] = 0 if paid else min(2 ** self._losses[size], 64)


def no_draft(model: Transformer | CompiledModel, batch: int) -> Draft:
    return Draft(torch.empty(batch, 0, dtype=torch.long, device=model.device), [None] * batch)


def propose(
    model: Transformer | CompiledModel,
    cache: Cache,
    sequences: list[Sequence],
    new_ids: list[list[int]],
    hidden_BTD: Tensor,
    num_drafts: int,
) -> Draft:
    """Guesses what follows each sequence. `new_ids` are its latest tokens, `hidden_BTD` the states that chose them.

    Their rows enter the module's cache first: row i from the state at i and the token at i + 1.
    """
    rows = torch.arange(len(sequences), device=model.device)
    num_new_B = torch.tensor([len(new) for new in new_ids], device=model.device)
    first_B = torch.tensor([sequence.length - 1 for sequence in sequences], device=model.device) - num_new_B
    width = max(len(new) for new in new_ids)
    new_BT = torch.tensor([new + [0] * (width - len(new)) for new in new_ids], device=model.device)
    positions_BT = first_B[:, None] + torch.arange(width, device=model.device)
    out_BTD = model.mtp_hidden(0, new_BT, hidden_BTD[:, :width], cache=cache, positions_BT=positions_BT)
    state_B1D, position_B1 = out_BTD[rows, num_new_B - 1][:, None], (first_B + num_new_B - 1)[:, None]

    guesses = [_guess(model.head(state_B1D)[:, 0], sequences)]
    while len(guesses) < num_drafts:
        position_B1 = position_B1 + 1
        state_B1D = model.mtp_hidden(0, guesses[-1][0][:, None], state_B1D, cache=cache, positions_BT=position_B1)
        guesses.append(_guess(model.head(state_B1D)[:, 0], sequences))
    ids, probs = zip(*guesses, strict=True)
    return Draft(torch.stack(ids, 1), [_stack(row) for row in zip(*probs, strict=True)])


def _guess(logits_BV: Tensor, sequences: list[Sequence]) -> tuple[Tensor, list[Tensor | None]]:
    """One token for each sequence, and the probabilities it was drawn from; None for a greedy sequence."""
    ids_B = logits_BV.argmax(-1)
    probs: list[Tensor | None] = [None] * len(sequences)
    for row, sequence in enumerate(sequences):
        if not sequence.params.greedy:
            probs[row] = probs_V = distribution(logits_BV[row], sequence.params)
            ids_B[row] = sample(probs_V, sequence.generator)
    return ids_B, probs


def _stack(probs: tuple[Tensor | None, ...]) -> Tensor | None:
    return None if probs[0] is None else torch.stack([p for p in probs if p is not None])


def verify_greedy(draft: list[int], best: list[int]) -> list[int]:
    """The guesses up to the first that is not the model's own choice, then that choice: 1 to K + 1 tokens."""
    num_right = 0
    while num_right < len(draft) and draft[num_right] == best[num_right]:
        num_right += 1
    return best[: num_right + 1]


def verify(draft: list[int], q_KV: Tensor | None, p_TV: Tensor, generator: torch.Generator) -> list[int]:
    """1 to K + 1 tokens that follow the law of `p_TV` (T = K + 1), given guesses drawn from `q_KV`."""
    for index, guess in enumerate(draft):
        assert q_KV is not None
        p_V, q_V = p_TV[index], q_KV[index]
        if uniform(generator) * float(q_V[guess]) >= float(p_V[guess]):
            residual_V = (p_V - q_V).clamp(min=0)
            # all zero only if p = q but for rounding: then p itself is the law
            return [*draft[:index], sample(residual_V if residual_V.any() else p_V, generator)]
    return [*draft, sample(p_TV[-1], generator)]
