"""Inference scaling: several answers to one prompt, of which one is given.

The answers share the prompt in the cache. Three ways to choose: the majority of what the answers come to (self-consistency,
arXiv 2203.11171), the answer that the model itself finds likeliest, or the first that a verifier takes. With `early_stop`
nothing is spent on what cannot change the choice: a majority that the rest cannot overturn, a verified answer; and of
`best_of`, an answer is given up once a stretch of it is less likely than the worst stretch of those that are finished was
(the confidence of groups of tokens: DeepConf, arXiv 2508.15260).
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from minga.engine.grammar import Pattern
from minga.serve.generation import Event, Outcome, Scaling

_WARM_UP = 2  # finished answers, before any is given up
_GROUP = 32  # tokens of a stretch
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_MARKED = re.compile(r"(?:####|[Aa]nswer(?: is)?:?|[Rr]espuesta(?: es)?:?)\s*([^\n]+)")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def extracted(text: str) -> str:
    """What an answer comes to: what it boxes, what it calls its answer, its last number, or all of it."""
    for pattern in (_BOXED, _MARKED):
        if found := pattern.findall(text):
            numbers = _NUMBER.findall(found[-1])
            return _plain(numbers[-1] if numbers else found[-1])
    numbers = _NUMBER.findall(text)
    return _plain(numbers[-1] if numbers else text)


def _plain(result: str) -> str:
    result = " ".join(result.casefold().split()).strip(" .!*$")
    return result.replace(",", "") if _NUMBER.fullmatch(result) else result


@lru_cache(maxsize=64)
def compiled(verifier: str) -> Pattern:
    """Raises `UserError` where it does not compile."""
    return Pattern(verifier)


@dataclass(eq=False)
class Candidate:
    """An answer under way. `outcome` collects it; `events` are told if it is chosen."""

    outcome: Outcome
    events: list[Event] = field(default_factory=list)
    num_tokens: int = 0
    total_logprob: float = 0.0
    worst_group: float = 0.0  # mean log-probability of its least likely stretch
    finished: bool = False
    verified: bool | None = None  # once it is finished and was looked at
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_GROUP))

    @property
    def text(self) -> str:
        return self.outcome.choices[0].text

    @property
    def mean_logprob(self) -> float:
        return self.total_logprob / max(1, self.num_tokens)

    def take(self, logprobs: Sequence[float], num_tokens: int) -> None:
        self.num_tokens += num_tokens
        for logprob in logprobs:
            self.total_logprob += logprob
            self.recent.append(logprob)
            if len(self.recent) == _GROUP:
                self.worst_group = min(self.worst_group, sum(self.recent) / _GROUP)


class Trial:
    """The candidates of one request."""

    def __init__(self, scaling: Scaling, candidates: Sequence[Candidate]):
        self._scaling, self.candidates = scaling, candidates
        self._verifier = None if scaling.verifier is None else compiled(scaling.verifier)

    @property
    def num_tokens(self) -> int:
        return sum(candidate.num_tokens for candidate in self.candidates)

    def hopeless(self, candidate: Candidate) -> bool:
        """Whether it is not worth going on with."""
        if self._scaling.method != "best_of" or not self._scaling.early_stop or candidate.finished:
            return False
        done = [each.worst_group for each in self.candidates if each.finished]
        return len(done) >= _WARM_UP and candidate.worst_group < min(done)

    @property
    def decided(self) -> bool:
        """Whether what is still to come cannot matter, or may not be spent."""
        if self._scaling.max_total_tokens is not None and self.num_tokens >= self._scaling.max_total_tokens:
            return True
        done = [candidate for candidate in self.candidates if candidate.finished]
        if len(done) == len(self.candidates):
            return True
        if not self._scaling.early_stop or not done:
            return False
        if self._verifier is not None:
            return any(self._is_right(candidate) for candidate in done)
        if self._scaling.method == "majority":
            (_, most), *others = self._votes(done).most_common(2)
            return most > len(self.candidates) - len(done) + (others[0][1] if others else 0)
        return False

    def winner(self) -> Candidate:
        """Of the finished ones, if there are any."""
        done = [each for each in self.candidates if each.finished] or [
            max(self.candidates, key=lambda each: each.num_tokens)
        ]
        if self._scaling.method == "best_of":
            return max(done, key=lambda candidate: candidate.mean_logprob)
        right = [candidate for candidate in done if self._verifier is not None and self._is_right(candidate)]
        if right:
            return right[0]
        best, _ = self._votes(done).most_common(1)[0]
        return next(candidate for candidate in done if extracted(candidate.text) == best)

    def document(self) -> dict[str, Any]:
        """How the choice was made, and what it took."""
        done, winner = [candidate for candidate in self.candidates if candidate.finished], self.winner()
        document: dict[str, Any] = {
            "method": self._scaling.method,
            "n": len(self.candidates),
            "finished": len(done),
            "chosen": self.candidates.index(winner),
            "total_tokens": self.num_tokens,
        }
        if self._scaling.method == "best_of":
            document["mean_logprobs"] = [round(candidate.mean_logprob, 6) for candidate in self.candidates]
        else:
            document["votes"] = dict(self._votes(done).most_common(16))
        if self._verifier is not None:
            document["verified"] = self._is_right(winner)
        return document

    def _votes(self, done: Sequence[Candidate]) -> Counter[str]:
        return Counter(extracted(candidate.text)[:200] for candidate in done)

    def _is_right(self, candidate: Candidate) -> bool:
        if candidate.verified is None and self._verifier is not None:
            candidate.verified = self._verifier.found_in(candidate.text)
        return bool(candidate.verified)
