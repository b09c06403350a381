"""minga train: shards of text -> a model of one's own."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minga.config.units import parse_count
from minga.errors import UserError
from minga.planner.dial import Budget, Choice, Decisions, check_budget
from minga.runtime.machine import memory
from minga.runtime.sinks import check_sinks

if TYPE_CHECKING:
    from minga.config import TrainConfig

EXAMPLE = """\
examples:
  minga train --data shards --out runs/mine --hours 1                  everything is chosen for this machine and text
  minga train --data shards --out runs/mine --hours 1 --dry-run        shows each choice and why, memory, energy and money
  minga train --data shards --out runs/mine --tokens 100m --size 10m   so many tokens, so many active parameters
  minga train --data shards --out runs/tiny --preset tiny --steps 20
  minga train --data shards --out runs/mine --hours 1 --set batch_size=32 --set model.num_hidden_layers=6
  torchrun --nproc-per-node 4 -m minga train --data shards --out runs/mine --preset laptop --steps 1000 --set ep=2
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
    parser.add_argument("--out", metavar="DIR", help="run folder; an unfinished run in it goes on")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--hours", type=float, metavar="H", help="time for the whole run on this machine")
    length.add_argument("--tokens", metavar="N", help="tokens to read, such as 100m")
    length.add_argument("--steps", type=int, metavar="N", help="optimizer steps; nothing else is chosen for you")
    pinned = parser.add_mutually_exclusive_group()
    pinned.add_argument(
        "--size", metavar="N", help="active parameters, such as 10m (default: best for the time or tokens)"
    )
    pinned.add_argument("--preset", metavar="NAME", help="architecture: tiny, laptop (with --steps the default), small")
    parser.add_argument("--dry-run", action="store_true", help="print the plan of this run, and stop")
    parser.add_argument("--force", action="store_true", help="run also what memory does not seem to hold")
    parser.add_argument(
        "--log",
        action="append",
        default=[],
        metavar="SINK",
        help="send the numbers also to tensorboard, trackio or wandb; may be repeated",
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
    check_sinks(args.log)
    free = memory()[1]  # before torch is loaded, which is part of what a run takes
    if not (args.out or args.dry_run):
        raise UserError("there is no folder to write to (train). give --out DIR")
    plan = _plan(args)
    config = make_config(args, plan)
    if args.dry_run:
        return _show(args, plan, config, free)
    if free is not None and int(os.environ.get("WORLD_SIZE", "1")) == 1 and not args.force:
        _check_memory(args, config, free)
    if plan is not None and plan.seconds:
        _note(_table(plan))
    from minga.recipes.pretrain import pretrain

    result = pretrain(config, note=_note, plan=plan, sinks=args.log)
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


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _plan(args: argparse.Namespace) -> Decisions | None:
    """The one dial's choices: made now, or for a run that goes on those it was begun with. None with `--steps`."""
    from minga.config import PRESETS

    if args.preset is not None and args.preset not in PRESETS:
        raise UserError(f"preset {args.preset!r} is not known (--preset). {_known(args.preset, list(PRESETS))}")
    if args.steps is not None:
        if args.size:
            raise UserError("with --steps nothing is chosen (--size). say how long by --hours H or --tokens N instead")
        return None
    asked = {"tokens": _count(args, "tokens"), "size": _count(args, "size"), "preset": args.preset}
    check_budget(Budget(args.hours, asked["tokens"], asked["size"]))
    make_config(args, None)  # a mistake in the settings is found before anything is measured
    from minga.data.shards import open_shards
    from minga.recipes.dial import plan_run
    from minga.store import latest_checkpoint

    file = Path(args.out or ".") / "plan.json"
    if args.out and not args.dry_run and file.is_file() and latest_checkpoint(Path(args.out)) is not None:
        begun = json.loads(file.read_text(encoding="utf-8"))
        changed = [f"--{key}" for key in asked if begun["asked"][key] != asked[key]]
        if changed:
            raise UserError(
                f"this run was begun with another {', '.join(changed)} ({args.out}). use the same, or another --out"
            )
        return Decisions(asked, tuple(Choice(**choice) for choice in begun["choices"]))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "without --steps the run is chosen for one process, and here are several (train). "
            "give --steps N, with --preset and --set for the rest"
        )
    return plan_run(open_shards(args.data), hours=args.hours, **asked)


def _count(args: argparse.Namespace, name: str) -> int | None:
    text = getattr(args, name)
    return None if text is None else parse_count(text, f"--{name}")


def _show(args: argparse.Namespace, plan: Decisions | None, config: TrainConfig, free: int | None) -> int:
    """The plan of the run: what was chosen and why, what it takes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a dry run is of one process, and here are several (--dry-run). call minga without torchrun")
    from minga.cli.usage import watts_of_this_machine
    from minga.data.shards import open_shards
    from minga.planner.table import letters_of, table
    from minga.recipes.dry_run import plan_of_run
    from minga.recipes.pretrain import as_dict, fit_to_tokenizer

    shards = open_shards(config.data)
    config = fit_to_tokenizer(config, shards)
    ways = [] if free is None else _ways(args, config, free)
    made = plan_of_run(config, shards, free=free, watts=watts_of_this_machine(), ways=ways)
    if args.json:
        chosen = {} if plan is None else dataclasses.asdict(plan)
        print(json.dumps({**chosen, "config": as_dict(config), **made.document(), "changes": ways}))
    else:
        text = "\n\n".join([*([] if plan is None else [_table(plan)]), table(made)])
        print(letters_of(text, getattr(sys.stdout, "encoding", None)))
    return 0


def _check_memory(args: argparse.Namespace, config: TrainConfig, free: int) -> None:
    """Says it where memory is scarce. Raises `UserError`, with what would fit, where the run does not."""
    from minga.data.shards import open_shards
    from minga.planner.own_plan import check_fits
    from minga.recipes.pretrain import fit_to_tokenizer

    config = fit_to_tokenizer(config, open_shards(config.data))
    said = check_fits(config, free, lambda: _ways(args, config, free))
    if said is not None:
        _note(said)


def _ways(args: argparse.Namespace, config: TrainConfig, free: int) -> list[str]:
    """Flags to add with which the run would fit."""
    from minga.config import PRESETS
    from minga.planner.own_plan import ways_to_train
    from minga.store import checkpoint_steps

    presets = {}
    if args.steps is not None and not any(item.startswith("model.") for item in args.set):
        size = config.model.vocab_size
        presets = {name: preset().replace(vocab_size=size) for name, preset in PRESETS.items()}
    begun = bool(args.out) and Path(args.out).is_dir() and bool(checkpoint_steps(Path(args.out)))
    return [flags for _, flags in ways_to_train(config, free, presets=presets, resuming=begun)]


def _table(plan: Decisions) -> str:
    """A line a choice: what, how much, by which formula, and who says so."""
    rows = [(choice.name, str(choice.value), choice.formula, choice.source) for choice in plan.choices]
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"{name:{wide[0]}}  {value:>{wide[1]}}  {formula}  [{source}]" for name, value, formula, source in rows
    )


def make_config(args: argparse.Namespace, plan: Decisions | None) -> TrainConfig:
    """The run's settings: the dial's, and above them flags and `--set`.

    Raises `UserError`, with the nearest name, for an unknown one.
    """
    from minga.config import PRESETS, ModelConfig, TrainConfig

    model: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for item in args.set:
        key, equals, text = item.partition("=")
        owner, target, name = (ModelConfig, model, key[6:]) if key.startswith("model.") else (TrainConfig, values, key)
        fields = {f.name: str(f.type) for f in dataclasses.fields(owner)}
        if not equals or name not in fields or fields[name] not in ("int", "float", "bool", "str", "int | None"):
            raise UserError(f"setting {item!r} is not known (--set). {_known(name, list(fields))}")
        target[name] = _parse(key, text, fields[name])
    chosen, architecture = ({}, {}) if plan is None else (plan.values(), plan.values("model."))
    config = TrainConfig(
        **{
            "data": args.data,
            "out": args.out or "",
            "model": PRESETS[args.preset or "laptop"]().replace(**{**architecture, **model}),
            "hours": args.hours or 0.0,
            "steps": args.steps or int(args.tokens is not None),
            "seed": args.seed,
            **chosen,
            **values,
        }
    )
    tokens = _count(args, "tokens")
    if tokens is None or "steps" in values:
        return config
    step = config.batch_size * config.accumulate * config.seq_len  # after --set: so many tokens were asked for
    return dataclasses.replace(config, steps=max(1, round(tokens / step)))


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
