"""Tokens per second with and without MTP speculation: same model, same greedy text, alternating in one process.

minga bench speculation --model runs/demo
"""

from __future__ import annotations

import statistics
import sys

import common
import torch
from common import row

import minga

PROMPTS = ["ROMEO:\n", "KING HENRY V\t", "\n", "Enter HAMLET and HORATIO\n"]


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument(
        "model", nargs="?", default="runs/demo", help="model or run folder (default: the one `make demo` trains)"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    params = minga.SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    plain, ahead = (minga.LLM(args.model, speculate=speculate) for speculate in (False, True))
    speed: dict[str, list[float]] = {"plain": [], "ahead": []}
    acceptance: list[float] = []
    for turn in range((1 if args.quick else args.runs) + 1):
        for prompt in PROMPTS:
            texts = {}
            for name, llm in (("plain", plain), ("ahead", ahead)):
                texts[name] = llm.generate(prompt, params)[0].token_ids
                if turn:  # the first turn warms up
                    speed[name].append(llm.stats.tokens_per_second)
            if turn:
                acceptance.append(ahead.stats.acceptance or 0.0)
            if texts["plain"] != texts["ahead"]:
                print(f"error: speculation changed the text of {prompt!r}", file=sys.stderr)
                return 1
    ratios = [a / p for a, p in zip(speed["ahead"], speed["plain"], strict=True)]
    note = f"{statistics.median(acceptance):.0%} of the drafts accepted, same text"
    ours, theirs = (statistics.median(speed[name]) for name in ("ahead", "plain"))
    peer = "minga without speculation"
    rows = [row("speculate/demo/batch1", ours, theirs, unit="tokens/s", peer=peer, ratios=ratios, note=note)]
    return common.finish("speculation", rows, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
