"""POST /v1/responses: OpenAI's Responses API, and the memory of earlier responses that a request may go on from.

A conversation is a list of items: messages, calls, their results, reasoning. For the model, what an assistant's turn is made
of becomes one message again.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, WithJsonSchema

from minga.serve.chat import logprob_entries
from minga.serve.common import (
    MAX_TOKENS,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
    Effort,
    FunctionSpec,
    JsonObjectFormat,
    ModerationFields,
    Name,
    SamplingFields,
    ScalingFields,
    TextFormat,
    checked_tool,
    moderated,
    refuse_twins,
    scaling_of,
    schema_format,
    thinks,
    tool_use,
)
from minga.serve.errors import ApiError
from minga.serve.generation import (
    AnswerFormat,
    CallArguments,
    CallStart,
    Event,
    Finish,
    Generation,
    Outcome,
    Reasoning,
    Usage,
    sse,
)
from minga.serve.schema import Body, Ignored, Unsupported, few, invalid, needs, short

if TYPE_CHECKING:
    from minga.data.tokenizer import Tokenizer

MAX_ITEMS = 4096

# ---------------------------------------------------------------------------------------------- items


class InputText(Body):
    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: Ignored = None


class OutputText(Body):
    type: Literal["output_text"]
    text: str
    annotations: Ignored = None
    logprobs: Ignored = None
    parsed: Ignored = None  # what OpenAI's client for JavaScript made of it


class Refusal(Body):
    type: Literal["refusal"]
    refusal: str


class SummaryText(Body):
    type: Literal["summary_text"]
    text: str


class ReasoningText(Body):
    type: Literal["reasoning_text"]
    text: str


InputTexts = str | Annotated[list[InputText], Field(min_length=1, fail_fast=True)]
SpokenPart = Annotated[InputText | OutputText | Refusal, Field(discriminator="type")]


class ItemFields(Body):
    """What every item has, and no prompt needs."""

    id: str | None = None
    status: Ignored = None


def _without_type(schema: dict[str, Any]) -> None:
    """For the OpenAPI document: see `_with_type`."""
    schema["properties"]["type"] = {"enum": ["message", None]}
    schema["required"].remove("type")


class InputMessage(ItemFields):
    model_config = ConfigDict(json_schema_extra=_without_type)

    type: Literal["message"]
    role: Literal["user", "system", "developer"]
    content: InputTexts
    phase: Ignored = None


class OutputMessage(ItemFields):
    model_config = ConfigDict(json_schema_extra=_without_type)

    type: Literal["message"]
    role: Literal["assistant"]
    content: str | Annotated[list[SpokenPart], Field(min_length=1, fail_fast=True)]
    phase: Ignored = None


class FunctionCall(ItemFields):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    parsed_arguments: Ignored = None
    caller: Ignored = None
    namespace: Ignored = None
    created_by: Ignored = None


class FunctionCallOutput(ItemFields):
    type: Literal["function_call_output"]
    call_id: str
    output: InputTexts
    name: Ignored = None
    caller: Ignored = None
    namespace: Ignored = None
    created_by: Ignored = None


class ReasoningItem(ItemFields):
    """The summary counts where there is no content."""

    type: Literal["reasoning"]
    summary: Annotated[list[SummaryText], Field(fail_fast=True)] | None = None
    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None
    encrypted_content: Ignored = None


class ItemReference(Body):
    """Stands for an item of an earlier answer."""

    type: Literal["item_reference"]
    id: str


def _with_type(item: Any) -> Any:
    """A message may leave its type out, and so may a reference."""
    if isinstance(item, dict) and item.get("type") is None:
        if "role" in item:
            return {**item, "type": "message"}
        if item.keys() <= {"type", "id"} and "id" in item:
            return {**item, "type": "item_reference"}
    return item


Message = Annotated[InputMessage | OutputMessage, Field(discriminator="role")]
Item = Message | FunctionCall | FunctionCallOutput | ReasoningItem
GivenItem = Annotated[Item | ItemReference, Field(discriminator="type"), BeforeValidator(_with_type)]
_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Annotated[Item, Field(discriminator="type")]])


def _joined(content: str | Sequence[InputText | OutputText | Refusal | SummaryText | ReasoningText]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.refusal if isinstance(part, Refusal) else part.text for part in content)


def _messages(items: Sequence[Item]) -> list[dict[str, Any]]:
    """The items as chat templates know them."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # the assistant's, while it may still grow
    for item in items:
        if isinstance(item, InputMessage):
            role = "user" if item.role == "user" else "system"
            messages.append({"role": role, "content": _joined(item.content)})
            turn = None
        elif isinstance(item, FunctionCallOutput):
            messages.append({"role": "tool", "content": _joined(item.output), "tool_call_id": item.call_id})
            turn = None
        elif isinstance(item, FunctionCall):
            function = {"name": item.name, "arguments": item.arguments}
            if turn is None:
                messages.append(turn := _turn())
            turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
        elif isinstance(item, ReasoningItem):
            if turn is None or turn["content"] is not None or "tool_calls" in turn:
                messages.append(turn := _turn())
            text = _joined(item.content or item.summary or [])
            turn["reasoning_content"] = turn.get("reasoning_content", "") + text
        else:
            if turn is None or (turn["content"] is not None and "tool_calls" not in turn):
                messages.append(turn := _turn())
            turn["content"] = (turn["content"] or "") + _joined(item.content)
    for message in messages:
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
    return messages


def _turn() -> dict[str, Any]:
    return {"role": "assistant", "content": None}


def item_document(item: Item) -> dict[str, Any]:
    """An item of the input as it is listed: with an id, and its content in parts."""
    document: dict[str, Any] = {"type": item.type, "id": item.id or _new_id(item.type), "status": "completed"}
    if isinstance(item, FunctionCall):
        return document | {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
    if isinstance(item, FunctionCallOutput):
        output = item.output if isinstance(item.output, str) else [_part_document(part) for part in item.output]
        return document | {"call_id": item.call_id, "output": output}
    if isinstance(item, ReasoningItem):
        summary, content = ([_part_document(part) for part in parts or []] for parts in (item.summary, item.content))
        return document | {"summary": summary, "content": content, "encrypted_content": None}
    if isinstance(item, InputMessage):
        parts: Sequence[Any] = [_input_text(item.content)] if isinstance(item.content, str) else item.content
    else:
        parts = [OutputText(type="output_text", text=item.content)] if isinstance(item.content, str) else item.content
    return document | {"role": item.role, "content": [_part_document(part) for part in parts]}


def _part_document(part: InputText | OutputText | Refusal | SummaryText | ReasoningText) -> dict[str, Any]:
    if isinstance(part, OutputText):
        return _text_part(part.text, [])
    if isinstance(part, Refusal):
        return {"type": part.type, "refusal": part.refusal}
    return {"type": part.type, "text": part.text}


def _input_text(text: str) -> InputText:
    return InputText(type="input_text", text=text)


def _text_part(text: str, logprobs: list[Any]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}


def _new_id(kind: str) -> str:
    return f"{_PREFIXES[kind]}_{uuid.uuid4().hex}"


# ---------------------------------------------------------------------------------------------- the body


class FunctionTool(FunctionSpec):
    type: Literal["function"]
    output_schema: Ignored = None
    defer_loading: Ignored = None
    allowed_callers: Ignored = None


def _refuse_hosted(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise ValueError(f"tools of type {short(kind)} do not run here; the only type is function")
    return tool


class FunctionChoice(Body):
    type: Literal["function"]
    name: Name


class AllowedChoice(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1, max_length=MAX_TOOLS)]


NamedChoice = Annotated[FunctionChoice | AllowedChoice, Field(discriminator="type")]


class JsonSchemaText(Body):
    type: Literal["json_schema"]
    name: Name
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextOptions(Body):
    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaText, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(
        None, description="Accepted; does not change the answer here."
    )


class ReasoningOptions(Body):
    effort: Effort | None = Field(None, description="none: no thinking. Otherwise the model thinks, if it can.")
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Accepted; the reasoning itself is given."
    )
    generate_summary: Ignored = None
    context: Ignored = None
    mode: Ignored = None


class ResponseStreamOptions(Body):
    include_obfuscation: Ignored = None


Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponsesBody(SamplingFields):
    model_config = ConfigDict(json_schema_extra=needs("stream_options", stream=True))

    model: str | None = Field(None, description="May be left out where one model is served.")
    input: str | Annotated[list[GivenItem], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: str | None = None
    previous_response_id: str | None = Field(None, description="Goes on from a response that was stored.")
    store: bool | None = Field(None, description="false: the response cannot be read or gone on from later.")
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    include: Annotated[list[Includable], Field(max_length=16)] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: (
        Annotated[list[Annotated[FunctionTool, BeforeValidator(_refuse_hosted)]], Field(max_length=MAX_TOOLS)] | None
    ) = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = Field(None, ge=1, description="Accepted; it limits tools that run in the server.")
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    thinking_budget: int | None = Field(None, ge=0, le=MAX_TOKENS, description="Tokens of thought at most.")
    scaling: ScalingFields | None = None
    moderation: ModerationFields | None = None
    watermark: bool | None = Field(None, description="Marks the choice of tokens for `minga watermark` to find.")
    truncation: Literal["disabled"] | None = Field(None, description="Nothing is cut off silently.")
    background: Annotated[bool, WithJsonSchema({"const": False})] | None = Field(
        None, description="A response is given at once here."
    )
    metadata: Annotated[dict[str, str], Field(max_length=16), few(16)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = Field(
        None, description="Prompts are shared in the cache with requests of the same key only."
    )
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    service_tier: Ignored = None
    access_programs: Ignored = None
    background_options: Unsupported = None
    context_management: Unsupported = None
    conversation: Unsupported = None
    image: Unsupported = None
    prompt: Unsupported = None

    def generation(self, earlier: Sequence[dict[str, Any]] = ()) -> Generation:
        """earlier: the conversation that `previous_response_id` names (`ResponseStore.conversation`).

        Raises `ApiError` for fields that contradict each other.
        """
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "it needs `stream` set to true")
        if self.background:
            raise invalid("background", "a response is given at once here; leave it out")
        if self.top_logprobs and not self.logprobs_wanted:
            raise invalid("top_logprobs", 'it needs "message.output_text.logprobs" in `include`')
        tools = tuple(checked_tool(tool, f"tools[{index}]") for index, tool in enumerate(self.tools or []))
        refuse_twins(tools, "tools")
        parallel = self.parallel_tool_calls is not False
        use = tool_use(tools, *_mode_and_names(self.tool_choice), parallel=parallel)
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return Generation(
            sampling=self.sampling(logprobs=(self.top_logprobs or 0) if self.logprobs_wanted else None),
            messages=system + _messages([*_ITEMS.validate_python(list(earlier)), *self.items]),
            max_tokens=self.max_output_tokens,
            tool_use=use,
            format=self._format(),
            thinking=thinks(None if self.reasoning is None else self.reasoning.effort),
            thinking_budget=self.thinking_budget,
            scaling=scaling_of(self.scaling),
            moderation=moderated(self.moderation),
            watermark=bool(self.watermark),
            salt=self.prompt_cache_key or "",
            field="input",
        )

    @property
    def items(self) -> list[Item]:
        if isinstance(self.input, str):
            return [InputMessage(type="message", role="user", content=self.input)]
        items: list[Item] = []
        for index, item in enumerate(self.input):
            if isinstance(item, ItemReference):
                why = f"there is no item {short(item.id)} here, or it is named twice"
                raise invalid(f"input[{index}]", f"{why}; send the item itself, or name a `previous_response_id`")
            items.append(item)
        return items

    @property
    def references(self) -> list[str]:
        """The ids of the items that are named and not sent."""
        given = () if isinstance(self.input, str) else self.input
        return [item.id for item in given if isinstance(item, ItemReference)]

    def with_items(self, known: Mapping[str, Mapping[str, Any]]) -> ResponsesBody:
        """The same body with items in the place of the references to them, each once: a short request stays a short one."""
        if isinstance(self.input, str):
            return self
        left = dict(known)
        items: list[Item | ItemReference] = []
        for item in self.input:
            found = left.pop(item.id, None) if isinstance(item, ItemReference) else None
            items += [item] if found is None else _ITEMS.validate_python([found])
        return self.model_copy(update={"input": items})

    @property
    def logprobs_wanted(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())

    def _format(self) -> AnswerFormat | None:
        format = None if self.text is None else self.text.format
        if isinstance(format, JsonSchemaText):
            return schema_format(format.schema_, "text.format.schema")
        return AnswerFormat("json_object") if isinstance(format, JsonObjectFormat) else None


def _mode_and_names(choice: str | FunctionChoice | AllowedChoice | None) -> tuple[str, list[str] | None]:
    if isinstance(choice, FunctionChoice):
        return "required", [choice.name]
    if isinstance(choice, AllowedChoice):
        return choice.mode, [tool.name for tool in choice.tools]
    return choice or "auto", None


# ---------------------------------------------------------------------------------------------- the answer


class ResponsesWriter:
    """The answer as a `response`, or as the events in which it grows. keep: gets the response when it is whole."""

    def __init__(
        self,
        body: ResponsesBody,
        model: str,
        tokenizer: Tokenizer,
        *,
        keep: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.stream = bool(body.stream)
        self._keep = keep
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
        }
        self._asked = _asked(body)
        self._output = _Output(tokenizer)
        self._num_events = 0

    def document(self, outcome: Outcome) -> dict[str, Any]:
        for event in outcome.choices[0].events():
            for _ in self._output.take(event):
                pass
        return self._whole(outcome)

    # ------------------------------------------------------------------ a stream

    def begin(self, usage: Usage) -> Iterator[bytes]:
        for kind in ("created", "in_progress"):
            yield self._sse({"type": f"response.{kind}", "response": self._response("in_progress")})

    def event(self, event: Event) -> Iterator[bytes]:
        return map(self._sse, self._output.take(event))

    def end(self, outcome: Outcome) -> Iterator[bytes]:
        response = self._whole(outcome)
        yield self._sse({"type": f"response.{response['status']}", "response": response})

    def error(self, error: ApiError) -> Iterator[bytes]:
        yield self._sse({"type": "error", "code": error.code, "message": error.message, "param": error.param})
        codes = {429: "rate_limit_exceeded"}
        code = codes.get(error.status, "server_error" if error.status >= 500 else "invalid_prompt")
        response = self._response("failed") | {"error": {"code": code, "message": error.message}}
        yield self._sse({"type": "response.failed", "response": response})

    def _sse(self, document: dict[str, Any]) -> bytes:
        numbered = {**document, "sequence_number": self._num_events}
        self._num_events += 1
        return sse(numbered, numbered["type"])

    # ------------------------------------------------------------------ responses

    def _whole(self, outcome: Outcome) -> dict[str, Any]:
        reasons = {"length": "max_output_tokens", "content_filter": "content_filter"}
        reason = reasons.get(outcome.choices[0].finish_reason)
        response = self._response("completed" if reason is None else "incomplete")
        response["usage"] = usage_document(outcome.usage)
        if reason is None:
            response["completed_at"] = int(time.time())
        else:
            response["incomplete_details"] = {"reason": reason}
        if outcome.scaling is not None:
            response["scaling"] = outcome.scaling
        if outcome.moderation is not None:
            response["moderation"] = {side: _single(verdict) for side, verdict in outcome.moderation.items()}
        if self._keep is not None:
            self._keep(response)
        return response

    def _response(self, status: str) -> dict[str, Any]:
        open_now = {"completed_at": None, "error": None, "incomplete_details": None, "usage": None}
        return {**self._head, "status": status, **open_now, "output": self._output.items, **self._asked}


class _Output:
    """The items of a response. Each is whole when another begins, or the answer ends."""

    def __init__(self, tokenizer: Tokenizer):
        self.items: list[dict[str, Any]] = []
        self._tokenizer = tokenizer
        self._item: dict[str, Any] | None = None  # the one that grows
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def take(self, event: Event) -> Iterator[dict[str, Any]]:
        """The events of the stream that this one becomes."""
        if isinstance(event, Finish):
            yield from self._close("completed" if event.reason in ("stop", "tool_calls") else "incomplete")
        elif isinstance(event, CallStart):
            yield from self._close("completed")
            yield self._open("function_call", {"call_id": event.id, "name": event.name, "arguments": ""})
        elif isinstance(event, CallArguments):
            self._pieces.append(event.text)
            yield self._at("response.function_call_arguments.delta", delta=event.text)
        elif isinstance(event, Reasoning):
            yield from self._say("reasoning", event.text)
        else:
            logprobs = logprob_entries(event.logprobs or [], self._tokenizer)
            yield from self._say("message", event.text, logprobs=logprobs)

    def _say(self, kind: str, text: str, **told: Any) -> Iterator[dict[str, Any]]:
        if self._item is None or self._item["type"] != kind:
            if not text:  # log-probabilities of tokens that gave none, and no text that they could stand beside
                return
            yield from self._close("completed")
            thought: dict[str, Any] = {"summary": [], "encrypted_content": None}
            yield self._open(kind, ({"role": "assistant"} if kind == "message" else thought) | {"content": []})
            yield self._at("response.content_part.added", part=self._part(), content_index=0)
        self._pieces.append(text)
        self._logprobs += told.get("logprobs", [])
        yield self._at(f"response.{self._part_type}.delta", delta=text, content_index=0, **told)

    def _open(self, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        self._item = {"id": _new_id(kind), "type": kind, "status": "in_progress", **fields}
        self._pieces, self._logprobs = [], []
        return {"type": "response.output_item.added", "output_index": len(self.items), "item": self._item}

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        if self._item is None:
            return
        item = {**self._item, "status": status}
        if item["type"] == "function_call":
            item["arguments"] = "".join(self._pieces)
            yield self._at("response.function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        else:
            part = self._part()
            item["content"] = [part]
            told = {"logprobs": self._logprobs} if item["type"] == "message" else {}
            yield self._at(f"response.{part['type']}.done", text=part["text"], content_index=0, **told)
            yield self._at("response.content_part.done", part=part, content_index=0)
        yield {"type": "response.output_item.done", "output_index": len(self.items), "item": item}
        self.items.append(item)
        self._item = None

    @property
    def _part_type(self) -> str:
        assert self._item is not None
        return "output_text" if self._item["type"] == "message" else "reasoning_text"

    def _part(self) -> dict[str, Any]:
        text = "".join(self._pieces)
        if self._part_type == "output_text":
            return _text_part(text, self._logprobs)
        return {"type": "reasoning_text", "text": text}

    def _at(self, kind: str, **fields: Any) -> dict[str, Any]:
        assert self._item is not None
        return {"type": kind, "item_id": self._item["id"], "output_index": len(self.items), **fields}


def _asked(body: ResponsesBody) -> dict[str, Any]:
    """What a response repeats of its request, with what was left out filled in."""
    sampling = body.sampling()
    format = None if body.text is None or body.text.format is None else body.text.format.model_dump(by_alias=True)
    verbosity = None if body.text is None else body.text.verbosity
    reasoning = body.reasoning
    tools = [
        {
            "type": "function",
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
            "strict": tool.strict is not False,
        }
        for tool in body.tools or []
    ]
    choice = body.tool_choice or "auto"
    return {
        "background": False,
        "frequency_penalty": sampling.frequency_penalty,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "presence_penalty": sampling.presence_penalty,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning and reasoning.effort, "summary": reasoning and reasoning.summary},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": sampling.temperature,
        "text": {"format": format or {"type": "text"}, "verbosity": verbosity or "medium"},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def usage_document(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


def _single(verdict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Chat lists its verdicts; here there is one."""
    return verdict["results"][0] if verdict.get("type") == "moderation_results" else verdict
