"""Judging what people write and what models answer: guards that can be exchanged, and a stream that is never taken back.

A guard is anything with a name that scores a text in categories. `RuleGuard` is the one that is always there: the small
classifier and the rules of `minga.data.harm`. `ModelGuard` asks a guard model such as Qwen3Guard or Llama Guard, for
which any object serves that can chat. `judge` makes a verdict of the scores; `StreamGuard` lets an answer through piece
by piece, some characters behind, so that what it holds back can still be withheld when the words that follow show what
it was.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from minga.data.harm import CATEGORIES, THRESHOLD, HarmClassifier
from minga.errors import UserError

WINDOW, OVERLAP = 1200, 300  # characters; a classifier of a long text no longer sees its one bad sentence
_LONGEST_WORD = 32  # a cut is put back to the last white space, unless there is none this near


class Guard(Protocol):
    """Must give the same scores for the same text; categories that it leaves out score 0."""

    @property
    def name(self) -> str: ...

    def scores(self, text: str) -> dict[str, float]:
        """Category -> [0, 1]."""
        ...


@dataclass(frozen=True)
class Verdict:
    flagged: bool
    categories: dict[str, bool]
    scores: dict[str, float]


class RuleGuard:
    """The default: needs no model, reads a kilobyte in half a millisecond. `path`: weights of `minga guard train`."""

    def __init__(self, path: str | None = None):
        self._classifier = HarmClassifier.load() if path is None else HarmClassifier.load(path)
        self.name = "minga-rules"

    def scores(self, text: str) -> dict[str, float]:
        return self._classifier.scores(text)


class HasText(Protocol):
    @property
    def text(self) -> str: ...


class Chats(Protocol):
    """What `minga.LLM` is, among others."""

    def chat(self, messages: list[dict[str, str]], params: Any) -> HasText: ...


class ModelGuard:
    """A guard model that answers in Qwen3Guard-Gen's words or in Llama Guard's, with its own chat template.

    It says yes or no, so a category scores 0 or 1; what Qwen3Guard calls controversial scores `controversial`. A verdict
    without a category that is one of ours counts as "illicit", the widest. An answer in neither form raises `ValueError`:
    a guard that cannot be understood must not be taken for consent.
    """

    def __init__(self, model: Chats, params: Any = None, *, name: str = "model", controversial: float = THRESHOLD):
        self._model, self._params, self._controversial = model, params, controversial
        self._lock = threading.Lock()  # an engine answers one thread at a time
        self.name = name

    def scores(self, text: str) -> dict[str, float]:
        with self._lock:
            answer = self._model.chat([{"role": "user", "content": text}], self._params).text
        return parse_guard_answer(answer, controversial=self._controversial)


# Qwen3Guard's nine categories and Llama Guard 3's fourteen hazards, as OpenAI's categories. What has no counterpart
# (personal data, copyright, politics, specialised advice, jailbreaks, elections) counts as illicit.
_QWEN_CATEGORIES = {
    "violent": ("violence", "illicit/violent"),
    "non-violent illegal acts": ("illicit",),
    "sexual content or sexual acts": ("sexual",),
    "suicide & self-harm": ("self-harm",),
    "unethical acts": ("harassment", "hate"),
}
_LLAMA_CATEGORIES = {
    "S1": ("violence", "illicit/violent"),
    "S2": ("illicit",),
    "S3": ("sexual", "illicit"),
    "S4": ("sexual", "sexual/minors"),
    "S5": ("harassment",),
    "S9": ("illicit", "illicit/violent"),
    "S10": ("hate",),
    "S11": ("self-harm",),
    "S12": ("sexual",),
}


def parse_guard_answer(answer: str, *, controversial: float = THRESHOLD) -> dict[str, float]:
    """`Safety: Unsafe\\nCategories: Violent, ...` or `unsafe\\nS1,S2`, to scores in all categories."""
    qwen = re.search(r"^\s*Safety:\s*(Safe|Unsafe|Controversial)\b", answer, re.IGNORECASE | re.MULTILINE)
    llama = re.match(r"\s*(safe|unsafe)\b(?:\s*((?:S\d{1,2}[\s,]*)+))?\s*$", answer, re.IGNORECASE)
    if qwen:
        score = {"safe": 0.0, "unsafe": 1.0, "controversial": controversial}[qwen[1].lower()]
        listed = re.search(r"^\s*Categories:(.*)$", answer, re.IGNORECASE | re.MULTILINE)
        names = [name.strip().lower() for name in listed[1].split(",")] if listed else []
        found = [category for name in names for category in _QWEN_CATEGORIES.get(name, ())]
    elif llama:
        score = float(llama[1].lower() == "unsafe")
        codes = re.findall(r"S\d+", (llama[2] or "").upper())
        found = [category for code in codes for category in _LLAMA_CATEGORIES.get(code, ())]
    else:
        raise ValueError(f"the guard model's answer is in no known form: {answer[:80]!r}")
    return {category: score if category in (found or ["illicit"]) else 0.0 for category in CATEGORIES}


def judge(guard: Guard, text: str, *, threshold: float = THRESHOLD) -> Verdict:
    """Flagged where a category scores `threshold` or more. A long text is judged in windows that overlap, and the worst
    window counts."""
    scores = dict.fromkeys(CATEGORIES, 0.0)
    for start, end in _windows(text):
        for category, score in guard.scores(text[start:end]).items():
            scores[category] = max(scores.get(category, 0.0), score)
    categories = {category: score >= threshold for category, score in scores.items()}
    return Verdict(any(categories.values()), categories, scores)


def _windows(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    while len(text) - start > WINDOW:
        yield start, (end := _cut(text, start + WINDOW))
        start = _cut(text, end - OVERLAP)
    yield start, len(text)


def _cut(text: str, at: int) -> int:
    """`at`, or the end of the last white space a few characters before it: half a word can be another word."""
    for place in range(at, max(at - _LONGEST_WORD, 0), -1):
        if text[place - 1].isspace():
            return place
    return max(at, 0)


class StreamGuard:
    """Lets a stream through after it was judged. `push` gives what may be shown now, `close` the rest.

    Each time `every` more characters have come, all that is held back is judged as one text; if it passes, all but its
    last `hold` characters are let go. So a passage of up to `hold` less a word is always judged whole before a letter of
    it is shown, and where a judgement flags, nothing that it read has been shown. From then on `blocked` is the verdict
    and nothing more comes out. Judgements take place at fixed places of the text: how it is cut into pushes changes
    nothing.

    `context` stands before the stream, such as the answer that it continues: it is judged with the stream's beginning
    and never comes out. A larger `hold` catches what is said at more length, and delays the first word by as much.
    """

    def __init__(
        self, guard: Guard, *, context: str = "", hold: int = 256, every: int = 64, threshold: float = THRESHOLD
    ):
        if hold < 0 or every < 1:
            raise UserError(f"hold is {hold} and every is {every} (moderation). hold is 0 or more, every 1 or more")
        self._guard, self._hold, self._every, self._threshold = guard, hold, every, threshold
        self._context = context[_cut(context, len(context) - hold) :] if hold else ""
        self._held = ""  # has come and was not let go
        self._checked = 0  # characters of `_held` up to the last place of judgement
        self._closed = False
        self.blocked: Verdict | None = None

    def push(self, text: str) -> str:
        if self.blocked or self._closed:
            return ""
        self._held += text
        released = []
        while len(self._held) - self._checked >= self._every:
            self._checked += self._every
            judged = _cut(self._held, self._checked)
            if not self._passes(self._held[:judged]):
                break
            released.append(self._release(min(judged, _cut(self._held, self._checked - self._hold))))
        return "".join(released)

    def close(self) -> str:
        if self.blocked or self._closed or not self._passes(self._held):
            return ""
        self._closed = True
        return self._release(len(self._held))

    def _passes(self, text: str) -> bool:
        if not text:
            return True
        verdict = judge(self._guard, self._context + text, threshold=self._threshold)
        if verdict.flagged:
            self.blocked, self._held = verdict, ""
        return not verdict.flagged

    def _release(self, size: int) -> str:
        size = max(size, 0)
        text, self._held = self._held[:size], self._held[size:]
        self._checked -= size
        if text:
            self._context = ""
        return text
