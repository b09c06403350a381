"""pytest tests/model/test_attention.py -- every way to run a model gives the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minga.config import ModelConfig, RopeConfig
from minga.config.presets import tiny
from minga.errors import UserError
from minga.model.attention import Context, LatentAttention
from minga.model.cache import Cache
from minga.model.transformer import Transformer

YARN = RopeConfig("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.9)
GQA = ModelConfig(
    model_type="llama",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rope_interleave=False,
)
CONFIGS = {
    "v3": tiny(),
    "v3-yarn": tiny().replace(rope=YARN, q_lora_rank=None),
    "v2": tiny().replace(model_type="deepseek_v2", topk_method="greedy", scoring_func="softmax", rope=YARN),
    "llama": GQA,
    "qwen3": GQA.replace(model_type="qwen3"),
}
LATENT = ["v3", "v3-yarn", "v2"]
TOKENS = 24


def build(name: str) -> Transformer:
    config = CONFIGS[name].replace(initializer_range=0.2)  # large, so that a mistake shows
    generator = torch.Generator().manual_seed(1)
    model = Transformer(config).init_weights(generator)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(1.0, 0.2, generator=generator)
    for layer in model.moe_layers():
        if layer.gate.e_score_correction_bias is not None:
            layer.gate.e_score_correction_bias.normal_(0.0, 0.2, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> Transformer:
    return build(request.param)


@pytest.fixture(scope="module", params=LATENT)
def latent_model(request) -> Transformer:
    return build(request.param)


@pytest.fixture(scope="module")
def mtp_model() -> Transformer:
    return build("v3")


def tokens(batch: int = 2, length: int = TOKENS) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(2))


def positions(batch: int, start: int, end: int) -> Tensor:
    return torch.arange(start, end).expand(batch, -1)


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------- the two forms of latent attention


def attention_of(model: Transformer) -> LatentAttention:
    attention = model.model.layers[1].self_attn
    assert isinstance(attention, LatentAttention)
    return attention


def test_absorbed_equals_naive(latent_model):
    attention, ids = attention_of(latent_model), tokens()
    context = latent_model.context(ids, cache=None, positions_BT=None, segments_BT=None)
    x = torch.randn(2, TOKENS, 64)
    close(attention(x, context, absorb=True), attention(x, context, absorb=False), 1e-5)


def test_absorbed_equals_naive_over_segments(latent_model):
    attention, ids = attention_of(latent_model), tokens()
    segments = torch.arange(TOKENS).div(7, rounding_mode="floor").expand(2, -1)
    context = latent_model.context(ids, cache=None, positions_BT=None, segments_BT=segments)
    x = torch.randn(2, TOKENS, 64)
    close(attention(x, context, absorb=True), attention(x, context, absorb=False), 1e-5)


@pytest.mark.parametrize("steps", [[TOKENS], [10, 1, 1, 5, 7], [1] * TOKENS])
def test_absorbed_equals_naive_through_the_cache(latent_model, steps):
    attention, x = attention_of(latent_model), torch.randn(2, TOKENS, 64)

    def through_cache(absorb: bool) -> Tensor:
        cache = Cache.of(latent_model.config, 2, TOKENS, dtype=torch.float32)
        outputs, start = [], 0
        for part in x.split(steps, 1):
            where = positions(2, start, start + part.shape[1])
            context = latent_model.context(where, cache=cache, positions_BT=where, segments_BT=None)
            outputs.append(attention(part, context, absorb=absorb))
            start += part.shape[1]
        return torch.cat(outputs, 1)

    absorbed, naive = through_cache(True), through_cache(False)
    close(absorbed, naive, 1e-5)
    context = latent_model.context(tokens(), cache=None, positions_BT=None, segments_BT=None)
    close(naive, attention(x, context, absorb=False), 1e-5)


def test_the_cheaper_form_is_chosen():
    attention = LatentAttention(tiny(), 0)
    assert not attention._absorbing_is_cheaper(T=TOKENS, S=TOKENS)
    assert attention._absorbing_is_cheaper(T=1, S=1000)


# ---------------------------------------------------------------------- the cache


def decode(model: Transformer, ids: Tensor, steps: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    cache = Cache.of(model.config, len(ids), ids.shape[1], dtype=dtype)
    logits, start = [], 0
    for part in ids.split(steps, 1):
        where = positions(len(ids), start, start + part.shape[1])
        logits.append(model(part, cache=cache, positions_BT=where).logits)
        start += part.shape[1]
    return torch.cat(logits, 1)


@pytest.mark.parametrize("steps", [[TOKENS], [11, 1, 1, 4, 7], [1] * TOKENS], ids=["whole", "chunks", "one by one"])
def test_cached_decoding_equals_the_full_forward(model, steps):
    ids = tokens()
    close(decode(model, ids, steps), model(ids).logits)


def test_sequences_of_a_batch_may_stand_at_different_lengths(model):
    ids, lengths = tokens(), torch.tensor([5, 17])
    cache = Cache.of(model.config, 2, TOKENS, dtype=torch.float32)
    model(ids[:, :17], cache=cache, positions_BT=positions(2, 0, 17))  # row 0 is ahead of itself: slots are rewritten
    for _ in range(4):
        step = model(ids.gather(1, lengths[:, None]), cache=cache, positions_BT=lengths[:, None]).logits
        for row, length in enumerate(lengths.tolist()):
            close(step[row, 0], model(ids[row : row + 1, : length + 1]).logits[0, -1])
        lengths += 1


def test_a_rejected_draft_leaves_no_trace(model):
    ids = tokens(1)
    cache = Cache.of(model.config, 1, TOKENS, dtype=torch.float32)
    model(ids[:, :10], cache=cache, positions_BT=positions(1, 0, 10))
    model(255 - ids[:, 10:14], cache=cache, positions_BT=positions(1, 10, 14))  # guesses, all wrong
    step = model(ids[:, 10:12], cache=cache, positions_BT=positions(1, 10, 12)).logits
    close(step, model(ids[:, :12]).logits[:, 10:])


def test_a_table_names_the_pages_of_each_sequence(model):
    """Some of the sequences, in another order."""
    ids = tokens(3)
    cache = Cache.of(model.config, 3, TOKENS, dtype=torch.float32)
    model(ids[:, :9], cache=cache, positions_BT=positions(3, 0, 9))
    some = Cache(cache.pages, cache.table_BP[[2, 0]])
    step = model(ids[[2, 0], 9:10], cache=some, positions_BT=positions(2, 9, 10)).logits
    close(step, model(ids[[2, 0], :10]).logits[:, 9:])


def test_a_full_cache_is_a_user_error(model):
    cache = Cache.of(model.config, 1, 16, dtype=torch.float32)
    where = positions(1, 60, 65)
    with pytest.raises(UserError, match="position 64 is beyond the cache's 64 rows"):
        model(tokens(1, 5), cache=cache, positions_BT=where)


def test_last_only_gives_the_last_logits(model):
    ids = tokens()
    close(model(ids, last_only=True).logits, model(ids).logits[:, -1:], 1e-5)


# ---------------------------------------------------------------------- batches and packed rows


def test_a_batch_equals_its_rows(model):
    ids = tokens(3)
    together = model(ids).logits
    for row in range(3):
        close(together[row], model(ids[row : row + 1]).logits[0], 1e-5)


@pytest.mark.parametrize("restart", [False, True], ids=["running positions", "restarted positions"])
def test_a_packed_row_equals_its_documents(model, restart):
    ids, cut = tokens(1), 10
    segments = (torch.arange(TOKENS) >= cut).long()[None]
    where = torch.cat([torch.arange(cut), torch.arange(TOKENS - cut)])[None] if restart else None
    packed = model(ids, segments_BT=segments, positions_BT=where).logits
    close(packed[:, :cut], model(ids[:, :cut]).logits)
    close(packed[:, cut:], model(ids[:, cut:]).logits)


def test_a_token_does_not_see_its_future(model):
    ids = tokens(1)
    changed = ids.clone()
    changed[:, 12:] = 255 - changed[:, 12:]
    close(model(changed).logits[:, :12], model(ids).logits[:, :12], 1e-5)


# ---------------------------------------------------------------------- multi-token prediction


def mtp_inputs(model: Transformer) -> tuple[Tensor, Tensor]:
    """Each position's hidden and the token after it."""
    ids = tokens()
    return ids[:, 1:], model.hidden(ids)[:, :-1]


def test_mtp_is_the_papers_formula(mtp_model):
    next_ids, hidden = mtp_inputs(mtp_model)
    module = mtp_model.mtp[0]
    embedding = module.enorm(mtp_model.model.embed_tokens(next_ids))
    joined = module.eh_proj(torch.cat([embedding, module.hnorm(hidden)], -1))
    cos, sin = mtp_model.rope(positions(2, 0, TOKENS - 1), torch.float32)
    expected = module.norm(module.block(joined, Context(cos, sin, positions(2, 0, TOKENS - 1))))
    close(mtp_model.mtp_hidden(0, next_ids, hidden), expected, 1e-5)


@pytest.mark.parametrize("steps", [[TOKENS - 1], [9, 1, 1, 5, 7], [1] * (TOKENS - 1)])
def test_mtp_through_the_cache_equals_without(mtp_model, steps):
    next_ids, hidden = mtp_inputs(mtp_model)
    cache = Cache.of(mtp_model.config, 2, TOKENS, dtype=torch.float32)
    outputs, start = [], 0
    for ids, part in zip(next_ids.split(steps, 1), hidden.split(steps, 1), strict=True):
        where = positions(2, start, start + ids.shape[1])
        outputs.append(mtp_model.mtp_hidden(0, ids, part, cache=cache, positions_BT=where))
        start += ids.shape[1]
    close(torch.cat(outputs, 1), mtp_model.mtp_hidden(0, next_ids, hidden))


def test_mtp_and_model_do_not_share_cache_rows(mtp_model):
    ids = tokens()
    cache = Cache.of(mtp_model.config, 2, TOKENS, dtype=torch.float32)
    hidden = mtp_model.hidden(ids[:, :-1], cache=cache, positions_BT=positions(2, 0, TOKENS - 1))
    slots = cache.pages.slots
    before = slots[:3].clone()
    mtp_model.mtp_hidden(0, ids[:, 1:], hidden, cache=cache, positions_BT=positions(2, 0, TOKENS - 1))
    assert torch.equal(slots[:3], before)
    assert slots[3].any()


def test_mtp_sees_the_next_token_and_none_after_it(mtp_model):
    next_ids, hidden = mtp_inputs(mtp_model)
    before = mtp_model.mtp_hidden(0, next_ids, hidden)
    changed = next_ids.clone()
    changed[:, 8] = 255 - changed[:, 8]
    after = mtp_model.mtp_hidden(0, changed, hidden)
    close(after[:, :8], before[:, :8], 1e-5)
    assert (after[:, 8] - before[:, 8]).abs().max() > 1e-2


def test_mtp_of_a_packed_row_equals_its_documents(mtp_model):
    next_ids, hidden = mtp_inputs(mtp_model)
    segments = (torch.arange(TOKENS - 1) >= 9).long().expand(2, -1)
    packed = mtp_model.mtp_hidden(0, next_ids, hidden, segments_BT=segments)
    close(packed[:, 9:], mtp_model.mtp_hidden(0, next_ids[:, 9:], hidden[:, 9:]))
