"""The thread that runs the models: requests are answered side by side, and what comes goes to the event loop piece by piece.

An `LLM` is not thread-safe, and two models at once would only take the cores from each other: one thread runs them all, a
step each in turn, and takes new jobs in between two steps of those that run. Of those that wait, the next is the first of the
tenant that has the fewest running, so nobody who asks for much keeps the others out. Whatever fails ends the job, and the
next ones run as if nothing had happened. All counters are read and written on the event loop only; the thread reaches it
through `call_soon_threadsafe`, once a step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from minga.data.dialects import dialect_of, marker_tokens
from minga.engine.grammar import Grammar
from minga.engine.sampler import SamplingParams
from minga.errors import UserError
from minga.planner.counts import count_parameters
from minga.serve.errors import ApiError

if TYPE_CHECKING:
    from torch import Tensor

    from minga.engine.llm import LLM
    from minga.engine.scheduler import Entry
    from minga.engine.sequence import Delta

MAX_RUNNING = 64
MAX_WAITING = 128
RETRY_AFTER_SECONDS = 5
# Between two pieces of an answer, for each answer under way: sending costs the processor that the model needs.
PIECE_SECONDS, MOST_PIECE_SECONDS = 0.002, 0.1
_SPEED_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """One answer of a model. `receive` is called on the event loop: with a `Delta` for what is new, with None when the
    answer is over, and with the error that ended it.
    """

    prompt_ids: list[int]
    params: SamplingParams
    receive: Callable[[Delta | BaseException | None], None]
    tenant: str = ""
    salt: str = ""
    began: float | None = None  # when the model's thread took it
    cancelled: threading.Event = field(default_factory=threading.Event)
    entry: Entry | None = None
    told: float = -inf  # when its last piece was sent
    busy_seconds: float = 0.0  # of the model's time: its share, where several are answered side by side
    ended: bool = False
    embeds: bool = False  # `receive` gets the state of the text, and no answer

    @classmethod
    def to_embed(cls, ids: list[int], future: asyncio.Future[Tensor], tenant: str) -> Job:
        """A job whose result is the text's embedding."""

        def receive(item: Any) -> None:
            if future.done():
                return
            if isinstance(item, BaseException):
                future.set_exception(item)
            elif item is None:
                assert job.entry is not None
                future.set_result(job.entry.embedding())

        job = cls(ids, SamplingParams(max_tokens=1), receive, tenant, embeds=True)
        return job

    @property
    def num_cached_tokens(self) -> int:
        return 0 if self.entry is None else self.entry.sequence.num_cached_tokens

    @property
    def num_made_tokens(self) -> int:
        """Of the answer, told or not."""
        return 0 if self.entry is None else self.entry.sequence.length - self.entry.sequence.num_prompt_tokens

    @property
    def num_reasoning_tokens(self) -> int:
        return 0 if self.entry is None else self.entry.sequence.num_reasoning_tokens

    def cancel(self) -> None:
        """Leaves the queue, or stops the model after its current step. Does nothing to a job that is done."""
        self.cancelled.set()


class Turns:
    """The thread. It works while a model has something to do."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="minga-models")
        self._lock = threading.Lock()  # held while it is decided whether the thread goes on
        self._busy: list[Worker] = []

    def wake(self, worker: Worker) -> None:
        """The worker has something to do, if it had nothing before."""
        with self._lock:
            if worker in self._busy:
                return
            self._busy.append(worker)
            if len(self._busy) == 1:
                self._executor.submit(self._run)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        while busy := self._still_busy():
            for worker in busy:
                worker.step()

    def _still_busy(self) -> list[Worker]:
        with self._lock:
            self._busy = [worker for worker in self._busy if not worker.rests]
            return list(self._busy)


class Worker:
    """A model, those whom it answers, and those who wait for it. Made on the event loop that it answers to, or before."""

    def __init__(
        self,
        name: str,
        llm: LLM,
        turns: Turns,
        *,
        max_running: int = MAX_RUNNING,
        max_waiting: int = MAX_WAITING,
    ):
        self.name, self.llm, self._turns = name, llm, turns
        self.dialect = dialect_of(llm.tokenizer)
        self.markers = marker_tokens(llm.tokenizer, self.dialect)
        # a model's first grammar reads its whole vocabulary: better now than while others wait
        llm.check_grammar(Grammar('start: "a"'))
        self.num_parameters = count_parameters(llm.config).total
        self.busy_seconds = 0.0  # of the model
        self._max_running, self._max_waiting = max_running, max_waiting
        self._num_pending = 0
        self._pending_of: Counter[str] = Counter()
        self._speed = Speed()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()  # of the inbox
        self._inbox: OrderedDict[str, deque[Job]] = OrderedDict()  # by tenant
        self._running: list[Job] = []  # the models' thread's own

    @property
    def running(self) -> int:
        return min(self._max_running, self._num_pending)

    @property
    def waiting(self) -> int:
        return self._num_pending - self.running

    @property
    def tokens_per_second(self) -> float:
        return self._speed.tokens_per_second()

    def refuse_if_full(self, tenant: str) -> None:
        """Raises `ApiError` 429 where no more may wait: of all, or of one of several tenants, who may take half the places."""
        mine = self._pending_of[tenant]
        is_greedy = mine < self._num_pending and mine >= self._max_running + self._max_waiting // 2
        if is_greedy or self._num_pending >= self._max_running + self._max_waiting:
            raise ApiError(
                f"the queue is full: {self.waiting} requests are waiting for {self.name}; try again later",
                status=429, code="queue_full", headers={"retry-after": str(RETRY_AFTER_SECONDS)},
            )  # fmt: skip

    def submit(self, job: Job) -> None:
        """Queues a job; call it on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._num_pending += 1
        self._pending_of[job.tenant] += 1
        with self._lock:
            self._inbox.setdefault(job.tenant, deque()).append(job)
        self._turns.wake(self)

    def close(self) -> None:
        """Drops what waits. The caller has cancelled what runs."""
        with self._lock:
            self._inbox.clear()

    # ------------------------------------------------------------------ on the models' thread

    @property
    def rests(self) -> bool:
        with self._lock:
            return not (self._running or self._inbox)

    def step(self) -> None:
        """Takes in whom there is room for, has the model take a step, and tells what came."""
        news = self._take_in(self._running)
        began = monotonic()
        try:
            if self._running:
                self.llm.step()
        except BaseException as error:
            for job in self._running:
                if self._collect(job, news, began, inf):  # what it had said before
                    self._end(job, error, news)
            self._running = []
        now = monotonic()
        self.busy_seconds += now - began
        for job in self._running:
            job.busy_seconds += (now - began) / len(self._running)
        since = now - min(PIECE_SECONDS * len(self._running), MOST_PIECE_SECONDS)
        self._running = [job for job in self._running if self._collect(job, news, now, since)]
        self._tell(news)

    def _take_in(self, running: list[Job]) -> list[tuple[Job, Any]]:
        """Opens as many as may run; returns what is to be told of those that did not get so far."""
        news: list[tuple[Job, Any]] = []
        while len(running) < self._max_running and (job := self._next(running)) is not None:
            if job.cancelled.is_set():  # its client has left the queue
                self._end(job, None, news)
                continue
            try:
                job.began = monotonic()
                job.entry = self._open(job)
            except BaseException as error:
                self._end(job, error, news)
                continue
            running.append(job)
        return news

    def _open(self, job: Job) -> Entry:
        if job.embeds:
            return self.llm.submit_embedding(job.prompt_ids)
        return self.llm.submit(job.prompt_ids, job.params, salt=f"{job.tenant}\0{job.salt}", marked=self.markers)

    def _next(self, running: list[Job]) -> Job | None:
        """The first in the queue of the tenant with the fewest running; of equals, who was served longest ago."""
        with self._lock:
            if not self._inbox:
                return None
            count = Counter(job.tenant for job in running)
            tenant = min(self._inbox, key=lambda tenant: count[tenant])
            queue = self._inbox.pop(tenant)
            job = queue.popleft()
            if queue:
                self._inbox[tenant] = queue  # now the last of equals
            return job

    def _collect(self, job: Job, news: list[tuple[Job, Any]], now: float, since: float) -> bool:
        """What is new of a job, if nothing was told since then; False once the answer is over."""
        assert job.entry is not None
        sequence = job.entry.sequence
        error: BaseException | None = None
        if not job.cancelled.is_set():
            if job.told > since and not sequence.finished:
                return True
            delta = sequence.take_delta()
            if delta.token_ids:
                news.append((job, delta))
                job.told = now
            if not sequence.finished:
                return True
            error = sequence.failure
        self._end(job, error, news)
        return False

    def _end(self, job: Job, error: BaseException | None, news: list[tuple[Job, Any]]) -> None:
        if job.entry is not None:
            self.llm.cancel(job.entry)
        news.append((job, error))

    def _tell(self, news: list[tuple[Job, Any]]) -> None:
        if news and self._loop is not None:
            with suppress(RuntimeError):  # the event loop is closed, so nobody waits for this
                self._loop.call_soon_threadsafe(self._arrive, news)

    # ------------------------------------------------------------------ on the event loop

    def _arrive(self, news: list[tuple[Job, Any]]) -> None:
        num_tokens = 0
        for job, item in news:
            if item is None or isinstance(item, BaseException):
                self._num_pending -= 1
                self._pending_of[job.tenant] -= 1
                job.ended = True
            else:
                num_tokens += len(item.token_ids)
            job.receive(item)
        if num_tokens:
            self._speed.add(num_tokens)


def refusal_of(error: BaseException, field: str) -> ApiError:
    """What a job's error is to the client. field: that it is about, if it is the client's own."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(str(error), param=field, code="invalid_value")
    log.error("a request failed", exc_info=error)
    return ApiError(
        "the model failed while answering; the server's log has the details",
        status=500, code="generation_failed", headers={"x-should-retry": "false"},
    )  # fmt: skip


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
