"""python tests/kernels/compile_gpu.py CAPABILITY: compiles every kernel for that chip (80, 90, ...), which need not be here.

Prints a line for each. The sizes are DeepSeek-V3's; divisible ones, as there, let loads be wide and pipelined.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minga.kernels.gpu import block_gemm, grouped_gemm, latent_attention, quantize, router

KIB = 1024
SHARED = {80: 163 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}  # of a program, CUDA C guide
ANY = {"scale", "T", "active"}  # arguments that are not multiples of 16


def compile_kernel(
    kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any], **options: int
) -> None:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if name not in constants and name not in ANY]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
    assert shared <= SHARED[capability], f"{kernel.fn.__name__} wants {shared} bytes of shared memory"
    stack = _stack(compiled.asm["cubin"])
    assert stack <= 256, f"{kernel.fn.__name__} spills registers: {stack} bytes of stack a thread"
    tensor_cores = any(word in ptx for word in ("mma.sync", "wgmma", "tcgen05.mma"))
    print(kernel.fn.__name__, capability, constants.get("DOT", ""), f"shared {shared}", f"stack {stack}", end=" ")
    print(f"tensor cores {tensor_cores}")
    dot = constants.get("DOT")
    # float32 attention apart, each product is one of the tensor cores
    assert dot is None or tensor_cores or (dot == tl.float32 and constants["PRECISION"] == "ieee")


def _stack(cubin: bytes) -> int:
    """Bytes a thread keeps in memory for want of registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", usage)[0])


def main(capability: int) -> None:
    native = capability >= 89
    e4m3, in_e4m3 = ("*fp8e4nv", tl.float8e4nv) if native else ("*u8", tl.float16)
    kinds = [  # operand, scale of a weight, type of the product, columns of a block, rows that share a weight's scale
        (e4m3, "*fp32", in_e4m3, 128, 128),
        ("*i8", "*fp16", tl.int8, 64, 1),
        ("*bf16", None, tl.bfloat16, 64, 1),
        ("*fp32", None, tl.float32, 32, 1),
    ]
    loop = {"num_warps": 4, "num_stages": 3}
    for operand, scale, dot, columns, rows in kinds:
        operands = {
            **dict.fromkeys(("x_ptr", "hidden_ptr", "weight_ptr"), operand),
            **dict.fromkeys(("x_scale_ptr", "hidden_scale_ptr"), "*fp32" if scale else operand),
            "weight_scale_ptr": scale or operand,
            **{"out_ptr": "*fp32" if operand == "*fp32" else "*bf16", "order_ptr": "*i64", "plan_ptr": "*i64"},
            "route_ptr": "*bf16",
        }
        tile = {
            "ROWS": rows,
            "BLOCK_M": 64,
            "BLOCK_N": 64 if operand in ("*u8", "*fp32") else 128,
            "BLOCK_K": columns,
            "DOT": dot,
            "PRECISION": "tf32x3",
        }
        if scale is not None:
            compile_kernel(block_gemm._block_gemm, capability, operands, {**tile, "NEIGHBOURS": 8}, **loop)
        for kernel in (grouped_gemm._gate_up, grouped_gemm._down):
            compile_kernel(kernel, capability, operands, {**tile, "SCALED": scale is not None}, **loop)
    for fp8, values, scale, block in ((True, "*u8", "*u8", 128), (False, "*i8", "*fp32", 64)):
        pointers = {"x_ptr": "*bf16", "values_ptr": values, "scale_ptr": scale}
        compile_kernel(quantize._quantize, capability, pointers, {"BLOCK_N": 16, "BLOCK_K": block, "FP8": fp8})
    for operand, dot, tokens, stages in (("*bf16", tl.bfloat16, 32, 2), ("*fp32", tl.float32, 16, 1)):
        pointers = dict.fromkeys(("q_latent_ptr", "q_rope_ptr", "pages_ptr"), operand)
        pointers |= dict.fromkeys(("table_ptr", "positions_ptr"), "*i64")
        pointers |= {"out_ptr": "*fp32", "log_sum_ptr": "*fp32", "scale": "fp32"}
        tile = {"BLOCK_M": 16, "BLOCK_S": tokens, "BLOCK_C": 512, "BLOCK_R": 64, "DOT": dot, "PRECISION": "ieee"}
        compile_kernel(latent_attention._partial, capability, pointers, tile, num_warps=4, num_stages=stages)
    pointers = {"part_ptr": "*fp32", "log_sum_ptr": "*fp32", "out_ptr": "*bf16"}
    compile_kernel(latent_attention._combine, capability, pointers, {"BLOCK_L": 16, "BLOCK_C": 512})
    pointers = {**dict.fromkeys(("logits_ptr", "bias_ptr", "weight_ptr", "score_ptr"), "*fp32"), "index_ptr": "*i64"}
    rules = {"ACTIVE": 8, "GROUPS": 8, "KEPT": 4, "GROUP_TOP": 2, "SIGMOID": True, "BIASED": True, "NORMALIZE": True}
    tile = {"BLOCK_Q": 8, "BLOCK_G": 32, "BLOCK_A": 8}
    compile_kernel(router._route, capability, {**pointers, "scale": "fp32"}, rules | tile, num_warps=1)


if __name__ == "__main__":
    try:
        triton.knobs.nvidia.ptxas, triton.knobs.nvidia.ptxas_blackwell, triton.knobs.nvidia.cuobjdump  # noqa: B018
    except RuntimeError as missing:
        sys.exit(f"no assembler came with this Triton: {missing}")
    main(int(sys.argv[1]))
