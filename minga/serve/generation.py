"""What every endpoint asks of a model, and what it gets: the middle between the wires and the worker.

An endpoint turns its body into a `Generation`. What the model says comes back as events, each of one choice; an endpoint's
`Writer` turns them into its own documents, one by one or, from the `Outcome`, all at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from minga.data.dialects import Tool, ToolCall
from minga.engine.sampler import SamplingParams, TokenLogprob
from minga.serve.errors import ApiError, json_bytes

DEFAULT_MAX_TOKENS = 1024


@dataclass(frozen=True)
class AnswerFormat:
    """What the text of the answer must be: "json_object", "json_schema" (value: the schema), "regex" (the pattern), "choice"
    (the strings) or "lark" (a grammar). place: the field of the request that says so.
    """

    kind: str
    value: Any = None
    place: str = field(default="response_format", compare=False)


@dataclass(frozen=True)
class Scaling:
    """Several answers, of which one is given. method: "majority" of the extracted results, "best_of" by mean log-probability,
    or "verifier". num: answers. early_stop: no more than are needed to know the winner. verifier: a pattern that a right
    answer has, with method "verifier". max_total_tokens: of all answers together.
    """

    method: str
    num: int
    early_stop: bool = True
    verifier: str | None = None
    max_total_tokens: int | None = None


@dataclass(frozen=True)
class Moderated:
    """Verdicts on input and output are wanted in the answer; what is flagged is kept back where it says so."""

    blocks_input: bool = False
    blocks_output: bool = False


@dataclass(frozen=True)
class Generation:
    """A checked request. `messages` are in the shape of OpenAI's chat: texts, tool calls with arguments as text, reasoning.

    prompt: a plain text or token ids, instead of messages. echo: the prompt belongs to the answer's text.
    tool_choice: "auto", "none", "required" or the name of a tool. thinking: None leaves it to the model's template.
    max_tokens: None takes `default_max_tokens`, or what room there is. salt: cached prompts are shared with the same salt only.
    field: what the endpoint calls the messages, for refusals.
    """

    sampling: SamplingParams
    messages: Sequence[dict[str, Any]] = ()
    prompt: str | list[int] | None = None
    max_tokens: int | None = None
    default_max_tokens: int = DEFAULT_MAX_TOKENS
    num_choices: int = 1
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    parallel_calls: bool = True
    format: AnswerFormat | None = None
    thinking: bool | None = None
    thinking_budget: int | None = None
    scaling: Scaling | None = None
    moderation: Moderated | None = None
    watermark: bool = False
    salt: str = ""
    field: str = "messages"

    def params_within(self, room: int) -> SamplingParams:
        """How to sample an answer for which the context has `room` tokens left."""
        return replace(self.sampling, max_tokens=min(self.max_tokens or self.default_max_tokens, room))


# ---------------------------------------------------------------------------------------------- what comes


@dataclass(frozen=True)
class Text:
    choice: int
    text: str
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Reasoning:
    choice: int
    text: str


@dataclass(frozen=True)
class CallStart:
    """`call` counts the calls of a choice from 0."""

    choice: int
    call: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A fragment of the JSON text."""

    choice: int
    call: int
    text: str


@dataclass(frozen=True)
class Finish:
    """The last event of a choice. reason: "stop", "length", "tool_calls" or "content_filter". stop: the stop string that ended
    it, if one did.
    """

    choice: int
    reason: str
    stop: str | None = None


Event = Text | Reasoning | CallStart | CallArguments | Finish


@dataclass
class Usage:
    """Tokens of a request, all choices together; what scaling tried and dropped counts too."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0


@dataclass
class Choice:
    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = "stop"
    logprobs: list[TokenLogprob] | None = None
    stop: str | None = None

    def events(self, index: int = 0) -> Iterator[Event]:
        """What a stream of this choice alone could have been."""
        if self.reasoning:
            yield Reasoning(index, self.reasoning)
        if self.text or self.logprobs:
            yield Text(index, self.text, self.logprobs)
        for number, call in enumerate(self.calls):
            yield CallStart(index, number, call.id, call.name)
            yield CallArguments(index, number, call.arguments)
        yield Finish(index, self.finish_reason, self.stop)


@dataclass
class Outcome:
    """A whole answer. scaling: how it was found. moderation: verdicts on input and output, in OpenAI's shape."""

    choices: list[Choice]
    usage: Usage
    scaling: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None

    def take(self, event: Event) -> None:
        """Adds an event to what is there."""
        choice = self.choices[event.choice]
        if isinstance(event, Text):
            choice.text += event.text
            if event.logprobs is not None:
                choice.logprobs = (choice.logprobs or []) + event.logprobs
        elif isinstance(event, Reasoning):
            choice.reasoning += event.text
        elif isinstance(event, CallStart):
            choice.calls.append(ToolCall(name=event.name, arguments="", id=event.id))
        elif isinstance(event, CallArguments):
            call = choice.calls[event.call]
            choice.calls[event.call] = replace(call, arguments=call.arguments + event.text)
        else:
            choice.finish_reason, choice.stop = event.reason, event.stop


class Writer(Protocol):
    """How an endpoint says it. `stream` decides whether `document` is called, or the others: `begin` once, `event` for each
    event, then `end`, or `error` where the model fails in the middle. Each gives the bytes of server-sent events.
    """

    @property
    def stream(self) -> bool: ...

    def document(self, outcome: Outcome) -> dict[str, Any]: ...

    def begin(self, usage: Usage) -> Iterable[bytes]: ...

    def event(self, event: Event) -> Iterable[bytes]: ...

    def end(self, outcome: Outcome) -> Iterable[bytes]: ...

    def error(self, error: ApiError) -> Iterable[bytes]: ...


def sse(document: Any, event: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + json_bytes(document) + b"\n\n"
