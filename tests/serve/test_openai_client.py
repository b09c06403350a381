"""The official client against a real socket. pytest tests/serve/test_openai_client.py"""

from __future__ import annotations

import socket
from time import monotonic, sleep

import httpx
import openai
import pytest

ANSWER = "Hola, ¿qué tal? Adiós."
HELLO = [{"role": "user", "content": "Hello there"}]


@pytest.fixture
def official(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_it_chats(official):
    completion = official.chat.completions.create(model="fake", messages=HELLO, temperature=0.5, seed=1)
    assert completion.choices[0].message.content == ANSWER
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.total_tokens == 7


def test_it_streams_with_usage(official):
    stream = official.chat.completions.create(
        model="fake", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 4)


def test_its_own_accumulator_agrees(official):
    with official.chat.completions.stream(model="fake", messages=HELLO, logprobs=True) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert final.choices[0].message.content == ANSWER
    assert final.choices[0].logprobs.content[0].bytes == [0xC3]


def test_what_it_got_can_be_sent_back(official):
    answer = official.chat.completions.create(model="fake", messages=HELLO).choices[0].message
    again = official.chat.completions.create(model="fake", messages=[*HELLO, answer, *HELLO])
    assert again.usage.prompt_tokens == 3 + 5 + 3


def test_models(official):
    assert [model.id for model in official.models.list()] == ["fake"]
    assert official.models.retrieve("fake").id == "fake"


def test_its_errors(official):
    with pytest.raises(openai.NotFoundError) as unknown:
        official.chat.completions.create(model="other", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        official.chat.completions.create(model="fake", messages=HELLO, n=2)
    assert bad.value.param == "n"


def test_a_failure_in_a_stream_raises(official, llm):
    llm.fail_after = 2
    with pytest.raises(openai.APIError, match="the model failed"):
        list(official.chat.completions.create(model="fake", messages=HELLO, stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_stops_the_model(address, llm, stream):
    llm.words = ["word"] * 60
    llm.gate.clear()
    host, port = address.removeprefix("http://").split(":")
    body = b'{"stream": %s, "messages": [{"role": "user", "content": "hi"}]}' % (b"true" if stream else b"false")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_for(lambda: len(llm.params) == 1)
    sleep(0.3)  # the server reads the end of the connection
    llm.gate.set()
    wait_for(lambda: llm.num_closed == 1)
    assert llm.num_made <= 1


def test_a_large_body_gets_its_answer_before_the_connection_closes(address):
    response = httpx.post(f"{address}/v1/chat/completions", content=b"x" * (8 << 20))
    assert response.status_code == 413


def wait_for(condition) -> None:
    deadline = monotonic() + 10
    while not condition():
        assert monotonic() < deadline
        sleep(0.005)
