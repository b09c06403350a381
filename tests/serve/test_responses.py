"""OpenAI's Responses API, held against the types and the accumulator of the official client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import TypeAdapter

from minga.serve.errors import ApiError, json_bytes
from minga.serve.generation import DEFAULT_MAX_TOKENS, AnswerFormat, Text
from minga.serve.response_store import ResponseStore
from minga.serve.responses import ResponsesBody, ResponsesWriter
from minga.serve.schema import parse_body
from tests.serve import canned

STREAM_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
REQUIRED = {
    "id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id",
    "instructions", "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p",
    "presence_penalty", "frequency_penalty", "top_logprobs", "temperature", "reasoning", "usage", "max_output_tokens",
    "max_tool_calls", "store", "background", "service_tier", "metadata", "safety_identifier", "prompt_cache_key",
}  # fmt: skip
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
FULL: dict[str, Any] = {
    "model": "m",
    "instructions": "Be brief.",
    "input": [
        {"role": "user", "content": "Weather?"},
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "In metric."}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "short"}],
            "content": [{"type": "reasoning_text", "text": "Look it up."}],
            "encrypted_content": None,
        },
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "content": [{"type": "output_text", "text": "One moment.", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Cuzco"}'},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": '{"city": "Lima"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "12 C"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "19 C"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I would rather not."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "Why"}, {"type": "input_text", "text": "not?"}]},
    ],
    "tools": [WEATHER],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]},
    "text": {
        "format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True},
        "verbosity": "low",
    },
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
    "top_logprobs": 2,
    "max_output_tokens": 50,
    "temperature": 0.5,
    "metadata": {"a": "b"},
    "stop": ["\n"],
    "stream": True,
    "stream_options": {"include_obfuscation": False},
    "scaling": {"method": "majority"},
    "truncation": "disabled",
    "background": False,
    "prompt_cache_key": "k",
}


def body_of(**fields: Any) -> ResponsesBody:
    return parse_body(ResponsesBody, json_bytes({"input": "Hello"} | fields))


def writer_of(**fields: Any) -> ResponsesWriter:
    return ResponsesWriter(body_of(**fields), "m", canned.FakeTokenizer())


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    output = [{**item, "id": ""} for item in response["output"]]
    return {**response, "output": output, "id": "", "created_at": 0, "completed_at": response["completed_at"] and 0}


# ---------------------------------------------------------------------------------------------- what is asked


def test_a_plain_text():
    generation = body_of().generation()
    assert generation.messages == [{"role": "user", "content": "Hello"}]
    assert (generation.field, generation.tool_use, generation.thinking, generation.num_choices) == (
        "input",
        None,
        None,
        1,
    )
    assert (generation.max_tokens, generation.sampling.logprobs) == (None, None)
    assert generation.params_within(10**6).max_tokens == DEFAULT_MAX_TOKENS


def test_a_conversation_with_everything():
    generation = parse_body(ResponsesBody, json_bytes(FULL)).generation()
    calls = [
        {"id": f"c{number}", "type": "function", "function": {"name": "weather", "arguments": f'{{"city": "{city}"}}'}}
        for number, city in [(1, "Cuzco"), (2, "Lima")]
    ]
    turn = {"role": "assistant", "content": "One moment.", "reasoning_content": "Look it up.", "tool_calls": calls}
    assert generation.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "system", "content": "In metric."},
        turn,
        {"role": "tool", "content": "12 C", "tool_call_id": "c1"},
        {"role": "tool", "content": "19 C", "tool_call_id": "c2"},
        {"role": "assistant", "content": "I would rather not."},
        {"role": "user", "content": "Why\nnot?"},
    ]
    use = generation.tool_use
    assert use is not None and [tool.name for tool in use.tools] == ["weather"] and not use.required
    assert generation.format == AnswerFormat("json_schema", {"type": "object"})
    assert (generation.thinking, generation.max_tokens, generation.salt) == (True, 50, "k")
    assert (generation.sampling.logprobs, generation.sampling.stop, generation.sampling.temperature) == (
        2,
        ("\n",),
        0.5,
    )
    assert generation.scaling is not None


def test_an_assistants_turns():
    def turns(*items: dict[str, Any]) -> list[Any]:
        return [(m["content"], m.get("reasoning_content")) for m in body_of(input=list(items)).generation().messages]

    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
    said = {"role": "assistant", "content": "yes"}
    assert turns(thought, said) == [("yes", "hm")]
    assert turns(said, said) == [("yes", None), ("yes", None)]
    assert turns(said, thought) == [("yes", None), ("", "hm")]
    assert turns(thought, thought) == [("", "hmhm")]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, (["weather", "auto"], False)),
        ("required", (["weather", "auto"], True)),
        ({"type": "function", "name": "auto"}, (["auto"], True)),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]},
            (["weather"], False),
        ),
    ],
)
def test_tool_choice(choice, expected):
    auto = {"type": "function", "name": "auto"}
    use = body_of(tools=[WEATHER, auto], tool_choice=choice, parallel_tool_calls=False).generation().tool_use
    assert ([tool.name for tool in use.callable], use.required) == expected
    assert (len(use.tools), use.parallel) == (2, False)


def test_no_tools_where_none_may_be_called():
    assert body_of(tools=[WEATHER], tool_choice="none").generation().tool_use is None


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": []}, "input", "least"),
        ({"input": None}, "input", "string or a list"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "previous_response_id"),
        ({"input": [{"id": "msg_1"}]}, "input[0]", "previous_response_id"),
        ({"input": [{"type": "web_search_call", "id": "1"}]}, "input[0].type", "web_search_call"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            None,
            "input_image|image_url",
        ),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "tool"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing"),
        ({"input": [{"role": "user", "content": "x", "nam": "y"}]}, "input[0].nam", "unknown"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id", "missing"),
        ({"tools": [{"type": "web_search", "filters": {}}]}, "tools[0]", '"web_search" do not run'),
        ({"tools": [WEATHER, WEATHER]}, "tools[1]", "two tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].function", "unknown"),
        ({"tool_choice": "required"}, "tool_choice", "needs"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "not among"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools", "missing"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.function", "unknown"),
        ({"tool_choice": "any"}, "tool_choice", "required"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "xml"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "x"}}}},
            "text.format.schema",
            "schema",
        ),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"background": True}, "background", "leave it out"),
        ({"stream_options": {}}, "stream_options", "stream"),
        ({"top_logprobs": 3}, "top_logprobs", "include"),
        ({"include": ["everything"]}, "include[0]", "everything"),
        ({"conversation": "c"}, "conversation", "not supported"),
        ({"prompt": {"id": "p"}}, "prompt", "not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens", "1 or more"),
        ({"max_tokens": 5}, "max_tokens", "unknown"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "huge"),
        ({"scaling": {"method": "verifier"}}, "scaling.verifier", "needs"),
        ({"temperature": 3}, "temperature", "2 or less"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"messages": []}, "messages", "unknown"),
    ],
)
def test_refusals_name_the_field(fields, param, words):
    with pytest.raises(ApiError, match=words) as refused:
        body_of(**fields).generation()
    assert refused.value.status == 400
    assert param is None or refused.value.param == param


@given(st.one_of(canned.JSON, canned.mutated(FULL)))
def test_any_json_is_understood_or_refused(document):
    def make(body: bytes) -> Any:
        parsed = parse_body(ResponsesBody, body)
        generation = parsed.generation()
        json_bytes(ResponsesWriter(parsed, "m", canned.FakeTokenizer()).document(canned.outcome_of(canned.CALLS)))
        return generation

    canned.refusal_or_generation(make, document)


def test_a_number_that_json_cannot_repeat():
    with pytest.raises(ApiError, match="too large a number"):
        parse_body(
            ResponsesBody,
            b'{"input": "x", "tools": [{"type": "function", "name": "f", "parameters": {"minimum": 1e999}}]}',
        )


def test_it_describes_itself():
    schema = ResponsesBody.model_json_schema()
    assert {"input", "previous_response_id", "temperature"} <= schema["properties"].keys()
    items = next(form for form in schema["properties"]["input"]["anyOf"] if form["type"] == "array")["items"]
    assert items["discriminator"]["propertyName"] == "type"


# ---------------------------------------------------------------------------------------------- what is answered


@pytest.mark.parametrize("events", canned.ALL.values(), ids=canned.ALL)
def test_documents_are_responses(events):
    document = writer_of(tools=[WEATHER], text={"format": FULL["text"]["format"]}).document(canned.outcome_of(events))
    Response.model_validate(document, strict=True)
    assert document.keys() >= REQUIRED
    for item in document["output"]:
        assert item["status"] in ("completed", "incomplete") and item["id"]


def test_what_was_asked_is_repeated():
    writer = ResponsesWriter(parse_body(ResponsesBody, json_bytes(FULL)), "m", canned.FakeTokenizer())
    document = writer.document(canned.outcome_of(canned.TEXT))
    Response.model_validate(document, strict=True)
    for field in (
        "instructions",
        "max_output_tokens",
        "metadata",
        "temperature",
        "tool_choice",
        "top_logprobs",
        "tools",
    ):
        assert document[field] == FULL[field]
    assert document["text"]["format"]["schema"] == {"type": "object"}
    assert document["reasoning"] == {"effort": "low", "summary": "auto"}


def test_the_kinds_of_items():
    document = writer_of(tools=[WEATHER]).document(canned.outcome_of(canned.CALLS))
    thought, said, weather, time = document["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Look it up."}]
    assert said["content"] == [{"type": "output_text", "text": "One moment.", "annotations": [], "logprobs": []}]
    assert (weather["call_id"], weather["name"], weather["arguments"]) == ("call_1", "weather", '{"city": "Cuzco"}')
    assert (time["call_id"], time["arguments"], time["status"]) == ("call_2", "{}", "completed")
    assert document["tools"] == [WEATHER]
    assert document["usage"] == {
        "input_tokens": 12,
        "input_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 19,
    }


@pytest.mark.parametrize(
    ("events", "status", "reason"),
    [
        (canned.TEXT, "completed", None),
        (canned.CUT, "incomplete", "max_output_tokens"),
        (canned.CUT_CALL, "incomplete", "max_output_tokens"),
        (canned.FILTERED, "incomplete", "content_filter"),
    ],
)
def test_how_it_ends(events, status, reason):
    document = writer_of().document(canned.outcome_of(events))
    assert (document["status"], document["output"][-1]["status"]) == (status, status)
    assert document["incomplete_details"] == (None if reason is None else {"reason": reason})
    assert (document["completed_at"] is None) == (reason is not None)
    last = canned.read_stream(canned.stream_of(writer_of(stream=True), events))[-1]
    assert last["type"] == f"response.{status}"


def test_moderation_and_scaling_are_told():
    outcome = canned.outcome_of(canned.TEXT)
    result = {
        "type": "moderation_result", "model": "g", "flagged": False, "categories": {}, "category_scores": {},
        "category_applied_input_types": {},
    }  # fmt: skip
    listed = {"type": "moderation_results", "model": "g", "results": [result]}
    outcome.moderation, outcome.scaling = {"input": listed, "output": listed}, {"method": "majority"}
    document = writer_of().document(outcome)
    assert Response.model_validate(document).moderation.output.flagged is False
    assert document["scaling"] == {"method": "majority"}


@pytest.mark.parametrize("events", canned.ALL.values(), ids=canned.ALL)
def test_streams_are_what_the_client_knows(events):
    stream = canned.read_stream(canned.stream_of(writer_of(stream=True, tools=[WEATHER]), events))
    for number, document in enumerate(stream):
        STREAM_EVENT.validate_python(document, strict=True)
        assert document["sequence_number"] == number
    assert [document["type"] for document in stream[:2]] == ["response.created", "response.in_progress"]
    assert stream[0]["response"]["output"] == []


def test_the_order_of_a_stream():
    stream = canned.read_stream(canned.stream_of(writer_of(stream=True), canned.CALLS))
    told = [(d["type"].removeprefix("response."), d.get("output_index")) for d in stream]
    assert told == [
        ("created", None),
        ("in_progress", None),
        ("output_item.added", 0),
        ("content_part.added", 0),
        ("reasoning_text.delta", 0),
        ("reasoning_text.done", 0),
        ("content_part.done", 0),
        ("output_item.done", 0),
        ("output_item.added", 1),
        ("content_part.added", 1),
        ("output_text.delta", 1),
        ("output_text.done", 1),
        ("content_part.done", 1),
        ("output_item.done", 1),
        ("output_item.added", 2),
        ("function_call_arguments.delta", 2),
        ("function_call_arguments.delta", 2),
        ("function_call_arguments.done", 2),
        ("output_item.done", 2),
        ("output_item.added", 3),
        ("function_call_arguments.delta", 3),
        ("function_call_arguments.done", 3),
        ("output_item.done", 3),
        ("completed", None),
    ]


@given(canned.answers())
def test_a_stream_adds_up_to_the_document(events):
    stream = canned.read_stream(canned.stream_of(writer_of(stream=True), events))
    final = stream[-1]["response"]
    assert without_ids(final) == without_ids(writer_of(stream=True).document(canned.outcome_of(events)))
    grown: dict[int, str] = {}
    for document in stream:
        if document["type"].endswith(".delta"):
            grown[document["output_index"]] = grown.get(document["output_index"], "") + document["delta"]
        elif document["type"] == "response.output_item.done":
            assert document["item"] == final["output"][document["output_index"]]
    for index, item in enumerate(final["output"]):
        whole = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert grown.get(index, "") == whole
        assert any(d.get("item_id") == item["id"] for d in stream)


def test_log_probabilities():
    include = ["message.output_text.logprobs"]
    stream = canned.read_stream(canned.stream_of(writer_of(stream=True, include=include), canned.LOGPROBS))
    document = writer_of(include=include).document(canned.outcome_of(canned.LOGPROBS))
    entries = document["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in entries] == ["w1", "w2"]
    assert stream[-1]["response"]["output"][0]["content"][0]["logprobs"] == entries
    assert [d["logprobs"] for d in stream if d["type"] == "response.output_text.delta"] == [entries[:1], entries[1:]]


def test_a_failure_in_a_stream():
    writer = writer_of(stream=True)
    pieces = [*writer.begin(canned.USAGE), *writer.event(canned.TEXT[0])]
    pieces += writer.error(ApiError("the model failed", status=500, code="generation_failed"))
    stream = canned.read_stream(b"".join(pieces))
    for document in stream:
        STREAM_EVENT.validate_python(document, strict=True)
    error, failed = stream[-2:]
    assert (error["type"], error["message"], error["code"]) == ("error", "the model failed", "generation_failed")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"] == {"code": "server_error", "message": "the model failed"}


# ---------------------------------------------------------------------------------------------- memory


def answered(memory: ResponseStore, tenant: str, events=canned.TEXT, **fields: Any) -> dict[str, Any]:
    body = body_of(**fields)
    earlier = memory.conversation(tenant, body.previous_response_id)
    body.generation(earlier)
    writer = ResponsesWriter(body, "m", canned.FakeTokenizer(), keep=memory.keeper(tenant, body, earlier))
    return writer.document(canned.outcome_of(events))


def test_a_conversation_goes_on():
    store = ResponseStore()
    first = answered(store, "a", canned.CALLS, instructions="Be brief.", tools=[WEATHER])
    results = [{"type": "function_call_output", "call_id": f"call_{n}", "output": "ok"} for n in (1, 2)]
    second = answered(store, "a", input=results, previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    generation = body_of(input="And now?").generation(store.conversation("a", second["id"]))
    roles = [message["role"] for message in generation.messages]
    assert roles == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
        "user",
    ]  # without the instructions, as OpenAI has it
    turn = generation.messages[1]
    assert (turn["content"], turn["reasoning_content"], len(turn["tool_calls"])) == ("One moment.", "Look it up.", 2)
    by_hand = body_of(input=[{"role": "user", "content": "Hello"}, *first["output"], *results]).generation()
    assert list(by_hand.messages) == list(generation.messages[:4])


@given(canned.answers())
def test_every_answer_can_be_gone_on_from(events):
    store = ResponseStore()
    first = answered(store, "a", events)
    said = [message["role"] for message in body_of().generation(store.conversation("a", first["id"])).messages]
    assert said == ["user", *(["assistant"] if first["output"] else []), "user"]


def test_items_of_earlier_answers_may_be_named():
    store = ResponseStore()
    first = answered(store, "a", canned.CALLS, tools=[WEATHER])
    results = [{"type": "function_call_output", "call_id": f"call_{n}", "output": "ok"} for n in (1, 2)]
    named = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]

    def resolved(tenant: str, *more: Any) -> ResponsesBody:
        asked = body_of(input=[{"role": "user", "content": "Hello"}, *named, *results, *more])
        return asked.with_items(store.items(tenant, asked.references))

    whole = body_of(input=[{"role": "user", "content": "Hello"}, *first["output"], *results])
    assert resolved("a").generation().messages == whole.generation().messages
    with pytest.raises(ApiError, match="twice"):
        resolved("a", named[0]).generation()
    store.delete("a", first["id"])
    for tenant in ("a", "b"):
        with pytest.raises(ApiError) as refused:
            resolved(tenant).generation()
        assert refused.value.param == "input[1]"


def test_text_between_calls_keeps_its_place():
    between = [*canned.CALLS[:5], Text(0, "And the time."), *canned.CALLS[5:]]
    stream = canned.read_stream(canned.stream_of(writer_of(stream=True), between))
    output = stream[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "message", "function_call"]
    (turn,) = body_of(input=output).generation().messages
    assert (turn["content"], len(turn["tool_calls"])) == ("One moment.And the time.", 2)


def test_what_is_kept_can_be_read_and_deleted():
    store = ResponseStore()
    first = answered(store, "a", input=FULL["input"])
    assert store.get("a", first["id"]) == first
    items = store.input_items("a", first["id"], {"order": "asc", "limit": "100"})
    ResponseItemList.model_validate(items, strict=True)
    assert len(items["data"]) == len(FULL["input"]) and not items["has_more"]
    assert items["data"][3]["id"] == "msg_1"
    assert items == store.input_items("a", first["id"], {"order": "asc", "limit": "100"})
    assert store.delete("a", first["id"]) == {"id": first["id"], "object": "response", "deleted": True}
    for gone in (store.get, store.delete, lambda *where: store.input_items(*where, {})):
        with pytest.raises(ApiError) as refused:
            gone("a", first["id"])
        assert (refused.value.status, refused.value.param) == (404, "response_id")


def test_pages_of_items():
    store = ResponseStore()
    kept = answered(store, "a", input=[{"role": "user", "content": str(n), "id": f"m{n}"} for n in range(5)])

    def page(**query: str) -> tuple[list[str], bool]:
        found = store.input_items("a", kept["id"], query)
        assert (found["first_id"], found["last_id"]) == (found["data"][0]["id"], found["data"][-1]["id"])
        return [item["id"] for item in found["data"]], found["has_more"]

    assert page(limit="2") == (["m4", "m3"], True)
    assert page(limit="2", after="m3") == (["m2", "m1"], True)
    assert page(limit="2", after="m1") == (["m0"], False)
    assert page(order="asc", limit="2") == (["m0", "m1"], True)
    for query in ({"limit": "0"}, {"limit": "x"}, {"limit": "-1"}, {"limit": "٣"}, {"order": "up"}, {"after": "m9"}):
        with pytest.raises(ApiError) as refused:
            page(**query)
        assert (refused.value.status, [refused.value.param]) == (400, list(query))


def test_what_is_not_there():
    store = ResponseStore()
    hers = answered(store, "a")
    dropped = answered(store, "a", store=False)
    for tenant, response_id in [("b", hers["id"]), ("a", dropped["id"]), ("a", "resp_x")]:
        with pytest.raises(ApiError) as refused:
            answered(store, tenant, previous_response_id=response_id)
        assert (refused.value.status, refused.value.param) == (404, "previous_response_id")
    assert dropped["store"] is False


def test_a_failed_or_abandoned_response_is_not_kept():
    kept: list[Any] = []
    writer = ResponsesWriter(body_of(stream=True), "m", canned.FakeTokenizer(), keep=kept.append)
    list(writer.begin(canned.USAGE))
    list(writer.error(ApiError("no", status=500)))
    assert kept == []


def test_who_keeps_much_pushes_out_their_own():
    store = ResponseStore(max_responses=10, max_bytes=100_000)
    small = answered(store, "a")
    large = [answered(store, "b", input="x" * 20_000) for _ in range(6)]
    assert store.get("a", small["id"])["id"] == small["id"]
    with pytest.raises(ApiError):
        store.get("b", large[0]["id"])
    assert store.get("b", large[-1]["id"])
    many = [answered(store, "b") for _ in range(20)]
    assert store.get("b", many[-1]["id"]) and store.get("a", small["id"])
    huge = answered(store, "c", input="x" * 200_000)
    with pytest.raises(ApiError):
        store.get("c", huge["id"])
    assert store.get("a", small["id"])


# ---------------------------------------------------------------------------------------------- the official client


@pytest.fixture
def official():
    def answer(body: bytes) -> Any:
        parsed = parse_body(ResponsesBody, body)
        last = parsed.generation().messages[-1]
        events = canned.CALLS if last["content"] == "Weather?" else canned.REASONED
        return ResponsesWriter(parsed, "m", canned.FakeTokenizer()), events

    with (
        canned.served(answer) as address,
        openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client,
    ):
        yield client


def test_the_client_and_its_accumulator(official):
    tools = [WEATHER, {**WEATHER, "name": "time"}]
    with official.responses.stream(model="m", input="Weather?", tools=tools) as stream:
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    assert final.output[2].parsed_arguments == {"city": "Cuzco"}
    assert final.output_text == "One moment."
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "ok"}
        for item in final.output
        if item.type == "function_call"
    ]
    asked = [{"role": "user", "content": "Weather?"}, *final.output, *results]
    answer = official.responses.create(model="m", input=asked, tools=tools)
    assert answer.output_text == "Hola."
    assert answer.usage.output_tokens_details.reasoning_tokens == 2


def test_the_clients_errors(official):
    with pytest.raises(openai.BadRequestError) as bad:
        official.responses.create(model="m", input="x", truncation="auto")
    assert bad.value.param == "truncation"
    assert json.loads(bad.value.response.content)["error"]["type"] == "invalid_request_error"
