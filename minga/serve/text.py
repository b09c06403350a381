"""Small endpoints around a model: /tokenize and /detokenize as in vLLM, and OpenAI's /v1/moderations."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from minga.data import dialects
from minga.errors import UserError
from minga.serve.answering import verdict_document
from minga.serve.chat import Message, TextPart, plain_message
from minga.serve.common import Tools, checked_tools
from minga.serve.errors import ApiError
from minga.serve.moderation import Guard, judge
from minga.serve.schema import Body, invalid
from minga.serve.worker import Worker

MAX_MODERATED = 64
MAX_CHARACTERS = 1 << 20  # of all texts of a request: what is longer would take seconds


class TokenizeBody(Body):
    """A text, or messages as the chat has them."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"properties": {one: {"not": {"type": "null"}}, other: {"type": "null"}}, "required": [one]}
                for one, other in (("prompt", "messages"), ("messages", "prompt"))
            ]
        }
    )

    model: str | None = None
    prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = Field(
        None, description="Begins with the token that begins texts, as a prompt does."
    )


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=1 << 20, fail_fast=True)]


class ModerationBody(Body):
    model: str | None = Field(None, description="There is one guard, whatever its name here.")
    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_MODERATED)]
        | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MODERATED)]
    )


def tokenize(body: TokenizeBody, worker: Worker) -> dict[str, Any]:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "send a `prompt` or `messages`, one of them")
    llm = worker.llm
    try:
        if body.messages is not None:
            messages = [plain_message(message) for message in body.messages]
            _refuse_long((message["content"] or "" for message in messages), "messages")
            tools = checked_tools(body.tools)
            ids = dialects.render_prompt(llm.tokenizer, messages, tools=tools, dialect=worker.dialect)
        elif body.add_special_tokens is False:
            ids = llm.tokenizer.encode(body.prompt or "")
        else:
            ids = llm.encode(body.prompt or "")
    except UserError as error:
        field = "prompt" if body.messages is None else "messages"
        raise ApiError(str(error), param=field, code="invalid_value") from None
    return {"count": len(ids), "max_model_len": llm.max_context, "tokens": ids}


def detokenize(body: DetokenizeBody, worker: Worker) -> dict[str, Any]:
    for index, token in enumerate(body.tokens):
        if token >= worker.llm.config.vocab_size:
            raise invalid(f"tokens[{index}]", f"{worker.name} has {worker.llm.config.vocab_size} tokens")
    return {"prompt": worker.llm.tokenizer.decode(body.tokens, skip_specials=False)}


def moderate(body: ModerationBody, guard: Guard) -> dict[str, Any]:
    inputs = [body.input] if isinstance(body.input, str) else body.input
    texts = [part if isinstance(part, str) else part.text for part in inputs]
    _refuse_long(texts, "input")
    results = [verdict_document(judge(guard, text)) for text in texts]
    return {"id": f"modr-{uuid.uuid4().hex}", "model": guard.name, "results": results}


def _refuse_long(texts: Iterable[str], field: str) -> None:
    if (num := sum(map(len, texts))) > MAX_CHARACTERS:
        raise invalid(field, f"it has {num} characters, and {MAX_CHARACTERS} is the most; send it in parts")
