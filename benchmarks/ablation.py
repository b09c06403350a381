"""What each part of the recipe gives: runs of equal CPU time that differ in one thing.

    minga bench ablation [--size 10m] [--minutes 4] [--only ablation/adamw] [--data shards]

A row has the variant's last bits a byte on held-out text, its reference's, and the time the variant needs over the time
its reference needs to the higher of the two ends: above 1, the part that was changed pays. --quick gives each run 0.6
minutes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import baseline
import common
import corpus
import ours
from common import Failed, measure, row, say

from minga.config import ModelConfig, TrainConfig

FULL = "full-recipe"


@dataclass(frozen=True)
class Variant:
    """One part of the recipe taken out, or put in. `against`: the run that differs in this part alone."""

    change: Callable[[TrainConfig], TrainConfig] | None = None
    patch: Callable[[], None] | None = None  # of this process, for what no setting can say
    against: str = FULL

    def apply(self, run: TrainConfig) -> TrainConfig:
        if self.patch is not None:
            self.patch()
        return self.change(run) if self.change is not None else run


def _model(change: Callable[[ModelConfig], ModelConfig]) -> Callable[[TrainConfig], TrainConfig]:
    return lambda run: dataclasses.replace(run, model=change(run.model))


def _dense(model: ModelConfig) -> ModelConfig:
    """The same active parameters without a choice of experts, in layers that are all alike."""
    chosen = model.moe_intermediate_size * (model.num_experts_per_tok + model.n_shared_experts)
    first = model.first_k_dense_replace
    width = (first * model.intermediate_size + (model.num_hidden_layers - first) * chosen) / model.num_hidden_layers
    return model.replace(n_routed_experts=0, n_shared_experts=0, intermediate_size=64 * round(width / 64))


def _grouped_query(model: ModelConfig) -> ModelConfig:
    """The dense model with Qwen3's attention, a key head for each two query heads; such a model has no MTP."""
    dense = _dense(model)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return ModelConfig(
        model_type="qwen3", **{name: getattr(dense, name) for name in names}, head_dim=dense.v_head_dim,
        num_key_value_heads=dense.num_attention_heads // 2, max_position_embeddings=dense.max_position_embeddings,
        rope_interleave=False,
    )  # fmt: skip


def _documents_run_on() -> None:
    """Attention and positions pass over the ends of documents, as nanoGPT's do."""
    from minga.data import loader, packing

    pack = packing.pack
    loader.pack = lambda *args, **options: dataclasses.replace(
        pack(*args, **options), segments_BT=None, positions_BT=None
    )


def _mtp(model: ModelConfig) -> ModelConfig:
    return model.replace(num_nextn_predict_layers=1)


def _half_batches(run: TrainConfig) -> TrainConfig:
    """A step begins with half its rows and has all of them from the middle of the run on."""
    return dataclasses.replace(run, batch_size=run.batch_size // 2, accumulate=2, batch_warmup=1.0)


def _long_rows(run: TrainConfig) -> TrainConfig:
    return dataclasses.replace(run, batch_size=run.batch_size // 2, seq_len=2 * run.seq_len)


VARIANTS: dict[str, Variant] = {
    FULL: Variant(),
    "adamw": Variant(patch=ours.adamw_alone),
    "dense": Variant(_model(_dense)),
    "gqa": Variant(_model(_grouped_query), against="dense"),
    "eight-experts": Variant(_model(lambda model: model.replace(n_routed_experts=8))),
    "mtp": Variant(_model(_mtp)),
    "mtp-all-along": Variant(lambda run: dataclasses.replace(run, model=_mtp(run.model), mtp_from=0.0)),
    "batch-schedule": Variant(_half_batches),
    "rows-of-256": Variant(_long_rows),
    "length-schedule": Variant(lambda run: dataclasses.replace(_long_rows(run), seq_len_start=128, seq_warmup=0.5)),
    "float32": Variant(lambda run: dataclasses.replace(run, precision="float32")),
    "no-document-mask": Variant(patch=_documents_run_on),
}


def measure_variant(data: str, size: str, variant: str, budget: float, eval_tokens: int) -> dict[str, Any]:
    """A run of about `budget` CPU-seconds."""
    return ours.for_seconds(VARIANTS[variant].apply(ours.make(size, data=data)), budget, eval_tokens)


def rows(curves: dict[str, list[tuple[float, float]]], size: str) -> list[common.Row]:
    """Of the variants whose reference has a curve of (CPU-seconds, bits a byte) too."""
    result = []
    for name, curve in curves.items():
        against = VARIANTS[name].against
        if name != FULL and against in curves:
            reference = curves[against]
            level = max(curve[-1][1], reference[-1][1])
            ratio = time_to(curve, level) / time_to(reference, level)
            note = f"{size}, {curve[-1][0]:.0f} CPU-seconds; ratio of time to {level:.4f}"
            ends = (curve[-1][1], reference[-1][1])
            result.append(row(f"ablation/{name}", *ends, unit="bits a byte", peer=against, ratio=ratio, note=note))
    return result


def time_to(curve: Sequence[tuple[float, float]], level: float) -> float:
    """CPU-seconds at which a falling curve of (seconds, bits a byte) first comes down to `level`, between its points."""
    for index, (seconds, bits) in enumerate(curve):
        if bits <= level:
            if not index:
                return seconds
            before, above = curve[index - 1]
            return before + (seconds - before) * (above - level) / (above - bits)
    raise AssertionError("the level is above the curve's end")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if common.answer(globals(), argv):
        return 0
    parser = common.parser(__doc__)
    corpus.add_argument(parser)
    parser.add_argument("--minutes", type=float, default=4, help="of each run (default 4)")
    parser.add_argument("--size", choices=("10m", "30m"), default="10m", help="of the model (default 10m)")
    args = parser.parse_args(argv)
    ids = common.wanted(parser, args.only, (f"ablation/{name}" for name in VARIANTS))
    wanted = {id.removeprefix("ablation/") for id in ids}
    wanted |= {VARIANTS[name].against for name in wanted}
    data, failures = corpus.shards(args.data, say), []
    budget = (0.6 if args.quick else args.minutes) * 60 * args.threads
    curves: dict[str, list[tuple[float, float]]] = {}
    for name in VARIANTS:
        if name in wanted:
            say(f"{args.size}: {name}")
            arguments: dict[str, Any] = {"data": data, "size": args.size, "variant": name, "budget": budget}
            arguments["eval_tokens"] = 50_000 if args.quick else baseline.EVAL_TOKENS
            try:
                run = measure(__file__, "variant", threads=args.threads, **arguments)
            except Failed as error:
                failures.append(f"{name}: {error}")
            else:
                curves[name] = [(e["seconds"], e["bits_per_byte"]) for e in run["evaluations"]]
    return common.finish("ablation", rows(curves, args.size), as_json=args.json, failures=failures)


if __name__ == "__main__":
    sys.exit(main())
