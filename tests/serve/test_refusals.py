"""What is said of a body that is wrong, field by field."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from minga.serve.chat import ChatBody
from minga.serve.completions import CompletionBody
from minga.serve.embeddings import EmbeddingBody
from minga.serve.errors import ApiError, json_bytes
from minga.serve.messages import CountTokensBody, MessagesBody
from minga.serve.openapi import OPERATIONS
from minga.serve.responses import ResponsesBody
from minga.serve.schema import MAX_DEPTH, MAX_NODES, Body, parse_body, parse_json
from minga.serve.text import DetokenizeBody, ModerationBody, TokenizeBody

HI = [{"role": "user", "content": "hi"}]
MINIMAL: dict[type[Body], dict[str, Any]] = {
    ChatBody: {"messages": HI},
    CompletionBody: {"prompt": "x"},
    ResponsesBody: {"input": "x"},
    MessagesBody: {"messages": HI, "max_tokens": 9},
    CountTokensBody: {"messages": HI},
    EmbeddingBody: {"input": "x"},
    ModerationBody: {"input": "x"},
    TokenizeBody: {"prompt": "x"},
    DetokenizeBody: {"tokens": [1]},
}
BODIES = list(MINIMAL)


def refusal(model: type[Body], document: Any) -> ApiError:
    """Of the body, or of what its fields come to together."""
    with pytest.raises(ApiError) as caught:
        body = parse_body(model, json.dumps(document).encode())
        if hasattr(body, "generation"):
            body.generation()
    return caught.value


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f"} | fields}]}


def schema(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": fields}}}


# the body's model, what is wrong in it, and the refusal's param, code and words: what it is, and what would be right
REFUSALS: list[tuple[type[Body], dict[str, Any], str, str, list[str]]] = [
    (ChatBody, {"mesages": []}, "mesages", "unknown_parameter", ["did you mean `messages`"]),
    (ChatBody, {"max_token": 5}, "max_token", "unknown_parameter", ["did you mean `max_tokens`"]),
    (ChatBody, {"zzz": 5}, "zzz", "unknown_parameter", ["leave it out"]),
    (ChatBody, {"messages": None}, "messages", "invalid_type", ["a list", "null"]),
    (ChatBody, {"messages": []}, "messages", "invalid_value", ["0 entries", "1 is the least"]),
    (ChatBody, {"messages": "hi"}, "messages", "invalid_type", ["a list", "a string"]),
    (ChatBody, {"messages": [5]}, "messages[0]", "invalid_type", ["an object", "the number 5"]),
    (ChatBody, {"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter", ["missing"]),
    (ChatBody, {"messages": [{"role": "root", "content": "x"}]}, "messages[0].role", "invalid_value",
     ['"root"', "user", "assistant", "developer", "tool"]),
    (ChatBody, {"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter", ["missing"]),
    (ChatBody, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type",
     ["a string or a list", "the number 5"]),
    (ChatBody, {"messages": [{"role": "user", "content": []}]}, "messages[0].content", "invalid_value", ["1 is the least"]),
    (ChatBody, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type", "invalid_value", ['"image_url"', "not one of text"]),
    (ChatBody, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text",
     "missing_required_parameter", ["missing"]),
    (ChatBody, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id",
     "missing_required_parameter", ["missing"]),
    (ChatBody, {"messages": [{"role": "user", "content": "x", "contnt": 1}]}, "messages[0].contnt", "unknown_parameter",
     ["did you mean `content`"]),
    (ChatBody, {"temperature": "hot"}, "temperature", "invalid_type", ["a number", "a string"]),
    (ChatBody, {"temperature": True}, "temperature", "invalid_type", ["a number", "a boolean"]),
    (ChatBody, {"temperature": 2.1}, "temperature", "invalid_value", ["2.1", "2 or less"]),
    (ChatBody, {"temperature": -1}, "temperature", "invalid_value", ["-1", "0 or more"]),
    (ChatBody, {"top_p": 0}, "top_p", "invalid_value", ["0 or more, and not that itself"]),
    (ChatBody, {"max_tokens": 1.5}, "max_tokens", "invalid_type", ["a whole number", "1.5"]),
    (ChatBody, {"max_tokens": "5"}, "max_tokens", "invalid_type", ["a whole number", "a string"]),
    (ChatBody, {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "invalid_value", ["send one"]),
    (ChatBody, {"n": 17}, "n", "invalid_value", ["16 or less"]),
    (ChatBody, {"stream": 1}, "stream", "invalid_type", ["true or false"]),
    (ChatBody, {"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", ["`stream`"]),
    (ChatBody, {"top_logprobs": 3}, "top_logprobs", "invalid_value", ["`logprobs`"]),
    (ChatBody, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value", ["20 or less"]),
    (ChatBody, {"stop": ["a"] * 17}, "stop", "invalid_value", ["17 entries", "16 is the most"]),
    (ChatBody, {"stop": [1]}, "stop[0]", "invalid_type", ["a string", "the number 1"]),
    (ChatBody, {"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value", ['"x"', "[0-9]"]),
    (ChatBody, {"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value", ["100 or less"]),
    (ChatBody, {"logit_bias": [1]}, "logit_bias", "invalid_type", ["an object", "a list"]),
    (ChatBody, {"metadata": {"a": 1}}, "metadata.a", "invalid_type", ["a string"]),
    (ChatBody, {"audio": {"voice": "x"}}, "audio", "unsupported_parameter", ["leave it out"]),
    (ChatBody, {"functions": []}, "functions", "unsupported_parameter", ["leave it out"]),
    (ChatBody, {"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value", ['"web_search"', "function"]),
    (ChatBody, {"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter", ["missing"]),
    (ChatBody, function(name="a b"), "tools[0].function.name", "invalid_value", ['"a b"', "a-zA-Z0-9_-"]),
    (ChatBody, function(parameters="x"), "tools[0].function.parameters", "invalid_type", ["an object"]),
    (ChatBody, function(parameters={"type": "strin"}), "tools[0].function.parameters", "invalid_schema",
     ["strin", "parameters.type", "string, number"]),
    (ChatBody, function(parameters={"properties": {"a": {"$ref": "#/x"}}}), "tools[0].function.parameters", "invalid_schema",
     ["parameters.properties.a.$ref", "leads nowhere"]),
    (ChatBody, {"tools": [function()["tools"][0]] * 2}, "tools[1]", "invalid_value", ["two tools are called f"]),
    (ChatBody, {"tool_choice": "required"}, "tool_choice", "invalid_value", ["`tools`"]),
    (ChatBody, {"tool_choice": "sometimes"}, "tool_choice", "invalid_value", ['"sometimes"', "auto", "required"]),
    (ChatBody, function() | {"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "invalid_value",
     ['"g" is not among `tools`']),
    (ChatBody, {"tool_choice": {"type": "tool"}}, "tool_choice.type", "invalid_value",
     ['"tool"', "function", "allowed_tools"]),
    (ChatBody, {"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools", "missing_required_parameter", []),
    (ChatBody, {"response_format": {"type": "xml"}}, "response_format.type", "invalid_value", ["json_schema", "text"]),
    (ChatBody, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter", []),
    (ChatBody, schema(type="object", uniqueItems=True), "response_format.json_schema.schema", "invalid_schema",
     ["uniqueItems", "leave it out"]),
    (ChatBody, schema(type="object") | {"structured_outputs": {"regex": "a"}}, "structured_outputs", "invalid_value",
     ["one of json, regex"]),
    (ChatBody, {"structured_outputs": {}}, "structured_outputs", "invalid_value", ["one of json, regex"]),
    (ChatBody, {"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "invalid_schema", ["mend it"]),
    (ChatBody, {"structured_outputs": {"choice": []}}, "structured_outputs.choice", "invalid_value", ["1 is the least"]),
    (ChatBody, {"reasoning_effort": "huge"}, "reasoning_effort", "invalid_value", ['"huge"', "none", "max"]),
    (ChatBody, {"scaling": {"method": "luck"}}, "scaling.method", "invalid_value", ["majority", "best_of"]),
    (ChatBody, {"scaling": {"method": "verifier"}}, "scaling.verifier", "invalid_value", ["needs it"]),
    (ChatBody, {"scaling": {"method": "majority"}, "n": 2}, "n", "invalid_value", ["leave it out"]),
    (CompletionBody, {"prompt": None}, "prompt", "invalid_type", ["a string or a list"]),
    (CompletionBody, {"prompt": []}, "prompt", "invalid_value", ["1 is the least"]),
    (CompletionBody, {"prompt": ["a"] * 17}, "prompt", "invalid_value", ["16 is the most"]),
    (CompletionBody, {"suffix": "x"}, "suffix", "unsupported_parameter", ["leave it out"]),
    (CompletionBody, {"logprobs": 6}, "logprobs", "invalid_value", ["5 or less"]),
    (CompletionBody, {"prompt": [1], "echo": True}, "echo", "invalid_value", ["prompts that are texts"]),
    (CompletionBody, {"best_of": 2}, "best_of", "invalid_value", ["1 or less"]),
    (ResponsesBody, {"input": []}, "input", "invalid_value", ["1 is the least"]),
    (ResponsesBody, {"input": [{"type": "x"}]}, "input[0].type", "invalid_value", ["x", "message", "function_call_output"]),
    (ResponsesBody, {"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "invalid_value", ["previous_response_id"]),
    (ResponsesBody, {"background": True}, "background", "invalid_value", ["leave it out"]),
    (ResponsesBody, {"tools": [{"type": "web_search"}]}, "tools[0]", "invalid_value", ["web_search", "function"]),
    (ResponsesBody, {"conversation": "x"}, "conversation", "unsupported_parameter", ["leave it out"]),
    (ResponsesBody, {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "x"}}}},
     "text.format.schema", "invalid_schema", ["known: string"]),
    (ResponsesBody, {"truncation": "auto"}, "truncation", "invalid_value", ["disabled"]),
    (MessagesBody, {"max_tokens": None}, "max_tokens", "invalid_type", ["a whole number"]),
    (MessagesBody, {"temperature": 1.5}, "temperature", "invalid_value", ["1 or less"]),
    (MessagesBody, {"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]", "invalid_value", ["custom"]),
    (MessagesBody, {"tools": [{"name": "f"}]}, "tools[0].input_schema", "missing_required_parameter", ["missing"]),
    (MessagesBody, {"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.name", "invalid_value", ["`tools`"]),
    (MessagesBody, {"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking.budget_tokens", "invalid_value",
     ["less than `max_tokens`"]),
    (MessagesBody, {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
     "messages[0].content[0].type", "invalid_value", ["image", "text, tool_result"]),
    (MessagesBody, {"messages": [*HI, {"role": "assistant", "content": "x"}]}, "messages", "invalid_value",
     ["end with the user's"]),
    (MessagesBody, {"stop_sequences": [""]}, "stop_sequences[0]", "invalid_value", ["1 is the least"]),
    (CountTokensBody, {"max_tokens": 5}, "max_tokens", "unknown_parameter", ["leave it out"]),
    (EmbeddingBody, {"input": {}}, "input", "invalid_type", ["a string or a list"]),
    (EmbeddingBody, {"input": []}, "input", "invalid_value", ["1 is the least"]),
    (EmbeddingBody, {"encoding_format": "hex"}, "encoding_format", "invalid_value", ["float", "base64"]),
    (ModerationBody, {"input": ["x"] * 65}, "input", "invalid_value", ["64 is the most"]),
    (ModerationBody, {"input": [{"type": "image_url", "image_url": {}}]}, "input[0].type", "invalid_value", ["text"]),
    (TokenizeBody, {"prompt": 5}, "prompt", "invalid_type", ["a string"]),
    (DetokenizeBody, {"tokens": "x"}, "tokens", "invalid_type", ["a list"]),
    (DetokenizeBody, {"tokens": [-1]}, "tokens[0]", "invalid_value", ["0 or more"]),
    (DetokenizeBody, {"tokens": [1.5]}, "tokens[0]", "invalid_type", ["a whole number"]),
]  # fmt: skip


@pytest.mark.parametrize("model, wrong, param, code, words", REFUSALS)
def test_a_refusal_names_the_field_and_what_would_be_right(
    model: type[Body], wrong: dict[str, Any], param: str, code: str, words: list[str]
) -> None:
    error = refusal(model, MINIMAL[model] | wrong)
    assert (error.status, error.param, error.code) == (400, param, code), error.message
    assert all(word in error.message for word in words), error.message
    assert param.rpartition(".")[2] in error.message and len(error.message) < 400


@pytest.mark.parametrize("model", BODIES)
def test_what_must_be_there_and_nothing_else(model: type[Body]) -> None:
    parse_body(model, json.dumps(MINIMAL[model]).encode())
    for name, field in model.model_fields.items():
        name = field.alias or name
        if field.is_required():
            error = refusal(model, {key: value for key, value in MINIMAL[model].items() if key != name})
            assert (error.param, error.code) == (name, "missing_required_parameter")
        else:
            parse_body(
                model, json.dumps(MINIMAL[model] | ({name: None} if name not in MINIMAL[model] else {})).encode()
            )
    documents: list[Any] = [[], "x", 5, None, True]
    for document in documents:
        assert refusal(model, document).code == "invalid_type"


def test_all_bodies_are_tested() -> None:
    assert {operation.body for operation in OPERATIONS} - {None} == set(BODIES)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_a_field_is_given_it_is_accepted_or_refused_by_name(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from(BODIES))
    names = [field.alias or name for name, field in model.model_fields.items()]
    name = data.draw(st.sampled_from(names))
    document = MINIMAL[model] | {name: data.draw(JSON)}
    try:
        body = parse_body(model, json.dumps(document).encode())
        if hasattr(body, "generation"):
            body.generation()
    except ApiError as error:
        assert error.status == 400 and error.code and len(error.message) < 1000
        json_bytes(error.document())


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        json_bytes(parse_json(data))
    except ApiError as error:
        assert error.code in ("invalid_json", "invalid_value")


def test_the_limits_of_a_document() -> None:
    parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    parse_json(b"[" + b"1," * (MAX_NODES - 2) + b"1]")
    for data in (b"[" * (MAX_DEPTH + 1) + b"1" + b"]" * (MAX_DEPTH + 1), b"[" + b"1," * MAX_NODES + b"1]"):
        with pytest.raises(ApiError, match="nested deeper|more than"):
            parse_json(data)


def test_names_that_two_forms_of_a_field_share() -> None:
    class Form(Body):
        name: str | None = Field(None, alias="schema")

    assert refusal(Form, {"name": "x"}).param == "name"
    assert re.fullmatch("unknown parameter `schem`; did you mean `schema`\\?", refusal(Form, {"schem": "x"}).message)
