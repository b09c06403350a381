"""The set-up that the planner chooses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.config.hardware import Machine, find_device, machine
from minga.config.presets import v3
from minga.errors import UserError
from minga.planner.layout import LEAST_BATCH, MOST_BATCH, choose_setup, typical_batch
from minga.planner.memory import GREEN, training_memory
from minga.planner.setup import Setup
from minga.planner.time import step_time

SMALL = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "intermediate_size": 2048,
}  # fmt: skip
LARGE = SMALL | {
    "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "intermediate_size": 28672,
}  # fmt: skip


def choose(model: object, where: Machine, **given: object) -> Setup:
    def fits(setup: Setup) -> bool:
        return training_memory(model, setup).total <= GREEN * where.device.memory  # type: ignore[arg-type]

    return choose_setup(model, where, **{"precision": "bf16", "seq_len": 2048, "fits": fits, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["1xH100", "8xH100", "4x3090", "2x4090", "64xA100", "3xL4", "16xH100"])
def test_it_uses_all_devices_and_fits(where: str) -> None:
    setup = choose(SMALL, machine(where))
    assert setup.devices == machine(where).count
    assert training_memory(SMALL, setup).total <= GREEN * machine(where).device.memory
    assert setup.tp <= machine(where).per_node


def test_one_device_is_not_cut() -> None:
    setup = choose(SMALL, machine("RTX 3090"))
    assert (setup.dp, setup.tp, setup.pp, setup.ep, setup.shard) == (1, 1, 1, 1, 0)
    assert abs(setup.step_tokens - LEAST_BATCH) / LEAST_BATCH < 0.1


def test_a_small_model_is_only_copied_and_a_large_one_is_cut() -> None:
    small, large = choose(SMALL, machine("8xH100")), choose(LARGE, machine("256xH100"))
    assert (small.dp, small.tp, small.pp) == (8, 1, 1)
    assert large.tp * large.pp > 1 or large.shard == 3


def test_no_other_set_up_that_fits_is_faster() -> None:
    """Against each neighbour: one step along one axis."""
    where = machine("64xH100")
    chosen = choose(LARGE, where)

    def per_token(setup: Setup) -> float:
        return step_time(LARGE, setup, where).total.typical / setup.step_tokens

    for fixed in (
        {"tp": 1},
        {"tp": 2},
        {"tp": 4},
        {"tp": 8},
        {"pp": 1},
        {"pp": 4},
        {"pp": 8},
        {"shard": 1},
        {"shard": 3},
    ):
        try:
            other = choose(LARGE, where, **fixed)
        except UserError:
            continue
        assert per_token(chosen) <= per_token(other) * (1 + 1e-9)


@given(
    st.sampled_from([1, 2, 4, 8, 16, 64]),
    st.sampled_from([512, 2048, 8192]),
    st.sampled_from([2**16, 2**19, 2**22]),
)
def test_the_batch_is_nearly_what_was_asked(count: int, seq_len: int, batch: int) -> None:
    where = Machine(find_device("H100"), count, min(8, count), 400e9)
    setup = choose(SMALL, where, seq_len=seq_len, batch_tokens=batch)
    least = where.count * seq_len / (setup.tp * setup.pp)  # no rank without a sequence
    assert setup.step_tokens <= max(1.5 * batch, least)
    assert setup.step_tokens >= min(batch / 1.5, least)


def test_what_is_given_stays() -> None:
    setup = choose(LARGE, machine("64xH100"), tp=4, pp=2, shard=1, recompute="full", micro_batch=2, lora_rank=8)
    assert (setup.tp, setup.pp, setup.shard, setup.recompute, setup.micro_batch) == (4, 2, 1, "full", 2)
    assert setup.lora_rank == 8 and setup.dp == 8


def test_experts_are_spread_where_they_do_not_fit_whole() -> None:
    setup = choose(v3(), machine("2048xH800"), precision="fp8", seq_len=4096, tokens=14.8e12)
    assert setup.ep > 1 and v3().n_routed_experts % setup.ep == 0 and setup.dp % setup.ep == 0


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(UserError, match="no set-up of 1 RTX-3090 holds this model"):
        choose(LARGE, machine("RTX 3090"))


def test_cuts_that_cannot_be_are_refused() -> None:
    for impossible in ({"tp": 5}, {"pp": 7}, {"pp": 128}):
        with pytest.raises(UserError, match="cannot be cut"):
            choose(SMALL, machine("8xH100"), **impossible)


def test_typical_batch_grows_with_the_run() -> None:
    assert typical_batch(SMALL) == LEAST_BATCH
    assert LEAST_BATCH < typical_batch(LARGE, 1e11) < typical_batch(LARGE, 1e12)
    assert typical_batch(LARGE, 1e13) == MOST_BATCH


def test_interleaving_only_with_whole_rounds_of_micro_batches() -> None:
    setup = choose(LARGE, machine("64xH100"), tp=2, pp=8, shard=1)
    assert setup.chunks == 1 or setup.accumulate % setup.pp == 0
    assert replace(setup, chunks=1).devices == setup.devices


def test_v3_is_laid_out_as_deepseek_did() -> None:
    """Pipelines of 16 stages, no tensor parallelism, only what is cheap computed again (DeepSeek-V3, section 3.2)."""
    setup = choose(v3(), machine("2048xH800"), precision="fp8", seq_len=4096, tokens=14.8e12)
    assert (setup.tp, setup.pp, setup.dp, setup.recompute) == (1, 16, 128, "selective")
