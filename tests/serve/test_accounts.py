"""Who asked how much: keys and their limits, the meter, the metrics, the access log, and what a reply says of itself."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from minga.serve.keys import Keys
from minga.serve.log import AccessLog
from minga.serve.meter import Meter
from minga.serve.store import Store
from tests.serve.conftest import HELLO, Client, TinyLLM, Visit, until

SECRET = "a secret of the user"
LONG = {"max_tokens": 200, "ignore_eos": True}


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    store = Store(tmp_path / "minga.db")
    yield store
    store.close()


@pytest.fixture
def keys(store) -> Keys:
    return Keys(store)


@pytest.fixture
def meter(store) -> Iterator[Meter]:
    meter = Meter(store)
    yield meter
    meter.close()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def rows(store: Store, meter: Meter) -> list[dict[str, Any]]:
    meter.flush()
    names = "key, model, endpoint, request_id, status, finish_reason, prompt_tokens, cached_tokens, completion_tokens"
    found = store.rows(f"SELECT {names}, busy_seconds FROM usage ORDER BY rowid")
    return [dict(zip([*names.split(", "), "busy_seconds"], row, strict=True)) for row in found]


def counters(client: Client) -> dict[str, float]:
    """Those that are not zero, without the model's label."""
    text = client.get("/metrics").text
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#") and "_bucket" not in line]
    labels = r'(,?(engine="0"|model_name="tiny")),?'
    named = {re.sub(r"\{\}$", "", re.sub(labels, "", name)): float(value) for name, _, value in lines}
    return {name: value for name, value in named.items() if value}


# ---------------------------------------------------------------------------------------------- limits


def test_requests_per_minute(make_client, llm, keys):
    client = make_client({"tiny": llm}, bearer(keys.add("ana", requests_per_minute=2)), keys=keys)
    for left in (1, 0):
        headers = client.chat(max_tokens=1).headers
        assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("2", str(left))
        assert re.fullmatch(r"(\d+m)?\d+(s|ms)", headers["x-ratelimit-reset-requests"])
    response = client.chat(max_tokens=1)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(response.headers["retry-after"]) <= 30
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    assert client.post("/v1/embeddings", input="x").status_code == 429
    assert client.get("/v1/models").status_code == 200  # costs nothing


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_per_minute_are_given_back_where_they_were_not_used(make_client, llm, keys, stream):
    client = make_client({"tiny": llm}, bearer(keys.add("ana", tokens_per_minute=500)), keys=keys)
    for _ in range(3):  # each may take 300
        assert client.chat(max_tokens=300, stream=stream, structured_outputs={"choice": ["a"]}).status_code == 200
    response = client.chat(max_tokens=700)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "request_too_large")
    assert response.headers["x-should-retry"] == "false"
    assert client.chat(max_tokens=100, scaling={"method": "majority", "n": 8}).status_code == 429
    client.chat(max_tokens=300, ignore_eos=True)
    assert client.chat(max_tokens=300).json()["error"]["code"] == "rate_limit_exceeded"


def test_requests_at_once(make_client, llm, keys):
    key = keys.add("ana", max_concurrent=1)
    client = make_client({"tiny": llm}, bearer(key), keys=keys)

    async def story() -> None:
        llm.gate.clear()
        first = Visit(client.app, key=key, **LONG)
        await until(lambda: len(llm.asked) == 1)
        assert (await client.achat()).status_code == 429
        await first.leave()
        llm.gate.set()
        assert (await client.achat(max_tokens=1)).status_code == 200

    asyncio.run(story())


def test_tokens_of_an_answer(make_client, llm, keys):
    client = make_client({"tiny": llm}, bearer(keys.add("ana", max_output_tokens=10)), keys=keys)
    error = client.error(max_tokens=11)
    assert (error["code"], error["param"]) == ("max_output_tokens_exceeded", "max_tokens")
    assert "11" in error["message"] and "10" in error["message"]
    (choice,) = client.answer(ignore_eos=True)["choices"]
    assert choice["finish_reason"] == "length" and llm.asked[-1].max_tokens == 10
    assert client.answer(max_tokens=10)


def test_a_revoked_key_opens_nothing_from_then_on(make_client, llm, keys):
    client = make_client({"tiny": llm}, bearer(keys.add("ana")), keys=keys)
    assert client.chat(max_tokens=1).status_code == 200
    keys.revoke("ana")
    assert client.chat(max_tokens=1).status_code == 401


def test_responses_that_are_kept_are_for_their_own_key(make_client, llm, keys):
    mine, other = bearer(keys.add("mine")), bearer(keys.add("other"))
    client = make_client({"tiny": llm}, keys=keys)
    id = client.post("/v1/responses", mine, input="x", max_output_tokens=1).json()["id"]
    assert client.get(f"/v1/responses/{id}", headers=mine).status_code == 200
    assert client.get(f"/v1/responses/{id}", headers=other).status_code == 404
    refused = client.post("/v1/responses", other, input="x", previous_response_id=id)
    assert refused.status_code == 404 or refused.status_code == 400
    assert client.request("DELETE", f"/v1/responses/{id}", headers=other).status_code == 404


# ---------------------------------------------------------------------------------------------- what is written down


def test_each_request_has_its_row_and_its_counters(make_client, llm, keys, meter, store):
    client = make_client({"tiny": llm}, bearer(keys.add("ana")), keys=keys, meter=meter)
    whole = client.chat({"x-request-id": "whole"}, **LONG).json()["usage"]
    client.chat({"x-request-id": "streamed"}, stream=True, **LONG)
    client.post("/v1/completions", prompt="the", max_tokens=3, ignore_eos=True)
    client.post("/v1/messages", messages=HELLO, max_tokens=2)
    client.post("/v1/embeddings", input="the quick")
    client.error(temperature=9)
    client.error(max_tokens=10**6)
    one, two, text, message, embedding, too_long = rows(store, meter)
    assert {row["key"] for row in rows(store, meter)} == {"ana"}
    assert (one["request_id"], one["endpoint"], one["status"]) == ("whole", "/v1/chat/completions", 200)
    assert (one["finish_reason"], one["completion_tokens"]) == ("length", 200)
    assert one["prompt_tokens"] == whole["prompt_tokens"] and one["busy_seconds"] > 0
    assert {**two, "busy_seconds": 0, "request_id": "whole"} == {**one, "busy_seconds": 0}
    assert (text["endpoint"], text["completion_tokens"]) == ("/v1/completions", 3)
    assert message["endpoint"] == "/v1/messages"
    assert (embedding["endpoint"], embedding["prompt_tokens"], embedding["completion_tokens"]) == (
        "/v1/embeddings", len(llm.tokenizer.encode("the quick")), 0,
    )  # fmt: skip
    assert (too_long["status"], too_long["finish_reason"], too_long["completion_tokens"]) == (400, "error", 0)

    found = counters(client)
    answered = (one, two, text, message)
    assert found["vllm:prompt_tokens_total"] == sum(row["prompt_tokens"] for row in answered)
    assert found["vllm:generation_tokens_total"] == sum(row["completion_tokens"] for row in answered)
    assert found['vllm:request_success_total{finished_reason="length"}'] >= 3
    assert found["vllm:time_to_first_token_seconds_count"] == found["vllm:e2e_request_latency_seconds_count"] == 4
    assert found['minga:requests_refused_total{code="context_length_exceeded"}'] == 1
    assert found['minga:requests_refused_total{code="invalid_value"}'] == 1
    assert "vllm:num_requests_running" not in found and "vllm:kv_cache_usage_perc" not in found


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_said_to_a_client_that_left_is_metered(make_client, llm, keys, meter, store, stream):
    key = keys.add("ana")
    client = make_client({"tiny": llm}, bearer(key), keys=keys, meter=meter)
    step = llm.step

    def one_by_one() -> None:
        llm._runner._seconds_a_step.clear()  # or one step is many
        if llm.num_steps == 5:
            llm.gate.clear()
        step()

    llm.step = one_by_one

    async def story() -> None:
        visit = Visit(client.app, key=key, stream=stream, **LONG)
        await until(lambda: not llm.gate.is_set())
        await visit.leave()
        llm.gate.set()
        await until(lambda: llm.is_idle)

    asyncio.run(story())
    (row,) = rows(store, meter)
    assert (row["status"], row["finish_reason"]) == (499, "abort")
    assert row["prompt_tokens"] == len(llm.prompts[0]) and 0 < row["completion_tokens"] < 200
    found = counters(client)
    assert found["minga:cancelled_total"] == 1 and found['vllm:request_success_total{finished_reason="abort"}'] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_said_before_a_failure_is_metered(make_client, llm, keys, meter, store, stream):
    client = make_client({"tiny": llm}, bearer(keys.add("ana")), keys=keys, meter=meter)
    llm.fail_after = 2
    client.chat(stream=stream, **LONG)
    (row,) = rows(store, meter)
    assert (row["status"], row["finish_reason"]) == (500, "error")
    found = counters(client)
    assert found['minga:requests_refused_total{code="generation_failed"}'] == 1
    assert found['vllm:request_success_total{finished_reason="error"}'] == 1


def test_several_choices_and_cached_prompts_are_counted_right(make_client, llm, keys, meter, store):
    client = make_client({"tiny": llm}, bearer(keys.add("ana")), keys=keys, meter=meter)
    asked = {"messages": [{"role": "user", "content": "z " * 200}], "n": 3, **LONG}
    client.answer(**asked)
    client.answer(**asked)
    first, second = rows(store, meter)
    assert first["completion_tokens"] == second["completion_tokens"] == 600
    assert first["cached_tokens"] == 0 and second["cached_tokens"] > 100
    assert counters(client)["vllm:prefix_cache_hits_total"] == second["cached_tokens"]


def test_a_refused_grammar_and_a_malformed_call_are_counted(make_client, llm):
    client = make_client({"tiny": llm})
    client.error(structured_outputs={"grammar": "start: nowhere"})
    assert counters(client)["minga:grammar_rejections_total"] == 1


# ---------------------------------------------------------------------------------------------- the log


def test_the_log_has_a_line_for_each_and_no_word_of_it(make_client, llm, keys, tmp_path):
    path = tmp_path / "access.log"
    key = keys.add("ana")
    client = make_client({"tiny": llm}, keys=keys, access_log=AccessLog(path))
    messages = [{"role": "user", "content": SECRET}]
    client.chat(bearer(key) | {"x-request-id": "r1"}, messages=messages, max_tokens=2)
    client.chat(bearer(key), messages=messages, max_tokens=2, stream=True)
    client.post(f"/v1/embeddings?api_key={key}", bearer(key), input=SECRET)
    client.chat(bearer("mk-wrong"), messages=messages)
    client.get("/health")

    async def story() -> None:
        llm.gate.clear()
        visit = Visit(client.app, key=key, messages=messages)
        await until(lambda: len(llm.asked) == 3)
        await visit.leave()
        llm.gate.set()

    asyncio.run(story())
    text = path.read_text()
    assert "secret of" not in text and key not in text and "mk-" not in text
    chat, stream, embedding, refused, health, left = map(json.loads, text.splitlines())
    assert (chat["request_id"], chat["key"], chat["model"], chat["status"]) == ("r1", "ana", "tiny", 200)
    assert (chat["method"], chat["path"], chat["completion_tokens"]) == ("POST", "/v1/chat/completions", 2)
    assert stream["prompt_tokens"] == chat["prompt_tokens"] == len(llm.prompts[0])
    assert (embedding["path"], embedding["status"]) == ("/v1/embeddings", 200) and embedding["prompt_tokens"] > 0
    assert (refused["status"], refused["key"], refused["model"]) == (401, None, None)
    assert (health["path"], health["status"]) == ("/health", 200)
    assert (left["status"], left["key"]) == (499, "ana")


def test_a_bug_is_logged_as_one(make_client, llm, tmp_path, monkeypatch):
    def broken(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("minga.serve.runs.Runs.summaries", broken)
    client = make_client({"tiny": llm}, access_log=AccessLog(tmp_path / "access.log"))
    client.get("/api/runs")
    assert json.loads((tmp_path / "access.log").read_text())["status"] == 500


# ---------------------------------------------------------------------------------------------- where it comes from


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name, told", [("tiny", "tiny"), ("模型", "%E6%A8%A1%E5%9E%8B"), ('a"b\\', "a%22b%5C")])
def test_an_answer_says_that_a_machine_wrote_it(make_client, name, told, stream):
    client = make_client({name: TinyLLM.make()})
    response = client.chat(max_tokens=1, stream=stream)
    assert response.status_code == 200
    assert response.headers["x-content-provenance"] == f'ai-generated; generator="minga"; model="{told}"'
    assert "x-content-provenance" not in client.get("/v1/models").headers
