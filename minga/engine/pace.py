"""How many guesses a step give the most tokens a second: measured, for batches of about one size.

Reading guesses wakes more experts, and a batch that keeps the processor busy leaves nothing to gain; how often they stand
depends on the text. So the first texts of a size try one guess, are compared with steps that have none, and go up as long
as more are faster. Where one is too many, guessing rests, ever longer; and all is tried again from time to time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TRIAL_TOKENS = 16  # of a sequence, after which a number of guesses is judged
_FRESH = 64  # texts for which a judgement holds


@dataclass
class _Size:
    """What is known of one size of batches. rates: tokens a second of a sequence, by the number of guesses."""

    now: int = 1
    rates: dict[int, float] = field(default_factory=dict)
    seen: list[tuple[float, float]] = field(default_factory=list)  # seconds and tokens of the steps on trial
    settled: bool = False
    left: int = 0  # texts until the next trial
    losses: int = 0  # in a row


class Pace:
    """max_drafts: guesses a step at most."""

    def __init__(self, max_drafts: int):
        self._max_drafts = max_drafts
        self._sizes: dict[int, _Size] = {}

    def worth_a_try(self, batch: int) -> bool:
        """Whether a text that begins now beside so many should be able to guess."""
        size = self._of(batch)
        if size.settled:
            size.left -= 1
            if size.left < 0:
                self._sizes[batch.bit_length()] = size = _Size(losses=size.losses)
        return size.now > 0

    def num_drafts(self, batch: int) -> int:
        return self._of(batch).now

    def on_trial(self, batch: int) -> bool:
        return not self._of(batch).settled

    def note(self, batch: int, seconds: float, tokens: float) -> bool:
        """Steps with the present number of guesses, tokens of each sequence. True: `compare` with none is due."""
        size = self._of(batch)
        if size.settled:
            return False
        size.seen.append((seconds, tokens))
        taken = sum(tokens for _, tokens in size.seen[1:])  # the first step warms up
        if taken < TRIAL_TOKENS:
            return False
        size.rates[size.now] = taken / sum(seconds for seconds, _ in size.seen[1:])
        size.seen = []
        if size.now == 1:
            return True
        self._go_on(size)
        return False

    def compare(self, batch: int, plain_rate: float) -> None:
        """plain_rate: tokens a second of a sequence without guesses, at this moment."""
        size = self._of(batch)
        size.rates[0] = plain_rate
        if size.rates[1] > plain_rate:
            size.losses = 0
            self._go_on(size)
        else:
            size.losses += 1
            size.now, size.settled, size.left = 0, True, min(2**size.losses, _FRESH)

    def _go_on(self, size: _Size) -> None:
        if size.rates[size.now] > size.rates[size.now - 1] and size.now < self._max_drafts:
            size.now += 1
            return
        size.now = max(size.rates, key=lambda num_drafts: size.rates[num_drafts])
        size.settled, size.left = True, _FRESH

    def _of(self, batch: int) -> _Size:
        return self._sizes.setdefault(batch.bit_length(), _Size())
