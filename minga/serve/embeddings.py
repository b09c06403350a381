"""POST /v1/embeddings: the mean of a model's last states, of length 1."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from minga.errors import UserError
from minga.serve.answering import refuse_endless
from minga.serve.completions import Ids
from minga.serve.errors import ApiError
from minga.serve.schema import Body, Ignored, invalid
from minga.serve.worker import Job, Worker, refusal_of

if TYPE_CHECKING:
    from torch import Tensor

MAX_INPUTS = 256


class EmbeddingBody(Body):
    model: str | None = None
    input: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    ) = Field(description="A text, the ids of its tokens, or a list of either.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, description="The model's own size, and no other.")
    user: Ignored = None

    def inputs(self) -> list[str | list[int]]:
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)


async def embed(body: EmbeddingBody, worker: Worker, tenant: str) -> tuple[dict[str, Any], int, float]:
    """The document, the number of tokens that were read, and the seconds of the model's time.

    Cancelled, it leaves nothing running.
    """
    size = worker.llm.config.hidden_size
    if body.dimensions not in (None, size):
        raise invalid("dimensions", f"{worker.name} has {size}; leave it out")
    worker.refuse_if_full(tenant)
    prompts = await asyncio.to_thread(_prompts, body, worker)
    futures: list[asyncio.Future[Tensor]] = []
    jobs = []
    for ids in prompts:
        future: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        job = Job.to_embed(ids, future, tenant)
        futures.append(future)
        jobs.append(job)
        worker.submit(job)
    try:
        found = await asyncio.gather(*futures)
    except Exception as error:
        raise refusal_of(error, "input") from None
    finally:
        for job, future in zip(jobs, futures, strict=True):
            job.cancel()
            future.cancel()  # of one that is cancelled there is no embedding
    num_tokens = sum(map(len, prompts))
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector_D, body.encoding_format)}
        for index, vector_D in enumerate(found)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return (
        {"object": "list", "data": data, "model": worker.name, "usage": usage},
        num_tokens,
        sum(job.busy_seconds for job in jobs),
    )


def _prompts(body: EmbeddingBody, worker: Worker) -> list[list[int]]:
    prompts = []
    for index, text in enumerate(body.inputs()):
        field = "input" if isinstance(body.input, str) else f"input[{index}]"
        try:
            if isinstance(text, str):
                refuse_endless([text], worker, field)
            ids = worker.llm.encode(text) if isinstance(text, str) else text
        except UserError as error:
            raise ApiError(str(error), param=field, code="invalid_value") from None
        if not ids:
            raise invalid(field, "it is empty; send a text")
        if max(ids) >= worker.llm.config.vocab_size:
            raise invalid(field, f"{worker.name} has {worker.llm.config.vocab_size} tokens")
        if len(ids) >= worker.llm.max_context:
            raise ApiError(
                f"{field} has {len(ids)} tokens, and {worker.name} reads {worker.llm.max_context - 1} at most; cut it into parts",
                param=field, code="context_length_exceeded",
            )  # fmt: skip
        prompts.append(ids)
    return prompts


def _written(vector_D: Tensor, encoding_format: str | None) -> list[float] | str:
    """OpenAI's clients ask for base64 of little-endian float32 by themselves."""
    if encoding_format == "base64":
        return base64.b64encode(vector_D.numpy().astype("<f4").tobytes()).decode()
    numbers: list[float] = vector_D.tolist()
    return numbers
