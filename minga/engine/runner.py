"""The steps of the engine: what is read and what is chosen in one call of the model.

A step reads some of the prompts that are not read yet, so that nobody waits long for those who came later, and then gives
every text whose prompt is read its next tokens. Where all that is asked of them is tokens and the forward pass is compiled,
several such steps are taken in one call.

  B sequences, N tokens of a call, T tokens of a sequence, D model dim, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from time import perf_counter

import torch

from minga.engine.compiled import CompiledModel
from minga.engine.lookup import Lookup
from minga.engine.pace import TRIAL_TOKENS, Pace
from minga.engine.plain import PlainModel, Tokens
from minga.engine.sampler import TokenLogprob, token_logprobs
from minga.engine.scheduler import Entry, Scheduler
from minga.engine.speculative import accepted, propose
from minga.model.cache import PAGE, Cache, Pages

PREFILL_TOKENS = {"cpu": 512}  # of one step, all prompts together: bounds what a running text waits
PREFILL_TOKENS_ELSEWHERE = 2048
BURST_SECONDS = 0.02  # of steps in one call
MOST_PENDING = 8  # tokens whose rows the module lacks, in a call of several steps: after forced ones there are more
MAX_LOOKING = 4  # texts side by side, beyond which guesses from the text are not worth the reading


@dataclass
class Stats:
    """Counts and times since the engine last had nothing to do; times leave out what a stream's reader does between deltas."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompts: found in the cache
    tokens: int = 0
    first_tokens: int = 0  # of them, those that came with the end of reading
    drafts: int = 0  # how often was guessed,
    drafted: int = 0  # how many tokens,
    accepted: int = 0  # and how many of them stood
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    preempted: int = 0  # texts that gave up their pages for others
    ttft: float | None = None  # seconds from the call to the first token

    def __add__(self, other: Stats) -> Stats:
        """Of both together; the time to the first token is of neither."""
        names = [field.name for field in fields(self) if field.name != "ttft"]
        return Stats(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def acceptance(self) -> float | None:
        """Share of the guesses that stood; None where nothing was guessed."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all sequences together, without the tokens that reading gave."""
        return (self.tokens - self.first_tokens) / self.decode_seconds if self.decode_seconds else None


class Runner:
    """`step` while the scheduler is busy.

    max_drafts: guesses a step by the MTP module, 0 for none. pace: how many of them pay; None: always that many.
    lookup: guesses by what the text said before; None: none. most_kept: pages for prompts that may come again; None: all.
    """

    def __init__(
        self,
        model: PlainModel | CompiledModel,
        pages: Pages,
        *,
        max_drafts: int = 0,
        pace: Pace | None = None,
        lookup: Lookup | None = None,
        most_kept: int | None = None,
    ):
        self.model = model
        self.max_drafts, self.pace, self.lookup = max_drafts, pace, lookup
        self.stats, self.before = Stats(), Stats()
        longest = model.config.max_position_embeddings + max_drafts + 1
        self.scheduler = Scheduler(pages.slots.shape[1], longest, most_kept)
        self.cache = Cache(pages, self.scheduler.table_BP)
        self._seconds_a_step: dict[tuple[int, int], float] = {}  # the last, by texts side by side and guesses

    @property
    def totals(self) -> Stats:
        return self.before + self.stats

    def begin_stats(self) -> None:
        """Counts from zero."""
        self.before, self.stats = self.totals, Stats()

    @torch.inference_mode()
    def step(self) -> None:
        """Every running sequence whose prompt is read gains a token, and one more for every guess that was right."""
        scheduler = self.scheduler
        scheduler.admit(self._should_guess)
        ready = [entry for entry in scheduler.running if not entry.reading]
        if len(ready) < len(scheduler.running):
            self._read([entry for entry in scheduler.running if entry.reading])
        for guesses in (True, False):
            group = [entry for entry in ready if entry.guesses == guesses]
            if group:
                self._go_on(group)

    def reset(self) -> None:
        """Lets go of everything, after a step that failed."""
        for entry in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.drop(entry)
        self.scheduler.pool.forget_all()  # what the step had written may be anything

    def _should_guess(self) -> bool:
        """Whether the text that begins now keeps the MTP module's rows."""
        if self.pace is None or self.max_drafts == 0:
            return self.max_drafts > 0
        return self.pace.worth_a_try(len(self.scheduler.running) + 1)

    # ------------------------------------------------------------------ reading

    def _read(self, entries: list[Entry]) -> None:
        """Some tokens of the prompts, the first come first; a prompt's end gives the answer's first token."""
        began = perf_counter()
        left = PREFILL_TOKENS.get(self.model.device.type, PREFILL_TOKENS_ELSEWHERE)
        parts: list[tuple[Entry, int, int]] = []
        ends, num = [], 0
        for entry in entries:
            count = min(left, entry.sequence.length - entry.num_read)
            if count == 0:
                break
            if entry.num_read == entry.sequence.num_cached_tokens and not entry.given_up:
                self.stats.cached_tokens += entry.num_read
            parts.append((entry, entry.num_read, entry.num_read + count))
            left, num = left - count, num + count
            ends.append(num - 1)
        tokens = Tokens.of([(e.sequence.ids[start:end], start, e.row) for e, start, end in parts])
        hidden_ND = self.model.hidden(tokens, self.cache)
        self._read_along(parts, hidden_ND)
        done = []
        for (entry, start, end), last in zip(parts, ends, strict=True):
            entry.num_read = end
            if entry.sum_D is not None:
                entry.sum_D += hidden_ND[last + 1 + start - end : last + 1].sum(0)
            if end < entry.sequence.length:
                self.scheduler.publish(entry)
            elif entry.sum_D is not None:
                entry.sequence.close()
                self.scheduler.drop(entry)
            else:
                entry.reading = False
                done.append((entry, last))
                self.scheduler.publish(entry)
        self.stats.prompt_tokens += num
        if done:
            for entry, _ in done:
                entry.new_ids = []
            self.stats.first_tokens += len(done)
            self._choose(
                [entry for entry, _ in done], [hidden_ND[last : last + 1] for _, last in done], [[] for _ in done]
            )
        self.stats.prefill_seconds += perf_counter() - began

    def _read_along(self, parts: list[tuple[Entry, int, int]], hidden_ND: torch.Tensor) -> None:
        """The MTP module's rows of what was read; the last token's follows with its successor."""
        mine: list[tuple[list[int], int, int]] = []
        rows: list[int] = []
        at = 0
        for entry, start, end in parts:
            known = min(end, entry.sequence.length - 1)
            if entry.guesses and known > start:
                mine.append((entry.sequence.ids[start + 1 : known + 1], start, entry.row))
                rows += range(at, at + known - start)
            at += end - start
        if mine:
            self.model.mtp_hidden(Tokens.of(mine), hidden_ND[rows], self.cache)

    # ------------------------------------------------------------------ going on

    def _go_on(self, group: list[Entry]) -> None:
        """The next tokens of texts that all guess by the module, or none of which does."""
        began = perf_counter()
        num_drafts = self._num_drafts(group)
        asked = len(group)
        group = [entry for entry in group if self.scheduler.make_room(entry, entry.sequence.length + num_drafts)]
        group = [entry for entry in group if entry.row >= 0]  # a later one's room may have been an earlier one's
        self.stats.preempted += asked - len(group)
        if not group:
            return
        if num_drafts == 0:
            for entry in group:
                entry.guesses = False  # from here on the module's rows are missing
        if num_drafts == 0 and (drafts := self._look_up(group)) is not None:
            self._take_looked_up(group, drafts)
        else:
            self._take_steps(group, num_drafts)
        self.stats.decode_seconds += perf_counter() - began

    def _num_drafts(self, group: list[Entry]) -> int:
        if not group[0].guesses:
            return 0
        return self.max_drafts if self.pace is None else self.pace.num_drafts(len(group))

    def _step(self, group: list[Entry], drafts: list[list[int]]) -> None:
        """One call of the model, which reads the last token of each text, those forced before it, and the guesses."""
        each = list(zip(group, drafts, strict=True))
        parts = [([*e.unread, *draft], e.num_read, e.row) for e, draft in each]
        states = self.model.hidden(Tokens.of(parts), self.cache).split([len(ids) for ids, _, _ in parts])
        self._choose(group, states, drafts)

    def _choose(self, group: list[Entry], states: Sequence[torch.Tensor], drafts: list[list[int]]) -> None:
        """Gives each text the tokens that its states and its own sampling choose: the last state of what was read, and those
        of the guesses.
        """
        counts = [len(draft) + 1 for draft in drafts]
        last = torch.cat([state_TD[-count:] for state_TD, count in zip(states, counts, strict=True)])
        logits = self.model.head(last).split(counts)
        adjusted = [e.adjusted(rows_TV, draft) for e, rows_TV, draft in zip(group, logits, drafts, strict=True)]
        how = [(entry.sequence.params, entry.draws(draft)) for entry, draft in zip(group, drafts, strict=True)]
        allowed = [entry.allowed(draft, len(draft) + 1) for entry, draft in zip(group, drafts, strict=True)]
        chosen = self.model.choose(adjusted, how, allowed)
        for entry, draft, tokens, state_TD, rows_TV in zip(group, drafts, chosen, states, logits, strict=True):
            num_top = entry.sequence.params.logprobs
            new = accepted(draft, tokens)
            logprobs = None if num_top is None else token_logprobs(rows_TV, new, num_top)
            self.stats.drafts += bool(draft)
            self.stats.drafted += len(draft)
            self.stats.accepted += len(new) - 1
            forced = entry.unread[1:]
            num_taken = self._extend(entry, new, logprobs)
            if entry.guesses:
                entry.state_TD = (
                    torch.cat([entry.state_TD[: len(entry.new_ids)], state_TD]) if entry.new_ids else state_TD
                )
                entry.new_ids = [*entry.new_ids, *forced, *new[:num_taken]]
            self._share(entry)

    def _extend(self, entry: Entry, tokens: list[int], logprobs: list[TokenLogprob] | None = None) -> int:
        """What a text gets beyond its end is dropped, and what was chosen by rules that hold no more. Returns how many tokens
        were taken: all of the text but the last of them, and what they force, has its rows.
        """
        before = entry.sequence.length
        num_taken = entry.sequence.extend(tokens, logprobs)
        self.stats.tokens += entry.sequence.length - before
        entry.num_read = before + num_taken - 1
        return num_taken

    def _share(self, entry: Entry) -> None:
        """Others can find what is full now; what is finished gives its place away."""
        if entry.sequence.finished:
            self.scheduler.drop(entry)
        elif entry.num_read // PAGE > entry.num_published:
            self.scheduler.publish(entry)

    def _take_steps(self, group: list[Entry], num_drafts: int) -> None:
        """One step, or several in one call; and a look at whether guesses pay."""
        began, before, size = perf_counter(), self.stats.tokens, len(group)
        alone = size == len(self.scheduler.running)
        steps = self._burst_length(group, num_drafts) if alone else 1
        if steps > 1:
            self._take_burst(group, num_drafts, steps)
        else:
            self._step(group, self._propose(group, num_drafts))
        seconds, tokens = perf_counter() - began, self.stats.tokens - before
        self._seconds_a_step[size, num_drafts] = seconds / steps
        rest = [entry for entry in group if entry.row >= 0]
        if not (num_drafts and alone and len(rest) == size and self._plain(group)) or self.pace is None:
            return
        if self.pace.note(size, seconds, tokens / size) and self.scheduler.has_room(rest, TRIAL_TOKENS // 2):
            self.pace.compare(size, 1 / self._plain_seconds(rest))

    def _propose(self, group: list[Entry], num_drafts: int) -> list[list[int]]:
        """Guesses for those texts of which the module knows the last state."""
        able = [entry for entry in group if entry.can_guess] if num_drafts else []
        guesses = iter(propose(self.model, self.cache, able, num_drafts) if able else [])
        drafts = [next(guesses) if entry in able else [] for entry in group]
        for entry in able:
            entry.new_ids = []  # their rows are written
        return drafts

    def _plain(self, group: list[Entry]) -> bool:
        """Whether several steps may be one call."""
        return self.model.exact and all(entry.plain and len(entry.unread) == 1 for entry in group)

    # ------------------------------------------------------------------ several steps in one call

    def _burst_length(self, group: list[Entry], num_drafts: int) -> int:
        """Steps that are taken in one call: at most `BURST_SECONDS`, so that a stream still flows and nobody waits long."""
        seconds = self._seconds_a_step.get((len(group), num_drafts))
        if seconds is None or not self._plain(group):
            return 1
        if num_drafts and not all(entry.can_guess and len(entry.new_ids) <= MOST_PENDING for entry in group):
            return 1
        left = min(entry.sequence.max_length - entry.sequence.length for entry in group)
        on_trial = num_drafts and self.pace is not None and self.pace.on_trial(len(group))
        most = TRIAL_TOKENS // 2 if on_trial else left  # a trial must end before the answer does
        steps = min(left // (num_drafts + 1), most, int(BURST_SECONDS / seconds))
        return steps if steps > 1 and self.scheduler.has_room(group, steps * (num_drafts + 1)) else 1

    def _take_burst(self, group: list[Entry], num_drafts: int, steps: int) -> None:
        assert isinstance(self.model, CompiledModel)
        for entry in group:
            self.scheduler.make_room(entry, entry.sequence.length + steps * (num_drafts + 1))
        came = self.model.decode(group, self.cache, num_drafts=num_drafts, steps=steps)
        for entry, each in zip(group, came, strict=True):
            self.stats.drafts += steps if num_drafts else 0
            self.stats.drafted += steps * num_drafts
            self.stats.accepted += sum(map(len, each)) - steps
            kept = self._extend(entry, [token for step in each for token in step])
            rest = kept - sum(map(len, each[:-1]))  # of the last step; the module has read what the others gave
            entry.new_ids = each[-1][:rest] if rest > 0 and num_drafts else []
            self._share(entry)

    def _plain_seconds(self, group: list[Entry]) -> float:
        """A step without guesses, taken for its time alone: what it writes lies beyond every end."""
        assert isinstance(self.model, CompiledModel)
        steps = TRIAL_TOKENS // 2  # a stride as long as those on trial, or the call itself would count for more in it
        for entry in group:
            self.scheduler.make_room(entry, entry.sequence.length + steps)
        began = perf_counter()
        self.model.decode(group, self.cache, num_drafts=0, steps=steps)
        return (perf_counter() - began) / steps

    # ------------------------------------------------------------------ guesses from the text itself

    def _look_up(self, group: list[Entry]) -> list[list[int]] | None:
        """Guesses for each, some perhaps none; None where there are none at all or they do not pay."""
        known = self._seconds_a_step.get((len(group), 0))
        if self.lookup is None or known is None or len(group) > MAX_LOOKING or not self.lookup.worth_a_try():
            return None
        drafts = []
        for entry in group:
            left = entry.sequence.max_length - entry.sequence.length - 1
            drafts.append(entry.grams.after(entry.sequence.ids)[: max(0, left)])
        longest = max(map(len, drafts))
        if not longest or not self.scheduler.has_room(group, longest):
            return None
        for entry in group:
            self.scheduler.make_room(entry, entry.sequence.length + longest)
        return drafts

    def _take_looked_up(self, group: list[Entry], drafts: list[list[int]]) -> None:
        assert self.lookup is not None
        began, before = perf_counter(), self.stats.tokens
        self._step(group, drafts)
        gained = (self.stats.tokens - before) / len(group)
        self.lookup.note(perf_counter() - began, worth=gained * self._seconds_a_step[len(group), 0])
