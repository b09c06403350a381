from __future__ import annotations

from itertools import pairwise

import pytest

from minga.config import TrainConfig
from minga.errors import UserError
from minga.train.schedule import momentum, num_micro_batches, sequence_length


def test_micro_batches_grow_by_one_for_equal_shares_of_the_warmup() -> None:
    config = TrainConfig(steps=1, accumulate=4, batch_warmup=0.5)
    counts = [num_micro_batches(step / 1000, config) for step in range(1000)]
    assert counts == [1] * 125 + [2] * 125 + [3] * 125 + [4] * 625


def test_without_warmups_nothing_grows() -> None:
    config = TrainConfig(steps=1, accumulate=4, seq_len=96)
    assert {num_micro_batches(step / 50, config) for step in range(50)} == {4}
    assert {sequence_length(step / 50, config) for step in range(50)} == {96}


@pytest.mark.parametrize(("start", "end"), [(64, 512), (64, 192), (128, 1024), (256, 256)])
def test_sequences_grow_and_divide_the_last(start: int, end: int) -> None:
    config = TrainConfig(steps=1, seq_len=end, seq_len_start=start, seq_warmup=0.5)
    lengths = [sequence_length(step / 1000, config) for step in range(1000)]
    assert lengths[0] == start
    assert lengths == sorted(lengths)
    assert lengths[500:] == [end] * 500
    assert all(length % 64 == 0 and end % length == 0 for length in lengths)
    for step, (length, following) in enumerate(pairwise(lengths[:500]), 1):
        if length != following:  # not before the line has reached it
            assert start + (end - start) * step / 500 >= following


@pytest.mark.parametrize(("start", "end"), [(0, 256), (32, 256), (128, 192), (100, 200), (512, 256)])
def test_a_start_that_does_not_fit_is_refused(start: int, end: int) -> None:
    with pytest.raises(UserError, match=f"seq_len_start is {start} .*multiple of 64 that divides seq_len {end}"):
        TrainConfig(steps=1, seq_len=end, seq_len_start=start, seq_warmup=0.5)
    TrainConfig(steps=1, seq_len=end, seq_len_start=start)  # nobody uses it


def test_momentum_rises_and_stays() -> None:
    config = TrainConfig(steps=1000, momentum_start=0.8, momentum=0.9, momentum_warm_steps=10)
    assert [momentum(step, config) for step in (0, 5, 10, 999)] == pytest.approx([0.8, 0.85, 0.9, 0.9])
    assert momentum(0, TrainConfig(steps=1, momentum_warm_steps=0)) == TrainConfig(steps=1).momentum
