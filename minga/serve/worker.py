"""One thread a model: requests are answered side by side, and what the model says goes to the event loop piece by piece.

An `LLM` is not thread-safe, so a model has one thread, which takes new requests between two steps of those that run. The
thread is an executor's: it works while there is something to do. Whatever fails ends in the future of the request, and
the next ones run as if nothing had happened. All counters are read and written on the event loop only; the thread reaches
it through `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from minga.errors import UserError
from minga.planner.counts import count_parameters
from minga.serve.protocol import ApiError, ChatRequest

if TYPE_CHECKING:
    from minga.engine.llm import LLM
    from minga.engine.scheduler import Entry
    from minga.engine.sequence import Delta

MAX_RUNNING = 32
MAX_WAITING = 32
RETRY_AFTER_SECONDS = 5
_SPEED_SECONDS = 5.0

log = logging.getLogger(__name__)


class Worker:
    """A model, those whom it answers, and those who wait for it."""

    def __init__(self, name: str, llm: LLM, *, max_running: int = MAX_RUNNING, max_waiting: int = MAX_WAITING):
        self.name, self.llm = name, llm
        self.num_parameters = count_parameters(llm.config).total
        self._max_running, self._max_waiting = max_running, max_waiting
        self._num_pending = 0
        self._speed = Speed()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"minga-{name}")
        self._inbox: deque[Job] = deque()
        self._at_work = threading.Lock()  # held while it is decided whether the thread goes on

    @property
    def running(self) -> int:
        return min(self._max_running, self._num_pending)

    @property
    def waiting(self) -> int:
        return self._num_pending - self.running

    @property
    def tokens_per_second(self) -> float:
        return self._speed.tokens_per_second()

    def submit(self, request: ChatRequest) -> Job:
        """Queues a request; call it on the event loop. Raises `ApiError` 429 when the queue is full."""
        if self.waiting >= self._max_waiting and self.running == self._max_running:
            raise ApiError(
                f"the queue is full: {self.waiting} requests are waiting for {self.name}; try again later",
                status=429, code="queue_full", headers={"retry-after": str(RETRY_AFTER_SECONDS)},
            )  # fmt: skip
        job = Job(request)
        job.future.add_done_callback(lambda _: self._announce_end(job))
        with self._at_work:
            self._inbox.append(job)
            if len(self._inbox) == 1:
                self._executor.submit(
                    self._work
                )  # if the thread is at work it finds the job, and this one has nothing to do
        self._num_pending += 1
        return job

    def close(self) -> None:
        """Drops what waits. The caller has cancelled what runs."""
        with self._at_work:
            waiting, self._inbox = self._inbox, deque()
        for job in waiting:
            job.future.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ on the model's thread

    def _work(self) -> None:
        """Answers until nobody is left."""
        running: list[Job] = []
        while True:
            self._take_in(running)
            if not running:
                return
            try:
                self.llm.step()
            except BaseException as error:
                for job in running:
                    self._end(job, error)
                running = []
            running = [job for job in running if self._deliver(job)]

    def _take_in(self, running: list[Job]) -> None:
        while len(running) < self._max_running:
            with self._at_work:
                if not self._inbox:
                    return
                job = self._inbox.popleft()
            if not job.future.set_running_or_notify_cancel():  # its client has left the queue
                continue
            try:
                num_prompt_tokens, job.entry = self._open(job.request)
            except BaseException as error:
                job.future.set_exception(error)
                continue
            job.call_soon(job.put, num_prompt_tokens)
            running.append(job)

    def _deliver(self, job: Job) -> bool:
        """Sends what is new; False once the answer is over."""
        assert job.entry is not None
        sequence = job.entry.sequence
        if not job.cancelled.is_set():
            delta = sequence.take_delta()
            if delta.token_ids:
                job.call_soon(self._arrive, job, delta)
            if not sequence.finished:
                return True
        self._end(job)
        return False

    def _end(self, job: Job, error: BaseException | None = None) -> None:
        assert job.entry is not None
        self.llm.cancel(job.entry)
        if error is None:
            job.future.set_result(None)
        else:
            job.future.set_exception(error)

    def _open(self, request: ChatRequest) -> tuple[int, Entry]:
        """The number of prompt tokens, and the answer to come. What cannot be answered is refused here."""
        try:
            ids = self._prompt_ids(request)
            room = self.llm.max_context - len(ids)
            if room < 1:
                raise ApiError(
                    f"the messages have {len(ids)} tokens and the context of {self.name} {self.llm.max_context}, "
                    "which must hold the answer too; shorten them",
                    param="messages", code="context_length_exceeded",
                )  # fmt: skip
            return len(ids), self.llm.submit(ids, request.params_within(room))
        except UserError as error:
            raise ApiError(str(error), param="messages", code="invalid_value") from None

    def _prompt_ids(self, request: ChatRequest) -> list[int]:
        """A model without a chat template was only ever shown plain text: it goes on from the end of what was said."""
        if self.llm.tokenizer.chat_template is not None:
            return self.llm.tokenizer.render_chat(request.messages)
        contents = (message["content"] for message in request.messages)
        return self.llm.encode("\n\n".join(content for content in contents if content))

    # ------------------------------------------------------------------ on the event loop

    def _arrive(self, job: Job, delta: Delta) -> None:
        self._speed.add(len(delta.token_ids))
        job.put(delta)

    def _announce_end(self, job: Job) -> None:
        with suppress(RuntimeError):  # the event loop is closed, so nobody waits for this
            job.call_soon(self._note_end, job)

    def _note_end(self, job: Job) -> None:
        self._num_pending -= 1
        job.put(None)


class Job:
    """One request's way through a worker, seen from the event loop: first `started`, then `deltas`."""

    def __init__(self, request: ChatRequest):
        self.request = request
        self.future: Future[None] = Future()
        self.entry: Entry | None = None  # once it runs
        self.cancelled = threading.Event()
        self._aborted_by: ApiError | None = None
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Any] = asyncio.Queue()  # the number of prompt tokens, deltas, None at the end

    def call_soon(self, function: Callable[..., None], *args: Any) -> None:
        self._loop.call_soon_threadsafe(function, *args)

    def put(self, item: int | Delta | None) -> None:
        self._items.put_nowait(item)

    async def started(self) -> int:
        """Waits for the request's turn; returns its number of prompt tokens. Raises `ApiError` if it is refused."""
        item = await self._items.get()
        if item is None:
            self._raise_failure()
        return int(item)

    async def deltas(self) -> AsyncIterator[Delta]:
        """The answer. Raises `ApiError` if the model fails."""
        while (item := await self._items.get()) is not None:
            yield item
        self._raise_failure()

    def cancel(self) -> None:
        """Leaves the queue, or stops the model after its current step. Does nothing to a job that is done."""
        self.cancelled.set()
        self.future.cancel()

    def abort(self, error: ApiError) -> None:
        """Cancels, and raises `error` in whoever reads the answer."""
        self._aborted_by = error
        self.cancel()
        self.put(None)

    def _raise_failure(self) -> None:
        error = self._aborted_by or self.future.exception()
        if isinstance(error, ApiError):
            raise error
        if error is not None:
            log.error("a request failed", exc_info=error)
            raise ApiError(
                "the model failed while answering; the server's log has the details",
                status=500, code="generation_failed", headers={"x-should-retry": "false"},
            ) from error  # fmt: skip


class Speed:
    """Tokens per second over the last seconds."""

    def __init__(self) -> None:
        self._arrivals: deque[tuple[float, int]] = deque()

    def add(self, num_tokens: int) -> None:
        self._arrivals.append((monotonic(), num_tokens))
        self._forget_old()

    def tokens_per_second(self) -> float:
        self._forget_old()
        if len(self._arrivals) < 2:
            return 0.0
        (first, num_first), (last, _) = self._arrivals[0], self._arrivals[-1]
        num_tokens = sum(num for _, num in self._arrivals) - num_first  # the first ones came before the time counted
        return num_tokens / max(last - first, 1e-6)

    def _forget_old(self) -> None:
        while self._arrivals and self._arrivals[0][0] < monotonic() - _SPEED_SECONDS:
            self._arrivals.popleft()
