"""The attention cache: for latent attention 576-like numbers a token and layer (V2 section 2.1.2), else keys and values.

A cache has room for `capacity` tokens of `batch` sequences. Tokens are written at their own positions, so sequences of
one batch may stand at different lengths and a rejected draft is undone by writing over it: a query at position p only
ever looks at slots 0..p.

  B batch, T tokens of this call, S slots
"""

from __future__ import annotations

import torch
from torch import Tensor

from minga.config import ModelConfig


class Cache:
    """`slots` is (layers, B, S, width); a layer's row is [latent C | rope R], or [keys H·K | values H·K]."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        # one more layer for each MTP module, which attends over its own latents
        self.num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
        width = config.cache_elements_per_token // config.num_hidden_layers
        self.slots = torch.zeros(self.num_layers, batch, capacity, width, dtype=dtype, device=device)

    @property
    def batch(self) -> int:
        return self.slots.shape[1]

    @property
    def capacity(self) -> int:
        return self.slots.shape[2]

    @property
    def bytes_per_token(self) -> int:
        """All layers, MTP modules included, of one sequence."""
        return self.slots[:, 0, 0].numel() * self.slots.element_size()

    def write(self, layer: int, positions_BT: Tensor, row_BTW: Tensor) -> None:
        rows = torch.arange(self.batch, device=positions_BT.device)[:, None]
        self.slots[layer][rows, positions_BT] = row_BTW.to(self.slots.dtype)

    def read(self, layer: int, length: int) -> Tensor:
        """Slots 0..length-1 of every sequence, (B, length, width), not copied."""
        return self.slots[layer, :, :length]

    def select(self, rows: Tensor) -> None:
        """Keeps these sequences, in this order."""
        self.slots = self.slots[:, rows].contiguous()
