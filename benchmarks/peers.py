"""llama.cpp by way of llama-cpp-python, and the GGUF files it reads and makes, with the same weights as ours.

Needs the extra `bench` (`pip install 'minga[bench]'`); nothing is fetched or installed from here.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minga.checkpoint import names
from minga.model.transformer import Transformer


def write_gguf(model: Transformer, file: Path, kind: str) -> None:
    """A deepseek2 file as llama.cpp's own converter writes it. kind: F32, Q8_0 or Q4_0, of all matrices but the router."""
    import gguf

    config = model.config
    assert config.is_mla and not config.num_nextn_predict_layers
    writer = gguf.GGUFWriter(str(file), "deepseek2")
    latent = config.kv_lora_rank or 0
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": 1,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": config.rope.rope_theta,
        "rope_dimension_count": config.rope_dim,
        "q_lora_rank": config.q_lora_rank or 0,  # it asks for one
        "kv_lora_rank": latent,
        "key_length": latent + config.qk_rope_head_dim,
        "value_length": latent,
        "key_length_mla": config.qk_head_dim,
        "value_length_mla": config.v_head_dim,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID,
    }
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{number}>" for number in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["< 0"])  # it asks for one
    quantized = gguf.GGMLQuantizationType[kind]
    state = model.state_dict()
    for name, entry in names.gguf_table(config).items():
        tensor = state[entry.internal]
        tensor = tensor[entry.place] if entry.place else tensor
        if name.endswith("attn_kv_b.weight"):
            per_head = tensor.view(config.num_attention_heads, -1, tensor.shape[-1])
            k, v = per_head.split([config.qk_nope_head_dim, config.v_head_dim], 1)
            parts = {name.replace("kv_b", "k_b"): k.transpose(1, 2), name.replace("kv_b", "v_b"): v}
        else:
            parts = {name: tensor}
        for part, values in parts.items():
            array = np.ascontiguousarray(values.float().numpy())
            if array.ndim < 2 or "ffn_gate_inp" in part:
                writer.add_tensor(part, array)
            else:
                writer.add_tensor(part, gguf.quants.quantize(array, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(source: Path, file: Path, kind: str, *, threads: int) -> None:
    """llama.cpp's own rounding of a file in F32. kind: Q4_K_S or another, for every matrix whose rows it fits."""
    import llama_cpp

    silence()
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = threads, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(params))
    assert not failed, f"llama.cpp could not round the model to {kind}"


@cache
def silence() -> Any:
    """Turns llama.cpp's log off. The result is what it calls instead, which must live as long as the process."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    return quiet


class Llama:
    """llama.cpp over its C interface, with a cache for `sequences` sequences of `context` tokens.

    exact_attention: in float32, its cache too; else as llama.cpp does by itself, in float16.
    """

    def __init__(self, file: Path, *, threads: int, context: int, sequences: int = 1, exact_attention: bool = False):
        import llama_cpp

        self._c = llama_cpp
        silence()
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context * sequences, 512, 512
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = sequences
        if exact_attention:
            params.flash_attn_type, params.type_k, params.type_v = 0, llama_cpp.GGML_TYPE_F32, llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp could not open the model"
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def read(self, tokens: list[int], positions: list[int], sequences: list[int], wanted: list[bool]) -> None:
        """One call of the model; logits of the tokens that are `wanted`."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, want) in enumerate(zip(tokens, positions, sequences, wanted, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, want
        assert self._c.llama_decode(self._context, batch) == 0, "llama.cpp could not compute this batch"

    def prefill(self, tokens: list[int], sequence: int = 0) -> None:
        for start in range(0, len(tokens), 512):
            part = tokens[start : start + 512]
            ends = [start + i + 1 == len(tokens) for i in range(len(part))]
            self.read(part, list(range(start, start + len(part))), [sequence] * len(part), ends)

    def decode(self, token: int, position: int) -> None:
        self.read([token], [position], [0], [True])

    def forget(self, position: int) -> None:
        """Drops what the cache holds from `position` on."""
        memory = self._c.llama_get_memory(self._context)
        self._c.llama_memory_seq_rm(memory, -1, position, -1)

    def logits(self, index: int = -1) -> torch.Tensor:
        """Of the last call, for the token at `index` of it, (V,)."""
        pointer: Any = self._c.llama_get_logits_ith(self._context, index)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, shape=(self._vocabulary,)).copy())
