"""A server for the page alone: its real files behind the real gate, with answers that a test writes piece by piece."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from minga.serve.app import show_page, show_static_file
from minga.serve.errors import ApiError, json_bytes, json_response
from minga.serve.gate import Gate
from minga.serve.runs import Runs

HOLD = "hold"  # in an answer: wait here until the test opens the gate


def words(text: str) -> list[dict[str, Any]]:
    """A text as the deltas of a stream, a word each."""
    first, *rest = text.split(" ")
    return [{"content": first}, *({"content": f" {word}"} for word in rest)]


def thoughts(text: str) -> list[dict[str, Any]]:
    return [{"reasoning_content": delta["content"]} for delta in words(text)]


def call(name: str, *arguments: str, id: str, index: int = 0) -> list[dict[str, Any]]:
    """A tool call: its name once, its arguments in the pieces given."""
    first = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
    rest = [{"index": index, "function": {"arguments": piece}} for piece in arguments]
    return [{"tool_calls": [piece]} for piece in (first, *rest)]


async def _refuse(_: Request, error: ApiError) -> Response:
    return error.response()


class FakeServer:
    """`answers` are used up in turn, or by the name of a model; `requests` are the bodies that came."""

    def __init__(self, runs_dir: Path, models: tuple[str, ...] = ("qwen", "shakespeare")):
        self.models = models
        self.answers: list[list[Any]] = []
        self.answers_of: dict[str, list[Any]] = {}
        self.requests: list[dict[str, Any]] = []
        self.usage: dict[str, Any] = {}
        self.status: dict[str, Any] = {}  # what each model says besides its name
        self.gate = threading.Event()
        self._runs = Runs(runs_dir)
        routes = [
            Route("/", show_page),
            Route("/static/{name}", show_static_file),
            Route("/v1/models", self._list_models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/api/status", self._status),
            Route("/api/runs", lambda _: json_response({"runs": self._runs.summaries()})),
            Route("/api/runs/{name}", self._run),
        ]
        self.app = Starlette(routes=routes, middleware=[Middleware(Gate, host="127.0.0.1", keys=None, refuse=_refuse)])

    def answer(self, *parts: Any, end: str = "stop") -> None:
        """The next answer: deltas and HOLDs, then why it ended."""
        self.answers.append([*parts, end])

    async def _list_models(self, _: Request) -> Response:
        return json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _status(self, _: Request) -> Response:
        models = [{"name": name, "running": 0, "waiting": 0, **self.status} for name in self.models]
        return json_response({"version": "0.2.0", "models": models, "running": 0, "waiting": 0, "tokens_per_second": 0})

    async def _run(self, request: Request) -> Response:
        return json_response(self._runs.lines(request.path_params["name"], int(request.query_params.get("after", 0))))

    async def _chat(self, request: Request) -> Response:
        body = json.loads(await request.body())
        self.requests.append(body)
        parts = self.answers_of.get(body["model"]) or self.answers.pop(0)
        return StreamingResponse(self._stream(parts), media_type="text/event-stream")

    async def _stream(self, parts: list[Any]) -> AsyncIterator[bytes]:
        *deltas, end = parts
        yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for delta in deltas:
            if delta == HOLD:
                await asyncio.to_thread(self.gate.wait, 30)
            elif "error" in delta:
                yield _event(delta)
            else:
                yield _event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": end}]})
        num_said = sum(isinstance(delta, dict) for delta in deltas)
        usage = {"prompt_tokens": 20, "completion_tokens": num_said, "total_tokens": 20 + num_said} | self.usage
        yield _event({"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(document) + b"\n\n"
