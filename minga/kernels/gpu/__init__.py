"""Triton kernels for NVIDIA GPUs from compute capability 8.0 on, one file an operation, each kernel above its wrapper.

  quantize          activations to E4M3 or int8 in blocks along a row
  block_gemm        products of two block-scaled matrices, E4M3 or int8
  grouped_gemm      the experts of a layer: gather, two grouped products, weighted scatter
  latent_attention  absorbed latent attention over a paged cache, its tokens split among programs
  router            scores to chosen experts and their weights
  tiles             what their inner loops share

`minga.kernels.ops` and `fp8` call them, where `usable` says so: this package imports without Triton, its modules do not.
Nothing here waits for the GPU. A model on a GPU comes here by itself; no command puts one there yet (`model.to("cuda")`).

tests/kernels/test_gpu.py has each kernel against its definition in `minga.kernels.reference`, under Triton's interpreter
where there is no GPU, and compiles all of them for chips from 8.0 to 12.0. None has run on a GPU, so none has been timed:
the sizes of tiles are a guess.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

_LOG = logging.getLogger("minga")


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these: all on the current NVIDIA GPU, 32 bits or fewer, and no gradient is to come of them.

    Says once if it is only Triton that is missing.
    """
    if not all(t.is_cuda and t.dtype != torch.float64 for t in tensors):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    device = tensors[0].device
    return device.index == torch.cuda.current_device() and _fits(device) and _has_triton()


@cache
def _fits(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _has_triton() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    _LOG.warning("Triton is missing: torch's own operations are used, which are slower. pip install 'minga[gpu]'")
    return False
