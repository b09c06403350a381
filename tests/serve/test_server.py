"""The command, its port and its end. pytest tests/serve/test_server.py"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

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
from minga.serve.server import bind, serve

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
        serve({}, host=host)


@pytest.mark.parametrize("key", ["", "two words", "clé", "line\n"])
def test_a_key_that_no_header_carries(key):
    with pytest.raises(UserError, match="API key"):
        serve({}, api_key=key)


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_a_model_and_ends_in_order(model_folder, number):
    command = [sys.executable, "-m", "minga", "serve", str(model_folder), f"other={model_folder}", "--port", "0"]
    as_json = number == signal.SIGTERM
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MINGA_API_KEY": "k"}
    process = subprocess.Popen(
        [*command, "--json"] if as_json else command, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        line = process.stdout.readline()
        if as_json:
            document = json.loads(line)
            assert document["models"] == ["little", "other"]
            url = document["url"]
        else:
            assert line.startswith("serving little, other at http://127.0.0.1:")
            assert line.endswith("  (page: open the address; API: /v1)\n")
            url = line.split()[4]
        body = {
            "model": "other", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 150, "stream": True,
            "stop": ["\x00"],
        }  # fmt: skip
        with (
            httpx.Client(base_url=url, headers={"authorization": "Bearer k"}, timeout=60) as client,
            client.stream("POST", "/v1/chat/completions", json=body) as answer,
        ):
            lines = answer.iter_lines()
            assert answer.status_code == 200 and next(lines).startswith("data: {")
            process.send_signal(number)  # the answer under way is finished
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(timeout=30) == 0
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_server_that_stops_does_not_wait_for_ever(tmp_path):
    """An answer that outlasts the patience ends with an error event, and the process in order."""
    code = f"""
import sys, threading
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import FakeLLM
from minga.serve import server
from minga.serve.app import create_app
server.SHUTDOWN_SECONDS = 1
llm = FakeLLM("word " * 1000)
llm.gate.wait = lambda timeout: threading.Event().wait(0.1) or True
with server.bind("127.0.0.1", 0) as listener:
    listener.listen()
    print(listener.getsockname()[1], flush=True)
    server.run_until_signal(create_app({{"slow": llm}}, {str(tmp_path)!r}), listener)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, env=environment
    ) as process:
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}/v1/chat/completions"
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
        with httpx.stream("POST", url, json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.terminate()
            *_, failure, done = [line for line in lines if line]
        assert "shutting_down" in failure and done == "data: [DONE]"
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in process.stderr.read()


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
