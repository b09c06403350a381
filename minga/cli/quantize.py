"""minga quantize: a model folder -> the same model in fewer bits, with what that saves and what it costs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minga.errors import UserError

if TYPE_CHECKING:
    from minga.model.transformer import Transformer
    from minga.recipes.evaluate import Comparison

EXAMPLE = """\
examples:
  minga quantize runs/mine --to int8 --out models/mine-int8
  minga quantize model.gguf --to int4 --out models/small --data shards    and measure the loss of quality
  minga quantize runs/mine --to int4 --calibrate shards --out models/small    rounded for this text
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "quantize",
        help="store a model in 8 or 4 bits",
        description="Writes a model in int8 (blocks of 64 with a float16 scale each), int4 (blocks of 32) or DeepSeek-V3's "
        "FP8 (blocks of 128 x 128). It runs from them.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, run folder or .gguf file")
    parser.add_argument("--to", choices=["int8", "int4", "fp8"], default="int8", help="number format (default int8)")
    parser.add_argument(
        "--scale-fmt",
        choices=["float", "ue8m0"],
        help="of fp8: scales are float32, as V3's (default), or powers of two",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--calibrate", metavar="DIR", help="shards: choose int4 weights for their training text (GPTQ)")
    parser.add_argument(
        "--calibration-tokens", type=int, default=65536, metavar="N", help="how much of it (default 65536)"
    )
    parser.add_argument("--data", metavar="DIR", help="shards: measure the loss of quality on their held-out text")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="measure it on about this many tokens only")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document on stdout")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    from minga import store
    from minga.quant import blocks, fp8
    from minga.recipes.evaluate import matching_shards
    from minga.recipes.quantize import calibrate_int4, calibration_batches

    if args.calibrate and args.to != "int4":
        raise UserError(f"--calibrate is for int4, not {args.to} (quantize). leave it out, or take --to int4")
    if args.scale_fmt and args.to != "fp8":
        raise UserError(f"--scale-fmt is for fp8, not {args.to} (quantize). leave it out, or take --to fp8")
    model, tokenizer = store.load(args.model), store.load_tokenizer(args.model)
    stored = blocks.format_of(model)
    if stored is not None:
        raise UserError(f"the weights are stored in {stored.name} already ({args.model}). take the float model")
    data = matching_shards(args.data, tokenizer) if args.data else None
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    report: dict[str, Any] = {"out": args.out, "format": args.to}
    if args.calibrate:
        batches = calibration_batches(matching_shards(args.calibrate, tokenizer), model, args.calibration_tokens)
        calibration = calibrate_int4(model, batches, lambda line: print(f"calibrated {line}", file=sys.stderr))
        report["calibration"] = vars(calibration)
    elif args.to == "fp8":
        fp8.quantize(model, fp8.BlockFP8(power_of_two=args.scale_fmt == "ue8m0"))
    else:
        store.quantize(model, args.to)
    format = blocks.format_of(model)
    assert format is not None
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if args.to == "fp8":  # what stays out of it is written as bfloat16
        size -= sum(p.numel() * (p.element_size() - 2) for p in model.parameters())
    report |= {"block": format.block, "bytes_float32": 4 * numbers, f"bytes_{args.to}": size}
    report |= {"share": size / (4 * numbers), "bits_per_weight": 8 * size / numbers}
    if data is not None:
        measured = _measure(store.load(args.model), model, data, args.max_tokens)
        report |= {"bits_per_byte_float32": measured.bits_per_byte_reference}
        report |= {f"bits_per_byte_{args.to}": measured.bits_per_byte, "kl": measured.kl, "top1": measured.top1}
        report |= {"perplexity_float32": measured.perplexity_reference, f"perplexity_{args.to}": measured.perplexity}
        report["tokens"] = measured.tokens
    store.save(model, args.out, tokenizer=tokenizer)
    report["file_bytes"] = sum(file.stat().st_size for file in Path(args.out).glob("*.safetensors"))
    print(json.dumps(report) if args.json else _lines(report, args.to))
    return 0


def _measure(reference: Transformer, model: Transformer, shards: Any, max_tokens: int | None) -> Comparison:
    from minga.data.loader import evaluation_batches
    from minga.recipes.evaluate import compare

    seq_len = min(256, model.config.max_position_embeddings)
    return compare(reference, model, evaluation_batches(shards, batch_size=8, seq_len=seq_len, max_tokens=max_tokens))


def _lines(report: dict[str, Any], name: str) -> str:
    before, after = report["bytes_float32"], report[f"bytes_{name}"]
    lines = [
        f"weights      {before / 1e6:.1f} MB in float32, {after / 1e6:.1f} MB in {name} ({report['share']:.1%}), "
        f"{report['bits_per_weight']:.2f} bits a weight"
    ]
    if "calibration" in report:
        calibration = report["calibration"]
        experts = ", {calibrated} of {experts} experts".format(**calibration) if calibration["experts"] else ""
        lines.append(f"calibration  {calibration['tokens']} tokens{experts}")
    if "kl" in report:
        before, after = report["bits_per_byte_float32"], report[f"bits_per_byte_{name}"]
        lines += [
            f"quality      {before:.4f} bits a byte in float32, {after:.4f} in {name} ({after / before - 1:+.2%})",
            f"             perplexity {report['perplexity_float32']:.3f} and {report[f'perplexity_{name}']:.3f}",
            f"             KL {report['kl']:.5f} nats a token, the same first choice at {report['top1']:.2%} of "
            f"{report['tokens']} tokens",
        ]
    return "\n".join([*lines, f"model        {report['out']}"])
