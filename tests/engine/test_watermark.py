"""The watermark: found in marked text, not elsewhere, and the text is as likely as before."""

from __future__ import annotations

import random

import pytest
import torch

from minga.config.presets import tiny
from minga.data.tokenizer import Tokenizer, train_bpe
from minga.engine.llm import LLM
from minga.engine.sampler import SamplingParams
from minga.engine.watermark import CONTEXT, Marker, detect, secret_number
from minga.model.transformer import Transformer

SECRET = secret_number(b"of this test")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["bytes"], 259)


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = tiny().replace(vocab_size=259, initializer_range=0.1, max_position_embeddings=512)
    return Transformer(config).init_weights(torch.Generator().manual_seed(0))


def answers(model: Transformer, tokenizer: Tokenizer, *, speculate: bool | str = False, **params) -> list[list[int]]:
    llm = LLM.from_parts(model, tokenizer, speculate=speculate)
    prompts = [[5 + n, 6, 7] for n in range(6)]
    each = [SamplingParams(max_tokens=120, seed=n, ignore_eos=True, **params) for n in range(6)]
    return [completion.token_ids for completion in llm.generate(prompts, each)]


def test_the_mark_is_found_with_the_secret_and_only_where_it_is(model, tokenizer):
    marked, plain = answers(model, tokenizer, watermark=SECRET), answers(model, tokenizer)
    assert max(detect(ids, SECRET).p_value for ids in marked) < 1e-9
    assert min(detect(ids, SECRET + 1).p_value for ids in marked) > 1e-4
    assert min(detect(ids, SECRET).p_value for ids in plain) > 1e-4
    assert all(0 < detect(ids, SECRET).num_tokens <= 120 - CONTEXT for ids in marked)


def test_a_part_of_the_text_is_enough(model, tokenizer):
    (ids, *_) = answers(model, tokenizer, watermark=SECRET)
    rng = random.Random(0)
    changed = [rng.randrange(3, 259) if rng.random() < 0.1 else token for token in ids[30:]]
    assert detect(changed, SECRET).p_value < 1e-3


@pytest.mark.parametrize("speculate", ["always", True])
def test_guesses_leave_the_text_as_it_is(model, tokenizer, speculate):
    expected = answers(model, tokenizer, watermark=SECRET)
    assert answers(model, tokenizer, watermark=SECRET, speculate=speculate) == expected


def test_without_a_mark_p_values_are_even(model):
    rng = random.Random(1)
    values = [detect([rng.randrange(3, 259) for _ in range(40)], SECRET).p_value for _ in range(200)]
    assert 0.4 < sum(values) / len(values) < 0.6 and min(values) > 1e-5
    assert detect([1, 2], SECRET).p_value == 1.0


def test_a_context_marks_once():
    marker = Marker(SECRET, 7, num_prompt_tokens=2)
    assert list(marker.draws([1, 2], [3, 4])) == [(7, 2), (7, 3), (7, 4)]
    ids = [1, 2, 5, 5, 5, 5]
    (first,) = marker.draws(ids, [])
    assert first[1] == 0 and first[0] != 7
    assert marker.draws([*ids, 5], []) == [(7, 7)]
    assert Marker(SECRET, 7, num_prompt_tokens=2).draws(ids, [5, 6])[:2] == [first, (7, 7)]
