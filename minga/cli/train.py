"""minga train: shards of text -> a model of one's own."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from minga.errors import UserError

if TYPE_CHECKING:
    from minga.config import TrainConfig

EXAMPLE = """\
examples:
  minga train --data shards --out runs/mine --hours 1
  minga train --data shards --out runs/tiny --preset tiny --steps 20
  minga train --data shards --out runs/mine --hours 1 --set batch_size=32 --set model.num_hidden_layers=6
  torchrun --nproc-per-node 4 -m minga train --data shards --out runs/mine --hours 1 --set ep=2
The same command goes on with a run that was stopped (Ctrl-C saves first).
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "train",
        help="train a model from scratch",
        description="Pre-trains a DeepSeek-class model on what `minga data` wrote. Ends with a model folder and a report.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="folder that `minga data` wrote")
    parser.add_argument("--out", required=True, metavar="DIR", help="run folder; an unfinished run in it goes on")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument(
        "--hours", type=float, metavar="H", help="time to train; the steps follow from this machine's speed"
    )
    length.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    parser.add_argument(
        "--preset", default="laptop", metavar="NAME", help="architecture: tiny, laptop (default), small"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and data order (default 0)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other setting; model.KEY for the model's own",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document on stdout")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    config = make_config(args)
    from minga.recipes.pretrain import pretrain

    result = pretrain(config, note=lambda line: print(line, file=sys.stderr, flush=True))
    if int(os.environ.get("RANK", "0")):  # of several processes the first speaks
        return 0
    if args.json:
        evaluation = None if result.evaluation is None else dataclasses.asdict(result.evaluation)
        document = {"run": str(result.run), "model": str(result.model), "step": result.step, "seconds": result.seconds}
        print(json.dumps({**document, "finished": result.finished, "evaluation": evaluation}))
    elif result.evaluation is not None:
        acceptance = result.evaluation.mtp_acceptance
        drafts = "" if acceptance is None else f", MTP guesses right {acceptance:.0%}"
        print(f"{result.evaluation.bits_per_byte:.3f} bits a byte on held-out text{drafts}, {result.seconds:.0f} s")
        print(f"model  {result.model}\nreport {result.run / 'report.html'}")
    else:
        print(
            f"stopped at step {result.step}; everything is saved in {result.model}. the same command goes on from there"
        )
    return 0


def make_config(args: argparse.Namespace) -> TrainConfig:
    """The run's settings from flags and `--set`. Raises `UserError`, with the nearest name, for an unknown one."""
    from minga.config import PRESETS, ModelConfig, TrainConfig

    if args.preset not in PRESETS:
        raise UserError(f"preset {args.preset!r} is not known (--preset). {_known(args.preset, list(PRESETS))}")
    model: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for item in args.set:
        key, equals, text = item.partition("=")
        owner, target, name = (ModelConfig, model, key[6:]) if key.startswith("model.") else (TrainConfig, values, key)
        fields = {f.name: str(f.type) for f in dataclasses.fields(owner)}
        if not equals or name not in fields or fields[name] not in ("int", "float", "bool", "str", "int | None"):
            raise UserError(f"setting {item!r} is not known (--set). {_known(name, list(fields))}")
        target[name] = _parse(key, text, fields[name])
    return TrainConfig(
        **{
            "data": args.data,
            "out": args.out,
            "model": PRESETS[args.preset]().replace(**model),
            "hours": args.hours or 0.0,
            "steps": args.steps or 0,
            "seed": args.seed,
            **values,
        }
    )


def _parse(key: str, text: str, kind: str) -> Any:
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "int | None" and text.lower() in ("none", "null"):
            return None
        return text if kind == "str" else float(text) if kind == "float" else int(text)
    except (KeyError, ValueError):
        raise UserError(
            f"{text!r} is not {kind.replace(' | None', '')} (--set {key}). give a value of that kind"
        ) from None


def _known(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
