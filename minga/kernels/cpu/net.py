"""What `net.cpp` is told about a model, and its two calls. The structures mirror the C++ ones field by field."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minga.kernels.cpu.build import available, call
from minga.kernels.panels import Empty

# What matrices are stored in, `Kind` in panels.h: floats, Minga's own formats, and GGUF's types.
KINDS = (
    "",
    "float32",
    "bfloat16",
    "float16",
    "int8",
    "int4",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q4_K",
    "Q5_K",
    "Q6_K",
)
LATENT, GROUPED = 0, 1
FLOAT_CACHE, HALF_CACHE, INT8_CACHE = 0, 1, 2
PAGE, CACHE_BLOCK = 64, 64  # rows of a page of the cache; numbers of a row in int8 that share a scale


class Structure(ctypes.Structure):
    """Keeps the tensors alive whose memory it points to. Tensors may be given for pointers."""

    def __init__(self, **values: Any):
        super().__init__()
        self.kept: list[Any] = []
        for name, value in values.items():
            self.set(name, value)

    def set(self, name: str, value: Any) -> None:
        self.kept.append(value)
        if isinstance(value, Tensor):
            assert value.is_contiguous()
            value = value.data_ptr()
        setattr(self, name, value)


class Matrix(Structure):
    """`count` matrices of (rows, cols), see panels.h. The default is none."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "block", "rows", "cols", "count")),
        *((name, ctypes.c_void_p) for name in ("data", "scale", "bias")),
    ]


def matrix(
    data: Tensor,
    *,
    rows: int,
    cols: int,
    kind: str,
    block: int = 0,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Matrix:
    """`data` as `kind` asks: floats (.., rows, cols), or words and factors of `minga.kernels.panels.from_rows`.

    block: columns of activations that share a scale, as many as share a float16 factor of the weights.
    """
    values: dict[str, Any] = {"kind": KINDS.index(kind), "block": block, "rows": rows, "cols": cols, "data": data}
    return Matrix(**values, count=data.shape[0] if data.ndim in (3, 5) else 1, scale=scale, bias=bias)


class Memory:
    """One piece of memory for all weights of a model, in large pages where the system has them: a decoding step walks
    through most of it, and with small pages every fourth kilobyte costs a look into the page table besides.
    """

    PAGE = 2 << 20

    def __init__(self, expected: int, empty: Empty = torch.empty):
        """expected: bytes; what does not fit comes from elsewhere. empty: gives the piece."""
        self._bytes = empty(self.size_for(expected), dtype=torch.uint8)
        self._used = -self._bytes.data_ptr() % self.PAGE
        call("minga_large_pages", self._bytes, self._bytes.nbytes)

    @classmethod
    def size_for(cls, expected: int) -> int:
        return expected + expected // 16 + 2 * cls.PAGE

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """As torch.empty."""
        size = math.prod(shape) * dtype.itemsize
        start = self._used
        if start + size > self._bytes.nbytes:
            return torch.empty(*shape, dtype=dtype)
        self._used += -(-size // 64) * 64
        return self._bytes[start : start + size].view(dtype).view(shape)


def _matrices(*names: str) -> list[tuple[str, Any]]:
    return [(name, Matrix) for name in names]


def _numbers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int64) for name in names]


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


class Layer(Structure):
    """MingaLayer."""

    _fields_ = [
        *_numbers("attention", "experts"),
        *_pointers("input_norm", "post_norm"),
        *_matrices("q_a", "q", "kv", "uk", "uv", "k", "v", "o"),
        *_pointers("q_a_norm", "latent_norm", "q_norm", "k_norm"),
        *_matrices("gate", "up", "down", "router"),
        *_pointers("router_bias"),
        *_matrices("expert_gate_up", "expert_down"),
    ]


class Net(Structure):
    """MingaNet. `layers`: the main model's, then the MTP modules'."""

    _fields_ = [
        *_numbers("D", "H", "G", "K", "R", "V", "C", "halves", "A", "active_width"),
        *_numbers("softmax", "noaux", "groups", "kept_groups", "normalise"),
        *((name, ctypes.c_double) for name in ("routed_scale", "attention_scale", "eps")),
        *_numbers("num_layers"),
        *_pointers("layers"),
        *_matrices("embed", "head"),
        *_pointers("norm"),
        *_matrices("eh_proj"),
        *_pointers("enorm", "hnorm", "mtp_norm"),
    ]


class Call(Structure):
    """MingaCall: one forward pass over N tokens."""

    _fields_ = [
        *_numbers("N", "threads", "mtp"),
        *_pointers("ids", "positions", "sequence", "tables"),
        *_numbers("table_width"),
        *_pointers("slots"),
        *_numbers("cached", "layer_stride", "page_stride", "row_stride", "width"),
        *_pointers("cos", "sin", "hidden", "out", "logits", "wanted"),
        *_numbers("num_wanted"),
    ]


class Sampling(ctypes.Structure):
    """MingaSampling: how one sequence draws its tokens."""

    _fields_ = [*((name, ctypes.c_double) for name in ("temperature", "top_p", "min_p")), *_numbers("top_k", "seed")]


def forward(net: Net, step: Call) -> None:
    """Fills `step.out` and writes the tokens' rows into the cache."""
    call("minga_net_forward", net, step)


def choose(
    logits_NV: Tensor,
    how: ctypes.Array[Sampling],
    rows_N: Tensor,
    positions_N: Tensor,
    allowed: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """The tokens that take the places `positions_N`, (N); -1 where the logits are no numbers. rows_N: which of `how`.

    allowed: for each row the words (W) whose bits say which tokens may be taken; None: all.
    """
    tokens_N, words = torch.empty_like(positions_N), None
    if allowed is not None:
        words = (ctypes.c_void_p * len(allowed))(*(None if row_W is None else row_W.data_ptr() for row_W in allowed))
    what = (logits_NV, *logits_NV.shape, how, rows_N, positions_N, words, tokens_N)
    call("minga_net_choose", *what, torch.get_num_threads())
    return tokens_N


def decode(
    net: Net,
    step: Call,
    new_BT: Tensor,
    count_B: Tensor,
    hidden_BTD: Tensor | None,
    positions_B: Tensor,
    rows_B: Tensor,
    how: ctypes.Array[Sampling],
    *,
    num_drafts: int,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Steps with guesses, fewer than T: tokens (steps, B, T) and how many of them came, (steps, B).

    new_BT: the tokens of the last step, count_B of them; hidden_BTD: the states that chose them; positions_B: where the
    last of them is; these four go on with the steps. rows_B: of the tables.
    """
    B, T = new_BT.shape
    tokens_SBT, counts_SB = new_BT.new_empty(steps, B, T), new_BT.new_empty(steps, B)
    state = (new_BT, count_B, hidden_BTD, positions_B, rows_B, how)
    call("minga_net_decode", net, step, steps, B, T, num_drafts, *state, tokens_SBT, counts_SB)
    return tokens_SBT, counts_SB


def head(net: Net, x_ND: Tensor) -> Tensor:
    """Logits, (N, V)."""
    out = x_ND.new_empty(x_ND.shape[0], net.head.rows)
    call("minga_net_head", net, x_ND, x_ND.shape[0], out, torch.get_num_threads())
    return out


def give_back() -> None:
    """Hands freed memory back to the system."""
    call("minga_give_back")


def let_go() -> None:
    """Lets the calling thread's helpers go, for the thread that will run models. Does nothing without the kernels."""
    if available():
        call("minga_let_go")


def check() -> None:
    """That both sides of this file mean the same."""
    sizes = sum(ctypes.sizeof(each) for each in (Net, Layer, Call, Sampling))
    assert call("minga_net_size") == sizes + PAGE + CACHE_BLOCK + len(KINDS)
