"""A Transformer whose forward pass is one call of the compiled kernels (minga/kernels/cpu/net.cpp).

A token's numbers depend on its own sequence alone, to the bit: not on the tokens computed beside it, nor on how many calls
a prompt is read in. minga/engine/plain.py is the same in torch.

  N tokens of one call, B sequences, T tokens of each, D model dim, H heads, K nope dim, V value dim, C latent, P rotated pairs
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from minga.engine.plain import PlainModel, Tokens
from minga.engine.sampler import SamplingParams, not_numbers
from minga.errors import UserError
from minga.kernels import cpu, ops, panels
from minga.kernels.cpu import net
from minga.kernels.panels import Empty
from minga.model.attention import GroupedQueryAttention, LatentAttention
from minga.model.block import Block
from minga.model.cache import BLOCK, PAGE, Cache
from minga.model.experts import MLP, MoE
from minga.model.mtp import MTPModule
from minga.model.transformer import Transformer
from minga.quant.blocks import FLOATS, FORMATS, Format, Quantized, dense_weight, formats_of
from minga.quant.fp8 import BlockFP8

if TYPE_CHECKING:
    from minga.engine.scheduler import Entry

_CACHED = {torch.float32: net.FLOAT_CACHE, torch.float16: net.HALF_CACHE, torch.int8: net.INT8_CACHE}
_MAX_TOKENS, _PARTIAL = 256, 2**24  # of one call: tokens, and numbers of partial results of attention


def compile_model(
    model: Transformer, note: Callable[[str], None] = lambda line: None, *, empty: Empty = torch.empty
) -> PlainModel | CompiledModel:
    """The plain form where the compiled forward pass cannot be had: another device or dtype, FP8, or no compiler.

    empty: gives the memory for stored weights.
    """
    config, floats = model.config, {p.dtype for p in model.parameters()}
    can_run = (
        model.device.type == "cpu"
        and floats <= {torch.float32}
        and config.rope.rope_type != "dynamic"
        and config.hidden_act == "silu"
        and not any(isinstance(format, BlockFP8) for format in formats_of(model))
    )
    return CompiledModel(model, empty) if can_run and cpu.load(note, keep_memory=False) else PlainModel(model)


class CompiledModel:
    """Stored weights are laid out anew, in place; parameters are used where they lie."""

    exact = True  # a token's numbers depend on its own sequence alone

    def __init__(self, model: Transformer, empty: Empty = torch.empty):
        net.check()
        assert (PAGE, BLOCK) == (net.PAGE, net.CACHE_BLOCK)
        self.model = model.eval()
        stored = [module for module in model.modules() if isinstance(module, Quantized)]
        memory = net.Memory(sum(tensor.nbytes for module in stored for tensor in module.buffers()), empty)
        for module in stored:
            module.to_panels(memory.empty)
        if stored:
            _leave_the_file(model)
            net.give_back()
        self._net, self._call = _describe(model, memory), net.Call()
        self._angles: tuple[Tensor, Tensor] = (torch.empty(0, 0), torch.empty(0, 0))
        self.config, self.dtype, self.device = model.config, torch.float32, torch.device("cpu")
        # weights in few bits are less exact than a cache in float16, and half the bytes are half the time
        few_bits = any(not format.is_float for format in formats_of(model))
        self.cache_dtype = torch.float16 if few_bits else torch.float32

    def hidden(self, tokens: Tokens, cache: Cache) -> Tensor:
        """The states after the last norm, (N, D); the tokens' rows are in the cache then."""
        return self._run(tokens, None, cache)

    def mtp_hidden(self, tokens: Tokens, hidden_ND: Tensor, cache: Cache) -> Tensor:
        """As `hidden`, of the first MTP module: `tokens` are the next ones, at the positions of the states."""
        return self._run(tokens, hidden_ND.contiguous(), cache)

    def head(self, hidden_ND: Tensor) -> Tensor:
        """Logits, (N, V)."""
        return net.head(self._net, hidden_ND.contiguous())

    def choose(
        self,
        logits: list[Tensor],
        each: list[tuple[SamplingParams, list[tuple[int, int]]]],
        allowed: Sequence[list[Tensor] | None] | None = None,
    ) -> list[list[int]]:
        """For each sequence the tokens that its rows of logits (T, V) give. each: how, and seed and place of each draw;
        allowed: which tokens each row may give, see `sampler.masked`; None: all.
        """
        draws = [draw for _, draws in each for draw in draws]
        how = _sampling([(params, seed) for params, draws in each for seed, _ in draws])
        places_N = torch.tensor([place for _, place in draws])
        words: list[Tensor | None] | None = None
        if allowed is not None and any(allowed):
            words = []
            for rows_TV, mask in zip(logits, allowed, strict=True):
                words += mask or [None] * len(rows_TV)
        tokens_N = net.choose(torch.cat(logits), how, torch.arange(len(draws)), places_N, words)
        if bool((tokens_N < 0).any()):
            raise not_numbers()
        return [part.tolist() for part in tokens_N.split([len(rows_TV) for rows_TV in logits])]

    def decode(self, entries: Sequence[Entry], cache: Cache, *, num_drafts: int, steps: int) -> list[list[list[int]]]:
        """`steps` steps with so many guesses, in one call: for each text what each step gave. With guesses the entries'
        `new_ids` and `state_TD` go on with them.
        """
        B, T = len(entries), max([num_drafts + 1, *(len(entry.new_ids) for entry in entries if num_drafts)])
        latest = [entry.new_ids if num_drafts else entry.sequence.ids[-1:] for entry in entries]
        new_BT = torch.tensor([new + [0] * (T - len(new)) for new in latest])
        count_B = torch.tensor([len(new) for new in latest])
        positions_B = torch.tensor([entry.sequence.length - 1 for entry in entries])
        rows_B = torch.tensor([entry.row for entry in entries])
        state_BTD = None
        if num_drafts:
            state_BTD = torch.zeros(B, T, self.config.hidden_size)
            for entry, state_TD in zip(entries, state_BTD, strict=True):
                state_TD[: len(entry.new_ids)] = entry.state_TD[: len(entry.new_ids)]
        how = _sampling([(entry.sequence.params, entry.sequence.seed) for entry in entries])
        state = (new_BT, count_B, state_BTD, positions_B, rows_B, how)
        tokens_SBT, counts_SB = net.decode(self._net, self._prepare(cache), *state, num_drafts=num_drafts, steps=steps)
        came = [
            [step[:count] for step, count in zip(each, counts, strict=True)]
            for each, counts in zip(tokens_SBT.transpose(0, 1).tolist(), counts_SB.T.tolist(), strict=True)
        ]
        if any(step[-1] < 0 for steps_of_one in came for step in steps_of_one):
            raise not_numbers()
        if state_BTD is not None:
            for entry, steps_of_one, state_TD in zip(entries, came, state_BTD, strict=True):
                entry.new_ids, entry.state_TD = steps_of_one[-1], state_TD
        return came

    def _run(self, tokens: Tokens, hidden_ND: Tensor | None, cache: Cache) -> Tensor:
        N, D, last = len(tokens.ids_N), self.config.hidden_size, int(tokens.positions_N.max())
        if last >= cache.capacity:
            raise UserError(f"position {last} is beyond the cache's {cache.capacity} rows. give the cache more room")
        out_ND = torch.empty(N, D)
        call, at_most = self._prepare(cache), self._tokens_at_once(last)
        call.mtp = hidden_ND is not None
        for start in range(0, N, at_most):
            call.N = min(at_most, N - start)
            call.ids, call.positions, call.sequence = (t.data_ptr() + start * t.element_size() for t in tokens)
            call.hidden = None if hidden_ND is None else hidden_ND.data_ptr() + start * D * 4
            call.out = out_ND.data_ptr() + start * D * 4
            net.forward(self._net, call)
        return out_ND

    def _prepare(self, cache: Cache) -> net.Call:
        """The call with what does not depend on its tokens filled in."""
        call, slots, table_BP = self._call, cache.pages.slots, cache.table_BP
        cos_SP, sin_SP = self._angles_for(cache.capacity)
        call.threads, call.cached, call.width = torch.get_num_threads(), _CACHED[slots.dtype], cache.pages.width
        call.slots, size = slots.data_ptr(), slots.element_size()
        call.layer_stride, call.page_stride, call.row_stride = (slots.stride(dim) * size for dim in range(3))
        assert table_BP.is_contiguous() and table_BP.dtype == torch.int64
        call.tables, call.table_width = table_BP.data_ptr(), table_BP.shape[1]
        call.cos, call.sin = cos_SP.data_ptr(), sin_SP.data_ptr()
        return call

    def _tokens_at_once(self, last: int) -> int:
        """As many as find room for the partial results of attention over positions up to `last`."""
        c = self.config
        width = c.kv_lora_rank or c.value_head_dim
        return max(1, min(_MAX_TOKENS, _PARTIAL // (c.num_attention_heads * width * (last // PAGE + 1))))

    def _angles_for(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions up to `capacity`, (S, P) each."""
        if capacity > len(self._angles[0]):
            cos_1SP, sin_1SP = self.model.rope(torch.arange(capacity)[None], torch.float32)
            self._angles = cos_1SP[0].contiguous(), sin_1SP[0].contiguous()
        return self._angles


def _sampling(each: list[tuple[SamplingParams, int]]) -> ctypes.Array[net.Sampling]:
    return (net.Sampling * len(each))(
        *(net.Sampling(p.temperature, p.top_p, p.min_p, min(p.top_k, 2**62), seed) for p, seed in each)
    )


def _leave_the_file(model: Transformer) -> None:
    """Copies what is still float32, norms and routers: they alone would keep all of a mapped file in memory."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for module in model.modules():
        if isinstance(module, Quantized):
            continue  # copied as it was laid out
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.dtype == torch.float32:
                setattr(module, name, buffer.clone())


# ---------------------------------------------------------------------------------------------- what the call is told


def _describe(model: Transformer, memory: net.Memory) -> net.Net:
    c, modules = model.config, [cast(MTPModule, module) for module in model.mtp][:1]
    blocks = [cast(Block, block) for block in model.model.layers] + [module.block for module in modules]
    layers = (net.Layer * len(blocks))()
    few_bits = next((format for format in formats_of(model) if not format.is_float), None)
    described = [_layer(block, few_bits, memory) for block in blocks]
    for index, layer in enumerate(described):
        layers[index] = layer
    result = net.Net(
        D=c.hidden_size, H=c.num_attention_heads, G=c.num_key_value_heads,
        K=c.qk_nope_head_dim if c.is_mla else c.head_dim, R=c.qk_rope_head_dim if c.is_mla else c.head_dim,
        V=c.value_head_dim, C=c.kv_lora_rank or 0, halves=int(c.rope_style == "halves"),
        A=c.num_experts_per_tok, active_width=c.moe_intermediate_size, softmax=int(c.scoring_func == "softmax"),
        noaux=int(c.topk_method == "noaux_tc"), groups=1 if c.topk_method == "greedy" else c.n_group,
        kept_groups=c.topk_group, normalise=int(c.norm_topk_prob and c.topk_method == "noaux_tc"),
        routed_scale=c.routed_scaling_factor, attention_scale=c.attention_scale, eps=c.rms_norm_eps,
        num_layers=c.num_hidden_layers, layers=ctypes.addressof(layers), embed=_linear(model.model.embed_tokens),
        head=_linear(model.model.embed_tokens if model.lm_head is None else model.lm_head),
        norm=model.model.norm.weight.detach(),
    )  # fmt: skip
    result.kept += [layers, described]
    for module in modules:
        result.set("eh_proj", _linear(module.eh_proj))
        for name, norm in (("enorm", module.enorm), ("hnorm", module.hnorm), ("mtp_norm", module.norm)):
            result.set(name, norm.weight.detach())
    return result


def _layer(block: Block, format: Format | None, memory: net.Memory) -> net.Layer:
    attention, mlp = block.self_attn, block.mlp
    layer = net.Layer(
        input_norm=block.input_layernorm.weight.detach(), post_norm=block.post_attention_layernorm.weight.detach()
    )
    if isinstance(attention, LatentAttention):
        _latent(layer, attention, format, memory)
    else:
        _grouped(layer, attention)
    layer.set("o", _linear(attention.o_proj))
    dense = mlp.shared_experts if isinstance(mlp, MoE) else mlp
    if isinstance(dense, MLP):
        for name in ("gate", "up", "down"):
            layer.set(name, _linear(dense.get_submodule(f"{name}_proj")))
    if isinstance(mlp, MoE):
        layer.set("experts", mlp.gate.config.n_routed_experts)
        layer.set("router", _float_matrix(mlp.gate.weight.detach()))
        bias = mlp.gate.e_score_correction_bias
        layer.set("router_bias", None if bias is None else bias.float())
        layer.set("expert_gate_up", _stored(mlp.experts, "gate_up_proj"))
        layer.set("expert_down", _stored(mlp.experts, "down_proj"))
    return layer


def _latent(layer: net.Layer, attention: LatentAttention, format: Format | None, memory: net.Memory) -> None:
    """The up-projections apart: what takes a query into the latent, and what takes the latent to values."""
    c = attention.config
    layer.set("attention", net.LATENT)
    if c.q_lora_rank is None:
        layer.set("q", _linear(attention.q_proj))
    else:
        layer.set("q_a", _linear(attention.q_a_proj))
        layer.set("q_a_norm", attention.q_a_layernorm.weight.detach())
        layer.set("q", _linear(attention.q_b_proj))
    layer.set("kv", _linear(attention.kv_a_proj_with_mqa))
    layer.set("latent_norm", attention.kv_a_layernorm.weight.detach())
    kv_b = attention.kv_b_proj
    kept = kv_b.format("weight").dtype if isinstance(kv_b, Quantized) and format is None else torch.float32
    w_HOC = dense_weight(kv_b).detach().to(kept).view(c.num_attention_heads, -1, c.kv_lora_rank or 0)
    w_uk_HKC, w_uv_HVC = w_HOC.split([c.qk_nope_head_dim, c.v_head_dim], 1)
    for name, weight in (("uk", w_uk_HKC.transpose(1, 2)), ("uv", w_uv_HVC)):
        layer.set(name, _rounded(weight.contiguous(), format, memory))


def _grouped(layer: net.Layer, attention: GroupedQueryAttention) -> None:
    layer.set("attention", net.GROUPED)
    for name in ("q", "k", "v"):
        layer.set(name, _linear(attention.get_submodule(f"{name}_proj")))
    if attention.config.qk_norm:
        layer.set("q_norm", attention.q_norm.weight.detach())
        layer.set("k_norm", attention.k_norm.weight.detach())


def _linear(module: nn.Module) -> net.Matrix:
    bias = getattr(module, "bias", None)
    bias = None if bias is None else bias.detach()
    if isinstance(module, Quantized):
        return _stored(module, "weight", bias)
    return _float_matrix(module.get_parameter("weight").detach(), bias)


def _stored(module: nn.Module, name: str, bias: Tensor | None = None) -> net.Matrix:
    if not isinstance(module, Quantized):
        return _float_matrix(module.get_parameter(name).detach())
    (rows, cols), format = module.shape(name)[-2:], module.format(name)
    scale = None if format.is_float else module.get_buffer(f"{name}_scale")
    return net.matrix(
        module.get_buffer(name), scale=scale, bias=bias, rows=rows, cols=cols, kind=format.name, block=format.span
    )


def _float_matrix(weight: Tensor, bias: Tensor | None = None) -> net.Matrix:
    rows, cols = weight.shape[-2:]
    return net.matrix(weight.contiguous(), rows=rows, cols=cols, kind=FLOATS[weight.dtype].name, bias=bias)


def _rounded(weight: Tensor, format: Format | None, memory: net.Memory) -> net.Matrix:
    """A matrix of our own making, in int8 for a model in few bits."""
    if format is None:
        return _float_matrix(weight)
    rows, cols = weight.shape[-2:]
    block = format.block if format.name in FORMATS else FORMATS["int8"].block
    words, scale = panels.from_rows(*ops.quantize_int8(weight, block), memory.empty)
    return net.matrix(words, scale=scale, rows=rows, cols=cols, kind="int8", block=block)
