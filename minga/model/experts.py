"""The feed-forward half of a block: a dense SwiGLU, or a router with experts (V2 section 2.2, V3 section 2.1.2).

N tokens of the whole batch, D model dim, E routed experts, A active experts a token, F expert hidden, Q groups
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minga.config import ModelConfig
from minga.kernels import ops
from minga.model.linear import Linear


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, dim: int, hidden: int, *, bias: bool = False):
        super().__init__()
        self.gate_proj = Linear(dim, hidden, bias=bias)
        self.up_proj = Linear(dim, hidden, bias=bias)
        self.down_proj = Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if isinstance(gate, Linear) and gate.bias is None:
            return ops.mlp(x, gate.weight, up.weight, down.weight, precision=gate.precision)
        return down(F.silu(gate(x)) * up(x))  # with biases, or stored in 8 bits


class Router(nn.Module):
    """Chooses A of E experts for each token and weighs them.

    `e_score_correction_bias` takes part in the choice only, never in the weight (V3 section 2.1.2); training moves it
    after every step (`minga.train.balance`). It stays float32 whatever the model's dtype: a bias of 5 moved by 0.001 is
    lost in bfloat16. Scores too are computed in float32.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.logits_NE: Tensor | None = None  # of the last forward in training mode, for the router's z-loss
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        has_bias = config.topk_method == "noaux_tc"
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if has_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns expert numbers (N, A), weights (N, A) and all scores (N, E), the last two float32."""
        c = self.config
        logits_NE = F.linear(x_ND.float(), self.weight.float())
        self.logits_NE = logits_NE if self.training else None
        bias, v3 = self.e_score_correction_bias, c.topk_method == "noaux_tc"
        num_groups = 1 if c.topk_method == "greedy" else c.n_group
        return ops.route(
            logits_NE,
            None if bias is None else bias.float(),
            num_active=c.num_experts_per_tok,
            sigmoid=c.scoring_func == "sigmoid",
            num_groups=num_groups,
            groups_kept=min(c.topk_group, num_groups),
            group_top=2 if v3 else 1,  # V3 scores a group by its two best experts, V2 by its best
            normalize=c.norm_topk_prob and v3,
            scale=c.routed_scaling_factor,
        )


class Experts(nn.Module):
    """E SwiGLUs as two stacked tensors; rows of `gate_up_proj` are F gates, then F ups."""

    precision: str = "float32"

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, hidden = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * hidden, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, hidden))

    def forward(self, x_ND: Tensor, index_NA: Tensor, weight_NA: Tensor) -> Tensor:
        return ops.experts(x_ND, index_NA, weight_NA, self.gate_up_proj, self.down_proj, precision=self.precision)


class MoE(nn.Module):
    """Router, routed experts and the shared expert that every token passes.

    After a forward in training mode `routing` holds (index, scores), which balancing and its loss read and clear.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts: MLP | None = None
        if config.n_shared_experts:
            hidden = config.moe_intermediate_size * config.n_shared_experts  # several shared experts are one wide MLP
            self.shared_experts = MLP(config.hidden_size, hidden, bias=config.mlp_bias)
        self.routing: tuple[Tensor, Tensor] | None = None

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        index_NA, weight_NA, score_NE = self.gate(x_ND)
        if self.training:
            self.routing = (index_NA, score_NE)
        out_BTD = self.experts(x_ND, index_NA, weight_NA.to(x_ND.dtype)).view_as(x_BTD)
        return out_BTD if self.shared_experts is None else out_BTD + self.shared_experts(x_BTD)
