"""What is there for everybody: paths, refusals, models, the page, runs, and who is kept out."""

from __future__ import annotations

import json
import os
import re
import time

import pytest

import minga
from minga.planner.counts import count_parameters
from minga.serve.app import create_app
from minga.serve.gate import _PUBLIC
from minga.serve.keys import Keys
from tests.serve.conftest import HELLO, Client, TinyLLM

# ---------------------------------------------------------------------------------------------- refusals


def test_an_unknown_model_is_not_found_and_the_known_ones_are_named(client):
    response = client.chat(model="gpt-5")
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "not_found_error")
    assert "gpt-5" in error["message"] and "tiny" in error["message"]


def test_with_two_models_a_request_must_name_one(make_client):
    client = make_client({"one": TinyLLM.make(), "two": TinyLLM.make()})
    response = client.chat()
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
    assert client.answer(model="two", max_tokens=1)["model"] == "two"


def test_messages_that_the_template_refuses_are_the_clients_mistake(make_client):
    llm = TinyLLM.make(chat_template="{{ raise_exception('no') }}")
    assert make_client({"tiny": llm}).error()["param"] == "messages"


def test_large_bodies_are_refused(client):
    response = client.chat(messages=[{"role": "user", "content": "x" * (11 << 20)}])
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
        assert set(error) == {"message", "type", "param", "code"} and error["type"] in (
            "invalid_request_error",
            "not_found_error",
        )
        assert error["code"] and len(error["message"]) < 400
    assert llm.num_steps == 0
    assert client.chat().status_code == 200


# ---------------------------------------------------------------------------------------------- models and status


def test_models_are_listed_and_shown(client):
    document = client.get("/v1/models").json()
    (model,) = document["data"]
    assert document["object"] == "list"
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny", "model", "minga")
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_health(client):
    response = client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_status_tells_size_speed_and_queue(client, llm):
    client.answer(max_tokens=200, ignore_eos=True)
    document = client.get("/api/status").json()
    (model,) = document["models"]
    assert (model["name"], model["max_context"]) == ("tiny", llm.max_context)
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
def test_names_of_runs_lead_nowhere_else(llm, client, tmp_path, name):
    for folder in ("", "other", "runs/first"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "run.jsonl").write_text('{"kind": "a secret"}\n')
    client.app = create_app({"tiny": llm}, tmp_path / "runs")
    assert client.get("/api/runs/first").status_code == 200
    response = client.get(f"/api/runs/{name}")
    assert response.status_code == 404 and "secret" not in response.text


def test_without_a_runs_folder_there_are_no_runs(llm, client, tmp_path):
    client.app = create_app({"tiny": llm}, tmp_path / "nowhere")
    assert client.get("/api/runs").json() == {"runs": []}


# ---------------------------------------------------------------------------------------------- security


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:1", "LOCALHOST", "[::1]:8000", "[::1]"])
def test_this_machines_names_are_answered(client, host):
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "[::1", "[", ""])
def test_other_host_names_are_refused(client, host):
    response = client.get("/", headers={"host": host})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")


def test_the_bound_address_is_a_host_name_too(make_client, llm):
    client = make_client({"tiny": llm}, host="10.0.0.5", keys=Keys(static="k"))
    assert client.get("/health", headers={"host": "10.0.0.5:8000"}).status_code == 200
    assert client.get("/health", headers={"host": "10.0.0.6:8000"}).status_code == 403


def test_bound_to_every_address_any_name_will_do(make_client, llm):
    client = make_client({"tiny": llm}, host="0.0.0.0", keys=Keys(static="k"))
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
def locked(make_client, llm) -> Client:
    return make_client({"tiny": llm}, keys=Keys(static="s3cret"))


def test_every_route_but_the_page_and_health_needs_the_key(locked, llm):
    """All there are, so that a new one cannot be forgotten."""
    checked = 0
    for route in locked.app.routes:
        path = re.sub(r"\{\w+(:path)?\}", "app.js", route.path)
        for method in route.methods - {"HEAD"}:
            response = locked.request(method, path, content="{}" if method == "POST" else None)
            if path in _PUBLIC or path.startswith("/static/"):
                assert response.status_code == 200, path
            else:
                assert response.status_code == 401, (method, path)
                assert response.json()["error"]["type"] == "authentication_error"
                checked += 1
    assert checked >= 18 and llm.num_steps == 0
    assert {"/", "/health", "/ready", "/docs"} == _PUBLIC


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/x"])
@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Bearer s3cre", "Basic s3cret", "s3cret", "Bearer ñ"])
def test_what_is_no_good_key(locked, path, header):
    headers = {"authorization": header.encode("latin-1")} if header else {}
    response = locked.get(path, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


def test_with_the_key_it_answers(locked):
    for headers in ({"authorization": "Bearer s3cret"}, {"authorization": "bearer s3cret"}, {"x-api-key": "s3cret"}):
        assert locked.get("/v1/models", headers=headers).status_code == 200
    assert locked.chat({"x-api-key": "s3cret"}, messages=HELLO, max_tokens=1).status_code == 200


# ---------------------------------------------------------------------------------------------- names of requests


def test_every_reply_has_a_name_and_keeps_the_clients_own(client):
    for path in ("/", "/v1/models", "/nowhere"):
        assert re.fullmatch(r"req_[0-9a-f]{24}", client.get(path).headers["x-request-id"])
    assert client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req_")


def test_a_bug_in_the_server_is_a_json_error_with_a_name_too(client, monkeypatch):
    def broken(_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("minga.serve.runs.Runs.summaries", broken)
    response = client.get("/api/runs")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    assert response.headers["x-request-id"] and response.headers["x-content-type-options"] == "nosniff"


def test_a_server_that_stops_is_not_ready(client):
    assert client.get("/ready").json() == {"status": "ready", "models": ["tiny"]}
    client.app.state.service.draining = True
    response = client.get("/ready")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
    assert int(response.headers["retry-after"]) > 0 and client.get("/health").status_code == 200


def test_the_docs_say_what_there_is(client):
    paths = client.get("/openapi.json").json()["paths"]
    described = {re.sub(r"\{\w+\}", "{}", path) for path in paths}
    routes = {re.sub(r"\{\w+(:path)?\}", "{}", route.path) for route in client.app.routes}
    assert described == routes - {"/", "/docs", "/static/{}", "/openapi.json"}


def test_the_docs_are_a_page(client):
    assert client.get("/docs").headers["content-type"].startswith("text/html")
