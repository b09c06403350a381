"""Queues, cancelling, deadlines and failures."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from time import monotonic, sleep
from typing import Any

import httpx
import pytest

from minga.serve import answer, app, worker
from minga.serve.keys import Keys
from minga.serve.store import Store
from minga.serve.worker import Speed
from tests.serve.conftest import HELLO, Client, TinyLLM, Visit, frames, serving, until

LONG = {"max_tokens": 400, "ignore_eos": True}


async def status(client: Client) -> tuple[int, int]:
    document = (await client.arequest("GET", "/api/status")).json()
    return document["running"], document["waiting"]


# ---------------------------------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize(
    "path, fields",
    [
        ("/v1/chat/completions", {"stream": False, **LONG}),
        ("/v1/chat/completions", {"stream": True, **LONG}),
        ("/v1/chat/completions", {"n": 4, **LONG}),
        ("/v1/chat/completions", {"scaling": {"method": "best_of"}, **LONG}),
        ("/v1/completions", {"prompt": "the", "stream": True, **LONG}),
        ("/v1/responses", {"input": "Hello", "stream": True, "max_output_tokens": 400}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 400}),
        ("/v1/embeddings", {"input": ["the quick"] * 40}),
    ],
)
def test_a_client_that_leaves_stops_the_model(make_client, llm, path, fields):
    client = make_client({"tiny": llm}, max_running=2)

    async def story() -> None:
        llm.gate.clear()
        visit = Visit(client.app, path, **fields)
        await until(lambda: client.app.state.service.workers["tiny"].running > 0)
        await visit.leave()
        llm.gate.set()
        await until(lambda: llm.is_idle and not client.app.state.service.workers["tiny"].running)
        assert llm.num_steps <= 1
        assert await status(client) == (0, 0)

    asyncio.run(story())
    assert client.answer(max_tokens=2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_never_served(client, llm, stream):
    async def story() -> None:
        llm.gate.clear()
        first = Visit(client.app, max_tokens=2)
        await until(lambda: len(llm.asked) == 1)
        second = Visit(client.app, stream=stream)
        await until(lambda: client.app.state.service.workers["tiny"].waiting == 1)
        assert await status(client) == (1, 1)
        await second.leave()
        llm.gate.set()
        await first.task
        assert first.status == 200 and second.sent == []
        await until(lambda: llm.is_idle and not client.app.state.service.workers["tiny"].running)
        assert await status(client) == (0, 0) and len(llm.asked) == 1

    asyncio.run(story())


def test_a_client_that_leaves_while_it_sends_is_no_error_of_ours(client, llm, caplog):
    async def story() -> None:
        visit = Visit(client.app)
        visit.hold_body()
        await visit.leave()

    asyncio.run(story())
    assert llm.asked == [] and caplog.text == ""


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_stops_the_model(client, llm, stream):
    llm.gate.clear()
    with serving(client.app) as address:
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps({"messages": HELLO, "stream": stream, **LONG}).encode()
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            wait_for(lambda: len(llm.asked) == 1)
        wait_for(
            lambda: 'minga:cancelled_total{engine="0",model_name="tiny"} 1.0' in httpx.get(f"{address}/metrics").text
        )
        llm.gate.set()
        wait_for(lambda: llm.is_idle)
        assert llm.num_steps <= 1


# ---------------------------------------------------------------------------------------------- a server that stops


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_is_stopped_says_so_to_whom_it_cannot_answer(client, llm, stream):
    async def story() -> None:
        llm.gate.clear()
        visit = Visit(client.app, stream=stream, **LONG)
        await until(lambda: len(llm.asked) == 1)
        visit.task.cancel()
        await visit.task
        llm.gate.set()
        await until(lambda: llm.is_idle)
        assert visit.status == 503
        assert b"shutting_down" in visit.body

    asyncio.run(story())
    assert llm.num_steps <= 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_says_so(make_client, llm, stream):
    """A stream that has begun has sent its status, so there it is the last event."""
    client = make_client({"tiny": llm}, deadline=0.3, max_running=1)

    async def story() -> None:
        visit = Visit(client.app, stream=stream, **LONG)
        if stream:
            await until(lambda: len(visit.sent) > 2)
        llm.gate.clear()
        await visit.task
        llm.gate.set()
        await until(lambda: llm.is_idle)
        if stream:
            *_, last, done = frames(visit.body.decode())
            assert visit.status == 200 and done == "[DONE]"
        else:
            last = visit.body.decode()
            assert visit.status == 408
        error = json.loads(last)["error"]
        assert error["code"] == "timeout" and "0.3 seconds" in error["message"]

    llm.step = slowed(llm)
    asyncio.run(story())
    assert client.answer(max_tokens=1)


def slowed(llm: TinyLLM):
    """A step that takes as long as a large model's."""
    step = llm.step

    def slow() -> None:
        sleep(0.01)
        step()

    return slow


def test_an_embedding_that_takes_too_long_says_so(make_client, llm):
    client = make_client({"tiny": llm}, deadline=0.1)
    llm.gate.clear()

    async def story() -> None:
        response = await client.apost("/v1/embeddings", input="the")
        assert (response.status_code, response.json()["error"]["code"]) == (408, "timeout")
        llm.gate.set()
        await until(lambda: not client.app.state.service.workers["tiny"].running)

    asyncio.run(story())
    assert client.post("/v1/embeddings", input="the").status_code == 200


def test_a_client_that_reads_no_more_is_given_up_at_the_deadline(make_client, llm, monkeypatch):
    monkeypatch.setattr(answer, "FAREWELL_SECONDS", 0.05)
    client = make_client({"tiny": llm}, deadline=0.1)

    async def story() -> None:
        visit = Visit(client.app, reads=False, stream=True, **LONG)
        await asyncio.wait_for(visit.task, 5)
        await until(lambda: llm.is_idle)

    asyncio.run(story())
    assert client.answer(max_tokens=1)


def test_a_body_that_never_ends_is_given_up(client, llm, monkeypatch):
    monkeypatch.setattr(app, "MAX_BODY_SECONDS", 0.05)

    async def story() -> None:
        visit = Visit(client.app)
        visit.hold_body()
        await asyncio.wait_for(visit.task, 5)
        assert visit.status == 408 and b"not sent within" in visit.body

    asyncio.run(story())
    assert llm.asked == [] and client.answer(max_tokens=1)


# ---------------------------------------------------------------------------------------------- the queue


def test_a_full_queue_says_when_to_come_back(make_client, llm):
    client = make_client({"tiny": llm}, max_running=1, max_waiting=2)

    async def story() -> None:
        llm.gate.clear()
        accepted = [asyncio.create_task(client.achat(max_tokens=2)) for _ in range(3)]
        await until(lambda: client.app.state.service.workers["tiny"].waiting == 2)
        refused = await client.achat()
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(refused.headers["retry-after"]) > 0
        llm.gate.set()
        assert [(await task).status_code for task in accepted] == [200, 200, 200]
        assert (await client.achat(max_tokens=2)).status_code == 200

    asyncio.run(story())


def test_a_crowd_that_comes_at_once_is_no_longer_than_the_queue(make_client, llm):
    client = make_client({"tiny": llm}, max_running=1, max_waiting=2)

    async def story() -> None:
        llm.gate.clear()
        asked = [asyncio.create_task(client.achat(max_tokens=2)) for _ in range(12)]
        await until(lambda: sum(task.done() for task in asked) == 9)
        llm.gate.set()
        assert sorted([(await task).status_code for task in asked]) == 3 * [200] + 9 * [429]

    asyncio.run(story())


def test_one_thread_answers_that_is_not_the_servers(client, llm):
    async def story() -> None:
        answers = await asyncio.gather(*(client.achat(seed=seed, max_tokens=3) for seed in range(8)))
        assert all(answer.status_code == 200 for answer in answers)

    asyncio.run(story())
    assert sorted(params.seed for params in llm.asked) == list(range(8)) and llm.most_at_once == 1
    assert len(llm.threads) == 1 and threading.get_ident() not in llm.threads


def test_requests_run_side_by_side(make_client, llm):
    client = make_client({"tiny": llm}, max_running=3)

    async def story() -> None:
        llm.gate.clear()
        visits = [Visit(client.app, max_tokens=30) for _ in range(5)]
        await until(lambda: client.app.state.service.workers["tiny"].waiting == 2)
        assert await status(client) == (3, 2)
        await visits[1].leave()
        llm.gate.set()
        for visit in (visits[0], *visits[2:]):
            await visit.task
            assert visit.status == 200
        await until(lambda: llm.is_idle)

    asyncio.run(story())
    assert llm.most_at_once == 3


@pytest.fixture
def keys(tmp_path):
    store = Store(tmp_path / "keys.db")
    yield Keys(store)
    store.close()


def test_who_asks_for_much_does_not_keep_others_out(make_client, llm, keys):
    """One that comes behind fifty of another key is the next but one."""
    many, one = keys.add("many"), keys.add("one")
    client = make_client({"tiny": llm}, keys=keys, max_running=2)

    async def story() -> None:
        llm.gate.clear()
        crowd = [Visit(client.app, key=many, max_tokens=2, seed=1) for _ in range(50)]
        await until(lambda: client.app.state.service.workers["tiny"].waiting == 48)
        single = Visit(client.app, key=one, max_tokens=2, seed=2)
        await until(lambda: client.app.state.service.workers["tiny"].waiting == 49)
        llm.gate.set()
        await asyncio.gather(single.task, *(visit.task for visit in crowd))
        assert {visit.status for visit in [single, *crowd]} == {200}

    asyncio.run(story())
    assert [params.seed for params in llm.asked].index(2) <= 3


def test_a_cached_prompt_is_shared_within_a_key_and_with_nobody_else(make_client, llm, keys):
    mine, other = keys.add("mine"), keys.add("other")
    client = make_client({"tiny": llm}, keys=keys)
    asked = {"messages": [{"role": "user", "content": "z " * 200}], "max_tokens": 2}

    def num_cached(key: str, **fields: str) -> int:
        usage = client.chat({"authorization": f"Bearer {key}"}, **asked, **fields).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert num_cached(mine) == 0
    assert num_cached(mine) > 100
    assert num_cached(other) == 0
    assert num_cached(mine, prompt_cache_key="x") == 0 and num_cached(mine, prompt_cache_key="x") > 100


# ---------------------------------------------------------------------------------------------- failures


def test_a_failed_step_ends_those_that_ran_and_nobody_else(make_client, llm):
    llm.fail_after = 2
    client = make_client({"tiny": llm}, max_running=2)

    async def story() -> None:
        llm.gate.clear()
        asked = [asyncio.create_task(client.achat(**LONG)) for _ in range(3)]
        await until(lambda: client.app.state.service.workers["tiny"].waiting == 1)
        llm.gate.set()
        assert sorted([(await task).status_code for task in asked])[1:] == [500, 500]
        llm.fail_after = None
        assert (await client.achat(max_tokens=2)).status_code == 200

    asyncio.run(story())
    assert llm.comes_to_rest()


def test_a_model_that_fails_is_our_fault_and_the_next_request_works(client, llm, caplog):
    llm.fail_after = 2
    with caplog.at_level(logging.ERROR):
        response = client.chat(**LONG)
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text and "secret" in caplog.text
    llm.fail_after = None
    assert client.chat(max_tokens=2).status_code == 200


def stream_that_fails(client: Client, llm: TinyLLM, path: str, **fields: Any) -> list[str]:
    """Its events; the model fails once it has spoken."""
    llm.step = slowed(llm)

    async def story() -> Visit:
        visit = Visit(client.app, path, stream=True, **fields)
        await until(lambda: len(visit.sent) > 1)
        llm.fail_after = llm.num_steps
        await visit.task
        return visit

    return frames(asyncio.run(story()).body.decode())


def test_a_failure_in_the_middle_of_a_stream_is_its_last_event(client, llm):
    *events, done = stream_that_fails(client, llm, "/v1/chat/completions", **LONG, seed=1)
    *_, word, failure = map(json.loads, events)
    assert done == "[DONE]" and word["choices"][0]["delta"]["content"]
    assert failure["error"]["type"] == "server_error" and failure["error"]["code"] == "generation_failed"
    llm.fail_after = None
    assert client.chat(max_tokens=2).status_code == 200


@pytest.mark.parametrize("path, last", [("/v1/responses", "response.failed"), ("/v1/messages", "error")])
def test_each_api_says_in_its_own_way_that_it_failed(client, llm, path, last):
    fields = (
        {"input": "Hello", "ignore_eos": True} if path == "/v1/responses" else {"messages": HELLO, "max_tokens": 200}
    )
    events = [json.loads(data) for data in stream_that_fails(client, llm, path, **fields)]
    assert events[-1]["type"] == last
    llm.fail_after = llm.num_steps
    assert client.post(path, stream=False, **fields).status_code == 500


class Broken:
    """A guard that cannot be understood, after some time."""

    name = "broken"

    def __init__(self, num_good: int):
        self.num_good = num_good

    def scores(self, text: str) -> dict[str, float]:
        self.num_good -= 1
        if self.num_good < 0:
            raise ValueError("a secret of the guard")
        return {}


@pytest.mark.parametrize("num_good", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_guard_that_fails_is_not_taken_for_consent(make_client, llm, num_good, stream, caplog):
    client = make_client({"tiny": llm}, guard=Broken(num_good), moderate=True)
    response = client.chat(stream=stream, structured_outputs={"regex": "[a-z ]{1000}"}, temperature=2)
    if stream and num_good == 3:
        *_, last, done = frames(response.text)
        assert (json.loads(last)["error"]["code"], done) == ("internal_error", "[DONE]")
    elif stream and num_good == 1:
        assert "internal_error" in response.text
    else:
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text and "secret" in caplog.text
    assert llm.comes_to_rest()


def test_speed_counts_the_last_seconds_only(monkeypatch):
    now = 100.0
    monkeypatch.setattr(worker, "monotonic", lambda: now)
    speed = Speed()
    assert speed.tokens_per_second() == 0
    for _ in range(3):
        speed.add(2)
        now += 0.5
    assert speed.tokens_per_second() == pytest.approx(4)
    now += 60
    assert speed.tokens_per_second() == 0


def test_a_large_body_gets_its_answer_before_the_connection_closes(client):
    with serving(client.app) as address:
        assert httpx.post(f"{address}/v1/chat/completions", content=b"x" * (11 << 20)).status_code == 413


def wait_for(condition) -> None:
    deadline = monotonic() + 10
    while not condition():
        assert monotonic() < deadline
        sleep(0.005)
