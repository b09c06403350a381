"""Several processes behind Ray Serve. Needs ray: pytest -m peer tests/serve/test_replicas.py"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from minga import store
from minga.cli.main import main
from minga.config.presets import tiny
from minga.data.tokenizer import train_bpe
from minga.model.transformer import Transformer
from minga.serve.keys import Keys
from minga.serve.meter import report
from minga.serve.store import Store

ROOT = Path(__file__).parents[2]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Lima", "Cuzco"]}}, "required": ["city"]},
    },
}
HELLO = [{"role": "user", "content": "Hello"}]


def test_without_ray_one_line_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr("minga.serve.replicas.find_spec", lambda name: None)
    assert main(["serve", "nowhere", "--replicas", "2", "--port", "0"]) == 2
    assert capsys.readouterr().err.count("ray is not installed (--replicas). pip install 'minga[jobs]'") == 1


@pytest.mark.parametrize("number", ["0", "-1", "100000"])
def test_numbers_of_replicas_that_cannot_be(number, capsys):
    assert main(["serve", "nowhere", f"--replicas={number}", "--port", "0"]) == 2
    assert f"--replicas is {number} (serve)" in capsys.readouterr().err


def test_a_single_server_never_imports_ray():
    code = "import sys, minga.cli.serve, minga.serve.server; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("models") / "little"
    config = tiny().replace(vocab_size=259)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    store.save(model, folder, tokenizer=train_bpe(["bytes"], 259))
    return folder


@contextmanager
def _replicas(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, which is killed at the end if it has not ended, and its address."""
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "minga", "serve", *arguments, "--port", "0", "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": search}, start_new_session=True
    )
    try:
        line = process.stdout.readline()
        assert line, "it ended before it served"
        yield process, json.loads(line)["url"]
        assert process.poll() is not None
        assert not _children(process.pid)
    finally:
        for pid in (*_children(process.pid), process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()
        process.stdout.close()


def _children(root: int, named: str = "") -> list[int]:
    """Processes below one, the direct ones first, whose command begins so."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended meanwhile
                continue
    found, level = [], [root]
    while level:
        level = [pid for pid, parent in parents.items() if parent in level]
        found += level
    commands = ((pid, Path(f"/proc/{pid}/cmdline")) for pid in found)
    return [pid for pid, file in commands if file.exists() and file.read_text().startswith(named)]


def _until(condition: Callable[[], Any]) -> Any:
    """The condition's value, once it is true."""
    pause = threading.Event()
    for _ in range(600):
        if value := condition():
            return value
        pause.wait(0.1)
    raise AssertionError("waited in vain")


@pytest.mark.peer
def test_replicas_share_the_work_and_the_keys_and_outlive_one_of_them(model_folder, tmp_path):
    file = tmp_path / "minga.db"
    keys = Store(file)
    secret = Keys(keys).add("ana")
    with (
        _replicas(str(model_folder), "--replicas", "2", "--keys", str(file)) as (process, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0) as client,
    ):

        def ask(**fields: Any) -> Any:
            return client.chat.completions.create(model="little", messages=HELLO, **{"max_tokens": 8} | fields)

        chunks = list(ask(max_tokens=24, stream=True, temperature=0, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
        assert len(chunks) > 3 and chunks[-1].usage.completion_tokens == 24
        assert ask(max_tokens=24, temperature=0).choices[0].message.content == text
        called = ask(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=80)
        (call,) = called.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Lima", "Cuzco")
        with pytest.raises(openai.AuthenticationError):
            ask(extra_headers={"authorization": "Bearer mk-0"})
        with pytest.raises(openai.PermissionDeniedError):
            ask(extra_headers={"host": "elsewhere.example"})

        workers = _children(process.pid, "ray::ServeReplica")
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        answered = [_until(lambda: _attempt(ask)) for _ in range(4)]
        assert all(answer.usage.completion_tokens for answer in answered)
        _until(lambda: len(_children(process.pid, "ray::ServeReplica")) == 2)  # another has come

        stream = ask(stream=True, max_tokens=120, stop=["\x00"])
        next(stream)
        process.terminate()
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("length", "stop")  # the end of it came
        assert process.wait(timeout=90) == 0
    (usage,) = report(keys)
    assert usage.group == "ana" and usage.num_requests >= 5  # one that is killed takes what it has not written along
    keys.close()


def _attempt(ask: Callable[..., Any]) -> Any:
    """None where the request met the replica that has just died."""
    try:
        return ask()
    except openai.APIStatusError:
        return None


@pytest.mark.peer
def test_ctrl_c_ends_it_in_order_and_a_model_that_does_not_open_is_one_line(model_folder, tmp_path, capsys):
    assert main(["serve", str(tmp_path / "nowhere"), "--replicas", "2", "--port", "0"]) == 2
    assert capsys.readouterr().err.count("there is nothing at this path") == 1
    with _replicas(str(model_folder), "--replicas", "2") as (process, _):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to all
        assert process.wait(timeout=90) == 0
