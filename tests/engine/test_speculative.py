"""Speculation changes the speed and nothing else: pytest tests/engine/test_speculative.py"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from minga.config.presets import tiny
from minga.data.tokenizer import Tokenizer, train_bpe
from minga.engine import runner
from minga.engine.llm import LLM
from minga.engine.lookup import Grams, Lookup
from minga.engine.pace import Pace
from minga.engine.sampler import SamplingParams, distribution, race
from minga.engine.scheduler import Entry
from minga.engine.speculative import accepted, propose
from minga.model.transformer import Transformer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["bytes"], 259)


def sharp_model(vocab_size: int = 64, **changes) -> Transformer:
    """Weights ten times the usual size, so that no two logits are nearly equal."""
    config = tiny().replace(vocab_size=vocab_size, initializer_range=0.2, **changes)
    return Transformer(config).init_weights(torch.Generator().manual_seed(0)).eval()


def mixed_prompts(num: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, 50))] for _ in range(num)]


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


# ---------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_greedy_speculation_equals_plain_decoding_on_200_prompts(tokenizer, num_drafts):
    model, prompts = sharp_model(), mixed_prompts(200, 64)
    rng = random.Random(1)
    params = [SamplingParams(temperature=0, max_tokens=rng.randint(1, 24), ignore_eos=True) for _ in prompts]
    plain = LLM.from_parts(model, tokenizer, speculate=False).generate(prompts, params)
    llm = LLM.from_parts(model, tokenizer, num_drafts=num_drafts, speculate="always")
    speculated = llm.generate(prompts, params)
    assert [out.token_ids for out in speculated] == [out.token_ids for out in plain]
    assert [len(out.token_ids) for out in plain] == [param.max_tokens for param in params]
    assert llm.stats.drafted > 2000 and llm.stats.accepted > 0  # an untrained module is right about once in 64


@pytest.mark.parametrize("num_drafts", [1, 4])
def test_greedy_equality_when_guesses_are_often_right(tokenizer, monkeypatch, num_drafts):
    """A guesser that knows the plain answer and errs in 3 of 10 guesses: every length of accepted runs occurs."""
    model, prompts = sharp_model(), mixed_prompts(60, 64, seed=2)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    plain = LLM.from_parts(model, tokenizer, speculate=False).generate(prompts, params)
    answers = {tuple(prompt): out.token_ids for prompt, out in zip(prompts, plain, strict=True)}
    rng = random.Random(3)

    def oracle(model, cache, entries: list[Entry], *_) -> list[list[int]]:
        ids = []
        for sequence in (entry.sequence for entry in entries):
            known = answers[tuple(sequence.ids[: sequence.num_prompt_tokens])]
            coming = [*known[len(sequence.answer_ids) :], *[0] * num_drafts][:num_drafts]
            ids.append([token if rng.random() < 0.7 else rng.randrange(64) for token in coming])
        return ids

    monkeypatch.setattr(runner, "BURST_SECONDS", 0)
    monkeypatch.setattr(runner, "propose", oracle)
    llm = LLM.from_parts(model, tokenizer, num_drafts=num_drafts, speculate="always")
    assert [out.token_ids for out in llm.generate(prompts, params)] == [out.token_ids for out in plain]
    assert llm.stats.acceptance is not None and llm.stats.acceptance > 0.3


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_many_steps_in_one_call_are_those_steps(tokenizer, monkeypatch, num_drafts):
    """With a module that sees nearly what the model sees, so that runs of every length occur."""
    model, prompts = sharp_model(), mixed_prompts(12, 64)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:  # the token decides more than the text before it
                weight *= 0.03
        eye = torch.eye(model.config.hidden_size)
        model.mtp[0].eh_proj.weight.mul_(0.3).add_(torch.cat([eye, 0 * eye], 1))
    params = [SamplingParams(temperature=0, max_tokens=5 + 9 * index, ignore_eos=True) for index in range(len(prompts))]
    results = []
    for seconds in (0.0, 0.01, 1e9):
        monkeypatch.setattr(runner, "BURST_SECONDS", seconds)
        for speculate in ("always", False):
            llm = LLM.from_parts(model, tokenizer, num_drafts=num_drafts, speculate=speculate)
            results.append([out.token_ids for out in llm.generate(prompts, params)])
            assert llm.stats.tokens == sum(param.max_tokens for param in params)
            assert not speculate or 0.1 < llm.stats.acceptance < 0.95
    assert all(result == results[0] for result in results)


def test_accepted():
    assert accepted([], [7]) == [7]
    assert accepted([5, 6], [5, 6, 7]) == [5, 6, 7]
    assert accepted([5, 9], [5, 6, 7]) == [5, 6]
    assert accepted([9, 6], [5, 6, 7]) == [5]


# ---------------------------------------------------------------------------------------------- sampling


def test_two_laws_agree_as_often_as_the_theorem_says():
    """The races of one place: at least (1 - d) / (1 + d) for laws at a distance d, always for equal ones."""
    p, q = torch.tensor([0.4, 0.1, 0.2, 0.0, 0.05, 0.25]), torch.tensor([0.1, 0.3, 0.2, 0.3, 0.1, 0.0])
    draws = 4000
    same = sum(race(p, seed, 3) == race(q, seed, 3) for seed in range(draws)) / draws
    distance = float((p - q).clamp(min=0).sum())
    assert (1 - distance) / (1 + distance) - 0.03 < same < 1 - distance + 0.03
    assert all(race(p, seed, 3) == race(5 * p, seed, 3) for seed in range(200))


@pytest.mark.parametrize("num_drafts", [1, 3])
@pytest.mark.parametrize("kind", [{}, {"top_k": 20}, {"top_p": 0.8, "min_p": 0.01}])
def test_sampled_text_is_the_same_with_guesses_and_without(tokenizer, num_drafts, kind):
    model, prompts = sharp_model(), mixed_prompts(20, 64)
    params = [SamplingParams(temperature=1.2, seed=seed, max_tokens=20, ignore_eos=True, **kind) for seed in range(20)]
    plain = LLM.from_parts(model, tokenizer, speculate=False).generate(prompts, params)
    llm = LLM.from_parts(model, tokenizer, num_drafts=num_drafts, speculate="always")
    assert llm.generate(prompts, params) == plain
    assert llm.stats.accepted > 5


def test_speculative_sampling_follows_the_model_itself(tokenizer, forward_pass):
    """Two guesses a step: 20,000 answers (6,400 in torch) of three tokens against the exact probabilities of all 125."""
    model = sharp_model(vocab_size=5)
    params = SamplingParams(temperature=1.5, top_p=0.95, max_tokens=3, ignore_eos=True)
    prompt, draws = [1, 2, 3], 20_000 if forward_pass == "compiled" else 6_400
    each = [dataclasses.replace(params, seed=seed) for seed in range(draws)]
    llm = LLM.from_parts(model, tokenizer, num_drafts=2, speculate="always")
    outs = torch.tensor([out.token_ids for out in llm.generate([prompt] * draws, each)])
    counts = torch.bincount(outs @ torch.tensor([25, 5, 1]), minlength=125).double()

    prefixes = [[a, b] for a in range(5) for b in range(5)]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + prefix for prefix in prefixes])).logits
    law_PTV = distribution(logits.double(), params)[:, 2:]  # P = 25 prefixes; after the prompt, after a, after a b
    expected = torch.cat([law_PTV[i, 0, a] * law_PTV[i, 1, b] * law_PTV[i, 2] for i, (a, b) in enumerate(prefixes)])
    assert counts[expected == 0].sum() == 0
    likely = expected * draws >= 5  # the usual condition of the test; the others are taken together
    if (~likely & (expected > 0)).any():
        counts = torch.cat([counts[likely], counts[~likely].sum()[None]])
        expected = torch.cat([expected[likely], expected[~likely].sum()[None]])
    else:
        counts, expected = counts[likely], expected[likely]
    expected = draws * expected
    degrees = len(expected) - 1
    assert degrees >= 20
    assert chi_square(counts, expected) < degrees + 4 * (2 * degrees) ** 0.5 + 6
    assert llm.stats.accepted > 1000


# ---------------------------------------------------------------------------------------------- the module's cache


@pytest.mark.parametrize("model_changes", [{}, {"q_lora_rank": None, "n_routed_experts": 0}])
def test_guesses_are_those_of_the_module_without_a_cache(tokenizer, monkeypatch, model_changes):
    """Two guesses for each of three sequences, step after step, against the module run over everything at once."""
    model = sharp_model(**model_changes)
    seen = 0

    def checked(fast, cache, entries: list[Entry], *rest) -> list[list[int]]:
        nonlocal seen
        drafts = propose(fast, cache, entries, *rest)
        for entry, guesses in zip(entries, drafts, strict=True):
            ids_1T = torch.tensor([entry.sequence.ids])
            next_1T, hidden_1TD = ids_1T[:, 1:], model.hidden(ids_1T[:, :-1])
            for guess in guesses:
                state_1TD = model.mtp_hidden(0, next_1T, hidden_1TD)
                assert guess == int(model.head(state_1TD)[0, -1].argmax())
                next_1T = torch.cat([next_1T, torch.tensor([[guess]])], 1)
                hidden_1TD = torch.cat([hidden_1TD, state_1TD[:, -1:]], 1)
                seen += 1
        return drafts

    monkeypatch.setattr(runner, "propose", checked)
    monkeypatch.setattr(runner, "BURST_SECONDS", 0)
    llm = LLM.from_parts(model, tokenizer, num_drafts=2, speculate="always")
    llm.generate(mixed_prompts(3, 64), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    assert seen == llm.stats.drafted > 50


# ---------------------------------------------------------------------------------------------- giving up


@pytest.mark.parametrize("plain, pays", [(1e-9, False), (1e9, True)])
@pytest.mark.parametrize("temperature", [0, 1])
def test_guessing_stops_where_it_does_not_pay(tokenizer, monkeypatch, forward_pass, temperature, plain, pays):
    """And is tried again, ever more rarely. The text is the same either way, sampled or not."""
    if forward_pass == "torch":
        pytest.skip("there a step with guesses rounds differently, and they go on")
    monkeypatch.setattr(runner.Runner, "_plain_seconds", lambda self, group: plain)
    model, params = sharp_model(), SamplingParams(temperature=temperature, seed=1, max_tokens=80, ignore_eos=True)
    llm = LLM.from_parts(model, tokenizer, num_drafts=1)
    llm._lookup = None
    expected = LLM.from_parts(model, tokenizer, speculate=False).generate([[1, 2, 3]], params)
    drafted = []
    for _ in range(8):
        assert [out.token_ids for out in llm.generate([[1, 2, 3]], params)] == [out.token_ids for out in expected]
        drafted.append(llm.stats.drafted)
    if pays:
        assert min(drafted) >= 35
    else:
        assert [count > 0 for count in drafted] == [True, False, False, True, False, False, False, False]
        assert max(drafted) < 80


def test_the_fastest_number_of_guesses_is_found():
    """Rates of one to four guesses, and of none: it climbs while it gains, and stays on top."""
    for rates, best in (((1.0, 1.2, 1.5, 1.4, 9.0), 2), ((1.0, 1.2, 1.1, 9.0, 9.0), 1), ((2.0, 1.2, 9.0, 9.0, 9.0), 0)):
        pace = Pace(4)
        assert pace.worth_a_try(1)
        for _ in range(200):
            if pace.on_trial(1) and pace.note(1, 8 / rates[pace.num_drafts(1)], 8):
                pace.compare(1, rates[0])
        assert pace.num_drafts(1) == best and not pace.on_trial(1)
        assert pace.num_drafts(64) == 1 and pace.on_trial(64)  # another size, another judgement
        tries = [pace.worth_a_try(1) for _ in range(70)]
        assert any(tries) and (best > 0 or not tries[0])


# ---------------------------------------------------------------------------------------------- from the text itself


def test_grams_find_the_last_occurrence():
    grams, ids = Grams(), [1, 2, 3, 7, 1, 2, 3, 8, 9, 1, 2, 3]
    assert grams.after(ids) == [8, 9, 1, 2]
    assert grams.after([*ids, 5]) == []
    assert grams.after([*ids, 5, 2, 3, 8]) == [9, 1, 2, 3]
    assert Grams().after([1, 2]) == Grams().after([4, 4, 4]) == []
    assert Grams().after([4, 4, 4, 4]) == [4]
    rng = random.Random(0)
    text, grams = [], Grams()
    for _ in range(500):
        text.append(rng.randrange(3))
        ends = [end for end in range(3, len(text)) if text[end - 3 : end] == text[-3:]]
        assert grams.after(text) == (text[ends[-1] :][:4] if ends else [])


@pytest.mark.parametrize("temperature", [0, 0.3])
def test_guesses_from_the_text_change_nothing(tokenizer, monkeypatch, forward_pass, temperature):
    """A model that repeats itself, so that they are often right; without MTP, and with one that has been given up."""
    model = sharp_model(num_nextn_predict_layers=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:  # the last token decides nearly alone
                weight *= 0.03
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=200, ignore_eos=True)
    plain = LLM.from_parts(model, tokenizer, speculate=False)
    llm = LLM.from_parts(model, tokenizer)
    monkeypatch.setattr(Lookup, "worth_a_try", lambda self: True)
    monkeypatch.setattr(runner, "BURST_SECONDS", 0.0)
    for prompts in ([[1, 2, 3]], [[1, 2, 3], [4] * 70, [9]], [[5, 6]] * 6):
        assert llm.generate(prompts, params) == plain.generate(prompts, params)
        if forward_pass == "torch" or len(prompts) > runner.MAX_LOOKING:
            assert llm.stats.drafted == 0
        else:
            assert llm.stats.accepted > 20


def test_guesses_from_the_text_rest_where_they_do_not_pay():
    lookup = Lookup()
    tries = 0
    for _ in range(1000):
        if lookup.worth_a_try():
            tries += 1
            lookup.note(2.0, worth=1.0)
    assert 4 <= tries < 40
    good = Lookup()
    for _ in range(100):
        assert good.worth_a_try()
        good.note(1.0, worth=2.0)
