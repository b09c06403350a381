"""The running batch: sequences of different lengths side by side in one cache.

Prompts are padded on the right and read in chunks; from then on each sequence stands at its own position. Whatever
padding or a wrong guess left in the cache lies beyond a sequence's end. Its own next tokens are written over it, and
until then no query looks that far, so neither ever changes an answer.

  B running sequences, T tokens of one call, D model dim, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minga.engine.compiled import CompiledModel
from minga.engine.sampler import distribution, token_logprobs
from minga.engine.sequence import Sequence
from minga.engine.speculative import Draft, Payoff, no_draft, propose, verify, verify_greedy
from minga.model.cache import Cache
from minga.model.transformer import Transformer

PREFILL_TOKENS = 2048  # of one call, all sequences together: bounds the activations, and is wide enough to be fast

BURST_SECONDS = 0.01  # of steps in one call
TRIAL_TOKENS = 16  # of a sequence, after which it is judged whether guessing pays


@dataclass
class Stats:
    """Counts and times of the latest call; times leave out what the reader of a stream does between two deltas."""

    num_sequences: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    ttft: float | None = None  # seconds from the call to the first token

    @property
    def acceptance(self) -> float | None:
        """Share of the guesses that stood; None where nothing was guessed."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all sequences together, without each one's first token, which is prefill's."""
        return (self.tokens - self.num_sequences) / self.decode_seconds if self.decode_seconds else None


class Runner:
    """`prefill` once, then `step` while anything is `running`. Leaves the model in evaluation mode.

    payoff: where it changes no text, guesses are given up for the wave once it is seen that they do not pay. None: they go on.
    """

    def __init__(
        self,
        model: Transformer | CompiledModel,
        sequences: list[Sequence],
        *,
        num_drafts: int,
        stats: Stats,
        payoff: Payoff | None = None,
    ):
        self.model = model.eval()
        self.running = list(sequences)
        # The same call must give the same text at every time of day. What is sampled takes random numbers for guesses too,
        # and torch rounds two tokens differently from one.
        same = isinstance(model, CompiledModel) and all(sequence.params.greedy for sequence in sequences)
        self._payoff = payoff if same else None
        self._trial: list[tuple[float, int]] = []  # seconds and tokens of steps with guesses, until it is decided
        if self._payoff is not None and num_drafts and not self._payoff.worth_a_try(len(sequences)):
            num_drafts = 0
        self.num_drafts = num_drafts
        self.stats = stats
        self.cache = Cache(
            model.config,
            len(sequences),
            max(sequence.max_length for sequence in sequences) + num_drafts,
            dtype=model.cache_dtype,
            device=model.device,
        )
        self._new_ids: list[list[int]] = []
        self._seconds_a_step = 0.0  # of the last one; 0 before the first
        self._hidden_BTD: Tensor

    @torch.inference_mode()
    def prefill(self) -> None:
        """Reads all prompts and adds the first token of every answer."""
        began = perf_counter()
        batch, device = len(self.running), self.model.device
        prompts = [torch.tensor(sequence.ids, device=device) for sequence in self.running]
        last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        ids_BT = pad_sequence(prompts, batch_first=True)
        next_BT = F.pad(ids_BT[:, 1:], (0, 1))
        hidden_B1D = torch.empty(batch, 1, self.model.config.hidden_size, dtype=self.model.dtype, device=device)
        all_columns = torch.arange(ids_BT.shape[1], device=device)
        for columns in torch.split(all_columns, max(1, PREFILL_TOKENS // batch)):
            positions_BT = columns.expand(batch, -1)
            hidden_BTD = self.model.hidden(ids_BT[:, columns], cache=self.cache, positions_BT=positions_BT)
            if self.num_drafts:  # the module's rows too; the last token's follows in `propose`, with its successor
                self.model.mtp_hidden(0, next_BT[:, columns], hidden_BTD, cache=self.cache, positions_BT=positions_BT)
            ends_here_BT = last_B[:, None] == columns
            hidden_B1D[ends_here_BT.any(1), 0] = hidden_BTD[ends_here_BT]
        self.stats.num_sequences += batch
        self.stats.prompt_tokens += sum(map(len, prompts))
        self._take(hidden_B1D, no_draft(self.model, batch))
        self.stats.prefill_seconds += perf_counter() - began

    @torch.inference_mode()
    def step(self) -> None:
        """One call of the model: each running sequence gains a token, and one more for every guess that was right."""
        began, before, batch = perf_counter(), self.stats.tokens, len(self.running)
        burst = self._burst_length()
        if burst > 1:
            self._burst(burst)
        else:
            draft = self._draft()
            self._take(self._read_last_and(draft), draft)
        seconds = perf_counter() - began
        self._seconds_a_step = seconds / max(1, burst)
        if self.num_drafts and self._payoff is not None and len(self.running) == batch:
            self._judge(seconds, self.stats.tokens - before)
        self.stats.decode_seconds += perf_counter() - began

    def _judge(self, seconds: float, tokens: int) -> None:
        """Compares the pace with guesses to that of plain steps, once there are enough of the former."""
        assert self._payoff is not None
        self._trial.append((seconds, tokens))
        batch = len(self.running)
        taken = sum(tokens for _, tokens in self._trial[1:])  # the first step warms up
        if taken < TRIAL_TOKENS * batch:
            return
        plain = self._plain_seconds()
        paid = taken * plain > batch * sum(seconds for seconds, _ in self._trial[1:])
        self._payoff.note(batch, paid=paid)
        if paid:
            self._payoff = None  # for the rest of this wave
        else:
            self.num_drafts = 0

    def _plain_seconds(self) -> float:
        """A step without guesses, taken for its time alone: it writes what is there already, or beyond every end."""
        assert isinstance(self.model, CompiledModel)
        began = perf_counter()
        ids_B = torch.tensor([sequence.ids[-1] for sequence in self.running])
        positions_B = torch.tensor([sequence.length - 1 for sequence in self.running])
        # a stride as long as those on trial, or the call itself would count for more in it
        steps = min(TRIAL_TOKENS // 2, self.cache.capacity - int(positions_B.max()))
        self.model.greedy(ids_B, positions_B, self.cache, steps=steps)
        return (perf_counter() - began) / steps

    def _burst_length(self) -> int:
        """Steps that are taken in one call where all is greedy: at most `BURST_SECONDS`, so that a stream still flows."""
        greedy = all(sequence.params.greedy and sequence.params.logprobs is None for sequence in self.running)
        if not (greedy and isinstance(self.model, CompiledModel) and self._seconds_a_step):
            return 1
        left = min(sequence.max_length - sequence.length for sequence in self.running)
        on_trial = self.num_drafts and self._payoff is not None
        most = TRIAL_TOKENS // 2 if on_trial else left  # a trial must end before the answer does
        return min(left // (self.num_drafts + 1), most, int(BURST_SECONDS / self._seconds_a_step))

    def _burst(self, steps: int) -> None:
        """What a sequence gets beyond its end is dropped."""
        assert isinstance(self.model, CompiledModel)
        positions_B = torch.tensor([sequence.length - 1 for sequence in self.running])
        if self.num_drafts:
            came, self._hidden_BTD = self.model.speculate(
                self._new_ids, self._hidden_BTD, positions_B, self.cache, num_drafts=self.num_drafts, steps=steps
            )
            self.stats.drafted += steps * self.num_drafts * len(self.running)
            self.stats.accepted += sum(len(new) - 1 for step in came for new in step)
        else:
            ids_B = torch.tensor([sequence.ids[-1] for sequence in self.running])
            came = [
                [[token] for token in row] for row in self.model.greedy(ids_B, positions_B, self.cache, steps).tolist()
            ]
        self._new_ids = came[-1]
        for row, sequence in enumerate(self.running):
            self.stats.tokens += sequence.extend([token for step in came for token in step[row]])
        self._drop_finished()

    def _draft(self) -> Draft:
        if self.num_drafts == 0:
            return no_draft(self.model, len(self.running))
        return propose(self.model, self.cache, self.running, self._new_ids, self._hidden_BTD, self.num_drafts)

    def _read_last_and(self, draft: Draft) -> Tensor:
        """Hidden states after the last token of each sequence and after each guess, (B, 1 + K, D)."""
        last_B1 = torch.tensor([sequence.ids[-1:] for sequence in self.running], device=self.model.device)
        position_B1 = torch.tensor([[sequence.length - 1] for sequence in self.running], device=self.model.device)
        ids_BT = torch.cat([last_B1, draft.ids_BK], 1)
        positions_BT = position_B1 + torch.arange(ids_BT.shape[1], device=self.model.device)
        return self.model.hidden(ids_BT, cache=self.cache, positions_BT=positions_BT)

    def _take(self, hidden_BTD: Tensor, draft: Draft) -> None:
        """Gives each sequence its new tokens and drops the sequences that are finished."""
        self._hidden_BTD = hidden_BTD
        self._new_ids = self._choose(self.model.head(hidden_BTD), draft)
        self.stats.drafted += draft.ids_BK.numel()
        self.stats.accepted += sum(len(new) - 1 for new in self._new_ids)
        self._drop_finished()

    def _choose(self, logits_BTV: Tensor, draft: Draft) -> list[list[int]]:
        """Extends each sequence by what its logits and its own sampling decide, and returns those tokens."""
        drafts, best = draft.ids_BK.tolist(), logits_BTV.argmax(-1).tolist()
        all_new = []
        for row, sequence in enumerate(self.running):
            params = sequence.params
            if params.greedy:
                new = verify_greedy(drafts[row], best[row])
            else:
                new = verify(drafts[row], draft.probs[row], distribution(logits_BTV[row], params), sequence.generator)
            logprobs = None if params.logprobs is None else token_logprobs(logits_BTV[row], new, params.logprobs)
            self.stats.tokens += sequence.extend(new, logprobs)
            all_new.append(new)
        return all_new

    def _drop_finished(self) -> None:
        kept = [row for row, sequence in enumerate(self.running) if not sequence.finished]
        if kept and len(kept) < len(self.running):
            rows = torch.tensor(kept, device=self.model.device)
            self.cache.select(rows)
            self._hidden_BTD = self._hidden_BTD[rows]
        self.running, self._new_ids = [self.running[row] for row in kept], [self._new_ids[row] for row in kept]
