"""`nn.Linear` whose three products (forward, and both of backward) are computed in a precision of one's choice."""

from __future__ import annotations

from torch import Tensor, nn

from minga.kernels import ops


class Linear(nn.Linear):
    """The weight stays in its own dtype whatever `precision` (one of `config.train.PRECISIONS`) the products are computed in."""

    precision: str = "float32"

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, precision=self.precision)
