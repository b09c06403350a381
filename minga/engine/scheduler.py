"""Who runs next: requests come and go while others are being answered.

Requests are taken in the order of their arrival, as soon as there are pages for what they have to read. Where a running
text needs a page and none is free, the one that was taken last gives up its own and waits at the head of the queue: what
it had is read again later, which is exact, since a text's numbers do not depend on how it was read and its draws are those
of their places.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minga.engine.blocks import PagePool, page_names
from minga.engine.lookup import Grams
from minga.engine.sampler import adjust
from minga.engine.sequence import Sequence
from minga.engine.watermark import Marker
from minga.errors import UserError
from minga.model.cache import PAGE

MAX_BATCH = 64  # beyond it a CPU gains nothing, and a cache of many unfinished answers only takes room


@dataclass(eq=False)
class Entry:
    """A sequence as the engine knows it. Of its ids the first `num_read` have their rows in the cache."""

    sequence: Sequence
    salt: str = ""
    pages: list[int] = field(default_factory=list)
    row: int = -1  # of the table of pages; -1 while it waits
    num_read: int = 0
    reading: bool = True  # the prompt, or what was given up
    given_up: bool = False  # its pages, once at least
    # Guessing by the MTP module needs its rows for the whole text, and the tokens whose rows it does not have yet, behind
    # which states they came.
    guesses: bool | None = None  # None: not decided yet
    new_ids: list[int] = field(default_factory=list)
    state_TD: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    # Names of full pages by how many tokens beyond its end a page depends on: with the module's rows, one.
    names: tuple[list[bytes], list[bytes]] = field(default_factory=lambda: ([], []))
    num_published: int = 0
    grams: Grams = field(default_factory=Grams)
    marker: Marker | None = None
    sum_D: Tensor | None = None  # of the states of what was read, where they are wanted and no answer is

    def __post_init__(self) -> None:
        sequence = self.sequence
        if sequence.params.watermark is not None:
            self.marker = Marker(sequence.params.watermark, sequence.seed, sequence.num_prompt_tokens)

    @property
    def masks(self) -> bool:
        """Whether rules hold for its next token."""
        guide = self.sequence.guide
        return guide is not None and guide.masks

    @property
    def plain(self) -> bool:
        """Whether its next tokens follow from the logits alone, and nothing else is wanted of them."""
        params = self.sequence.params
        return params.logprobs is None and not params.adjusts and not self.masks and params.watermark is None

    @property
    def unread(self) -> list[int]:
        """The last token, behind those that were forced with it or before it."""
        return self.sequence.ids[self.num_read :]

    @property
    def can_guess(self) -> bool:
        """Whether the state is known from which the module guesses: not right after forced tokens, nor a dropped end."""
        return bool(self.new_ids) and self.num_read == self.sequence.length - 1

    def embedding(self) -> Tensor:
        """The mean of the states, of length 1: (D). Of an entry of `LLM.submit_embedding` that is finished."""
        assert self.sum_D is not None and self.sequence.finished
        return torch.nn.functional.normalize(self.sum_D.float(), dim=0).cpu()

    def draws(self, draft: list[int]) -> list[tuple[int, int]]:
        """Seed and place of the races for the next place, and for the one after each guess."""
        if self.marker is not None:
            return self.marker.draws(self.sequence.ids, draft)
        return [(self.sequence.seed, self.sequence.length + row) for row in range(len(draft) + 1)]

    def adjusted(self, logits_TV: Tensor, draft: list[int]) -> Tensor:
        sequence = self.sequence
        if sequence.params.adjusts:
            # row t follows the first t guesses; a single row follows all of them
            before = draft if len(logits_TV) == 1 else []
            prompt = sequence.ids[: sequence.num_prompt_tokens]
            logits_TV = adjust(
                logits_TV, sequence.params, prompt, sequence.answer_ids + before, [] if before else draft
            )
        return logits_TV

    def allowed(self, draft: list[int], num_places: int) -> list[Tensor] | None:
        """What the answer's rules let stand in the last places after each beginning of the draft; None: anything."""
        guide = self.sequence.guide
        if guide is None or not guide.masks or self.sequence.finished:
            return None
        try:
            return guide.allowed(draft, num_places)
        except UserError as error:
            self.sequence.fail(error)  # what is chosen for it will not be taken
            return None

    def names_of(self, num_pages: int, ahead: int) -> list[bytes]:
        known = self.names[ahead]
        page_names(self.sequence.ids, num_pages, salt=self.salt, page=PAGE, ahead=ahead, known=known)
        return known[:num_pages]


class Scheduler:
    """num_pages: of the cache. max_length: of a text, guesses included."""

    def __init__(self, num_pages: int, max_length: int):
        self.pool = PagePool(num_pages)
        self.waiting: deque[Entry] = deque()
        self.running: list[Entry] = []  # in the order in which they were taken
        # the pages of every running sequence; what stands behind them in a row is anything
        self.table_BP = torch.zeros(MAX_BATCH, -(-max_length // PAGE), dtype=torch.int64)
        self._rows = deque(range(MAX_BATCH))

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, entry: Entry) -> None:
        self.waiting.append(entry)

    def admit(self, should_guess: Callable[[], bool]) -> None:
        """Takes as many of those that wait as there is room for. should_guess: whether one keeps the MTP module's rows."""
        while self.waiting and self._rows:
            entry = self.waiting[0]
            length = entry.sequence.length
            if entry.guesses is None:
                entry.guesses = should_guess()
            # one token at least is read, or there would be nothing to choose the next one from
            found = self.pool.find(entry.names_of((length - 1) // PAGE, ahead=int(entry.guesses)))
            wanted = length // PAGE + 1 - len(found)
            if self.running and wanted + len(self.running) > self.pool.num_free:  # each may soon need a page
                self.pool.release(found)
                return
            self.waiting.popleft()
            entry.row, entry.reading = self._rows.popleft(), True
            entry.num_read, entry.num_published = len(found) * PAGE, len(found)
            if not entry.given_up:
                entry.sequence.num_cached_tokens = entry.num_read
            self._give(entry, found + [self.pool.take() for _ in range(wanted)])
            self.running.append(entry)

    def make_room(self, entry: Entry, length: int) -> bool:
        """Pages for `length` tokens of a running text; False if it had to give up its own."""
        while entry.row >= 0 and len(entry.pages) * PAGE < length:
            if self.pool.num_free:
                self._give(entry, [self.pool.take()])
            else:
                self._give_up(self.running[-1])
        return entry.row >= 0

    def has_room(self, entries: list[Entry], tokens: int) -> bool:
        """Whether each of them can go on for so many tokens without anyone giving up."""
        wanted = sum(max(0, -(-(e.sequence.length + tokens) // PAGE) - len(e.pages)) for e in entries)
        return wanted <= self.pool.num_free

    def publish(self, entry: Entry) -> None:
        """What is full can be found by others. The module's rows of the tokens that came last are still to come."""
        missing = max(1, len(entry.new_ids)) if entry.guesses else 0
        num_full = max(entry.num_published, (entry.num_read - missing) // PAGE)
        for ahead in (0, 1) if entry.guesses else (0,):
            names = entry.names_of(num_full, ahead)
            for index in range(entry.num_published, num_full):
                self.pool.publish(entry.pages[index], names[index])
        entry.num_published = num_full

    def drop(self, entry: Entry) -> None:
        """It is finished, or nobody waits for it any more."""
        if entry.row < 0:
            if entry in self.waiting:
                self.waiting.remove(entry)
            return
        self.publish(entry)
        self._leave(entry)

    def _give(self, entry: Entry, pages: list[int]) -> None:
        start = len(entry.pages)
        entry.pages += pages
        self.table_BP[entry.row, start : len(entry.pages)] = torch.tensor(pages, dtype=torch.int64)

    def _give_up(self, entry: Entry) -> None:
        self.publish(entry)
        self._leave(entry)
        entry.given_up = True
        self.waiting.appendleft(entry)

    def _leave(self, entry: Entry) -> None:
        self.running.remove(entry)
        self.pool.release(entry.pages)
        self._rows.append(entry.row)
        entry.pages, entry.row, entry.num_read, entry.num_published = [], -1, 0, 0
