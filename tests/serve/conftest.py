"""A model that costs nothing: it answers with the words it is given, and can be held back or made to fail."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn

from minga.config.presets import tiny
from minga.engine.sampler import SamplingParams, TokenLogprob
from minga.engine.sequence import Delta
from minga.errors import UserError
from minga.serve.app import create_app
from minga.serve.server import bind

MAX_CONTEXT = 64


class FakeTokenizer:
    """A token a word."""

    def __init__(self, chat_template: str | None):
        self.chat_template = chat_template

    def render_chat(self, messages: list[dict[str, str]]) -> list[int]:
        if any(message["content"] == "refuse me" for message in messages):
            raise UserError("the chat template refuses these messages (chat). change them")
        return list(range(sum(len(message["content"].split()) + 1 for message in messages)))

    def token_bytes(self, token: int) -> bytes:
        return b"\xc3" if token == 0 else f"w{token}".encode()


class FakeLLM:
    """Its fields tell a test what was asked of it: `prompts`, `params`, `num_made`, `num_closed`."""

    max_context = MAX_CONTEXT

    def __init__(self, answer: str = "Hola, ¿qué tal? Adiós.", *, chat_template: str | None = "chatml"):
        self.config = tiny()
        self.tokenizer = FakeTokenizer(chat_template)
        self.words = answer.split(" ")
        self.gate = threading.Event()  # closed, the model waits before each word
        self.gate.set()
        self.fail_after: int | None = None
        self.prompts: list[Any] = []
        self.params: list[SamplingParams] = []
        self.threads: set[int] = set()
        self.running: list[FakeEntry] = []
        self.num_made = self.num_closed = self.most_at_once = 0

    def encode(self, text: str) -> list[int]:
        self.prompts.append(text)
        return list(range(len(text.split())))

    def submit(self, prompt: list[int], params: SamplingParams) -> FakeEntry:
        self.prompts.append(prompt)
        self.params.append(params)
        entry = FakeEntry(FakeSequence(self.words, params))
        self.running.append(entry)
        return entry

    def step(self) -> None:
        """A word for each."""
        self.threads.add(threading.get_ident())
        assert self.gate.wait(timeout=10)
        for sequence in (entry.sequence for entry in self.running):
            if sequence.num_said == self.fail_after:
                raise RuntimeError("a secret of the engine")
            if not sequence.finished:
                self.num_made += 1
                sequence.say()
        self.most_at_once = max(self.most_at_once, len(self.running))

    def cancel(self, entry: FakeEntry) -> None:
        self.num_closed += 1
        self.running.remove(entry)


class FakeSequence:
    def __init__(self, words: list[str], params: SamplingParams):
        self._words, self._params = words, params
        self.num_said = 0
        self.finished = False
        self._new: list[int] = []

    def say(self) -> None:
        self._new.append(self.num_said)
        self.num_said += 1
        self.finished = self.num_said == min(len(self._words), self._params.max_tokens)

    def take_delta(self) -> Delta:
        new, self._new = self._new, []
        text = "".join(self._words[index] if index == 0 else f" {self._words[index]}" for index in new)
        ended = None
        if self.finished:
            ended = "stop" if self.num_said == len(self._words) else "length"
        logprobs = None
        if self._params.logprobs is not None:
            rest = ((7, float("-inf")),)
            logprobs = [TokenLogprob(n, -0.5, ((n, -0.5), *rest)[: self._params.logprobs]) for n in new]
        return Delta(text, new, ended, logprobs)


@dataclass(eq=False)
class FakeEntry:
    sequence: FakeSequence


class Client:
    """Requests to an app, each in an event loop of its own unless a test brings one."""

    def __init__(self, app: Any):
        self.app = app

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self.arequest(method, path, **options))

    async def arequest(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def chat(self, **fields: Any) -> httpx.Response:
        return asyncio.run(self.achat(**fields))

    async def achat(self, **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "Hello there"}]} | fields
        return await self.arequest("POST", "/v1/chat/completions", content=json.dumps(body))

    def events(self, **fields: Any) -> list[dict[str, Any]]:
        """The documents of a stream, which must end with [DONE]."""
        response = self.chat(stream=True, **fields)
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, done, empty = response.text.split("\n\n")
        assert (done, empty) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM()


@pytest.fixture
def client(llm, tmp_path) -> Client:
    return Client(create_app({"fake": llm}, tmp_path, max_running=1))


@pytest.fixture
def make_client(tmp_path) -> Callable[..., Client]:
    """A client of an app with other models or settings: make_client({"name": FakeLLM()}, api_key=...)."""
    return lambda models, **settings: Client(create_app(models, tmp_path, **({"max_running": 1} | settings)))


@pytest.fixture
def make_llm() -> type[FakeLLM]:
    return FakeLLM


@contextmanager
def _serving(app: Any) -> Iterator[str]:
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=10)
            assert not thread.is_alive()


@pytest.fixture
def address(client) -> Iterator[str]:
    """The app of `client` behind a real socket."""
    with _serving(client.app) as url:
        yield url
