"""Apps around a real engine: a tiny model with random weights, which can be held back or made to fail."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from time import monotonic
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from minga.config.presets import tiny
from minga.data.tokenizer import CHATML, Tokenizer, train_bpe
from minga.engine.llm import DEFAULT_PARAMS, LLM
from minga.engine.sampler import SamplingParams
from minga.engine.scheduler import Entry
from minga.model.transformer import Transformer
from minga.serve.app import create_app
from minga.serve.server import bind, configured
from minga.serve.service import Settings

ANSWER = "Hola, ¿qué tal? Adiós."
HELLO = [{"role": "user", "content": "Hello there"}]
MAX_CONTEXT = 2048
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
# As Qwen3's: it opens the thoughts, unless it is told to think nothing.
THINKING_TEMPLATE = CHATML.replace(
    "assistant\\n'", "assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '<think>\\n')"
)


@cache
def make_tokenizer(chat_template: str | None = CHATML) -> Tokenizer:
    text = "the quick brown fox jumps over the lazy dog, hola, que tal, adios "
    thinks = chat_template == THINKING_TEMPLATE
    tokenizer = train_bpe([text * 3], 300, specials=[*SPECIALS, *(("<think>", "</think>") if thinks else ())])
    tokenizer.chat_template = chat_template
    return tokenizer


@cache
def make_model() -> Transformer:
    config = tiny().replace(vocab_size=300, max_position_embeddings=MAX_CONTEXT, initializer_range=0.2)
    return Transformer(config).init_weights(torch.Generator().manual_seed(3))


class TinyLLM(LLM):
    """`gate`, closed, holds each step back; `fail_after` is how many steps work. The rest tells what was asked of it."""

    gate: threading.Event
    fail_after: int | None
    asked: list[SamplingParams]
    prompts: list[list[int]]
    salts: list[str]
    open: list[Entry]
    num_steps: int
    most_at_once: int
    threads: set[int]

    @classmethod
    def make(cls, *, chat_template: str | None = CHATML, speculate: bool = True) -> TinyLLM:
        llm = cls.from_parts(make_model(), make_tokenizer(chat_template), speculate=speculate, max_memory="32MB")
        assert isinstance(llm, TinyLLM)
        llm._weights_stay = True  # or the cache is forgotten when there is nothing to do
        llm.gate = threading.Event()
        llm.gate.set()
        llm.fail_after = None
        llm.asked, llm.prompts, llm.salts, llm.open, llm.threads = [], [], [], [], set()
        llm.num_steps = llm.most_at_once = 0
        return llm

    def submit(
        self,
        prompt: str | list[int],
        params: SamplingParams = DEFAULT_PARAMS,
        *,
        salt: str = "",
        marked: Collection[int] = (),
    ) -> Entry:
        entry = super().submit(prompt, params, salt=salt, marked=marked)
        assert isinstance(prompt, list)
        self.prompts.append(prompt)
        self.asked.append(params)
        self.salts.append(salt)
        self.open.append(entry)
        return entry

    def step(self) -> None:
        self.threads.add(threading.get_ident())
        assert self.gate.wait(timeout=10)
        if self.num_steps == self.fail_after:
            self._runner.reset()
            raise RuntimeError("a secret of the engine")
        self.num_steps += 1
        self.most_at_once = max(self.most_at_once, len(self.open))
        super().step()

    def cancel(self, entry: Entry) -> None:
        super().cancel(entry)
        if entry in self.open:
            self.open.remove(entry)

    @property
    def is_idle(self) -> bool:
        """Nobody is answered, and no page of the cache is held."""
        return not self.open and self.cache_bytes[0] == 0

    def comes_to_rest(self) -> bool:
        """The model's thread hears of those who left after its step."""
        asyncio.run(until(lambda: self.is_idle))
        return True


def says(text: str) -> dict[str, Any]:
    """Fields with which any model says just this."""
    return {"structured_outputs": {"choice": [text]}}


class Client:
    """Requests to an app, each in an event loop of its own unless a test brings one."""

    def __init__(self, app: Any, headers: dict[str, str] | None = None):
        self.app, self.headers = app, headers or {}

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self.arequest(method, path, **options))

    async def arequest(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8000", headers=self.headers
        ) as client:
            return await client.request(method, path, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        return asyncio.run(self.apost(path, headers, **fields))

    async def apost(self, path: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        return await self.arequest("POST", path, content=json.dumps(fields), headers=headers)

    def chat(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        return asyncio.run(self.achat(headers, **fields))

    async def achat(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        return await self.apost("/v1/chat/completions", headers, **{"messages": HELLO, **fields})

    def answer(self, **fields: Any) -> dict[str, Any]:
        """The document of a good answer."""
        response = self.chat(**fields)
        assert response.status_code == 200, response.text
        document: dict[str, Any] = response.json()
        return document

    def message(self, **fields: Any) -> dict[str, Any]:
        (choice,) = self.answer(**fields)["choices"]
        message: dict[str, Any] = choice["message"]
        return message

    def text(self, **fields: Any) -> str:
        text: str = self.message(**fields)["content"]
        return text

    def events(self, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
        """The documents of a stream, which must end with [DONE]."""
        asked = {"messages": HELLO} if path.startswith("/v1/chat") else {}
        response = self.post(path, **{**asked, "stream": True, **fields})
        assert response.headers["content-type"].startswith("text/event-stream"), response.text
        *events, done = frames(response.text)
        assert done == "[DONE]"
        return [json.loads(event) for event in events]

    def error(self, status: int = 400, path: str = "/v1/chat/completions", **fields: Any) -> dict[str, Any]:
        asked = {"messages": HELLO} if path.startswith("/v1/chat") else {}
        response = self.post(path, **{**asked, **fields})
        assert response.status_code == status, response.text
        error: dict[str, Any] = response.json()["error"]
        return error


def frames(stream: str) -> list[str]:
    """The data of its events."""
    *events, empty = stream.split("\n\n")
    assert empty == ""
    return [event.partition("data: ")[2] for event in events if not event.startswith(":")]


def joined(events: Sequence[dict[str, Any]], field: str = "content", choice: int = 0) -> str:
    """What the deltas of a chat come to."""
    choices = [each for event in events for each in event.get("choices", []) if each["index"] == choice]
    return "".join(each["delta"].get(field) or "" for each in choices)


@pytest.fixture
def llm() -> TinyLLM:
    return TinyLLM.make()


@pytest.fixture
def make_client(tmp_path) -> Callable[..., Client]:
    """A client of an app with these models and settings: make_client({"tiny": TinyLLM.make()}, moderate=True)."""

    def make(models: dict[str, LLM], headers: dict[str, str] | None = None, **settings: Any) -> Client:
        return Client(create_app(models, tmp_path, Settings(**settings)), headers)

    return make


@pytest.fixture
def client(llm, make_client) -> Client:
    """One is answered at a time."""
    return make_client({"tiny": llm}, max_running=1)


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The app behind a real socket."""
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        server = uvicorn.Server(configured(app))
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
    with serving(client.app) as url:
        yield url


async def until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + 10
    while not condition():
        assert monotonic() < deadline
        await asyncio.sleep(0.002)


class Visit:
    """One request by hand, whose client can leave."""

    def __init__(
        self, app: Any, path: str = "/v1/chat/completions", *, key: str | None = None, reads: bool = True,
        **fields: Any,
    ):  # fmt: skip
        body = ({"messages": HELLO} if path == "/v1/chat/completions" else {}) | fields
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        self.sent: list[dict[str, Any]] = []
        self._reads = reads
        authorization = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": b"", "query_string": b"",
            "headers": [(b"host", b"127.0.0.1"), *authorization], "http_version": "1.1", "scheme": "http", "root_path": "",
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        if not self._reads:
            await asyncio.Event().wait()
        self.sent.append(message)

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    def hold_body(self) -> None:
        """Only half of the body was ever sent."""
        self._incoming.get_nowait()
        self._incoming.put_nowait({"type": "http.request", "body": b'{"mess', "more_body": True})

    async def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})
        done, _ = await asyncio.wait({self.task}, timeout=5)
        assert done
        await self.task
