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
from minga.engine.sampler import SamplingParams, distribution, sample
from minga.engine.sequence import Sequence
from minga.engine.speculative import Draft, propose, verify, verify_greedy
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

    def oracle(model, cache, sequences: list[Sequence], *_) -> Draft:
        ids = []
        for sequence in sequences:
            known = answers[tuple(sequence.ids[: sequence.num_prompt_tokens])]
            coming = [*known[len(sequence.answer_ids) :], *[0] * num_drafts][:num_drafts]
            ids.append([token if rng.random() < 0.7 else rng.randrange(64) for token in coming])
        return Draft(torch.tensor(ids), [None] * len(sequences))

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


def test_verify_greedy():
    assert verify_greedy([], [7]) == [7]
    assert verify_greedy([5, 6], [5, 6, 7]) == [5, 6, 7]
    assert verify_greedy([5, 9], [5, 6, 7]) == [5, 6]
    assert verify_greedy([9, 6], [5, 6, 7]) == [5]


# ---------------------------------------------------------------------------------------------- sampling


def test_verify_leaves_the_law_unchanged():
    """First token of 20,000 draws against p: chi-square with 5 degrees of freedom, 25.7 is the 0.01 % point."""
    p_TV = torch.tensor([[0.4, 0.1, 0.2, 0.0, 0.05, 0.25], [0.1, 0.3, 0.1, 0.1, 0.1, 0.3]])
    q_KV = torch.tensor([[0.1, 0.3, 0.2, 0.3, 0.1, 0.0]])
    generator, draws = torch.Generator().manual_seed(0), 20_000
    outcomes = [verify([sample(q_KV[0], generator)], q_KV, p_TV, generator) for _ in range(draws)]
    first = torch.bincount(torch.tensor([new[0] for new in outcomes]), minlength=6)
    assert first[3] == 0
    possible = p_TV[0] > 0
    assert chi_square(first[possible], draws * p_TV[0][possible]) < 25.7
    second = torch.bincount(torch.tensor([new[1] for new in outcomes if len(new) == 2]), minlength=6)
    assert chi_square(second, second.sum() * p_TV[1]) < 25.7
    # a guess stands with probability sum(min(p, q)) = 0.1 + 0.1 + 0.2 + 0.05
    assert float(second.sum()) / draws == pytest.approx(0.45, abs=0.015)


def test_verify_of_equal_laws_accepts_everything():
    p_TV, generator = torch.full((3, 4), 0.25), torch.Generator().manual_seed(0)
    assert all(verify([1, 2], p_TV[:2], p_TV, generator)[:2] == [1, 2] for _ in range(200))


def test_speculative_sampling_follows_the_model_itself(tokenizer):
    """Whole engine, two guesses a step: 6,400 answers of three tokens against the exact probabilities of all 125."""
    model = sharp_model(vocab_size=5)
    params = SamplingParams(temperature=1.5, top_p=0.95, max_tokens=3, ignore_eos=True)
    prompt, draws = [1, 2, 3], 6400
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
    counts = torch.cat([counts[likely], counts[~likely].sum()[None]])
    expected = draws * torch.cat([expected[likely], expected[~likely].sum()[None]])
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

    def checked(fast, cache, sequences: list[Sequence], *rest) -> Draft:
        nonlocal seen
        draft = propose(fast, cache, sequences, *rest)
        for sequence, guesses in zip(sequences, draft.ids_BK.tolist(), strict=True):
            ids_1T = torch.tensor([sequence.ids])
            next_1T, hidden_1TD = ids_1T[:, 1:], model.hidden(ids_1T[:, :-1])
            for guess in guesses:
                state_1TD = model.mtp_hidden(0, next_1T, hidden_1TD)
                assert guess == int(model.head(state_1TD)[0, -1].argmax())
                next_1T = torch.cat([next_1T, torch.tensor([[guess]])], 1)
                hidden_1TD = torch.cat([hidden_1TD, state_1TD[:, -1:]], 1)
                seen += 1
        return draft

    monkeypatch.setattr(runner, "propose", checked)
    monkeypatch.setattr(runner, "BURST_SECONDS", 0)
    llm = LLM.from_parts(model, tokenizer, num_drafts=2, speculate="always")
    llm.generate(mixed_prompts(3, 64), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    assert seen == llm.stats.drafted > 50


# ---------------------------------------------------------------------------------------------- giving up


@pytest.mark.parametrize("plain, pays", [(1e-9, False), (1e9, True)])
def test_guessing_stops_where_it_does_not_pay(tokenizer, monkeypatch, forward_pass, plain, pays):
    """And is tried again, ever more rarely. The text is the same either way."""
    if forward_pass == "torch":
        pytest.skip("there a step with guesses rounds differently, and they go on")
    monkeypatch.setattr(runner.Runner, "_plain_seconds", lambda self: plain)
    model, params = sharp_model(), SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
    llm = LLM.from_parts(model, tokenizer)
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


def test_sampling_never_gives_up(tokenizer, monkeypatch):
    """A seed's text must not depend on how fast the machine is today."""
    monkeypatch.setattr(runner.Runner, "_plain_seconds", lambda self: 1e-9)
    llm = LLM.from_parts(sharp_model(), tokenizer)
    params = SamplingParams(temperature=1, seed=1, max_tokens=60, ignore_eos=True)
    texts = {tuple(llm.generate([[1, 2]], params)[0].token_ids) for _ in range(3)}
    assert len(texts) == 1 and llm.stats.drafted > 30
