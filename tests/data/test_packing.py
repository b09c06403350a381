"""The vectorised functions against the rule, read token by token."""

from __future__ import annotations

import random

import pytest
import torch

from minga.data.packing import MASKED, pack, positions_in_segments, segment_ids, targets_at_depth

EOS = 0


def random_windows(rng: random.Random, num_rows: int, length: int) -> torch.Tensor:
    rate = rng.choice([0.0, 0.05, 0.3, 1.0])
    return torch.tensor(
        [[EOS if rng.random() < rate else rng.randrange(1, 50) for _ in range(length)] for _ in range(num_rows)]
    )


def test_the_example_of_the_docstring() -> None:
    a1, a2, a3, b1, b2, c1, more = 1, 2, 3, 4, 5, 6, 7
    batch = pack(torch.tensor([[a1, a2, a3, EOS, b1, b2, EOS, c1, more, more]]), eos_id=EOS, num_extra=2)
    assert batch.ids_BT.tolist() == [[a1, a2, a3, EOS, b1, b2, EOS, c1]]
    assert batch.segments_BT is not None
    assert batch.positions_BT is not None
    assert batch.segments_BT.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    no = MASKED
    assert batch.targets_KBT[0].tolist() == [[a2, a3, EOS, b1, b2, EOS, c1, more]]
    assert batch.targets_KBT[1].tolist() == [[a3, EOS, no, b2, EOS, no, more, more]]
    assert batch.num_targets == 8


@pytest.mark.parametrize("num_extra", [1, 2, 3])
def test_equals_the_rule_token_by_token(num_extra: int) -> None:
    rng = random.Random(num_extra)
    for _ in range(60):
        num_rows, num_inputs = rng.randrange(1, 4), rng.randrange(1, 20)
        window = random_windows(rng, num_rows, num_inputs + num_extra)
        batch = pack(window, eos_id=EOS, num_extra=num_extra)
        several = False
        for row in range(num_rows):
            tokens, segment, position = window[row].tolist(), 0, 0
            for t in range(num_inputs):
                if t and tokens[t] == EOS:
                    segment, position = segment + 1, 0
                several |= segment > 0
                if batch.segments_BT is not None and batch.positions_BT is not None:
                    assert (batch.segments_BT[row, t], batch.positions_BT[row, t]) == (segment, position)
                for depth in range(num_extra):
                    skips_an_end = EOS in tokens[t + 1 : t + 1 + depth]
                    expected = MASKED if skips_an_end else tokens[t + depth + 1]
                    assert batch.targets_KBT[depth, row, t] == expected
                position += 1
        assert (batch.segments_BT is not None) == (batch.positions_BT is not None) == several
        assert batch.ids_BT.tolist() == window[:, :num_inputs].tolist()
        assert batch.num_targets == num_rows * num_inputs


def test_parts_on_their_own() -> None:
    ids = torch.tensor([[EOS, 5, EOS, EOS, 5]])
    segments = segment_ids(ids, eos_id=EOS)
    assert segments.tolist() == [[0, 0, 1, 2, 2]]
    assert positions_in_segments(segments).tolist() == [[0, 1, 0, 0, 1]]
    assert targets_at_depth(ids, segments, 3, depth=1).tolist() == [[EOS, MASKED, MASKED]]
    assert targets_at_depth(ids, segments, 3, depth=0).tolist() == [[5, EOS, EOS]]


def test_moving_to_a_device_keeps_everything() -> None:
    batch = pack(torch.tensor([[1, EOS, 2, 3]]), eos_id=EOS, num_extra=1)
    moved = batch.to("cpu")
    assert torch.equal(moved.ids_BT, batch.ids_BT)
    assert torch.equal(moved.targets_KBT, batch.targets_KBT)
    assert moved.segments_BT is not None
    assert pack(torch.tensor([[1, 2, 3]]), eos_id=EOS, num_extra=1).to("cpu").segments_BT is None
    assert batch.ids_BT.dtype == batch.targets_KBT.dtype == torch.int64
