"""Windows of the token stream -> inputs, targets and what attention may see.

A split is one stream of tokens in which every document ends with the end-of-text token. A model reads windows of it:
T inputs, and K further tokens, because target k of position t (k = 0: the next token; k >= 1: multi-token prediction
of depth k) is token t + k + 1.

Where documents meet in a window, nothing may leak from one into the other. The rule: **as an input, the end-of-text
token opens the document that follows it** (as a beginning-of-text token would); **as a target, it closes the one before
it**.

    stream      a1   a2   a3  <e>   b1   b2  <e>   c1
    segment      0    0    0    1    1    1    2    2      attention stays inside a segment
    position     0    1    2    0    1    2    0    1      and positions restart with it
    target 0    a2   a3  <e>   b1   b2  <e>   c1   ..      always inside: the first token of a document is predicted
    target 1    a3  <e>    -   b2  <e>    -   ..            from <e> alone, as when generating from nothing
                                                           `-` is masked (-100): it would skip over an end

So depth 0 masks nothing and every byte of a corpus is learned from and can be scored. Depth k is masked where the
tokens between input and target hold the end of the document.

    B batch, T inputs, K targets of each input, L = T + K tokens of a window
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

MASKED = -100  # the target that torch's cross-entropy leaves out


@dataclass(frozen=True)
class Batch:
    """What one step reads.

    `segments_BT` (0, 1, ... along each row) and `positions_BT` are None when every row lies inside one document: plain
    causal attention and positions 0..T-1 are right then, and faster. `num_bytes`, set by `evaluation_batches`, is the
    UTF-8 length of the text that the unmasked targets of depth 0 spell.
    """

    ids_BT: Tensor
    targets_KBT: Tensor
    segments_BT: Tensor | None
    positions_BT: Tensor | None
    num_bytes: int | None = None

    @property
    def num_targets(self) -> int:
        """Unmasked targets of depth 0."""
        return int((self.targets_KBT[0] != MASKED).sum())

    def to(self, device: torch.device | str) -> Batch:
        tensors = {name: getattr(self, name) for name in ("ids_BT", "targets_KBT", "segments_BT", "positions_BT")}
        return replace(self, **{name: t.to(device, non_blocking=True) for name, t in tensors.items() if t is not None})


def pack(window_BL: Tensor, *, eos_id: int, num_extra: int) -> Batch:
    """Splits windows of T + K tokens, K = `num_extra`, into a batch of T inputs with K targets each."""
    num_inputs = window_BL.shape[1] - num_extra
    assert min(num_extra, num_inputs) >= 1, "a window holds at least one input and its target"
    segments_BL = segment_ids(window_BL, eos_id=eos_id)
    targets_KBT = torch.stack([targets_at_depth(window_BL, segments_BL, num_inputs, depth=k) for k in range(num_extra)])
    segments_BT = segments_BL[:, :num_inputs]
    one_document = not bool(segments_BT.any())
    return Batch(
        ids_BT=window_BL[:, :num_inputs].contiguous(),
        targets_KBT=targets_KBT,
        segments_BT=None if one_document else segments_BT.contiguous(),
        positions_BT=None if one_document else positions_in_segments(segments_BT),
    )


def segment_ids(ids_BL: Tensor, *, eos_id: int) -> Tensor:
    """The document that each input belongs to, numbered from 0 in each row; an end-of-text token opens the next."""
    ends_BL = (ids_BL == eos_id).long()
    ends_BL[:, 0] = 0  # the row begins a segment anyway
    return ends_BL.cumsum(dim=1)


def positions_in_segments(segments_BT: Tensor) -> Tensor:
    """How far each input is from the start of its segment; a document cut by the row's start counts from there."""
    index_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    opens_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    opens_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    start_BT = torch.where(opens_BT, index_T, 0).cummax(dim=1).values
    return index_T - start_BT


def targets_at_depth(window_BL: Tensor, segments_BL: Tensor, num_inputs: int, *, depth: int) -> Tensor:
    """Token t + depth + 1 for each input t, masked unless the token before it is still of the document of t."""
    target_BT = window_BL[:, depth + 1 : depth + 1 + num_inputs]
    inside_BT = segments_BL[:, depth : depth + num_inputs] == segments_BL[:, :num_inputs]
    return torch.where(inside_BT, target_BT, MASKED)
