"""What `minga plan` says of serving, beside what is published: DeepSeek's day, and rows of published/serving.csv.

  python benchmarks/plan_serving.py        # every row, its error, and how many lie between low and high

plan/serving-day               nodes that DeepSeek's published day needed, from its tokens, beside the published
plan/serving-day/cost          and what they cost; /revenue, /margin
plan/serving-day/decode-node   tokens/s of a node from the roofline, not fitted to them, beside the published; /prefill-node
plan/serving/fit, /held        median error of tokens/s over the rows that the constants were set on, and over the others
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Row, print_table, row

from minga.config.hardware import Device, Machine, find_device, machine
from minga.config.presets import v3
from minga.planner.architecture import Model
from minga.planner.estimate import Estimate
from minga.planner.serving import Serving, serve_estimate

PUBLISHED = Path(__file__).parent / "published" / "serving.csv"


def dense(family: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """What counts of a config.json."""
    return {
        "model_type": family, "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    }  # fmt: skip


def experts(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    moe = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": inner}
    return dense("qwen3_moe", 151936, hidden, 3 * inner, layers, heads, 4) | moe


MODELS: dict[str, Model] = {
    "deepseek-v3": v3(),
    "llama-2-7b": dense("llama", 32000, 4096, 11008, 32, 32, 32),
    "llama-3.1-8b": dense("llama", 128256, 4096, 14336, 32, 32, 8),
    "llama-3.3-70b": dense("llama", 128256, 8192, 28672, 80, 64, 8),
    "llama-3.1-405b": dense("llama", 128256, 16384, 53248, 126, 128, 8),
    "qwen3-8b": dense("qwen3", 151936, 4096, 12288, 36, 32, 8),
    "qwen3-30b-a3b": experts(2048, 768, 48, 32),
    "qwen3-235b-a22b": experts(4096, 1536, 94, 64),
}
# Apple says what its chips compute in float32: 10.4 TFLOP/s with 32 cores, 27.2 with 76. The table has no such figure.
APPLE = {
    "M1-Max": Device("M1-Max", "apple", {"float32": 10.4e12}, 64e9, 0.4e12),
    "M2-Ultra": Device("M2-Ultra", "apple", {"float32": 27.2e12}, 192e9, 0.8e12),
}


@dataclass(frozen=True)
class Checked:
    id: str
    split: str
    predicted: Estimate
    published: float

    @property
    def error(self) -> float:
        return self.predicted.typical / self.published - 1

    @property
    def inside(self) -> bool:
        return self.predicted.low <= self.published <= self.predicted.high


def check() -> Iterator[Checked]:
    """Tokens/s of each published row: of prompts, of decoding, or of the answers where both share the machine."""
    with PUBLISHED.open(encoding="utf-8", newline="") as lines:
        for r in csv.DictReader(lines):
            device = APPLE.get(r["device"]) or find_device(r["device"])
            where = Machine(device, int(r["count"]), min(8, int(r["count"])), device.network)
            serving = serve_estimate(
                MODELS[r["model"]],
                where,
                utilization=1.0,
                prompt_tokens=float(r["prompt"]),
                output_tokens=float(r["output"]),
                context=float(r["context"]) if r["context"] else None,
                weights=r["weights"],
                cache=r["cache"],
                batch=int(r["batch"]) if r["batch"] else None,
                devices=int(r["copy"]),
                parallel=r["parallel"] or None,
            )
            predicted = {
                "prefill": serving.prefill.tokens_per_second,
                "decode": serving.decode.tokens_per_second,
                "both": serving.requests_per_second * float(r["output"]),
            }[r["phase"]]
            yield Checked(r["id"], r["split"], predicted, float(r["value"]))


R1_PRICES = {"hit": 0.14, "miss": 0.55, "output": 2.19}  # USD per million tokens of DeepSeek-R1's API, February 2025


@dataclass(frozen=True)
class ServingDay:
    """A day of a service, as its operator counts it."""

    prefill_nodes: float
    decode_nodes: float
    cost: float
    revenue: float  # if every token were billed

    @property
    def nodes(self) -> float:
        return self.prefill_nodes + self.decode_nodes

    @property
    def margin(self) -> float:
        return self.revenue / self.cost - 1


def serving_day(
    *,
    input_tokens: float = 608e9,
    cached_tokens: float = 342e9,
    output_tokens: float = 168e9,
    prefill_per_node: float = 73.7e3,
    decode_per_node: float = 14.8e3,
    devices_per_node: int = 8,
    price: float = 2.0,
    prices: Mapping[str, float] = R1_PRICES,
) -> ServingDay:
    """Nodes, cost and theoretical revenue of a day, from its tokens and the tokens/s of a node.

    The defaults are what DeepSeek publishes of 27 February 2025 (open-infra-index, day 6), which gives 226.75 nodes, $87,072,
    $562,027 and 545 % as results. It says itself that it earns far less: V3 is cheaper, web and app are free, nights discounted.
    price: of a device-hour. prices: per million tokens, of prompts found in the cache ("hit"), of others ("miss"), of output.
    """
    day = 86_400
    prefill, decode = input_tokens / day / prefill_per_node, output_tokens / day / decode_per_node
    billed = (("hit", cached_tokens), ("miss", input_tokens - cached_tokens), ("output", output_tokens))
    return ServingDay(
        prefill_nodes=prefill,
        decode_nodes=decode,
        cost=(prefill + decode) * devices_per_node * 24 * price,
        revenue=sum(prices[kind] * tokens for kind, tokens in billed) / 1e6,
    )


def rows() -> list[Row]:
    """For `minga bench plan`."""
    day, note = serving_day(), "DeepSeek's day of 2025-02-27, open-infra-index"
    found = [
        row("plan/serving-day", day.nodes, 226.75, unit="nodes", peer="published", ratio=day.nodes / 226.75, note=note),
        row("plan/serving-day/cost", day.cost, 87_072, unit="USD", peer="published", ratio=day.cost / 87_072),
        row(
            "plan/serving-day/revenue", day.revenue, 562_027, unit="USD", peer="published", ratio=day.revenue / 562_027
        ),
        row("plan/serving-day/margin", 100 * day.margin, 545, unit="%", peer="published", ratio=day.margin / 5.45),
    ]
    for phase, (predicted, published) in node_speeds().items():
        found.append(
            row(
                f"plan/serving-day/{phase}",
                predicted.typical,
                published,
                unit="tokens/s of a node",
                peer="published",
                ratio=predicted.typical / published,
                spread=(predicted.low, predicted.high),
                note="from the roofline, which was not fitted to it",
            )
        )
    checked = list(check())
    for split in ("fit", "held"):
        part = [c for c in checked if c.split == split]
        inside = 100 * sum(c.inside for c in part) / len(part)
        error = 100 * statistics.median(abs(c.error) for c in part)
        note = f"median error of tokens/s over {len(part)} rows; {inside:.0f} % lie between low and high"
        found.append(row(f"plan/serving/{split}", error, unit="%", note=note))
    return found


def node_speeds() -> dict[str, tuple[Estimate, float]]:
    """Tokens/s of an H800 node of that day, predicted and published: 21 tokens/s a user, 4,989 tokens in the cache."""

    def serving(nodes: int, target: float | None) -> Serving:
        return serve_estimate(
            v3(),
            machine(f"{8 * nodes}xH800"),
            utilization=1.0,
            prompt_tokens=4989,
            output_tokens=1,
            context=4989,
            devices=8 * nodes,
            parallel="expert",
            target=target,
            cached_share=342 / 608,
        )

    prefill, decode = serving(4, None).prefill.tokens_per_second, serving(18, 21).decode.tokens_per_second
    return {"prefill-node": (prefill / 4, 73.7e3), "decode-node": (decode / 18, 14.8e3)}


if __name__ == "__main__":
    for c in check():
        mark = "" if c.inside else "   outside"
        print(f"{c.id:48} {c.split:5} {c.predicted.typical:12,.0f} of {c.published:12,.0f}   {c.error:+.0%}{mark}")
    print_table(rows(), file=sys.stdout)
