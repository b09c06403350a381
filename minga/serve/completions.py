"""POST /v1/completions: plain text goes on, as before there was chat."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field

from minga.engine.sampler import TokenLogprob
from minga.serve.chat import StreamOptions, extras, usage_document
from minga.serve.common import MAX_CHOICES, MAX_TOKENS, SamplingFields, StructuredOutputs, answer_format
from minga.serve.errors import ApiError
from minga.serve.generation import Event, Finish, Generation, Outcome, Text, Usage, sse
from minga.serve.schema import Ignored, Unsupported, invalid, needs

if TYPE_CHECKING:
    from minga.data.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 16  # OpenAI's

Ids = Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1, fail_fast=True)]


class CompletionBody(SamplingFields):
    model_config = ConfigDict(json_schema_extra=needs("stream_options", stream=True))

    model: str | None = None
    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=MAX_CHOICES)] = Field(
        description="A text, the ids of its tokens, or a list of either: then each has its own answers."
    )
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="16 if left out.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    watermark: bool | None = None
    prompt_cache_key: str | None = None
    user: Ignored = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = Field(None, description="1 only; see `scaling` of the chat.")
    suffix: Unsupported = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def generation(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "it needs `stream` set to true")
        first, *others = self.prompts
        if self.echo and not isinstance(first, str):
            raise invalid("echo", "it needs prompts that are texts")
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise invalid("n", f"{len(self.prompts)} prompts with {self.n} answers each are more than {MAX_CHOICES}")
        return Generation(
            sampling=self.sampling(logprobs=self.logprobs),
            prompt=first,
            more_prompts=tuple(others),
            max_tokens=self.max_tokens,
            default_max_tokens=_DEFAULT_MAX_TOKENS,
            num_choices=self.n or 1,
            format=answer_format(None, self.structured_outputs),
            watermark=bool(self.watermark),
            salt=self.prompt_cache_key or "",
            field="prompt",
        )


class CompletionWriter:
    """The answer as `text_completion`; the parts of a stream have the same shape."""

    def __init__(self, body: CompletionBody, model: str, tokenizer: Tokenizer):
        self.stream = bool(body.stream)
        self._usage_wanted = body.stream_options is not None and bool(body.stream_options.include_usage)
        # before each answer
        self._echoes = [str(prompt) if body.echo else "" for prompt in body.prompts for _ in range(body.n or 1)]
        self._logprobs_wanted = body.logprobs is not None
        self._tokenizer = tokenizer
        self._lengths = [len(echo) for echo in self._echoes]  # of the text so far, for the offsets of tokens
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def document(self, outcome: Outcome) -> dict[str, Any]:
        choices = [
            self._choice(index, self._echoes[index] + choice.text, choice.logprobs, choice.finish_reason)
            for index, choice in enumerate(outcome.choices)
        ]
        return {**self._head, "choices": choices, "usage": usage_document(outcome.usage), **extras(outcome)}

    def begin(self, usage: Usage) -> Iterator[bytes]:
        for index, echo in enumerate(self._echoes):
            if echo:
                yield self._chunk([self._choice(index, echo, [], None)])

    def event(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Text):
            yield self._chunk([self._choice(event.choice, event.text, event.logprobs or [], None)])
        elif isinstance(event, Finish):
            yield self._chunk([self._choice(event.choice, "", [], event.reason)])

    def end(self, outcome: Outcome) -> Iterator[bytes]:
        if self._usage_wanted:
            yield sse({**self._head, "choices": [], "usage": usage_document(outcome.usage)})
        yield b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> Iterator[bytes]:
        yield sse(error.document())
        yield b"data: [DONE]\n\n"

    def _chunk(self, choices: list[Any]) -> bytes:
        no_usage = {"usage": None} if self._usage_wanted else {}
        return sse({**self._head, "choices": choices} | no_usage)

    def _choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish_reason: str | None
    ) -> dict[str, Any]:
        document = self._logprobs(index, logprobs) if self._logprobs_wanted else None
        return {"index": index, "text": text, "logprobs": document, "finish_reason": finish_reason}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Parallel lists, as this older API has them."""
        offsets, at = [], self._lengths[index]
        for token in logprobs:
            offsets.append(at)
            at += len(self._spelled(token.token_id))
        self._lengths[index] = at
        return {
            "tokens": [self._spelled(token.token_id) for token in logprobs],
            "token_logprobs": [max(token.logprob, -9999.0) for token in logprobs],
            "top_logprobs": [{self._spelled(id): max(p, -9999.0) for id, p in token.top} for token in logprobs],
            "text_offset": offsets,
        }

    def _spelled(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")
