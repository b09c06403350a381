"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from __future__ import annotations

import base64
import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import from_json

from minga.data.dialects import Tool
from minga.data.json_schema import check_schema
from minga.engine.sampler import MAX_SEED
from minga.errors import UserError
from minga.serve.common import (
    MAX_STOPS,
    MAX_TOKENS,
    MAX_TOOLS,
    SamplingFields,
    Stop,
    refuse_twins,
    schema_format,
    tool_use,
)
from minga.serve.errors import ApiError, json_bytes
from minga.serve.generation import (
    AnswerFormat,
    CallArguments,
    CallStart,
    Choice,
    Event,
    Finish,
    Generation,
    Outcome,
    Reasoning,
    ToolUse,
    Usage,
    sse,
)
from minga.serve.schema import Body, Ignored, Unsupported, invalid, short

if TYPE_CHECKING:
    from minga.data.tokenizer import Tokenizer

_ERROR_TYPES = {
    401: "authentication_error", 402: "billing_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
    529: "overloaded_error",
}  # fmt: skip


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: Ignored = None
    citations: Ignored = None


Texts = str | Annotated[list[TextBlock], Field(min_length=1, fail_fast=True)]


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[TextBlock], Field(fail_fast=True)] | None = None
    is_error: bool | None = None
    cache_control: Ignored = None
    toolset_name: Ignored = None


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: str
    signature: Ignored = None


class RedactedThinkingBlock(Body):
    """Another model's, which this one cannot read."""

    type: Literal["redacted_thinking"]
    data: Ignored = None


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: Ignored = None
    caller: Ignored = None
    toolset_name: Ignored = None


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock, Field(discriminator="type")
]


class SystemMessage(Body):
    role: Literal["system"]
    content: Texts


class UserMessage(Body):
    role: Literal["user"]
    content: str | Annotated[list[UserBlock], Field(min_length=1, fail_fast=True)]


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: str | Annotated[list[AssistantBlock], Field(fail_fast=True)]


Message = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]


def _plain(message: UserMessage | AssistantMessage | SystemMessage) -> Iterator[dict[str, Any]]:
    """The message as chat templates know it; results of tools are messages of their own there, before the user's text."""
    blocks = [TextBlock(type="text", text=message.content)] if isinstance(message.content, str) else message.content
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    if isinstance(message, AssistantMessage):
        yield _plain_turn(blocks, _joined(texts) if texts else None)
        return
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            said = _joined(block.content or "")
            yield {
                "role": "tool",
                "content": f"Error: {said}" if block.is_error else said,
                "tool_call_id": block.tool_use_id,
            }
    if texts:
        yield {"role": message.role, "content": _joined(texts)}


def _plain_turn(blocks: Sequence[Body], text: str | None) -> dict[str, Any]:
    thoughts = "\n".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)},
        }
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    turn: dict[str, Any] = {"role": "assistant", "content": text if calls else text or ""}
    return turn | ({"tool_calls": calls} if calls else {}) | ({"reasoning_content": thoughts} if thoughts else {})


def _joined(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


# ---------------------------------------------------------------------------------------------- bodies


def _refuse_hosted(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "custom":
        raise ValueError(f"tools of type {short(kind)} do not run here; the only type is custom")
    return tool


class ToolSpec(Body):
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,128}$")]
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = Field(
        None, description="true by default: the input follows the schema. false: any JSON object."
    )
    cache_control: Ignored = None
    input_examples: Ignored = None
    eager_input_streaming: Ignored = None
    defer_loading: Ignored = None
    allowed_callers: Ignored = None


class AutoChoice(Body):
    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class AnyChoice(Body):
    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoice(Body):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class NoneChoice(Body):
    type: Literal["none"]


class ThinkingOn(Body):
    type: Literal["enabled"]
    budget_tokens: int = Field(ge=1, le=MAX_TOKENS, description="Tokens of thought at most.")
    display: Ignored = None


class ThinkingOff(Body):
    type: Literal["disabled"]


class ThinkingAdaptive(Body):
    """The model thinks, if it can, for as long as it sees fit."""

    type: Literal["adaptive"]
    display: Ignored = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    format: JsonSchemaFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="Accepted; does not change the answer here."
    )


class Metadata(Body):
    user_id: str | None = None


class CountTokensBody(Body):
    """What is counted: all that makes the prompt."""

    model: str | None = Field(None, description="May be left out where one model is served.")
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    system: Texts | None = None
    tools: Annotated[list[Annotated[ToolSpec, BeforeValidator(_refuse_hosted)]], Field(max_length=MAX_TOOLS)] | None = (
        None
    )
    tool_choice: Annotated[AutoChoice | AnyChoice | ToolChoice | NoneChoice, Field(discriminator="type")] | None = None
    thinking: Annotated[ThinkingOn | ThinkingOff | ThinkingAdaptive, Field(discriminator="type")] | None = None
    output_config: OutputConfig | None = None
    output_format: JsonSchemaFormat | None = Field(None, description="The older name of output_config.format.")
    cache_control: Ignored = None
    context_management: Ignored = None
    speed: Ignored = None
    user_profile_id: Ignored = None
    mcp_servers: Unsupported = None

    def generation(self) -> Generation:
        """Raises `ApiError` for fields that contradict each other."""
        if isinstance(self.messages[-1], AssistantMessage):
            raise invalid(
                "messages", "the last one is the assistant's, and an answer cannot be continued; end with the user's"
            )
        system = [{"role": "system", "content": _joined(self.system)}] if self.system else []
        return Generation(
            sampling=SamplingFields.model_validate({}).sampling(),
            messages=system + [plain for message in self.messages for plain in _plain(message)],
            tool_use=self._tool_use(),
            format=self._format(),
            thinking=None if self.thinking is None else not isinstance(self.thinking, ThinkingOff),
            thinking_budget=self.thinking.budget_tokens if isinstance(self.thinking, ThinkingOn) else None,
        )

    def _tool_use(self) -> ToolUse | None:
        tools = tuple(_tool(spec, index) for index, spec in enumerate(self.tools or []))
        refuse_twins(tools, "tools")
        asked = self.tool_choice
        mode = "auto" if asked is None else {"any": "required", "tool": "required"}.get(asked.type, asked.type)
        named = [asked.name] if isinstance(asked, ToolChoice) else None
        parallel = asked is None or isinstance(asked, NoneChoice) or not asked.disable_parallel_tool_use
        return tool_use(tools, mode, named, parallel=parallel, name_field="tool_choice.name")

    def _format(self) -> AnswerFormat | None:
        new, old = None if self.output_config is None else self.output_config.format, self.output_format
        if new is not None and old is not None:
            raise invalid("output_format", "`output_config.format` says the same; send one of them")
        if new is not None:
            return schema_format(new.schema_, "output_config.format.schema")
        return None if old is None else schema_format(old.schema_, "output_format.schema")


class MessagesBody(CountTokensBody):
    max_tokens: int = Field(ge=1, le=MAX_TOKENS)
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MAX_SEED, description="0: no limit.")
    metadata: Metadata | None = None
    service_tier: Ignored = None
    diagnostics: Ignored = None
    inference_geo: Unsupported = None
    container: Unsupported = None
    thread: Unsupported = None

    def generation(self) -> Generation:
        generation = super().generation()
        if generation.thinking_budget is not None and generation.thinking_budget >= self.max_tokens:
            raise invalid("thinking.budget_tokens", "it must be less than `max_tokens`, which the answer needs too")
        fields = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
        }
        sampling = SamplingFields.model_validate(fields).sampling()
        return replace(generation, sampling=sampling, max_tokens=self.max_tokens)


def _tool(spec: ToolSpec, index: int) -> Tool:
    field = f"tools[{index}].input_schema"
    try:
        check_schema(spec.input_schema, field)
        return Tool(
            name=spec.name, parameters=spec.input_schema, description=spec.description or "",
            strict=spec.strict is not False,
        )  # fmt: skip
    except UserError as error:
        raise ApiError(str(error), param=field, code="invalid_schema") from None


# ---------------------------------------------------------------------------------------------- the answer


class MessagesWriter:
    """The answer as a `message`, or as the events in which it grows."""

    def __init__(self, body: MessagesBody, model: str, tokenizer: Tokenizer):
        self.stream = bool(body.stream)
        self._head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}
        self._content = _Content()

    def document(self, outcome: Outcome) -> dict[str, Any]:
        choice = outcome.choices[0]
        for event in choice.events():
            for _ in self._content.take(event):
                pass
        usage = usage_document(outcome.usage)
        return {**self._head, "content": self._content.blocks, **_stop(choice), "usage": usage}

    # ------------------------------------------------------------------ a stream

    def begin(self, usage: Usage) -> Iterator[bytes]:
        open_now: dict[str, Any] = {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_document(usage),
        }
        yield _sse({"type": "message_start", "message": {**self._head, **open_now}})

    def event(self, event: Event) -> Iterator[bytes]:
        return map(_sse, self._content.take(event))

    def end(self, outcome: Outcome) -> Iterator[bytes]:
        usage = usage_document(outcome.usage)
        yield _sse({"type": "message_delta", "delta": _stop(outcome.choices[0]), "usage": usage})
        yield _sse({"type": "message_stop"})

    def error(self, error: ApiError) -> Iterator[bytes]:
        yield _sse(error_document(error))


class _Content:
    """The blocks of a message. Each is whole when another begins, or the answer ends."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._block: dict[str, Any] | None = None  # the one that grows
        self._pieces: list[str] = []

    def take(self, event: Event) -> Iterator[dict[str, Any]]:
        """The events of the stream that this one becomes."""
        if isinstance(event, Finish):
            yield from self._close()
        elif isinstance(event, CallStart):
            yield from self._close()
            yield self._open({"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
        elif isinstance(event, CallArguments):
            yield self._grow(event.text, "input_json_delta", "partial_json")
        elif event.text:
            thinks = isinstance(event, Reasoning)
            kind = "thinking" if thinks else "text"
            if self._block is None or self._block["type"] != kind:
                yield from self._close()
                yield self._open({"type": kind, kind: ""} | ({"signature": ""} if thinks else {}))
            yield self._grow(event.text, f"{kind}_delta", kind)

    def _open(self, block: dict[str, Any]) -> dict[str, Any]:
        self._block, self._pieces = block, []
        return {"type": "content_block_start", "index": len(self.blocks), "content_block": block}

    def _grow(self, text: str, kind: str, field: str) -> dict[str, Any]:
        self._pieces.append(text)
        return self._delta({"type": kind, field: text})

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.blocks), "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._block is None:
            return
        kind, text = self._block["type"], "".join(self._pieces)
        whole: dict[str, Any] = {"input": _parsed(text)} if kind == "tool_use" else {kind: text}
        if kind == "thinking":
            whole["signature"] = _signature(text)
            yield self._delta({"type": "signature_delta", "signature": whole["signature"]})
        yield {"type": "content_block_stop", "index": len(self.blocks)}
        self.blocks.append(self._block | whole)
        self._block = None


def _parsed(arguments: str) -> dict[str, Any]:
    """The input of a call; of one that was cut off what is whole, as Anthropic's own client reads a stream."""
    try:
        found = from_json(arguments, allow_partial=True)
        json_bytes(found)  # 1e999 is a number to the parser, and none that could be sent
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _signature(thoughts: str) -> str:
    """Clients send back only thoughts that are signed. A digest: nothing here depends on who wrote them."""
    return base64.b64encode(hashlib.sha256(thoughts.encode("utf-8", "surrogatepass")).digest()).decode()


def _stop(choice: Choice) -> dict[str, Any]:
    reasons = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
    reason = reasons.get(choice.finish_reason, "end_turn" if choice.stop is None else "stop_sequence")
    return {"stop_reason": reason, "stop_sequence": choice.stop if reason == "stop_sequence" else None}


def usage_document(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion,
        "output_tokens_details": {"thinking_tokens": usage.reasoning},
    }


def count_document(num_tokens: int) -> dict[str, Any]:
    """The answer of count_tokens."""
    return {"input_tokens": num_tokens}


def error_document(error: ApiError) -> dict[str, Any]:
    """The error as Anthropic's clients know it."""
    kind = _ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    document: dict[str, Any] = {"type": kind, "message": error.message}
    if (error.param, error.code) == ("thread", "unsupported_parameter"):
        # The client's runner of tools asks for a thread by itself. Told so, it sends the whole conversation instead.
        document["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return {"type": "error", "error": document}


def _sse(document: dict[str, Any]) -> bytes:
    return sse(document, document["type"])
