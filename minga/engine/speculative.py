"""Speculation: cheap guesses of the next tokens, checked by the model in one call. A right guess is a token for free.

The guess is by the model's own multi-token prediction module (V3 section 5.4.3): from the hidden state h_i that chose
token t_{i+1}, and t_{i+1} itself, it guesses t_{i+2}. The model then reads t_{i+1} and the guess together, and its
logits after t_{i+1} say whether the guess stands. Reading two tokens costs hardly more than reading one where it is the
weights that have to be fetched.

Nothing is lost: a guess stands if it is the token that the model chooses itself in that place, greedily or in the race of
that place (minga/engine/sampler.py). So the text is the same to the token with guesses, without, and with others. The
module runs the same race with its own weights, which makes both choose alike where their weights are alike: the guess
stands with a probability of at least (1 - d) / (1 + d) for laws at a distance d (arXiv 2408.07978, theorem 2); the rejection
rule of arXiv 2211.17192 reaches 1 - d, but its text depends on the guesses.

More than one guess comes from feeding the module its own output and guess (as vLLM and SGLang do). Only the first of a
model's modules guesses; every published model has one. A model without one, or one whose guesses do not pay, still has
the text: minga/engine/lookup.py.

The module attends over its own layer of the cache, row i made from h_i and t_{i+1}. Rows made from guesses are written
over, before anything looks at them, by the rows of the tokens that came out.

  N tokens that came out of the last step, all sequences together, K guesses, D model dim
"""

from __future__ import annotations

import torch

from minga.engine.compiled import CompiledModel
from minga.engine.plain import PlainModel, Tokens
from minga.engine.scheduler import Entry
from minga.model.cache import Cache


def propose(model: PlainModel | CompiledModel, cache: Cache, entries: list[Entry], num_drafts: int) -> list[list[int]]:
    """Guesses what follows each text. Its latest tokens' rows enter the module's cache first: row i from the state at i
    and the token at i + 1.
    """
    parts: list[tuple[list[int], int, int]] = []
    last: list[int] = []
    for entry in entries:
        count = len(entry.new_ids)
        parts.append((entry.new_ids, entry.sequence.length - 1 - count, entry.row))
        last.append((last[-1] if last else -1) + count)
    hidden_ND = torch.cat([entry.state_TD[: len(entry.new_ids)] for entry in entries])
    state_BD = model.mtp_hidden(Tokens.of(parts), hidden_ND, cache)[last]
    guesses: list[list[int]] = [[] for _ in entries]
    while True:
        logits_BV = model.head(state_BD)
        place = len(guesses[0])
        each = [(e.sequence.params, e.draws(guess)[-1:]) for e, guess in zip(entries, guesses, strict=True)]
        rows = [
            entry.adjusted(logits_V[None], guess)
            for entry, logits_V, guess in zip(entries, logits_BV, guesses, strict=True)
        ]
        allowed = [entry.allowed(guess, 1) for entry, guess in zip(entries, guesses, strict=True)]
        for guess, chosen in zip(guesses, model.choose(rows, each, allowed), strict=True):
            guess += chosen
        if place + 1 == num_drafts:
            return guesses
        latest = [(guess[-1:], e.sequence.length - 1 + place, e.row) for guess, e in zip(guesses, entries, strict=True)]
        state_BD = model.mtp_hidden(Tokens.of(latest), state_BD, cache)


def accepted(draft: list[int], chosen: list[int]) -> list[int]:
    """The guesses up to the first that is not the model's own choice, then that choice: 1 to K + 1 tokens."""
    num_right = 0
    while num_right < len(draft) and draft[num_right] == chosen[num_right]:
        num_right += 1
    return chosen[: num_right + 1]
