"""Queues, cancelling and failures. pytest tests/serve/test_worker.py"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest

from minga.serve import worker
from minga.serve.worker import Speed


async def until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + 10
    while not condition():
        assert monotonic() < deadline
        await asyncio.sleep(0.005)


class Visit:
    """One request by hand, whose client can leave."""

    def __init__(self, app: Any, **fields: Any):
        body = {"messages": [{"role": "user", "content": "hi"}]} | fields
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        self.sent: list[dict[str, Any]] = []
        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
            "headers": [(b"host", b"127.0.0.1")], "http_version": "1.1", "scheme": "http", "root_path": "",
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    def hold_body(self) -> None:
        """Only half of the body was ever sent."""
        self._incoming.get_nowait()
        self._incoming.put_nowait({"type": "http.request", "body": b'{"mess', "more_body": True})

    async def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})
        done, _ = await asyncio.wait({self.task}, timeout=5)
        assert done
        await self.task


async def status(client: Any) -> tuple[int, int]:
    document = (await client.arequest("GET", "/api/status")).json()
    return document["running"], document["waiting"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_model(client, llm, stream):
    llm.words = ["word"] * 50

    async def story() -> None:
        llm.gate.clear()
        visit = Visit(client.app, stream=stream)
        await until(lambda: len(llm.params) == 1)
        await visit.leave()
        llm.gate.set()
        await until(lambda: llm.num_closed == 1)
        assert llm.num_made <= 1
        assert await status(client) == (0, 0)

    asyncio.run(story())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_never_served(client, llm, stream):
    async def story() -> None:
        llm.gate.clear()
        first = Visit(client.app)
        await until(lambda: len(llm.params) == 1)
        second = Visit(client.app, stream=stream)
        await asyncio.sleep(0.02)
        assert await status(client) == (1, 1)
        await second.leave()
        assert await status(client) == (1, 0)
        llm.gate.set()
        await first.task
        assert first.sent[0]["status"] == 200 and second.sent == []
        assert len(llm.params) == 1

    asyncio.run(story())


def test_a_client_that_leaves_while_it_sends_is_no_error_of_ours(client, llm, caplog):
    async def story() -> None:
        visit = Visit(client.app)
        visit.hold_body()
        await visit.leave()

    asyncio.run(story())
    assert llm.params == [] and caplog.text == ""


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_is_stopped_says_so_to_whom_it_cannot_answer(client, llm, stream):
    async def story() -> None:
        llm.gate.clear()
        visit = Visit(client.app, stream=stream)
        await until(lambda: len(llm.params) == 1)
        await asyncio.sleep(0.02)
        visit.task.cancel()
        await visit.task
        llm.gate.set()
        await until(lambda: llm.num_closed == 1)
        assert visit.sent[0]["status"] == (200 if stream else 503)
        assert b"shutting_down" in b"".join(message.get("body", b"") for message in visit.sent)

    asyncio.run(story())
    assert llm.num_made <= 1


def test_a_full_queue_says_when_to_come_back(make_client, make_llm):
    llm = make_llm()
    client = make_client({"fake": llm}, max_waiting=2)

    async def story() -> None:
        llm.gate.clear()
        accepted = [asyncio.create_task(client.achat()) for _ in range(3)]
        await until(lambda: len(llm.params) == 1)
        await asyncio.sleep(0.05)
        refused = await client.achat()
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(refused.headers["retry-after"]) > 0
        llm.gate.set()
        assert [(await task).status_code for task in accepted] == [200, 200, 200]
        assert (await client.achat()).status_code == 200

    asyncio.run(story())


def test_requests_are_answered_in_turn_by_one_thread_that_is_not_the_servers(client, llm):
    async def story() -> None:
        answers = await asyncio.gather(*(client.achat(seed=seed) for seed in range(8)))
        assert all(answer.status_code == 200 for answer in answers)

    asyncio.run(story())
    assert [params.seed for params in llm.params] == list(range(8))
    assert len(llm.threads) == 1 and threading.get_ident() not in llm.threads


def test_requests_run_side_by_side(make_client, make_llm):
    llm = make_llm("word " * 30)
    client = make_client({"fake": llm}, max_running=3)

    async def story() -> None:
        llm.gate.clear()
        visits = [Visit(client.app) for _ in range(5)]
        await until(lambda: len(llm.params) >= 1)
        await asyncio.sleep(0.05)
        assert await status(client) == (3, 2)
        await visits[1].leave()
        llm.gate.set()
        for visit in (visits[0], *visits[2:]):
            await visit.task
            assert visit.sent[0]["status"] == 200

    asyncio.run(story())
    assert llm.most_at_once == 3 and llm.running == [] and llm.num_closed == len(llm.params)


def test_a_failed_step_ends_those_that_ran_and_nobody_else(make_client, make_llm):
    llm = make_llm()
    llm.fail_after = 2
    client = make_client({"fake": llm}, max_running=2)

    async def story() -> None:
        llm.gate.clear()
        asked = [asyncio.create_task(client.achat()) for _ in range(3)]
        await until(lambda: len(llm.params) >= 1)
        await asyncio.sleep(0.05)
        llm.gate.set()
        assert [(await task).status_code for task in asked] == [500, 500, 500]
        llm.fail_after = None
        assert (await client.achat()).status_code == 200

    asyncio.run(story())
    assert llm.running == []


def test_a_model_that_fails_is_our_fault_and_the_next_request_works(client, llm, caplog):
    llm.fail_after = 2
    with caplog.at_level(logging.ERROR):
        response = client.chat()
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text and "secret" in caplog.text
    llm.fail_after = None
    assert client.chat().status_code == 200


def test_a_failure_in_the_middle_of_a_stream_is_an_event(client, llm):
    llm.fail_after = 2
    *_, word, failure = client.events()
    assert word["choices"][0]["delta"]["content"] == " ¿qué"
    assert failure["error"]["type"] == "server_error" and failure["error"]["code"] == "generation_failed"
    llm.fail_after = None
    assert client.chat().status_code == 200


def test_a_bug_in_the_server_is_a_json_error_too(client, monkeypatch):
    def broken(_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("minga.serve.runs.Runs.summaries", broken)
    response = client.get("/api/runs")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text


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
