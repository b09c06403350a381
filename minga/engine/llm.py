"""`LLM`: a model with its tokenizer, ready to answer.

    llm = LLM("path")
    llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=64))[0].text
    for delta in llm.stream_chat([{"role": "user", "content": "Why?"}]): print(delta.text, end="")

Requests run side by side, as many at a time as the cache has room for and never more than `MAX_BATCH`; they may come at any
time (`submit`, `step`), and what their prompts have in common with earlier ones is not read again. An `LLM` is not
thread-safe: callers hold a lock.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections import abc
from collections.abc import Generator, Iterator
from itertools import chain
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from minga.config import ModelConfig
from minga.config.units import parse_bytes
from minga.data.tokenizer import Tokenizer
from minga.engine.compiled import CompiledModel, compile_model
from minga.engine.grammar import Grammar, Grammars, Guide
from minga.engine.lookup import Lookup
from minga.engine.pace import Pace
from minga.engine.plain import PlainModel
from minga.engine.runner import Runner, Stats
from minga.engine.sampler import SamplingParams
from minga.engine.scheduler import MAX_BATCH, Entry
from minga.engine.sequence import Completion, Delta, Sequence
from minga.errors import UserError
from minga.model.cache import PAGE, Pages
from minga.model.transformer import Transformer
from minga.planner.counts import count_parameters, parameters_read
from minga.quant.blocks import format_of
from minga.runtime.disk import DiskMemory, read_speed
from minga.runtime.machine import free_memory
from minga.store import load_stored, load_tokenizer, weight_files

MAX_DRAFTS = 4
_PREFIX_BYTES, _PREFIX_TEXTS = 64 * 10**6, 4  # kept for prompts that may come again: so much, or so many whole contexts
_SHARE_FOR_WEIGHTS = 0.8  # of free memory; what is larger stays on the disk
_CACHE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
DEFAULT_PARAMS = SamplingParams()

_LOG = logging.getLogger("minga")

Messages = abc.Sequence[abc.Mapping[str, Any]]


class LLM:
    """Opens a model folder, a run folder or a `.gguf` file.

    quant: "int8", "int4" or "fp8" (block FP8; not compiled, slow on a CPU) holds the weights in few bits. speculate: guess
    ahead by multi-token prediction where the model has it, by what the text said before elsewhere, as long as it pays; the
    text is the same. "always": by the module, whether it pays or not. num_drafts: guesses a step at most; None: as many as
    pay (one, with "always"). cache: "float32", "float16" or "int8" for the numbers of the attention cache; None: as the
    weights are. max_memory: bytes, or a text such as "4GB", for weights and cache together; activations come on top; None: a
    quarter of what the machine has free for the cache. prefix_memory: of the cache, for prompts that may come again and are not
    read again then; None: four whole contexts, or 64 MB. Weights that memory does not hold stay on the disk. Raises `UserError`
    for what cannot be opened or does not fit.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        quant: str | None = None,
        speculate: bool | Literal["always"] = True,
        num_drafts: int | None = None,
        cache: str | None = None,
        max_memory: int | str | None = None,
        prefix_memory: int | str | None = None,
    ):
        disk = None if quant is not None else _disk_for(weight_files(path))
        model = load_stored(path, quant=quant, **({} if disk is None else {"empty": disk.empty}))
        self._set_up(model, load_tokenizer(path), speculate, num_drafts, cache, max_memory, prefix_memory, disk)
        self._weights_stay = True

    @classmethod
    def from_parts(
        cls,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        speculate: bool | Literal["always"] = True,
        num_drafts: int | None = None,
        cache: str | None = None,
        max_memory: int | str | None = None,
        prefix_memory: int | str | None = None,
    ) -> LLM:
        """An engine around a model in memory, such as one in training. Generating leaves the model in `eval` mode."""
        llm = cls.__new__(cls)
        llm._set_up(model, tokenizer, speculate, num_drafts, cache, max_memory, prefix_memory, None)
        return llm

    def _set_up(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        speculate: bool | Literal["always"],
        num_drafts: int | None,
        cache: str | None,
        max_memory: int | str | None,
        prefix_memory: int | str | None,
        disk: DiskMemory | None,
    ) -> None:
        if num_drafts is not None and (type(num_drafts) is not int or not 1 <= num_drafts <= MAX_DRAFTS):
            raise UserError(f"num_drafts is {num_drafts!r} (LLM). it must be a whole number from 1 to {MAX_DRAFTS}")
        if cache is not None and cache not in _CACHE_DTYPES:
            raise UserError(f"cache is {cache!r} (LLM). it must be one of {', '.join(_CACHE_DTYPES)}")
        self.model, self.tokenizer = model, tokenizer
        self._stop_ids = frozenset({*self.config.eos_token_ids, *tokenizer.eos_ids})
        self._grammars = Grammars(tokenizer, self.config.vocab_size, self._stop_ids)
        self._weights_stay = format_of(model) is not None  # floats may be in training
        fast = compile_model(model, _LOG.warning, empty=torch.empty if disk is None else disk.empty)
        self.num_drafts = 0
        if speculate and self.config.num_nextn_predict_layers:
            self.num_drafts = num_drafts or (MAX_DRAFTS if speculate is True and fast.exact else 1)
        adapts = speculate is True and fast.exact  # elsewhere two tokens are rounded differently from one
        self._pace = Pace(self.num_drafts) if adapts else None
        self._lookup = Lookup() if adapts else None
        self._cache_dtype = fast.cache_dtype if cache is None else _CACHE_DTYPES[cache]
        self._max_memory = None if max_memory is None else parse_bytes(max_memory, "max_memory")
        self._prefix_memory = None if prefix_memory is None else parse_bytes(prefix_memory, "prefix_memory")
        self._weight_bytes = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
        if disk is not None:
            _LOG.warning("%s", _expected_pace(self.config, self._weight_bytes, disk))
        one = Pages(model.config, 1, dtype=self._cache_dtype, device="meta")
        self._page_bytes = one.bytes_per_token * PAGE
        num_pages = self._num_pages()
        self._refuse_too_long(1, num_pages)  # a model whose weights alone are too large
        self._pages = Pages(model.config, num_pages, dtype=self._cache_dtype, device=model.device)
        self._runner = self._make_runner(fast)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def stats(self) -> Stats:
        """Of what was done since the engine last had nothing to do."""
        return self._runner.stats

    @property
    def cache_bytes(self) -> tuple[int, int]:
        """Of the cache: what running texts take, and all there is."""
        pool = self._runner.scheduler.pool
        return (pool.num_pages - pool.num_free) * self._page_bytes, pool.num_pages * self._page_bytes

    @property
    def totals(self) -> Stats:
        """As `stats`, since the engine was made."""
        return self._runner.totals

    @property
    def max_context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.config.max_position_embeddings

    # ------------------------------------------------------------------ the four ways to ask

    def generate(
        self,
        prompts: str | list[str] | list[list[int]],
        params: SamplingParams | list[SamplingParams] = DEFAULT_PARAMS,
        *,
        salt: str = "",
    ) -> list[Completion]:
        """Continues each prompt, a text or its token ids; `params` are one for all or one for each. Requests share what their
        prompts have in common with those of the same salt.

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
        for _ in self._run(sequences, salt, began):
            pass
        return [sequence.completion() for sequence in sequences]

    def stream(
        self, prompt: str | list[int], params: SamplingParams = DEFAULT_PARAMS, *, salt: str = ""
    ) -> Generator[Delta, None, None]:
        """Continues one prompt and gives what each step adds. Closing the generator ends the work.

        Raises `UserError` at the call, not at the first delta.
        """
        began = perf_counter()
        sequence = self._sequence(prompt, params)
        return self._deltas(sequence, salt, began)

    def chat(self, messages: Messages, params: SamplingParams = DEFAULT_PARAMS) -> Completion:
        """Answers a conversation, a list of {"role", "content"}, through the model's chat template."""
        return self.generate([self.tokenizer.render_chat(messages)], params)[0]

    def stream_chat(self, messages: Messages, params: SamplingParams = DEFAULT_PARAMS) -> Generator[Delta, None, None]:
        """`chat` as a stream."""
        return self.stream(self.tokenizer.render_chat(messages), params)

    def embed(self, texts: list[str] | list[list[int]]) -> Tensor:
        """The mean of the model's last states over each text, of length 1: (N, D) float32.

        A measure of likeness that any model has; one that was trained for it has a better one. Raises `UserError` as
        `generate`.
        """
        entries = [self.submit_embedding(text) for text in texts]
        try:
            while any(not entry.sequence.finished for entry in entries):
                self.step()
        finally:
            for entry in entries:
                self.cancel(entry)
        return torch.stack([entry.embedding() for entry in entries])

    def submit_embedding(self, text: str | list[int]) -> Entry:
        """As `submit`; once its sequence is finished, its `embedding` is there."""
        sequence = self._sequence(text, SamplingParams(max_tokens=1))
        # what others have read has left no states
        entry = self._submit(sequence, salt=secrets.token_hex(16))
        entry.guesses = False
        entry.sum_D = torch.zeros(self.config.hidden_size, dtype=torch.float32, device=self.model.device)
        return entry

    # ------------------------------------------------------------------ prompts

    def _sequence(self, prompt: str | list[int], params: SamplingParams, marked: abc.Collection[int] = ()) -> Sequence:
        ids = self._encode(prompt)
        if len(ids) >= self.max_context:
            raise UserError(
                f"the prompt has {len(ids)} tokens and the model's context {self.max_context}, which must hold the "
                f"answer too (prompt). shorten it to {self.max_context - 1} at most"
            )
        max_length = min(len(ids) + params.max_tokens, self.max_context)
        self._refuse_too_long(max_length, self._pages.slots.shape[1])
        return Sequence(
            ids,
            params,
            stop_ids=frozenset() if params.ignore_eos else self._stop_ids,
            max_length=max_length,
            decoder=self.tokenizer.stream(marked=marked),
            guide=self._guide(params),
        )

    def _guide(self, params: SamplingParams) -> Guide | None:
        grammar, thinking = params.grammar, params.thinking
        if grammar is None and thinking is None:
            return None
        return Guide(
            grammar=None if grammar is None else self._grammars.compiled(grammar),
            triggers=frozenset() if grammar is None else grammar.triggers,
            thinking=thinking,
            vocab_size=self.config.vocab_size,
            force=params.logprobs is None,  # the probability of a forced token is not known before it is read
        )

    def check_grammar(self, grammar: Grammar) -> None:
        """Raises `UserError` where it does not compile for this model. Other threads may run the engine meanwhile."""
        self._grammars.compiled(grammar)

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

    def submit(
        self,
        prompt: str | list[int],
        params: SamplingParams = DEFAULT_PARAMS,
        *,
        salt: str = "",
        marked: abc.Collection[int] = (),
    ) -> Entry:
        """Queues a prompt beside those that run; `step` goes on with all, and `entry.sequence` has the answer so far.

        marked: tokens that have a mark in the text, for `Tokenizer.split_marks`.
        """
        return self._submit(self._sequence(prompt, params, marked), salt)

    def step(self) -> None:
        """Everyone who runs gets some tokens, and some of what waits is read. Nothing, where there is nothing to do."""
        runner = self._runner
        if runner.scheduler.busy:
            try:
                runner.step()
            except BaseException:
                runner.reset()
                raise

    def cancel(self, entry: Entry) -> None:
        """Nobody waits for this answer any more. Does nothing to one that is finished."""
        self._runner.scheduler.drop(entry)

    def _submit(self, sequence: Sequence, salt: str) -> Entry:
        if not self._runner.scheduler.busy:
            self._start_afresh()
        entry = Entry(sequence, salt)
        if not sequence.finished:  # rules may leave nothing to say
            self._runner.scheduler.add(entry)
        return entry

    def _start_afresh(self) -> None:
        """Counts from zero; where weights may be in training, looks at them anew and forgets what was read with the old."""
        self._runner.begin_stats()
        if not self._weights_stay:
            totals = self._runner.totals
            self._runner = self._make_runner(compile_model(self.model, _LOG.warning))
            self._runner.before = totals

    def _make_runner(self, model: PlainModel | CompiledModel) -> Runner:
        kept = self._prefix_memory
        if kept is None:
            kept = max(_PREFIX_BYTES, _PREFIX_TEXTS * self.max_context * self._page_bytes // PAGE)
        return Runner(
            model, self._pages, max_drafts=self.num_drafts, pace=self._pace, lookup=self._lookup,
            most_kept=kept // self._page_bytes,
        )  # fmt: skip

    def _deltas(self, sequence: Sequence, salt: str, began: float) -> Generator[Delta, None, None]:
        for _ in self._run([sequence], salt, began):
            yield sequence.take_delta()
        if sequence.failure is not None:
            raise sequence.failure

    def _run(self, sequences: list[Sequence], salt: str, began: float) -> Iterator[None]:
        """Runs all to their end, beside whatever else runs; yields where they have got something."""
        entries = [self._submit(sequence, salt) for sequence in sequences]
        try:
            seen = sum(sequence.length for sequence in sequences)
            while True:
                there = sum(sequence.length for sequence in sequences)
                if there > seen:  # perhaps by the steps of another stream
                    seen = there
                    self.stats.ttft = self.stats.ttft or perf_counter() - began
                    yield
                elif all(sequence.finished for sequence in sequences):
                    return
                elif not self._runner.scheduler.busy:
                    raise RuntimeError("a step failed while others waited for it, and this request was let go with it")
                else:
                    self.step()
        finally:
            for entry in entries:
                self.cancel(entry)

    # ------------------------------------------------------------------ memory

    def _num_pages(self) -> int:
        """As many as are ever needed at once, and as the memory holds beside the weights."""
        longest = -(-(self.max_context + self.num_drafts + 1) // PAGE)
        most = MAX_BATCH * longest
        if self._max_memory is not None:
            return min(most, max(0, self._max_memory - self._weight_bytes) // self._page_bytes)
        return max(longest, min(most, free_memory(self.model.device) // 4 // self._page_bytes))

    def _refuse_too_long(self, length: int, num_pages: int) -> None:
        """A text that would not fit even alone."""
        pages = -(-(length + self.num_drafts + 1) // PAGE)
        if self._max_memory is not None and (pages > num_pages or self._weight_bytes > self._max_memory):
            needed = f"{_in_words(self._weight_bytes)} of weights and {_in_words(pages * self._page_bytes)} of cache"
            raise UserError(
                f"a text of {length} tokens needs {needed}, and max_memory is {_in_words(self._max_memory)} (LLM). "
                "raise it, ask for fewer tokens, or take quant='int8'"
            )


def _disk_for(files: list[Path]) -> DiskMemory | None:
    """Room for weights that memory does not hold, twice over: as they come, and as the kernels read them."""
    size = sum(
        os.path.getsize(file) for file in files if os.path.exists(file)
    )  # what cannot be opened is refused later
    if size < _SHARE_FOR_WEIGHTS * free_memory(torch.device("cpu")):
        return None
    return DiskMemory(int(2.2 * size) + 2**23, read_speed(files[0]))


def _expected_pace(config: ModelConfig, size: int, disk: DiskMemory) -> str:
    free = free_memory(torch.device("cpu"))
    a_token = parameters_read(config, 1) / count_parameters(config).total_with_mtp * size
    missing = max(0.05, 1 - free / size)
    return (
        f"the weights take {_in_words(size)} and {_in_words(free)} of memory are free: they stay on the disk, and what is "
        f"used most in memory. expect about {disk.read_speed / (a_token * missing):.1f} tokens/s"
    )


def _in_words(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.2f} MB"
