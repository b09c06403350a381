"""minga eval: how well a model predicts a text."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from typing import Any

from minga.errors import UserError

EXAMPLE = """\
examples:
  minga eval runs/mine --data shards          the shards' held-out text
  minga eval model.gguf --text book.txt       any text file
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "eval",
        help="measure a model on held-out text",
        description="Perplexity, bits a byte (comparable across tokenizers) and how often MTP guesses right.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, run folder or .gguf file")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--data", metavar="DIR", help="shards: their held-out text")
    text.add_argument("--text", metavar="FILE", help="a text file")
    parser.add_argument("--seq-len", type=int, default=512, metavar="N", help="tokens of context (default 512)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="score only about this many tokens")
    parser.add_argument("--quant", choices=["int8", "int4", "fp8"], help="measure the model in 8 or 4 bits")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document on stdout")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    from minga import store
    from minga.data.loader import evaluation_batches
    from minga.data.sources import read_documents
    from minga.recipes.evaluate import evaluate, matching_shards, text_batches

    if args.seq_len < 2:
        raise UserError(f"--seq-len is {args.seq_len} (eval). it must be at least 2")
    model, tokenizer = store.load(args.model, quant=args.quant), store.load_tokenizer(args.model)
    seq_len = min(args.seq_len, model.config.max_position_embeddings)
    if args.data:
        shards = matching_shards(args.data, tokenizer)
        extra = 1 + model.config.num_nextn_predict_layers
        sizes = {"batch_size": 8, "seq_len": seq_len, "num_extra": extra}
        result = evaluate(model, evaluation_batches(shards, max_tokens=args.max_tokens, **sizes))
    else:
        text = "".join(document.text for document in read_documents([args.text]))
        result = evaluate(model, text_batches(text, tokenizer, seq_len=seq_len, max_tokens=args.max_tokens))
    values = {**dataclasses.asdict(result), "perplexity": math.exp(min(result.val_loss, 700))}
    if args.json:
        print(json.dumps(values))
        return 0
    print(f"perplexity    {values['perplexity']:.3f}  ({result.val_loss:.4f} nats a token, {result.tokens} tokens)")
    print(f"bits a byte   {result.bits_per_byte:.4f}  ({result.num_bytes} bytes)")
    if result.mtp_acceptance is not None:
        print(f"MTP           {result.mtp_acceptance:.1%} of its guesses are what the model says next")
    return 0
