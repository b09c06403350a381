"""Shards -> batches: an endless training stream that stops and resumes anywhere, and one exact pass for evaluation.

Training. An epoch lays windows of `seq_len` inputs end to end over the split, which is taken as a ring: it starts at a
random token, so that window borders fall elsewhere in every epoch, and goes once around (a rest shorter than a window
is left over). The windows are read in a random order. Both are drawn from (seed, epoch) alone, so the whole stream is
a function of one number, the count of windows handed out, and that number is all the state there is. Batches run on
across the end of an epoch. A batch may have shorter rows: each window is then cut into several, so the stream and its
state stay the same. Threads may read ahead (`workers`); since what they read depends on that number alone, it changes
nothing but the time.

Evaluation. The split once, in order, each token scored once. The ring makes the end-of-text token that closes the split
the context of its first token, so the first token of every document is paid for like any other, and

    bits per byte = sum of -log p over all targets / ln 2 / bytes of the text

is honest: the model pays for every byte and for ending each document, and the bytes are those of the text alone.
Contexts are cut at rows of `seq_len`, so it is an upper bound: a longer row can only know more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minga.data.packing import MASKED, Batch, pack
from minga.data.shards import Shards
from minga.errors import UserError


class Loader:
    """An infinite iterator of batches of `batch_size` rows of `seq_len` inputs, with `num_extra` targets for each.

    `num_extra` is 1 for the next token alone, plus one for each multi-token prediction module. `workers` threads keep
    as many batches ready. `part`: (rank, number) of the processes that share each batch: this one gets its part of the
    rows, and all of them stand at the same place of the same stream; the number must divide `batch_size`. Raises
    `UserError` if the split has less than one batch.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        num_extra: int = 1,
        split: str = "train",
        workers: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        _check_sizes(batch_size=batch_size, seq_len=seq_len, num_extra=num_extra)
        num_rows = batch_size // part[1]
        assert num_rows * part[1] == batch_size
        self._rows = range(part[0] * num_rows, (part[0] + 1) * num_rows)
        self._tokens = shards.tokens(split)
        self._eos_id = shards.manifest.eos_id
        self.batch_size, self.seq_len, self.num_extra, self.seed = batch_size, seq_len, num_extra, seed
        self._identity = {"corpus": shards.manifest.fingerprint, "split": split, "seq_len": seq_len, "seed": seed}
        self.windows_per_epoch = len(self._tokens) // seq_len
        if self.windows_per_epoch < batch_size or len(self._tokens) < seq_len + num_extra:
            raise UserError(
                f"the {split} split has {len(self._tokens)} tokens, less than one batch of {batch_size} x {seq_len} "
                f"({shards.path}). add text, or use a smaller batch or context"
            )
        self._num_windows = 0  # handed out so far: the whole state
        self._order: tuple[int, int, np.ndarray] = (-1, 0, np.empty(0, np.int64))  # of one epoch, drawn when it begins
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, "loader") if workers else None
        self._ahead: dict[tuple[int, int], Future[Batch]] = {}  # by first window and tokens a row

    @property
    def epoch(self) -> float:
        """How many times the split has been read, in windows."""
        return self._num_windows / self.windows_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next_batch()

    def next_batch(self, seq_len: int | None = None) -> Batch:
        """The next `batch_size` windows, each as rows of `seq_len` inputs; it divides the loader's, and is that if None."""
        length = seq_len or self.seq_len
        assert self.seq_len % length == 0, "a window must split into whole rows"
        ready = self._ahead.pop((self._num_windows, length), None)
        batch = ready.result() if ready else self._read(self._starts(self._num_windows, length), length)
        self._num_windows += self.batch_size
        if self._pool is not None:
            coming = [(self._num_windows + i * self.batch_size, length) for i in range(self._workers)]
            self._ahead = {  # what was read ahead for another length or another place is dropped
                key: self._ahead.get(key) or self._pool.submit(self._read, self._starts(*key), length) for key in coming
            }
        return batch

    def _starts(self, window: int, length: int) -> list[int]:
        firsts = [self._start_of(window + row) for row in self._rows]
        return [first + inside for first in firsts for inside in range(0, self.seq_len, length)]

    def _read(self, starts: list[int], length: int) -> Batch:
        return pack(
            read_windows(self._tokens, starts, length + self.num_extra), eos_id=self._eos_id, num_extra=self.num_extra
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, small and fit for JSON."""
        return {**self._identity, "num_windows": self._num_windows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state` was taken; the batch size may differ. Raises `UserError` for another stream."""
        for name, ours in self._identity.items():
            if state.get(name) != ours:
                change = (
                    "the corpus has changed" if name == "corpus" else f"{name} was {state.get(name)} and is now {ours}"
                )
                raise UserError(f"{change} since the checkpoint (data). resume with the same, or start a new run")
        self._num_windows = int(state["num_windows"])

    def _start_of(self, window: int) -> int:
        epoch, index = divmod(window, self.windows_per_epoch)
        if self._order[0] != epoch:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            offset = int(generator.integers(len(self._tokens)))
            self._order = epoch, offset, generator.permutation(self.windows_per_epoch)
        _, offset, order = self._order
        return offset + int(order[index]) * self.seq_len


def evaluation_batches(
    shards: Shards,
    *,
    batch_size: int,
    seq_len: int,
    num_extra: int = 1,
    split: str = "val",
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """The split once, in order: each token is the target of depth 0 exactly once; `Batch.num_bytes` is their text.

    Over the whole split the `num_bytes` add up to the manifest's (for a tokenizer that normalises, to the normalised
    text's). `max_tokens` takes only as many rows as hold that many targets, evenly spread over the split, because its
    documents stand in the order of their sources; `num_bytes` is still exact. The last row of the split is filled up
    with masked targets, and the last batch may have fewer rows. Raises `UserError` if the split is empty.
    """
    _check_sizes(batch_size=batch_size, seq_len=seq_len, num_extra=num_extra)
    tokens = shards.tokens(split)
    if not len(tokens):
        raise UserError(
            f"the {split} split is empty ({shards.path}). rebuild it with `minga data --val-fraction 0.05 --force`"
        )
    num_rows = -(-len(tokens) // seq_len)
    wanted = num_rows if max_tokens is None else min(num_rows, -(-max_tokens // seq_len))
    rows = [index * num_rows // wanted for index in range(wanted)]
    return _evaluation_batches(shards, tokens, rows, batch_size, seq_len, num_extra)


def _evaluation_batches(
    shards: Shards, tokens: np.ndarray, all_rows: list[int], batch_size: int, seq_len: int, num_extra: int
) -> Iterator[Batch]:
    for first in range(0, len(all_rows), batch_size):
        rows = all_rows[first : first + batch_size]
        # A row's first input is the token before its first target; the ring puts the last end-of-text before token 0.
        window_BL = read_windows(tokens, [row * seq_len - 1 for row in rows], seq_len + num_extra)
        batch = pack(window_BL, eos_id=shards.manifest.eos_id, num_extra=num_extra)
        targets_KBT = _mask_from(batch.targets_KBT, rows, len(tokens))
        scored = targets_KBT[0][targets_KBT[0] != MASKED].numpy()
        yield replace(batch, targets_KBT=targets_KBT, num_bytes=int(shards.token_num_bytes[scored].sum()))


def read_windows(tokens: np.ndarray, starts: list[int], length: int) -> Tensor:
    """(B, length) int64: the tokens from each start on, around the ring."""
    index_BL = np.asarray(starts, np.int64)[:, None] + np.arange(length)
    return torch.from_numpy(np.asarray(tokens.take(index_BL, mode="wrap"), np.int64))


def _mask_from(targets_KBT: Tensor, rows: Sequence[int], end: int) -> Tensor:
    """Masks the targets at or after token `end` of the split: those that fill up the last row."""
    num_depths, _, seq_len = targets_KBT.shape
    first_B = torch.tensor(rows) * seq_len
    index_KBT = torch.arange(num_depths)[:, None, None] + first_B[:, None] + torch.arange(seq_len)
    return torch.where(index_KBT < end, targets_KBT, MASKED)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name} is {value} (data). it must be at least 1")
