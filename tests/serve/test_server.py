"""The command, its port and its end. pytest tests/serve/test_server.py"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from minga import store
from minga.cli.main import main
from minga.cli.serve import named_models
from minga.config.presets import tiny
from minga.data.tokenizer import train_bpe
from minga.errors import UserError
from minga.model.transformer import Transformer
from minga.serve.keys import Keys
from minga.serve.server import Options, bind, serve
from minga.serve.store import Store
from tests.serve.conftest import HELLO

ROOT = Path(__file__).parents[2]


def test_models_are_named_after_their_paths(tmp_path):
    (tmp_path / "a=b").mkdir()
    specs = ["runs/first", "dir/deepseek-v2.5/", "x/SmolLM2.Q8.gguf", "mine=runs/first", str(tmp_path / "a=b")]
    assert list(named_models(specs)) == ["first", "deepseek-v2.5", "SmolLM2.Q8", "mine", "a=b"]
    assert named_models(["mine=runs/a=1"]) == {"mine": Path("runs/a=1")}


@pytest.mark.parametrize("specs, words", [(["a/x", "b/x"], "two models are called 'x'"), (["=x"], "names no model")])
def test_names_that_cannot_be(specs, words):
    with pytest.raises(UserError, match=words):
        named_models(specs)


def test_a_taken_port_is_said_with_the_way_out(capsys):
    with bind("127.0.0.1", 0) as other:
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "nowhere", "--port", str(port)]) == 2
    assert f"port {port} is in use (--port)" in (error := capsys.readouterr().err)
    assert "--port 0" in error


@pytest.mark.parametrize("host, port, words", [("127.0.0.1", 70000, "70000"), ("no such host", 0, "no such host")])
def test_addresses_that_cannot_be(host, port, words):
    with pytest.raises(UserError, match=words):
        bind(host, port)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_an_open_address_needs_a_key(host, monkeypatch):
    monkeypatch.delenv("MINGA_API_KEY", raising=False)
    with pytest.raises(UserError, match="there is no API key"):
        serve({}, Options(host=host))


@pytest.mark.parametrize("key", ["", "two words", "clé", "line\n"])
def test_a_key_that_no_header_carries(key):
    with pytest.raises(UserError, match="API key"):
        serve({}, Options(api_key=key))


def test_a_missing_model_is_said_before_anything_is_served(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "nowhere"), "--port", "0", "--json"]) == 2
    captured = capsys.readouterr()
    assert "nowhere" in captured.err and "url" not in captured.out


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "little"
    tokenizer = train_bpe(["bytes"], 259)
    config = tiny().replace(vocab_size=259)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    store.save(model, folder, tokenizer=tokenizer)
    return folder


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--keys", "FOLDER"], "this is no file|cannot be opened"),
        (["--keys", "FOLDER/none/keys.db"], "there is no such file"),
        (["--keys", "MODEL/model.safetensors"], "this is no SQLite file"),
        (["--access-log", "FOLDER"], "the access log cannot be opened"),
        (["--watermark", "FOLDER/none"], "watermark new"),
        (["--guard", "FOLDER/none"], "none"),
        (["--max-running", "0"], "--max-running is 0"),
        (["--max-waiting", "-1"], "--max-waiting is -1"),
        (["--timeout", "nan"], "--timeout is nan"),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout is -1"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(model_folder, tmp_path, capsys, flags, words):
    places = {"FOLDER": str(tmp_path), "MODEL": str(model_folder)}
    flags = [re.sub("FOLDER|MODEL", lambda found: places[found[0]], flag) for flag in flags]
    assert main(["serve", str(model_folder), "--port", "0", *flags]) == 2
    out, err = capsys.readouterr()
    assert re.search(words, err) and err.count("\n") == 1 and out == ""


@contextmanager
def running(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`minga serve`, and its first line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "minga", "serve", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
    )
    with process:
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


def test_it_serves_models_until_ctrl_c(model_folder):
    with running(str(model_folder), f"other={model_folder}", MINGA_API_KEY="k") as (process, line):
        assert re.fullmatch(
            r"serving little, other at http://127\.0\.0\.1:\d+  \(page: open the address; API: /v1, /docs\)\n", line
        )
        body = {"model": "other", "messages": HELLO, "max_tokens": 150, "stream": True, "ignore_eos": True}
        url, headers = line.split()[4], {"authorization": "Bearer k"}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60) as answer:
            lines = answer.iter_lines()
            assert answer.status_code == 200 and next(lines).startswith("data: {")
            process.send_signal(signal.SIGINT)  # the answer under way is finished
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(timeout=30) == 0
        assert process.stdout.read() == process.stderr.read() == ""


def test_a_server_lives_through_what_comes_and_a_killed_one_forgets_nothing(model_folder, tmp_path, capsys):
    keys_file = tmp_path / "keys.db"
    assert main(["keys", "add", "ana", "--file", str(keys_file), "--json"]) == 0
    key = json.loads(capsys.readouterr().out)["key"]
    flags = [str(model_folder), "--keys", str(keys_file), "--json"]
    ask: dict[str, Any] = {"messages": HELLO, "max_tokens": 20, "ignore_eos": True}

    with running(*flags) as (process, line):
        url = json.loads(line)["url"]
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
            _send_what_no_client_sends(url, key)
            for _ in range(3):
                assert client.post("/v1/chat/completions", json=ask).json()["usage"]["completion_tokens"] == 20
            time.sleep(0.5)  # the meter's fifth of a second, after which nothing may be lost
            process.kill()
            assert process.wait(timeout=30) == -signal.SIGKILL
    assert _completion_tokens(keys_file, capsys) == {"ana": 60}

    with running(*flags) as (process, line):
        url = json.loads(line)["url"]
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
            assert httpx.get(f"{url}/v1/models").status_code == 401
            with ThreadPoolExecutor(8) as pool:
                answers = [
                    pool.submit(client.post, "/v1/chat/completions", json={**ask, "max_tokens": 200, "stream": True})
                    for _ in range(8)
                ]
                while client.get("/api/status").json()["running"] < 8 and not any(each.done() for each in answers):
                    pass
                process.terminate()
                late = [_status(f"{url}/v1/chat/completions", ask, key) for _ in range(3)]
            for each in answers:
                assert each.result().text.endswith("data: [DONE]\n\n") and '"length"' in each.result().text
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == ""
    finished = late.count(200)
    assert set(late) <= {None, 200, 503}  # it may come before the signal does
    assert _completion_tokens(keys_file, capsys) == {"ana": 60 + 8 * 200 + finished * 20}


def _status(url: str, body: Any, key: str) -> int | None:
    """None: nobody is there any more."""
    try:
        return httpx.post(url, json=body, headers={"authorization": f"Bearer {key}"}, timeout=60).status_code
    except httpx.TransportError:
        return None


def _completion_tokens(keys_file: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    store = Store(keys_file, create=False)
    try:
        assert [record.key.name for record in Keys(store).list()] == ["ana"]
        return dict(store.rows("SELECT key, sum(completion_tokens) FROM usage GROUP BY key"))
    finally:
        store.close()


def _send_what_no_client_sends(url: str, key: str) -> None:
    """Each is refused, or its connection ends, and the server goes on."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n".encode()

    def send(data: bytes, *, half: bool = False) -> bytes:
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            with suppress(ConnectionError):
                connection.sendall(data)
                if half:
                    connection.shutdown(socket.SHUT_WR)
                    return b""
                return connection.recv(1 << 16)
            return b""

    for data in (
        head + b"Content-Length: 4\r\n\r\n\xff\xfe{}",
        head + b"Content-Length: 2\r\n\r\n{]",
        head + b"Content-Length: -5\r\n\r\n{}",
        head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50,  # as if by HTTPS
        b"nonsense\r\n\r\n",
    ):
        assert send(data)[:12] in (b"HTTP/1.1 400", b""), data
    # a head that never ends: an address, a header, or many of them
    for data in (
        b"GET /" + b"x" * (1 << 20),
        head + b"X-Long: " + b"x" * (1 << 20),
        head + b"".join(b"X-%d: y\r\n" % number for number in range(100_000)),
    ):
        assert send(data)[:12] in (b"HTTP/1.1 431", b"")
    send(head + b"Content-Length: 100\r\n\r\n" + b'{"messages": [', half=True)
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_server_that_may_not_wait_ends_at_once(tmp_path):
    """An answer that outlasts the patience ends with an error event, is metered, and the process ends in order."""
    code = f"""
import sys, time
from minga.serve import server
from minga.serve.app import create_app
from minga.serve.keys import Keys
from minga.serve.meter import Meter
from minga.serve.service import Settings
from minga.serve.store import Store
from tests.serve.conftest import TinyLLM
llm = TinyLLM.make()
llm.gate.wait = lambda timeout: time.sleep(0.05) or True
store = Store({str(tmp_path / "keys.db")!r})
settings = Settings(keys=Keys(store, static="k"), meter=Meter(store))
with server.bind("127.0.0.1", 0) as listener:
    listener.listen()
    print(listener.getsockname()[1], flush=True)
    server.run_until_signal(create_app({{"slow": llm}}, {str(tmp_path)!r}, settings), listener, 0)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, env=environment
    ) as process:
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}/v1/chat/completions"
        body = {"messages": HELLO, "stream": True, "max_tokens": 1500, "ignore_eos": True}
        headers = {"authorization": "Bearer k"}
        with httpx.stream("POST", url, json=body, timeout=30, headers=headers) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.terminate()
            *_, failure, done = [line for line in lines if line]
        assert "shutting_down" in failure and done == "data: [DONE]"
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in process.stderr.read()
    store = Store(tmp_path / "keys.db", create=False)
    ((key, status, reason, tokens),) = store.rows("SELECT key, status, finish_reason, completion_tokens FROM usage")
    store.close()
    assert (key, status, reason) == ("default", 503, "error") and tokens > 0


def test_ipv6_or_refusal():
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        listener = bind("::1", 0)
    except UserError as error:
        assert "cannot bind ::1" in str(error)
    else:
        listener.close()


def test_the_help_has_an_example_and_needs_no_torch():
    code = """
import sys
from minga.cli.main import main
try:
    main(["serve", "--help"])
except SystemExit:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "examples:" in done.stdout and done.stdout.endswith("False\n")
