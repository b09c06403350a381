"""Tokens per second with and without MTP speculation: same model, same greedy text, alternating in one process.

    python benchmarks/speculation.py runs/demo [--runs 5]

Prints a table and, as the last line, one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

import torch

import minga
from minga.runtime.machine import describe

PROMPTS = ["ROMEO:\n", "KING HENRY V\t", "\n", "Enter HAMLET and HORATIO\n"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default="runs/demo", help="model or run folder (default: the one `make demo` trains)"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    params = minga.SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    plain, ahead = (minga.LLM(args.model, speculate=speculate) for speculate in (False, True))
    speed: dict[str, list[float]] = {"plain": [], "ahead": []}
    acceptance: list[float] = []
    for turn in range(args.runs + 1):
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
    ours, theirs, ratio = (statistics.median(values) for values in (speed["ahead"], speed["plain"], ratios))
    accepted = statistics.median(acceptance)
    print(f"without speculation  {theirs:7.1f} tokens/s")
    print(f"with MTP drafts      {ours:7.1f} tokens/s   {ratio:.2f}x, {accepted:.0%} of the drafts accepted, same text")
    row = {"id": "speculate/demo/batch1", "ours": ours, "theirs": theirs, "peer": "minga without speculation"}
    row |= {"unit": "tokens/s", "ratio": ratio, "runs": len(ratios), "spread": [min(ratios), max(ratios)]}
    machine = describe()
    versions = {"minga": minga.__version__, "torch": torch.__version__}
    document = {
        "bench": "speculation",
        "machine": machine,
        "versions": versions,
        "commit": machine.get("commit"),
        "rows": [row],
    }
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
