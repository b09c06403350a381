"""The OpenAPI document: made from the bodies that are checked, so that it says what is accepted and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

import minga
from minga.serve.chat import ChatBody
from minga.serve.completions import CompletionBody
from minga.serve.embeddings import EmbeddingBody
from minga.serve.messages import CountTokensBody, MessagesBody
from minga.serve.responses import ResponsesBody
from minga.serve.schema import Body
from minga.serve.text import DetokenizeBody, ModerationBody, TokenizeBody

_REF = "#/components/schemas/{model}"
_ERRORS = {
    400: "Something in the request is wrong; `error.param` names the field.",
    401: "The key is missing or no good.",
    403: "The Host or the Origin header is not this server's.",
    404: "There is no such thing here.",
    408: "The answer took too long.",
    413: "The body is too large.",
    429: "The queue is full, or a limit of the key is reached; `retry-after` says when to come again.",
    500: "The server failed.",
    503: "The server stops.",
}


@dataclass(frozen=True)
class Operation:
    """stream: it may answer with server-sent events. media: of a reply that is no JSON. required: what is in the JSON.
    example: a body, without its model.
    """

    method: str
    path: str
    summary: str
    body: type[Body] | None = None
    stream: bool = False
    media: str = "application/json"
    required: tuple[str, ...] = ()
    parameters: tuple[tuple[str, str, str, dict[str, Any]], ...] = ()  # name, where, what it is, its schema
    errors: tuple[int, ...] = (401,)
    public: bool = False
    example: dict[str, Any] | None = None


_HELLO = [{"role": "user", "content": "What is the capital of Peru?"}]
_NAME = {"type": "string", "minLength": 1}
_ID = ("id", "path", "its id", _NAME)
_ANSWER_ERRORS = (400, 401, 404, 408, 413, 429, 500, 503)
_CHECK_ERRORS = (400, 401, 404, 408, 413)

OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Answers a conversation (OpenAI).", ChatBody, True,
              required=("id", "object", "created", "model", "choices", "usage"), errors=_ANSWER_ERRORS,
              example={"messages": _HELLO, "max_tokens": 64}),
    Operation("post", "/v1/completions", "Goes on with a text (OpenAI).", CompletionBody, True,
              required=("id", "object", "created", "model", "choices", "usage"), errors=_ANSWER_ERRORS,
              example={"prompt": "The capital of Peru is", "max_tokens": 16}),
    Operation("post", "/v1/responses", "Answers, and remembers (OpenAI).", ResponsesBody, True,
              required=("id", "object", "created_at", "model", "output", "status"), errors=_ANSWER_ERRORS,
              example={"input": "What is the capital of Peru?", "max_output_tokens": 64}),
    Operation("get", "/v1/responses/{id}", "An answer that was kept.", parameters=(_ID,), required=("id",),
              errors=(401, 404)),
    Operation("delete", "/v1/responses/{id}", "Forgets an answer.", parameters=(_ID,), required=("id",),
              errors=(401, 404)),
    Operation("get", "/v1/responses/{id}/input_items", "What an answer was asked.",
              parameters=(
                  _ID,
                  ("order", "query", "by time; desc if left out", {"enum": ["asc", "desc"]}),
                  ("limit", "query", "items at most; 20 if left out", {"type": "integer", "minimum": 1, "maximum": 100}),
                  ("after", "query", "the id of the item before the first", _NAME),
              ), required=("object", "data"), errors=(400, 401, 404)),
    Operation("post", "/v1/messages", "Answers a conversation (Anthropic).", MessagesBody, True,
              required=("id", "type", "role", "model", "content", "usage"), errors=_ANSWER_ERRORS,
              example={"messages": _HELLO, "max_tokens": 64}),
    Operation("post", "/v1/messages/count_tokens", "How many tokens a conversation has (Anthropic).", CountTokensBody,
              required=("input_tokens",), errors=_CHECK_ERRORS,
              example={"messages": _HELLO}),
    Operation("post", "/v1/embeddings", "The mean of the model's last states.", EmbeddingBody,
              required=("object", "data", "model", "usage"), errors=_ANSWER_ERRORS,
              example={"input": "Lima"}),
    Operation("post", "/v1/moderations", "The guard's verdict on texts.", ModerationBody, required=("id", "model", "results"),
              errors=_CHECK_ERRORS,
              example={"input": "How do I kill a Python process?"}),
    Operation("get", "/v1/models", "The models that are served.", required=("object", "data")),
    Operation("get", "/v1/models/{name}", "One of them.", parameters=(("name", "path", "its name", _NAME),),
              required=("id", "object"), errors=(401, 404)),
    Operation("post", "/tokenize", "The tokens of a text or a conversation.", TokenizeBody,
              required=("count", "max_model_len", "tokens"), errors=_CHECK_ERRORS,
              example={"prompt": "Lima is a city."}),
    Operation("post", "/detokenize", "The text of tokens.", DetokenizeBody, required=("prompt",), errors=_CHECK_ERRORS,
              example={"tokens": [1, 2, 3]}),
    Operation("get", "/health", "The server is there.", required=("status",), public=True, errors=()),
    Operation("get", "/ready", "The server takes requests.", required=("status",), public=True, errors=(503,)),
    Operation("get", "/metrics", "For Prometheus, by vLLM's names.", media="text/plain"),
    Operation("get", "/api/status", "Speed, queue, cache and price of each model.", required=("version", "models")),
    Operation("get", "/api/runs", "Training runs, the latest first.", required=("runs",)),
    Operation("get", "/api/runs/{name}", "The lines of a run.",
              parameters=(
                  ("name", "path", "its name", _NAME),
                  ("after", "query", "the first line", {"type": "integer", "minimum": 0, "maximum": 10**15 - 1}),
              ), required=("lines", "next"),
              errors=(400, 401, 404)),
)  # fmt: skip


def describe(models: Sequence[str], *, needs_key: bool = False) -> dict[str, Any]:
    """OpenAPI 3.2. models: that are served, for the requests to name. needs_key: nobody without one may ask."""
    schemas, components = _schemas()
    named = {name: _with_models(schema, models) for name, schema in components.items()}
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation, schemas, models)
    ways = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.2.0",  # the first that describes the events of a stream
        "info": {
            "title": "Minga",
            "version": minga.__version__,
            "description": "Models of one's own, by the APIs that exist.",
        },
        "paths": paths,
        "components": {"schemas": named | {"Error": _ERROR}, "securitySchemes": ways},
        "security": [*({way: []} for way in ways), *([] if needs_key else [{}])],
    }


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        },
    },
}


_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}


@cache
def _schemas() -> tuple[dict[Any, Any], dict[str, Any]]:
    """References of the bodies, and the components to which they lead."""
    bodies: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (operation.body, "validation") for operation in OPERATIONS if operation.body is not None
    ]
    references, document = models_json_schema(bodies, ref_template=_REF)
    return {body: reference for (body, _), reference in references.items()}, _without_half_discriminators(
        document["$defs"]
    )


def _without_half_discriminators(schema: Any) -> Any:
    """Without discriminators that are of no use: of a union inside a union, which pydantic writes in a form that OpenAPI does
    not have, and where several values name the same schema, of which some readers know one.
    """
    if isinstance(schema, list):
        return [_without_half_discriminators(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: _without_half_discriminators(item) for name, item in schema.items()}
    targets = list(kept.get("discriminator", {}).get("mapping", {}).values())
    if not all(isinstance(target, str) and targets.count(target) == 1 for target in targets):
        del kept["discriminator"]
    return kept


def _with_models(schema: dict[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """`model` as it can be here: one of these, and left out only where there is one."""
    if "model" not in schema.get("properties", {}) or not schema.get("title", "").endswith("Body"):
        return schema
    if schema["title"] == "ModerationBody":
        return schema
    properties = schema["properties"] | {"model": {"enum": [*models, *([None] if len(models) == 1 else [])]}}
    required = schema.get("required", []) if len(models) == 1 else sorted({*schema.get("required", []), "model"})
    return schema | {"properties": properties, "required": required}


def _example(operation: Operation, models: Sequence[str]) -> dict[str, Any]:
    named = {"model": models[0]} if len(models) > 1 and operation.body is not ModerationBody else {}
    return named | (operation.example or {})


def _describe(operation: Operation, schemas: dict[Any, Any], models: Sequence[str]) -> dict[str, Any]:
    reply: dict[str, Any] = {"type": "object", "required": list(operation.required)}
    content: dict[str, Any] = {
        operation.media: {"schema": reply if operation.media == "application/json" else {"type": "string"}}
    }
    if operation.stream:
        content["text/event-stream"] = {"itemSchema": _EVENT}
    error = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    replies: dict[str, Any] = {"200": {"description": "OK", "content": content}}
    errors = sorted({403, *operation.errors})
    replies |= {str(status): {"description": _ERRORS[status], "content": error} for status in errors}
    document: dict[str, Any] = {"summary": operation.summary, "responses": replies}
    if operation.body is not None:
        document["requestBody"] = {
            "required": True,
            "content": {
                "application/json": {"schema": schemas[operation.body], "example": _example(operation, models)}
            },
        }
    if operation.parameters:
        document["parameters"] = [
            {
                "name": name, "in": where, "description": what, "required": where == "path", "schema": schema,
            }
            for name, where, what, schema in operation.parameters
        ]  # fmt: skip
    if operation.public:
        document["security"] = []
    return document
