"""A generation under way: its prompt, its jobs, and the events that their tokens become.

The prompt is rendered and the grammar compiled in a thread of their own, beside the model's. The first choice is asked for
alone: once it speaks, its prompt lies in the cache, and the others only read the end of it. Each choice has a parser, which
tells text, reasoning and calls apart, and where a guard watches, a `StreamGuard` that lets nothing unsafe out.
"""

from __future__ import annotations

import asyncio
import json
import re
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


def render(generation: Generation, worker: Worker) -> tuple[list[int], bool]:
    """The prompt's tokens, and whether it ends in the middle of thoughts. Raises `ApiError` for what cannot be rendered."""
    llm, dialect, use = worker.llm, worker.dialect, generation.tool_use
    refuse_endless(_texts(generation), worker, generation.field)
    try:
        if generation.prompt is not None:
            ids = llm.encode(generation.prompt) if isinstance(generation.prompt, str) else generation.prompt
            if any(token >= llm.config.vocab_size for token in ids):
                raise invalid(generation.field, f"{worker.name} has {llm.config.vocab_size} tokens")
            return ids, False
        tools = () if use is None else use.tools
        ids = dialects.render_prompt(
            llm.tokenizer, generation.messages, tools=tools, thinking=generation.thinking, dialect=dialect
        )
        return ids, dialects.opens_thinking(llm.tokenizer, ids, dialect)
    except UserError as error:
        raise ApiError(str(error), param=generation.field, code="invalid_value") from None


def prepare(generation: Generation, worker: Worker, most_tokens: int | None = None) -> Prompt:
    """Renders the prompt and compiles the grammar. Raises `ApiError` for what cannot be answered."""
    vocab_size = worker.llm.config.vocab_size
    for token in generation.sampling.logit_bias:
        if token >= vocab_size:
            raise invalid(f"logit_bias.{token}", f"{worker.name} has {vocab_size} tokens")
    ids, is_thinking = render(generation, worker)
    params = _within_context(generation, len(ids), worker)
    if most_tokens is not None:
        params = replace(params, max_tokens=min(params.max_tokens, most_tokens))
    params = replace(params, thinking=_thinking(generation, worker, is_thinking))
    try:
        params = replace(params, grammar=_grammar(generation, worker))
        if params.grammar is not None:
            worker.llm.check_grammar(params.grammar)
    except UserError as error:
        field = "tools" if generation.format is None else generation.format.place
        raise ApiError(str(error), param=field, code="invalid_schema") from None
    return Prompt(ids, params, is_thinking)


def _texts(generation: Generation) -> list[str]:
    """Those that will surely be read; templates leave out earlier thoughts."""
    if generation.prompt is not None:
        return [generation.prompt] if isinstance(generation.prompt, str) else []
    calls = [call["function"] for message in generation.messages for call in message.get("tool_calls") or ()]
    tools = () if generation.tool_use is None else generation.tool_use.tools
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


def _thinking(generation: Generation, worker: Worker, is_open: bool) -> Thinking | None:
    if generation.prompt is not None:
        return None
    tokenizer, marks = worker.llm.tokenizer, (worker.dialect.think, worker.dialect.end_think)
    start, end = (tuple(tokenizer.encode(mark.strip(), specials=True)) for mark in marks)
    # a model that is told not to think may begin all the same: its thoughts are over at once
    budget = 0 if generation.thinking is False else generation.thinking_budget
    return Thinking(start, end, is_open, budget, triggers_end=bool(worker.dialect.separator))


_ANSWER_GRAMMARS: dict[str, Callable[[Any], str]] = {
    "json_object": dialects.json_grammar,
    "json_schema": dialects.json_grammar,
    "regex": dialects.regex_grammar,
    "choice": dialects.choice_grammar,
    "lark": str,
}


def _grammar(generation: Generation, worker: Worker) -> Grammar | None:
    """Of calls, of the answer's format, or of either; where a call must come, nothing else does."""
    use = generation.tool_use
    answer = None if use is not None and use.required else generation.format
    lark = None if answer is None else _ANSWER_GRAMMARS[answer.kind](answer.value)
    if use is None:
        return None if lark is None else Grammar(lark)
    # of calls alone: what may come before them, thoughts and text, is the guide's, or the format's
    choice = "required" if use.required or lark is not None else "auto"
    calls = dialects.call_grammar(
        worker.dialect, use.callable, choice=choice, parallel=use.parallel, tokenizer=worker.llm.tokenizer
    )
    return Grammar(calls.lark, calls.triggers) if lark is None else Grammar(_either(calls.lark, lark))


def _either(one: str, other: str) -> str:
    """A grammar of two, whose rules have other names but for the first."""
    first, second = (
        re.sub(r"^start:", f"{name}:", lark, flags=re.MULTILINE) for name, lark in (("a", one), ("b", other))
    )
    return f"start: a | b\n{first}\n{second}"


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
        self.guard = guard if blocks or generation.moderation is not None else None  # None: nothing is to be judged
        self._blocks_input, self.blocks_output = blocks or wanted.blocks_input, blocks or wanted.blocks_output
        self._watermark = watermark if generation.watermark else None
        self._jobs: list[Job] = []
        self._speakers: list[_Speaker] = []
        self._news: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()
        self._failure: ApiError | None = None
        self._num_over = 0
        self.outcome = Outcome([Choice() for _ in range(generation.num_answers)], Usage())
        scaling = generation.scaling
        self._num_jobs = generation.num_answers if scaling is None else scaling.num
        self._trial: Trial | None = None
        if scaling is not None:
            self._trial = Trial(scaling, [Candidate(Outcome([Choice()], Usage())) for _ in range(scaling.num)])
        self.asked = monotonic()
        self._prompts: list[Prompt] = []
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.pauses: list[float] = []  # seconds between what came and what came next, of all choices
        self.num_malformed_calls = 0

    @property
    def began(self) -> float | None:
        """When the model took it."""
        return self._jobs[0].began if self._jobs else None

    @property
    def num_made_tokens(self) -> int:
        """Of the answers, told or not: what is metered where a client has left."""
        return sum(job.num_made_tokens for job in self._jobs)

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

    async def start(self) -> None:
        """Prepares and queues it. Raises `ApiError` if it is refused."""
        if self.generation.watermark and self._watermark is None:
            raise invalid("watermark", "this server has no secret to mark with; start it with --watermark")
        if self.generation.moderation is not None and self.guard is None:
            raise invalid("moderation", "this server has no guard; start it without `--guard none`")
        self.worker.refuse_if_full(self.tenant)
        self._prompts = await asyncio.to_thread(self._prepare)
        self.outcome.usage.prompt = sum(len(prompt.ids) for prompt in self._prompts)
        self.worker.refuse_if_full(self.tenant)  # others may have come meanwhile
        self._ask()

    async def batches(self, patience: float | None = None) -> AsyncIterator[list[Event]]:
        """What the model says, as much at once as has come; nothing where nothing came for `patience` seconds.

        Raises `ApiError` if it fails.
        """
        while self._num_over < self._num_jobs:
            events: list[Event] = []
            failure: ApiError | None = None
            for index, item in await self._all_news(patience):
                try:
                    found = await self._events_of(index, item)
                except ApiError as error:  # told after what was said before it
                    failure = error
                    break
                if self._trial is None:
                    events += found
                else:
                    self._try(self._trial, index, found, item)
            if failure is not None and not events:
                raise failure
            if self._trial is not None and (self._trial.decided or self._num_over == self._num_jobs):
                self.cancel()
                self.outcome.scaling = self._trial.document()
                events = await self._chosen(self._trial.winner())
            for event in events:
                self.outcome.take(event)
            yield events
            if failure is not None:
                raise failure
            if self.outcome.scaling is not None:
                break
        if self.guard is not None:
            await asyncio.to_thread(self._judge_output, self.guard)

    async def _chosen(self, winner: Candidate) -> list[Event]:
        """What is told of the answer that was chosen; its end too, where the tokens were spent before it came."""
        assert self._trial is not None
        if winner.finished:
            return winner.events
        speaker = self._speakers[self._trial.candidates.index(winner)]
        return [*winner.events, *await asyncio.to_thread(lambda: list(speaker.cut()))]

    def _try(self, trial: Trial, index: int, events: list[Event], item: Delta | BaseException | None) -> None:
        """Events of one of several answers, none of which is told yet."""
        candidate, job = trial.candidates[index], self._jobs[index]
        candidate.events += events
        for event in events:
            candidate.outcome.take(event)
        if isinstance(item, Delta):
            candidate.take([token.logprob for token in item.logprobs or []], len(item.token_ids))
            if trial.hopeless(candidate):
                job.cancel()
        elif not job.cancelled.is_set():
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

    async def _events_of(self, index: int, item: Delta | BaseException | None) -> list[Event]:
        if self._failure is not None:
            raise self._failure
        if isinstance(item, BaseException):
            raise refusal_of(item, self.generation.field)
        if self.first_token is None:
            self._note_first()
        speaker, job = self._speakers[index], self._jobs[index]
        if item is None:
            self._num_over += 1
            self.outcome.usage.reasoning += job.num_reasoning_tokens
            if (
                index and index % self.generation.num_choices == 0 and self._trial is None
            ):  # of another prompt, the first
                self.outcome.usage.cached += job.num_cached_tokens
        else:
            self._note_tokens(len(item.token_ids))
        if not speaker.is_guarded:
            return list(speaker.hear(item))
        events = await asyncio.to_thread(lambda: list(speaker.hear(item)))  # a guard may be a model
        if speaker.verdict is not None:
            job.cancel()
        return events

    def _note_tokens(self, num_tokens: int) -> None:
        now = monotonic()
        if self.last_token is not None:
            self.pauses.append(now - self.last_token)
        self.last_token = now
        self.outcome.usage.completion += num_tokens

    # ------------------------------------------------------------------ moderation

    def _prepare(self) -> list[Prompt]:
        one = replace(self.generation, more_prompts=())
        prompts = [prepare(one, self.worker, self._most_tokens)]
        for prompt in self.generation.more_prompts:
            prompts.append(prepare(replace(one, prompt=prompt), self.worker, self._most_tokens))
        if self.guard is not None:  # after the lengths: a guard reads all of a text
            self._judge_input(self.guard)
        return prompts

    def _judge_input(self, guard: Guard) -> None:
        """Raises `ApiError` for what may not be asked."""
        verdict = judge(guard, _said_by_user(self.generation, self.worker.llm))
        if verdict.flagged and self._blocks_input:
            flagged = ", ".join(name for name, is_flagged in verdict.categories.items() if is_flagged)
            message = f"the input was flagged by {guard.name} ({flagged}); ask for something else"
            raise ApiError(message, param=self.generation.field, code="content_filter")
        if self.generation.moderation is not None:
            self.outcome.moderation = {"input": moderation_document(guard, [verdict])}

    def _judge_output(self, guard: Guard) -> None:
        if self.outcome.moderation is None:
            return
        choices = self.outcome.choices
        kept_back = [speaker.verdict for speaker in self._speakers] if self._trial is None else [None]
        verdicts = [verdict or judge(guard, choice.text) for verdict, choice in zip(kept_back, choices, strict=True)]
        self.outcome.moderation["output"] = moderation_document(guard, verdicts)

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
        index, scaling = len(self._jobs), self.generation.scaling
        number = index if scaling is not None else index % self.generation.num_choices  # of the prompt's answers
        prompt = self._prompts[0 if scaling is not None else index // self.generation.num_choices]
        params = replace(prompt.params, watermark=self._watermark)
        if scaling is not None and scaling.method == "best_of":
            params = replace(params, logprobs=params.logprobs or 0)
        if number > 0 and params.seed is not None:  # each its own draws; the seed gives the same ones again
            params = replace(params, seed=(params.seed + number) % MAX_SEED)
        job = Job(
            prompt.ids,
            params,
            lambda item: self._news.put_nowait((index, item)),
            self.tenant,
            self.generation.salt,
        )
        self._jobs.append(job)
        self._speakers.append(_Speaker(index if self._trial is None else 0, self, prompt.is_thinking))
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
        use = generation.tool_use
        names = [] if use is None else [tool.name for tool in use.callable]
        self._index, self._tokenizer, self._markers = index, worker.llm.tokenizer, worker.markers
        self._answering = answering
        self._parser = dialects.StreamParser(worker.dialect, tools=names, thinking=is_thinking)
        self._plain = generation.prompt is not None
        self._logprobs: list[TokenLogprob] | None = None if generation.sampling.logprobs is None else []
        self._reason = "stop"
        self._stop: str | None = None
        self._num_calls = 0
        # What is said goes through a gate of its own for each stretch of text, of thoughts, and of arguments.
        self._guard = answering.guard if answering.blocks_output else None
        self._gate: StreamGuard | None = None
        self._told_as: Callable[[str], Event] = self._text
        self._stretch: tuple[str, int] | None = None

    @property
    def verdict(self) -> Verdict | None:
        """Of the guard that has kept something back."""
        return None if self._gate is None else self._gate.blocked

    @property
    def is_guarded(self) -> bool:
        return self._guard is not None

    def hear(self, item: Delta | None) -> Iterator[Event]:
        """What is new, or the end: None."""
        return self._close() if item is None else self._say(item)

    def _say(self, delta: Delta) -> Iterator[Event]:
        if self.verdict is not None:
            return
        if delta.finish_reason is not None:
            self._reason, self._stop = delta.finish_reason, delta.stop
        if self._logprobs is not None:
            self._logprobs += delta.logprobs or []
        for piece, control in self._tokenizer.split_marks(delta.text, self._markers):
            if self._plain:
                yield from self._speak(("text", 0), self._text, "" if control else piece)
                continue
            for event in self._parser.push(piece, control):
                yield from self._told(event)

    def _close(self) -> Iterator[Event]:
        for event in () if self._plain else self._parser.close():
            yield from self._told(event)
        yield from self._let_through()
        if self.verdict is None and self._logprobs:  # of tokens that gave no text, or were kept back with it
            yield Text(self._index, "", self._logprobs)
        self._answering.num_malformed_calls += self._parser.malformed
        yield Finish(self._index, self._finish_reason(), self._stop)

    def cut(self) -> Iterator[Event]:
        """The end of an answer that does not go on."""
        self._reason = "length"
        return self._close()

    def _finish_reason(self) -> str:
        if self.verdict is not None:
            return "content_filter"
        return "tool_calls" if self._num_calls and self._reason == "stop" else self._reason

    def _told(self, event: dialects.Event) -> Iterator[Event]:
        if isinstance(event, dialects.Text):
            yield from self._speak(("text", 0), self._text, event.text)
        elif isinstance(event, dialects.Reasoning):
            yield from self._speak(("thought", 0), lambda text: Reasoning(self._index, text), event.text)
        elif isinstance(event, dialects.CallArguments):
            number = event.index
            yield from self._speak(("call", number), lambda text: CallArguments(self._index, number, text), event.text)
        elif isinstance(event, dialects.CallStart):
            yield from self._let_through()
            if self.verdict is None:
                self._num_calls += 1
                yield CallStart(self._index, event.index, f"call_{secrets.token_hex(12)}", event.name)

    def _speak(self, stretch: tuple[str, int], told_as: Callable[[str], Event], text: str) -> Iterator[Event]:
        if self._guard is None:
            if text or self._logprobs:
                yield told_as(text)
            return
        if stretch != self._stretch:
            yield from self._let_through()
        if self.verdict is None:
            if self._gate is None:
                self._gate, self._stretch, self._told_as = StreamGuard(self._guard), stretch, told_as
            if shown := self._gate.push(text):
                yield told_as(shown)

    def _let_through(self) -> Iterator[Event]:
        """The end of a stretch: the rest of it, if it passes."""
        if self._gate is not None and self._gate.blocked is None:
            rest = self._gate.close()
            if self._gate.blocked is None:
                self._gate = self._stretch = None
            if rest:
                yield self._told_as(rest)

    def _text(self, text: str) -> Text:
        """With the log-probabilities so far; where a guard keeps text back they come at the end, for they spell it out."""
        if self._guard is not None:
            return Text(self._index, text)
        logprobs, self._logprobs = self._logprobs, None if self._logprobs is None else []
        return Text(self._index, text, logprobs)


def _said_by_user(generation: Generation, llm: LLM) -> str:
    """What came from outside: users and tools."""
    if generation.prompt is not None:
        prompts = [generation.prompt, *generation.more_prompts]
        return "\n".join(each if isinstance(each, str) else llm.tokenizer.decode(each) for each in prompts)
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
