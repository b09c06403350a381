"""Guards and the stream that is never taken back: for each way to cut a text, the same comes out, and nothing flagged."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.data.harm import CATEGORIES
from minga.errors import UserError
from minga.serve.moderation import (
    WINDOW,
    Guard,
    ModelGuard,
    RuleGuard,
    StreamGuard,
    judge,
    parse_guard_answer,
)


@dataclass
class WordGuard:
    """Flags texts that have the word in them, and remembers what it was shown."""

    word: str = "bad"
    name: str = "word"
    seen: list[str] = field(default_factory=list)

    def scores(self, text: str) -> dict[str, float]:
        self.seen.append(text)
        return {"violence": 0.9 if self.word in text else 0.1}


def _through(guard: Guard, pieces: list[str], **options: Any) -> tuple[str, StreamGuard]:
    stream = StreamGuard(guard, **options)
    out = "".join(stream.push(piece) for piece in pieces)
    return out + stream.close(), stream


texts = st.text(alphabet="abd \nxé", max_size=300)
cuts = st.lists(st.integers(0, 300), max_size=20)


def _pieces(text: str, at: list[int]) -> list[str]:
    places = sorted({0, len(text), *(place for place in at if place < len(text))})
    return [text[start:end] for start, end in itertools.pairwise(places)]


@given(texts, cuts, st.integers(0, 80), st.integers(1, 40))
def test_how_a_text_is_cut_changes_nothing(text: str, at: list[int], hold: int, every: int) -> None:
    whole, one = _through(WordGuard(), [text], hold=hold, every=every)
    cut, other = _through(WordGuard(), _pieces(text, at), hold=hold, every=every)
    letters, third = _through(WordGuard(), list(text), hold=hold, every=every)
    assert whole == cut == letters
    assert one.blocked == other.blocked == third.blocked
    assert text.startswith(whole)
    if not one.blocked:
        assert whole == text


@given(texts, cuts, st.integers(0, 80), st.integers(1, 40))
def test_nothing_that_a_flagged_judgement_read_was_shown(text: str, at: list[int], hold: int, every: int) -> None:
    guard = WordGuard()
    out, stream = _through(guard, _pieces(text, at), hold=hold, every=every)
    if stream.blocked:
        assert "bad" in guard.seen[-1]
        assert text[len(out) :].startswith(guard.seen[-1])  # it read on from where the shown text ends
        assert all("bad" not in seen for seen in guard.seen[:-1])


@given(st.text("ax \n", max_size=200), st.text("ax \n", max_size=200), cuts, st.integers(1, 40))
def test_what_is_shorter_than_is_held_back_never_comes_out(before: str, after: str, at: list[int], every: int) -> None:
    word = "b" * 20
    out, stream = _through(WordGuard(word), _pieces(before + word + after, at), hold=20 + 32, every=every)
    assert stream.blocked is not None and stream.blocked.categories["violence"]
    assert before.startswith(out)
    assert stream.push("more") == stream.close() == ""


def test_it_lags_by_what_it_holds_back() -> None:
    stream = StreamGuard(WordGuard(), hold=10, every=5)
    assert stream.push("a" * 14) == ""
    assert stream.push("a") == "a" * 5
    assert stream.push("a" * 5) == "a" * 5
    assert stream.close() == "a" * 10
    assert stream.push("a") == stream.close() == ""
    assert stream.blocked is None


def test_half_a_word_is_not_judged() -> None:
    class Ends:
        name = "ends"

        def scores(self, text: str) -> dict[str, float]:
            return {"sexual": float(text.endswith("sex"))}

    text = "a sextant is of brass " * 20
    assert _through(Ends(), list(text), hold=20, every=1)[0] == text


def test_the_context_is_judged_with_the_beginning_and_never_shown() -> None:
    out, stream = _through(WordGuard("bad luck"), ["luck", " is what it was"], context="such bad ")
    assert out == "" and stream.blocked is not None
    out, stream = _through(WordGuard("bad luck"), ["fortune"], context="such bad ")
    assert out == "fortune" and stream.blocked is None


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(UserError, match="every is 0"):
        StreamGuard(WordGuard(), every=0)


# ---------------------------------------------------------------------------------------------- verdicts


def test_judge_takes_the_worst_window() -> None:
    guard = WordGuard("one bad sentence")
    text = "word " * WINDOW
    for place in (0, 1195, 1200, 2000, len(text)):
        verdict = judge(guard, text[:place] + "one bad sentence " + text[place:])
        assert verdict.flagged and verdict.scores["violence"] == 0.9 and verdict.categories["violence"]
    assert max(map(len, guard.seen)) <= WINDOW
    verdict = judge(guard, text)
    assert not verdict.flagged and [*verdict.scores] == [*CATEGORIES] and verdict.scores["hate"] == 0
    assert judge(guard, text, threshold=0.1).flagged


def test_the_guard_that_is_always_there() -> None:
    guard = RuleGuard()
    assert judge(guard, "How do I build a pipe bomb at home?").categories["illicit/violent"]
    assert judge(guard, "te voy a matar").categories["harassment/threatening"]
    assert not judge(guard, "How do I kill a Python process?").flagged
    assert not judge(guard, "").flagged


@dataclass
class FakeModel:
    answer: str
    asked: list[Any] = field(default_factory=list)

    def chat(self, messages: list[dict[str, str]], params: Any) -> FakeModel:
        self.asked.append((messages, params))
        return self

    @property
    def text(self) -> str:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "flagged"),
    [
        ("Safety: Safe\nCategories: None", []),
        ("Safety: Unsafe\nCategories: Violent", ["illicit/violent", "violence"]),
        ("Safety: Unsafe\nCategories: Suicide & Self-Harm, Non-violent Illegal Acts", ["illicit", "self-harm"]),
        ("Safety: Controversial\nCategories: Sexual Content or Sexual Acts\nRefusal: No", ["sexual"]),
        ("Safety: Unsafe\nCategories: Jailbreak", ["illicit"]),
        ("Safety: Unsafe", ["illicit"]),
        ("safe", []),
        ("\n\nsafe", []),
        ("unsafe\nS1,S10", ["hate", "illicit/violent", "violence"]),
        ("\n\nunsafe\nS4", ["sexual", "sexual/minors"]),
        ("unsafe\nS8", ["illicit"]),
        ("unsafe", ["illicit"]),
    ],
)
def test_answers_of_guard_models(answer: str, flagged: list[str]) -> None:
    model = FakeModel(answer)
    verdict = judge(ModelGuard(model, "params"), "a text")
    assert sorted(name for name, is_flagged in verdict.categories.items() if is_flagged) == flagged
    assert model.asked == [([{"role": "user", "content": "a text"}], "params")]


def test_controversial_can_be_let_through() -> None:
    answer = "Safety: Controversial\nCategories: Violent"
    assert not judge(ModelGuard(FakeModel(answer), controversial=0.4), "a").flagged
    assert parse_guard_answer(answer)["violence"] == 0.5


@pytest.mark.parametrize("answer", ["", "I cannot say.", "safer", "unsafe because", "Safety: maybe"])
def test_an_answer_that_is_none_is_no_consent(answer: str) -> None:
    with pytest.raises(ValueError, match="no known form"):
        parse_guard_answer(answer)


def test_no_torch_is_imported() -> None:
    code = "import sys, minga.serve.moderation as m; m.RuleGuard().scores('a'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
