"""Requests that mean harm, against the whole server and a real engine: each is refused, says why, and harms nobody else.

The ids of the tests name what went wrong elsewhere, mostly as CVEs of other servers. pytest's timeout is the cap on time.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
import threading
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from minga.config.presets import tiny
from minga.data.tokenizer import train_bpe
from minga.engine.grammar import Grammar, Pattern
from minga.engine.llm import LLM
from minga.engine.sampler import SamplingParams
from minga.errors import UserError
from minga.model.transformer import Transformer
from minga.serve.app import MAX_BODY_BYTES, create_app
from minga.serve.log import AccessLog
from minga.serve.moderation import RuleGuard
from minga.serve.server import bind, configured
from minga.serve.service import Settings

pytestmark = pytest.mark.timeout(30)

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
VOCAB = 290
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    tokenizer = train_bpe(['{"city": "Quito", "days": 5} ' * 9], 270, specials=SPECIALS)
    config = tiny().replace(vocab_size=VOCAB, max_position_embeddings=512, initializer_range=0.2)
    return LLM.from_parts(Transformer(config).init_weights(torch.Generator().manual_seed(3)), tokenizer)


@pytest.fixture(scope="module")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs") / "access.jsonl"


@pytest.fixture(scope="module")
def server(llm: LLM, log_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The app behind its own connections, with a client of it."""
    runs = tmp_path_factory.mktemp("runs")
    (runs.parent / "secret.jsonl").write_text("{}\n")
    settings = Settings(guard=RuleGuard(), access_log=AccessLog(str(log_file)))
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        running = uvicorn.Server(configured(create_app({"little": llm}, runs, settings)))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=20) as client:
                yield client
        finally:
            running.should_exit = True
            thread.join(timeout=10)


@pytest.fixture(autouse=True)
def nothing_broke(server: httpx.Client, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After each attack the server answers as ever, and its log has no traceback."""
    yield
    answer = server.post(CHAT, json={"messages": HI, "max_tokens": 2, "ignore_eos": True})
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]


def refused(
    response: httpx.Response, param: str | None, code: str | None, status: int | tuple[int, ...] = 400
) -> dict[str, Any]:
    statuses = status if isinstance(status, tuple) else (status,)
    assert response.status_code in statuses, response.text[:500]
    error = response.json()["error"]
    assert {"message", "type"} <= set(error) and 10 < len(error["message"]) < 500
    if response.request.url.path.startswith("/v1/messages"):
        return error  # Anthropic's errors have no param and no code
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error
    return error


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HI, "max_tokens": 8} | fields


def text(body: str) -> bytes:
    return body.encode()


# ---------------------------------------------------------------------------------------------- JSON


RAW = {
    "CWE-674 nesting": b"[" * 100_000 + b"]" * 100_000,
    "CWE-674 nesting of objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "CWE-674 nesting inside a field": b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}",
    "CWE-770 250,000 values": b'{"messages":[' + b"1," * 250_000 + b"1]}",
    "half a body": text(json.dumps(chat()))[:-9],
    "empty": b"",
    "NaN": text('{"messages":[{"role":"user","content":"x"}],"temperature":NaN}'),
    "Infinity": text('{"messages":[{"role":"user","content":"x"}],"temperature":-Infinity}'),
    "1e999": text('{"messages":[{"role":"user","content":"x"}],"temperature":1e999}'),
    "a number of 100,000 digits": text('{"seed":' + "9" * 100_000 + "}"),
    "bad UTF-8": b'{"messages":[{"role":"user","content":"\xc3\x28"}]}',
    "overlong UTF-8": b'{"messages":[{"role":"user","content":"\xc0\xaf"}]}',
    "surrogates in UTF-8": b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
    "UTF-16": json.dumps(chat()).encode("utf-16"),
    "UTF-32": json.dumps(chat()).encode("utf-32"),
    "BOM": b"\xef\xbb\xbf" + text(json.dumps(chat())),
    "gzip": gzip.compress(text(json.dumps(chat()))),
    "a NUL byte": b'{"messages":[{"role":"user","content":"\x00"}]}',
    "a raw newline in a text": b'{"messages":[{"role":"user","content":"\n"}]}',
    "two documents": text(json.dumps(chat()) * 2),
    "Python": b"{'messages': None}",
    "pickle CVE-2025-32444": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
}  # fmt: skip


@pytest.mark.parametrize(
    "path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES, "/v1/embeddings", "/v1/moderations", "/tokenize"]
)
def test_what_is_no_json(server: httpx.Client, path: str) -> None:
    for name, body in RAW.items():
        error = refused(server.post(path, content=body), None, "invalid_json")
        assert "not valid JSON" in error["message"], name


@pytest.mark.parametrize("headers", [{"content-encoding": "gzip"}, {"content-type": "text/plain"}, {}])
def test_a_media_type_changes_nothing(server: httpx.Client, headers: dict[str, str]) -> None:
    assert server.post(CHAT, content=json.dumps(chat()), headers=headers).status_code == 200


def test_of_two_keys_of_one_name_the_last_counts(server: httpx.Client) -> None:
    body = '{"messages":[{"role":"user","content":"x"}],"max_tokens":2,"max_tokens":"x"}'
    refused(server.post(CHAT, content=body), "max_tokens", "invalid_type")


@pytest.mark.parametrize("escape", ["\\ud800", "\\udfff", "\\udc00\\ud800"])
def test_half_a_surrogate_pair(server: httpx.Client, escape: str) -> None:
    where = {
        "messages[0].content": '{"messages":[{"role":"user","content":"%s"}]}',
        "messages[0].name": '{"messages":[{"role":"user","content":"x","name":"%s"}]}',
        "model": '{"messages":[],"model":"a%s"}',
        "stop[1]": '{"messages":[],"stop":["a","%s"]}',
    }
    for param, body in where.items():
        error = refused(server.post(CHAT, content=body % escape), param, "invalid_value")
        assert "whole character" in error["message"]


# ---------------------------------------------------------------------------------------------- schemas, patterns, grammars


def schema(schema: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def structured(**fields: Any) -> dict[str, Any]:
    return chat(structured_outputs=fields)


def nested(depth: int, leaf: Any) -> Any:
    for _ in range(depth):
        leaf = {"type": "array", "items": leaf}
    return leaf


def doubled(keyword: str, depth: int) -> dict[str, Any]:
    """2**depth, once each reference is written out."""
    twice = {f"a{n}": {keyword: [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(depth)}
    return {"$defs": {**twice, f"a{depth}": {"type": "string"}}, "$ref": "#/$defs/a0"}


SCHEMA = "response_format.json_schema.schema"
REFUSED_RULES = {
    "CVE-2026-25048 nesting 60": (schema(nested(60, {})), SCHEMA),
    "CVE-2025-57809 nesting 33": (schema(nested(33, {})), SCHEMA),
    "CVE-2025-48944 type": (schema({"type": "something"}), SCHEMA),
    "CVE-2025-48944 type is an object": (schema({"type": {"a": 1}}), SCHEMA),
    "CVE-2025-48944 pattern": (schema({"type": "string", "pattern": "("}), SCHEMA),
    "CVE-2025-48944 pattern is a number": (schema({"type": "string", "pattern": 5}), SCHEMA),
    "CVE-2025-48944 tools": (
        chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}]),
        "tools[0].function.parameters",
    ),
    "CWE-770 5,000 properties": (schema({"properties": {f"p{n}": {} for n in range(5000)}}), SCHEMA),
    "CWE-770 enum of 2,000": (schema({"enum": list(range(2000))}), SCHEMA),
    "CWE-770 70 KB": (schema({"description": "x" * 70_000}), SCHEMA),
    "xgrammar 222 s: all of any": (
        schema({"allOf": [{"anyOf": [{"properties": {f"k{n}{m}": {}}} for m in range(3)]} for n in range(14)]}),
        SCHEMA,
    ),
    "CWE-1333 patterns that must all match": (
        schema({"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{8 + n}}}"} for n in range(12)]}), SCHEMA,
    ),
    "CWE-674 a schema that is itself": (schema({"$ref": "#"}), SCHEMA),
    "CWE-674 a schema that is all of itself": (schema({"allOf": [{"$ref": "#"}]}), SCHEMA),
    "SSRF": (schema({"$ref": "http://127.0.0.1:1/x"}), SCHEMA),
    "SSRF file": (schema({"$ref": "file:///etc/passwd"}), SCHEMA),
    "SSRF relative": (schema({"$ref": "other.json"}), SCHEMA),
    "CWE-190 minLength": (schema({"type": "string", "minLength": 10**18}), SCHEMA),
    "CWE-190 maxItems": (schema({"type": "array", "maxItems": -1}), SCHEMA),
    "CWE-190 bounds": (schema({"type": "integer", "minimum": -(10**300), "maximum": 10**300}), SCHEMA),
    "CWE-400 multipleOf": (schema({"type": "integer", "multipleOf": 10**9 + 7}), SCHEMA),
    "CVE-2025-29770 lookahead": (structured(regex="(?=a)a"), "structured_outputs.regex"),
    "CWE-1333 backreference": (structured(regex="(a*)*\\1"), "structured_outputs.regex"),
    "CWE-1333 x{1,100000}": (structured(regex="x{1,100000}"), "structured_outputs.regex"),
    "CWE-1333 ((x{99}){99}){99}": (structured(regex="((x{99}){99}){99}"), "structured_outputs.regex"),
    "CWE-1333 a long pattern": (structured(regex="(a|" * 200 + ")" * 200), "structured_outputs.regex"),
    "CVE-2025-58446 choices": (structured(choice=["x"] * 257), "structured_outputs.choice"),
    "CVE-2025-58446 a long choice": (structured(choice=["x" * 2000]), "structured_outputs.choice"),
    "CVE-2025-58446 an empty choice": (structured(choice=[""]), "structured_outputs.choice"),
    "llama.cpp #26600 60,000 parentheses": (structured(grammar="start: " + "(" * 60_000), "structured_outputs.grammar"),
    "llama.cpp #26600 4,000 parentheses": (
        structured(grammar="start: " + "(" * 4000 + '"a"' + ")" * 4000), "structured_outputs.grammar",
    ),
    "llama.cpp #26600 in a pattern": (
        structured(grammar="start: /" + "(" * 3900 + "a" + ")" * 3900 + "/"), "structured_outputs.grammar",
    ),
    "CWE-400 a terminal of 2**60": (
        structured(grammar="start: A0\n" + "".join(f"A{n}: A{n + 1} A{n + 1}\n" for n in range(60)) + 'A60: "x"'),
        "structured_outputs.grammar",
    ),
    "CWE-400 patterns that cross": (
        structured(grammar="start: A\nA: /.*a.{12}/ & /.*b.{13}/ & /.*c.{14}/ & /.*d.{15}/"),
        "structured_outputs.grammar",
    ),
    "CWE-674 left recursion": (structured(grammar="start: start start | start"), "structured_outputs.grammar"),
    "CWE-674 a terminal that is itself": (structured(grammar='start: A\nA: A "a"'), "structured_outputs.grammar"),
    "CWE-674 nested schema": (
        structured(grammar="start: %json " + '{"items":' * 900 + "{}" + "}" * 900), "structured_outputs.grammar",
    ),
    "SSRF in a grammar": (
        structured(grammar='start: %json {"$ref":"http://127.0.0.1:1/x"}'), "structured_outputs.grammar",
    ),
    "CWE-22 in a grammar": (structured(grammar='%import "/etc/passwd".X\nstart: X'), "structured_outputs.grammar"),
    "CWE-125 tokens out of range": (structured(grammar="start: <[0-4000000000]>"), "structured_outputs.grammar"),
    "CWE-158 NUL": (structured(grammar='start: "\0"'), "structured_outputs.grammar"),
    "CWE-1333 verifier": (chat(scaling={"method": "verifier", "verifier": "(?=a)"}), "scaling.verifier"),
    "CWE-1333 verifier that Python cannot read": (
        chat(scaling={"method": "verifier", "verifier": "\\p{Nothing}"}), "scaling.verifier",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_RULES)
def test_rules_that_are_refused(server: httpx.Client, name: str) -> None:
    body, param = REFUSED_RULES[name]
    error = refused(server.post(CHAT, json=body), param, None)
    assert error["code"] in ("invalid_schema", "invalid_value")
    assert "root:" not in error["message"]  # of /etc/passwd


BOUNDED_RULES = {
    "CWE-770 1,000 properties": schema({"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(1000)}}),
    "CVE-2025-57809 doubled anyOf": schema(doubled("anyOf", 25)),
    "CVE-2025-57809 doubled allOf": schema(doubled("allOf", 25)),
    "CWE-674 lists of lists": schema({"type": "array", "items": {"$ref": "#"}}),
    "CWE-770 maxLength": schema({"type": "string", "maxLength": 10**6}),
    "CWE-770 minLength": schema({"type": "string", "minLength": 10**6}),
    "CWE-770 minItems": schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    "CWE-770 lists of 1,000 lists of 1,000": schema(
        {"type": "array", "minItems": 1000, "items": {"type": "array", "minItems": 1000, "items": {"type": "boolean"}}}
    ),
    "CWE-1333 (a+)+": schema({"type": "string", "pattern": "^(a+)+$"}),
    "CWE-1333 (a|b)*a(a|b){20}": structured(regex="(a|b)*a(a|b){20}"),
    "CWE-1333 (.*.*.*)*x": structured(regex="(.*.*.*.*.*.*.*.*)*x"),
    "CWE-1333 words": structured(regex="(\\w{3}\\d|\\w{5}[a-f]|\\w{7})*x\\w{100}"),
    "CVE-2025-58446 choices that begin alike": structured(choice=["a" * n for n in range(1, 257)]),
    "CWE-400 ambiguous": structured(grammar='start: a\na: a a a | a a | "x" | "xx" | b\nb: a b | b a | "x"'),
    "CWE-400 a rule of 2**24": structured(
        grammar="start: a0\n" + "".join(f"a{n}: a{n + 1} a{n + 1}\n" for n in range(24)) + 'a24: "x"'
    ),
    "CWE-400 x{1,1000000}": structured(grammar='start: b{1,1000000}\nb: "a" | "b"'),
    "CWE-400 (((x{1000}){1000}){1000}": structured(grammar='start: b\nb: c{1000}\nc: d{1000}\nd: "x"{1000}'),
    "CWE-400 alternatives": structured(grammar="start: " + "|".join(f'"{n:x}"' for n in range(1200))),
    "grammar syntax in names": schema(
        {
            "type": "object", "required": ['"} | /.*/ #\n', "%json {}", "<[1]>"], "additionalProperties": False,
            "properties": {name: {"const": 1} for name in ('"} | /.*/ #\n', "%json {}", "<[1]>")},
        }
    ),
    "CWE-1333 verifier": chat(scaling={"method": "verifier", "n": 2, "verifier": "(a+)+$"}),
    "CWE-1333 verifier of classes": chat(scaling={"method": "verifier", "n": 2, "verifier": "(\\p{L}|\\p{N}|.)*x"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED_RULES)
def test_rules_whose_work_is_bounded(server: httpx.Client, name: str) -> None:
    """Such an answer is given, or refused: never more."""
    response = server.post(CHAT, json=BOUNDED_RULES[name] | {"max_tokens": 40})
    if response.status_code != 200:
        refused(response, None, None)


def test_an_answer_whose_grammar_is_too_complex_ends_alone(server: httpx.Client) -> None:
    """CWE-400: others that are answered in the same steps of the model get all that they asked for."""
    bomb = {
        "structured_outputs": BOUNDED_RULES["CWE-400 (((x{1000}){1000}){1000}"]["structured_outputs"],
        "max_tokens": 40,
    }
    wanted = {"messages": HI, "max_tokens": 300, "ignore_eos": True, "stream": True}
    with server.stream("POST", CHAT, json=wanted | {"stream_options": {"include_usage": True}}) as other:
        lines = other.iter_lines()
        next(lines)
        error = refused(server.post(COMPLETIONS, json={"prompt": "x"} | bomb), "prompt", "invalid_value")
        assert "cannot go on" in error["message"] and "simplify" in error["message"]
        *_, usage, done = [line for line in lines if line]
    assert '"completion_tokens":300' in usage and done == "data: [DONE]"


def test_what_is_kept_of_grammars_is_bounded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-32381: in number, and in what answers have made them grow to."""
    monkeypatch.setattr("minga.engine.grammar._KEPT", 5)
    monkeypatch.setattr("minga.engine.grammar._MAX_TAKEN", 100)
    for number in range(20):
        grammar = Grammar(f'start: "{number}" /[a-z]{{30}}/')
        llm.generate([[5, 6]], SamplingParams(max_tokens=40, grammar=grammar, seed=number))
        llm.check_grammar(grammar)
        kept = llm._grammars._compiled.values()
        assert len(kept) <= 5 and sum(each.num_taken for each in kept) <= 100


def test_a_pattern_takes_bounded_time() -> None:
    """CWE-1333: with Python's own expressions these would never end."""
    assert not Pattern("(a+)+x").found_in("a" * 100_000)
    assert not Pattern("(a|b|ab)*c").found_in("ab" * 50_000)
    assert Pattern("b").found_in("abc") and not Pattern("^b").found_in("abc")
    assert not Pattern("b$").found_in("abc") and Pattern("^a.c$").found_in("abc")
    assert Pattern("a/b").found_in("xa/bx") and Pattern("\\$").found_in("$1") and Pattern("ñ$").found_in("año ñ")
    with pytest.raises(UserError):
        Pattern("(")


# ---------------------------------------------------------------------------------------------- fields


HUGE = 10**400
TOOL = {"type": "function", "function": {"name": "f"}}
FIELDS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "CVE-2026-34756 n": (CHAT, chat(n=10**9), "n", "invalid_value"),
    "CVE-2026-34756 n 0": (CHAT, chat(n=0), "n", "invalid_value"),
    "CVE-2026-34756 n of scaling": (CHAT, chat(scaling={"method": "majority", "n": 10**6}), "scaling.n", "invalid_value"),
    "CVE-2026-34756 best_of": (COMPLETIONS, {"prompt": "x", "best_of": 500}, "best_of", "invalid_value"),
    "CWE-190 a huge number": (CHAT, chat(max_tokens=HUGE), "max_tokens", "invalid_value"),
    "CWE-190 seed": (CHAT, chat(seed=2**63), "seed", "invalid_value"),
    "CWE-190 top_k": (CHAT, chat(top_k=-1), "top_k", "invalid_value"),
    "CWE-770 stops": (CHAT, chat(stop=["x"] * 17), "stop", "invalid_value"),
    "CWE-770 a long stop": (CHAT, chat(stop="x" * 257), "stop", "invalid_value"),
    "CWE-770 an empty stop": (CHAT, chat(stop=[""]), "stop[0]", "invalid_value"),
    "vLLM #16529 logit_bias beyond the vocabulary": (
        CHAT, chat(logit_bias={"999999": 1}), "logit_bias.999999", "invalid_value",
    ),
    "vLLM #16529 logit_bias at the vocabulary's end": (
        CHAT, chat(logit_bias={str(VOCAB): 1}), f"logit_bias.{VOCAB}", "invalid_value",
    ),
    "vLLM #16529 logit_bias below 0": (CHAT, chat(logit_bias={"-1": 1}), "logit_bias.-1", "invalid_value"),
    "vLLM #16529 logit_bias of words": (CHAT, chat(logit_bias={"cat": 1}), "logit_bias.cat", "invalid_value"),
    "vLLM #16529 logit_bias 10**30": (CHAT, chat(logit_bias={"1" * 31: 1}), f"logit_bias.{'1' * 31}", "invalid_value"),
    "vLLM #16529 logit_bias other digits": (CHAT, chat(logit_bias={"\u0663": 1}), "logit_bias.\u0663", "invalid_value"),
    "vLLM #16529 logit_bias too strong": (CHAT, chat(logit_bias={"5": 1e300}), "logit_bias.5", "invalid_value"),
    "CWE-770 logit_bias": (CHAT, chat(logit_bias={str(n): 1 for n in range(2000)}), "logit_bias", "invalid_value"),
    "CWE-770 metadata": (CHAT, chat(metadata={f"k{n}": 1 for n in range(99_999)}), "metadata", "invalid_value"),
    "CVE-2025-61620 chat_template": (CHAT, chat(chat_template="{{ x }}"), "chat_template", "unknown_parameter"),
    "CVE-2025-62426 chat_template_kwargs": (
        CHAT, chat(chat_template_kwargs={"tokenize": False}), "chat_template_kwargs", "unknown_parameter",
    ),
    "CVE-2025-62426 in messages": (MESSAGES, chat(chat_template="x"), "chat_template", "unknown_parameter"),
    "CVE-2025-62426 in tokenize": (
        "/tokenize", {"messages": HI, "chat_template": "x"}, "chat_template", "unknown_parameter",
    ),
    "CVE-2025-62164 prompt_embeds": (COMPLETIONS, {"prompt_embeds": "gASV"}, "prompt_embeds", "unknown_parameter"),
    "SSRF image": (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1"}}]}]),
        "messages[0].content[0].type", "invalid_value",
    ),
    "CWE-1321 __proto__": (CHAT, chat(__proto__={"n": 1}), "__proto__", "unknown_parameter"),
    "CWE-915 __class__": (CHAT, chat(__class__="x"), "__class__", "unknown_parameter"),
    "CWE-74 a tool's name with a newline": (
        CHAT, chat(tools=[{"type": "function", "function": {"name": "f\n"}}]), "tools[0].function.name", "invalid_value",
    ),
    "CWE-74 a tool's name with quotes": (
        CHAT, chat(tools=[{"type": "function", "function": {"name": 'a"b'}}]), "tools[0].function.name", "invalid_value",
    ),
    "CWE-74 a chosen tool": (
        CHAT, chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f\n"}}),
        "tool_choice.function.name", "invalid_value",
    ),
    "CWE-770 tools": (CHAT, chat(tools=[TOOL] * 129), "tools", "invalid_value"),
    "two tools of one name": (CHAT, chat(tools=[TOOL, TOOL]), "tools[1]", "invalid_value"),
    "CVE-2026-9540 model": (CHAT, chat(model="../../etc/passwd"), "model", "model_not_found"),
    "CWE-117 model": (CHAT, chat(model="x\r\ny\x1b[31m"), "model", "model_not_found"),
    "CWE-770 model": (CHAT, chat(model="x" * 1_000_000), "model", "model_not_found"),
    "CWE-770 an unknown key of 1 MB": (CHAT, chat(**{"x" * 1_000_000: 1}), "x" * 64, "unknown_parameter"),
    "CWE-770 100,000 unknown keys": (CHAT, chat(**{f"k{n}": 1 for n in range(100_000)}), "k0", "unknown_parameter"),
    "CWE-770 4,097 messages": (CHAT, chat(messages=HI * 4097), "messages", "invalid_value"),
    "CWE-770 4,096 messages": (CHAT, chat(messages=HI * 4096), "messages", "context_length_exceeded"),
    "CWE-770 4,097 items": (RESPONSES, {"input": HI * 4097}, "input", "invalid_value"),
    "CWE-770 80,000 wrong parts": (
        CHAT, chat(messages=[{"role": "user", "content": [{"type": "text"}] * 80_000}]),
        "messages[0].content[0].text", "missing_required_parameter",
    ),
    "CWE-770 wrong ids": (COMPLETIONS, {"prompt": ["x"] * 200_000}, "prompt", "invalid_value"),
    "CWE-125 ids below 0": (COMPLETIONS, {"prompt": [-1]}, "prompt[0]", "invalid_value"),
    "CWE-125 ids beyond the vocabulary": (COMPLETIONS, {"prompt": [5, VOCAB]}, "prompt", "invalid_value"),
    "CWE-125 huge ids": (COMPLETIONS, {"prompt": [HUGE]}, "prompt[0]", "invalid_value"),
    "CWE-125 ids to embed": ("/v1/embeddings", {"input": [[5], [10**6]]}, "input[1]", "invalid_value"),
    "CWE-125 ids to decode": ("/detokenize", {"tokens": [VOCAB]}, "tokens[0]", "invalid_value"),
    "CVE-2025-32434 cache key": (CHAT, chat(prompt_cache_key={"a": 1}), "prompt_cache_key", "invalid_type"),
    "an answer longer than the context": (CHAT, chat(max_tokens=2**31), "messages", "context_length_exceeded"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_fields(server: httpx.Client, name: str) -> None:
    path, body, param, code = FIELDS[name]
    refused(server.post(path, content=json.dumps(body)), param, code, (400, 404))


HUGE_TEXT = "x y" * (MAX_BODY_BYTES // 3 - 100)
HUGE_TEXTS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "chat": (CHAT, {"messages": [{"role": "user", "content": HUGE_TEXT}]}, "messages", "context_length_exceeded"),
    "many messages": (
        CHAT, {"messages": [{"role": "user", "content": HUGE_TEXT[:2400]}] * 4096}, "messages", "context_length_exceeded",
    ),
    "prompt": (COMPLETIONS, {"prompt": HUGE_TEXT}, "prompt", "context_length_exceeded"),
    "spaces": (COMPLETIONS, {"prompt": " " * len(HUGE_TEXT)}, "prompt", "context_length_exceeded"),
    "arguments": (
        CHAT,
        {"messages": [*HI, {"role": "assistant", "tool_calls": [
            {"id": "x", "type": "function", "function": {"name": "f", "arguments": json.dumps({"x": HUGE_TEXT})}}
        ]}, *HI]},
        "messages", "context_length_exceeded",
    ),
    "tools": (
        CHAT,
        {"messages": HI, "tools": [
            {"type": "function", "function": {"name": f"f{n}", "parameters": {"description": HUGE_TEXT[:60_000]}}}
            for n in range(128)
        ]},
        "messages", "context_length_exceeded",
    ),
    "responses": (RESPONSES, {"input": HUGE_TEXT}, "input", "context_length_exceeded"),
    "messages": (MESSAGES, {"messages": [{"role": "user", "content": HUGE_TEXT}], "max_tokens": 5}, "", ""),
    "embeddings": ("/v1/embeddings", {"input": ["x", HUGE_TEXT]}, "input[1]", "context_length_exceeded"),
    "moderations": ("/v1/moderations", {"input": HUGE_TEXT}, "input", "invalid_value"),
    "tokenize": ("/tokenize", {"prompt": HUGE_TEXT}, "prompt", "invalid_value"),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE_TEXTS)
def test_texts_up_to_the_limit_of_a_body(server: httpx.Client, name: str) -> None:
    """CVE-2026-44222, CWE-400: what cannot fit is not read to its end."""
    path, body, param, code = HUGE_TEXTS[name]
    refused(server.post(path, json=body), param or None, code or None)


def test_larger_bodies(server: httpx.Client) -> None:
    body = b" " * (MAX_BODY_BYTES + 1)
    refused(server.post(CHAT, content=body), None, "body_too_large", 413)
    refused(
        server.post(CHAT, content=(body[n : n + 65_536] for n in range(0, len(body), 65_536))),
        None,
        "body_too_large",
        413,
    )


@pytest.mark.parametrize(
    "mark", [*SPECIALS, "\U00100003", "\x00", "\u202e", "\ufeff", "\x1b[2J", "{{ 7 * 7 }}", "{% raw %}"]
)
def test_marks_of_models_are_text_wherever_they_stand(server: httpx.Client, mark: str) -> None:
    """CVE-2026-44222, CVE-2026-5760: no control token and no template is made of what a user wrote."""
    tool = {
        "name": "f",
        "description": mark,
        "parameters": {"type": "object", "properties": {mark: {"description": mark}}},
    }
    messages = [
        {"role": "system", "content": mark},
        {"role": "user", "content": mark, "name": mark},
        {
            "role": "assistant", "content": mark, "reasoning_content": mark,
            "tool_calls": [{"id": mark, "type": "function", "function": {"name": mark, "arguments": mark}}],
        },
        {"role": "tool", "content": mark, "tool_call_id": mark},
        {"role": "user", "content": [{"type": "text", "text": mark}]},
    ]  # fmt: skip
    plain = json.loads(json.dumps(messages).replace(json.dumps(mark)[1:-1], "x"))
    tools = [{"type": "function", "function": tool}]
    body = {"messages": messages, "tools": tools, "stop": [mark], "max_tokens": 4, "user": mark}
    answer = server.post(CHAT, json=body)
    if answer.status_code != 200:  # a dialect may refuse arguments that are no JSON, or be too long for this context
        refused(answer, None, None)
    specials = {
        server.post("/tokenize", json={"messages": each}).json()["tokens"].count(1) for each in (messages, plain)
    }
    assert len(specials) == 1
    if mark in SPECIALS:
        tokens = server.post("/tokenize", json={"prompt": mark}).json()["tokens"]
        assert len(tokens) > 1 and server.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == mark


@pytest.mark.parametrize("arguments", ["", "{", "[]", "null", "NaN", "{" * 50_000, '{"a":' * 5000, "\x00", "9" * 5000])
def test_calls_that_clients_send_back(server: httpx.Client, arguments: str) -> None:
    call = {"id": "../" * 50, "type": "function", "function": {"name": 'a"\n', "arguments": arguments}}
    messages = [*HI, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "", "content": "x"}]
    answer = server.post(CHAT, json=chat(messages=messages))
    if answer.status_code != 200:
        refused(answer, "messages", None)


# ---------------------------------------------------------------------------------------------- HTTP


def spoken(server: httpx.Client, *parts: bytes, close: bool = False) -> bytes:
    """All that the server says to these bytes until it hangs up."""
    with socket.create_connection((server.base_url.host, server.base_url.port), timeout=20) as connection:
        said = b""
        try:
            for part in parts:
                connection.sendall(part)
            if close:
                connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65_536):
                said += chunk
        except (ConnectionResetError, BrokenPipeError):  # it hung up while more was on its way
            pass
        return said


def head(server: httpx.Client, *lines: str, request: str = f"POST {CHAT} HTTP/1.1") -> bytes:
    host = f"host: 127.0.0.1:{server.base_url.port}"
    return "\r\n".join([request, host, "content-type: application/json", *lines, "", ""]).encode("latin-1")


@pytest.mark.parametrize(
    "lines",
    [
        ("content-length: -1",), ("content-length: x",), ("content-length: 5", "content-length: 6"),
        ("content-length: 99999999999999999999999",), ("content-length: 5", "transfer-encoding: chunked"),
        ("transfer-encoding: chunked, identity",), ("no colon",), ("x y: z",), ("a: b\x00c",),
    ],
)  # fmt: skip
def test_heads_that_are_wrong(server: httpx.Client, lines: tuple[str, ...]) -> None:
    """CWE-444, request smuggling."""
    said = spoken(server, head(server, *lines), close=True)
    assert (said.startswith(b"HTTP/1.1 400") and b'"error":{"message"' in said) or said == b""


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\x00" * 99, b"SSH-2.0-x\r\n", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_no_http(server: httpx.Client, data: bytes) -> None:
    said = spoken(server, data, close=True)
    assert said.startswith(b"HTTP/1.1 4") or said == b""


def test_large_headers(server: httpx.Client) -> None:
    """CVE-2025-48956."""
    for lines in (["x: " + "y" * 300_000], [f"x{n}: y" for n in range(60_000)]):
        said = spoken(server, head(server, *lines)[:-4], b"z" * 400_000)
        assert (said.startswith(b"HTTP/1.1 431") and b"headers_too_large" in said) or said == b""
    assert server.get("/health", headers={"x": "y" * 30_000}).status_code == 200


def test_pipelined_requests_are_answered_in_turn(server: httpx.Client) -> None:
    request = head(server, request="GET /health HTTP/1.1")
    last = head(server, "connection: close", request="GET /health HTTP/1.1")
    assert spoken(server, request * 50 + last).count(b"HTTP/1.1 200") == 51


def test_slow_loris(server: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a head, none at all, and half a body: nobody is waited for without end."""
    monkeypatch.setattr("minga.serve.server.HEADER_SECONDS", 0.2)
    monkeypatch.setattr("minga.serve.app.MAX_BODY_SECONDS", 0.2)
    for parts in ([], [head(server)[:-2]], [b"P"]):
        said = spoken(server, *parts)
        assert said.startswith(b"HTTP/1.1 408") and b"header_timeout" in said
    for lines, body in (("content-length: 100", b"{"), ("transfer-encoding: chunked", b"5\r\n{")):
        said = spoken(server, head(server, lines) + body)
        assert said.startswith(b"HTTP/1.1 408") and b"body_timeout" in said


@pytest.mark.parametrize("body", [b"5\r\n{", b"zz\r\n", b"5\r\n{}   \r\n0\r", b"fffffffffffffffffff\r\n"])
def test_half_chunks(server: httpx.Client, body: bytes) -> None:
    said = spoken(server, head(server, "transfer-encoding: chunked") + body, close=True)
    assert b"HTTP/1.1 5" not in said


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"}, {"host": "evil.example:8000"}, {"host": ""}, {"host": "[::1"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "127.0.0.1@evil.example"}, {"host": "evil.example#@127.0.0.1"}, {"origin": "https://evil.example"},
        {"origin": "null"}, {"origin": "http://127.0.0.1.evil.example"}, {"origin": ""},
    ],
)  # fmt: skip
def test_other_sites_do_not_pass(server: httpx.Client, headers: dict[str, str]) -> None:
    """CWE-350 DNS rebinding, CWE-352 forged requests."""
    for path in ("/v1/models", "/", "/health", "/openapi.json"):
        refused(server.get(path, headers=headers), None, None, 403)


@pytest.mark.parametrize("prefix", ["/static/", "/api/runs/", "/v1/responses/", "/v1/models/"])
@pytest.mark.parametrize(
    "name",
    [
        "../secret.jsonl", "..%2fsecret.jsonl", "%2e%2e/secret.jsonl", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "....//secret.jsonl",
        "%2fetc%2fpasswd", "..%5c..%5cx", "%00", "x%00.css", "%c0%ae%c0%ae/", "a" * 5000, "%ff", "%0d%0aset-cookie:%20a=b",
    ],
)  # fmt: skip
def test_paths(server: httpx.Client, prefix: str, name: str) -> None:
    """CWE-22, and CWE-113 in what is said of them. The bytes go as they are: httpx itself would tidy them."""
    said = spoken(server, head(server, "connection: close", request=f"GET {prefix}{name} HTTP/1.1"))
    status = said[9:12]
    assert status in (b"400", b"404"), said[:200]
    assert b"root:" not in said and b"\r\nset-cookie" not in said.lower()


def test_what_is_logged_stays_one_line(server: httpx.Client, log_file: Path) -> None:
    """CWE-117: neither a path nor a request id forges a line, or a colour."""
    lines = len(log_file.read_text().splitlines())
    spoken(
        server,
        head(server, "connection: close", "x-request-id: a\x1b[31m {}", request="GET /a%0a%7b%22x%22:1%7d%1b HTTP/1.1"),
    )
    answer = server.get("/health", headers={"x-request-id": "x" * 5000})
    assert len(answer.headers["x-request-id"]) < 100
    server.get("/health")
    new = log_file.read_text().splitlines()[lines:]
    assert len(new) >= 2 and all(isinstance(json.loads(line), dict) and "\x1b" not in line for line in new)


def test_responses_of_others_are_not_found(server: httpx.Client) -> None:
    refused(server.get("/v1/responses/" + "x" * 3000), "response_id", "response_not_found", 404)
    refused(
        server.post(RESPONSES, json={"input": "x", "previous_response_id": "\x00"}), None, "response_not_found", 404
    )


# ---------------------------------------------------------------------------------------------- clients that do not read


def test_a_client_that_reads_nothing_holds_nobody_up(server: httpx.Client) -> None:
    body = json.dumps(chat(stream=True, n=16, max_tokens=400, ignore_eos=True, logprobs=True, top_logprobs=20)).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((server.base_url.host, server.base_url.port))
        connection.sendall(head(server, f"content-length: {len(body)}") + body)
        assert connection.recv(12) == b"HTTP/1.1 200"
        for _ in range(5):
            assert server.post(CHAT, json=chat()).status_code == 200


def test_a_client_that_never_reads_is_given_up(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minga.serve.answer.FAREWELL_SECONDS", 0.05)
    app = create_app({"little": llm}, tmp_path, Settings(deadline=0.2))
    body = json.dumps(chat(stream=True, max_tokens=50, ignore_eos=True)).encode()
    sent = []

    async def attack() -> None:
        never = asyncio.Event()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> MutableMapping[str, Any]:
            message = next(messages, None)
            if message is None:
                await never.wait()
            return message or {}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)
            await never.wait()

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": CHAT,
            "raw_path": CHAT.encode(), "query_string": b"", "headers": [(b"host", b"127.0.0.1")], "scheme": "http",
            "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        await app(scope, receive, send)

    asyncio.run(attack())
    assert len(sent) == 1  # and no second one was made before the first was taken


def test_clients_that_leave_at_once_leave_nothing(server: httpx.Client) -> None:
    """Each is closed in the middle of its answer; the model is free again for the next."""
    body = json.dumps(chat(stream=True, max_tokens=400, ignore_eos=True)).encode()
    request = head(server, f"content-length: {len(body)}") + body
    for _ in range(40):
        with socket.create_connection((server.base_url.host, server.base_url.port)) as connection:
            connection.sendall(request)
    while (now := server.get("/api/status").json())["running"] or now["waiting"]:
        pass
