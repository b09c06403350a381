"""int4 weights calibrated on text (GPTQ, `minga.quant.gptq`), one half of a block after the other.

A half (attention or feed-forward) is first run as it is, to see what its layers are given; then its layers are rounded, and
it is run again, so that all that follows is calibrated on what the rounded layers give. In memory are the streams of the
calibration text at one place, and the second moments of one half.

  B batch, T tokens, N tokens of all batches, D model dim, E experts, A active experts a token, F expert hidden, I inputs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minga.data.packing import Batch
from minga.kernels import ops
from minga.model.attention import Context, LatentAttention
from minga.model.block import Block
from minga.model.experts import MLP, Experts, MoE
from minga.model.mtp import MTPModule
from minga.model.transformer import Transformer
from minga.quant import blocks, gptq

FORMAT = blocks.FORMATS["int4"]


@dataclass
class Calibration:
    """`tokens` of text; of `experts` matrices in stacks those that were `calibrated`, the rest being rounded to nearest."""

    tokens: int
    experts: int = 0
    calibrated: int = 0


class Moments:
    """Sum of x.T x over the inputs x (.., I) of a layer."""

    def __init__(self) -> None:
        self.sum_II: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        x_NI = x.detach().flatten(0, -2).float()
        self.sum_II = self.sum_II + x_NI.T @ x_NI


OPTS = dict(stages=True, min_ratio=0.0, weigh=False, damping=0.01)


@torch.no_grad()
def calibrate_int4(model: Transformer, batches: Sequence[Batch], note: Callable[[str], None] = lambda line: None) -> Calibration:
    """Replaces the weights of a float model by int4, in place.

    batches: with as many extra targets as the model has MTP modules. Experts that see fewer tokens than a matrix has
    columns over `gptq`... are rounded to nearest, as is the embedding.
    """
    model.eval()
    report = Calibration(tokens=sum(batch.ids_BT.numel() for batch in batches))
    contexts = [_context(model, batch) for batch in batches]
    model.model.embed_tokens = cast(nn.Embedding, blocks.QuantEmbedding(model.model.embed_tokens.weight, FORMAT))
    streams = [model.model.embed_tokens(batch.ids_BT) for batch in batches]
    for number, block in enumerate(model.model.layers):
        streams = _block(cast(Block, block), streams, contexts, report)
        note(f"layer {number + 1} of {len(model.model.layers)}")
    hidden = [model.model.norm(x_BTD) for x_BTD in streams]
    if model.lm_head is not None:
        _round(model, "lm_head", hidden)
    for depth, module in enumerate(model.mtp):
        hidden = _mtp(cast(MTPModule, module), depth, model, batches, hidden, contexts, report)
        note(f"MTP module {depth + 1} of {len(model.mtp)}")
    return report


def _context(model: Transformer, batch: Batch) -> Context:
    return model.context(batch.ids_BT, cache=None, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)


def _mtp(module, depth, model, batches, hidden, contexts, report) -> list[Tensor]:
    joined = [
        torch.cat([module.enorm(model.model.embed_tokens(b.targets_KBT[depth].clamp(min=0))), module.hnorm(h)], -1)
        for b, h in zip(batches, hidden, strict=True)
    ]
    _round(module, "eh_proj", joined)
    streams = _block(module.block, [module.eh_proj(x) for x in joined], contexts, report)
    return [module.norm(x) for x in streams]


def _block(block: Block, streams: list[Tensor], contexts: list[Context], report: Calibration) -> list[Tensor]:
    normed = [block.input_layernorm(x) for x in streams]
    stages = ([("q_proj", "q_a_proj", "kv_a_proj_with_mqa", "k_proj", "v_proj"), ("q_b_proj", "kv_b_proj"), ("o_proj",)])
    if not OPTS["stages"]:
        stages = [sum(stages, ())]
    for stage in stages:
        _attention(block.self_attn, stage, normed, contexts)
    streams = [x + block.self_attn(y, c) for x, y, c in zip(streams, normed, contexts, strict=True)]
    normed = [block.post_attention_layernorm(x) for x in streams]
    if isinstance(block.mlp, MLP):
        _mlp(block.mlp, normed)
    else:
        _moe(block.mlp, normed, report)
    return [x + block.mlp(y) for x, y in zip(streams, normed, strict=True)]


def _attention(attention, stage, normed, contexts) -> None:
    seen = {name: Moments() for name, child in attention.named_children() if name in stage and isinstance(child, nn.Linear)}
    if not seen: return
    with ExitStack() as hooks:
        for name, moments in seen.items():
            if name == "kv_b_proj":
                hooks.enter_context(_removed(attention.kv_a_layernorm.register_forward_hook(lambda m, i, o, s=moments: s.add(o))))
            else:
                hooks.enter_context(_removed(getattr(attention, name).register_forward_pre_hook(lambda m, i, s=moments: s.add(i[0]))))
        for y, c in zip(normed, contexts, strict=True):
            attention(y, c)
    for name, moments in seen.items():
        _replace(attention, name, moments.sum_II)


class _removed:
    def __init__(self, h): self.h = h
    def __enter__(self): return self
    def __exit__(self, *a): self.h.remove()


def _round(parent, name, inputs) -> None:
    moments = Moments()
    for x in inputs:
        moments.add(x)
    _replace(parent, name, moments.sum_II)


def _replace(parent, name, moments_II) -> None:
    linear = getattr(parent, name)
    module = blocks.QuantLinear(linear.weight, None if linear.bias is None else linear.bias.detach(), FORMAT)
    module.weight, module.weight_scale = gptq.quantize_int4(linear.weight.detach(), moments_II, FORMAT.block, damping=OPTS["damping"])
    setattr(parent, name, module)


def _mlp(mlp: MLP, inputs: list[Tensor]) -> None:
    _round(mlp, "gate_proj", inputs)
    _round(mlp, "up_proj", inputs)
    _round(mlp, "down_proj", [F.silu(mlp.gate_proj(x)) * mlp.up_proj(x) for x in inputs])


def _moe(moe: MoE, inputs: list[Tensor], report: Calibration) -> None:
    x_ND = torch.cat([x.flatten(0, 1) for x in inputs])
    index_NA, weight_NA, _ = moe.gate(x_ND)
    experts = moe.experts
    held = blocks.QuantExperts(experts.gate_up_proj, experts.down_proj, FORMAT)
    E = experts.gate_up_proj.shape[0]
    for e in range(E):
        tok, slot = (index_NA == e).nonzero(as_tuple=True)
        x = x_ND[tok]
        report.experts += 1
        if OPTS.get('counts') is not None: OPTS['counts'].append(len(tok))
        if len(tok) < OPTS["min_ratio"] * x.shape[1]:
            continue
        report.calibrated += 1
        w = weight_NA[tok, slot][:, None] if OPTS["weigh"] else 1.0
        gu = experts.gate_up_proj[e]
        s, c = gptq.quantize_int4(gu, (x * w).T @ (x * w), FORMAT.block, damping=OPTS["damping"])
        held.gate_up_proj[e], held.gate_up_proj_scale[e] = s, c
        h = ops.swiglu(F.linear(x, ops.dequantize_int4(s, c, FORMAT.block, gu.shape[1], torch.float32)))
        s, c = gptq.quantize_int4(experts.down_proj[e], (h * w).T @ (h * w), FORMAT.block, damping=OPTS["damping"])
        held.down_proj[e], held.down_proj_scale[e] = s, c
    moe.experts = held
    if moe.shared_experts is not None:
        _mlp(moe.shared_experts, inputs)
