"""pytest tests/serve/test_app.py"""

from __future__ import annotations

import json
import os
import time

import pytest

import minga
from minga.planner.counts import count_parameters
from minga.serve.app import create_app

ANSWER = "Hola, ¿qué tal? Adiós."

# ---------------------------------------------------------------------------------------------- answers


def test_an_answer_in_one_piece(client, llm):
    document = client.chat(model="fake").json()
    assert document["object"] == "chat.completion" and document["model"] == "fake"
    (choice,) = document["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert document["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert llm.num_closed == 1


def test_an_answer_as_a_stream(client):
    events = client.events()
    assert len({(event["id"], event["created"], event["model"], event["object"]) for event in events}) == 1
    assert all("usage" not in event for event in events)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWER
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert deltas[-1] == {}


def test_usage_is_the_last_event_of_a_stream_that_asks_for_it(client):
    *events, last = client.events(stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_text_that_is_held_back_is_no_event(client, llm):
    llm.words = ["a", "b"]
    contents = [event["choices"][0]["delta"].get("content") for event in client.events()]
    assert contents == ["", "a", " b", None]


def test_logprobs_whole_and_streamed(client):
    whole = client.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    chosen = [event["choices"][0] for event in client.events(logprobs=True, top_logprobs=2)]
    streamed = [entry for choice in chosen if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert whole == streamed
    assert [entry["token"] for entry in whole] == ["�", "w1", "w2", "w3"]
    assert [len(entry["top_logprobs"]) for entry in whole] == [2, 2, 2, 2]


def test_the_answer_ends_where_max_tokens_says(client):
    document = client.chat(max_tokens=2).json()
    assert document["choices"][0]["finish_reason"] == "length"
    assert document["choices"][0]["message"]["content"] == "Hola, ¿qué"
    assert document["usage"]["completion_tokens"] == 2


def test_without_max_tokens_the_answer_may_fill_the_context(client, llm):
    client.chat()
    assert llm.params[0].max_tokens == llm.max_context - 3


def test_a_model_without_a_chat_template_continues_the_text(make_client, make_llm):
    llm = make_llm(chat_template=None)
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "To be,"}]
    document = make_client({"plain": llm}).chat(messages=[*messages, {"role": "user", "content": "or not"}]).json()
    assert llm.prompts[0] == "To be,\n\nor not"
    assert document["usage"]["prompt_tokens"] == 4
    assert document["choices"][0]["message"]["content"] == ANSWER


# ---------------------------------------------------------------------------------------------- refusals


def test_an_unknown_model_is_not_found_and_the_known_ones_are_named(client):
    response = client.chat(model="gpt-5")
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "invalid_request_error")
    assert "gpt-5" in error["message"] and "fake" in error["message"]


def test_with_two_models_a_request_must_name_one(make_client, make_llm):
    client = make_client({"one": make_llm("uno"), "two": make_llm("dos")})
    response = client.chat()
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
    assert client.chat(model="two").json()["choices"][0]["message"]["content"] == "dos"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(client, stream):
    response = client.chat(messages=[{"role": "user", "content": "word " * 100}], stream=stream)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert "101" in error["message"] and "64" in error["message"]


def test_messages_that_the_template_refuses_are_the_clients_mistake(client):
    response = client.chat(messages=[{"role": "user", "content": "refuse me"}])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


def test_large_bodies_are_refused(client):
    response = client.chat(messages=[{"role": "user", "content": "x" * (4 << 20)}])
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/models", 405),
        ("POST", "/", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("GET", "/v2/models", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/static/index.html", 404),
        ("GET", "/static/../app.py", 404),
        ("GET", "/static/%2e%2e%2fapp.py", 404),
    ],
)
def test_wrong_paths_and_methods(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def with_messages(value: str) -> str:
    return f'{{"messages": {value}}}'


def with_field(field: str) -> str:
    return f'{{"messages": [{{"role": "user", "content": "hi"}}], {field}}}'


HOSTILE = [
    "", " ", "null", "true", "5", '"text"', "[]", "{}", "{", "}", "{'messages': []}", "[" * 5000, '{"a":' * 5000,
    "\x00", "NaN", b"\xff\xfe", b'{"messages": "\xc3\x28"}', b"\xef\xbb\xbf{}", "9" * 5000,
    with_messages("null"), with_messages("{}"), with_messages('"hi"'), with_messages("[]"), with_messages("[[]]"),
    with_messages("[null]"), with_messages("[{}]"), with_messages('[{"role": null, "content": null}]'),
    with_messages('[{"role": "root", "content": "x"}]'), with_messages('[{"role": ["user"], "content": "x"}]'),
    with_messages('[{"role": "user", "content": {}}]'), with_messages('[{"role": "user", "content": [[]]}]'),
    with_messages('[{"role": "user", "content": [{"type": {}}]}]'),
    with_messages('[{"role": "user", "content": [{"type": "text", "text": 5}]}]'),
    with_messages(r'[{"role": "user", "content": "\ud800"}]'), with_messages(r'[{"role": "\udfff", "content": "x"}]'),
    with_messages('[{"role": "user", "content": "' + "x " * 5000 + '"}]'),
    with_field('"temperature": NaN'), with_field('"temperature": 1e999'), with_field('"temperature": -1'),
    with_field('"top_p": -1e999'), with_field('"top_k": 1e3'), with_field('"top_k": ' + "9" * 4000),
    with_field('"max_tokens": -5'), with_field('"max_tokens": ' + "9" * 400), with_field('"max_tokens": "5"'),
    with_field('"seed": 1.5'), with_field('"seed": ' + "9" * 30), with_field('"stop": {}'), with_field('"stop": [""]'),
    with_field('"stop": [null]'), with_field(r'"stop": "\udc00"'), with_field('"stream": 1'), with_field('"n": 100'),
    with_field('"stream": true, "stream_options": "x"'), with_field('"stream": true, "stream_options": {"x": 1}'),
    with_field('"logprobs": "all"'), with_field('"logprobs": true, "top_logprobs": 1e9'),
    with_field('"response_format": 5'), with_field('"tools": {"a": [1]}'), with_field('"presence_penalty": []'),
    with_field('"model": {}'), with_field('"model": ""'), with_field(r'"model": "\ud800"'),
    with_field('"model": "../../etc/passwd"'), with_field(r'"\ud800": 1'), with_field('"": 1'),
    with_field('"__class__": {}'),
]  # fmt: skip


def test_hostile_bodies_are_refused_as_the_clients_mistake(client, llm):
    assert len(HOSTILE) >= 40
    for body in HOSTILE:
        content = body if isinstance(body, bytes) else body.encode()
        response = client.request("POST", "/v1/chat/completions", content=content)
        assert response.status_code in (400, 404), (body[:80], response.text)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        assert error["code"] and len(error["message"]) < 400
    assert llm.num_made == 0
    assert client.chat().status_code == 200


# ---------------------------------------------------------------------------------------------- models and status


def test_models_are_listed_and_shown(client):
    document = client.get("/v1/models").json()
    (model,) = document["data"]
    assert document["object"] == "list"
    assert (model["id"], model["object"], model["owned_by"]) == ("fake", "model", "minga")
    assert client.get("/v1/models/fake").json() == model
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_health(client):
    response = client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_status_tells_size_speed_and_queue(client, llm):
    client.chat()
    document = client.get("/api/status").json()
    (model,) = document["models"]
    assert (model["name"], model["max_context"]) == ("fake", llm.max_context)
    assert model["parameters"] == count_parameters(llm.config).total
    assert model["tokens_per_second"] > 0
    assert (document["version"], document["running"], document["waiting"]) == (minga.__version__, 0, 0)
    assert document["tokens_per_second"] == model["tokens_per_second"]


# ---------------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize(
    "path, kind",
    [
        ("/", "text/html"),
        ("/static/style.css", "text/css"),
        ("/static/app.js", "text/javascript"),
        ("/static/icon.svg", "image/svg+xml"),
    ],
)
def test_the_page_and_its_files(client, path, kind):
    response = client.get(path)
    assert response.status_code == 200 and response.headers["content-type"].split(";")[0] == kind
    assert response.content


@pytest.mark.parametrize("name", ["index.html", "../app.py", "%2e%2e%2fapp.py", "..%5capp.py", "app.js/", "nope.js"])
def test_nothing_else_is_a_file_of_the_page(client, name):
    assert client.get(f"/static/{name}").status_code == 404


def test_the_page_loads_nothing_from_elsewhere(client):
    text = client.get("/").text
    assert "https://" not in text and "<script>" not in text and "style=" not in text


# ---------------------------------------------------------------------------------------------- runs


@pytest.fixture
def run_file(tmp_path):
    folder = tmp_path / "first"
    folder.mkdir()
    return folder / "run.jsonl"


def test_runs_are_summed_up(client, run_file, tmp_path):
    lines = [
        {"kind": "start", "time": 1}, {"kind": "step", "step": 1, "loss": 5.0},
        {"kind": "eval", "step": 1, "bits_per_byte": 3.5}, {"kind": "step", "step": 2, "loss": 4.0},
    ]  # fmt: skip
    run_file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "st')
    (tmp_path / "no-run").mkdir()
    (tmp_path / "a-file").write_text("")
    (run,) = client.get("/api/runs").json()["runs"]
    assert run == {"name": "first", "alive": True, "step": 2, "loss": 4.0, "bits_per_byte": 3.5, "ended": None}
    with run_file.open("a") as file:
        file.write('ep"}\n{"kind": "end", "reason": "done"}\n')
    (run,) = client.get("/api/runs").json()["runs"]
    assert run["ended"] == "done" and not run["alive"]


def test_a_resumed_run_has_not_ended(client, run_file):
    run_file.write_text('{"kind": "end"}\n{"kind": "start"}\n')
    assert client.get("/api/runs").json()["runs"][0]["ended"] is None


def test_a_run_that_is_not_written_any_more_is_not_alive(client, run_file):
    run_file.write_text('{"kind": "start"}\n')
    os.utime(run_file, (1, 1))
    assert client.get("/api/runs").json()["runs"][0]["alive"] is False


def test_a_run_with_slow_steps_is_given_their_time(client, run_file):
    run_file.write_text("".join(f'{{"kind": "step", "step": {n}, "seconds": {400 * n}}}\n' for n in (1, 2, 3)))
    for age, alive in ((1900, True), (2100, False)):
        os.utime(run_file, (time.time() - age,) * 2)
        assert client.get("/api/runs").json()["runs"][0]["alive"] is alive


def test_a_run_that_vanishes_while_it_is_read_is_left_out(client, run_file, monkeypatch):
    monkeypatch.setattr("minga.serve.runs.os.path.isfile", lambda path: True)
    run_file.parent.joinpath("other").touch()  # the folder is there, its run.jsonl is not
    assert client.get("/api/runs").json() == {"runs": []}
    assert client.get("/api/runs/first").status_code == 404


def test_lines_are_read_from_where_the_last_call_ended(client, run_file):
    run_file.write_text('{"kind": "start"}\n{"kind": "step", "step": 1}\n{"kind": "step", "st')
    first = client.get("/api/runs/first").json()
    assert first == {"lines": [{"kind": "start"}, {"kind": "step", "step": 1}], "next": 2}
    assert client.get("/api/runs/first?after=2").json() == {"lines": [], "next": 2}
    with run_file.open("a") as file:
        file.write('ep": 2}\n')
    assert client.get("/api/runs/first?after=2").json() == {"lines": [{"kind": "step", "step": 2}], "next": 3}
    assert client.get("/api/runs/first?after=999").json() == {"lines": [], "next": 3}


def test_numbers_that_json_cannot_say_become_null_and_damage_is_passed_over(client, run_file):
    run_file.write_bytes(
        b'{"loss": NaN, "lr": 1e999}\n\xff\xfe\n[1]\nnot json\n{"text": "\\ud800"}\n' + b"[" * 9999 + b"\n"
    )
    document = client.get("/api/runs/first").json()
    assert document == {"lines": [{"loss": None, "lr": None}, {"text": "\ud800"}], "next": 6}
    assert client.get("/api/runs").json()["runs"][0]["loss"] is None


def test_long_runs_come_in_portions(client, run_file, monkeypatch):
    monkeypatch.setattr("minga.serve.runs.MAX_LINES", 2)
    run_file.write_text("{}\n" * 5)
    sizes = [client.get(f"/api/runs/first?after={after}").json() for after in (0, 2, 4)]
    assert [(len(part["lines"]), part["next"]) for part in sizes] == [(2, 2), (2, 4), (1, 5)]


@pytest.mark.parametrize("after", ["-1", "x", "1.5", "", "9" * 5000])
def test_after_must_be_a_line_number(client, run_file, after):
    run_file.write_text("{}\n")
    response = client.get("/api/runs/first", params={"after": after})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "after")


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2f..", "%2e%2e%2fother", "first%00", "%2fetc", "other", "~"])
def test_names_of_runs_lead_nowhere_else(make_llm, client, tmp_path, name):
    for folder in ("", "other", "runs/first"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "run.jsonl").write_text('{"kind": "a secret"}\n')
    client.app = create_app({"fake": make_llm()}, tmp_path / "runs")
    assert client.get("/api/runs/first").status_code == 200
    response = client.get(f"/api/runs/{name}")
    assert response.status_code == 404 and "secret" not in response.text


def test_without_a_runs_folder_there_are_no_runs(make_llm, client, tmp_path):
    client.app = create_app({"fake": make_llm()}, tmp_path / "nowhere")
    assert client.get("/api/runs").json() == {"runs": []}


# ---------------------------------------------------------------------------------------------- security


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:1", "LOCALHOST", "[::1]:8000", "[::1]"])
def test_this_machines_names_are_answered(client, host):
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "[::1", "[", ""])
def test_other_host_names_are_refused(client, host):
    response = client.get("/", headers={"host": host})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")


def test_the_bound_address_is_a_host_name_too(make_client, make_llm):
    client = make_client({"fake": make_llm()}, host="10.0.0.5", api_key="k")
    assert client.get("/health", headers={"host": "10.0.0.5:8000"}).status_code == 200
    assert client.get("/health", headers={"host": "10.0.0.6:8000"}).status_code == 403


def test_bound_to_every_address_any_name_will_do(make_client, make_llm):
    client = make_client({"fake": make_llm()}, host="0.0.0.0", api_key="k")
    assert client.get("/health", headers={"host": "my-laptop.lan:8000"}).status_code == 200


@pytest.mark.parametrize(
    "origin, status",
    [
        ("http://127.0.0.1:8000", 200),
        ("http://127.0.0.1:9000", 403),
        ("https://evil.example", 403),
        ("null", 403),
    ],
)
def test_other_web_pages_may_not_ask(client, origin, status):
    response = client.get("/v1/models", headers={"origin": origin})
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/nowhere", "/api/runs"])
def test_every_reply_has_the_security_headers(client, path):
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'self';") and "require-trusted-types-for 'script'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"


@pytest.fixture
def locked(make_client, make_llm):
    return make_client({"fake": make_llm()}, api_key="s3cret")


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/fake", "/v1/chat/completions", "/api/status", "/api/runs", "/api/runs/x", "/x"]
)
@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Bearer s3cre", "Basic s3cret", "s3cret", "Bearer ñ"])
def test_everything_but_the_page_needs_the_key(locked, path, header):
    headers = {"authorization": header.encode("latin-1")} if header else {}
    response = locked.get(path, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


def test_with_the_key_it_answers(locked):
    assert locked.get("/v1/models", headers={"authorization": "Bearer s3cret"}).status_code == 200
    assert locked.get("/v1/models", headers={"authorization": "bearer s3cret"}).status_code == 200
    assert locked.get("/health").status_code == 200
    assert locked.get("/static/app.js").status_code == 200
