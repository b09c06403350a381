"""What all routes share: the models' workers, who may ask how much, and what is written down of each answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.requests import Request

from minga.planner.cost import Rates
from minga.serve import meter
from minga.serve.answer import FAREWELL_SECONDS, Answer
from minga.serve.answering import Answering
from minga.serve.embeddings import EmbeddingBody, embed
from minga.serve.errors import LEFT, ApiError
from minga.serve.generation import Generation, Usage, Writer
from minga.serve.keys import Key, Keys
from minga.serve.limits import Admission, Limits
from minga.serve.log import AccessLog
from minga.serve.meter import Meter
from minga.serve.metrics import Metrics, ModelState, RequestTimes
from minga.serve.moderation import Guard
from minga.serve.worker import MAX_RUNNING, MAX_WAITING, Turns, Worker

if TYPE_CHECKING:
    from minga.engine.llm import LLM

MAX_SECONDS = 600.0
_BYTES_A_TOKEN = 3  # of a body, for an estimate that is corrected at the end
_HEADER_SAFE = " !#$&'()*+,/:;<=>?@[]^`{|}~"  # of a model's name in a quoted string; the rest is percent-encoded


@dataclass(frozen=True)
class Settings:
    """host: the address that is bound. keys: who may ask; None: everybody. moderate: keep back what the guard flags, asked
    for or not. deadline: seconds that an answer may take. watermark: the secret with which answers are marked that ask for
    it; None: none can be. engine: which replica this is, in the metrics.
    """

    host: str = "127.0.0.1"
    keys: Keys | None = None
    meter: Meter | None = None
    access_log: AccessLog | None = None
    guard: Guard | None = None
    moderate: bool = False
    rates: Rates | None = None
    deadline: float = MAX_SECONDS
    max_running: int = MAX_RUNNING
    max_waiting: int = MAX_WAITING
    watermark: int | None = None
    engine: str = "0"


@dataclass
class Service:
    models: Mapping[str, LLM]
    settings: Settings
    workers: dict[str, Worker] = field(init=False)

    def __post_init__(self) -> None:
        from minga.kernels.cpu.net import let_go  # torch: not before the flags have been checked

        limits = {"max_running": self.settings.max_running, "max_waiting": self.settings.max_waiting}
        self._turns = Turns()
        self.workers = {name: Worker(name, llm, self._turns, **limits) for name, llm in self.models.items()}
        let_go()  # the thread that has opened the models does not run them
        self.limits = Limits()
        contexts = {name: llm.max_context for name, llm in self.models.items()}
        self.metrics = Metrics(contexts, engine=self.settings.engine)
        self.draining = False
        self._num_open = 0  # answers that are not accounted for

    async def settle(self) -> None:
        """Returns once all answers are accounted for; the server has told them to end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * FAREWELL_SECONDS):
                while self._num_open:
                    await asyncio.sleep(0.01)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self._turns.close()
        if self.settings.meter is not None:
            self.settings.meter.close()
        if self.settings.access_log is not None:
            self.settings.access_log.close()

    def worker(self, name: str | None) -> Worker:
        """The worker of the named model; the name may be left out where there is one model only."""
        known = ", ".join(self.workers)
        if name is None and len(self.workers) > 1:
            message = f"`model` is missing; it is one of {known}"
            raise ApiError(message, param="model", code="missing_required_parameter")
        worker = next(iter(self.workers.values())) if name is None else self.workers.get(name)
        if worker is None:
            asked = str(name) if len(str(name)) <= 80 else f"{str(name)[:77]}..."
            message = f"there is no model `{asked}` here; there is {known}"
            raise ApiError(message, status=404, param="model", code="model_not_found")
        return worker

    # ------------------------------------------------------------------ answers

    def answer(
        self,
        request: Request,
        generation: Generation,
        writer: Writer,
        worker: Worker,
        *,
        num_bytes: int,
        refusal: Callable[[ApiError], dict[str, Any]] = ApiError.document,
    ) -> Answer:
        """The response. num_bytes: of the body, for an estimate of its tokens."""
        key: Key = request.state.key
        wanted = generation.max_tokens or generation.default_max_tokens
        if key.max_output_tokens is not None and wanted > key.max_output_tokens:
            if generation.max_tokens is not None:
                message = (
                    f"{wanted} tokens of answer are asked for, and the key {key.name} allows {key.max_output_tokens}"
                )
                raise ApiError(message, param="max_tokens", code="max_output_tokens_exceeded")
            wanted = key.max_output_tokens
        if generation.scaling is not None:
            wanted *= generation.scaling.num
            wanted = min(wanted, generation.scaling.max_total_tokens or wanted)
        admission = self.limits.admit(key, num_bytes // _BYTES_A_TOKEN + wanted * generation.num_answers)
        answering = Answering(
            generation, worker, tenant=key.name, guard=self.settings.guard, blocks=self.settings.moderate,
            watermark=self.settings.watermark, most_tokens=key.max_output_tokens,
        )  # fmt: skip
        request.state.access["model"] = worker.name
        self._num_open += 1
        return Answer(
            answering, writer, refusal=refusal, deadline=self.settings.deadline,
            done=lambda error: self._account(request, answering, admission, error),
            headers=self._headers(key, worker, answering),
        )  # fmt: skip

    def _headers(self, key: Key, worker: Worker, answering: Answering) -> dict[str, str]:
        """Limits; and that a machine wrote this, with what (EU AI Act, article 50)."""
        mark = "; watermark" if answering.watermarked else ""
        return self.limits.headers(key) | {
            "x-content-provenance": f'ai-generated; generator="minga"; model="{quote(worker.name, safe=_HEADER_SAFE)}"{mark}'
        }

    def _account(self, request: Request, answering: Answering, admission: Admission, error: ApiError | None) -> None:
        """Once, when an answer is over: limits, meter, metrics and log."""
        self._num_open -= 1
        usage, worker, now = answering.outcome.usage, answering.worker, monotonic()
        usage.completion = max(usage.completion, answering.num_made_tokens)  # what was made for a client that left, too
        admission.release(usage.prompt + usage.completion)
        reason = answering.outcome.choices[0].finish_reason
        if error is not None and error.status == LEFT:
            reason = "abort"
            self.metrics.cancelled(worker.name)
        elif error is not None:
            reason = "error"
            self.metrics.refused(str(error.code))
        for _ in range(answering.num_malformed_calls):
            self.metrics.malformed_tool_call(worker.name)
        if answering.was_blocked:
            self.metrics.moderation_blocked(worker.name)
        if error is not None and error.code == "invalid_schema":
            self.metrics.grammar_rejected(worker.name)
        began, first, last = answering.began, answering.first_token, answering.last_token
        if first is not None:
            times = RequestTimes(
                worker.name, reason, usage.prompt, usage.cached, usage.completion, now - answering.asked,
                queue_seconds=None if began is None else began - answering.asked,
                prefill_seconds=None if began is None else first - began,
                first_token_seconds=first - answering.asked,
                decode_seconds=None if last is None else last - first,
                inter_token_seconds=answering.pauses,
            )  # fmt: skip
            self.metrics.observe(times)
        request.state.access.update(prompt_tokens=usage.prompt, completion_tokens=usage.completion)
        status = 200 if error is None else error.status
        self._record(request, worker, usage, busy_seconds=answering.busy_seconds, reason=reason, status=status)

    def _record(
        self,
        request: Request,
        worker: Worker,
        usage: Usage,
        *,
        busy_seconds: float,
        reason: str | None = None,
        status: int = 200,
    ) -> None:
        if self.settings.meter is not None:
            self.settings.meter.record(
                meter.Usage(
                    request.state.key.name, worker.name, request.url.path, request.state.request_id, status, reason,
                    usage.prompt, usage.cached, usage.completion, usage.reasoning, busy_seconds,
                )
            )  # fmt: skip

    async def embed(self, request: Request, body: EmbeddingBody, num_bytes: int) -> dict[str, Any]:
        worker, key = self.worker(body.model), request.state.key
        request.state.access["model"] = worker.name
        with self.limits.admit(key, num_bytes // _BYTES_A_TOKEN) as admission:
            try:
                document, num_tokens, seconds = await embed(body, worker, key.name)
            except asyncio.CancelledError:
                self.metrics.cancelled(worker.name)
                raise
            admission.release(num_tokens)
        request.state.access["prompt_tokens"] = num_tokens
        self._record(request, worker, Usage(prompt=num_tokens), busy_seconds=seconds)
        return document

    # ------------------------------------------------------------------ the state

    def model_states(self) -> dict[str, ModelState]:
        return {name: _state(worker) for name, worker in self.workers.items()}

    def status(self) -> list[dict[str, Any]]:
        return [self._model_status(worker) for worker in self.workers.values()]

    def _model_status(self, worker: Worker) -> dict[str, Any]:
        used, there = worker.llm.cache_bytes
        rates, totals = self.settings.rates, worker.llm.totals
        tokens = totals.prompt_tokens + totals.tokens
        price = None if rates is None else rates.price_per_million_tokens(worker.busy_seconds, tokens)
        return {
            "name": worker.name,
            "parameters": worker.num_parameters,
            "max_context": worker.llm.max_context,
            "tokens_per_second": worker.tokens_per_second,
            "running": worker.running,
            "waiting": worker.waiting,
            "kv_bytes": used,
            "kv_bytes_total": there,
            "price_per_million_tokens": None if price is None else price.high,
            "currency": None if rates is None else rates.currency,
        }


def _state(worker: Worker) -> ModelState:
    used, there = worker.llm.cache_bytes
    totals = worker.llm.totals
    return ModelState(
        worker.running, worker.waiting, used / max(there, 1), num_preemptions=totals.preempted, num_drafts=totals.drafts,
        num_draft_tokens=totals.drafted, num_accepted_tokens=totals.accepted,
    )  # fmt: skip
