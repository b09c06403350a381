"""The routes: OpenAI's and Anthropic's APIs under /v1, the page at /, and what the page and operators read.

A request for an answer runs through one of the first routes of `Api`: its body is checked (schema.py and the endpoint's
file), becomes a `Generation` (generation.py), is admitted (service.py), and an `Answer` (answer.py) sends what comes out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

import minga
from minga.serve.answer import Answer, while_there
from minga.serve.answering import render
from minga.serve.chat import ChatBody, ChatWriter
from minga.serve.completions import CompletionBody, CompletionWriter
from minga.serve.embeddings import EmbeddingBody
from minga.serve.errors import LEFT, ApiError, json_response
from minga.serve.gate import Gate
from minga.serve.messages import CountTokensBody, MessagesBody, MessagesWriter, count_document, error_document
from minga.serve.metrics import CONTENT_TYPE
from minga.serve.openapi import describe
from minga.serve.response_store import ResponseStore
from minga.serve.responses import ResponsesBody, ResponsesWriter
from minga.serve.runs import Runs
from minga.serve.schema import Model, invalid, parse_body
from minga.serve.service import Service, Settings
from minga.serve.text import DetokenizeBody, ModerationBody, TokenizeBody, detokenize, moderate, tokenize

if TYPE_CHECKING:
    from minga.data.tokenizer import Tokenizer
    from minga.engine.llm import LLM
    from minga.serve.generation import Writer

MAX_BODY_BYTES, MAX_BODY_SECONDS = 10 << 20, 60.0
_SMALL_BYTES = 1 << 10
Asks = TypeVar("Asks", ChatBody, CompletionBody, MessagesBody)
_MAX_DRAINED_BYTES = 64 << 20  # a client that is cut off while it sends may never see why it was refused
_PAGE = Path(__file__).parent / "page"
# Said here, not left to the system's own table: browsers run no module that is called text/plain.
_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_STATIC_FILES = {path.name: _MEDIA_TYPES[path.suffix] for path in _PAGE.iterdir() if path.suffix in _MEDIA_TYPES}


def create_app(models: Mapping[str, LLM], runs_dir: str | Path, settings: Settings | None = None) -> Starlette:
    """The ASGI application."""
    service = Service(models, settings or Settings())
    api = Api(service, Runs(Path(runs_dir)))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await service.settle()
        service.close()

    gate = Middleware(
        Gate,
        host=service.settings.host,
        keys=service.settings.keys,
        access_log=service.settings.access_log,
        refuse=api.refuse,
    )
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/responses", api.responses, methods=["POST"]),
            Route("/v1/responses/{id}", api.stored_response, methods=["GET", "DELETE"]),
            Route("/v1/responses/{id}/input_items", api.list_input_items),
            Route("/v1/messages", api.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", api.count_tokens, methods=["POST"]),
            Route("/v1/embeddings", api.embeddings, methods=["POST"]),
            Route("/v1/moderations", api.moderations, methods=["POST"]),
            Route("/v1/models", api.list_models),
            Route("/v1/models/{name:path}", api.show_model),
            Route("/tokenize", api.tokenize, methods=["POST"]),
            Route("/detokenize", api.detokenize, methods=["POST"]),
            Route("/health", api.health),
            Route("/ready", api.ready),
            Route("/metrics", api.metrics),
            Route("/openapi.json", api.openapi),
            Route("/api/status", api.status),
            Route("/api/runs", api.list_runs),
            Route("/api/runs/{name}", api.show_run),
            Route("/", show_page),
            Route("/docs", show_docs),
            Route("/static/{name}", show_static_file),
        ],
        middleware=[gate],
        exception_handlers={
            ApiError: api.refuse, HTTPException: api.refuse_http, ClientDisconnect: _give_up,
        },
        lifespan=lifespan,
    )  # fmt: skip
    app.router.redirect_slashes = False
    app.state.service = service
    return app


class Api:
    """The endpoints that speak JSON."""

    def __init__(self, service: Service, runs: Runs):
        self.service, self.runs = service, runs
        self.stored = ResponseStore()
        self._created = int(time.time())

    # ------------------------------------------------------------------ answers

    async def chat_completions(self, request: Request) -> Answer:
        return await self._answer(request, ChatBody, ChatWriter)

    async def completions(self, request: Request) -> Answer:
        return await self._answer(request, CompletionBody, CompletionWriter)

    async def messages(self, request: Request) -> Answer:
        return await self._answer(request, MessagesBody, MessagesWriter, error_document)

    async def _answer(
        self,
        request: Request,
        body_type: type[Asks],
        writer_type: Callable[[Asks, str, Tokenizer], Writer],
        refusal: Callable[[ApiError], dict[str, Any]] = ApiError.document,
    ) -> Answer:
        body, num_bytes = await _read_body(request, body_type)
        worker = self.service.worker(body.model)
        generation = await asyncio.to_thread(body.generation)
        writer = writer_type(body, worker.name, worker.llm.tokenizer)
        return self.service.answer(request, generation, writer, worker, num_bytes=num_bytes, refusal=refusal)

    async def responses(self, request: Request) -> Answer:
        body, num_bytes = await _read_body(request, ResponsesBody)
        worker, tenant = self.service.worker(body.model), request.state.key.name
        body = body.with_items(self.stored.items(tenant, body.references))
        earlier = self.stored.conversation(tenant, body.previous_response_id)
        generation = await asyncio.to_thread(body.generation, earlier)
        keep = self.stored.keeper(tenant, body, earlier)
        writer = ResponsesWriter(body, worker.name, worker.llm.tokenizer, keep=keep)
        return self.service.answer(request, generation, writer, worker, num_bytes=num_bytes)

    async def stored_response(self, request: Request) -> Response:
        if request.query_params.get("stream", "false") != "false":
            raise invalid("stream", "a response that is kept is given whole; leave it out")
        act = self.stored.delete if request.method == "DELETE" else self.stored.get
        return json_response(act(request.state.key.name, request.path_params["id"]))

    async def list_input_items(self, request: Request) -> Response:
        id = request.path_params["id"]
        return json_response(self.stored.input_items(request.state.key.name, id, request.query_params))

    async def count_tokens(self, request: Request) -> Response:
        body, _ = await _read_body(request, CountTokensBody)
        worker = self.service.worker(body.model)
        ids, _ = await asyncio.to_thread(lambda: render(body.generation(), worker))
        return json_response(count_document(len(ids)))

    # ------------------------------------------------------------------ models, embeddings, words

    async def embeddings(self, request: Request) -> Response:
        body, num_bytes = await _read_body(request, EmbeddingBody)
        work = self.service.embed(request, body, num_bytes)
        return json_response(await while_there(work, request.receive, self.service.settings.deadline))

    async def moderations(self, request: Request) -> Response:
        body, _ = await _read_body(request, ModerationBody)
        guard = self.service.settings.guard
        if guard is None:
            message = "this server has no guard; start it without `--guard none`"
            raise ApiError(message, status=404, code="no_guard")
        return json_response(await asyncio.to_thread(moderate, body, guard))

    async def tokenize(self, request: Request) -> Response:
        body, _ = await _read_body(request, TokenizeBody)
        return json_response(await asyncio.to_thread(tokenize, body, self.service.worker(body.model)))

    async def detokenize(self, request: Request) -> Response:
        body, _ = await _read_body(request, DetokenizeBody)
        return json_response(await asyncio.to_thread(detokenize, body, self.service.worker(body.model)))

    async def list_models(self, _: Request) -> Response:
        names = list(self.service.workers)
        documents = [self._model_document(name) for name in names]
        ends = {"first_id": names[0], "last_id": names[-1], "has_more": False}
        return json_response({"object": "list", "data": documents, **ends})

    async def show_model(self, request: Request) -> Response:
        return json_response(self._model_document(self.service.worker(request.path_params["name"]).name))

    def _model_document(self, name: str) -> dict[str, Any]:
        """For the clients of both APIs, which look for different names; `max_model_len` is vLLM's."""
        context = self.service.workers[name].llm.max_context
        openai = {"object": "model", "created": self._created, "owned_by": "minga"}
        anthropic = {
            "type": "model",
            "created_at": datetime.fromtimestamp(self._created, UTC).isoformat(),
            "display_name": name,
            "lifecycle": "active",
            "max_input_tokens": context,
            "max_tokens": context,
        }
        return {"id": name, **openai, **anthropic, "max_model_len": context}

    # ------------------------------------------------------------------ for operators, and for the page

    async def health(self, _: Request) -> Response:
        return json_response({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """503 while the server shuts down: send no more."""
        if self.service.draining:
            raise ApiError("the server stops", status=503, code="shutting_down", headers={"retry-after": "5"})
        return json_response({"status": "ready", "models": list(self.service.workers)})

    async def metrics(self, _: Request) -> Response:
        return Response(self.service.metrics.exposition(self.service.model_states()), media_type=CONTENT_TYPE)

    async def openapi(self, _: Request) -> Response:
        return json_response(describe(list(self.service.workers), needs_key=self.service.settings.keys is not None))

    async def status(self, _: Request) -> Response:
        """The version, each model with its speed, queue, cache and price, and the sums of the first two."""
        models = self.service.status()
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

    # ------------------------------------------------------------------ refusals

    async def refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        self.service.metrics.refused(str(error.code))
        document = error_document(error) if request.url.path.startswith("/v1/messages") else error.document()
        return json_response(document, error.status, error.headers)

    async def refuse_http(self, request: Request, error: Exception) -> Response:
        """What Starlette itself refuses: unknown paths and wrong methods."""
        assert isinstance(error, HTTPException)
        path = request.url.path[:200]
        messages = {404: f"there is nothing at {path}", 405: f"{request.method} does not work at {path}"}
        message = messages.get(error.status_code, error.detail)
        codes = {404: "not_found", 405: "method_not_allowed"}
        code = codes.get(error.status_code)
        return await self.refuse(request, ApiError(message, status=error.status_code, code=code, headers=error.headers))


async def _read_body(request: Request, model: type[Model]) -> tuple[Model, int]:
    """The checked body, whatever media type it says it has, and its number of bytes.

    A large one is checked in a thread.
    """
    body, num_bytes = bytearray(), 0
    try:
        async with asyncio.timeout(MAX_BODY_SECONDS):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes > _MAX_DRAINED_BYTES:
                    break
                if num_bytes <= MAX_BODY_BYTES:
                    body += chunk
    except TimeoutError:
        message = f"the body was not sent within {MAX_BODY_SECONDS:g} seconds"
        raise ApiError(message, status=408, code="body_timeout", headers={"connection": "close"}) from None
    if num_bytes > MAX_BODY_BYTES:
        raise ApiError(f"the body is larger than {MAX_BODY_BYTES} bytes", status=413, code="body_too_large")
    if num_bytes <= _SMALL_BYTES:  # takes less than the way to a thread and back
        return parse_body(model, bytes(body)), num_bytes
    return await asyncio.to_thread(parse_body, model, bytes(body)), num_bytes


# ---------------------------------------------------------------------------------------------- page


async def show_page(_: Request) -> Response:
    return FileResponse(_PAGE / "index.html")


async def show_docs(_: Request) -> Response:
    return FileResponse(_PAGE / "docs.html")


async def show_static_file(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _STATIC_FILES:
        raise HTTPException(404)
    return FileResponse(_PAGE / name, media_type=_STATIC_FILES[name])


# ---------------------------------------------------------------------------------------------- errors


async def _give_up(_: Request, __: Exception) -> Response:
    """The client left while it was sending: nobody reads this."""
    return Response(status_code=LEFT)
