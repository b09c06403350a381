from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minga.data.loader import Loader, evaluation_batches, read_windows
from minga.data.packing import MASKED, Batch
from minga.data.shards import Shards, build_shards, open_shards
from minga.data.tokenizer import Tokenizer
from minga.errors import UserError


def take(loader: Loader, num_batches: int) -> list[Batch]:
    return [next(loader) for _ in range(num_batches)]


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.ids_BT, b.ids_BT) and torch.equal(a.targets_KBT, b.targets_KBT)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_shapes_and_content(shards: Shards) -> None:
    batch = next(iter(Loader(shards, batch_size=3, seq_len=16, num_extra=2)))
    assert batch.ids_BT.shape == (3, 16)
    assert batch.targets_KBT.shape == (2, 3, 16)
    assert batch.ids_BT.dtype == torch.int64
    assert torch.equal(batch.targets_KBT[0][:, :-1], batch.ids_BT[:, 1:])
    ring = np.tile(shards.tokens("train"), 2).tolist()
    for row in batch.ids_BT.tolist():
        assert any(ring[start : start + 16] == row for start in range(len(ring) // 2))


def test_an_epoch_goes_once_around(shards: Shards) -> None:
    """Windows of one epoch do not overlap and leave out less than one; the next epoch starts elsewhere."""
    tokens = shards.tokens("train")
    loader = Loader(shards, batch_size=1, seq_len=16, seed=3)
    assert loader.windows_per_epoch == len(tokens) // 16
    offsets = []
    for epoch in range(3):
        windows = range(epoch * loader.windows_per_epoch, (epoch + 1) * loader.windows_per_epoch)
        starts = [loader._start_of(window) % len(tokens) for window in windows]
        covered = {(start + step) % len(tokens) for start in starts for step in range(16)}
        assert len(covered) == 16 * loader.windows_per_epoch > len(tokens) - 16
        assert starts != sorted(starts)
        offsets.append(min(start for start in starts) % 16)
    assert len(set(offsets)) > 1


def test_the_seed_decides(shards: Shards) -> None:
    first, again, other = (take(Loader(shards, batch_size=2, seq_len=32, seed=seed), 4) for seed in (5, 5, 6))
    assert same(first, again)
    assert not same(first, other)


def test_resume_equals_the_uninterrupted_stream(shards: Shards) -> None:
    """Stopped anywhere, across the ends of epochs, and with another batch size."""
    rng = random.Random(0)
    settings: dict[str, Any] = {"seq_len": 64, "seed": 1, "num_extra": 2}
    whole = Loader(shards, batch_size=4, **settings)
    num_batches = 3 * whole.windows_per_epoch // 4
    stream = take(whole, num_batches)
    assert whole.epoch > 2
    for _ in range(8):
        stop = rng.randrange(num_batches)
        interrupted = Loader(shards, batch_size=4, **settings)
        take(interrupted, stop)
        state = json.loads(json.dumps(interrupted.state_dict()))
        resumed = Loader(shards, batch_size=4, **settings)
        resumed.load_state_dict(state)
        assert same(take(resumed, num_batches - stop), stream[stop:])
        halves = Loader(shards, batch_size=2, **settings)
        halves.load_state_dict(state)
        if stop < num_batches:
            joined = torch.cat([batch.ids_BT for batch in take(halves, 2)])
            assert torch.equal(joined, stream[stop].ids_BT)


def test_shorter_rows_are_the_same_windows_cut(shards: Shards) -> None:
    """Lengths that change from batch to batch: the same tokens, each once, and the same state as without."""
    settings: dict[str, Any] = {"batch_size": 3, "seq_len": 64, "seed": 2, "num_extra": 2}
    plain, varied = Loader(shards, **settings), Loader(shards, **settings)
    rng = random.Random(0)
    for _ in range(2 * plain.windows_per_epoch // 3):
        length = rng.choice([8, 16, 32, 64])
        whole, cut = next(plain), varied.next_batch(length)
        assert cut.ids_BT.shape == (3 * 64 // length, length)
        assert torch.equal(cut.ids_BT.view(3, 64), whole.ids_BT)
        inside = cut.targets_KBT[0].reshape(3, 64)  # depth 0 masks nothing
        assert torch.equal(inside, whole.targets_KBT[0])
        assert varied.state_dict() == plain.state_dict()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_workers_gives_the_same_stream(shards: Shards, workers: int) -> None:
    """Also across the ends of epochs, with lengths that change, after going back, and resumed with another number."""
    settings: dict[str, Any] = {"batch_size": 4, "seq_len": 64, "seed": 1, "num_extra": 2}
    lengths = [random.Random(number // 3).choice([16, 32, 64]) for number in range(60)]
    plain = Loader(shards, **settings)
    stream = [plain.next_batch(length) for length in lengths]
    assert plain.epoch > 2
    ahead = Loader(shards, **settings, workers=workers)
    start = ahead.state_dict()
    for stop in (0, 7, 41):
        ahead.load_state_dict(start)
        assert same([ahead.next_batch(length) for length in lengths[:stop]], stream[:stop])
        state = json.loads(json.dumps(ahead.state_dict()))  # counts what was handed out, not what was read ahead
        for number in (0, 1, 3):
            resumed = Loader(shards, **settings, workers=number)
            resumed.load_state_dict(state)
            assert same([resumed.next_batch(length) for length in lengths[stop:]], stream[stop:])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_parts_of_several_processes_are_the_batch(shards: Shards, workers: int) -> None:
    """Also with rows cut, and across the end of an epoch; all parts stand where the whole stands."""
    settings: dict[str, Any] = {"batch_size": 6, "seq_len": 64, "seed": 1, "num_extra": 2}
    whole = Loader(shards, **settings)
    parts = [Loader(shards, **settings, workers=workers, part=(rank, 3)) for rank in range(3)]
    for number in range(whole.windows_per_epoch // 6 + 2):
        length = (16, 64)[number % 2]
        batch, pieces = whole.next_batch(length), [part.next_batch(length) for part in parts]
        assert torch.equal(torch.cat([piece.ids_BT for piece in pieces]), batch.ids_BT)
        assert torch.equal(torch.cat([piece.targets_KBT for piece in pieces], 1), batch.targets_KBT)
        assert all(part.state_dict() == whole.state_dict() for part in parts)


def test_loading_an_earlier_state_goes_back(shards: Shards) -> None:
    loader = Loader(shards, batch_size=4, seq_len=64)
    state = loader.state_dict()
    first = take(loader, 5)
    loader.load_state_dict(state)
    assert same(take(loader, 5), first)


def test_another_stream_is_refused(shards: Shards, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    state = Loader(shards, batch_size=2, seq_len=32, seed=1).state_dict()
    (tmp_path / "more.txt").write_text("otro documento más", encoding="utf-8")
    build_shards([corpus, tmp_path / "more.txt"], tmp_path / "out", tokenizer=tokenizer, val_fraction=0.2)
    changed = open_shards(tmp_path / "out")
    with pytest.raises(UserError, match="the corpus has changed since the checkpoint"):
        Loader(changed, batch_size=2, seq_len=32, seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="seed was 1 and is now 2"):
        Loader(shards, batch_size=2, seq_len=32, seed=2).load_state_dict(state)
    with pytest.raises(UserError, match="seq_len was 32 and is now 16"):
        Loader(shards, batch_size=2, seq_len=16, seed=1).load_state_dict(state)


def test_an_equal_corpus_elsewhere_is_the_same(
    shards: Shards, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    build_shards([corpus], tmp_path / "out", tokenizer=tokenizer, val_fraction=0.2)
    copy = Loader(open_shards(tmp_path / "out"), batch_size=2, seq_len=32)
    loader = Loader(shards, batch_size=2, seq_len=32)
    next(loader)
    copy.load_state_dict(loader.state_dict())
    assert same(take(copy, 2), take(loader, 2))


def test_too_little_data(shards: Shards) -> None:
    num_tokens = len(shards.tokens("train"))
    with pytest.raises(UserError, match=rf"has {num_tokens} tokens, less than one batch of 4 x {num_tokens}"):
        Loader(shards, batch_size=4, seq_len=num_tokens)
    with pytest.raises(UserError, match="less than one batch"):
        Loader(shards, batch_size=1, seq_len=num_tokens)
    assert next(Loader(shards, batch_size=1, seq_len=num_tokens - 1)).ids_BT.shape == (1, num_tokens - 1)
    sizes: dict[str, Any] = {"batch_size": 1, "seq_len": 8, "num_extra": 1}
    for name in sizes:
        with pytest.raises(UserError, match=f"{name} is 0"):
            Loader(shards, **({**sizes, name: 0}))
    with pytest.raises(UserError, match="no split 'test'"):
        Loader(shards, batch_size=1, seq_len=8, split="test")


def test_windows_wrap_around() -> None:
    assert read_windows(np.arange(5, dtype="<u2"), [-1, 3], 4).tolist() == [[4, 0, 1, 2], [3, 4, 0, 1]]


# ---------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(("batch_size", "seq_len", "num_extra"), [(1, 1, 1), (3, 7, 1), (2, 64, 2), (5, 10_000, 3)])
def test_every_token_is_scored_once(shards: Shards, batch_size: int, seq_len: int, num_extra: int) -> None:
    tokens = shards.tokens("val").tolist()
    scored: list[int] = []
    num_bytes = 0
    for batch in evaluation_batches(shards, batch_size=batch_size, seq_len=seq_len, num_extra=num_extra):
        kept = batch.targets_KBT[0] != MASKED
        assert torch.equal(batch.ids_BT[:, 1:][kept[:, 1:]], batch.targets_KBT[0][:, :-1][kept[:, 1:]])
        for row, mask in zip(batch.targets_KBT[0], kept, strict=True):
            starts = batch.ids_BT[len(scored) // seq_len % batch_size, 0].item()
            assert starts == tokens[len(scored) - 1]  # the token before; the closing one before the first
            scored += row[mask].tolist()
        assert batch.num_bytes is not None
        num_bytes += batch.num_bytes
        assert batch.targets_KBT.shape[0] == num_extra
    assert scored == tokens
    assert num_bytes == shards.manifest.val_bytes


def test_deeper_targets_at_the_end(shards: Shards) -> None:
    """Nothing is predicted across the end of the split, though the ring goes on."""
    tokens = shards.tokens("val")
    last = list(evaluation_batches(shards, batch_size=4, seq_len=50, num_extra=3))[-1]
    for depth in range(3):
        row = last.targets_KBT[depth, -1]
        room = (len(tokens) - 1) % 50 + 1 - depth
        assert bool((row[max(room, 0) :] == MASKED).all())


def test_bits_per_byte_of_a_uniform_model(shards: Shards) -> None:
    """log2(V) bits a token over the bytes of the text, whatever the batching."""
    nats, num_bytes = 0.0, 0
    for batch in evaluation_batches(shards, batch_size=2, seq_len=33):
        logits = torch.zeros(*batch.ids_BT.shape, shards.manifest.vocab_size)
        nats += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.targets_KBT[0].flatten(), ignore_index=MASKED, reduction="sum"
        ).item()
        num_bytes += batch.num_bytes or 0
    expected = len(shards.tokens("val")) * math.log2(shards.manifest.vocab_size) / shards.manifest.val_bytes
    assert nats / math.log(2) / num_bytes == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("max_tokens", [1, 20, 47, 10**9])
def test_a_part_of_the_split(shards: Shards, max_tokens: int) -> None:
    batches = list(evaluation_batches(shards, batch_size=2, seq_len=20, max_tokens=max_tokens))
    scored = [id for batch in batches for id in batch.targets_KBT[0].flatten().tolist() if id != MASKED]
    tokens = shards.tokens("val").tolist()
    rows = [tokens[start : start + 20] for start in range(0, len(tokens), 20)]
    wanted = min(len(rows), math.ceil(max_tokens / 20))
    assert scored == [id for index in range(wanted) for id in rows[index * len(rows) // wanted]]  # from end to end
    text = b"".join(shards.tokenizer.token_bytes(id) for id in scored if id != shards.manifest.eos_id)
    assert sum(batch.num_bytes or 0 for batch in batches) == len(text)


def test_no_held_out_text(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    build_shards([corpus], tmp_path / "out", tokenizer=tokenizer, val_fraction=0)
    with pytest.raises(UserError, match="the val split is empty"):
        evaluation_batches(open_shards(tmp_path / "out"), batch_size=1, seq_len=8)
