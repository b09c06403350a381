"""pytest tests/engine/test_llm.py"""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch

from minga import store
from minga.config import ModelConfig
from minga.config.presets import tiny
from minga.config.units import parse_bytes
from minga.data.tokenizer import Tokenizer, train_bpe
from minga.engine import runner
from minga.engine.llm import LLM
from minga.engine.sampler import SamplingParams
from minga.errors import UserError
from minga.model.transformer import Transformer
from minga.quant import blocks
from minga.runtime.disk import DiskMemory
from tests.checkpoint.models import to_gguf, write_gguf

VOCABULARY = 259
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["bytes"], VOCABULARY)


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = tiny().replace(vocab_size=VOCABULARY, initializer_range=0.2)
    return Transformer(config).init_weights(torch.Generator().manual_seed(0))


@pytest.fixture
def llm(model, tokenizer) -> LLM:
    return LLM.from_parts(model, tokenizer)


def grouped_query_model() -> Transformer:
    config = ModelConfig(
        model_type="qwen3", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        head_dim=8, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        initializer_range=0.3, rope_interleave=False,
    )  # fmt: skip
    return Transformer(config).init_weights(torch.Generator().manual_seed(0))


def mixed_prompts(num: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 60))] for _ in range(num)]


def naive_greedy(model: Transformer, ids: list[int], num_tokens: int) -> list[int]:
    """No cache, no batch: the whole text again for each token."""
    ids = list(ids)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-num_tokens:]


# ---------------------------------------------------------------------------------------------- equalities


@pytest.mark.parametrize("family", ["latent", "grouped"])
def test_batch_equals_single_equals_naive(model, tokenizer, family):
    model = model if family == "latent" else grouped_query_model()
    prompts = mixed_prompts(12)
    outs = LLM.from_parts(model, tokenizer).generate(prompts, GREEDY)
    for prompt, out in zip(prompts, outs, strict=True):
        assert out.token_ids == naive_greedy(model.eval(), prompt, 20)
        assert LLM.from_parts(model, tokenizer).generate([prompt], GREEDY)[0].token_ids == out.token_ids


def test_prefill_in_chunks_changes_nothing(llm, monkeypatch):
    prompts = mixed_prompts(8)
    whole = llm.generate(prompts, GREEDY)
    monkeypatch.setattr(runner, "PREFILL_TOKENS", {"cpu": 40})
    assert llm.generate(prompts, GREEDY) == whole


def test_padding_never_reaches_an_answer(model, tokenizer):
    """The state after a prompt's last token is the same alone and beside a prompt that pads it with 55 columns."""
    llm = LLM.from_parts(model, tokenizer)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=VOCABULARY, ignore_eos=True)
    alone = llm.generate([[7, 8, 9]], params)[0].logprobs
    beside = llm.generate([[7, 8, 9], mixed_prompts(1)[0] * 2], params)[0].logprobs
    assert alone is not None and beside is not None
    one, other = dict(alone[0].top), dict(beside[0].top)
    assert max(abs(one[token] - other[token]) for token in one) < 1e-4


def test_a_seed_fixes_the_answer_whatever_runs_beside_it(llm):
    params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=15, seed=7, ignore_eos=True)
    prompts = mixed_prompts(5)
    together = llm.generate(prompts, params)
    assert [llm.generate([prompt], params)[0].token_ids for prompt in prompts] == [out.token_ids for out in together]
    other = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=15, seed=8, ignore_eos=True)
    assert llm.generate(prompts, other) != together


def test_without_a_seed_answers_differ(llm):
    params = SamplingParams(temperature=1.5, max_tokens=15, ignore_eos=True)
    first, second = llm.generate([[5, 6], [5, 6]], params)
    assert first.token_ids != second.token_ids


def test_greedy_and_sampled_sequences_share_a_batch(llm):
    prompts = mixed_prompts(4)
    sampled = SamplingParams(temperature=0.8, top_k=20, max_tokens=20, seed=1, ignore_eos=True)
    mixed = llm.generate(prompts, [GREEDY, sampled, GREEDY, sampled])
    assert [mixed[0], mixed[2]] == llm.generate([prompts[0], prompts[2]], GREEDY)
    assert mixed[1].token_ids == llm.generate([prompts[1]], sampled)[0].token_ids


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_the_pieces_of_a_stream_are_the_completion(llm, temperature):
    params = SamplingParams(temperature=temperature, max_tokens=60, seed=3, logprobs=2, ignore_eos=True, stop="~~")
    prompt = "Ñandú y camión"
    done = llm.generate(prompt, params)[0]
    deltas = list(llm.stream(prompt, params))
    assert "".join(delta.text for delta in deltas) == done.text == llm.tokenizer.decode(done.token_ids)
    assert [token for delta in deltas for token in delta.token_ids] == done.token_ids
    assert [entry for delta in deltas for entry in delta.logprobs or ()] == done.logprobs
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [done.finish_reason]


def test_logprobs_agree_with_a_full_forward(llm, model):
    prompt = [9, 8, 7]
    params = SamplingParams(temperature=0.9, top_k=50, max_tokens=10, seed=0, logprobs=3, ignore_eos=True)
    out = llm.generate([prompt], params)[0]
    with torch.inference_mode():
        logprobs_TV = model(torch.tensor([prompt + out.token_ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert out.logprobs is not None and len(out.logprobs) == len(out.token_ids) == 10
    for entry, token, row_V in zip(out.logprobs, out.token_ids, logprobs_TV, strict=True):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(row_V[token].item(), abs=1e-4)
        assert [value for _, value in entry.top] == pytest.approx(row_V.topk(3).values.tolist(), abs=1e-4)


# ---------------------------------------------------------------------------------------------- ends


def test_stop_string_and_stop_token(llm):
    out = llm.generate([[9, 8, 7]], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))[0]
    assert out.finish_reason == "length" and len(out.token_ids) == 200
    middle = out.text[40:43]
    cut = llm.generate([[9, 8, 7]], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, stop=middle))[0]
    assert (cut.finish_reason, cut.text) == ("stop", out.text[: out.text.index(middle)])
    assert out.token_ids[: len(cut.token_ids)] == cut.token_ids and middle in llm.tokenizer.decode(cut.token_ids)


def test_end_of_text_of_config_and_tokenizer_stop_an_answer(model, tokenizer):
    free = LLM.from_parts(model, tokenizer).generate([[9, 8, 7]], GREEDY)[0].token_ids
    end = free[6]
    config = model.config.replace(eos_token_id=end)
    stopping = Transformer(config)
    stopping.load_state_dict(model.state_dict())
    params = SamplingParams(temperature=0, max_tokens=20)
    out = LLM.from_parts(stopping, tokenizer).generate([[9, 8, 7]], params)[0]
    assert (out.token_ids, out.finish_reason) == (free[: free.index(end) + 1], "stop")
    assert LLM.from_parts(stopping, tokenizer).generate([[9, 8, 7]], GREEDY)[0].token_ids == free


def test_the_context_ends_an_answer(tokenizer):
    config = tiny().replace(vocab_size=VOCABULARY, max_position_embeddings=32)
    llm = LLM.from_parts(Transformer(config).init_weights(), tokenizer, num_drafts=4)
    out = llm.generate([[5] * 20], SamplingParams(temperature=0, max_tokens=500, ignore_eos=True))[0]
    assert (len(out.token_ids), out.finish_reason) == (12, "length")
    assert len(llm.generate([[5] * 31], GREEDY)[0].token_ids) == 1
    with pytest.raises(UserError, match=r"32 tokens.*context 32"):
        llm.generate([[5] * 32], GREEDY)


def test_closing_a_stream_ends_the_work(llm):
    stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=400, ignore_eos=True))
    next(stream), next(stream)
    tokens = llm.stats.tokens
    stream.close()
    assert list(stream) == [] and llm.stats.tokens == tokens < 10
    assert not torch.is_inference_mode_enabled()


def test_nothing_leaks_between_steps_of_a_stream(llm):
    for _ in llm.stream([5, 6, 7], GREEDY):
        assert not torch.is_inference_mode_enabled()


# ---------------------------------------------------------------------------------------------- opening


def test_a_path_is_opened_as_asked(model, tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr("minga.engine.llm.load_stored", lambda path, *, quant: asked.append((path, quant)) or model)
    monkeypatch.setattr("minga.engine.llm.weight_files", lambda path: [])
    monkeypatch.setattr("minga.engine.llm.load_tokenizer", lambda path: asked.append(path) or tokenizer)
    llm = LLM("a-model", quant="int8", num_drafts=2)
    assert asked == [("a-model", "int8"), "a-model"]
    assert (llm.model, llm.config, llm.max_context, llm.num_drafts) == (model, model.config, 512, 2)
    with pytest.raises(UserError, match="cache is 'int3'.*float32, float16, int8"):
        LLM("a-model", cache="int3")


@pytest.mark.parametrize("kind", ["int8", "gguf"])
def test_weights_that_memory_does_not_hold_stay_on_the_disk(model, tokenizer, monkeypatch, tmp_path, caplog, kind):
    path = tmp_path / "model"
    if kind == "int8":
        few = blocks.quantize(copy.deepcopy(model), blocks.FORMATS["int8"])
        store.save(few, path, tokenizer=tokenizer)
    else:
        path = path.with_suffix(".gguf")
        metadata, tensors = to_gguf(model.config, model.state_dict())
        kinds = {name: "Q8_0" for name, tensor in tensors.items() if tensor.ndim > 1 and tensor.shape[-1] % 32 == 0}
        write_gguf(path, metadata, tensors, kinds)
        monkeypatch.setattr("minga.engine.llm.load_tokenizer", lambda path: tokenizer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = LLM(path).generate(mixed_prompts(3), GREEDY)
    assert caplog.text == "" and not list((tmp_path / "cache").glob("minga/*"))
    taken, plain = [], DiskMemory.empty

    def noted(self, *shape, dtype):
        taken.append(shape)
        return plain(self, *shape, dtype=dtype)

    monkeypatch.setattr("minga.engine.llm.free_memory", lambda device: 50_000)
    monkeypatch.setattr(DiskMemory, "empty", noted)
    llm = LLM(path, max_memory="1GB")
    assert llm.generate(mixed_prompts(3), GREEDY) == expected and taken
    assert "they stay on the disk" in caplog.text and "tokens/s" in caplog.text
    assert not list((tmp_path / "cache").glob("minga/*"))  # nothing has a name


def test_a_disk_that_is_too_full_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("os.posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"3\.0 GB of disk.*No space left"):
        DiskMemory(3 * 10**9, 1e9)


# ---------------------------------------------------------------------------------------------- prompts


def test_prompt_forms(llm):
    one = llm.generate("hola", GREEDY)
    assert one == llm.generate(["hola"], GREEDY) == llm.generate([llm.tokenizer.encode("hola")], GREEDY)
    assert one[0].num_prompt_tokens == 4
    assert llm.generate([], GREEDY) == []
    assert llm.encode("") == [llm.tokenizer.eos_id]
    assert len(llm.generate("", GREEDY)[0].token_ids) == 20


def test_bos_comes_first_where_the_model_wants_it(llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "bos_id", 1)
    assert llm.encode("a") == llm.tokenizer.encode("a")
    monkeypatch.setattr(llm.tokenizer, "add_bos", True)
    assert llm.encode("a") == [1, *llm.tokenizer.encode("a")]
    assert llm.encode("") == [1]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "empty"),
        ([[5, VOCABULARY]], "token ids"),
        ([[-1]], "token ids"),
        ([5, 6], "lists of token ids"),
        ([[5] * 600, [5]], "600 tokens.*context 512"),
    ],
)
def test_bad_prompts(llm, prompts, message):
    with pytest.raises(UserError, match=message):
        llm.generate(prompts, GREEDY)


def test_params_for_each_prompt_or_one_for_all(llm):
    with pytest.raises(UserError, match="3 prompts have 2 params"):
        llm.generate([[5]] * 3, [GREEDY, GREEDY])


def test_a_stream_refuses_at_the_call(llm):
    with pytest.raises(UserError, match="context 512"):
        llm.stream([5] * 600, GREEDY)


def test_chat_goes_through_the_template(llm):
    messages = [{"role": "user", "content": "hola"}]
    ids = llm.tokenizer.render_chat(messages)
    assert llm.chat(messages, GREEDY) == llm.generate([ids], GREEDY)[0]
    assert "".join(delta.text for delta in llm.stream_chat(messages, GREEDY)) == llm.chat(messages, GREEDY).text


def test_chat_needs_a_template(llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hola"}])


# ---------------------------------------------------------------------------------------------- memory and stats


def pages_for(model: Transformer, num: int) -> int:
    """max_memory that holds the weights and so many pages, of 64 rows of 4 layers of 32 + 8 numbers of 4 bytes."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) + num * 64 * 4 * 40 * 4


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_too_little_memory_for_all_changes_nothing(model, tokenizer, temperature):
    """Texts of up to three pages in four: some wait, some give up what they had and read it again."""
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=100, ignore_eos=True)
    prompts = mixed_prompts(9)
    whole = LLM.from_parts(model, tokenizer).generate(prompts, params)
    narrow = LLM.from_parts(model, tokenizer, max_memory=pages_for(model, 4))
    assert narrow.generate(prompts, params) == whole
    assert narrow.stats.prompt_tokens > sum(map(len, prompts))  # some was read twice
    assert narrow._runner.scheduler.pool.num_free == 4


def test_memory_that_holds_not_even_one(model, tokenizer):
    with pytest.raises(UserError, match=r"MB of weights.*max_memory is 0\.10 MB"):
        LLM.from_parts(model, tokenizer, max_memory="100KB")
    llm = LLM.from_parts(model, tokenizer, max_memory=pages_for(model, 2))
    assert len(llm.generate([[5] * 10], GREEDY)[0].token_ids) == 20
    with pytest.raises(UserError, match=r"300 tokens needs .* ask for fewer"):
        llm.stream([5] * 10, SamplingParams(max_tokens=290))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4e9),
        ("512MB", 512e6),
        ("1.5 GiB", 1.5 * 2**30),
        ("2g", 2e9),
        ("123", 123),
        (7, 7),
        ("1e9", None),
        ("-1", None),
        ("GB", None),
    ],
)
def test_sizes(text, size):
    if size is None:
        with pytest.raises(UserError, match="max_memory"):
            parse_bytes(text, "max_memory")
    else:
        assert parse_bytes(text, "max_memory") == size


def test_stats(model, tokenizer):
    llm = LLM.from_parts(model, tokenizer, num_drafts=2)
    llm.generate(mixed_prompts(4), GREEDY)
    stats = llm.stats
    assert (stats.first_tokens, stats.tokens) == (4, 80)
    assert stats.prompt_tokens == sum(map(len, mixed_prompts(4)))
    assert stats.drafted > 0 and stats.acceptance == stats.accepted / stats.drafted
    assert stats.tokens_per_second is not None and stats.tokens_per_second > 0
    assert stats.ttft is not None and stats.prefill_seconds > 0 and stats.decode_seconds > 0
    plain = LLM.from_parts(model, tokenizer, speculate=False)
    plain.generate([[5]], GREEDY)
    assert (plain.stats.drafted, plain.stats.acceptance) == (0, None)


def test_a_model_without_modules_has_no_drafts_of_them(tokenizer):
    llm = LLM.from_parts(grouped_query_model(), tokenizer, speculate=False)
    llm.generate([[5]], GREEDY)
    assert llm.num_drafts == LLM.from_parts(grouped_query_model(), tokenizer).num_drafts == 0
    assert llm.stats.drafted == 0


def test_num_drafts_has_limits(model, tokenizer):
    with pytest.raises(UserError, match="num_drafts is 5"):
        LLM.from_parts(model, tokenizer, num_drafts=5)


def test_the_probabilities_of_a_broken_model_are_refused(tokenizer):
    model = Transformer(tiny().replace(vocab_size=VOCABULARY)).init_weights()
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(UserError, match="not numbers"):
        LLM.from_parts(model, tokenizer).generate([[5]], SamplingParams(max_tokens=2))


# ---------------------------------------------------------------------------------------------- coming and going


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_requests_join_those_that_run(llm, temperature):
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=30, ignore_eos=True)
    prompts = mixed_prompts(6)
    alone = [llm.generate([prompt], params)[0] for prompt in prompts]
    entries = []
    for prompt in prompts:
        entries.append(llm.submit(prompt, params))
        llm.step()
        llm.step()
    assert len(llm._runner.scheduler.running) > 1
    while not all(entry.sequence.finished for entry in entries):
        llm.step()
    assert [entry.sequence.completion() for entry in entries] == alone
    llm.step()  # nothing to do


def test_two_streams_share_their_steps(llm):
    one, two = llm.stream([5, 6, 7], GREEDY), llm.stream([8, 9], GREEDY)
    deltas = [next(one)], [next(two)]
    deltas[0].extend(one)
    assert llm.stats.tokens > 30  # most of the other's too
    deltas[1].extend(two)
    said = [[token for delta in each for token in delta.token_ids] for each in deltas]
    assert said == [llm.generate([prompt], GREEDY)[0].token_ids for prompt in ([5, 6, 7], [8, 9])]


def test_a_cancelled_request_gives_its_pages_back(llm):
    free = llm._runner.scheduler.pool.num_free
    running, waiting = llm.submit([5] * 100, GREEDY), llm.submit([6] * 100, GREEDY)
    llm.cancel(waiting)
    llm.step()
    llm.cancel(running)
    llm.cancel(running)
    assert llm._runner.scheduler.pool.num_free == free and not llm._runner.scheduler.busy


def test_a_step_that_fails_lets_go_of_all(llm, monkeypatch):
    llm.submit([5] * 100, GREEDY), llm.submit([6] * 100, GREEDY)
    llm.step()
    pool = llm._runner.scheduler.pool
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="lost"):
        patch.setattr(llm._runner, "_go_on", lambda group: (_ for _ in ()).throw(RuntimeError("lost")))
        llm.step()
    assert pool.num_free == pool.num_pages and not llm._runner.scheduler.busy
    assert len(llm.generate([[5] * 100], GREEDY)[0].token_ids) == 20


def test_a_stream_whose_work_another_lost_says_so(llm, monkeypatch):
    one, two = llm.stream([5, 6, 7], GREEDY), llm.stream([8, 9], GREEDY)
    next(one), next(two)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="lost"):
        patch.setattr(llm._runner, "step", lambda: (_ for _ in ()).throw(RuntimeError("lost")))
        list(one)
    with pytest.raises(RuntimeError, match="let go with it"):
        list(two)
    assert len(llm.generate([[8, 9]], GREEDY)[0].token_ids) == 20


# ---------------------------------------------------------------------------------------------- what was read before


@pytest.fixture
def kept(model, tokenizer) -> LLM:
    """An engine whose weights do not change, so that what was read is kept from call to call."""
    llm = LLM.from_parts(model, tokenizer)
    llm._weights_stay = True
    return llm


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_prompt_that_was_read_is_not_read_again(kept, temperature):
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=30, ignore_eos=True)
    prompt = [random.Random(0).randrange(3, VOCABULARY) for _ in range(200)]
    first = kept.generate([prompt], params)[0]
    assert (first.num_cached_tokens, kept.stats.cached_tokens) == (0, 0)
    again = kept.generate([prompt], params)[0]
    assert again == first and again.num_cached_tokens == kept.stats.cached_tokens == 192
    longer = kept.generate([prompt[:130] + [7] * 70], params)[0]
    assert longer.num_cached_tokens == 128
    # a conversation goes on: what was answered has been read too
    turn = prompt + first.token_ids + [9] * 40
    second = kept.generate([turn], params)[0]
    assert second.num_cached_tokens >= 192
    fresh = LLM.from_parts(kept.model, kept.tokenizer).generate([turn], params)[0]
    assert second == fresh and fresh.num_cached_tokens == 0


def test_tenants_share_nothing(kept):
    prompt = [5] * 200
    kept.generate([prompt], GREEDY, salt="a")
    assert kept.generate([prompt], GREEDY, salt="b")[0].num_cached_tokens == 0
    assert kept.generate([prompt], GREEDY)[0].num_cached_tokens == 0
    assert kept.generate([prompt], GREEDY, salt="a")[0].num_cached_tokens == 192


def test_requests_side_by_side_share_pages(kept):
    pool, prompt = kept._runner.scheduler.pool, [5] * 300
    kept.generate([prompt], GREEDY)
    before = pool.num_free
    entries = [kept.submit([*prompt, index], GREEDY) for index in range(4)]
    kept.step()
    assert before - pool.num_free == 4 + 4  # four in common, one of each
    while not all(entry.sequence.finished for entry in entries):
        kept.step()
    assert pool.num_free == before


def test_weights_that_may_be_in_training_are_read_anew(model, tokenizer):
    llm = LLM.from_parts(model, tokenizer)
    llm.generate([[5] * 200], GREEDY)
    assert llm.generate([[5] * 200], GREEDY)[0].num_cached_tokens == 0


# ---------------------------------------------------------------------------------------------- penalties


def test_penalties_reach_the_text_whatever_runs_beside_it(llm):
    plain = llm.generate([[9, 8, 7]], GREEDY)[0].token_ids
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logit_bias={plain[0]: -100})
    assert plain[0] not in llm.generate([[9, 8, 7]], params)[0].token_ids
    once = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, presence_penalty=1000)
    said = llm.generate([[9, 8, 7]], once)[0].token_ids
    assert len(set(said)) == 200  # every token once
    both = llm.generate([[9, 8, 7], [5]], [once, GREEDY])
    assert both[0].token_ids == said and both[1] == llm.generate([[5]], GREEDY)[0]


# ---------------------------------------------------------------------------------------------- a cache in fewer bits


@pytest.mark.parametrize("cache, off", [("float16", 0.02), ("int8", 0.3)])
def test_a_smaller_cache_says_nearly_the_same(model, tokenizer, forward_pass, cache, off):
    """The text is a function of the prompt as before, and its probabilities are near those of a cache of floats."""
    params = SamplingParams(temperature=0, max_tokens=30, logprobs=0, ignore_eos=True)
    prompts = mixed_prompts(5)
    exact = LLM.from_parts(model, tokenizer).generate(prompts, params)
    small = LLM.from_parts(model, tokenizer, cache=cache)
    outs = small.generate(prompts, params)
    assert small._pages.bytes_per_token < 0.6 * 4 * 40 * 4
    for prompt, out, other in zip(prompts, outs, exact, strict=True):
        assert out.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=off)
        if forward_pass == "compiled":
            assert small.generate([prompt], params)[0] == out


def test_embeddings_are_the_mean_of_the_last_states(model, llm):
    prompts = [*mixed_prompts(5), list(range(3, 250)) * 2]
    prompts[-1] = prompts[-1][: llm.max_context - 1]
    found_ND = llm.embed(prompts)
    assert found_ND.shape == (6, model.config.hidden_size)
    for ids, found_D in zip(prompts, found_ND, strict=True):
        with torch.no_grad():
            expected_D = model.hidden(torch.tensor([ids]))[0].mean(0)
        torch.testing.assert_close(found_D, expected_D / expected_D.norm(), atol=1e-4, rtol=1e-4)
    again = llm.embed(prompts[:1])
    torch.testing.assert_close(again[0], found_ND[0], atol=1e-5, rtol=1e-5)
