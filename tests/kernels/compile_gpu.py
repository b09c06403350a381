"""python tests/kernels/compile_gpu.py CAPABILITY -- compiles every Triton kernel for such a GPU, on a machine with none.

The wrappers are called as they are, but a launch only compiles. Prints a JSON list of what each launch became. This is a
process of its own, since whether Triton interprets or compiles is decided once, when it is loaded.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from minga.kernels import fp8, reference
from minga.kernels.gpu import latent_attention, quantize, router, tiles
from minga.kernels.gpu.block_gemm import block_gemm
from minga.kernels.gpu.grouped_gemm import experts

# the tensor cores' instructions, with the types of their operands: Ampere's, Hopper's, Blackwell's
_TENSOR_CORES = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*")


class _NoGpu:
    """A driver that knows which chip to compile for, and no more."""

    def __init__(self, capability: int):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _stack(cubin: bytes) -> int:
    """Bytes a thread keeps in memory for want of registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", usage)[0])


def main(capability: int) -> None:
    launched: list[dict[str, Any]] = []

    def compile_only(kernel: JITFunction, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
            ptx = compiled.asm["ptx"]
            found = {
                "name": kernel.fn.__name__,
                "label": label,
                "machine_code": len(compiled.asm["cubin"]),
                "tensor_cores": sorted(set(_TENSOR_CORES.findall(ptx))),
                "stack": _stack(compiled.asm["cubin"]),
                "shared_memory": compiled.metadata.shared,
            }
            launched.append(found)

        return launch

    triton.runtime.driver.set_active(_NoGpu(capability))
    JITFunction.__getitem__ = compile_only
    tiles.multiplies_e4m3 = lambda device: capability >= 89

    N, D, F, E, A = 256, 512, 256, 8, 2
    index_NA = torch.randint(E, (N, A))
    for dtype in (torch.float32, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")
        x, gate_up, down = (torch.zeros(shape, dtype=dtype) for shape in ((N, D), (E, 2 * F, D), (E, D, F)))
        experts(x, index_NA, torch.zeros(N, A), gate_up, down)
        for C, R, H in ((512, 64, 128), (32, 8, 4)):
            q_latent, q_rope = torch.zeros(2, 1, H, C, dtype=dtype), torch.zeros(2, 1, H, R, dtype=dtype)
            pages, table = torch.zeros(8, 64, C + R, dtype=dtype), torch.arange(8).view(2, 4)
            latent_attention.attend_latent_paged(
                q_latent, q_rope, pages, table, torch.zeros(2, 1, dtype=torch.int64), scale=0.1, num_parts=3
            )
    weights = torch.zeros(E, 2 * F, D), torch.zeros(E, D, F)
    label = "fp8"
    (gate_up, gate_up_scale), (down, down_scale) = (fp8.quantize(w, fp8.WEIGHT) for w in weights)
    x = torch.zeros(N, D, dtype=torch.bfloat16)
    experts(x, index_NA, torch.zeros(N, A), gate_up, down, scales=(gate_up_scale, down_scale))
    block_gemm(*quantize.quantize_fp8(x), gate_up[0], gate_up_scale[0], block=128, rows=128, dtype=x.dtype)
    block_gemm(*quantize.quantize_fp8(x), *quantize.quantize_fp8(x), block=128, rows=1)
    label = "int8"
    (gate_up, gate_up_scale), (down, down_scale) = (reference.quantize_int8(w, 64) for w in weights)
    experts(x, index_NA, torch.zeros(N, A), gate_up, down, scales=(gate_up_scale, down_scale), block=64)
    block_gemm(*quantize.quantize_int8(x, 64), gate_up[0], gate_up_scale[0], block=64, rows=1, dtype=x.dtype)
    label = "router"
    for sigmoid, groups, kept, top in ((True, 8, 4, 2), (False, 8, 3, 1), (False, 1, 1, 1)):
        kind = {"num_groups": groups, "groups_kept": kept, "group_top": top, "normalize": sigmoid, "scale": 2.5}
        bias = torch.zeros(256) if sigmoid else None
        router.route(torch.zeros(3, 256), bias, num_active=8, sigmoid=sigmoid, **kind)
    json.dump(launched, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
