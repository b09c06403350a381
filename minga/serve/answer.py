"""The ASGI response that an answer is: whole as JSON, or as server-sent events while it comes.

A client that goes away ends the work, streamed or not. A request that is refused before the model speaks gets its status;
once a stream has begun, an error is its last event. Where the model reads for long, comments keep the connection alive.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from minga.serve.answering import Answering
from minga.serve.errors import LEFT, ApiError, a_bug, json_response
from minga.serve.generation import Writer

PATIENCE_SECONDS = 15.0  # without a byte, after which a stream says that it lives
FAREWELL_SECONDS = 5.0  # for the last words to a client that may read no more
_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]

T = TypeVar("T")

log = logging.getLogger(__name__)


class Answer:
    """refusal: how this endpoint writes an error. done: called once, with the error or None, when all is over. headers: of an
    answer that is not refused.
    """

    def __init__(
        self,
        answering: Answering,
        writer: Writer,
        *,
        refusal: Callable[[ApiError], dict[str, Any]] = ApiError.document,
        deadline: float | None = None,
        done: Callable[[ApiError | None], None] = lambda error: None,
        headers: Mapping[str, str] | None = None,
    ):
        self._answering, self._writer = answering, writer
        self._refusal, self._deadline, self._done = refusal, deadline, done
        self._headers = dict(headers or {})
        self._begun = False  # its headers are sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(self._answer(scope, receive, send))
        leaving = asyncio.create_task(_disconnect(receive))
        error: ApiError | None = ApiError("the client left", status=LEFT, code="cancelled")
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED, timeout=self._deadline)
            if not answering.done() and not leaving.done():
                await self._part(answering, leaving, too_late(self._deadline))
            if answering.done():
                error = answering.result()
        except asyncio.CancelledError:  # the server is told to stop, and its patience is over
            message = "the server stops, and this answer took too long to finish"
            error = ApiError(message, status=503, code="shutting_down", headers={"retry-after": "5"})
            await self._part(answering, leaving, error)
        finally:
            answering.cancel()
            leaving.cancel()
            self._answering.cancel()
            self._done(error)

    async def _part(
        self, answering: asyncio.Task[ApiError | None], leaving: asyncio.Task[None], error: ApiError
    ) -> None:
        """Ends it with an error; a client that reads nothing is not told why."""
        self._answering.abort(error)
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED, timeout=FAREWELL_SECONDS)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> ApiError | None:
        """Returns the error that ended it, if one did."""
        try:
            if self._writer.stream:
                await self._stream(send)
            else:
                await self._answering.start()
                async for _ in self._answering.batches():
                    pass
                document = self._writer.document(self._answering.outcome)
                await json_response(document, headers=self._headers)(scope, receive, send)
            return None
        except ApiError as refusal:
            error = refusal
        except Exception as failure:
            log.error("an answer failed", exc_info=failure)
            error = a_bug()
        if self._begun:
            await send(_body(b"".join(self._writer.error(error)), last=True))
        else:
            await json_response(self._refusal(error), error.status, error.headers)(scope, receive, send)
        return error

    async def _stream(self, send: Send) -> None:
        await self._answering.start()
        async for events in self._answering.batches(PATIENCE_SECONDS):
            frames: list[bytes] = []
            if not self._begun:
                self._begun = True
                headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in self._headers.items()]
                await send({"type": "http.response.start", "status": 200, "headers": [*_STREAM_HEADERS, *headers]})
                frames += self._writer.begin(self._answering.outcome.usage)
            for event in events:
                frames += self._writer.event(event)
            await send(_body(b"".join(frames) or b": still there\n\n"))
        await send(_body(b"".join(self._writer.end(self._answering.outcome)), last=True))


def _body(data: bytes, *, last: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": not last}


async def while_there(work: Coroutine[Any, Any, T], receive: Receive, deadline: float) -> T:
    """What `work` returns. It ends where the client leaves, or at the deadline."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED, timeout=deadline)
        if working.done():
            return working.result()
        raise ClientDisconnect if leaving.done() else too_late(deadline)
    finally:
        working.cancel()
        leaving.cancel()


def too_late(deadline: float | None) -> ApiError:
    message = f"the answer was not finished within {deadline:g} seconds"
    return ApiError(message, status=408, code="timeout", headers={"x-should-retry": "false"})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
