"""What is asked of the endpoints, and what they answer, whole and as a stream."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any

import jsonschema
import pytest

from minga.serve.generation import DEFAULT_MAX_TOKENS
from tests.serve.conftest import ANSWER, HELLO, THINKING_TEMPLATE, TinyLLM, frames, joined, says, until

LONG: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "seed": 5}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Quito", "Lima"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def tool(name: str, parameters: dict[str, Any] = CITY, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


WEATHER, TIME = tool("weather"), tool("time", NOTHING)

# ---------------------------------------------------------------------------------------------- the chat


def test_an_answer_in_one_piece(client, llm):
    document = client.answer(model="tiny", **says(ANSWER))
    assert document["object"] == "chat.completion" and document["model"] == "tiny"
    (choice,) = document["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    usage = document["usage"]
    assert usage["prompt_tokens"] == len(llm.prompts[0])
    assert usage["completion_tokens"] == len(llm.tokenizer.encode(ANSWER))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert llm.comes_to_rest()


def test_an_answer_as_a_stream_is_the_same(client):
    events = client.events(**LONG)
    assert len({(event["id"], event["created"], event["model"], event["object"]) for event in events}) == 1
    assert all("usage" not in event for event in events)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert joined(events) == client.text(**LONG) != ""
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["length"]


def test_usage_is_the_last_event_of_a_stream_that_asks_for_it(client):
    *events, last = client.events(stream_options={"include_usage": True}, **LONG)
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    again = client.answer(**LONG)["usage"]
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert last["usage"]["total_tokens"] == again["total_tokens"] and again["completion_tokens"] == 40


def test_choices_differ_and_can_be_had_again(client, llm):
    document = client.answer(n=3, **LONG)
    texts = [choice["message"]["content"] for choice in document["choices"]]
    assert len(set(texts)) == 3 and [choice["index"] for choice in document["choices"]] == [0, 1, 2]
    assert document["usage"]["completion_tokens"] == 120
    events = client.events(n=3, **LONG)
    assert [joined(events, choice=index) for index in range(3)] == texts
    ends = [event["choices"][0]["index"] for event in events if event["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]
    assert client.text(**LONG) == texts[0]
    assert llm.comes_to_rest()


@pytest.mark.parametrize("stop", ["que", ["que", "zzz"]])
def test_a_stop_string_ends_the_answer_before_itself(client, stop):
    document = client.answer(stop=stop, **says("hola, que tal"))
    assert document["choices"][0]["message"]["content"] == "hola, "
    assert document["choices"][0]["finish_reason"] == "stop"


def test_logprobs_whole_and_streamed(client, llm):
    asked = {"logprobs": True, "top_logprobs": 2, "seed": 5, "structured_outputs": {"regex": "[a-z ]{40}"}}
    document = client.answer(**asked)
    whole = document["choices"][0]["logprobs"]["content"]
    chosen = [event["choices"][0] for event in client.events(**asked)]
    streamed = [entry for choice in chosen if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert [entry["token"] for entry in whole] == [entry["token"] for entry in streamed]
    for one, other in zip(whole, streamed, strict=True):
        assert math.isclose(one["logprob"], other["logprob"], abs_tol=1e-3)
    assert [len(entry["top_logprobs"]) for entry in whole] == [2] * len(whole)
    spelled = b"".join(bytes(entry["bytes"]) for entry in whole).decode()
    assert spelled == document["choices"][0]["message"]["content"] and len(spelled) == 40


def test_logit_bias_and_penalties_reach_the_sampler(client, llm):
    q, z = (llm.tokenizer.encode(letter)[0] for letter in "qz")
    bias = {"logit_bias": {str(q): 100, str(z): 90}, "max_tokens": 24, "temperature": 0}
    assert client.text(**bias) == 24 * "q"
    assert set(client.text(frequency_penalty=2, **bias)) == {"q", "z"}
    client.text(presence_penalty=0.5, frequency_penalty=-1, top_k=4, top_p=0.9, min_p=0.01, temperature=0.5, seed=7)
    params = llm.asked[-1]
    assert (params.presence_penalty, params.frequency_penalty, params.top_k) == (0.5, -1, 4)
    assert (params.top_p, params.min_p, params.temperature, params.seed) == (0.9, 0.01, 0.5, 7)


def test_an_answer_has_the_room_that_is_left(client, llm):
    client.answer(temperature=0)
    assert llm.asked[0].max_tokens == min(DEFAULT_MAX_TOKENS, llm.max_context - len(llm.prompts[0]))
    room = llm.max_context - len(llm.prompts[0])
    for name in ("max_tokens", "max_completion_tokens"):
        assert client.answer(**{name: room, **says("a")})
        error = client.error(**{name: room + 1})
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
        for number in (len(llm.prompts[0]), llm.max_context, room + 1, room):
            assert str(number) in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(client, llm, stream):
    error = client.error(messages=[{"role": "user", "content": "z " * 2400}], stream=stream)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert str(llm.max_context) in error["message"] and re.search(r"has 4\d{3} tokens", error["message"])
    assert llm.num_steps == 0


def test_a_model_without_a_chat_template_continues_the_text(make_client):
    llm = TinyLLM.make(chat_template=None)
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "the quick"}]
    client = make_client({"plain": llm})
    assert client.text(messages=[*messages, {"role": "user", "content": "brown"}], **says("fox")) == "fox"
    assert llm.tokenizer.decode(llm.prompts[0]) == "the quick\n\nbrown"


# ---------------------------------------------------------------------------------------------- thinking


@pytest.fixture
def thinker() -> TinyLLM:
    return TinyLLM.make(chat_template=THINKING_TEMPLATE)


def test_thoughts_are_told_apart_and_have_a_budget(make_client, thinker):
    client = make_client({"thinker": thinker})
    asked = {"thinking_budget": 12, "reasoning_effort": "high", "max_tokens": 60, "seed": 1, "ignore_eos": True}
    asked |= {"logit_bias": {str(thinker.tokenizer.encode("</think>", specials=True)[0]): -100}}
    document = client.answer(**asked)
    message = document["choices"][0]["message"]
    assert message["reasoning_content"] and message["content"]
    assert document["usage"]["completion_tokens_details"]["reasoning_tokens"] == 12
    events = client.events(**asked)
    assert joined(events, "reasoning_content") == message["reasoning_content"]
    assert joined(events) == message["content"]


def test_thinking_can_be_turned_off(make_client, thinker):
    client = make_client({"thinker": thinker})
    message = client.message(reasoning_effort="none", **LONG)
    assert "reasoning_content" not in message and message["content"]
    assert thinker.tokenizer.decode(thinker.prompts[-1], skip_specials=False).endswith("<think>\n\n</think>\n\n")


def test_a_format_holds_after_the_thoughts(make_client, thinker):
    client = make_client({"thinker": thinker})
    for budget in (0, 5):
        # ignoring the end of text: a model may end in the middle of its thoughts, and then there is no answer
        message = client.message(thinking_budget=budget, max_tokens=60, ignore_eos=True, **says("Quito"))
        assert message["content"] == "Quito"


# ---------------------------------------------------------------------------------------------- tools


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]


def check(name: str, arguments: Any) -> None:
    jsonschema.validate(arguments, {"weather": CITY, "time": NOTHING}[name])


@pytest.mark.parametrize("seed", range(3))
def test_calls_that_must_come_fit_their_schemas(client, seed):
    asked = {"tools": [WEATHER, TIME], "tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
    document = client.answer(**asked)
    message = document["choices"][0]["message"]
    assert document["choices"][0]["finish_reason"] == "tool_calls" and message["content"] is None
    ((name, arguments),) = calls_of(message)
    check(name, arguments)
    events = client.events(**asked)
    (first, *rest) = [call for event in events for call in (event["choices"][0]["delta"].get("tool_calls") or [])]
    assert first["id"] and first["type"] == "function" and first["function"]["name"] == name
    assert json.loads("".join(piece["function"]["arguments"] for piece in (first, *rest))) == arguments
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "function": {"name": "time"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "time"}}]},
        },
    ],
)
def test_a_named_or_allowed_tool_is_the_one_that_is_called(client, choice):
    message = client.message(tools=[WEATHER, TIME], tool_choice=choice, parallel_tool_calls=False)
    assert calls_of(message) == [("time", {})]


def test_whether_to_call_is_the_models_choice_unless_it_is_not(client, llm):
    call = llm.tokenizer.encode("<tool_call>", specials=True)[0]
    wants = {"logit_bias": {str(call): 100}, "parallel_tool_calls": False, "seed": 1}
    ((name, arguments),) = calls_of(client.message(tools=[WEATHER], **wants))
    check(name, arguments)
    message = client.message(tools=[WEATHER], tool_choice="none", max_tokens=20, **wants)
    assert "tool_calls" not in message
    assert "weather" in llm.tokenizer.decode(llm.prompts[0])
    assert "weather" not in llm.tokenizer.decode(llm.prompts[-1])


def test_several_calls_and_what_is_cut_off(client):
    """Each call that was finished is good; the last may have been cut."""
    document = client.answer(tools=[WEATHER, TIME], tool_choice="required", max_tokens=120, seed=2)
    message = document["choices"][0]["message"]
    calls = message["tool_calls"]
    whole = calls if document["choices"][0]["finish_reason"] == "tool_calls" else calls[:-1]
    assert len({call["id"] for call in calls}) == len(calls)
    for name, arguments in calls_of({"tool_calls": whole}):
        check(name, arguments)


def test_a_tool_that_is_not_strict_takes_any_object(client):
    loose = tool("weather", CITY, strict=False)
    message = client.message(tools=[loose], tool_choice="required", parallel_tool_calls=False, max_tokens=200, seed=4)
    for _, arguments in calls_of({"tool_calls": message["tool_calls"][:-1]}):
        assert isinstance(arguments, dict)


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1]"),
        ({"tools": [tool("a", {"type": "objekt"})]}, "tools[0].function.parameters"),
    ],
)
def test_tools_that_cannot_be(client, fields, param):
    assert client.error(**fields)["param"] == param


def test_a_conversation_with_calls_goes_on(client):
    asked = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "seed": 1}
    said = client.message(**asked)
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "12 degrees"}
    assert client.text(messages=[*HELLO, said, result], tools=[WEATHER], **{**LONG, "tool_choice": "none"})


# ---------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    "fields, check",
    [
        ({"response_format": {"type": "json_object"}, "max_tokens": 300}, lambda text: None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}},
            lambda text: jsonschema.validate(json.loads(text), CITY),
        ),
        ({"structured_outputs": {"json": CITY}}, lambda text: jsonschema.validate(json.loads(text), CITY)),
        ({"structured_outputs": {"regex": "[ab]{3}-[0-9]"}}, lambda text: re.fullmatch("[ab]{3}-[0-9]", text)[0]),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, lambda text: ["yes", "no"].index(text)),
        ({"structured_outputs": {"grammar": 'start: "x" | "y" start'}}, lambda text: re.fullmatch("y*x", text)[0]),
    ],
)
def test_an_answer_follows_its_format(client, fields, check):
    for seed in range(3):
        (choice,) = client.answer(seed=seed, **fields)["choices"]
        text = choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            check(text)
        else:
            assert fields["response_format"]["type"] == "json_object" and text.lstrip().startswith("{")
        assert joined(client.events(seed=seed, **fields)) == text


@pytest.mark.parametrize(
    "fields, code",
    [
        ({"structured_outputs": {"grammar": "start: nowhere"}}, "invalid_schema"),
        ({"structured_outputs": {"regex": "("}}, "invalid_schema"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "invalid_value"),
        ({"structured_outputs": {}}, "invalid_value"),
    ],
)
def test_formats_that_cannot_be(client, llm, fields, code):
    assert client.error(**fields)["code"] == code
    assert llm.num_steps == 0


def test_a_call_that_must_come_wins_over_a_format_and_one_that_may_come_is_beside_it(client):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["a format"]}}}
    asked = {"response_format": form, "tools": [WEATHER], "max_tokens": 120}
    (choice,) = client.answer(**asked, tool_choice="required")["choices"]
    assert choice["message"]["tool_calls"] and not choice["message"]["content"]
    for seed in range(4):
        (choice,) = client.answer(**asked, seed=seed)["choices"]
        assert choice["message"].get("tool_calls") or choice["message"]["content"] == '"a format"'


# ---------------------------------------------------------------------------------------------- the other endpoints


def test_a_text_goes_on_whole_and_streamed(client, llm):
    asked = {"prompt": "the quick", "seed": 3, "ignore_eos": True}
    document = client.post("/v1/completions", **asked).json()
    (choice,) = document["choices"]
    assert (document["object"], choice["finish_reason"]) == ("text_completion", "length")
    assert document["usage"]["completion_tokens"] == 16
    events = client.events("/v1/completions", **asked)
    assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
    echoed = client.post("/v1/completions", echo=True, **asked).json()["choices"][0]["text"]
    assert echoed == "the quick" + choice["text"]
    ids = llm.tokenizer.encode("the quick")
    assert client.post("/v1/completions", **{**asked, "prompt": ids}).json()["choices"][0]["text"] == choice["text"]
    scored = client.post("/v1/completions", logprobs=2, **asked).json()["choices"][0]["logprobs"]
    assert {len(scored[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {16}


def test_the_responses_api_whole_and_streamed(client):
    asked = {"input": "Hello there", "max_output_tokens": 40, "seed": 5, "ignore_eos": True}
    document = client.post("/v1/responses", **asked).json()
    assert (document["object"], document["status"]) == ("response", "incomplete")
    text = document["output"][-1]["content"][0]["text"]
    assert text == client.text(**LONG)
    stream = client.post("/v1/responses", stream=True, **asked).text
    events = [json.loads(data) for data in frames(stream)]
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == text
    assert events[-1]["type"] == "response.incomplete"
    follow = {"input": "And?", "previous_response_id": document["id"], "max_output_tokens": 5}
    assert client.post("/v1/responses", **follow).json()["previous_response_id"] == document["id"]
    assert client.get(f"/v1/responses/{document['id']}").json()["id"] == document["id"]


def test_the_messages_api_whole_and_streamed(client, llm):
    asked = {"messages": HELLO, "max_tokens": 40, "temperature": 0}
    document = client.post("/v1/messages", **asked).json()
    assert (document["type"], document["role"]) == ("message", "assistant")
    text = "".join(block["text"] for block in document["content"])
    assert text == client.text(max_tokens=40, temperature=0)
    events = [json.loads(data) for data in frames(client.post("/v1/messages", stream=True, **asked).text)]
    assert events[-1]["type"] == "message_stop"
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta["text"] for delta in deltas) == text
    counted = client.post("/v1/messages/count_tokens", messages=HELLO).json()
    assert counted == {"input_tokens": len(llm.prompts[0])}


def test_embeddings_are_of_length_one_and_tell_texts_apart(client, llm):
    texts = ["the quick brown fox", "hola, que tal", "the quick brown fox"]
    document = client.post("/v1/embeddings", input=texts).json()
    one, other, again = (entry["embedding"] for entry in document["data"])
    assert math.isclose(sum(x * x for x in one), 1, abs_tol=1e-4)
    assert max(abs(a - b) for a, b in zip(one, again, strict=True)) < 1e-4
    assert sum(a * b for a, b in zip(one, other, strict=True)) < 0.99
    assert document["usage"]["total_tokens"] == sum(len(llm.tokenizer.encode(text)) for text in texts)
    packed = client.post("/v1/embeddings", input=texts[0], encoding_format="base64").json()
    assert isinstance(packed["data"][0]["embedding"], str)


def test_an_embedding_that_cannot_be_is_refused_and_the_others_are_let_go(client, llm, caplog):
    async def story() -> None:
        for inputs in ([[5], [5, 6], [10**6], [7]], ["fine", "z " * 2400]):
            response = await client.apost("/v1/embeddings", input=inputs)
            assert (response.status_code, response.json()["error"]["param"][:5]) == (400, "input")
        await until(lambda: not client.app.state.service.workers["tiny"].running)

    asyncio.run(story())
    assert caplog.text == ""
    assert client.post("/v1/embeddings", input="x").status_code == 200  # nobody waits for what will not come
    assert client.answer(max_tokens=2) and client.get("/api/status").json()["running"] == 0


def test_words_and_tokens(client, llm):
    tokens = client.post("/tokenize", prompt="hola <|im_end|>").json()
    assert tokens == {"count": len(tokens["tokens"]), "max_model_len": llm.max_context, "tokens": tokens["tokens"]}
    assert client.post("/detokenize", tokens=tokens["tokens"]).json() == {"prompt": "hola <|im_end|>"}
    rendered = client.post("/tokenize", messages=HELLO).json()["tokens"]
    client.answer(max_tokens=1)
    assert rendered == llm.prompts[0]
    assert client.post("/detokenize", tokens=[10**6]).json()["error"]["param"] == "tokens[0]"


# ---------------------------------------------------------------------------------------------- several answers


@pytest.mark.parametrize("method, more", [("majority", {}), ("best_of", {}), ("verifier", {"verifier": "^7$"})])
def test_one_of_several_answers_is_given(client, llm, method, more):
    fields = {"structured_outputs": {"regex": "[0-9]"}, "seed": 1, "temperature": 2}
    scaling = {"method": method, "n": 8, "early_stop": False, **more}
    document = client.answer(scaling=scaling, **fields)
    told = document["scaling"]
    text = document["choices"][0]["message"]["content"]
    assert (told["method"], told["n"], told["finished"]) == (method, 8, 8) and len(document["choices"]) == 1
    assert document["usage"]["completion_tokens"] == told["total_tokens"] >= 8
    if method == "majority":
        assert told["votes"][text] == max(told["votes"].values()) and sum(told["votes"].values()) == 8
    elif method == "best_of":
        assert told["chosen"] == max(range(8), key=told["mean_logprobs"].__getitem__)
    else:
        assert told["verified"] == (text == "7") == ("7" in told["votes"])
    events = client.events(scaling=scaling, **fields)
    assert joined(events) == text and events[-1]["scaling"] == told
    assert llm.comes_to_rest()


def test_what_cannot_change_the_choice_is_not_asked(client, llm):
    early = client.answer(scaling={"method": "majority", "n": 16}, logprobs=True, **says("42"))["scaling"]
    assert early["votes"] == {"42": early["finished"]} and early["finished"] <= 16
    assert llm.comes_to_rest()


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_that_are_spent_end_the_answer(client, llm, stream):
    scaling = {"method": "best_of", "n": 4, "max_total_tokens": 20}
    fields = {"scaling": scaling, "max_tokens": 100, "ignore_eos": True, "seed": 1}
    if stream:
        events = client.events(**fields)
        told, reason = events[-1]["scaling"], events[-2]["choices"][0]["finish_reason"]
    else:
        document = client.answer(**fields)
        told, reason = document["scaling"], document["choices"][0]["finish_reason"]
    assert told["finished"] == 0 and 20 <= told["total_tokens"] < 400 and reason == "length"
    assert llm.comes_to_rest()


def test_scaling_that_cannot_be(client):
    assert client.error(scaling={"method": "verifier"})["param"] == "scaling.verifier"
    assert client.error(scaling={"method": "majority"}, n=2)["param"] == "n"


def test_several_prompts_have_their_own_answers(client, llm):
    fields = {"max_tokens": 6, "ignore_eos": True, "seed": 3, "n": 2, "echo": True, "logprobs": 1}
    each = [client.post("/v1/completions", prompt=prompt, **fields).json() for prompt in ("one", "two")]
    together = client.post("/v1/completions", prompt=["one", "two"], **fields).json()
    wanted = [choice for document in each for choice in document["choices"]]
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2, 3]
    assert [choice | {"index": 0} for choice in together["choices"]] == [choice | {"index": 0} for choice in wanted]
    for name in ("prompt_tokens", "completion_tokens"):
        assert together["usage"][name] == sum(document["usage"][name] for document in each)
    ids = [client.post("/tokenize", prompt=prompt).json()["tokens"] for prompt in ("one", "two")]
    again = client.post("/v1/completions", prompt=ids, **fields | {"echo": False}).json()
    assert [choice["text"] for choice in again["choices"]] == [c["text"][3:] for c in together["choices"]]
    refused = client.post("/v1/completions", prompt=["a"] * 9, n=2).json()["error"]
    assert refused["param"] == "n" and "more than 16" in refused["message"]
