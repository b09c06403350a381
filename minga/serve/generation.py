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
class ToolUse:
    """The tools that the model is told of, and those of them that it may call. required: it calls one, and says nothing else.
    parallel: it may call several.
    """

    tools: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    required: bool = False
    parallel: bool = True


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

    prompt: a plain text or token ids, instead of messages; more_prompts: others, each with its own choices behind the first's.
    thinking: None leaves it to the model's template.
    max_tokens: None takes `default_max_tokens`, or what room there is. salt: cached prompts are shared with the same salt only.
    field: what the endpoint calls the messages, for refusals.
    """

    sampling: SamplingParams
    messages: Sequence[dict[str, Any]] = ()
    prompt: str | list[int] | None = None
    more_prompts: tuple[str | list[int], ...] = ()
    max_tokens: int | None = None
    default_max_tokens: int = DEFAULT_MAX_TOKENS
    num_choices: int = 1
    tool_use: ToolUse | None = None
    format: AnswerFormat | None = None
    thinking: bool | None = None
    thinking_budget: int | None = None
    scaling: Scaling | None = None
    moderation: Moderated | None = None
    watermark: bool = False
    salt: str = ""
    field: str = "messages"

    @property
    def num_answers(self) -> int:
        return self.num_choices * (1 + len(self.more_prompts))

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


class Choice:
    """One answer, in the order in which its parts came."""

    def __init__(self) -> None:
        self.finish_reason = "stop"
        self.stop: str | None = None  # the stop string that ended it
        self._parts: list[Text | Reasoning | CallStart | CallArguments] = []  # neighbours of a kind are one

    def take(self, event: Event) -> None:
        """Adds an event to what is there."""
        last = self._parts[-1] if self._parts else None
        if isinstance(event, Finish):
            self.finish_reason, self.stop = event.reason, event.stop
        elif isinstance(event, Text) and isinstance(last, Text):
            logprobs = None if event.logprobs is None else [*(last.logprobs or []), *event.logprobs]
            self._parts[-1] = replace(last, text=last.text + event.text, logprobs=logprobs)
        elif isinstance(event, (Reasoning, CallArguments)) and isinstance(last, type(event)):
            self._parts[-1] = replace(last, text=last.text + event.text)
        else:
            self._parts.append(event)

    @property
    def text(self) -> str:
        return "".join(part.text for part in self._parts if isinstance(part, Text))

    @property
    def reasoning(self) -> str:
        return "".join(part.text for part in self._parts if isinstance(part, Reasoning))

    @property
    def calls(self) -> list[ToolCall]:
        arguments: dict[int, str] = {}
        for part in self._parts:
            if isinstance(part, CallArguments):
                arguments[part.call] = arguments.get(part.call, "") + part.text
        starts = [part for part in self._parts if isinstance(part, CallStart)]
        return [ToolCall(name=start.name, arguments=arguments.get(start.call, ""), id=start.id) for start in starts]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [logprob for part in self._parts if isinstance(part, Text) for logprob in part.logprobs or []]

    def events(self) -> Iterator[Event]:
        """The shortest stream that this answer could have been."""
        yield from self._parts
        yield Finish(self._parts[0].choice if self._parts else 0, self.finish_reason, self.stop)


@dataclass
class Outcome:
    """A whole answer. scaling: how it was found. moderation: verdicts on input and output, in OpenAI's shape."""

    choices: list[Choice]
    usage: Usage
    scaling: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None

    def take(self, event: Event) -> None:
        self.choices[event.choice].take(event)


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
