"""Anthropic's Messages API, held against the types and the accumulator of the official client."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from anthropic.types.shared import ErrorObject
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from minga.serve.errors import ApiError, json_bytes
from minga.serve.generation import AnswerFormat, CallArguments, CallStart, Finish, Text
from minga.serve.messages import CountTokensBody, MessagesBody, MessagesWriter, count_document, error_document
from minga.serve.schema import parse_body
from tests.serve import canned

STREAM_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
ERROR: TypeAdapter[Any] = TypeAdapter(ErrorObject)
HERE = {"type": "ephemeral"}
WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
PROMPT: dict[str, Any] = {
    "model": "m",
    "system": [{"type": "text", "text": "Be brief.", "cache_control": HERE}, {"type": "text", "text": "Be kind."}],
    "messages": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Look it up.", "signature": "s"},
                {"type": "redacted_thinking", "data": "xyz"},
                {"type": "text", "text": "One moment.", "citations": None},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Cuzco"}, "cache_control": HERE},
                {"type": "tool_use", "id": "c2", "name": "weather", "input": {"city": "Ñuñoa"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And"},
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "12 C"}]},
                {"type": "tool_result", "tool_use_id": "c2", "content": "no such city", "is_error": True},
                {"type": "text", "text": "now?", "cache_control": HERE},
            ],
        },
        {"role": "system", "content": "Hurry."},
    ],
    "tools": [{**WEATHER, "type": "custom", "cache_control": HERE}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 20},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
}
FULL: dict[str, Any] = PROMPT | {
    "max_tokens": 50,
    "stop_sequences": ["\n\n"],
    "stream": True,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "metadata": {"user_id": "u"},
    "service_tier": "auto",
}


def body_of(**fields: Any) -> MessagesBody:
    hello = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100}
    return parse_body(MessagesBody, json_bytes(hello | fields))


def writer_of(**fields: Any) -> MessagesWriter:
    return MessagesWriter(body_of(**fields), "m", canned.FakeTokenizer())


# ---------------------------------------------------------------------------------------------- what is asked


def test_a_plain_text():
    generation = body_of().generation()
    assert generation.messages == [{"role": "user", "content": "Hello"}]
    assert (generation.max_tokens, generation.tool_use, generation.thinking) == (100, None, None)
    assert (generation.sampling.temperature, generation.sampling.top_k) == (1.0, 0)
    assert generation.field == "messages"


def test_a_conversation_with_everything():
    generation = parse_body(MessagesBody, json_bytes(FULL)).generation()
    calls = [
        {"id": f"c{number}", "type": "function", "function": {"name": "weather", "arguments": f'{{"city": "{city}"}}'}}
        for number, city in [(1, "Cuzco"), (2, "Ñuñoa")]
    ]
    turn = {"role": "assistant", "content": "One moment.", "tool_calls": calls, "reasoning_content": "Look it up."}
    assert generation.messages == [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "Weather?"},
        turn,
        {"role": "tool", "content": "12 C", "tool_call_id": "c1"},
        {"role": "tool", "content": "Error: no such city", "tool_call_id": "c2"},
        {"role": "user", "content": "And\nnow?"},
        {"role": "system", "content": "Hurry."},
    ]
    sampling = generation.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.stop) == (0.5, 0.9, 40, ("\n\n",))
    use = generation.tool_use
    assert use is not None and [(tool.name, tool.strict) for tool in use.tools] == [("weather", True)]
    assert (use.required, use.parallel) == (False, False)
    assert (generation.thinking, generation.thinking_budget, generation.max_tokens) == (True, 20, 50)
    assert generation.format == AnswerFormat("json_schema", {"type": "object"})


def test_what_is_counted_is_what_is_asked():
    counted = parse_body(CountTokensBody, json_bytes(PROMPT)).generation()
    asked = parse_body(MessagesBody, json_bytes(FULL)).generation()
    assert (counted.messages, counted.tool_use, counted.thinking) == (asked.messages, asked.tool_use, asked.thinking)
    assert count_document(5) == {"input_tokens": 5}
    with pytest.raises(ApiError, match="unknown parameter `max_tokens`"):
        parse_body(CountTokensBody, json_bytes(FULL))


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        (None, False, True),
        ({"type": "auto"}, False, True),
        ({"type": "any", "disable_parallel_tool_use": True}, True, False),
        ({"type": "tool", "name": "x" * 100}, True, True),
    ],
)
def test_tool_choice(choice, expected, parallel):
    use = body_of(tools=[WEATHER, {**WEATHER, "name": "x" * 100}], tool_choice=choice).generation().tool_use
    assert (use.required, use.parallel, len(use.tools)) == (expected, parallel, 2)
    assert len(use.callable) == (1 if choice and choice["type"] == "tool" else 2)


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        ({"type": "disabled"}, (False, None)),
        ({"type": "adaptive", "display": "omitted"}, (True, None)),
        (None, (None, None)),
    ],
)
def test_thinking(thinking, expected):
    generation = body_of(thinking=thinking).generation()
    assert (generation.thinking, generation.thinking_budget) == expected


def said(*blocks: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}, {"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "least"),
        ({"max_tokens": None}, "max_tokens", "whole number"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
        (said(), "messages[0].content", "least"),
        (said({"type": "image", "source": {}}), "messages[0].content[0].type", "image"),
        (said({"type": "document", "source": {}}), "messages[0].content[0].type", "document"),
        (said({"type": "text", "text": "x", "foo": 1}), "messages[0].content[0].foo", "unknown"),
        (said({"type": "text", "text": 1}), "messages[0].content[0].text", "a string"),
        (said({"type": "text"}), "messages[0].content[0].text", "missing"),
        (said({"text": "x"}), "messages[0].content[0].type", "missing"),
        (said({"type": "tool_use", "id": "1", "name": "f", "input": {}}), "messages[0].content[0].type", "tool_use"),
        (
            said({"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image"}]}),
            "messages[0].content[0].content[0].type",
            "image",
        ),
        (said({"type": "tool_use", "id": "1", "name": "f", "input": "{}"}, role="assistant"), None, "an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "tool"),
        ({"messages": [{"role": "assistant", "content": "The"}]}, "messages", "cannot be continued"),
        ({"temperature": 1.5}, "temperature", "1 or less"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 2}]}, "tools[0]", "do not run"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema", "missing"),
        ({"tools": [{"name": "f", "input_schema": {"type": "x"}}]}, "tools[0].input_schema", "schema"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1]", "two tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.name", "not among"),
        ({"tools": [WEATHER], "tool_choice": "auto"}, "tool_choice", "an object"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "needs"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "missing"),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "thinking.budget_tokens", "less than"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type", "between_tools"),
        ({"stop_sequences": "x"}, "stop_sequences", "a list"),
        ({"stop_sequences": [""]}, "stop_sequences[0]", "least"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers", "not supported"),
        ({"container": "c"}, "container", "not supported"),
        ({"inference_geo": "eu"}, "inference_geo", "not supported"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}},
            "output_config.format.schema",
            "schema",
        ),
        (
            {"output_config": PROMPT["output_config"], "output_format": PROMPT["output_config"]["format"]},
            "output_format",
            "one of them",
        ),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "unknown"),
        ({"stop": ["x"]}, "stop", "unknown"),
    ],
)
def test_refusals_name_the_field(fields, param, words):
    with pytest.raises(ApiError, match=words) as refused:
        body_of(**fields).generation()
    assert refused.value.status == 400
    assert param is None or refused.value.param == param


@given(st.one_of(canned.JSON, canned.mutated(FULL)))
def test_any_json_is_understood_or_refused(document):
    canned.refusal_or_generation(lambda body: parse_body(MessagesBody, body).generation(), document)


@given(st.one_of(canned.JSON, canned.mutated(PROMPT)))
def test_any_json_is_counted_or_refused(document):
    canned.refusal_or_generation(lambda body: parse_body(CountTokensBody, body).generation(), document)


def test_it_describes_itself():
    schema = MessagesBody.model_json_schema()
    assert schema["properties"]["messages"]["items"]["discriminator"]["propertyName"] == "role"
    assert {"max_tokens", "messages"} == set(schema["required"])
    assert "max_tokens" not in CountTokensBody.model_json_schema()["properties"]


# ---------------------------------------------------------------------------------------------- what is answered


@pytest.mark.parametrize("events", canned.ALL.values(), ids=canned.ALL)
def test_documents_are_messages(events):
    Message.model_validate(writer_of().document(canned.outcome_of(events)), strict=True)


def test_the_kinds_of_blocks():
    document = writer_of().document(canned.outcome_of(canned.CALLS))
    thought, text, weather, time = document["content"]
    assert (thought["thinking"], bool(thought["signature"])) == ("Look it up.", True)
    assert text == {"type": "text", "text": "One moment."}
    assert weather == {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Cuzco"}}
    assert time["input"] == {}
    assert document["usage"] == {
        "input_tokens": 4,
        "cache_read_input_tokens": 8,
        "cache_creation_input_tokens": 0,
        "output_tokens": 7,
        "output_tokens_details": {"thinking_tokens": 2},
    }


@pytest.mark.parametrize(
    ("events", "reason", "sequence"),
    [
        (canned.TEXT, "end_turn", None),
        (canned.NOTHING, "end_turn", None),
        (canned.CUT, "max_tokens", None),
        (canned.CALLS, "tool_use", None),
        (canned.FILTERED, "refusal", None),
        (canned.STOPPED, "stop_sequence", "\n\n"),
    ],
)
def test_why_it_stops(events, reason, sequence):
    document = writer_of().document(canned.outcome_of(events))
    assert (document["stop_reason"], document["stop_sequence"]) == (reason, sequence)
    delta = canned.read_stream(canned.stream_of(writer_of(stream=True), events))[-2]
    assert delta["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        ('{"days": 3, "city": "Cu', {"days": 3}),
        ("", {}),
        ("[1]", {}),
        ("nonsense", {}),
        ('{"a": 1e999}', {}),
        ('{"a": "\\ud83d"}', {}),
        ("[" * 1000, {}),
    ],
)
def test_arguments_that_are_not_whole(arguments, parsed):
    events = [CallStart(0, 0, "c", "weather"), CallArguments(0, 0, arguments), Finish(0, "length")]
    document = writer_of().document(canned.outcome_of(events))
    assert document["content"][0]["input"] == parsed
    assert json_bytes(document)


@pytest.mark.parametrize("events", canned.ALL.values(), ids=canned.ALL)
def test_streams_are_what_the_client_knows(events):
    for document in canned.read_stream(canned.stream_of(writer_of(stream=True), events)):
        STREAM_EVENT.validate_python(document, strict=True)


def test_the_order_of_a_stream():
    stream = canned.read_stream(canned.stream_of(writer_of(stream=True), canned.CALLS))
    told = [(d["type"], d.get("index"), d.get("delta", {}).get("type")) for d in stream]
    assert told == [
        ("message_start", None, None),
        ("content_block_start", 0, None),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_delta", 0, "signature_delta"),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, None),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_stop", 1, None),
        ("content_block_start", 2, None),
        ("content_block_delta", 2, "input_json_delta"),
        ("content_block_delta", 2, "input_json_delta"),
        ("content_block_stop", 2, None),
        ("content_block_start", 3, None),
        ("content_block_delta", 3, "input_json_delta"),
        ("content_block_stop", 3, None),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]
    assert stream[0]["message"]["usage"]["input_tokens"] == 4


def test_text_between_calls_keeps_its_place():
    between = [*canned.CALLS[:5], Text(0, "And the time."), *canned.CALLS[5:]]
    starts = [
        document["content_block"]["type"]
        for document in canned.read_stream(canned.stream_of(writer_of(stream=True), between))
        if document["type"] == "content_block_start"
    ]
    assert starts == ["thinking", "text", "tool_use", "text", "tool_use"]


@given(canned.answers())
def test_a_stream_adds_up_to_the_document(events):
    message: dict[str, Any] = {}
    texts: list[str] = []
    for document in canned.read_stream(canned.stream_of(writer_of(stream=True), events)):
        match document["type"]:
            case "message_start":
                message = document["message"]
            case "content_block_start":
                message["content"].append(document["content_block"])
                texts.append("")
            case "content_block_delta":
                for kind, value in document["delta"].items():
                    if kind in ("text", "thinking", "signature"):
                        message["content"][-1][kind] += value
                    elif kind == "partial_json":
                        texts[-1] += value
            case "content_block_stop" if message["content"][-1]["type"] == "tool_use":
                message["content"][-1]["input"] = json.loads(texts[-1])
            case "message_delta":
                message |= document["delta"] | {"usage": document["usage"]}
    whole = writer_of().document(canned.outcome_of(events))
    assert {**message, "id": ""} == {**whole, "id": ""}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (409, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_errors(status, kind):
    error = ApiError("no", status=status)
    assert error_document(error) == {"type": "error", "error": {"type": kind, "message": "no"}}
    if kind != "request_too_large":  # documented, and missing in the client
        ERROR.validate_python(error_document(error)["error"], strict=True)
    (stream,) = writer_of(stream=True).error(error)
    assert canned.read_stream(stream) == [error_document(error)]


# ---------------------------------------------------------------------------------------------- the official client


@pytest.fixture
def official():
    def answer(body: bytes) -> Any:
        parsed = parse_body(MessagesBody, body)
        last = parsed.generation().messages[-1]
        events = canned.CALLS if last["content"] == "Weather?" else canned.STOPPED
        return MessagesWriter(parsed, "m", canned.FakeTokenizer()), events

    with (
        canned.served(answer, error_document) as address,
        anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client,
    ):
        yield client


def test_the_client_and_its_accumulator(official):
    asked: list[Any] = [{"role": "user", "content": "Weather?"}]
    tools: Any = [WEATHER, {**WEATHER, "name": "time"}]
    with official.messages.stream(model="m", max_tokens=100, messages=asked, tools=tools) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert (final.content[2].input, final.stop_reason) == ({"city": "Cuzco"}, "tool_use")
    assert (final.usage.input_tokens, final.usage.output_tokens) == (4, 7)
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "ok"}
        for block in final.content
        if block.type == "tool_use"
    ]
    asked += [{"role": "assistant", "content": final.content}, {"role": "user", "content": results}]
    answer = official.messages.create(
        model="m", max_tokens=100, messages=asked, tools=tools, stop_sequences=["\n\n"], thinking={"type": "disabled"}
    )
    assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == ("Once", "stop_sequence", "\n\n")


def test_the_clients_errors(official):
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        official.messages.create(
            model="m", max_tokens=5, messages=[{"role": "user", "content": "x"}], extra_body={"temperature": 7}
        )
