"""How well a model predicts text it has not seen: nats a token, bits a byte, and how often its MTP guess is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minga.data.packing import MASKED, Batch
from minga.data.shards import Shards, open_shards
from minga.data.tokenizer import Tokenizer
from minga.errors import UserError
from minga.model.transformer import Transformer
from minga.train.losses import cross_entropy


@dataclass(frozen=True)
class Evaluation:
    """`val_loss` in nats a token; `bits_per_byte` is comparable across tokenizers.

    `mtp_acceptance`: share of positions where the first MTP module guesses the token the model itself would choose
    next (greedy), which is how often a draft of speculative decoding is accepted. None without MTP.
    """

    val_loss: float
    bits_per_byte: float
    mtp_acceptance: float | None
    tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.val_loss)


@torch.no_grad()  # not inference mode: what FSDP allocates here is used again in training
def evaluate(
    model: Transformer, batches: Iterable[Batch], *, total: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Evaluation:
    """Scores each unmasked target of depth 0 once. The model is left in the mode it was in.

    total: adds up the sums of several processes that each score a part.
    """
    was_training = model.training
    model.eval()
    nats, tokens, num_bytes, hits, guesses = 0.0, 0, 0, 0, 0
    for batch in batches:
        where: dict[str, Any] = {"segments_BT": batch.segments_BT, "positions_BT": batch.positions_BT}
        hidden_BTD = model.hidden(batch.ids_BT, **where)
        logits_BTV = model.head(hidden_BTD)
        nats += float(cross_entropy(logits_BTV, batch.targets_KBT[0], reduction="sum").double())
        tokens += batch.num_targets
        num_bytes += batch.num_bytes or 0
        if len(model.mtp) and batch.ids_BT.shape[1] > 1:
            next_ids_BT = batch.targets_KBT[0].clamp(min=0)
            guess_BT = model.head(model.mtp_hidden(0, next_ids_BT, hidden_BTD, **where)).argmax(-1)[:, :-1]
            counted_BT = (batch.targets_KBT[0, :, 1:] != MASKED) & (batch.targets_KBT[1, :, :-1] != MASKED)
            hits += int(((guess_BT == logits_BTV[:, 1:].argmax(-1)) & counted_BT).sum())
            guesses += int(counted_BT.sum())
    model.train(was_training)
    sums = total(torch.tensor([nats, tokens, num_bytes, hits, guesses], dtype=torch.float64)).tolist()
    nats, (tokens, num_bytes, hits, guesses) = sums[0], map(int, sums[1:])
    if not (tokens and num_bytes):
        raise UserError("there is no text to evaluate on (evaluate). give more text")
    return Evaluation(
        nats / tokens, nats / math.log(2) / num_bytes, hits / guesses if guesses else None, tokens, num_bytes
    )


@dataclass(frozen=True)
class Comparison:
    """Two models on one text, token by token. `kl`: mean KL(reference || model) in nats a token, 0 for equal models.

    `top1`: share of positions where both hold the same next token most likely. Bits a byte and perplexity: of each.
    """

    kl: float
    top1: float
    bits_per_byte_reference: float
    bits_per_byte: float
    perplexity_reference: float
    perplexity: float
    tokens: int


@torch.no_grad()
def compare(reference: Transformer, model: Transformer, batches: Iterable[Batch]) -> Comparison:
    """How far a model is from another one with the same tokens, over the unmasked targets of depth 0. Both go to eval mode."""
    reference.eval()
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    tokens, num_bytes = 0, 0
    for batch in batches:
        kept_BT = batch.targets_KBT[0] != MASKED
        targets_M1 = batch.targets_KBT[0][kept_BT][:, None]
        where: dict[str, Any] = {"segments_BT": batch.segments_BT, "positions_BT": batch.positions_BT}
        p_MV, q_MV = (
            each.head(each.hidden(batch.ids_BT, **where)[kept_BT]).log_softmax(-1) for each in (reference, model)
        )
        kl_M = (p_MV.exp() * (p_MV - q_MV)).sum(-1)
        agree_M = p_MV.argmax(-1) == q_MV.argmax(-1)
        parts = (kl_M, agree_M, -p_MV.gather(1, targets_M1), -q_MV.gather(1, targets_M1))
        sums += torch.stack([part.double().sum() for part in parts])
        tokens += len(targets_M1)
        num_bytes += batch.num_bytes or 0
    if not (tokens and num_bytes):
        raise UserError("there is no text to compare on (compare). give more text")
    kl, agree, nats_reference, nats = sums.tolist()
    bits = math.log(2) * num_bytes
    return Comparison(
        kl=kl / tokens,
        top1=agree / tokens,
        bits_per_byte_reference=nats_reference / bits,
        bits_per_byte=nats / bits,
        perplexity_reference=math.exp(min(nats_reference / tokens, 700)),
        perplexity=math.exp(min(nats / tokens, 700)),
        tokens=tokens,
    )


def matching_shards(path: str | Path, tokenizer: Tokenizer) -> Shards:
    """The shards at a path. Raises `UserError` if they were tokenized otherwise than a model's text."""
    shards = open_shards(path)
    if shards.tokenizer.sha256 != tokenizer.sha256:
        raise UserError(f"the shards have another tokenizer than the model ({path}). rebuild them with its tokenizer")
    return shards


def text_batches(text: str, tokenizer: Tokenizer, *, seq_len: int, max_tokens: int | None = None) -> Iterable[Batch]:
    """Rows of `seq_len` tokens of a text, each with the row's first token as context only, as perplexity is usually taken.

    With a beginning-of-text token the model expects, each row starts with it. One extra target column serves MTP.
    """
    ids = tokenizer.encode(text)[:max_tokens]
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    step = seq_len - len(bos)
    for start in range(0, len(ids), step):
        row = bos + ids[start : start + step]
        if len(row) < 2:
            continue
        ids_BL = torch.tensor([[*row, 0]])
        targets_KBT = torch.stack([ids_BL[:, 1:-1], ids_BL[:, 2:]])
        targets_KBT[1, :, -1] = MASKED
        num_bytes = sum(len(tokenizer.token_bytes(token)) for token in row[1:])
        yield Batch(ids_BL[:, :-2], targets_KBT, None, None, num_bytes)
