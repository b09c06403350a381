"""POST /v1/chat/completions: OpenAI's chat."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field

from minga.engine.sampler import TokenLogprob
from minga.serve.common import (
    MAX_CHOICES,
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    AllowedToolsChoice,
    Effort,
    ModerationFields,
    NamedTool,
    ResponseFormat,
    SamplingFields,
    ScalingFields,
    StructuredOutputs,
    ToolChoice,
    Tools,
    answer_format,
    checked_tools,
    moderated,
    scaling_of,
    thinks,
    tool_use,
)
from minga.serve.errors import ApiError
from minga.serve.generation import (
    CallArguments,
    CallStart,
    Choice,
    Event,
    Finish,
    Generation,
    Outcome,
    Reasoning,
    Text,
    Usage,
    sse,
)
from minga.serve.schema import Body, Ignored, Unsupported, few, invalid, needs

if TYPE_CHECKING:
    from minga.data.tokenizer import Tokenizer

_MIN_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot say


class TextPart(Body):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Ignored = None


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str


Content = str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Body):
    name: str
    arguments: str
    parsed_arguments: Ignored = None


class Called(Body):
    id: str
    type: Literal["function"]
    function: CalledFunction
    index: Ignored = None


class AssistantMessage(Body):
    """`reasoning` is what vLLM calls `reasoning_content`. OpenAI's clients send an answer back with what they made of it:
    `parsed`, and in its calls `parsed_arguments` and `index`.
    """

    role: Literal["assistant"]
    content: (
        str
        | Annotated[
            list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]], Field(min_length=1, fail_fast=True)
        ]
        | None
    ) = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[Called], Field(max_length=128)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    parsed: Ignored = None
    annotations: Ignored = None
    audio: Unsupported = None
    function_call: Unsupported = None


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class ChatBody(SamplingFields):
    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                needs("stream_options", stream=True),
                needs("top_logprobs", logprobs=True),
                needs("scaling", n=(1, None)),
            ]
        }
    )

    model: str | None = Field(None, description="May be left out where one model is served.")
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="The older name of max_completion_tokens.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    reasoning_effort: Effort | None = Field(
        None, description="none: no thinking. Otherwise the model thinks, if it can."
    )
    thinking_budget: int | None = Field(None, ge=0, le=MAX_TOKENS, description="Tokens of thought at most.")
    scaling: ScalingFields | None = None
    moderation: ModerationFields | None = None
    watermark: bool | None = Field(None, description="Marks the choice of tokens for `minga watermark` to find.")
    metadata: Annotated[dict[str, str], Field(max_length=16), few(16)] | None = None
    user: str | None = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: str | None = Field(
        None, description="Prompts are shared in the cache with requests of the same key only."
    )
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    verbosity: Literal["low", "medium", "high"] | None = Field(
        None, description="Accepted; does not change the answer here."
    )
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None

    def generation(self) -> Generation:
        """Raises `ApiError` for fields that contradict each other."""
        stream = bool(self.stream)
        if self.stream_options is not None and not stream:
            raise invalid("stream_options", "it needs `stream` set to true")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "it needs `logprobs` set to true")
        new, old = self.max_completion_tokens, self.max_tokens
        if new is not None and old is not None and new != old:
            raise invalid(
                "max_tokens", "it differs from `max_completion_tokens`, which says the same; send one of them"
            )
        if self.scaling is not None and (self.n or 1) > 1:
            raise invalid("n", "with `scaling` one answer is given; leave it out")
        parallel = self.parallel_tool_calls is not False
        use = tool_use(checked_tools(self.tools), *_mode_and_names(self.tool_choice), parallel=parallel)
        return Generation(
            sampling=self.sampling(logprobs=(self.top_logprobs or 0) if self.logprobs else None),
            messages=[plain_message(message) for message in self.messages],
            max_tokens=old if new is None else new,
            num_choices=self.n or 1,
            tool_use=use,
            format=answer_format(self.response_format, self.structured_outputs),
            thinking=thinks(self.reasoning_effort),
            thinking_budget=self.thinking_budget,
            scaling=scaling_of(self.scaling),
            moderation=moderated(self.moderation),
            watermark=bool(self.watermark),
            salt=self.prompt_cache_key or "",
        )


def _mode_and_names(choice: ToolChoice | None) -> tuple[str, list[str] | None]:
    if isinstance(choice, NamedTool):
        return "required", [choice.function.name]
    if isinstance(choice, AllowedToolsChoice):
        return choice.allowed_tools.mode, [tool.function.name for tool in choice.allowed_tools.tools]
    return choice or "auto", None


def plain_message(message: SystemMessage | UserMessage | AssistantMessage | ToolMessage) -> dict[str, Any]:
    """The message as chat templates know it."""
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    plain["content"] = joined(message.content)
    if isinstance(message, AssistantMessage):
        if message.tool_calls:
            plain["tool_calls"] = [
                call.model_dump(include={"id": True, "type": True, "function": {"name", "arguments"}})
                for call in message.tool_calls
            ]
        if reasoning := message.reasoning_content or message.reasoning:
            plain["reasoning_content"] = reasoning
        if message.content is None and not message.tool_calls:
            plain["content"] = message.refusal or ""
    elif isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    return plain


def joined(content: str | Sequence[TextPart | RefusalPart] | None) -> str | None:
    if content is None or isinstance(content, str):
        return content
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


class ChatWriter:
    """The answer as `chat.completion`, or as chunks of it that share id and time."""

    def __init__(self, body: ChatBody, model: str, tokenizer: Tokenizer):
        self.stream = bool(body.stream)
        self._usage_wanted = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._logprobs_wanted = bool(body.logprobs)
        self._num_choices = body.n or 1
        self._tokenizer = tokenizer
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def document(self, outcome: Outcome) -> dict[str, Any]:
        choices = [self._choice(index, choice) for index, choice in enumerate(outcome.choices)]
        document = self._document("chat.completion", choices) | {"usage": usage_document(outcome.usage)}
        return document | extras(outcome)

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.calls
        ]
        content = choice.text or None if calls else choice.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if calls:
            message["tool_calls"] = calls
        logprobs = self._logprobs(choice.logprobs) if self._logprobs_wanted else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    # ------------------------------------------------------------------ a stream

    def begin(self, usage: Usage) -> Iterator[bytes]:
        for index in range(self._num_choices):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def event(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Finish):
            yield self._chunk(event.choice, {}, finish_reason=event.reason)
        elif isinstance(event, Text):
            logprobs = None if event.logprobs is None else self._logprobs(event.logprobs)
            yield self._chunk(event.choice, {"content": event.text}, logprobs)
        elif isinstance(event, Reasoning):
            yield self._chunk(event.choice, {"reasoning_content": event.text})
        elif isinstance(event, CallStart):
            function = {"name": event.name, "arguments": ""}
            yield self._call(event, {"id": event.id, "type": "function", "function": function})
        else:
            yield self._call(event, {"function": {"arguments": event.text}})

    def end(self, outcome: Outcome) -> Iterator[bytes]:
        if self._usage_wanted or extras(outcome):
            usage = {"usage": usage_document(outcome.usage)} if self._usage_wanted else {}
            yield sse(self._document("chat.completion.chunk", []) | usage | extras(outcome))
        yield b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> Iterator[bytes]:
        yield sse(error.document())
        yield b"data: [DONE]\n\n"

    def _call(self, event: CallStart | CallArguments, call: Mapping[str, Any]) -> bytes:
        return self._chunk(event.choice, {"tool_calls": [{"index": event.call, **call}]})

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        no_usage = {"usage": None} if self._usage_wanted else {}
        return sse(self._document("chat.completion.chunk", [choice]) | no_usage)

    def _document(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"content": logprob_entries(logprobs, self._tokenizer), "refusal": None}


def usage_document(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def extras(outcome: Outcome) -> dict[str, Any]:
    found = {"scaling": outcome.scaling, "moderation": outcome.moderation}
    return {name: value for name, value in found.items() if value is not None}


def logprob_entries(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """OpenAI's shape. `bytes` lets a client put characters together that tokens have cut in two."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        spelled = tokenizer.token_bytes(token_id)
        text = spelled.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": list(spelled)}

    return [
        entry(token.token_id, token.logprob) | {"top_logprobs": [entry(*pair) for pair in token.top]}
        for token in logprobs
    ]
