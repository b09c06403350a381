"""The clients that people use, as they come, against a real server with real models: its answers are noise, their form is
not. The Python clients check every document and every event of a stream against their own types.

pytest tests/serve/test_clients.py; with -m peer those of npm too, which are installed once, or taken from the folder that
MINGA_NODE_MODULES names.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pytest
from anthropic.lib.tools import beta_tool
from pydantic import BaseModel

from minga.serve.keys import Keys
from minga.serve.moderation import RuleGuard
from minga.serve.service import Settings
from minga.serve.store import Store
from tests.serve.real_server import CONTEXT, serving, untrained

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
THREAT = "I will find you and kill you tonight"
MODELS = ("plain", "thinker")
BRIEF = {"thinking_budget": 5}  # thoughts, which else would not end


class Weather(BaseModel):
    """What the weather is in a city."""

    city: Literal["Cuzco", "Lima"]
    unit: Literal["C", "F"]


def chat_tool(model: type[BaseModel] = Weather) -> Any:
    return openai.pydantic_function_tool(model, name=model.__name__.lower())


RESPONSES_TOOL: Any = {"type": "function", **chat_tool()["function"]}
MESSAGES_TOOL: Any = {"name": "weather", "description": "Of a city", "input_schema": Weather.model_json_schema()}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {"plain": untrained(), "thinker": untrained(markers=True)}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[Store]:
    store = Store(tmp_path_factory.mktemp("keys") / "minga.db")
    yield store
    store.close()


@pytest.fixture(scope="module")
def address(models, store, tmp_path_factory) -> Iterator[str]:
    settings = Settings(keys=Keys(store, static="secret"), guard=RuleGuard())
    with serving(models, tmp_path_factory.mktemp("runs"), settings) as url:
        yield url


@pytest.fixture(scope="module")
def client(address) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{address}/v1", api_key="secret", max_retries=0, _strict_response_validation=True
    ) as it:
        yield it


@pytest.fixture(scope="module")
def lenient(address) -> Iterator[openai.OpenAI]:
    """For what the client itself does not hold to its types."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as it:
        yield it


@pytest.fixture(scope="module")
def claude(address) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=address, api_key="secret", max_retries=0, _strict_response_validation=True) as it:
        yield it


# ---------------------------------------------------------------------------------------------- openai: chat


@pytest.mark.parametrize("model", MODELS)
def test_every_field_of_the_chat(client, model):
    fields: dict[str, Any] = {
        "frequency_penalty": 0.1, "presence_penalty": 0.1, "logit_bias": {"7": 1}, "logprobs": True, "top_logprobs": 2,
        "max_completion_tokens": 8, "max_tokens": 8, "metadata": {"a": "b"}, "modalities": ["text"], "n": 2,
        "moderation": {"model": "omni-moderation-latest"}, "parallel_tool_calls": True, "prompt_cache_key": "k",
        "prompt_cache_retention": "24h", "reasoning_effort": "none", "response_format": {"type": "text"},
        "safety_identifier": "s", "seed": 1, "service_tier": "auto", "stop": ["\0\0\0"], "store": False,
        "temperature": 0.7, "tools": [chat_tool()], "tool_choice": "none", "top_p": 0.9, "user": "u", "verbosity": "low",
        "extra_body": {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1, "thinking_budget": 4},
    }  # fmt: skip
    completion = client.chat.completions.create(model=model, messages=HELLO, **fields)
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert completion.usage.completion_tokens == sum(len(c.logprobs.content) for c in completion.choices)
    for choice in completion.choices:
        assert choice.finish_reason in ("stop", "length") and len(choice.logprobs.content) <= 8
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
        assert b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode("utf-8", "replace")
    assert completion.moderation.input.results[0].flagged is False
    assert completion.model == model and completion._request_id


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_gives_what_one_document_gives(client, model):
    asked: Any = {"model": model, "messages": HELLO, "max_tokens": 40, "seed": 5, "temperature": 1, "n": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(part.delta.content or "" for part in mine) == choice.message.content
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == choice.finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_stream_helper_tells_what_happens(client):
    with client.chat.completions.stream(
        model="plain",
        messages=HELLO,
        response_format=Weather,
        logprobs=True,
        top_logprobs=1,
        stream_options={"include_usage": True},
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta", "logprobs.content.done"} <= kinds
    assert final.usage.completion_tokens == len(final.choices[0].logprobs.content)
    assert isinstance(final.choices[0].message.parsed, Weather)


@pytest.mark.parametrize("model", MODELS)
def test_a_tool_is_called_and_its_result_read(client, model):
    messages = [*HELLO]
    asked: Any = {"model": model, "messages": messages, "tools": [chat_tool()], "max_tokens": 200, "extra_body": BRIEF}
    first = client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False).choices[0]
    (call,) = first.message.tool_calls
    assert first.finish_reason == "tool_calls" and first.message.content is None
    assert Weather.model_validate_json(call.function.arguments)
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "12 C"}]
    assert client.chat.completions.create(**asked | {"max_tokens": 10}, tool_choice="auto").choices[0].message
    with client.chat.completions.stream(**asked, tool_choice="required", parallel_tool_calls=False) as stream:
        parsed = stream.get_final_completion().choices[0].message
    messages += [parsed, {"role": "tool", "tool_call_id": parsed.tool_calls[0].id, "content": "19 C"}]
    answer = client.chat.completions.parse(**asked, response_format=Weather, tool_choice="none").choices[0].message
    messages += [answer, *HELLO]
    assert client.chat.completions.create(**asked | {"max_tokens": 10}, tool_choice="auto").choices[0].message


@pytest.mark.parametrize("model", MODELS)
def test_a_streamed_call_grows_by_its_arguments(client, model):
    named: Any = {"type": "function", "function": {"name": "weather"}}
    with client.chat.completions.stream(
        model=model,
        messages=HELLO,
        tools=[chat_tool()],
        tool_choice=named,
        parallel_tool_calls=False,
        max_tokens=200,
        extra_body=BRIEF,
    ) as stream:
        events = list(stream)
        message = stream.get_final_completion().choices[0].message
    deltas = [e.arguments_delta for e in events if e.type == "tool_calls.function.arguments.delta"]
    (done,) = [e for e in events if e.type == "tool_calls.function.arguments.done"]
    assert "".join(deltas) == done.arguments == message.tool_calls[0].function.arguments
    assert isinstance(done.parsed_arguments, Weather) and isinstance(
        message.tool_calls[0].function.parsed_arguments, Weather
    )


@pytest.mark.parametrize("model", MODELS)
def test_answers_and_calls_are_parsed_into_models(client, model):
    asked: Any = {"model": model, "messages": HELLO, "max_tokens": 200, "extra_body": BRIEF}
    answer = client.chat.completions.parse(**asked, response_format=Weather).choices[0].message
    assert isinstance(answer.parsed, Weather) and json.loads(answer.content)
    tools: Any = {"tools": [chat_tool()], "tool_choice": "required", "parallel_tool_calls": False}
    (call,) = client.chat.completions.parse(**asked, **tools).choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(**asked, response_format=Weather) as stream:
        done = [event for event in stream if event.type == "content.done"]
    assert isinstance(done[0].parsed, Weather)


def test_json_without_a_schema(client):
    completion = client.chat.completions.create(
        model="plain", messages=HELLO, response_format={"type": "json_object"}, max_tokens=300, temperature=0
    )
    assert completion.choices[0].finish_reason == "length" or json.loads(completion.choices[0].message.content)


def test_thoughts_come_apart_and_go_back(client):
    asked: Any = {"model": "thinker", "messages": HELLO, "max_tokens": 20, "reasoning_effort": "low", "seed": 1}
    more: Any = {"extra_body": BRIEF}
    completion = client.chat.completions.create(**asked, **more)
    message = completion.choices[0].message
    assert completion.usage.completion_tokens_details.reasoning_tokens == 5 and message.content
    chunks = client.chat.completions.create(**asked, **more, stream=True)
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(getattr(d, "reasoning_content", "") for d in deltas) == message.reasoning_content
    again = client.chat.completions.create(**asked | {"messages": [*HELLO, message, *HELLO]})
    assert again.usage.prompt_tokens > completion.usage.prompt_tokens


def test_a_stream_that_is_closed_frees_the_model(client, address):
    stream = client.chat.completions.create(
        model="plain", messages=HELLO, max_tokens=CONTEXT // 2, stream=True, extra_body={"ignore_eos": True}
    )
    assert next(stream).choices and running(client) == 1
    stream.close()
    while running(client):  # its next token is its last
        pass


def running(client: openai.OpenAI) -> int:
    root = str(client.base_url).removesuffix("/v1/")
    return client.get(f"{root}/api/status", cast_to=object)["running"]


# ---------------------------------------------------------------------------------------------- openai: the rest


def test_completions(client, lenient):
    asked: Any = {"model": "plain", "prompt": "Once", "max_tokens": 12, "seed": 3}
    whole = client.completions.create(**asked, echo=True, logprobs=2, n=2, user="u", best_of=None)
    assert all(choice.text.startswith("Once") and choice.logprobs.tokens for choice in whole.choices)
    # The parts have the type of a whole answer, which has no place for an end that has not come.
    chunks = list(lenient.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert f"Once{text}" == whole.choices[0].text and chunks[-1].usage.completion_tokens == 12
    assert client.completions.create(model="plain", prompt=[5, 6, 7]).usage.prompt_tokens == 3


def test_embeddings_are_equal_in_both_encodings(client, lenient):
    asked: Any = {"model": "plain", "input": ["One", "Two, three"]}
    packed = lenient.embeddings.create(**asked)  # as base64, which it unpacks after it has checked the type
    plain = client.embeddings.create(**asked, encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding)
        assert sum(x * x for x in one.embedding) == pytest.approx(1, abs=1e-4)
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 0


def test_moderation(client):
    one = client.moderations.create(input=THREAT).results[0]
    assert one.flagged and one.category_scores.violence > 0.5
    many = client.moderations.create(input=["Good morning", THREAT], model="omni-moderation-latest").results
    assert [result.flagged for result in many] == [False, True]
    parts: Any = [{"type": "text", "text": THREAT}]
    assert client.moderations.create(input=parts).results[0].flagged


def test_moderation_within_answers(client):
    wanted: Any = {"model": "omni-moderation-latest"}
    asked: Any = {"model": "plain", "messages": [{"role": "user", "content": THREAT}], "max_tokens": 5}
    completion = client.chat.completions.create(**asked, moderation=wanted)
    assert completion.moderation.input.results[0].flagged and completion.moderation.output.results
    chunks = list(client.chat.completions.create(**asked, moderation=wanted, stream=True))
    assert [chunk.moderation.input.results[0].flagged for chunk in chunks if chunk.moderation] == [True]
    response = client.responses.create(model="plain", input=THREAT, max_output_tokens=5, moderation=wanted)
    assert response.moderation.input.flagged
    blocked: Any = wanted | {"policy": {"input": {"mode": "block"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked, moderation=blocked)
    assert refused.value.code == "content_filter"


def test_models(client, claude):
    assert [model.id for model in client.models.list()] == list(MODELS)
    assert client.models.retrieve("plain").owned_by == "minga"
    assert [model.id for model in claude.models.list()] == list(MODELS)
    assert claude.models.retrieve("plain").max_input_tokens == CONTEXT


# ---------------------------------------------------------------------------------------------- openai: responses


@pytest.mark.parametrize("model", MODELS)
def test_responses_are_kept_and_gone_on_from(client, model):
    first = client.responses.create(
        model=model, input="Hello", instructions="Be brief.", max_output_tokens=10, metadata={"a": "b"}, store=True,
        temperature=0.5, top_p=0.9, truncation="disabled", service_tier="auto", user="u", prompt_cache_key="k",
        safety_identifier="s", parallel_tool_calls=True, include=["message.output_text.logprobs"], top_logprobs=2,
        text={"format": {"type": "text"}, "verbosity": "low"}, reasoning={"effort": "none"}, background=False,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert (first.status, first.incomplete_details.reason) == ("incomplete", "max_output_tokens") and first.output_text
    assert len(first.output[0].content[0].logprobs) == 10
    assert client.responses.retrieve(first.id).output_text == first.output_text
    second = client.responses.create(model=model, input="On", previous_response_id=first.id, max_output_tokens=5)
    assert second.previous_response_id == first.id and second.usage.input_tokens > first.usage.input_tokens
    items = list(client.responses.input_items.list(second.id, order="asc", limit=2))
    assert [item.role for item in items] == ["user", "assistant", "user"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


@pytest.mark.parametrize("model", MODELS)
def test_a_response_streams(client, model):
    with client.responses.stream(
        model=model, input="Hello", max_output_tokens=20, reasoning={"effort": "low"}, extra_body=BRIEF, temperature=0
    ) as stream:
        events = list(stream)
        final = events[-1].response
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == final.output_text and events[-1].type == "response.incomplete"
    thoughts = [item for item in final.output if item.type == "reasoning"]
    assert len(thoughts) == (model == "thinker")
    raw = list(client.responses.create(model=model, input="Hello", max_output_tokens=5, stream=True))
    assert raw[0].type == "response.created" and raw[-1].response.usage.output_tokens


@pytest.mark.parametrize("model", MODELS)
def test_responses_are_parsed_and_call_tools(client, model):
    parsed = client.responses.parse(model=model, input="Hello", text_format=Weather, extra_body=BRIEF)
    assert isinstance(parsed.output_parsed, Weather)
    asked: Any = {"model": model, "tools": [RESPONSES_TOOL], "parallel_tool_calls": False, "temperature": 0}
    asked["extra_body"] = BRIEF
    conversation: list[Any] = [*HELLO]
    first = client.responses.create(**asked, input=conversation, tool_choice="required")
    (call,) = (item for item in first.output if item.type == "function_call")
    assert Weather.model_validate_json(call.arguments) and first.status == "completed"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "12 C"}
    conversation += [*first.output, result]
    assert client.responses.create(**asked, input=conversation, max_output_tokens=16).output
    kept: Any = client.responses.create(**asked, input=[result], previous_response_id=first.id, max_output_tokens=16)
    assert kept.output
    with client.responses.stream(**asked, input="Hello", tool_choice={"type": "function", "name": "weather"}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds.count("response.function_call_arguments.done") == 1
    assert final.output[-1].name == "weather"
    with client.responses.stream(model=model, input="Hello", text_format=Weather, extra_body=BRIEF) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Weather)


# ---------------------------------------------------------------------------------------------- openai: how it ends


def test_errors_have_their_class_and_say_where(client, address):
    chat = client.chat.completions
    with pytest.raises(openai.BadRequestError) as refused:
        chat.create(model="plain", messages=HELLO, temperature=3)
    assert (refused.value.param, refused.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.BadRequestError) as refused:
        chat.create(model="plain", messages=[{"role": "user", "content": "x" * 3 * CONTEXT}], stream=True)
    assert (refused.value.param, refused.value.code) == ("messages", "context_length_exceeded")
    with pytest.raises(openai.NotFoundError) as refused:
        chat.create(model="other", messages=HELLO)
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="wrong").models.list()
    assert refused.value.code == "invalid_api_key" and refused.value.request_id
    with pytest.raises(openai.LengthFinishReasonError):
        chat.parse(model="plain", messages=HELLO, response_format=Weather, max_tokens=2)


def test_who_asks_too_often_waits_as_long_as_is_said(client, claude, store, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    key = Keys(store).add("hasty", requests_per_minute=1)
    hasty = client.with_options(api_key=key, max_retries=2)
    raw = hasty.chat.completions.with_raw_response.create(model="plain", messages=HELLO, max_tokens=2)
    assert raw.headers["x-ratelimit-limit-requests"] == "1" and raw.headers["x-ratelimit-remaining-requests"] == "0"
    assert raw.headers["x-request-id"] and raw.parse().choices
    with pytest.raises(openai.RateLimitError) as refused:
        hasty.chat.completions.create(model="plain", messages=HELLO, max_tokens=2)
    told = [float(refused.value.response.headers["retry-after"])] * 2
    assert refused.value.code == "rate_limit_exceeded" and slept == pytest.approx(told, abs=2)
    with pytest.raises(anthropic.RateLimitError) as too_often:
        claude.with_options(api_key=key).messages.create(model="plain", messages=HELLO, max_tokens=2)
    assert too_often.value.type == "rate_limit_error"


def test_the_asynchronous_clients(address):
    async def ask() -> None:
        many: Any = {"api_key": "secret", "max_retries": 0, "_strict_response_validation": True}
        async with (
            openai.AsyncOpenAI(base_url=f"{address}/v1", **many) as client,
            anthropic.AsyncAnthropic(base_url=address, **many) as claude,
        ):
            chat, asked = client.chat.completions, {"model": "plain", "messages": HELLO}

            async def streamed() -> list[Any]:
                return [chunk async for chunk in await chat.create(**asked, stream=True, max_tokens=5)]

            async def responded() -> Any:
                async with client.responses.stream(model="plain", input="Hello", text_format=Weather) as stream:
                    return (await stream.get_final_response()).output_parsed

            async def told() -> Any:
                async with claude.messages.stream(**asked, max_tokens=5) as stream:
                    return await stream.get_final_message()

            found = await asyncio.gather(
                chat.create(**asked, max_tokens=5), streamed(), chat.parse(**asked, response_format=Weather),
                responded(), told(), client.embeddings.create(model="plain", input="Hello", encoding_format="float"),
                client.moderations.create(input=THREAT), claude.messages.create(**asked, max_tokens=5),
                client.completions.create(model="plain", prompt="Hello"),
            )  # fmt: skip
            assert all(found)

    asyncio.run(ask())


# ---------------------------------------------------------------------------------------------- anthropic


GREEDY: Any = {"temperature": 0, "top_p": 0.9, "top_k": 40}  # older clients have names for these


@pytest.mark.parametrize("model", MODELS)
def test_messages(claude, model):
    message = claude.messages.create(
        model=model, max_tokens=10, system="Be brief.", stop_sequences=["\0\0\0"], extra_body=GREEDY,
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}]}],
        metadata={"user_id": "u"}, service_tier="auto", output_config={"effort": "low"},
    )  # fmt: skip
    assert message.content[0].type == "text" and message._request_id
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 10)
    counted = claude.messages.count_tokens(model=model, messages=HELLO)
    assert counted.input_tokens == claude.messages.create(model=model, max_tokens=1, messages=HELLO).usage.input_tokens


@pytest.mark.parametrize("model", MODELS)
def test_messages_stream(claude, model):
    with claude.messages.stream(model=model, max_tokens=20, messages=HELLO, extra_body=GREEDY) as stream:
        events = list(stream)
        final = stream.get_final_message()
    assert "".join(event.text for event in events if event.type == "text") == final.content[0].text
    assert final.usage.output_tokens == 20
    with claude.messages.stream(model=model, max_tokens=5, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == stream.get_final_text()
    raw = list(claude.messages.create(model=model, max_tokens=5, messages=HELLO, stream=True))
    assert (raw[0].type, raw[-1].type) == ("message_start", "message_stop")


@pytest.mark.parametrize("model", MODELS)
def test_messages_call_tools(claude, model):
    messages = [*HELLO]
    asked: Any = {"model": model, "messages": messages, "tools": [MESSAGES_TOOL], "max_tokens": 200}
    asked["extra_body"] = GREEDY
    asked["thinking"] = {"type": "enabled", "budget_tokens": 5} if model == "thinker" else {"type": "disabled"}
    with claude.messages.stream(**asked, tool_choice={"type": "any", "disable_parallel_tool_use": True}) as stream:
        partial = "".join(event.partial_json for event in stream if event.type == "input_json")
        first = stream.get_final_message()
    (call,) = calls_of(first)
    assert Weather.model_validate(call.input) and json.loads(partial) == call.input
    assert first.stop_reason == "tool_use"
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "12 C"}]}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    assert claude.messages.create(**asked | {"max_tokens": 10}).usage.output_tokens
    whole = claude.messages.create(
        **asked, tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    )
    assert Weather.model_validate(calls_of(whole)[0].input)


def calls_of(message: Any) -> list[Any]:
    return [block for block in message.content if block.type == "tool_use"]


def test_messages_think(claude):
    asked: Any = {"model": "thinker", "max_tokens": 30, "thinking": {"type": "enabled", "budget_tokens": 6}}
    asked["extra_body"] = GREEDY
    message = claude.messages.create(**asked, messages=HELLO)
    assert [block.type for block in message.content] == ["thinking", "text"] and message.content[0].signature
    with claude.messages.stream(**asked, messages=HELLO) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert {"thinking", "signature", "text"} <= kinds and final.content[0].type == "thinking"
    back: Any = [*HELLO, {"role": "assistant", "content": final.content}, *HELLO]
    assert claude.messages.create(**asked, messages=back).content


def test_messages_are_parsed(claude):
    asked: Any = {"model": "plain", "max_tokens": 200, "messages": HELLO}
    assert isinstance(claude.messages.parse(**asked, output_format=Weather).parsed_output, Weather)
    with claude.messages.stream(**asked, output_format=Weather) as stream:
        assert isinstance(stream.get_final_message().parsed_output, Weather)
    assert isinstance(claude.beta.messages.parse(**asked, output_format=Weather).parsed_output, Weather)


def test_the_beta_client(claude):
    @beta_tool
    def weather(city: Literal["Cuzco", "Lima"]) -> str:
        """The weather of a city."""
        return f"12 C in {city}"

    asked: Any = {"model": "plain", "max_tokens": 60, "messages": HELLO, "extra_body": GREEDY}
    beta = claude.beta.messages
    assert beta.create(**asked, betas=["context-1m-2025-08-07"]).content
    assert beta.count_tokens(model="plain", messages=HELLO).input_tokens > 0
    with beta.stream(**asked) as stream:
        assert stream.get_final_message().usage.output_tokens
    only: Any = {"type": "any", "disable_parallel_tool_use": True}
    runner = beta.tool_runner(**asked, tools=[weather], tool_choice=only, max_iterations=2)
    first, second = list(runner)
    assert first.stop_reason == second.stop_reason == "tool_use"


def test_the_errors_of_messages(claude):
    with pytest.raises(anthropic.BadRequestError) as refused:
        claude.messages.create(model="plain", max_tokens=2, messages=HELLO, extra_body={"temperature": 2})
    assert refused.value.type == "invalid_request_error" and "temperature" in refused.value.message
    with pytest.raises(anthropic.NotFoundError) as refused:
        claude.messages.create(model="other", max_tokens=2, messages=HELLO)
    assert refused.value.type == "not_found_error"
    with pytest.raises(anthropic.AuthenticationError) as refused:
        claude.with_options(api_key="wrong").messages.create(model="plain", max_tokens=2, messages=HELLO)
    assert refused.value.body["type"] == "error" and refused.value.type == "authentication_error"
    assert refused.value.request_id


# ---------------------------------------------------------------------------------------------- npm

PACKAGES = (
    "openai@6", "@anthropic-ai/sdk@1", "ai@6", "@ai-sdk/openai-compatible@2", "@ai-sdk/openai@3", "@ai-sdk/anthropic@3",
    "zod@4",
)  # fmt: skip


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory) -> Path:
    if shutil.which("node") is None:
        pytest.skip("there is no node")
    if there := os.environ.get("MINGA_NODE_MODULES"):
        return Path(there)
    if shutil.which("npm") is None:
        pytest.skip("there is no npm; name a folder that has the packages in MINGA_NODE_MODULES")
    folder = tmp_path_factory.mktemp("npm")
    command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts", *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm could not install the clients: {done.stderr.strip().splitlines()[-1]}")
    return folder / "node_modules"


@pytest.mark.peer
@pytest.mark.parametrize("name", ["openai", "anthropic", "ai-sdk-compatible", "ai-sdk-openai", "ai-sdk-anthropic"])
def test_clients_of_npm(address, node_modules, name):
    command = ["node", str(Path(__file__).with_name("clients.mjs")), address, str(node_modules), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
