"""However an answer is divided, its stream adds up to the same: by token, by character, and by any other division."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minga.config.presets import tiny
from minga.data import dialects
from minga.data.dialects import DIALECTS, Dialect, Tool, ToolCall
from minga.data.tokenizer import Tokenizer, train_bpe
from minga.engine.grammar import Grammar, Thinking
from minga.engine.llm import LLM
from minga.engine.sampler import SamplingParams, TokenLogprob
from minga.engine.sequence import Delta
from minga.model.transformer import Transformer
from minga.serve.answering import _Speaker
from minga.serve.chat import ChatBody, ChatWriter
from minga.serve.errors import json_bytes
from minga.serve.generation import (
    CallStart,
    Choice,
    Event,
    Finish,
    Generation,
    Outcome,
    Text,
    ToolUse,
    Usage,
    Writer,
)
from minga.serve.messages import MessagesBody, MessagesWriter
from minga.serve.responses import ResponsesBody, ResponsesWriter
from minga.serve.schema import parse_body
from tests.serve import canned

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "array", "items": {"type": "integer"}}},
    "required": ["city"],
}
TOOLS = (Tool("get_weather", SCHEMA), Tool("clock"))
THINK = ("<think>", "</think>")
# How a vocabulary has a dialect's markers: as control tokens, as added tokens that are none, or not at all.
KINDS = ("control", "added", "spelled")
ALL = [(name, kind) for name in DIALECTS for kind in KINDS]


@lru_cache
def speaks(name: str, kind: str) -> tuple[Tokenizer, Dialect]:
    markers = () if kind == "spelled" else tuple(sorted(DIALECTS[name].markers))
    text = json.dumps({"name": "get_weather", "arguments": {"city": "Zürich 漢", "days": [3]}}, ensure_ascii=False)
    tokenizer = train_bpe([text * 3, text * 2], 290 + len(markers), specials=("<|endoftext|>", "<|im_end|>", *markers))
    if kind == "added":
        spec = json.loads(tokenizer.json())
        spec["added_tokens"] = [t | {"special": t["content"] not in markers} for t in spec["added_tokens"]]
        tokenizer = Tokenizer(spec, eos_id=0, chat_template=tokenizer.chat_template)
    return tokenizer, replace(DIALECTS[name], tokens=frozenset(markers))


def written(dialect: Dialect) -> list[str]:
    """Answers as models write them, good and bad."""
    city = json.dumps({"city": 'Zürich \\ "漢" 😀 <tool_call> </think> {}', "days": [1, -2]}, ensure_ascii=False)
    two = dialect.write_calls([ToolCall("get_weather", city), ToolCall("clock", "{}")])
    thought = dialect.think + "Hm, 漢 < > {?\n<think>" + dialect.end_think
    return [
        "", " \n", "Plain text 😀, é.\n", '{"answer": 42}', two, f"{thought}Text.", f"{thought}I look.\n{two}",
        f"I look.\n\n{two}\n more", two[: len(two) // 2], two.replace("clock", "unknown"), two.replace("{", "[", 3),
        f"{two}{two}", f"a < b <tool {thought} y", f"x<|im_end|>{two}",
    ]  # fmt: skip


def tokens_of(name: str, kind: str) -> list[list[int]]:
    tokenizer, dialect = speaks(name, kind)
    return [tokenizer.encode(text, specials=True) for text in written(dialect)]


@lru_cache
def recorded(name: str, kind: str) -> list[list[int]]:
    """Answers of a random model: bytes that are no text, thoughts with a budget, calls that must come and calls that may."""
    tokenizer, dialect = speaks(name, kind)
    config = tiny().replace(vocab_size=tokenizer.vocab_size, max_position_embeddings=512, initializer_range=0.2)
    llm = LLM.from_parts(Transformer(config).init_weights(), tokenizer, speculate=False)
    start, end = (tuple(tokenizer.encode(mark, specials=True)) for mark in THINK)
    bias = {id: 4.0 for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id)[:1] in (b'"', b"]", b"}")}
    found = []
    for seed in range(6):
        choice = ("auto", "required")[seed % 2]
        grammar = dialects.call_grammar(dialect, TOOLS, choice=choice, tokenizer=tokenizer)
        opening = sorted(grammar.triggers)
        params = SamplingParams(
            max_tokens=120, seed=seed, grammar=Grammar(grammar.lark, grammar.triggers),
            thinking=Thinking(start, end, budget=seed), logit_bias=bias | dict.fromkeys([*opening, *start[:1]], 4.0),
        )  # fmt: skip
        found.append(llm.generate([[5, 6, 7]], params)[0].token_ids)
    return found


# ---------------------------------------------------------------------------------------------- what comes of it


def heard(name: str, kind: str, deltas: Iterable[Delta], *, thinking: bool = False) -> tuple[list[Event], int]:
    """The events, and how many calls were malformed."""
    tokenizer, dialect = speaks(name, kind)
    sampling = SamplingParams(logprobs=0)
    answering: Any = SimpleNamespace(
        generation=Generation(sampling=sampling, tool_use=ToolUse(TOOLS, TOOLS)), guard=None, blocks_output=False,
        num_malformed_calls=0, worker=SimpleNamespace(dialect=dialect, llm=SimpleNamespace(tokenizer=tokenizer),
                                                      markers=dialects.marker_tokens(tokenizer, dialect)),
    )  # fmt: skip
    speaker = _Speaker(0, answering, thinking)
    events = [event for delta in [*deltas, None] for event in speaker.hear(delta)]
    return events, answering.num_malformed_calls


def outcome_of(events: Sequence[Event]) -> Outcome:
    """Without the ids of calls, which are drawn anew."""
    outcome = Outcome([Choice()], Usage())
    for event in events:
        outcome.take(replace(event, id=f"call_{event.call}") if isinstance(event, CallStart) else event)
    return outcome


def whole_of(events: Sequence[Event], *, logprobs: bool = True) -> list[Event]:
    """The shortest stream that says the same."""
    merged = list(outcome_of(events).choices[0].events())
    return merged if logprobs else [replace(e, logprobs=None) if isinstance(e, Text) else e for e in merged]


def deltas_of_tokens(name: str, kind: str, ids: Sequence[int], cuts: Sequence[int]) -> list[Delta]:
    """One for the tokens between each cut and the next."""
    tokenizer, dialect = speaks(name, kind)
    stream = tokenizer.stream(marked=dialects.marker_tokens(tokenizer, dialect))
    pieces = [stream.push(id) for id in ids]
    deltas = []
    for start, end in pairwise([0, *cuts, len(ids)]):
        logprobs = [TokenLogprob(id, -1.0, ()) for id in ids[start:end]]
        deltas.append(Delta("".join(pieces[start:end]), list(ids[start:end]), None, logprobs))
    rest = stream.flush()
    return [*deltas, Delta(rest, [], "stop", [])]


def text_of(name: str, kind: str, ids: Sequence[int]) -> str:
    return "".join(delta.text for delta in deltas_of_tokens(name, kind, ids, []))


def pieces_of_text(text: str, cuts: Iterable[int]) -> list[Delta]:
    parts = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
    return [Delta(part, [], None) for part in parts] + [Delta("", [], "stop")]


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_every_division_of_the_text_gives_the_same(name: str, kind: str) -> None:
    for ids in [*tokens_of(name, kind), *recorded(name, kind)]:
        text = text_of(name, kind, ids)
        for thinking in (False, True):
            events, malformed = heard(name, kind, pieces_of_text(text, []), thinking=thinking)
            whole = whole_of(events)
            for cuts in [list(range(1, len(text))), *([at] for at in range(len(text) + 1))]:
                found, num = heard(name, kind, pieces_of_text(text, cuts), thinking=thinking)
                assert (whole_of(found), num) == (whole, malformed), (text, cuts)


@pytest.mark.parametrize(("name", "kind"), ALL)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_division_gives_the_same(name: str, kind: str, data: st.DataObject) -> None:
    """Of the text into any pieces, and of the tokens into any deltas, with their log-probabilities."""
    ids = data.draw(st.sampled_from([*tokens_of(name, kind), *recorded(name, kind)]))
    text = text_of(name, kind, ids)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    whole, _ = heard(name, kind, pieces_of_text(text, []))
    assert whole_of(heard(name, kind, pieces_of_text(text, cuts))[0]) == whole_of(whole)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)))))
    events, _ = heard(name, kind, deltas_of_tokens(name, kind, ids, cuts))
    assert [token.token_id for token in outcome_of(events).choices[0].logprobs] == ids
    # a text that has nothing but log-probabilities counts as none
    assert [e for e in whole_of(events, logprobs=False) if e != Text(0, "")] == whole_of(whole, logprobs=False)


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_calls_are_heard(name: str, kind: str) -> None:
    """The divisions above would agree on nothing, too."""
    tokenizer, dialect = speaks(name, kind)
    calls = [ToolCall("get_weather", '{"city": "Ur"}', "call_0"), ToolCall("clock", "{}", "call_1")]
    ids = tokenizer.encode(f"{dialect.think}Hm.{dialect.end_think}{dialect.write_calls(calls)}", specials=True)
    events, malformed = heard(name, kind, deltas_of_tokens(name, kind, ids, list(range(1, len(ids)))))
    choice = outcome_of(events).choices[0]
    assert (choice.reasoning, choice.text, choice.calls, malformed) == ("Hm.", "", calls, 0)
    assert choice.finish_reason == "tool_calls"
    forced = [outcome_of(heard(name, kind, deltas_of_tokens(name, kind, ids, []))[0]) for ids in recorded(name, kind)]
    assert sum(bool(outcome.choices[0].calls) for outcome in forced) >= 2


# ---------------------------------------------------------------------------------------------- on the wires

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100}


def writers(stream: bool) -> list[Writer]:
    names: Any = ("m", canned.FakeTokenizer())
    return [
        ChatWriter(parse_body(ChatBody, json_bytes(HELLO | {"stream": stream})), *names),
        ResponsesWriter(parse_body(ResponsesBody, json_bytes({"input": "Hello", "stream": stream})), *names),
        MessagesWriter(parse_body(MessagesBody, json_bytes(HELLO | {"stream": stream})), *names),
    ]


def streamed(writer: Writer, events: Sequence[Event]) -> list[dict[str, Any]]:
    outcome = outcome_of(events)
    pieces = [*writer.begin(Usage()), *(piece for event in events for piece in writer.event(event))]
    blocks = b"".join([*pieces, *writer.end(outcome)]).decode().split("\n\n")
    lines = [line.removeprefix("data: ") for block in blocks for line in block.split("\n") if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def from_chat(documents: Sequence[dict[str, Any]]) -> list[Any]:
    text = reasoning = reason = ""
    calls: list[list[str]] = []
    for choice in (document["choices"][0] for document in documents):
        delta = choice["delta"]
        text, reasoning = text + (delta.get("content") or ""), reasoning + delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls.append([call["function"]["name"], ""])
            calls[call["index"]][1] += call["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return [text, reasoning, calls, reason]


def from_responses(documents: Sequence[dict[str, Any]]) -> list[Any]:
    found: dict[int, list[str]] = {}
    for document in documents:
        if document["type"] == "response.output_item.added":
            found[document["output_index"]] = [document["item"]["type"], document["item"].get("name", ""), ""]
        elif document["type"].endswith(".delta"):
            found[document["output_index"]][2] += document["delta"]
    return list(found.values())


def from_messages(documents: Sequence[dict[str, Any]]) -> list[Any]:
    found: list[Any] = []
    for document in documents:
        if document["type"] == "content_block_start":
            found.append([document["content_block"]["type"], document["content_block"].get("name", ""), ""])
        elif document["type"] == "content_block_delta":
            delta = document["delta"]
            found[-1][2] += delta.get("text", delta.get("thinking", delta.get("partial_json", "")))
        elif document["type"] == "message_delta":
            found.append(document["delta"])
    return found


@pytest.mark.parametrize(("name", "kind"), ALL)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_the_wires_add_up_to_the_same(name: str, kind: str, data: st.DataObject) -> None:
    """What a client puts together is the same for every division, and what the answer is that comes at once."""
    ids = data.draw(st.sampled_from([*tokens_of(name, kind), *recorded(name, kind)]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)))))
    divided, _ = heard(name, kind, deltas_of_tokens(name, kind, ids, cuts))
    whole, _ = heard(name, kind, deltas_of_tokens(name, kind, ids, []))
    for writer, other, fold in zip(
        writers(True), writers(True), (from_chat, from_responses, from_messages), strict=True
    ):
        assert fold(streamed(writer, divided)) == fold(streamed(other, whole))
    chat, responses, messages = (writer.document(outcome_of(divided)) for writer in writers(False))
    choice = outcome_of(whole).choices[0]
    calls = [[call.name, call.arguments] for call in choice.calls]
    assert isinstance(divided[-1], Finish)
    assert from_chat(streamed(writers(True)[0], divided)) == [
        choice.text,
        choice.reasoning,
        calls,
        choice.finish_reason,
    ]
    assert (chat["choices"][0]["message"]["content"] or "") == choice.text
    assert [
        [item["name"], item["arguments"]] for item in responses["output"] if item["type"] == "function_call"
    ] == calls
    assert [block["name"] for block in messages["content"] if block["type"] == "tool_use"] == [
        name for name, _ in calls
    ]
