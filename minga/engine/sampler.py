"""Choosing the next token: logits become one distribution, and a race draws from it.

Every token of the vocabulary gets an exponential number that depends on the seed, the position and the token alone, and
the token wins whose weight over its number is largest; that it does with a probability in proportion to its weight (the
Gumbel-max trick, arXiv 1611.01144). So a seed's text is a function of the model and the prompt: not of what runs beside
it, not of a pause, and not of guesses, which stand if the race of the same position gives them (arXiv 2408.07978).

`distribution` is where temperature and the three cuts are applied, after `adjust` has applied penalties and biases.
`minga_net_choose` in kernels/cpu/net.cpp is the fast form of both and of the race.

  T positions of one sequence, V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minga.engine.grammar import Grammar, Thinking
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
    presence_penalty, frequency_penalty: taken from the logit of a token that the answer has, once, and for each time it
    has it (as OpenAI). repetition_penalty: divides the logit, or multiplies it if negative, of what prompt or answer have
    (arXiv 1909.05858). logit_bias: added to the logits of these tokens.
    grammar: what the answer must look like; thinking: how its thoughts are marked, and how long they may be. watermark: the
    secret number with which the draws are marked (minga/engine/watermark.py).
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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None
    thinking: Thinking | None = None
    watermark: int | None = None

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
        if self.watermark is not None:
            _check_whole("watermark", self.watermark, 0)
        _check_number("presence_penalty", self.presence_penalty, -1e3, 1e3)
        _check_number("frequency_penalty", self.frequency_penalty, -1e3, 1e3)
        _check_number("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        for token, bias in self.logit_bias.items():
            _check_whole("a token of logit_bias", token, 0)
            _check_number(f"logit_bias of token {token}", bias, -1e3, 1e3)
        object.__setattr__(self, "stop", _stop_strings(self.stop))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed by what was said before, or by a bias."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalties or self.logit_bias)


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


def adjust(logits_TV: Tensor, params: SamplingParams, prompt: list[int], answer: list[int], draft: list[int]) -> Tensor:
    """The logits after penalties and biases, a copy. Row t is what follows the answer and the first t guesses."""
    logits_TV = logits_TV.clone()
    for row, logits_V in enumerate(logits_TV):
        said = answer + draft[:row]
        if params.repetition_penalty != 1:
            seen = logits_V.new_tensor(sorted({*prompt, *said}), dtype=torch.long)
            old, factor = logits_V[seen], params.repetition_penalty
            logits_V[seen] = torch.where(old > 0, old / factor, old * factor)
        if said and (params.presence_penalty or params.frequency_penalty):
            tokens, counts = logits_V.new_tensor(said, dtype=torch.long).unique(return_counts=True)
            logits_V[tokens] -= params.presence_penalty + params.frequency_penalty * counts.to(logits_V.dtype)
        for token, bias in params.logit_bias.items():
            if token < len(logits_V):
                logits_V[token] += bias
    return logits_TV


def masked(logits_TV: Tensor, words_TW: Tensor) -> Tensor:
    """Minus infinity for tokens that may not be taken: bit b of word w, an int32, is 1 for a token 32 w + b that may."""
    T, V = logits_TV.shape
    bits_TWB = words_TW.to(logits_TV.device)[..., None] >> torch.arange(32, device=logits_TV.device) & 1
    return logits_TV.masked_fill(bits_TWB.view(T, -1)[:, :V] == 0, -torch.inf)


def choose(logits_TV: Tensor, params: SamplingParams, draws: Sequence[tuple[int, int]]) -> list[int]:
    """The tokens that the rows give; draws: seed and place of the race of each."""
    best = logits_TV.amax(-1)
    if bool(best.isnan().any()):
        raise not_numbers()
    if params.greedy:
        return [int(token) for token in logits_TV.argmax(-1).tolist()]
    weights_TV = distribution(logits_TV, params)
    return [race(weights_V, *draw) for weights_V, draw in zip(weights_TV, draws, strict=True)]


def not_numbers() -> UserError:
    return UserError("the model's logits are not numbers (sampling). its weights are damaged, or training diverged")


def race(weights_V: Tensor, seed: int, position: int) -> int:
    """A token with probability in proportion to its weight, which need not sum to 1: a function of seed and position."""
    tokens = weights_V.nonzero().squeeze(-1)
    return int(tokens[(weights_V[tokens].double() / exponentials(tokens, seed, position)).argmax()])


def exponentials(tokens: Tensor, seed: int, position: int) -> Tensor:
    """The numbers of these tokens in the race of a place, float64."""
    key = _draw_key(seed, position)
    h = _mix((tokens * 0x9E3779B1 & _WORD) ^ (key & _WORD))
    h = _mix(h + (key >> 32) & _WORD)
    return -torch.log1p(-(h.double() + 0.5) / 2**32)


_WORD = 0xFFFFFFFF


def _draw_key(seed: int, position: int) -> int:
    """64 bits: two rounds of splitmix64."""
    z = seed * 0x9E3779B97F4A7C15 + position + 1
    for _ in range(2):
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
    return z


def _mix(h: Tensor) -> Tensor:
    """The end of MurmurHash3, on 32-bit words held in int64."""
    h = (h ^ h >> 16) * 0x85EBCA6B & _WORD
    h = (h ^ h >> 13) * 0xC2B2AE35 & _WORD
    return h ^ h >> 16


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
