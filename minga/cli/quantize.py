"""minga quantize: a model folder -> the same model in 8 or 4 bits, with what it saves and what it costs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

EXAMPLE = """\
examples:
  minga quantize runs/mine --to int8 --out models/mine-int8
  minga quantize model.gguf --to int4 --out models/small --data shards    and measure the loss of quality
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "quantize",
        help="store a model in 8 or 4 bits",
        description="Writes a model in int8 (blocks of 64 with a float16 scale each) or int4 (blocks of 32). It runs from them.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, run folder or .gguf file")
    parser.add_argument("--to", choices=["int8", "int4"], default="int8", help="number format (default int8)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--data", metavar="DIR", help="shards: compare bits a byte on their held-out text")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document on stdout")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    from minga import store
    from minga.quant import blocks

    model, tokenizer = store.load(args.model), store.load_tokenizer(args.model)
    float_bytes = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    format = blocks.FORMATS[args.to]
    report: dict[str, Any] = {"out": args.out, "format": format.name, "block": format.block}
    if args.data:
        report["bits_per_byte_float32"] = _bits_per_byte(model, args.data)
    blocks.quantize(model, format)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    report |= {"bytes_float32": float_bytes, f"bytes_{format.name}": size, "share": size / float_bytes}
    if args.data:
        report[f"bits_per_byte_{format.name}"] = _bits_per_byte(model, args.data)
    store.save(model, args.out, tokenizer=tokenizer)
    report["file_bytes"] = sum(file.stat().st_size for file in Path(args.out).glob("*.safetensors"))
    if args.json:
        print(json.dumps(report))
        return 0
    print(
        f"weights  {float_bytes / 1e6:.1f} MB in float32, {size / 1e6:.1f} MB in {format.name} ({report['share']:.1%})"
    )
    if args.data:
        before, after = report["bits_per_byte_float32"], report[f"bits_per_byte_{format.name}"]
        print(f"quality  {before:.4f} bits a byte in float32, {after:.4f} in {format.name} ({after / before - 1:+.2%})")
    print(f"model    {args.out}")
    return 0


def _bits_per_byte(model: Any, data: str) -> float:
    from minga.data.loader import evaluation_batches
    from minga.data.shards import open_shards
    from minga.recipes.evaluate import evaluate

    extra = 1 + model.config.num_nextn_predict_layers
    seq_len = min(256, model.config.max_position_embeddings)
    return evaluate(
        model, evaluation_batches(open_shards(data), batch_size=16, seq_len=seq_len, num_extra=extra)
    ).bits_per_byte
