"""A Transformer whose forward pass is one call of the compiled kernels (minga/kernels/cpu/net.cpp).

It answers to what the engine asks of a `Transformer`: `hidden`, `mtp_hidden`, `head`. A token's numbers depend on its own
sequence alone, to the bit: not on the tokens computed beside it, nor on how many calls a prompt is read in.

  B sequences, T tokens of one call, N = B·T, D model dim, H heads, K nope dim, V value dim, C latent, P rotated pairs
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from minga.errors import UserError
from minga.kernels import cpu, ops, panels
from minga.kernels.cpu import net
from minga.model.attention import GroupedQueryAttention, LatentAttention
from minga.model.block import Block
from minga.model.cache import Cache
from minga.model.experts import MLP, MoE
from minga.model.mtp import MTPModule
from minga.model.transformer import Transformer
from minga.quant.blocks import Format, Quantized, dense_weight, format_of
from minga.quant.fp8 import BlockFP8

_KINDS = {8: net.INT8, 4: net.INT4}
_MAX_TOKENS, _PARTIAL = 256, 2**24  # of one call: tokens, and numbers of partial results of attention


def compile_model(model: Transformer, note: Callable[[str], None] = lambda line: None) -> Transformer | CompiledModel:
    """The model itself where the compiled forward pass cannot be had: another device or dtype, FP8, or no compiler."""
    config, floats = model.config, {p.dtype for p in model.parameters()}
    can_run = (
        model.device.type == "cpu"
        and floats <= {torch.float32}
        and config.rope.rope_type != "dynamic"
        and config.hidden_act == "silu"
        and not isinstance(format_of(model), BlockFP8)
    )
    return CompiledModel(model) if can_run and cpu.load(note, keep_memory=False) else model


class CompiledModel:
    """Weights in few bits are laid out anew, in place; floats are used where they lie."""

    def __init__(self, model: Transformer):
        net.check()
        self.model = model.eval()
        stored = [module for module in model.modules() if isinstance(module, Quantized)]
        memory = net.Memory(sum(tensor.nbytes for module in stored for tensor in module.buffers()))
        for module in stored:
            module.to_panels(memory.empty)
        if stored:
            _leave_the_file(model)
        self._net, self._call = _describe(model, memory), net.Call()
        self._angles: tuple[Tensor, Tensor] = (torch.empty(0, 0), torch.empty(0, 0))
        self.config, self.dtype, self.device = model.config, torch.float32, torch.device("cpu")
        # weights in few bits are less exact than a cache in float16, and half the bytes are half the time
        self.cache_dtype = torch.float32 if format_of(model) is None else torch.float16

    def eval(self) -> CompiledModel:
        return self

    def hidden(self, ids_BT: Tensor, *, cache: Cache, positions_BT: Tensor) -> Tensor:
        """As `Transformer.hidden`; always with a cache."""
        return self._run(ids_BT, None, cache, positions_BT)

    def mtp_hidden(
        self, depth: int, next_ids_BT: Tensor, hidden_BTD: Tensor, *, cache: Cache, positions_BT: Tensor
    ) -> Tensor:
        assert depth == 0, "only the first module guesses"
        return self._run(next_ids_BT, hidden_BTD.contiguous(), cache, positions_BT)

    def head(self, hidden_BTD: Tensor) -> Tensor:
        B, T, D = hidden_BTD.shape
        return net.head(self._net, hidden_BTD.reshape(-1, D)).view(B, T, -1)

    def greedy(self, ids_B: Tensor, positions_B: Tensor, cache: Cache, steps: int) -> Tensor:
        """`steps` tokens of each sequence, (steps, B): every one the likeliest after what is before it."""
        assert int(positions_B.max()) + steps <= cache.capacity
        out_BD = torch.empty(len(ids_B), self.config.hidden_size)
        call, kept = self._prepare(cache), (ids_B.clone(), positions_B.clone(), torch.arange(len(ids_B)))
        call.N, call.mtp, call.hidden, call.out = len(ids_B), False, None, out_BD.data_ptr()
        call.ids, call.positions, call.sequence = (t.data_ptr() for t in kept)
        return net.greedy(self._net, call, kept[0], kept[1], steps)

    def speculate(
        self,
        new_ids: list[list[int]],
        hidden_BTD: Tensor,
        positions_B: Tensor,
        cache: Cache,
        *,
        num_drafts: int,
        steps: int,
    ) -> tuple[list[list[list[int]]], Tensor]:
        """`steps` greedy steps with guesses: what each gave each sequence, and the states that chose the last tokens.

        new_ids, hidden_BTD: the tokens of the last step and the states that chose them; positions_B: of the last tokens.
        """
        B, T = len(new_ids), num_drafts + 1
        assert int(positions_B.max()) + steps * T <= cache.capacity
        count_B = torch.tensor([len(new) for new in new_ids])
        new_BT = torch.tensor([new + [0] * (T - len(new)) for new in new_ids])
        state_BTD = torch.zeros(B, T, self.config.hidden_size)
        state_BTD[:, : hidden_BTD.shape[1]] = hidden_BTD[:, :T]
        came = net.speculate(self._net, self._prepare(cache), new_BT, count_B, state_BTD, positions_B.clone(), steps)
        tokens_SBT, counts_SB = (t.tolist() for t in came)
        each = zip(tokens_SBT, counts_SB, strict=True)
        return [[row[:n] for row, n in zip(rows, counts, strict=True)] for rows, counts in each], state_BTD

    def _run(self, ids_BT: Tensor, hidden_BTD: Tensor | None, cache: Cache, positions_BT: Tensor) -> Tensor:
        B, T = ids_BT.shape
        ids_N, positions_N = ids_BT.reshape(-1).contiguous(), positions_BT.expand(B, T).reshape(-1).contiguous()
        sequence_N = torch.arange(B * T) if T == 1 else torch.arange(B).repeat_interleave(T)
        last = int(positions_N.max())
        if last >= cache.capacity:
            raise UserError(f"position {last} is beyond the cache's {cache.capacity} slots. give the cache more room")
        D = self.config.hidden_size
        out_ND = torch.empty(B * T, D)
        call, at_most = self._prepare(cache), self._tokens_at_once(last)
        call.mtp = hidden_BTD is not None
        for start in range(0, B * T, at_most):
            call.N = min(at_most, B * T - start)
            call.ids, call.positions, call.sequence = (
                t.data_ptr() + start * t.element_size() for t in (ids_N, positions_N, sequence_N)
            )
            call.hidden = None if hidden_BTD is None else hidden_BTD.data_ptr() + start * D * 4
            call.out = out_ND.data_ptr() + start * D * 4
            net.forward(self._net, call)
        return out_ND.view(B, T, D)

    def _prepare(self, cache: Cache) -> net.Call:
        """The call with what does not depend on its tokens filled in."""
        call, slots = self._call, cache.slots
        cos_SP, sin_SP = self._angles_for(cache.capacity)
        call.threads, call.half = torch.get_num_threads(), slots.dtype == torch.float16
        call.slots, call.width = slots.data_ptr(), slots.shape[3]
        call.layer_stride, call.sequence_stride = slots.stride(0), slots.stride(1)
        call.cos, call.sin = cos_SP.data_ptr(), sin_SP.data_ptr()
        return call

    def _tokens_at_once(self, last: int) -> int:
        """As many as find room for the partial results of attention over positions up to `last`."""
        c = self.config
        width = c.kv_lora_rank or c.value_head_dim
        return max(1, min(_MAX_TOKENS, _PARTIAL // (c.num_attention_heads * width * (last // net.STRETCH + 1))))

    def _angles_for(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions up to `capacity`, (S, P) each."""
        if capacity > len(self._angles[0]):
            cos_1SP, sin_1SP = self.model.rope(torch.arange(capacity)[None], torch.float32)
            self._angles = cos_1SP[0].contiguous(), sin_1SP[0].contiguous()
        return self._angles


def _leave_the_file(model: Transformer) -> None:
    """Copies what is still float32, norms and routers: they alone would keep all of a mapped file in memory."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.dtype == torch.float32:
                setattr(module, name, buffer.clone())


# ---------------------------------------------------------------------------------------------- what the call is told


def _describe(model: Transformer, memory: net.Memory) -> net.Net:
    c, modules = model.config, [cast(MTPModule, module) for module in model.mtp][:1]
    blocks = [cast(Block, block) for block in model.model.layers] + [module.block for module in modules]
    layers = (net.Layer * len(blocks))()
    described = [_layer(block, format_of(model), memory) for block in blocks]
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
    w_HOC = dense_weight(attention.kv_b_proj).detach().view(c.num_attention_heads, -1, c.kv_lora_rank or 0)
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
    rows, cols = module.shape(name)[-2:]
    return net.matrix(
        module.get_buffer(name), scale=module.get_buffer(f"{name}_scale"), bias=bias, rows=rows, cols=cols,
        kind=_KINDS[module.format.bits], block=module.format.block,
    )  # fmt: skip


def _float_matrix(weight: Tensor, bias: Tensor | None = None) -> net.Matrix:
    rows, cols = weight.shape[-2:]
    return net.matrix(weight.contiguous(), rows=rows, cols=cols, kind=net.FLOAT32, bias=bias)


def _rounded(weight: Tensor, format: Format | None, memory: net.Memory) -> net.Matrix:
    """A matrix of our own making, in int8 for a model in few bits."""
    if format is None:
        return _float_matrix(weight)
    rows, cols = weight.shape[-2:]
    words, scale = panels.from_rows(*ops.quantize_int8(weight, format.block), bits=8, empty=memory.empty)
    return net.matrix(words, scale=scale, rows=rows, cols=cols, kind=net.INT8, block=format.block)
