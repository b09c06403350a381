"""Answers that must follow rules: a grammar, a limit on thinking. The rules of one answer are its `Guide`.

A grammar is Lark as llguidance reads it, over bytes and control tokens. It compiles for a vocabulary into a matcher, which
says for each place which tokens may stand there: a mask. Where only one text can follow, its tokens are *forced*: they are
appended without asking the model, and read together with what comes next.

Thinking is free, and so is what comes before a trigger: there no mask is made, and the engine runs at its full speed. What
was chosen beyond the point where rules begin to hold, by a guess or in a call of several steps, is dropped there; so the text
is the same with guesses and without.

Grammars come from strangers too, so compiling and each mask have their fuel. Where it runs out, only the answer of that
grammar fails.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minga.data.dialects import regex_grammar
from minga.errors import UserError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from minga.data.tokenizer import Tokenizer

_KEPT = 256  # compiled grammars of a model
_MAX_TAKEN = 50_000  # tokens that answers have taken by them; each may leave some ten kilobytes behind in a hostile one
# Measured with hostile grammars: compiling ends within 0.4 s, and a mask within some tens of milliseconds. The size, of
# symbols, and the fuel for patterns are fractions of llguidance's own limits; a row holds a schema of 1,000 properties.
_LIMITS: dict[str, Any] = {
    "max_grammar_size": 50_000,
    "initial_lexer_fuel": 300_000,
    "max_items_in_row": 10_000,
    "max_lexer_states": 50_000,
}


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like, in llguidance's Lark. triggers: control tokens one of which begins it, and before which
    the answer is free; none: it holds from the first token that is no thought.
    """

    lark: str
    triggers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Thinking:
    """How an answer's thoughts are marked, as token ids. is_open: the prompt has begun them. budget: tokens between the marks,
    at which the end is forced; None: no limit. Without an end there is nothing to count or force. triggers_end: a trigger of
    the grammar ends them too; elsewhere it is a word that is thought.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    is_open: bool = False
    budget: int | None = None
    triggers_end: bool = False


@dataclass(eq=False)
class Compiled:
    """A grammar at its beginning. Its copies share what they find out about it, and that grows with the tokens they take."""

    matcher: LLMatcher
    num_taken: int = 0


class Grammars:
    """The grammars of one vocabulary, those compiled last kept, but for those that have grown too much."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]):
        self._tokenizer, self._vocab_size, self._stop_ids = tokenizer, vocab_size, sorted(stop_ids)
        self._compiled: OrderedDict[str, Compiled] = OrderedDict()
        self._lock = Lock()

    def compiled(self, grammar: Grammar) -> Compiled:
        """Raises `UserError` where it does not compile. Safe to call from several threads."""
        with self._lock:
            self._forget()
            known = self._compiled.get(grammar.lark)
        if known is not None:
            return known
        known = Compiled(self._compile(grammar.lark))
        with self._lock:
            self._compiled[grammar.lark] = known
            self._forget()
        return known

    def _forget(self) -> None:
        while len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        while sum(each.num_taken for each in self._compiled.values()) > _MAX_TAKEN:
            del self._compiled[max(self._compiled, key=lambda lark: self._compiled[lark].num_taken)]

    def _compile(self, lark: str) -> LLMatcher:
        matcher = _matcher(self._backend, lark)
        probe = matcher.deep_copy()
        probe.compute_bitmask()  # shows what allows nothing, or is too wide at its very beginning
        if probe.is_error():
            raise UserError(f"the grammar leaves no answer ({_first_line(probe.get_error())}). simplify it")
        return matcher

    @cached_property
    def _backend(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ModuleNotFoundError:
            raise UserError("llguidance is not installed (grammar). pip install 'minga[serve]'") from None
        # without a token that ends texts llguidance would take the last one of the vocabulary
        ends: Any = self._stop_ids or [self._vocab_size - 1]
        return LLTokenizer(self._tokenizer.json(), n_vocab=self._vocab_size, eos_token=ends)


class Pattern:
    """A regular expression from a stranger, to be looked for in texts. Unlike Python's, it takes bounded time for each byte."""

    def __init__(self, pattern: str):
        """Raises `UserError` where it does not compile."""
        from llguidance import LLTokenizer

        whole = "|".join(map(_anywhere, _alternatives(pattern)))
        self._matcher = _matcher(LLTokenizer("byte"), regex_grammar(whole))

    def found_in(self, text: str) -> bool:
        """Where its fuel runs out, it is taken for not found."""
        matcher, spelled = self._matcher.deep_copy(), text.encode("utf-8", "replace")
        return matcher.try_consume_tokens([*spelled]) == len(spelled) and matcher.is_accepting()


def _alternatives(pattern: str) -> list[str]:
    """The parts between the bars that are in no group and no class."""
    parts, depth, in_class, start, at = [], 0, False, 0, 0
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            at += 1
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        elif character == "|" and depth == 0:
            parts.append(pattern[start:at])
            start = at + 1
        depth += 0 if in_class else (character == "(") - (character == ")")
        at += 1
    return [*parts, pattern[start:]]


def _anywhere(part: str) -> str:
    """The part within any text, but for the anchors that it has."""
    inner = part.removeprefix("^")
    ends = inner.endswith("$") and (len(inner) - len(inner[:-1].rstrip("\\"))) % 2 == 1
    before = "" if part.startswith("^") else "(?s:.*)"
    return f"{before}({inner[:-1]})" if ends else f"{before}({inner})(?s:.*)"


def _matcher(backend: LLTokenizer, lark: str) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    matcher = LLMatcher(backend, lark, log_level=0, limits=LLParserLimits(verbose_errors=False, **_LIMITS))
    if matcher.is_error():
        raise UserError(f"the grammar does not compile ({_first_line(matcher.get_error())}). simplify it")
    return matcher


class Guide:
    """The rules of one answer, at its end so far. failure: why they cannot be followed further."""

    def __init__(
        self,
        *,
        grammar: Compiled | None,
        triggers: frozenset[int],
        thinking: Thinking | None,
        force: bool,
        vocab_size: int,
    ):
        self._grammar, self._matcher = grammar, None if grammar is None else grammar.matcher.deep_copy()
        self._triggers, self._thinking, self._force = triggers, thinking, force
        self._num_words = -(-vocab_size // 32)
        self._allowed: dict[tuple[int, ...], Tensor] = {}  # by the guesses before, as far as it was asked for
        self.num_thought = 0  # tokens between the marks
        self.failure: UserError | None = None
        self._is_thinking = thinking is not None and thinking.is_open
        self._may_think = thinking is not None and bool(thinking.start) and not thinking.is_open
        self._begun: list[int] = []  # of a mark, or since it
        # a mark of one token may come before any grammar
        self._may_open = thinking is not None and not thinking.is_open and len(thinking.start) == 1
        self._holds = grammar is not None and not triggers and not self._is_thinking

    @property
    def masks(self) -> bool:
        """Whether the grammar holds for the next token."""
        return self._holds

    @property
    def finished(self) -> bool:
        """Nothing can follow but the end."""
        return self.failure is not None or (self._holds and self._matcher is not None and self._matcher.is_stopped())

    def take(self, token: int) -> bool:
        """A token has come. False: what was chosen for the places after it was chosen by other rules."""
        self._allowed.clear()
        opens = self._may_open and self._thinking is not None and token == self._thinking.start[0]
        self._may_open = False
        if self._holds and not opens:
            assert self._matcher is not None and self._grammar is not None
            self._grammar.num_taken += 1
            if not self._matcher.consume_token(token):
                self._fail(self._matcher)
            return True
        self._holds = False
        ends_thoughts = token in self._triggers and self._thinking is not None and self._thinking.triggers_end
        if self._is_thinking and not ends_thoughts:
            self._think(token)
        elif self._may_think and self._begins_to_think(token):
            pass
        elif token in self._triggers and self._matcher is not None:
            self._is_thinking, self._holds = False, True
            self.take(token)
        return not (self._holds or self._is_over_budget)

    def forced(self) -> list[int]:
        """Tokens that must follow, each still to be taken."""
        if self._is_over_budget and self._thinking is not None:
            return list(self._thinking.end)
        if self._matcher is None or not self._holds or self._may_open or not self._force:
            return []
        forced = self._matcher.compute_ff_tokens()
        if self._matcher.is_error():
            self._fail(self._matcher)
        return forced

    def allowed(self, draft: list[int], num_places: int) -> list[Tensor]:
        """Which tokens may stand in the places after each beginning of the draft, the last `num_places` of them: (W) each, a
        bit a token, see `sampler.masked`. What follows a guess that may not stand, and will be dropped, is anything.
        """
        before = [tuple(draft[:place]) for place in range(len(draft) + 1)][-num_places:]
        if unknown := [guesses for guesses in before if guesses not in self._allowed]:
            self._look_ahead(draft, unknown)
        return [self._allowed[guesses] for guesses in before]

    def _look_ahead(self, draft: list[int], wanted: list[tuple[int, ...]]) -> None:
        """Fills in what may stand in the wanted places."""
        assert self._matcher is not None
        matcher, taken = self._matcher, 0
        missing = {guesses: torch.full((self._num_words,), -1, dtype=torch.int32) for guesses in wanted}
        for place in range(len(draft) + 1):
            row_W = missing.get(tuple(draft[:place]))
            if row_W is not None:
                matcher.unsafe_compute_mask_ptr(row_W.data_ptr(), row_W.nbytes)
                if place == 0 and self._may_open and self._thinking is not None:
                    _allow(row_W, self._thinking.start[0])
            if place < len(draft):
                if matcher.validate_tokens(draft[place : place + 1]) == 0:
                    break
                matcher.consume_token(draft[place])
                taken += 1
        if taken:
            matcher.rollback(taken)
        if matcher.is_error():
            self._fail(matcher)
        self._allowed |= missing

    def _fail(self, matcher: LLMatcher) -> None:
        """What comes now does not matter: the answer ends with it."""
        self.failure = UserError(f"the grammar cannot go on here ({_first_line(matcher.get_error())}). simplify it")

    # ------------------------------------------------------------------ thinking

    @property
    def _is_over_budget(self) -> bool:
        thinking = self._thinking
        return self._is_thinking and thinking is not None and bool(thinking.end) and self.num_thought == thinking.budget

    def _think(self, token: int) -> None:
        assert self._thinking is not None
        end = list(self._thinking.end)
        self._begun = [*self._begun, token][-len(end) :] if end else []
        self.num_thought += 1
        if end and self._begun == end:
            self.num_thought -= len(end)
            self._is_thinking, self._begun = False, []
            self._holds = self._matcher is not None and not self._triggers

    def _begins_to_think(self, token: int) -> bool:
        """Whether this token belongs to the mark that begins thoughts, which can only be an answer's first."""
        assert self._thinking is not None
        start = list(self._thinking.start)
        self._begun.append(token)
        if self._begun != start[: len(self._begun)]:
            self._may_think, self._begun = False, []
            return False
        if self._begun == start:
            self._may_think, self._is_thinking, self._begun = False, True, []
        return True


def _allow(words_W: Tensor, token: int) -> None:
    words_W.view(torch.uint8)[token // 8] |= 1 << token % 8


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0][:200]
