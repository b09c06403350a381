"""The other side of `compute-to-equal-loss`: GPT-2 as of 2023, trained as nanoGPT's published settings say.

    python benchmarks/baseline.py --data shards --size 10m --minutes 40 [--lr 1e-3] [--batch-tokens 8192]

transformers' GPT2LMHeadModel with GPT-2's own initialisation, fused AdamW, a warm-up and a cosine to a tenth; the
settings are those of nanoGPT's config/train_shakespeare_char.py (block 256, betas 0.9 and 0.99, 100 steps of warm-up,
weight decay 0.1 on matrices, clip 1.0) without dropout, since the run reads its text less than once. What favours it is
done: attention is `sdpa`, the activation is torch's fused one (the same function), the vocabulary is Minga's and the
embedding is tied. Its learning rate is the best of `LEARNING_RATES` and its batch that of `BATCH_TOKENS`, both found at
a part of the budget (docs/log.md has the figures).

The budget is CPU time of the process, all threads together, so that a machine with other work gives the same numbers:
`minutes` x 60 x `threads` seconds. Evaluations are not counted. Each is printed as a line of JSON: seconds so far,
tokens so far, bits a byte on held-out text.

B batch, T tokens, V vocabulary
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minga.data.loader import Loader, evaluation_batches
from minga.data.packing import MASKED
from minga.data.shards import Shards, open_shards

SIZES = {  # 12.3 M and 30.6 M parameters with a vocabulary of 4,096
    "10m": {"n_layer": 6, "n_head": 6, "n_embd": 384},
    "30m": {"n_layer": 9, "n_head": 8, "n_embd": 512},
}
SEQ_LEN = 256
EVAL_TOKENS = 200_000
BATCH_TOKENS = {"10m": 4096, "30m": 4096}
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
WARMUP_STEPS = 100


def build(size: str, vocab_size: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        **SIZES[size],
        vocab_size=vocab_size,
        n_positions=SEQ_LEN,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config)


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)


def lr_scale(step: int, steps: int) -> float:
    warmup = min(WARMUP_STEPS, steps // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def nats(model: nn.Module, ids_BT: Tensor, targets_BT: Tensor, reduction: str) -> Tensor:
    logits_BTV = model(ids_BT).logits
    return nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=MASKED, reduction=reduction
    )


@torch.inference_mode()
def bits_per_byte(model: nn.Module, shards: Shards, max_tokens: int) -> float:
    model.eval()
    total, num_bytes = 0.0, 0
    for batch in evaluation_batches(shards, batch_size=8, seq_len=SEQ_LEN, max_tokens=max_tokens):
        total += float(nats(model, batch.ids_BT, batch.targets_KBT[0], "sum"))
        num_bytes += batch.num_bytes or 0
    model.train()
    return total / math.log(2) / num_bytes


class Run:
    """One training run. `seconds` is the CPU time that its steps have taken."""

    def __init__(
        self, shards: Shards, size: str, *, lr: float, batch_tokens: int, micro_tokens: int = 4096, seed: int = 0
    ):
        torch.manual_seed(seed)
        self.lr, self.seconds, self.step = lr, 0.0, 0
        self.micro = max(1, batch_tokens // micro_tokens)
        self.model = build(size, -(-shards.manifest.vocab_size // 64) * 64)
        self.optimizer = make_optimizer(self.model, lr)
        rows = batch_tokens // self.micro // SEQ_LEN
        self.loader = Loader(shards, batch_size=rows, seq_len=SEQ_LEN, seed=seed)
        self.batch_tokens = rows * self.micro * SEQ_LEN

    def train_step(self, steps: int) -> float:
        """One of `steps`; the loss in nats a token."""
        began, loss = time.process_time(), 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_scale(self.step, steps)
        self.optimizer.zero_grad()
        for _ in range(self.micro):
            batch = next(self.loader)
            part = nats(self.model, batch.ids_BT, batch.targets_KBT[0], "mean") / self.micro
            part.backward()
            loss += float(part.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.seconds += time.process_time() - began
        return loss


def seconds_a_step(shards: Shards, size: str, batch_tokens: int) -> float:
    """The median of a few steps of a throw-away run, the first left out."""
    run = Run(shards, size, lr=1e-4, batch_tokens=batch_tokens)
    times = []
    for _ in range(6):
        before = run.seconds
        run.train_step(100)
        times.append(run.seconds - before)
    return statistics.median(times[1:])


def train(
    shards: Shards,
    size: str,
    *,
    budget: float,
    lr: float,
    batch_tokens: int,
    seed: int = 0,
    evaluations: int = 10,
    eval_tokens: int = EVAL_TOKENS,
    say: Callable[[dict[str, Any]], object] = lambda record: None,
) -> dict[str, Any]:
    """A run of about `budget` CPU-seconds, its schedule laid over it. Returns the last evaluation's record."""
    steps = max(1, round(budget / seconds_a_step(shards, size, batch_tokens)))
    run = Run(shards, size, lr=lr, batch_tokens=batch_tokens, seed=seed)
    at = {round(steps * part / evaluations) for part in range(1, evaluations + 1)}
    losses: list[float] = []
    while run.step < steps:
        losses.append(run.train_step(steps))
        if run.step in at:
            record = {
                "size": size,
                "lr": lr,
                "batch_tokens": run.batch_tokens,
                "step": run.step,
                "steps": steps,
                "seconds": round(run.seconds, 2),
                "tokens": run.step * run.batch_tokens,
                "train_loss": round(statistics.fmean(losses), 4),
                "bits_per_byte": bits_per_byte(run.model, shards, eval_tokens),
            }
            losses.clear()
            say(record)
    return record


def sweep(shards: Shards, size: str, *, budget: float, batch_tokens: int, **options: Any) -> float:
    """The learning rate that ends lowest, each given `budget` CPU-seconds: one of three, or beyond while that is better."""

    def end(lr: float) -> float:
        run = train(shards, size, budget=budget, lr=lr, batch_tokens=batch_tokens, evaluations=1, **options)
        return float(run["bits_per_byte"])

    ends = {lr: end(lr) for lr in LEARNING_RATES}
    while (best := min(ends, key=lambda lr: ends[lr])) in (min(ends), max(ends)):
        beyond = best / 2 if best == min(ends) else best * 2
        ends[beyond] = end(beyond)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that `minga data` wrote")
    parser.add_argument("--size", choices=SIZES, default="10m")
    parser.add_argument("--minutes", type=float, default=40, help="of all threads, evaluation not counted (default 40)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, help="tokens a step (default: the best found for the size)")
    parser.add_argument(
        "--lr", type=float, help="peak learning rate (default: the best of three at a tenth of the time)"
    )
    parser.add_argument("--evaluations", type=int, default=10, help="during the run (default 10)")
    parser.add_argument("--eval-tokens", type=int, default=EVAL_TOKENS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shards, budget = open_shards(args.data), args.minutes * 60 * args.threads
    options: dict[str, Any] = {"batch_tokens": args.batch_tokens or BATCH_TOKENS[args.size], "seed": args.seed}
    options |= {"eval_tokens": args.eval_tokens, "say": lambda record: print(json.dumps(record), flush=True)}
    lr = args.lr or sweep(shards, args.size, budget=budget / 10, **options)
    train(shards, args.size, budget=budget, lr=lr, evaluations=args.evaluations, **options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
