"""The whole model: embedding, blocks, norm, head, and the multi-token prediction modules beside them.

Parameters carry the names of the public format (docs/formats.md), so a state dict needs next to no translation.

  B batch, T tokens, S keys, D model dim, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minga.config import ModelConfig
from minga.errors import UserError
from minga.model.attention import Context, RMSNorm
from minga.model.block import Block
from minga.model.cache import Cache
from minga.model.experts import Experts, MoE, Router
from minga.model.linear import Linear
from minga.model.mtp import MTPModule
from minga.model.rope import Rope
from minga.quant.blocks import dense_weight


@dataclass
class Output:
    """`logits` (B, T, V) are float32, float64 in a float64 model; `hidden_BTD` is the stream after the final norm."""

    logits: Tensor
    hidden_BTD: Tensor


class Body(nn.Module):
    """What the public names call `model.`: embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A decoder built from its config. Call it with token ids (B, T); see `forward`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(MTPModule(config, depth) for depth in range(config.num_nextn_predict_layers))
        self.rope = Rope(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """What a cache for this model is made of."""
        return self.dtype

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def init_weights(self, generator: torch.Generator | None = None, *, residual_scale: float = 1.0) -> Transformer:
        """Normal with `initializer_range`, scaled down by sqrt(2 layers) where a block writes to the residual stream.

        The scaling is GPT-2's; with it the stream keeps its size at any depth, and the first loss is ln(vocabulary).
        `residual_scale` multiplies it: with 0 every block begins as the identity, which training does (docs/log.md).
        """
        std = self.config.initializer_range
        residual_std = residual_scale * std / (2 * self.config.num_hidden_layers) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                into_stream = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, 0.0, residual_std if into_stream else std, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Router):
                nn.init.normal_(module.weight, 0.0, std, generator=generator)
            elif isinstance(module, Experts):
                nn.init.normal_(module.gate_up_proj, 0.0, std, generator=generator)
                nn.init.normal_(module.down_proj, 0.0, residual_std, generator=generator)
        return self

    def set_precision(self, precision: str) -> Transformer:
        """Chooses what the blocks' (and MTP modules') matrix products are computed in: one of `config.train.PRECISIONS`.

        Embedding, head, router, norms and the attention core keep the weights' dtype, as in V3 section 3.3.1.
        """
        for block in (*self.model.layers, *self.mtp):
            for module in block.modules():
                if isinstance(module, (Linear, Experts)):
                    module.precision = precision
        return self

    def forward(
        self,
        ids_BT: Tensor,
        *,
        cache: Cache | None = None,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        last_only: bool = False,
    ) -> Output:
        """Logits for each token's successor.

        cache: keys of earlier tokens; this call's tokens are added at `positions_BT` (default: 0, 1, ..).
        segments_BT: document number of each token; attention stays inside a document (training on packed rows).
        last_only: logits of the last token of each row only, (B, 1, V).
        """
        hidden_BTD = self.hidden(ids_BT, cache=cache, positions_BT=positions_BT, segments_BT=segments_BT)
        return Output(self.head(hidden_BTD[:, -1:] if last_only else hidden_BTD), hidden_BTD)

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        cache: Cache | None = None,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after the final norm, (B, T, D)."""
        context = self.context(ids_BT, cache=cache, positions_BT=positions_BT, segments_BT=segments_BT)
        x_BTD = self.model.embed_tokens(ids_BT)
        for block in self.model.layers:
            x_BTD = block(x_BTD, context)
        return self.model.norm(x_BTD)

    def mtp_hidden(
        self,
        depth: int,
        next_ids_BT: Tensor,
        hidden_BTD: Tensor,
        *,
        cache: Cache | None = None,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """Module `depth`'s stream, (B, T, D); `head` turns it into a guess of the token after `next_ids_BT`."""
        context = self.context(next_ids_BT, cache=cache, positions_BT=positions_BT, segments_BT=segments_BT)
        return self.mtp[depth](self.model.embed_tokens(next_ids_BT), hidden_BTD, context)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the head's own matrix, or the embedding's where the two are tied."""
        return dense_weight(self.model.embed_tokens if self.lm_head is None else self.lm_head)

    def head(self, hidden_BTD: Tensor) -> Tensor:
        """Logits, float32 or wider."""
        if self.lm_head is not None:
            logits = self.lm_head(hidden_BTD)
        else:
            logits = F.linear(hidden_BTD, dense_weight(self.model.embed_tokens))
        return logits if logits.dtype == torch.float64 else logits.float()

    def context(
        self, ids_BT: Tensor, *, cache: Cache | None, positions_BT: Tensor | None, segments_BT: Tensor | None
    ) -> Context:
        """What the layers of one call share. Raises `UserError` when a position does not fit the cache."""
        T = ids_BT.shape[1]
        if positions_BT is None:
            positions_BT = torch.arange(T, device=ids_BT.device)[None]  # (1, T): the same for every row
        cos, sin = self.rope(positions_BT, self.dtype)
        if cache is None:
            return Context(cos, sin, positions_BT, segments_BT)
        length = int(positions_BT.max()) + 1
        if length > cache.capacity:
            raise UserError(
                f"position {length - 1} is beyond the cache's {cache.capacity} rows. give the cache more room"
            )
        return Context(cos, sin, positions_BT, cache=cache, length=length)

    def moe_layers(self) -> list[MoE]:
        """Every expert layer, main model first, then the MTP modules."""
        return [module for module in self.modules() if isinstance(module, MoE)]
