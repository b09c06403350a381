"""Rules for answers: what comes follows them, with guesses and without, and forced tokens cost the model nothing."""

from __future__ import annotations

import json
import re

import pytest
import torch

from minga.config.presets import tiny
from minga.data.tokenizer import Tokenizer, train_bpe
from minga.engine.grammar import Grammar, Pattern, Thinking
from minga.engine.llm import LLM
from minga.engine.sampler import SamplingParams
from minga.errors import UserError
from minga.model.transformer import Transformer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<call>", "</call>")
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
FIXED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
JSON = Grammar(f"start: %json {json.dumps(SCHEMA | {'x-guidance': FIXED})}")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = " ".join(json.dumps({"city": name, "days": len(name)}) for name in ("Quito", "Lima", "La Paz", "Cusco"))
    return train_bpe([text * 3], 280, specials=SPECIALS)


@pytest.fixture(scope="module")
def model(tokenizer) -> Transformer:
    config = tiny().replace(vocab_size=tokenizer.vocab_size + 5, max_position_embeddings=512, initializer_range=0.2)
    return Transformer(config).init_weights(torch.Generator().manual_seed(3))


def make(model: Transformer, tokenizer: Tokenizer, **options) -> LLM:
    return LLM.from_parts(model, tokenizer, **options)


def ids(tokenizer: Tokenizer, *names: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode("".join(names), specials=True))


def call_grammar(tokenizer: Tokenizer) -> Grammar:
    start, end = ids(tokenizer, "<call>", "</call>")
    return Grammar(f'start: <[{start}]> ("a" | "bcd" | "bce") <[{end}]>', frozenset({start}))


@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_follow_the_schema(model, tokenizer, temperature):
    llm = make(model, tokenizer)
    params = [SamplingParams(temperature, max_tokens=80, seed=seed, grammar=JSON) for seed in range(4)]
    for answer in llm.generate(["Where?"] * 4, params):
        assert answer.finish_reason == "stop"
        found = json.loads(answer.text)
        assert set(found) == {"city", "days"} and 0 <= found["days"] <= 99 and len(found["city"]) <= 8


def test_guesses_do_not_change_what_comes(model, tokenizer):
    rules = {
        "json": {"grammar": JSON},
        "call": {"grammar": call_grammar(tokenizer)},
        "budget": {"thinking": Thinking((), ids(tokenizer, "</think>"), is_open=True, budget=5), "grammar": JSON},
    }
    prompts = [[5, 6, 7], list(range(10, 90)), [270]]
    for name, rule in rules.items():
        for temperature in (0, 1):
            params = SamplingParams(temperature, max_tokens=60, seed=5, **rule)
            outs = [
                make(model, tokenizer, speculate=speculate).generate(prompts, params)
                for speculate in (False, "always", True)
            ]
            assert outs[0] == outs[1] == outs[2], (name, temperature)


def test_an_answer_is_free_until_the_trigger(model, tokenizer):
    grammar = call_grammar(tokenizer)
    start, end = ids(tokenizer, "<call>", "</call>")
    params = SamplingParams(0, max_tokens=40, grammar=grammar)
    free = SamplingParams(0, max_tokens=40)
    llm = make(model, tokenizer)
    assert llm.generate([[5, 6, 7]], params)[0] == llm.generate([[5, 6, 7]], free)[0]
    # begins with it when the trigger is what the model wants
    wanted = SamplingParams(1, max_tokens=40, seed=1, grammar=grammar, logit_bias={start: 100})
    (answer,) = llm.generate([[5, 6, 7]], wanted)
    assert answer.token_ids[0] == start and answer.token_ids[-1] == end and answer.finish_reason == "stop"
    assert answer.text in ("a", "bcd", "bce")  # control tokens are no text


def test_what_is_forced_costs_no_step(model, tokenizer):
    llm = make(model, tokenizer, speculate=False)
    steps = []
    hidden = llm._runner.model.hidden
    llm._weights_stay = True  # keeps the runner that is watched
    llm._runner.model.hidden = lambda *args: steps.append(1) or hidden(*args)
    (answer,) = llm.generate(["Where?"], SamplingParams(0, max_tokens=80, grammar=JSON))
    assert json.loads(answer.text)
    assert len(steps) < len(answer.token_ids) - 4, (len(steps), answer.token_ids)


def test_one_possible_answer_needs_no_model(model, tokenizer):
    llm = make(model, tokenizer)
    llm._runner.model.hidden = None
    (answer,) = llm.generate(["Where?"], SamplingParams(grammar=Grammar('start: "Quito"')))
    assert (answer.text, answer.finish_reason) == ("Quito", "stop")


def test_a_budget_ends_thinking_after_exactly_so_many_tokens(model, tokenizer):
    start, end = ids(tokenizer, "<think>", "</think>")
    for budget in (0, 1, 7):
        for speculate in (False, True):
            llm = make(model, tokenizer, speculate=speculate)
            thinking = Thinking((start,), (end,), is_open=True, budget=budget)
            params = SamplingParams(0, max_tokens=30, thinking=thinking, ignore_eos=True, logit_bias={end: -100})
            (answer,) = llm.generate([[5, 6, 7]], params)
            assert answer.token_ids.index(end) == budget == answer.num_reasoning_tokens
            assert len(answer.token_ids) == 30


def test_thoughts_that_the_model_begins_itself_are_counted_and_come_before_the_grammar(model, tokenizer):
    start, end = ids(tokenizer, "<think>", "</think>")
    params = SamplingParams(
        1, max_tokens=90, seed=2, thinking=Thinking((start,), (end,), budget=6), grammar=call_grammar(tokenizer),
        logit_bias={start: 100}, ignore_eos=True,
    )  # fmt: skip
    (answer,) = make(model, tokenizer).generate([[5, 6, 7]], params)
    assert answer.token_ids[0] == start and answer.num_reasoning_tokens == 6 and answer.token_ids[7] == end


@pytest.mark.parametrize("speculate", [False, "always"])
def test_thoughts_may_come_before_a_grammar_that_holds_from_the_start(model, tokenizer, speculate):
    start, end = ids(tokenizer, "<think>", "</think>")
    thinking = Thinking((start,), (end,), budget=4)
    params = SamplingParams(0, max_tokens=90, thinking=thinking, grammar=JSON, logit_bias={start: 100})
    (answer,) = make(model, tokenizer, speculate=speculate).generate([[5, 6, 7]], params)
    assert answer.token_ids[0] == start and answer.token_ids[5] == end
    assert json.loads(tokenizer.decode(answer.token_ids[6:])) and answer.finish_reason == "stop"


def test_a_bias_cannot_break_the_grammar(model, tokenizer):
    params = SamplingParams(0, max_tokens=60, grammar=JSON, logit_bias={7: 100}, logprobs=2)
    (answer,) = make(model, tokenizer).generate(["Where?"], params)
    assert json.loads(answer.text)
    assert len(answer.logprobs) == len(answer.token_ids)


def test_many_at_once_and_too_few_pages(model, tokenizer):
    llm = make(model, tokenizer)
    each = [SamplingParams(1, max_tokens=70, seed=seed, grammar=JSON if seed % 2 else None) for seed in range(12)]
    prompts = [[5 + seed] * (3 + 20 * seed) for seed in range(12)]
    together = llm.generate(prompts, each)
    assert together == [llm.generate([prompt], param)[0] for prompt, param in zip(prompts, each, strict=True)]


def test_a_grammar_that_does_not_compile_is_refused(model, tokenizer):
    llm = make(model, tokenizer)
    with pytest.raises(UserError, match="the grammar does not compile"):
        llm.generate(["a"], SamplingParams(grammar=Grammar("start: nothing_such")))
    with pytest.raises(UserError, match="does not compile"):
        llm.check_grammar(Grammar("start: ("))


@pytest.mark.parametrize("speculate", [False, "always"])
def test_a_grammar_that_leads_nowhere_ends_its_own_answer_only(model, tokenizer, speculate):
    """That nothing may follow is found out on the way."""
    circle = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    grammar = Grammar(f'start: ("x" | "y") %json {json.dumps(circle)}')
    params = SamplingParams(1, seed=1, max_tokens=20, grammar=grammar)
    llm = make(model, tokenizer, speculate=speculate)
    other = llm.submit([5, 6, 7], SamplingParams(0, max_tokens=20, ignore_eos=True))
    entry = llm.submit([5, 6, 7], params)
    while not (entry.sequence.finished and other.sequence.finished):
        llm.step()
    assert len(other.sequence.take_delta().token_ids) == 20
    assert "the grammar cannot go on here" in str(entry.sequence.failure)
    for take in (lambda: list(llm.stream("a", params)), lambda: llm.generate("a", params)):
        with pytest.raises(UserError, match="the grammar cannot go on here"):
            take()


def test_marks_tell_control_tokens_from_their_names_spelled_out(model, tokenizer):
    markers = ids(tokenizer, "<think>")
    stream = tokenizer.stream(marked=markers)
    spelled = tokenizer.encode("<think>")
    assert len(spelled) > 1
    text = "".join(map(stream.push, [*spelled, *ids(tokenizer, "<think>"), *tokenizer.encode("ab\U00100003")]))
    assert tokenizer.split_marks(text, markers) == [("<think>", False), ("<think>", True), ("ab\ufffd", False)]


@pytest.mark.parametrize(
    "pattern, found, other",
    [
        ("^a|b$", ("ax", "xb", "a"), ("xa", "bx", "")),
        ("a|b", ("xa", "bx"), ("c",)),
        (r"^(a|b)$", ("a", "b"), ("ab", "xa")),
        (r"[|(]\||c\$$", ("x(|", "||y", "c$"), ("|", "c$d")),
        (r"7\\$", ("x7\\",), ("7\\y", "7")),
    ],
)
def test_a_pattern_is_found_where_pythons_is(pattern, found, other):
    known = Pattern(pattern)
    for text in found + other:
        assert known.found_in(text) == (text in found) == (re.search(pattern, text) is not None)
