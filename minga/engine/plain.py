"""A `Transformer` as the engine runs it where the compiled forward pass cannot be had: one torch operation at a time.

N tokens of several sequences, B sequences, T tokens of each, D model dim, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minga.engine.sampler import SamplingParams, choose, masked
from minga.model.cache import Cache
from minga.model.transformer import Transformer


class Tokens(NamedTuple):
    """N tokens, those of one sequence behind each other. sequence_N: which row of the cache's table each belongs to."""

    ids_N: Tensor
    positions_N: Tensor
    sequence_N: Tensor

    @classmethod
    def of(cls, parts: Sequence[tuple[Sequence[int], int, int]]) -> Tokens:
        """From (ids, position of the first, row of the table) for each sequence."""
        ids = [token for part, _, _ in parts for token in part]
        at = [position for part, first, _ in parts for position in range(first, first + len(part))]
        rows = [row for part, _, row in parts for _ in part]
        return cls(torch.tensor(ids), torch.tensor(at), torch.tensor(rows))


class PlainModel:
    """What `CompiledModel` is to the engine. Its rounding depends on what is computed together: see `exact`."""

    exact = False  # whether a token's numbers depend on its own sequence alone

    def __init__(self, model: Transformer):
        self.model = model.eval()
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.cache_dtype = model.dtype

    def hidden(self, tokens: Tokens, cache: Cache) -> Tensor:
        """The states after the last norm, (N, D); the tokens' rows are in the cache then."""
        grid, ids_BT, positions_BT, here = self._side_by_side(tokens, cache)
        return self.model.hidden(ids_BT, cache=here, positions_BT=positions_BT)[grid]

    def mtp_hidden(self, tokens: Tokens, hidden_ND: Tensor, cache: Cache) -> Tensor:
        """As `hidden`, of the first MTP module: `tokens` are the next ones, at the positions of the states."""
        grid, ids_BT, positions_BT, here = self._side_by_side(tokens, cache)
        hidden_BTD = hidden_ND.new_zeros(*ids_BT.shape, hidden_ND.shape[-1])
        hidden_BTD[grid] = hidden_ND
        last_B = torch.bincount(grid[0])[:, None] - 1
        columns = torch.arange(ids_BT.shape[1], device=self.device).expand(len(ids_BT), -1)
        hidden_BTD = hidden_BTD[torch.arange(len(ids_BT), device=self.device)[:, None], columns.minimum(last_B)]
        return self.model.mtp_hidden(0, ids_BT, hidden_BTD, cache=here, positions_BT=positions_BT)[grid]

    def head(self, hidden_ND: Tensor) -> Tensor:
        """Logits, (N, V)."""
        return self.model.head(hidden_ND)

    def choose(
        self,
        logits: list[Tensor],
        each: list[tuple[SamplingParams, list[tuple[int, int]]]],
        allowed: Sequence[list[Tensor] | None] | None = None,
    ) -> list[list[int]]:
        """For each sequence the tokens that its rows of logits (T, V) give. each: how, and seed and place of each draw;
        allowed: which tokens each row may give, see `sampler.masked`; None: all.
        """
        masks = [None] * len(logits) if allowed is None else allowed
        rows = [r if mask is None else masked(r, torch.stack(mask)) for r, mask in zip(logits, masks, strict=True)]
        return [choose(rows_TV, *how) for rows_TV, how in zip(rows, each, strict=True)]

    def _side_by_side(self, tokens: Tokens, cache: Cache) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Cache]:
        """Sequences as rows of one call, the shorter ones filled up with their own last token, whose numbers are the same
        again. First: where each of the N tokens is in it.
        """
        sequence_B, count_B = tokens.sequence_N.unique_consecutive(return_counts=True)
        start_B = count_B.cumsum(0) - count_B
        row_N = torch.arange(len(count_B)).repeat_interleave(count_B)
        column_N = torch.arange(len(row_N)) - start_B[row_N]
        column_BT = torch.arange(int(count_B.max())).expand(len(count_B), -1).minimum(count_B[:, None] - 1)
        which_BT = start_B[:, None] + column_BT
        here = Cache(cache.pages, cache.table_BP[sequence_B].to(self.device))
        grid = (row_N.to(self.device), column_N.to(self.device))
        return grid, tokens.ids_N[which_BT].to(self.device), tokens.positions_N[which_BT].to(self.device), here
