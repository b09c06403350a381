"""`LLM`: a model with its tokenizer, ready to answer.

    llm = LLM("path")
    llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=64))[0].text
    for delta in llm.stream_chat([{"role": "user", "content": "Why?"}]): print(delta.text, end="")

Prompts run side by side, as many at a time as `max_memory` allows and never more than `MAX_BATCH`; those that take
alike much room run together. An `LLM` is not thread-safe: callers hold a lock.
"""

from __future__ import annotations

import logging
import re
from collections import abc
from collections.abc import Generator, Iterator
from itertools import chain
from os import PathLike
from time import perf_counter
from typing import Any, Literal

from minga.config import ModelConfig
from minga.data.tokenizer import Tokenizer
from minga.engine.compiled import CompiledModel, compile_model
from minga.engine.runner import Runner, Stats
from minga.engine.sampler import SamplingParams
from minga.engine.sequence import Completion, Delta, Sequence
from minga.engine.speculative import Payoff
from minga.errors import UserError
from minga.model.cache import Cache
from minga.model.transformer import Transformer
from minga.quant.blocks import format_of
from minga.store import load, load_tokenizer

MAX_BATCH = 64  # beyond it a CPU gains nothing, and a cache of many unfinished answers only takes room
MAX_DRAFTS = 4
DEFAULT_PARAMS = SamplingParams()
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}

_LOG = logging.getLogger("minga")

Messages = abc.Sequence[abc.Mapping[str, Any]]


class LLM:
    """Opens a model folder, a run folder or a `.gguf` file.

    quant: "int8" or "int4" holds the weights in few bits. speculate: guess ahead where the model has multi-token
    prediction, with `num_drafts` guesses a step; what is greedy stops guessing where that turns out slower, unless it is
    "always". max_memory: bytes, or a text such as "4GB", for weights and cache together; activations come on top. Raises
    `UserError` for what cannot be opened or does not fit.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        quant: str | None = None,
        speculate: bool | Literal["always"] = True,
        num_drafts: int = 1,
        max_memory: int | str | None = None,
    ):
        self._set_up(load(path, quant=quant), load_tokenizer(path), speculate, num_drafts, max_memory)

    @classmethod
    def from_parts(
        cls,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        speculate: bool | Literal["always"] = True,
        num_drafts: int = 1,
        max_memory: int | str | None = None,
    ) -> LLM:
        """An engine around a model in memory, such as one in training. Generating leaves the model in `eval` mode."""
        llm = cls.__new__(cls)
        llm._set_up(model, tokenizer, speculate, num_drafts, max_memory)
        return llm

    def _set_up(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        speculate: bool | Literal["always"],
        num_drafts: int,
        max_memory: int | str | None,
    ) -> None:
        if type(num_drafts) is not int or not 1 <= num_drafts <= MAX_DRAFTS:
            raise UserError(f"num_drafts is {num_drafts!r} (LLM). it must be a whole number from 1 to {MAX_DRAFTS}")
        self.model, self.tokenizer = model, tokenizer
        self._payoff = None if speculate == "always" else Payoff()
        self.num_drafts = num_drafts if speculate and self.config.num_nextn_predict_layers else 0
        self.stats = Stats()
        self._stop_ids = frozenset({*self.config.eos_token_ids, *tokenizer.eos_ids})
        self._max_memory = None if max_memory is None else _parse_bytes(max_memory)
        self._weight_bytes = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
        self._compiled: Transformer | CompiledModel | None = None
        kept = self._fast_model().cache_dtype
        self._cache_bytes_per_token = Cache(model.config, 1, 1, dtype=kept, device="meta").bytes_per_token
        self._num_fitting(length=1)  # refuses a model whose weights alone are too large

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def max_context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.config.max_position_embeddings

    # ------------------------------------------------------------------ the four ways to ask

    def generate(
        self,
        prompts: str | list[str] | list[list[int]],
        params: SamplingParams | list[SamplingParams] = DEFAULT_PARAMS,
    ) -> list[Completion]:
        """Continues each prompt, a text or its token ids; `params` are one for all or one for each.

        Control tokens spelled out in a text stay text; give ids to have them. Raises `UserError` before any work where
        a prompt does not fit the context or the memory.
        """
        began = perf_counter()
        asked: list[str | list[int]] = [prompts] if isinstance(prompts, str) else [*prompts]
        each = params if isinstance(params, list) else [params] * len(asked)
        if len(each) != len(asked):
            raise UserError(
                f"{len(asked)} prompts have {len(each)} params (generate). give one for all or one for each"
            )
        sequences = [self._sequence(prompt, param) for prompt, param in zip(asked, each, strict=True)]
        self._num_fitting(max((sequence.max_length for sequence in sequences), default=1))
        for _ in self._run(sequences, began):
            pass
        return [sequence.completion() for sequence in sequences]

    def stream(self, prompt: str | list[int], params: SamplingParams = DEFAULT_PARAMS) -> Generator[Delta, None, None]:
        """Continues one prompt and gives what each step adds. Closing the generator ends the work.

        Raises `UserError` at the call, not at the first delta.
        """
        began = perf_counter()
        sequence = self._sequence(prompt, params)
        self._num_fitting(sequence.max_length)
        return (sequence.take_delta() for _ in self._run([sequence], began))

    def chat(self, messages: Messages, params: SamplingParams = DEFAULT_PARAMS) -> Completion:
        """Answers a conversation, a list of {"role", "content"}, through the model's chat template."""
        return self.generate([self.tokenizer.render_chat(messages)], params)[0]

    def stream_chat(self, messages: Messages, params: SamplingParams = DEFAULT_PARAMS) -> Generator[Delta, None, None]:
        """`chat` as a stream."""
        return self.stream(self.tokenizer.render_chat(messages), params)

    # ------------------------------------------------------------------ prompts

    def _sequence(self, prompt: str | list[int], params: SamplingParams) -> Sequence:
        ids = self._encode(prompt)
        if len(ids) >= self.max_context:
            raise UserError(
                f"the prompt has {len(ids)} tokens and the model's context {self.max_context}, which must hold the "
                f"answer too (prompt). shorten it to {self.max_context - 1} at most"
            )
        return Sequence(
            ids,
            params,
            stop_ids=frozenset() if params.ignore_eos else self._stop_ids,
            max_length=min(len(ids) + params.max_tokens, self.max_context),
            decoder=self.tokenizer.stream(),
        )

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, int):
            raise UserError("a prompt is a number (generate). give a list of texts, or a list of lists of token ids")
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise UserError("the prompt is empty and the model has no token to start with (prompt). give some text")
        if not all(0 <= token < self.config.vocab_size for token in (min(ids), max(ids))):
            raise UserError(
                f"the prompt has token ids from {min(ids)} to {max(ids)} and the model {self.config.vocab_size} tokens "
                "(prompt). use this model's own tokenizer"
            )
        return ids

    def encode(self, text: str) -> list[int]:
        """A plain prompt's ids, behind the token with which this model's texts begin.

        An empty text begins with the token that ends the one before, for models that know no other beginning.
        """
        tokenizer = self.tokenizer
        start = tokenizer.bos_id if tokenizer.add_bos else None
        if not text and start is None:
            start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        return [*([] if start is None else [start]), *tokenizer.encode(text)]

    # ------------------------------------------------------------------ running

    def _run(self, sequences: list[Sequence], began: float) -> Iterator[None]:
        """Runs all sequences to their end, wave after wave; yields after each call of the model."""
        self.stats = Stats()
        model = self._fast_model()
        for wave in self._waves(sequences):
            runner = Runner(model, wave, num_drafts=self.num_drafts, stats=self.stats, payoff=self._payoff)
            runner.prefill()
            self.stats.ttft = self.stats.ttft or perf_counter() - began
            yield
            while runner.running:
                runner.step()
                yield

    def _fast_model(self) -> Transformer | CompiledModel:
        """Float weights may be in training, so they are looked at anew each time; those in few bits do not change."""
        if self._compiled is None or format_of(self.model) is None:
            self._compiled = compile_model(self.model, _LOG.warning)
        return self._compiled

    def _waves(self, sequences: list[Sequence]) -> Iterator[list[Sequence]]:
        """The longest first, and as many at a time as fit beside each other at its length."""
        waiting = sorted(sequences, key=lambda sequence: sequence.max_length, reverse=True)
        while waiting:
            size = self._num_fitting(waiting[0].max_length)
            yield waiting[:size]
            waiting = waiting[size:]

    def _num_fitting(self, length: int) -> int:
        """How many sequences of `length` tokens the memory holds beside the weights; none is a `UserError`."""
        if self._max_memory is None:
            return MAX_BATCH
        cache = self._cache_bytes_per_token * (length + self.num_drafts)
        if self._weight_bytes + cache > self._max_memory:
            needed = f"{_in_words(self._weight_bytes)} of weights and {_in_words(cache)} of cache"
            raise UserError(
                f"a text of {length} tokens needs {needed}, and max_memory is {_in_words(self._max_memory)} (LLM). "
                "raise it, ask for fewer tokens, or take quant='int8'"
            )
        return min(MAX_BATCH, (self._max_memory - self._weight_bytes) // cache)


def _parse_bytes(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([KMGT]I?)?B?\s*", str(size), re.IGNORECASE)
    if match is None:
        raise UserError(f"max_memory is {size!r} (LLM). write it as 4GB, 512MB, 1.5GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def _in_words(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.2f} MB"
