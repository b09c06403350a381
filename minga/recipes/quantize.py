"""int4 weights calibrated on text (GPTQ, `minga.quant.gptq`), layer by layer.

The layers of a block that read the same input are rounded together, for what they are given by the layers before them as
these are after rounding. In memory are the streams of the calibration text at one place, and a few layers' second moments.

  B batch, T tokens, N tokens of all batches, A active experts a token, D model dim, F expert hidden, I inputs of a layer
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minga.data.loader import Loader
from minga.data.packing import Batch
from minga.data.shards import Shards
from minga.errors import UserError
from minga.kernels import ops
from minga.model.attention import Context
from minga.model.block import Block
from minga.model.experts import MLP, MoE
from minga.model.mtp import MTPModule
from minga.model.transformer import Transformer
from minga.quant import blocks, gptq

FORMAT = blocks.FORMATS["int4"]
MIN_TOKENS = 0.5  # for each input of an expert's matrix; with fewer, what is learned is these tokens and not the text
# layers of attention, MLA's and GQA's, that can be rounded at once because none reads what another gives
_STAGES = (
    ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    ("q_b_proj", "kv_b_proj"),
    ("o_proj",),
)


@dataclass
class Calibration:
    """`tokens` read. Of all `experts`, `calibrated` had enough of them; the others are rounded to nearest."""

    tokens: int
    experts: int = 0
    calibrated: int = 0


def calibration_batches(shards: Shards, model: Transformer, tokens: int, *, seq_len: int = 512) -> list[Batch]:
    """About `tokens` tokens of the training split, drawn at random (always the same)."""
    length = min(seq_len, model.config.max_position_embeddings)
    if tokens < length:
        raise UserError(f"{tokens} tokens are too few to calibrate on (quantize). it must be at least {length}")
    rows = min(8, tokens // length)
    loader = Loader(shards, batch_size=rows, seq_len=length, num_extra=1 + model.config.num_nextn_predict_layers)
    return [loader.next_batch() for _ in range(tokens // (rows * length))]


@torch.no_grad()
def calibrate_int4(
    model: Transformer, batches: Sequence[Batch], note: Callable[[str], None] = lambda line: None
) -> Calibration:
    """Replaces the matrices of a float model by int4, in place; the embedding is rounded to nearest.

    batches: with one extra target for each MTP module. note: is told how far it is. Raises `UserError` if the model gives
    infinities or NaN for the text.
    """
    model.eval()
    report = Calibration(tokens=sum(batch.ids_BT.numel() for batch in batches))
    contexts = [
        model.context(batch.ids_BT, cache=None, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)
        for batch in batches
    ]
    embed = blocks.QuantEmbedding(weight=blocks.Stored.round(model.model.embed_tokens.weight, FORMAT))
    model.model.embed_tokens = cast(nn.Embedding, embed)
    streams = [embed(batch.ids_BT) for batch in batches]
    for number, block in enumerate(model.model.layers, 1):
        streams = _block(cast(Block, block), streams, contexts, report)
        note(f"layer {number} of {len(model.model.layers)}")
    hidden = [model.model.norm(x_BTD) for x_BTD in streams]
    if model.lm_head is not None:
        _round(model, "lm_head", hidden)
    for depth, module in enumerate(model.mtp):
        next_ids = [batch.targets_KBT[depth].clamp(min=0) for batch in batches]
        hidden = _mtp(cast(MTPModule, module), [embed(ids_BT) for ids_BT in next_ids], hidden, contexts, report)
        note(f"MTP module {depth + 1} of {len(model.mtp)}")
    return report


def _mtp(
    module: MTPModule, embedded: list[Tensor], hidden: list[Tensor], contexts: list[Context], report: Calibration
) -> list[Tensor]:
    joined = [
        torch.cat([module.enorm(e_BTD), module.hnorm(h_BTD)], -1) for e_BTD, h_BTD in zip(embedded, hidden, strict=True)
    ]
    _round(module, "eh_proj", joined)
    streams = _block(module.block, [module.eh_proj(x) for x in joined], contexts, report)
    return [module.norm(x_BTD) for x_BTD in streams]


def _block(block: Block, streams: list[Tensor], contexts: list[Context], report: Calibration) -> list[Tensor]:
    """What the block gives for the streams once it is rounded."""
    normed = [block.input_layernorm(x_BTD) for x_BTD in streams]
    for stage in _STAGES:
        _attention(block.self_attn, [name for name in stage if hasattr(block.self_attn, name)], normed, contexts)
    streams = [x + block.self_attn(y, context) for x, y, context in zip(streams, normed, contexts, strict=True)]
    normed = [block.post_attention_layernorm(x_BTD) for x_BTD in streams]
    if isinstance(block.mlp, MoE):
        _moe(block.mlp, normed, report)
    else:
        _mlp(cast(MLP, block.mlp), normed)
    return [x + block.mlp(y) for x, y in zip(streams, normed, strict=True)]


def _attention(attention: nn.Module, names: list[str], normed: list[Tensor], contexts: list[Context]) -> None:
    if not names:
        return
    seen = {name: _Moments() for name in names}

    def take(moments: _Moments, module: nn.Module, given: tuple[Any, ...]) -> None:
        moments.add(given[0])

    def take_latent(moments: _Moments, module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        moments.add(output)

    with ExitStack() as stack:
        for name, moments in seen.items():
            if name == "kv_b_proj":  # the absorbed form reads its weight and never calls it
                hook = attention.get_submodule("kv_a_layernorm").register_forward_hook(partial(take_latent, moments))
            else:
                hook = attention.get_submodule(name).register_forward_pre_hook(partial(take, moments))
            stack.callback(hook.remove)
        for y_BTD, context in zip(normed, contexts, strict=True):
            attention(y_BTD, context)
    for name, moments in seen.items():
        _replace(attention, name, moments)


def _mlp(mlp: MLP, inputs: list[Tensor]) -> None:
    moments = _Moments(inputs)
    _replace(mlp, "gate_proj", moments)
    _replace(mlp, "up_proj", moments)
    _round(mlp, "down_proj", (F.silu(mlp.gate_proj(x)) * mlp.up_proj(x) for x in inputs))


def _moe(moe: MoE, inputs: list[Tensor], report: Calibration) -> None:
    x_ND = torch.cat([x_BTD.flatten(0, 1) for x_BTD in inputs])
    index_NA = moe.gate(x_ND)[0]
    stacks = moe.experts.gate_up_proj.detach(), moe.experts.down_proj.detach()
    rounded = [blocks.Stored.round(stack, FORMAT) for stack in stacks]
    for expert, (gate_up, down) in enumerate(zip(*stacks, strict=True)):
        mine_MD = x_ND[(index_NA == expert).any(-1)]
        report.experts += 1
        if len(mine_MD) < MIN_TOKENS * max(gate_up.shape[-1], down.shape[-1]):
            continue
        report.calibrated += 1
        matrix = _rounded(gate_up, _Moments([mine_MD]))
        _put(rounded[0], expert, matrix)
        _put(rounded[1], expert, _rounded(down, _Moments([ops.swiglu(F.linear(mine_MD, matrix.dense()))])))
    moe.experts = cast(Any, blocks.QuantExperts(gate_up_proj=rounded[0], down_proj=rounded[1]))
    if moe.shared_experts is not None:
        _mlp(moe.shared_experts, inputs)


def _put(stack: blocks.Stored, number: int, matrix: blocks.Stored) -> None:
    assert stack.factors is not None
    assert matrix.factors is not None
    stack.data[number], stack.factors[number] = matrix.data, matrix.factors


class _Moments:
    """Sum of x.T x over the inputs x (.., I) of a layer."""

    def __init__(self, inputs: Iterable[Tensor] = ()) -> None:
        self.sum_II: Tensor | float = 0.0
        for x in inputs:
            self.add(x)

    def add(self, x: Tensor) -> None:
        x_NI = x.detach().flatten(0, -2).float()
        self.sum_II = self.sum_II + x_NI.T @ x_NI


def _round(parent: nn.Module, name: str, inputs: Iterable[Tensor]) -> None:
    _replace(parent, name, _Moments(inputs))


def _replace(parent: nn.Module, name: str, moments: _Moments) -> None:
    linear = cast(nn.Linear, parent.get_submodule(name))
    setattr(parent, name, blocks.QuantLinear(_rounded(linear.weight.detach(), moments), linear.bias))


def _rounded(weight_OI: Tensor, moments: _Moments) -> blocks.Stored:
    assert isinstance(moments.sum_II, Tensor)
    if not moments.sum_II.isfinite().all():
        raise UserError(
            "the model gives infinities or NaN for the calibration text (quantize). check it with `minga eval`"
        )
    return blocks.Stored(FORMAT, weight_OI.shape, *gptq.quantize_int4(weight_OI, moments.sum_II, FORMAT.block))
