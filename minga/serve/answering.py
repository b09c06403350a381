"""A generation under way: its prompt, its jobs, and the events that their tokens become.

The prompt is rendered and the grammar compiled in a thread of their own, beside the model's. The first choice is asked for
alone: once it speaks, its prompt lies in the cache, and the others only read the end of it. Each choice has a parser, which
tells text, reasoning and calls apart, and where a guard watches, a `StreamGuard` that lets nothing unsafe out.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, Any

from minga.data import dialects
from minga.engine.grammar import Grammar, Thinking
from minga.engine.sampler import MAX_SEED, SamplingParams, TokenLogprob
from minga.engine.sequence import Delta
from minga.errors import UserError
from minga.serve.errors import ApiError
from minga.serve.generation import (
    CallArguments,
    CallStart,
    Choice,
    Event,
    Finish,
    Generation,
    Moderated,
    Outcome,
    Reasoning,
    Text,
    Usage,
)
from minga.serve.moderation import Guard, StreamGuard, Verdict, judge
from minga.serve.scaling import Candidate, Trial
from minga.serve.schema import invalid
from minga.serve.worker import Job, Worker, refusal_of

if TYPE_CHECKING:
    from minga.engine.llm import LLM


_USUAL_CHARACTERS = 4  # of a token
_PIECE, _SLACK = 1 << 15, 1024  # characters read at once; tokens by which a count in pieces may be wrong


@dataclass(frozen=True)
class Prompt:
    """What the model is given."""

    ids: list[int]
    params: SamplingParams
    is_thinking: bool  # the answer begins in the middle of thoughts


def prepare(generation: Generation, worker: Worker, most_tokens: int | None = None) -> Prompt:
    """Renders the prompt and compiles the grammar. Raises `ApiError` for what cannot be answered."""
    llm, dialect = worker.llm, worker.dialect
    for token in generation.sampling.logit_bias:
        if token >= llm.config.vocab_size:
            raise invalid(f"logit_bias.{token}", f"{worker.name} has {llm.config.vocab_size} tokens")
    refuse_endless(_texts(generation), worker, generation.field)
    try:
        if generation.prompt is None:
            tools = () if generation.tool_choice == "none" else generation.tools
            ids = dialects.render_prompt(
                llm.tokenizer, generation.messages, tools=tools, thinking=generation.thinking, dialect=dialect
            )
            is_open = dialects.opens_thinking(llm.tokenizer, ids, dialect)
        else:
            ids = llm.encode(generation.prompt) if isinstance(generation.prompt, str) else generation.prompt
            is_open = False
            if any(token >= llm.config.vocab_size for token in ids):
                raise invalid(generation.field, f"{worker.name} has {llm.config.vocab_size} tokens")
    except UserError as error:
        raise ApiError(str(error), param=generation.field, code="invalid_value") from None
    params = _within_context(generation, len(ids), worker)
    if most_tokens is not None:
        params = replace(params, max_tokens=min(params.max_tokens, most_tokens))
    params = replace(params, thinking=_thinking(generation, llm, dialect, is_open))
    try:
        params = replace(params, grammar=_grammar(generation, llm, dialect))
        if params.grammar is not None:
            llm.check_grammar(params.grammar)
    except UserError as error:
        field = "tools" if generation.format is None else generation.format.place
        raise ApiError(str(error), param=field, code="invalid_schema") from None
    return Prompt(ids, params, is_open)


def _texts(generation: Generation) -> list[str]:
    """Those that will surely be read; templates leave out earlier thoughts."""
    if generation.prompt is not None:
        return [generation.prompt] if isinstance(generation.prompt, str) else []
    calls = [call["function"] for message in generation.messages for call in message.get("tool_calls") or ()]
    tools = () if generation.tool_choice == "none" else generation.tools
    return [
        *(message["content"] or "" for message in generation.messages),
        *(call["arguments"] for call in calls),
        *(tool.description for tool in tools),
        *(json.dumps(tool.parameters) for tool in tools),
    ]


def refuse_endless(texts: Sequence[str], worker: Worker, field: str) -> None:
    """Raises `ApiError` for texts that cannot fit the context: to read megabytes to their end would only cost time.

    They are read in pieces, between which other threads run. Cut in pieces, a text has hardly fewer tokens than whole.
    """
    context, num_tokens = worker.llm.max_context, 0
    if sum(map(len, texts)) <= _USUAL_CHARACTERS * context:
        return
    for text in texts:
        for start in range(0, len(text), _PIECE):
            num_tokens += len(worker.llm.tokenizer.encode(text[start : start + _PIECE]))
            if num_tokens > context + _SLACK:
                raise ApiError(
                    f"the prompt has more than {context} tokens, the context of {worker.name}; shorten it",
                    param=field, code="context_length_exceeded",
                )  # fmt: skip


def _within_context(generation: Generation, num_prompt_tokens: int, worker: Worker) -> SamplingParams:
    """Nothing is cut off silently: what does not fit is refused, with the numbers."""
    room, context = worker.llm.max_context - num_prompt_tokens, worker.llm.max_context
    wanted = generation.max_tokens
    if room < 1 or (wanted or 0) > room:
        asked = "which must hold the answer too" if wanted is None else f"and {wanted} tokens of answer are asked for"
        advice = "shorten the prompt" if room < 1 or wanted is None else f"shorten it, or ask for {room} tokens at most"
        raise ApiError(
            f"the prompt has {num_prompt_tokens} tokens, the context of {worker.name} {context}, {asked}; {advice}",
            param=generation.field, code="context_length_exceeded",
        )  # fmt: skip
    return generation.params_within(room)


def _thinking(generation: Generation, llm: LLM, dialect: dialects.Dialect, is_open: bool) -> Thinking | None:
    if generation.prompt is not None:
        return None
    start, end = (
        tuple(llm.tokenizer.encode(mark.strip(), specials=True)) for mark in (dialect.think, dialect.end_think)
    )
    return Thinking(start, end, is_open, generation.thinking_budget)


def _grammar(generation: Generation, llm: LLM, dialect: dialects.Dialect) -> Grammar | None:
    answer = generation.format
    if answer is not None:
        makers: dict[str, Callable[[Any], str]] = {
            "json_object": dialects.json_grammar,
            "json_schema": dialects.json_grammar,
            "regex": dialects.regex_grammar,
            "choice": dialects.choice_grammar,
            "lark": str,
        }
        return Grammar(makers[answer.kind](answer.value))
    if generation.tool_choice == "none" or not generation.tools:
        return None
    found = dialects.call_grammar(
        dialect, generation.tools, choice=generation.tool_choice, parallel=generation.parallel_calls,
        tokenizer=llm.tokenizer,
    )  # fmt: skip  # thoughts are the guide's
    return Grammar(found.lark, found.triggers)


class Answering:
    """`start`, then `events` to their end, then `outcome`; `cancel` at any time. All on the event loop."""

    def __init__(
        self,
        generation: Generation,
        worker: Worker,
        *,
        tenant: str = "",
        guard: Guard | None = None,
        blocks: bool = False,
        watermark: int | None = None,
        most_tokens: int | None = None,
    ):
        """guard: judges input and output where the generation asks for it, and keeps back what is flagged where it asks for
        that, or always (blocks). watermark: the secret to mark with. most_tokens: of an answer, whose length is not asked for.
        """
        self.generation, self.worker, self.tenant = generation, worker, tenant
        self._most_tokens = most_tokens
        wanted = generation.moderation or Moderated()
        self._guard = guard if blocks or generation.moderation is not None else None
        self._blocks_input, self.blocks_output = blocks or wanted.blocks_input, blocks or wanted.blocks_output
        self._watermark = watermark if generation.watermark else None
        self._jobs: list[Job] = []
        self._speakers: list[_Speaker] = []
        self._news: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()
        self._failure: ApiError | None = None
        self._num_over = 0
        self.outcome = Outcome([Choice() for _ in range(generation.num_choices)], Usage())
        scaling = generation.scaling
        self._num_jobs = generation.num_choices if scaling is None else scaling.num
        self._trial: Trial | None = None
        if scaling is not None:
            self._trial = Trial(scaling, [Candidate(Outcome([Choice()], Usage())) for _ in range(scaling.num)])
        self.asked = monotonic()
        self.prompt: Prompt | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.pauses: list[float] = []  # seconds between what came and what came next, of all choices
        self.num_malformed_calls = 0

    @property
    def began(self) -> float | None:
        """When the model took it."""
        return self._jobs[0].began if self._jobs else None

    @property
    def busy_seconds(self) -> float:
        """Of the model's time."""
        return sum(job.busy_seconds for job in self._jobs)

    @property
    def watermarked(self) -> bool:
        return self._watermark is not None

    @property
    def was_blocked(self) -> bool:
        return any(choice.finish_reason == "content_filter" for choice in self.outcome.choices)

    @property
    def guard(self) -> Guard | None:
        """None where nothing is to be judged."""
        return self._guard

    async def start(self) -> None:
        """Prepares and queues it. Raises `ApiError` if it is refused."""
        if self.generation.watermark and self._watermark is None:
            raise invalid("watermark", "this server has no secret to mark with; start it with --watermark")
        self.worker.refuse_if_full()
        self.prompt = await asyncio.to_thread(prepare, self.generation, self.worker, self._most_tokens)
        await asyncio.to_thread(self._judge_input)
        self.outcome.usage.prompt = len(self.prompt.ids)
        self._ask()

    async def batches(self, patience: float | None = None) -> AsyncIterator[list[Event]]:
        """What the model says, as much at once as has come; nothing where nothing came for `patience` seconds.

        Raises `ApiError` if it fails.
        """
        while self._num_over < self._num_jobs:
            events: list[Event] = []
            for index, item in await self._all_news(patience):
                found = self._events_of(index, item)
                if self._trial is None:
                    events += found
                else:
                    self._try(self._trial.candidates[index], [*found], item)
            if self._trial is not None and (self._trial.decided or self._num_over == self._num_jobs):
                self.cancel()
                self.outcome.scaling = self._trial.document()
                events = self._trial.winner().events
            for event in events:
                self.outcome.take(event)
            yield events
            if self.outcome.scaling is not None:
                break
        await asyncio.to_thread(self._judge_output)

    def _try(self, candidate: Candidate, events: list[Event], item: Delta | BaseException | None) -> None:
        """Events of one of several answers, none of which is told yet."""
        assert self._trial is not None
        candidate.events += events
        for event in events:
            candidate.outcome.take(event)
        if isinstance(item, Delta):
            candidate.take([token.logprob for token in item.logprobs or []], len(item.token_ids))
            if self._trial.hopeless(candidate):
                self._jobs[self._trial.candidates.index(candidate)].cancel()
        elif not self._jobs[self._trial.candidates.index(candidate)].cancelled.is_set():
            candidate.finished = True

    async def _all_news(self, patience: float | None) -> list[tuple[int, Delta | BaseException | None]]:
        try:
            if self._news.empty():
                async with asyncio.timeout(patience):
                    news = [await self._news.get()]
            else:
                news = []
        except TimeoutError:
            return []
        while not self._news.empty():
            news.append(self._news.get_nowait())
        return news

    def _events_of(self, index: int, item: Delta | BaseException | None) -> Iterator[Event]:
        if self._failure is not None:
            raise self._failure
        if isinstance(item, BaseException):
            raise refusal_of(item, self.generation.field)
        if self.first_token is None:
            self._note_first()
        speaker = self._speakers[index]
        if item is None:
            self._num_over += 1
            self.outcome.usage.reasoning += self._jobs[index].num_reasoning_tokens
            yield from speaker.close()
            return
        now = monotonic()
        if self.last_token is not None:
            self.pauses.append(now - self.last_token)
        self.last_token = now
        self.outcome.usage.completion += len(item.token_ids)
        yield from speaker.say(item)
        if speaker.is_blocked:
            self._jobs[index].cancel()

    # ------------------------------------------------------------------ moderation

    def _judge_input(self) -> None:
        """Raises `ApiError` for what may not be asked."""
        if self._guard is None:
            return
        verdict = judge(self._guard, _said_by_user(self.generation, self.worker.llm))
        if verdict.flagged and self._blocks_input:
            flagged = ", ".join(name for name, is_flagged in verdict.categories.items() if is_flagged)
            message = f"the input was flagged by {self._guard.name} ({flagged}); ask for something else"
            raise ApiError(message, param=self.generation.field, code="content_filter")
        if self.generation.moderation is not None:
            self.outcome.moderation = {"input": moderation_document(self._guard, [verdict])}

    def _judge_output(self) -> None:
        if self._guard is not None and self.outcome.moderation is not None:
            verdicts = [
                speaker.verdict or judge(self._guard, choice.text)
                for speaker, choice in zip(self._speakers, self.outcome.choices, strict=True)
            ]
            self.outcome.moderation["output"] = moderation_document(self._guard, verdicts)

    def cancel(self) -> None:
        for job in self._jobs:
            job.cancel()

    def abort(self, error: ApiError) -> None:
        """Cancels, and raises `error` in whoever reads the events."""
        self._failure = error
        self.cancel()
        self._news.put_nowait((0, None))

    # ------------------------------------------------------------------ the jobs

    def _ask(self) -> None:
        """One more choice."""
        assert self.prompt is not None
        index, params = len(self._jobs), replace(self.prompt.params, watermark=self._watermark)
        if (
            self._trial is not None
            and self.generation.scaling is not None
            and self.generation.scaling.method == "best_of"
        ):
            params = replace(params, logprobs=params.logprobs or 0)
        if index > 0 and params.seed is not None:  # each its own draws; the seed gives the same ones again
            params = replace(params, seed=(params.seed + index) % MAX_SEED)
        job = Job(
            self.prompt.ids,
            params,
            lambda item: self._news.put_nowait((index, item)),
            self.tenant,
            self.generation.salt,
        )
        self._jobs.append(job)
        self._speakers.append(_Speaker(index if self._trial is None else 0, self, self.prompt.is_thinking))
        self.worker.submit(job)

    def _note_first(self) -> None:
        """The prompt lies in the cache now."""
        self.first_token = monotonic()
        self.outcome.usage.cached = self._jobs[0].num_cached_tokens
        for _ in range(1, self._num_jobs):
            self._ask()


class _Speaker:
    """One choice: deltas become events."""

    def __init__(self, index: int, answering: Answering, is_thinking: bool):
        generation, worker = answering.generation, answering.worker
        names = [] if generation.tool_choice == "none" else [tool.name for tool in generation.tools]
        self._index, self._tokenizer = index, worker.llm.tokenizer
        self._answering = answering
        self._parser = dialects.StreamParser(worker.dialect, tools=names, thinking=is_thinking)
        self._plain = generation.prompt is not None
        self._logprobs: list[TokenLogprob] | None = None if generation.sampling.logprobs is None else []
        self._reason = "stop"
        self._stop: str | None = None
        self._num_calls = 0
        guard = answering.guard if answering.blocks_output else None
        self._text_guard, self._thought_guard = (None if guard is None else StreamGuard(guard) for _ in range(2))

    @property
    def verdict(self) -> Verdict | None:
        """Of the guard that has kept something back."""
        guards = (self._text_guard, self._thought_guard)
        return next((guard.blocked for guard in guards if guard is not None and guard.blocked is not None), None)

    @property
    def is_blocked(self) -> bool:
        return self.verdict is not None

    def say(self, delta: Delta) -> Iterator[Event]:
        if self.is_blocked:
            return
        if delta.finish_reason is not None:
            self._reason, self._stop = delta.finish_reason, delta.stop
        if self._logprobs is not None:
            self._logprobs += delta.logprobs or []
        for piece, control in self._tokenizer.split_marks(delta.text):
            if self._plain:
                yield from self._text("" if control else piece)
                continue
            for event in self._parser.push(piece, control):
                yield from self._told(event)

    def close(self) -> Iterator[Event]:
        for event in () if self._plain else self._parser.close():
            yield from self._told(event)
        if self._thought_guard is not None and (rest := self._thought_guard.close()):
            yield Reasoning(self._index, rest)
        rest = "" if self._text_guard is None else self._text_guard.close()
        if not self.is_blocked and (rest or self._logprobs):  # logprobs of tokens that gave no text
            yield self._released(rest)
        self._answering.num_malformed_calls += self._parser.malformed
        yield Finish(self._index, self._finish_reason(), self._stop)

    def _finish_reason(self) -> str:
        if self.is_blocked:
            return "content_filter"
        return "tool_calls" if self._num_calls and self._reason == "stop" else self._reason

    def _told(self, event: dialects.Event) -> Iterator[Event]:
        if self.is_blocked:
            return
        if isinstance(event, dialects.Text):
            yield from self._text(event.text)
        elif isinstance(event, dialects.Reasoning):
            if thought := event.text if self._thought_guard is None else self._thought_guard.push(event.text):
                yield Reasoning(self._index, thought)
        elif isinstance(event, dialects.CallStart):
            self._num_calls += 1
            yield CallStart(self._index, event.index, f"call_{secrets.token_hex(12)}", event.name)
        elif isinstance(event, dialects.CallArguments):
            yield CallArguments(self._index, event.index, event.text)

    def _text(self, text: str) -> Iterator[Event]:
        shown = text if self._text_guard is None else self._text_guard.push(text)
        if shown or (self._logprobs and not self.is_blocked):
            yield self._released(shown)

    def _released(self, text: str) -> Text:
        logprobs, self._logprobs = self._logprobs, None if self._logprobs is None else []
        return Text(self._index, text, logprobs)


def _said_by_user(generation: Generation, llm: LLM) -> str:
    """What came from outside: users and tools."""
    if generation.prompt is not None:
        return generation.prompt if isinstance(generation.prompt, str) else llm.tokenizer.decode(generation.prompt)
    return "\n".join(message["content"] or "" for message in generation.messages if message["role"] in ("user", "tool"))


def moderation_document(guard: Guard, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """OpenAI's shape of verdicts that come with an answer."""
    results = [{"type": "moderation_result", "model": guard.name, **verdict_document(verdict)} for verdict in verdicts]
    return {"type": "moderation_results", "model": guard.name, "results": results}


def verdict_document(verdict: Verdict) -> dict[str, Any]:
    return {
        "flagged": verdict.flagged,
        "categories": verdict.categories,
        "category_scores": verdict.scores,
        "category_applied_input_types": {name: ["text"] for name in verdict.categories},
    }
