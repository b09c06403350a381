"""Choosing the next token: logits become one distribution, and one uniform number draws from it.

`distribution` is the only place where temperature and the three cuts are applied. Plain decoding draws from it, and
speculation compares two of them, so both follow the same law by construction.

A sequence has its own generator and takes one number per draw, so what it says depends on its seed and never on which
other sequences run beside it.

  T positions of one sequence, V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minga.errors import UserError

MAX_SEED = 2**63 - 1
_FIRST_LOOK = 1024  # top-p: so many of the likeliest tokens nearly always hold the mass, which saves a full sort


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is drawn. Raises `UserError`, naming the field, for values that make no sense.

    temperature: 0 is greedy. top_p, top_k, min_p: cuts of unlikely tokens; 1, 0 and 0 leave them off.
    seed: None draws a fresh one. stop: strings that end the answer, themselves left out of the text.
    logprobs: None for none, else so many of the likeliest tokens besides the chosen one.
    ignore_eos: goes on past the end-of-text token until max_tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 64
    seed: int | None = None
    stop: Iterable[str] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0, 1e6)
        _check_number("top_p", self.top_p, 0, 1)
        _check_number("min_p", self.min_p, 0, 1)
        _check_whole("top_k", self.top_k, 0)
        _check_whole("max_tokens", self.max_tokens, 1)
        if self.top_p == 0:
            raise UserError("top_p is 0, which leaves no token (sampling). for the likeliest token set temperature 0")
        if self.seed is not None:
            _check_whole("seed", self.seed, 0)
        if self.logprobs is not None:
            _check_whole("logprobs", self.logprobs, 0)
        object.__setattr__(self, "stop", _stop_strings(self.stop))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class TokenLogprob(NamedTuple):
    """Log-probabilities in nats, of the model itself: before temperature and cuts. `top` is (id, logprob) pairs."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def distribution(logits_TV: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities, the shape of the logits: temperature, then min_p, top_k and top_p, each on what the last one left.

    Temperature 0 is all mass on the likeliest token. The order is vLLM's.
    """
    if params.greedy:
        return F.one_hot(logits_TV.argmax(-1), logits_TV.shape[-1]).to(logits_TV.dtype)
    # the largest logit becomes 0 first: divided by a tiny temperature it would overflow
    probs_TV = ((logits_TV - logits_TV.amax(-1, keepdim=True)) / params.temperature).softmax(-1)
    if params.min_p > 0:
        probs_TV = probs_TV.masked_fill(probs_TV < params.min_p * probs_TV.amax(-1, keepdim=True), 0)
    if 0 < params.top_k < probs_TV.shape[-1]:
        top = probs_TV.topk(params.top_k, -1)
        probs_TV = torch.zeros_like(probs_TV).scatter_(-1, top.indices, top.values)
    probs_TV = probs_TV / probs_TV.sum(-1, keepdim=True)
    return _cut_to_mass(probs_TV, params.top_p) if params.top_p < 1 else probs_TV


def _cut_to_mass(probs_TV: Tensor, mass: float) -> Tensor:
    """Keeps the fewest likeliest tokens that hold `mass` together (nucleus sampling, arXiv 1904.09751)."""
    vocabulary = probs_TV.shape[-1]
    top = probs_TV.topk(min(_FIRST_LOOK, vocabulary), -1)
    if bool((top.values.sum(-1) < mass).any()):
        top = probs_TV.topk(vocabulary, -1)
    mass_before = top.values.cumsum(-1) - top.values
    kept = top.values.masked_fill(mass_before >= mass, 0)
    return torch.zeros_like(probs_TV).scatter_(-1, top.indices, kept / kept.sum(-1, keepdim=True))


def uniform(generator: torch.Generator) -> float:
    """One number from [0, 1)."""
    return torch.rand((), dtype=torch.float64, generator=generator).item()


def sample(weights_V: Tensor, generator: torch.Generator) -> int:
    """A token with probability in proportion to its weight, which need not sum to 1."""
    cumulative_V = weights_V.double().cumsum(-1)
    token = int(torch.searchsorted(cumulative_V, uniform(generator) * cumulative_V[-1], right=True))
    if token == len(weights_V):
        raise UserError("the model's logits are not numbers (sampling). its weights are damaged, or training diverged")
    return token


def token_logprobs(logits_TV: Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprob]:
    """The log-probability of each chosen token, and of the `num_top` likeliest ones in its place."""
    logprob_TV = logits_TV[: len(token_ids)].log_softmax(-1)
    top = logprob_TV.topk(min(num_top, logits_TV.shape[-1]), -1)
    chosen = logprob_TV[range(len(token_ids)), token_ids].tolist()
    pairs = (tuple(zip(*row, strict=True)) for row in zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return [TokenLogprob(*entry) for entry in zip(token_ids, chosen, pairs, strict=True)]


# ---------------------------------------------------------------------------------------------- checks


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and low <= value <= high):
        raise UserError(f"{name} is {value!r} (sampling). it must be a number from {low:g} to {high:g}")


def _check_whole(name: str, value: Any, low: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole and low <= value <= MAX_SEED):
        raise UserError(f"{name} is {value!r} (sampling). it must be a whole number from {low} up")


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (stop,)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise UserError(f"stop holds {string!r} (sampling). each stop must be a text of one character or more")
    return strings
