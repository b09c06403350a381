"""Bodies of requests: what is taken, and refusals that name the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from minga.serve.chat import ChatBody, plain_message
from minga.serve.errors import ApiError, json_bytes
from minga.serve.generation import Generation
from minga.serve.schema import check, parse_json

HELLO = [{"role": "user", "content": "hello"}]


def parse(**fields: Any) -> Generation:
    return check(ChatBody, {"messages": HELLO} | fields).generation()


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    return caught.value


def test_defaults_leave_the_distribution_alone():
    params = parse().params_within(5000)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1, 0, 0)
    assert (params.seed, params.stop, params.logprobs, params.max_tokens) == (None, (), None, 1024)


def test_every_field_reaches_the_sampler():
    params = parse(
        model="m", temperature=0.5, top_p=0.9, top_k=40, min_p=0.05, seed=7, stop=["a", "b"], logprobs=True,
        top_logprobs=3, max_completion_tokens=9, presence_penalty=0.5, frequency_penalty=-1, logit_bias={"7": -100},
        repetition_penalty=1.5, ignore_eos=True, stream=True, stream_options={"include_usage": True},
    ).params_within(100)  # fmt: skip
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 40, 0.05)
    assert (params.seed, params.stop, params.logprobs, params.max_tokens) == (7, ("a", "b"), 3, 9)
    assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (0.5, -1, {7: -100})
    assert (params.repetition_penalty, params.ignore_eos) == (1.5, True)


@pytest.mark.parametrize(
    "fields, tokens", [({}, 30), ({"max_tokens": 5}, 5), ({"max_tokens": 5, "max_completion_tokens": 5}, 5)]
)
def test_an_answer_fits_the_room_left(fields, tokens):
    assert parse(**fields).params_within(30).max_tokens == tokens


def test_null_is_the_same_as_leaving_out():
    names = ("model", "temperature", "seed", "stop", "tools", "n", "stream", "stream_options", "logprobs", "max_tokens")
    assert parse(**dict.fromkeys(names)) == parse()


def test_roles_and_text_parts():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    generation = parse(
        messages=[
            {"role": "developer", "content": "rules"},
            {"role": "user", "content": parts, "name": "Ana"},
            {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "annotations": []},
        ]
    )
    assert generation.messages == [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "yes"},
    ]


def test_an_answer_that_was_got_can_be_sent_back():
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call], "reasoning_content": "hm"}
    (message,) = check(ChatBody, {"messages": [said]}).messages
    assert plain_message(message) == {
        "role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm",
    }  # fmt: skip


def test_harmless_fields_and_values_that_change_nothing_are_accepted():
    neutral = {"response_format": {"type": "text"}, "tool_choice": "none", "logit_bias": {}, "modalities": ["text"]}
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": True, "parallel_tool_calls": True}
    assert parse(n=1, presence_penalty=0, frequency_penalty=0.0, **neutral, **harmless) == parse()


def test_numbers_too_small_for_float32_are_made_safe():
    params = parse(temperature=5e-324, top_p=1e-320).params_within(1)
    assert params.temperature == 0
    assert params.top_p == 1e-6


def test_negative_seeds_are_seeds():
    assert parse(seed=-1).sampling.seed == 2**63 - 1


REFUSED = [
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "hello"}, "messages", "invalid_type"),
    ({"messages": [5]}, "messages[0]", "invalid_type"),
    ({"messages": [*HELLO, {"content": "x"}]}, "messages[1].role", "missing_required_parameter"),
    ({"messages": [*HELLO, {"role": "root", "content": "x"}]}, "messages[1].role", "invalid_value"),
    ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content", "missing_required_parameter"),
    ({"messages": [*HELLO, {"role": "user", "content": 5}]}, "messages[1].content", "invalid_type"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "invalid_type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "missing_required_parameter",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "messages[0].tool_calls[0].id",
        "missing_required_parameter",
    ),
    ({"messages": [{"role": "user", "contents": "x"}]}, "messages[0].contents", "unknown_parameter"),
    ({"model": 5}, "model", "invalid_type"),
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"temperature": 2.5}, "temperature", "invalid_value"),
    ({"temperature": float("inf")}, "temperature", "invalid_value"),
    ({"temperature": 10**400}, "temperature", "invalid_type"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_p": 1.5}, "top_p", "invalid_value"),
    ({"top_k": -1}, "top_k", "invalid_value"),
    ({"top_k": 1.5}, "top_k", "invalid_type"),
    ({"min_p": 2}, "min_p", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "invalid_value"),
    ({"max_completion_tokens": True}, "max_completion_tokens", "invalid_type"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"seed": "7"}, "seed", "invalid_type"),
    ({"stop": 5}, "stop", "invalid_type"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a", 5]}, "stop[1]", "invalid_type"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"stop": "x" * 257}, "stop", "invalid_value"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": []}, "stream_options", "invalid_type"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown_parameter"),
    ({"n": 17}, "n", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": True}, "n", "invalid_type"),
    ({"logprobs": 5}, "logprobs", "invalid_type"),
    ({"top_logprobs": 5}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": "0"}, "frequency_penalty", "invalid_type"),
    ({"audio": {}}, "audio", "unsupported_parameter"),
    ({"functions": []}, "functions", "unsupported_parameter"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
    ({"logit_bias": {"5": "much"}}, "logit_bias.5", "invalid_type"),
    ({"logit_bias": [5]}, "logit_bias", "invalid_type"),
    ({"logit_bias": {str(n): 1 for n in range(2000)}}, "logit_bias", "invalid_value"),
    ({"reasoning_effort": "huge"}, "reasoning_effort", "invalid_value"),
    ({"thinking_budget": -1}, "thinking_budget", "invalid_value"),
    ({"scaling": {"method": "guess"}}, "scaling.method", "invalid_value"),
    ({"scaling": {"method": "majority", "n": 65}}, "scaling.n", "invalid_value"),
    ({"moderation": {"policy": {"input": {"mode": "hide"}}}}, "moderation.policy.input.mode", "invalid_value"),
]


@pytest.mark.parametrize("fields, param, code", REFUSED, ids=[f"{param}-{code}" for _, param, code in REFUSED])
def test_refusals_name_the_field(fields, param, code):
    error = refusal(**fields)
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert f"`{param}`" in error.message
    assert len(error.message) < 300


def test_messages_are_needed():
    with pytest.raises(ApiError) as caught:
        check(ChatBody, {})
    assert (caught.value.param, caught.value.code) == ("messages", "missing_required_parameter")


def test_an_unknown_field_is_refused_with_the_nearest_name():
    assert "did you mean `temperature`?" in refusal(temprature=1).message
    assert "leave it out" in refusal(zzz=1).message


def test_messages_stay_short_for_long_values():
    long = "x" * 1_000_000
    for fields in ({long: 1}, {"messages": [{"role": long, "content": "x"}]}, {"max_tokens": -(10**4000)}):
        assert len(refusal(**fields).message) < 300


@pytest.mark.parametrize(
    "body, words",
    [
        (b"", "line 1, column 1"),
        (b"{", "line 1, column 2"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "too large a number"),
        (b'{"a": "\xff"}', "not UTF-8 from byte 7"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 70 + b"]" * 70, "nested deeper than 64 levels"),
        (b"[" + b"0," * 250_000 + b"0]", "more than 250000 values"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number that is too long"),
    ],
)
def test_what_is_no_json_is_refused(body, words):
    with pytest.raises(ApiError, match=words) as caught:
        parse_json(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    "body, param",
    [
        (rb'{"messages": [{"role": "user", "content": "\ud83d"}]}', "messages[0].content"),
        (rb'{"stop": ["\uDE00\uD83D"]}', "stop[0]"),
        (rb'{"\ud800": 1}', "*"),
        (rb'"\ud800"', ""),
    ],
)
def test_half_a_character_is_refused_where_it_stands(body, param):
    with pytest.raises(ApiError, match="half of a surrogate pair") as caught:
        parse_json(body)
    assert caught.value.param == param


def test_whole_surrogate_pairs_are_characters():
    assert parse_json(rb'{"a": "\ud83d\ude00"}') == {"a": "😀"}


def test_replies_are_valid_json_whatever_a_text_holds():
    assert json.loads(json_bytes({"text": "año \ud83d"})) == {"text": "año \ud83d"}
