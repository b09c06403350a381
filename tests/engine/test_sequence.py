"""pytest tests/engine/test_sequence.py"""

from __future__ import annotations

import pytest

from minga.data.tokenizer import Tokenizer, train_bpe
from minga.engine.sampler import SamplingParams
from minga.engine.sequence import AnswerText, Sequence

EOS = 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["bytes"], 259)  # three special tokens and the bytes


def sequence(tokenizer: Tokenizer, room: int = 100, **params) -> Sequence:
    stop_ids = frozenset({EOS})
    return Sequence([5], SamplingParams(**params), stop_ids=stop_ids, max_length=1 + room, decoder=tokenizer.stream())


def run(answer: Sequence, token_ids: list[int]) -> list[str]:
    """Feeds one token after the other; returns the text of each delta."""
    pieces = []
    for token in token_ids:
        answer.extend([token])
        pieces.append(answer.take_delta().text)
    return pieces


def test_stop_token_is_kept_in_the_ids_and_not_in_the_text(tokenizer):
    answer = sequence(tokenizer)
    ids = [*tokenizer.encode("hola"), EOS]
    assert answer.extend([*ids, *tokenizer.encode("more")]) == 5  # what comes after the end is dropped
    done = answer.completion()
    assert (done.text, done.token_ids, done.finish_reason, done.num_prompt_tokens) == ("hola", ids, "stop", 1)


def test_length(tokenizer):
    answer = sequence(tokenizer, room=3)
    assert answer.extend(tokenizer.encode("hola")) == 3
    assert (answer.completion().text, answer.completion().finish_reason) == ("hol", "length")


def test_stop_token_at_the_last_place_is_a_stop(tokenizer):
    answer = sequence(tokenizer, room=1)
    answer.extend([EOS])
    assert answer.completion().finish_reason == "stop"


def test_a_stop_string_is_held_back_while_it_may_come(tokenizer):
    answer = sequence(tokenizer, stop="\nUser:")
    pieces = run(answer, tokenizer.encode("ab\nUs\nUser: x"))
    assert pieces == ["a", "b", "", "", "", "\nUs", *[""] * 7]
    assert (answer.completion().text, answer.finish_reason) == ("ab\nUs", "stop")


def test_a_stop_string_that_never_comes_is_shown_at_the_end(tokenizer):
    answer = sequence(tokenizer, room=4, stop=("def",))
    assert run(answer, tokenizer.encode("abde")) == ["a", "b", "", "de"]
    assert answer.finish_reason == "length"


def test_the_earliest_of_several_stop_strings_wins():
    text = AnswerText(("world", "lo"))
    text.push("hello world")
    assert (text.shown, text.stopped_by) == ("hel", "lo")


def test_a_character_is_shown_when_it_is_whole(tokenizer):
    answer = sequence(tokenizer)
    assert run(answer, tokenizer.encode("ñ€")) == ["", "ñ", "", "", "€"]


def test_half_a_character_at_the_end_is_replaced(tokenizer):
    answer = sequence(tokenizer, room=2)
    assert run(answer, tokenizer.encode("€")[:2]) == ["", "\N{REPLACEMENT CHARACTER}"]


def test_deltas_hold_each_token_once(tokenizer):
    answer = sequence(tokenizer)
    answer.extend(tokenizer.encode("ab"))
    first = answer.take_delta()
    answer.extend([*tokenizer.encode("c"), EOS])
    last = answer.take_delta()
    assert (first.text, first.token_ids, first.finish_reason) == ("ab", tokenizer.encode("ab"), None)
    assert (last.text, last.token_ids, last.finish_reason) == ("c", [*tokenizer.encode("c"), EOS], "stop")
