"""minga plan: what a model costs to train, adapt and serve, before anything is spent."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from minga.cli import in_columns
from minga.cli.usage import watts_of_this_machine
from minga.config.units import parse_bytes, parse_count, parse_link
from minga.errors import UserError
from minga.planner.setup import OPTIMIZERS, PRECISIONS, RECOMPUTE, STORED
from minga.planner.words import count, machine_words, size, spread

if TYPE_CHECKING:
    from minga.config.hardware import Machine
    from minga.planner.plan import Ask, Plan

MOST_GBITS = 1e6  # of a node; none has a hundredth

DESCRIPTION = """\
Works out what a model costs to train, adapt and serve on given machines: parameters, operations, memory, time, money, energy.
Each estimate has a low and a high end that hold the truth nine times of ten; --explain says where a number comes from."""

EXAMPLE = """\
examples:
  minga plan --config config.json --machine 2048xH800 --tokens 14.8t --precision fp8
  minga plan --hours 1                                        the best model for an hour of this machine
  minga plan --config Qwen3-8B/ --machine 4090 --lora 16 --stored int4 --tokens 20m
  minga plan --config v3 --machine 8xH200 --utilization 0.3   what serving costs
  minga plan --config v3 --smallest --tokens 1t --days 30     the smallest machine that can
  minga plan --fits models/*                                  which of my checkpoints run here, in how many bits
  minga plan --config v3 --tokens 14.8t --compare @2048xH800 @1024xB200
  minga plan --config v3 --machine 2048xH800 --tokens 14.8t --explain train.gpu_hours
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        help="what a model costs, before anything is spent",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="MODEL", help="a public config.json, a model folder, a .gguf file, or a preset such as v3"
    )
    parser.add_argument("--machine", metavar="M", help="such as 8xH100, 2048xH800, 4090 (default: this machine)")

    parser.add_argument(
        "--network",
        type=float,
        metavar="GBITS",
        help="of a node, per direction, in Gbit/s (default: as it is usually sold)",
    )

    train = parser.add_argument_group("training")
    train.add_argument("--tokens", metavar="N", help="to train on, such as 14.8t or 2e9")
    train.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of matrix products (default: bf16; on processors int8 where they have it)",
    )
    train.add_argument("--seq", type=int, metavar="T", help="tokens of a sequence (default 4096)")
    train.add_argument("--batch-tokens", metavar="N", help="of an optimizer step (default: usual for so much compute)")
    train.add_argument("--micro-batch", type=int, metavar="N", help="sequences a device computes at once")
    train.add_argument("--optimizer", choices=OPTIMIZERS, help="(default adamw)")
    train.add_argument("--shard", type=int, choices=range(4), help="0 DDP, 1-3 ZeRO's stages, 3 is FSDP")
    for name, what in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        train.add_argument(f"--{name}", type=int, metavar="N", help=f"{what} parallel (default: the fastest that fits)")
    train.add_argument("--recompute", choices=RECOMPUTE, help="activations computed again in the backward pass")
    train.add_argument("--fused-loss", action="store_true", default=None, help="never hold all logits")
    train.add_argument("--no-mtp", action="store_true", help="without multi-token prediction modules")

    adapt = parser.add_argument_group("adapting")
    adapt.add_argument("--lora", type=int, metavar="RANK", help="train low-rank pairs beside frozen weights")
    adapt.add_argument("--stored", choices=STORED, help="how the frozen weights are held; int4 is QLoRA (default bf16)")
    adapt.add_argument("--teacher", metavar="MODEL", help="distil from this model, which runs forward too")

    serve = parser.add_argument_group("serving")
    serve.add_argument("--utilization", type=float, metavar="F", help="share of the time it is busy (default 0.3)")
    serve.add_argument("--weights", choices=STORED, help="how weights are held (default: fp8 where the device has it)")
    serve.add_argument(
        "--cache", choices=("float32", "bf16", "fp8", "int8"), help="numbers of the cache (default bf16)"
    )
    serve.add_argument("--prompt", type=int, metavar="T", help="tokens of a prompt (default 2000)")
    serve.add_argument("--output", type=int, metavar="T", help="tokens of an answer (default 500)")
    serve.add_argument("--speed", type=float, metavar="TPS", help="tokens/s that each user must get at least")
    serve.add_argument(
        "--acceptance", type=float, metavar="F", help="of MTP's guesses (default 0.85 with MTP; 0: without)"
    )

    pool = parser.add_argument_group("a pool over the Internet")
    pool.add_argument("--peers", type=int, metavar="N", help="machines like --machine, joined by plain links")
    pool.add_argument("--up", metavar="RATE", help="a peer's uplink, such as 20Mbit (default 20Mbit)")
    pool.add_argument("--down", metavar="RATE", help="its downlink (default 100Mbit)")

    cost = parser.add_argument_group("money, energy, carbon")
    cost.add_argument("--price", type=float, metavar="P", help="USD for a device and hour (default: a dated range)")
    cost.add_argument(
        "--watts", type=float, metavar="W", help="the machine draws at the wall (default: from its chips)"
    )
    cost.add_argument(
        "--price-per-kwh", type=float, metavar="P", help="USD (default: of --grid, else 0.17, the world's mean)"
    )
    cost.add_argument(
        "--pue", type=float, metavar="F", help="what the room draws for each watt (default 1.2; 1.1 at home)"
    )
    cost.add_argument("--grid", metavar="COUNTRY", help="whose power it is, such as FRA or Chile (default: the world)")

    ask = parser.add_argument_group("the other way round")
    ask.add_argument("--hours", type=float, metavar="H", help="the best model for so much time on the machine")
    ask.add_argument("--budget", type=float, metavar="USD", help="the best model for so much money")
    ask.add_argument("--memory", metavar="SIZE", help="the best model that serves in so much memory, such as 8GB")
    ask.add_argument("--loss", type=float, metavar="L", help="the cheapest model that reaches this loss (nats a token)")
    ask.add_argument("--smallest", action="store_true", help="the smallest machines that can do this")
    ask.add_argument("--days", type=float, metavar="D", help="with --smallest: within so many days (default 30)")
    ask.add_argument("--fits", nargs="+", metavar="PATH", help="which of these checkpoints fit, in how many bits")

    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="one JSON document on stdout")
    out.add_argument("--html", metavar="FILE", help="also a page with pictures")
    out.add_argument(
        "--explain", metavar="NAME", help="formula, inputs and source of a number, such as train.gpu_hours"
    )
    out.add_argument(
        "--compare", nargs=2, metavar="MODEL@MACHINE", help="two plans side by side; either half may be left out"
    )
    out.add_argument("--calibrate", action="store_true", help="measure this machine first (two minutes), and keep that")
    out.add_argument("--refresh-prices", action="store_true", help="take today's from gpuhunt, if it is installed")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    from minga.planner.plan import plan
    from minga.planner.table import compare, explain, explained, table

    _refuse_conflicts(args)
    if args.refresh_prices:
        from datetime import date

        from minga.planner.prices import refresh

        _note(f"prices: {refresh(date.today())}")
    if args.calibrate:
        from minga.recipes.calibrate import calibrate

        _note(f"measured: {calibrate(note=_note)}")
        if not (args.config or args.fits or args.compare or _goals(args)):
            return 0
    ask = _ask(args)
    if args.compare:
        plans = [_half(args, ask, text) for text in args.compare]
        return _show(args, compare(plans), {"plans": [each.document() for each in plans]})
    if args.smallest:
        return _smallest(args, ask)
    machine, ask = _where(args, args.machine, ask)
    if args.fits:
        return _fits(args, machine, ask)
    goals = _goals(args)
    if goals and args.config is not None:
        raise UserError(f"--{next(iter(goals))} chooses the model (plan). leave --config out, or give --tokens instead")
    if goals:
        from minga.planner.inverse import best_plan

        found = best_plan(machine, ask, **goals)
    else:
        found = plan(_named(args), machine, ask=ask)
        found = replace(found, notes=(*found.notes, *_unused(args)))
    if args.html is not None:
        from minga.recipes.plan_page import write_plan_page

        _note(f"page: {write_plan_page(found, args.html)}")
    if args.explain is not None:
        facts = [asdict(fact) for fact in explained(found, args.explain)]
        return _show(args, explain(found, args.explain), {"title": found.title, "facts": facts})
    return _show(args, table(found), found.document())


# What a question does not take. A flag that would change nothing is refused rather than passed over.
_GOALS = ("hours", "budget", "memory", "loss")
_TRAINING = ("batch_tokens", "micro_batch", "optimizer", "shard", "tp", "pp", "ep", "fused_loss", "lora", "teacher")
_CONFLICTS = {
    "compare": ("smallest", "fits", *_GOALS, "html", "explain"),
    "smallest": ("fits", "machine", "network", *_GOALS, "html", "explain"),
    "fits": ("config", "hours", "budget", "loss", "tokens", "peers", "html", "explain"),
    "hours": ("tokens", "lora", "teacher"),
    "budget": ("tokens", "lora", "teacher"),
    "loss": ("tokens", "lora", "teacher"),
}


def _given(args: argparse.Namespace, name: str) -> bool:
    value = getattr(args, name)
    return value is not None and value is not False


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse_conflicts(args: argparse.Namespace) -> None:
    for one, others in _CONFLICTS.items():
        for other in others if _given(args, one) else ():
            if _given(args, other):
                raise UserError(f"{_flag(one)} does not take {_flag(other)} (plan). leave one of the two out")
    for name, owner in (("days", "smallest"), ("up", "peers"), ("down", "peers")):
        if _given(args, name) and not _given(args, owner):
            raise UserError(f"{_flag(name)} goes with {_flag(owner)} (plan). give both, or neither")
    for name in ("html", "explain"):
        if getattr(args, name) is not None and not getattr(args, name).strip():
            raise UserError(f"{_flag(name)} is empty (plan). give it a name, or leave it out")


def _unused(args: argparse.Namespace) -> list[str]:
    """What to say of flags about a training, where none was asked for."""
    names = [_flag(name) for name in _TRAINING if _given(args, name)]
    if not names or _given(args, "tokens") or _given(args, "peers"):
        return []
    return [
        f"no training is planned without --tokens N: {', '.join(names)} changed no more than the operations of a token"
    ]


def _show(args: argparse.Namespace, text: str, document: Mapping[str, Any]) -> int:
    from minga.planner.table import letters_of

    encoding = getattr(sys.stdout, "encoding", None)
    print(json.dumps(document, allow_nan=False) if args.json else letters_of(text, encoding))
    return 0


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _goals(args: argparse.Namespace) -> dict[str, float]:
    goals = {name: getattr(args, name) for name in ("hours", "budget", "loss") if getattr(args, name) is not None}
    return goals | ({} if args.memory is None else {"memory": float(parse_bytes(args.memory, "--memory"))})


def _where(args: argparse.Namespace, name: str | None, ask: Ask) -> tuple[Machine, Ask]:
    """The machine that is meant; for this one, with what it was measured to do."""
    if name is not None and name != "this":
        from minga.config.hardware import machine, of_devices

        named = machine(name)
        if args.network is None:
            return named, ask
        if not 0 < args.network <= MOST_GBITS:
            raise UserError(f"{args.network:g} Gbit/s is no network (--network). give it of a node, such as 25 or 400")
        device, sources = named.device, {**named.device.sources, "network": "given (--network)"}
        device = replace(device, network=args.network * 1e9 / 8, sources=sources)
        return of_devices(device, named.count, named.per_node), ask
    if args.network is not None:
        raise UserError("this machine is one node (--network). give --machine, such as 2x8x4090, or leave it out")
    from minga.recipes.here import this_machine

    found, coefficients = this_machine()
    if ask.watts is None and found.device.kind == "cpu":
        ask = replace(ask, watts=watts_of_this_machine())
    return found, replace(ask, coefficients=coefficients)


def _named(args: argparse.Namespace) -> Any:
    if args.config is None:
        raise UserError("there is no model to plan (--config). name one, or give --hours, --budget, --memory or --loss")
    return _model(args.config)


def _model(name: str, flag: str = "--config") -> Any:
    """What `plan` takes. Of a .gguf file the header is read, which needs torch and so a second."""
    if not name.endswith(".gguf"):
        return name
    import os

    from minga.checkpoint.gguf import config_from_gguf, open_gguf

    if os.path.exists(name) and not os.path.isfile(name):
        raise UserError(f"{name} is no regular file ({flag}). give a .gguf file")
    return config_from_gguf(open_gguf(name))


def _half(args: argparse.Namespace, ask: Ask, text: str) -> Plan:
    """MODEL@MACHINE of --compare; what is left out is what --config and --machine say."""
    from minga.planner.plan import plan

    model, _, where = text.partition("@")
    machine, ask = _where(args, where or args.machine, ask)
    return plan(_model(model) if model else _named(args), machine, ask=ask)


def _smallest(args: argparse.Namespace, ask: Ask) -> int:
    from minga.planner.inverse import smallest
    from minga.planner.plan import architecture

    name, model = architecture(_named(args))
    days = 30.0 if args.days is None else args.days
    found = smallest(model, ask, days=days)
    rows: list[tuple[str, ...]] = [("machine", "USD an hour", "days", "USD in all")]
    for each in found:
        spans = ("-" if value is None else spread(value) for value in (each.days, each.money))
        rows.append((machine_words(each.machine), spread(each.price), *spans))
    what = "serve it" if ask.tokens is None else f"train it on {count(ask.tokens)} tokens in {days:g} days"
    text = f"the fewest of each device that {what}: {name}\n\n{in_columns(rows, num_texts=1)}"
    document = [
        asdict(each) | {"machine": machine_words(each.machine), "devices": each.machine.count} for each in found
    ]
    return _show(args, text, {"model": name, "machines": document})


def _fits(args: argparse.Namespace, machine: Machine, ask: Ask) -> int:
    """Each checkpoint in each format: bytes with the cache of one request, and whether that fits a device."""
    from minga.planner.memory import fitting
    from minga.planner.plan import architecture

    available, context = machine.device.memory, ask.prompt + ask.output
    if args.memory is not None:
        available = float(parse_bytes(args.memory, "--memory"))
        if not 0 < available < 1e18:
            raise UserError(f"{args.memory} is no memory of a device (--memory). give it as 8GB or 80GiB")
    models, rows = [], []
    for path in args.fits:
        try:
            _, model = architecture(_model(path, "--fits"), flag="--fits")
        except UserError as error:
            _note(f"left out: {error}")
            continue
        found = fitting(model, available, context=context, cache=ask.cache)
        models.append({"model": path, "formats": {name: {"bytes": n, "verdict": said} for name, n, said in found}})
        rows.append((path, *(f"{size(n)} {said}" for _, n, said in found)))
    if not models:
        raise UserError("none of these is a model (--fits). name folders with a config.json, or .gguf files")
    text = in_columns([("model", *models[0]["formats"]), *rows], num_texts=1)
    where = f"in {size(available)}, with a context of {context:,} tokens: green fits, amber barely, red not"
    return _show(args, f"{text}\n\n{where}", {"available": available, "context": context, "models": models})


def _ask(args: argparse.Namespace) -> Ask:
    from minga.planner.cost import measured_watts
    from minga.planner.plan import Ask, architecture

    fixed = {
        "shard": args.shard, "tp": args.tp, "pp": args.pp, "ep": args.ep, "recompute": args.recompute,
        "micro_batch": args.micro_batch, "optimizer": args.optimizer, "lora_rank": args.lora, "stored": args.stored,
        "fused_loss": args.fused_loss, "mtp": False if args.no_mtp else None,
    }  # fmt: skip
    for flag in ("micro_batch", "tp", "pp", "ep", "lora"):
        value = getattr(args, flag)
        if value is not None and not 1 <= value <= 2**20:
            raise UserError(f"{value} is no number of them (--{flag.replace('_', '-')}). give 1 or more")
    if args.stored and not args.lora:
        raise UserError("--stored says how frozen weights are held (plan). it goes with --lora RANK")
    given = {
        "tokens": _count(args, "tokens"),
        "batch_tokens": _count(args, "batch_tokens"),
        "seq_len": args.seq,
        "precision": args.precision,
        "teacher": None
        if args.teacher is None
        else architecture(_model(args.teacher, "--teacher"), flag="--teacher")[1],
        "utilization": args.utilization,
        "weights": args.weights,
        "cache": args.cache,
        "prompt": args.prompt,
        "output": args.output,
        "speed": args.speed,
        "acceptance": args.acceptance,
        "peers": args.peers,
        "up": None if args.up is None else parse_link(args.up, "--up"),
        "down": None if args.down is None else parse_link(args.down, "--down"),
        "price": args.price,
        "watts": None if args.watts is None else measured_watts(args.watts),
        "price_per_kwh": _price_per_kwh(args),
        "pue": args.pue,
        "country": args.grid,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    return Ask(fixed={name: value for name, value in fixed.items() if value is not None}, **chosen)


def _price_per_kwh(args: argparse.Namespace) -> float | None:
    """Given, or that of the country whose power it is, where it is published."""
    if args.price_per_kwh is not None or args.grid is None:
        given: float | None = args.price_per_kwh
        return given
    from minga.planner.prices import electricity

    found = electricity(args.grid)
    return None if found is None else found.value.typical


def _count(args: argparse.Namespace, name: str) -> int | None:
    text = getattr(args, name)
    return None if text is None else parse_count(text, f"--{name.replace('_', '-')}")
