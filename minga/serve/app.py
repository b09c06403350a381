"""The routes: OpenAI's chat API under /v1, the page at /, and what the page reads under /api.

A request runs through `chat_completions`: its body is checked (protocol.py), its model's worker queues it (worker.py),
and an `Answer` sends what comes out, whole or as server-sent events, until the client has it or is gone.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

import minga
from minga.engine.sampler import TokenLogprob
from minga.serve.guard import Guard
from minga.serve.protocol import (
    ApiError,
    ChatRequest,
    Reply,
    json_bytes,
    json_response,
    logprobs_document,
    parse_chat_request,
    parse_json,
    usage,
)
from minga.serve.runs import Runs
from minga.serve.worker import MAX_RUNNING, MAX_WAITING, Job, Worker

if TYPE_CHECKING:
    from minga.engine.llm import LLM

MAX_BODY_BYTES = 4 << 20
_MAX_DRAINED_BYTES = 64 << 20  # a client that is cut off while it sends may never see why it was refused
_PAGE = Path(__file__).parent / "page"
# Said here, not left to the system's own table: browsers run no module that is called text/plain.
_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_STATIC_FILES = {path.name: _MEDIA_TYPES[path.suffix] for path in _PAGE.iterdir() if path.suffix in _MEDIA_TYPES}


def create_app(
    models: Mapping[str, LLM],
    runs_dir: str | Path,
    *,
    host: str = "127.0.0.1",
    api_key: str | None = None,
    max_running: int = MAX_RUNNING,
    max_waiting: int = MAX_WAITING,
) -> Starlette:
    """The ASGI application. `host` is the address it is bound to; a model answers `max_running` requests side by side."""
    limits = {"max_running": max_running, "max_waiting": max_waiting}
    api = Api({name: Worker(name, llm, **limits) for name, llm in models.items()}, Runs(Path(runs_dir)))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        for worker in api.workers.values():
            worker.close()

    app = Starlette(
        routes=[
            Route("/v1/models", api.list_models),
            Route("/v1/models/{name:path}", api.show_model),
            Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
            Route("/health", api.health),
            Route("/api/status", api.status),
            Route("/api/runs", api.list_runs),
            Route("/api/runs/{name}", api.show_run),
            Route("/", show_page),
            Route("/static/{name}", show_static_file),
        ],
        middleware=[Middleware(Guard, host=host, api_key=api_key)],
        exception_handlers={
            ApiError: _refuse, HTTPException: _refuse_http, ClientDisconnect: _give_up, Exception: _fail,
        },
        lifespan=lifespan,
    )  # fmt: skip
    app.router.redirect_slashes = False
    return app


class Api:
    """The endpoints that speak JSON."""

    def __init__(self, workers: dict[str, Worker], runs: Runs):
        self.workers, self.runs = workers, runs
        self._created = int(time.time())

    # ------------------------------------------------------------------ OpenAI's

    async def chat_completions(self, request: Request) -> Answer:
        chat = parse_chat_request(parse_json(await _read_body(request)))
        worker = self._worker(chat.model)
        return Answer(worker.submit(chat), worker)

    async def list_models(self, _: Request) -> Response:
        return json_response({"object": "list", "data": [self._model_document(name) for name in self.workers]})

    async def show_model(self, request: Request) -> Response:
        return json_response(self._model_document(self._worker(request.path_params["name"]).name))

    def _model_document(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "minga"}

    def _worker(self, name: str | None) -> Worker:
        """The worker of the named model; the name may be left out where there is one model only."""
        known = ", ".join(self.workers)
        if name is None and len(self.workers) > 1:
            raise ApiError(
                f"`model` is missing; it is one of {known}", param="model", code="missing_required_parameter"
            )
        worker = next(iter(self.workers.values())) if name is None else self.workers.get(name)
        if worker is None:
            asked = str(name) if len(str(name)) <= 80 else f"{str(name)[:77]}..."
            raise ApiError(
                f"there is no model `{asked}` here; there is {known}",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip
        return worker

    # ------------------------------------------------------------------ ours

    async def health(self, _: Request) -> Response:
        return json_response({"status": "ok"})

    async def status(self, _: Request) -> Response:
        """The version, each model with its speed and its queue, and the sums of these."""
        models: list[dict[str, Any]] = [
            {
                "name": name,
                "parameters": worker.num_parameters,
                "max_context": worker.llm.max_context,
                "tokens_per_second": worker.tokens_per_second,
                "running": worker.running,
                "waiting": worker.waiting,
            }
            for name, worker in self.workers.items()
        ]
        sums = {name: sum(model[name] for model in models) for name in ("tokens_per_second", "running", "waiting")}
        return json_response({"version": minga.__version__, "models": models, **sums})

    def list_runs(self, _: Request) -> Response:  # not async: Starlette runs it, and its file reading, in a thread
        return json_response({"runs": self.runs.summaries()})

    def show_run(self, request: Request) -> Response:
        after = request.query_params.get("after", "0")
        if not (after.isdecimal() and len(after) <= 15):
            raise ApiError("invalid `after`: it must be a line number, 0 or more", param="after", code="invalid_value")
        found = self.runs.lines(request.path_params["name"], int(after))
        if found is None:
            raise ApiError("there is no such run; /api/runs lists them", status=404, param="name", code="run_not_found")
        return json_response(found)


# ---------------------------------------------------------------------------------------------- chat


class Answer:
    """An ASGI response: a job's answer. A client that goes away cancels the job, streamed or not."""

    def __init__(self, job: Job, worker: Worker):
        self._job, self._worker = job, worker
        self._request: ChatRequest = job.request
        self._reply = Reply(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), worker.name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(self._answer(scope, receive, send))
        leaving = asyncio.create_task(_disconnect(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        except asyncio.CancelledError:  # the server is told to stop, and its patience is over
            message = "the server stops, and this answer took too long to finish"
            self._job.abort(ApiError(message, status=503, code="shutting_down", headers={"retry-after": "5"}))
            await answering
        finally:
            answering.cancel()
            leaving.cancel()
            self._job.cancel()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_prompt_tokens = await self._job.started()  # refusals come before the first header
        if not self._request.stream:
            return await (await self._whole(num_prompt_tokens))(scope, receive, send)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self._events(num_prompt_tokens)) as events:
            async for document in events:
                await send(_body(b"data: " + json_bytes(document) + b"\n\n"))
        await send(_body(b"data: [DONE]\n\n", last=True))

    async def _whole(self, num_prompt_tokens: int) -> Response:
        text, num_tokens, finish_reason = "", 0, "stop"
        logprobs: list[TokenLogprob] = []
        async for delta in self._job.deltas():
            text += delta.text
            num_tokens += len(delta.token_ids)
            logprobs += delta.logprobs or []
            finish_reason = delta.finish_reason or finish_reason
        wanted = None if self._request.sampling.logprobs is None else logprobs
        document = self._reply.completion(
            text,
            finish_reason,
            logprobs_document(wanted, self._worker.llm.tokenizer),
            usage(num_prompt_tokens, num_tokens),
        )
        return json_response(document)

    async def _events(self, num_prompt_tokens: int) -> AsyncGenerator[dict[str, Any], None]:
        """The documents of a stream. A model that fails in the middle ends it with an error."""
        no_usage = {"usage": None} if self._request.include_usage else {}
        yield self._reply.chunk({"role": "assistant", "content": ""}) | no_usage
        num_tokens, finish_reason = 0, "stop"
        try:
            async for delta in self._job.deltas():
                num_tokens += len(delta.token_ids)
                finish_reason = delta.finish_reason or finish_reason
                if delta.text or delta.logprobs:
                    logprobs = logprobs_document(delta.logprobs, self._worker.llm.tokenizer)
                    yield self._reply.chunk({"content": delta.text}, logprobs) | no_usage
        except ApiError as error:
            yield error.document()
            return
        yield self._reply.chunk({}, finish_reason=finish_reason) | no_usage
        if self._request.include_usage:
            yield self._reply.usage_chunk(usage(num_prompt_tokens, num_tokens))


def _body(data: bytes, *, last: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": not last}


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request) -> bytes:
    body, num_bytes = bytearray(), 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > _MAX_DRAINED_BYTES:
            break
        if num_bytes <= MAX_BODY_BYTES:
            body += chunk
    if num_bytes > MAX_BODY_BYTES:
        raise ApiError(f"the body is larger than {MAX_BODY_BYTES} bytes", status=413, code="body_too_large")
    return bytes(body)


# ---------------------------------------------------------------------------------------------- page


async def show_page(_: Request) -> Response:
    return FileResponse(_PAGE / "index.html")


async def show_static_file(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _STATIC_FILES:
        raise HTTPException(404)
    return FileResponse(_PAGE / name, media_type=_STATIC_FILES[name])


# ---------------------------------------------------------------------------------------------- errors


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _refuse_http(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    messages = {404: f"there is nothing at {path}", 405: f"{request.method} does not work at {path}"}
    message = messages.get(error.status_code, error.detail)
    codes = {404: "not_found", 405: "method_not_allowed"}
    return ApiError(
        message, status=error.status_code, code=codes.get(error.status_code), headers=error.headers
    ).response()


async def _give_up(_: Request, __: Exception) -> Response:
    """The client left while it was sending: nobody reads this."""
    return Response(status_code=400)


async def _fail(_: Request, __: Exception) -> Response:
    """A bug of ours: the server logs its traceback, which is not the client's business."""
    message = "the server has a bug; its log has the details"
    return ApiError(message, status=500, code="internal_error", headers={"x-should-retry": "false"}).response()
