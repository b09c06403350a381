"""One prompt and its growing answer: when it ends, and how much of its text may already be shown.

An answer ends with a stop token (the model's end of text), a stop string, `max_tokens` or the end of the context. Text
is held back while it ends in half a character, or in what may become a stop string. So what was shown is never taken
back, and the pieces of a stream joined are the text of the completion.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from minga.data.tokenizer import DecodeStream
from minga.engine.grammar import Guide
from minga.engine.sampler import MAX_SEED, SamplingParams, TokenLogprob
from minga.errors import UserError


@dataclass(frozen=True)
class Delta:
    """What one step added. `finish_reason` is set in the last one: "stop" or "length"; `stop` too, if a stop string ended it."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[TokenLogprob] | None = None
    stop: str | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer. `token_ids` has the stop token if there was one; `text` has neither that nor the stop string."""

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = field(default=0, compare=False)  # of the prompt: read for an earlier request
    num_reasoning_tokens: int = 0  # of the answer: thought


class AnswerText:
    """The text of an answer as far as it may be shown."""

    def __init__(self, stop: tuple[str, ...]):
        self.shown = ""
        self.stopped_by: str | None = None
        self._stop = stop
        self._held = ""

    def push(self, piece: str) -> None:
        """Shows what cannot become part of a stop string any more; `stopped_by` is the first that is complete."""
        self._held += piece
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            self.shown, self._held = self.shown + self._held[:at], ""
            return
        safe = len(self._held) - self._length_of_a_beginning()
        self.shown, self._held = self.shown + self._held[:safe], self._held[safe:]

    def close(self) -> None:
        """The answer is over: what was held back is text after all."""
        self.shown, self._held = self.shown + self._held, ""

    def _length_of_a_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        beginnings = (stop[:length] for stop in self._stop for length in range(1, len(stop)))
        return max((len(start) for start in beginnings if self._held.endswith(start)), default=0)


class Sequence:
    """`ids` are prompt and answer; all but the last are in the cache, and the last is the model's next input.

    `max_length` bounds prompt and answer together. `guide`: the rules that the answer follows; what they force at its beginning
    is there from the first.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        stop_ids: frozenset[int],
        max_length: int,
        decoder: DecodeStream,
        guide: Guide | None = None,
    ):
        assert 0 < len(prompt_ids) < max_length
        self.ids = list(prompt_ids)
        self.num_prompt_tokens = len(prompt_ids)
        self.params = params
        self.max_length = max_length
        self.finish_reason: str | None = None
        self.failure: Exception | None = None  # why it goes no further, where that is neither its end nor a limit
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.seed = secrets.randbelow(MAX_SEED) if params.seed is None else params.seed
        self.num_cached_tokens = 0
        self.guide = guide
        self._stop_ids = stop_ids
        self._decoder = decoder
        self._text = AnswerText(tuple(params.stop))
        self._num_taken_characters, self._num_taken_tokens = 0, 0
        self.extend([])

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_reasoning_tokens(self) -> int:
        return 0 if self.guide is None else self.guide.num_thought

    @property
    def answer_ids(self) -> list[int]:
        return self.ids[self.num_prompt_tokens :]

    def extend(self, token_ids: list[int], logprobs: list[TokenLogprob] | None = None) -> int:
        """Appends one token after the other up to the one that finishes the answer, or after which other rules hold, and what
        these force. Returns how many of `token_ids` that were.
        """
        num_taken = 0
        goes_on = not self.finished
        try:
            while goes_on and num_taken < len(token_ids):
                num_taken += 1
                goes_on = self._append(token_ids[num_taken - 1])
            while self.guide is not None and not self.finished and (forced := self.guide.forced()):
                for token in forced:
                    if not self.finished:
                        self._append(token)
        except (UserError, RuntimeError) as error:
            self.fail(error)
        if self.logprobs is not None and logprobs is not None:
            self.logprobs += logprobs[:num_taken]
        return num_taken

    def fail(self, error: Exception) -> None:
        """This answer goes no further; others do. Whoever takes it gets the error."""
        self.failure = error
        self._finish("stop")

    def _append(self, token: int) -> bool:
        """False if nothing that was chosen for the places after it counts."""
        self.ids.append(token)
        if token in self._stop_ids:
            self._finish("stop")
            return False
        goes_on = self.guide is None or self.guide.take(token)
        self._text.push(self._decoder.push(token))
        if self._text.stopped_by is not None:
            self.finish_reason = "stop"
        elif self.guide is not None and self.guide.finished:
            self._finish("stop")
        elif self.length == self.max_length:
            self._finish("length")
        return goes_on and not self.finished

    def _finish(self, reason: str) -> None:
        self._text.push(self._decoder.flush())
        self._text.close()
        self.finish_reason = reason

    def close(self) -> None:
        """No answer is wanted."""
        self._finish("stop")

    def take_delta(self) -> Delta:
        """What was added since the last call. Raises what made the answer fail."""
        if self.failure is not None:
            raise self.failure
        text = self._text.shown[self._num_taken_characters :]
        token_ids = self.ids[self.num_prompt_tokens + self._num_taken_tokens :]
        logprobs = None if self.logprobs is None else self.logprobs[self._num_taken_tokens :]
        self._num_taken_characters += len(text)
        self._num_taken_tokens += len(token_ids)
        return Delta(text, token_ids, self.finish_reason, logprobs, self._text.stopped_by)

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        if self.failure is not None:
            raise self.failure
        return Completion(
            self._text.shown, self.answer_ids, self.finish_reason, self.logprobs, self.num_prompt_tokens,
            self.num_cached_tokens, self.num_reasoning_tokens,
        )  # fmt: skip
