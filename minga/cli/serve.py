"""minga serve: models behind an OpenAI-compatible API, with a web page to talk to them and to watch runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minga.cli.usage import add_rates, rates_of
from minga.config.units import parse_bytes
from minga.errors import UserError
from minga.runtime.machine import memory

if TYPE_CHECKING:
    from minga.planner.own_server import Served, Serving

DESCRIPTION = """\
Serves models through an OpenAI-compatible API (/v1), with a web page at / to chat and to watch training runs.
Only this machine can connect, unless --host opens another address; that needs an API key."""

EXAMPLE = """\
examples:
  minga serve runs/shakespeare
  minga serve small=SmolLM2.gguf mine=runs/mine --port 0
  minga serve runs/mine --replicas 4 --port 8080
  minga serve big=runs/big --quant int8 --dry-run     memory, tokens a second and cost, before a weight is read
  curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello!"}]}'
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "serve",
        help="an OpenAI-compatible API and a web page",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="a model folder, run folder or .gguf file; NAME=PATH names it"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port; 0 finds a free one (default %(default)s)"
    )
    parser.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="processes that share the work, by Ray Serve (default 1)"
    )
    parser.add_argument("--runs", default="runs", metavar="DIR", help="training runs to show (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the address as one JSON line when ready")

    parser.add_argument("--dry-run", action="store_true", help="print the plan of this server, and stop")
    parser.add_argument(
        "--utilization",
        type=float,
        default=0.3,
        metavar="F",
        help="in the plan: share of the time it is busy (default 0.3)",
    )
    parser.add_argument("--force", action="store_true", help="start also what memory does not seem to hold")

    engine = parser.add_argument_group("the models")
    engine.add_argument("--quant", choices=["int8", "int4", "fp8"], help="hold the weights in 8 or 4 bits")
    engine.add_argument("--cache", choices=["float32", "float16", "int8"], help="numbers of the attention cache")
    engine.add_argument(
        "--prefix-memory",
        metavar="SIZE",
        help="of the cache, kept for prompts that come again, such as 2GB (default: some)",
    )
    engine.add_argument("--no-speculate", action="store_true", help="do not guess ahead with multi-token prediction")
    engine.add_argument(
        "--max-running", type=int, default=64, metavar="N", help="requests of a model side by side (default 64)"
    )
    engine.add_argument(
        "--max-waiting", type=int, default=128, metavar="N", help="more are refused with 429 (default 128)"
    )
    engine.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for an answer (default 600)")
    engine.add_argument(
        "--shutdown-timeout", type=float, default=30.0, metavar="SECONDS",
        help="for requests under way when the server is told to stop (default 30)",
    )  # fmt: skip

    who = parser.add_argument_group("who may ask, and what is written down")
    who.add_argument(
        "--api-key", metavar="KEY", help="clients must send this key (default: the environment's MINGA_API_KEY)"
    )
    who.add_argument(
        "--keys",
        metavar="FILE",
        help="keys of `minga keys`, with their limits; usage is metered there for `minga usage`",
    )
    who.add_argument("--access-log", metavar="FILE", help="a line of JSON a request, never its text; - is stderr")

    safety = parser.add_argument_group("safety")
    safety.add_argument(
        "--guard", default="rules", metavar="GUARD",
        help="what judges texts: rules (default), none, weights of `minga guard train`, or model:PATH of a guard model",
    )  # fmt: skip
    safety.add_argument(
        "--moderate", action="store_true", help="keep back what the guard flags, in requests and in answers"
    )
    safety.add_argument("--watermark", metavar="FILE", help="a secret; requests may then ask for marked answers")
    add_rates(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    free = memory()[1]  # before torch is loaded, which is part of what a server takes
    models = named_models(args.models)
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port is {args.port} (serve). it is 1 to 65535, or 0 for a free one")
    if args.dry_run:
        return _show(args, models, free)
    try:
        from minga.serve.server import Options, serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "pydantic", "prometheus_client"):
            raise
        raise UserError(f"{error.name} is not installed (minga serve). pip install 'minga[serve]'") from None
    options = Options(
        host=args.host,
        port=args.port,
        runs_dir=args.runs,
        api_key=args.api_key,
        keys_file=args.keys,
        guard=args.guard,
        moderate=args.moderate,
        watermark=args.watermark,
        access_log=args.access_log,
        deadline=args.timeout,
        shutdown_seconds=args.shutdown_timeout,
        max_running=args.max_running,
        max_waiting=args.max_waiting,
        quant=args.quant,
        speculate=not args.no_speculate,
        cache=args.cache,
        prefix_memory=args.prefix_memory,
        rates=rates_of(args),
    )

    def check() -> None:
        if free is not None and not args.force:
            from minga.planner.own_server import check_serves

            for line in check_serves(_served(models), _how(args), free):
                print(line, file=sys.stderr, flush=True)

    if args.replicas == 1:
        serve(models, options, as_json=args.json, check=check)
    else:
        from minga.serve.replicas import serve_replicas

        serve_replicas(models, options, args.replicas, as_json=args.json, check=check)
    return 0


def _show(args: argparse.Namespace, models: dict[str, Path], free: int | None) -> int:
    """The plan of the server; weights stay unread."""
    from minga.planner.estimate import Estimate
    from minga.planner.own_server import serving_plan
    from minga.planner.table import letters_of
    from minga.recipes.here import this_processor

    rates, share = rates_of(args), args.utilization
    if not 0 < share <= 1:
        raise UserError(f"--utilization is {share} (serve). it is a share: above 0 and at most 1")
    # while nobody asks, the machine is paid for all the same; what it draws then is not known, and left out
    price = rates.kwh(3600 * share) * rates.price_per_kwh + Estimate.exactly(rates.machine_price_per_hour)
    machine, _ = this_processor()
    available = machine.device.memory if free is None else float(free)
    options: dict[str, Any] = {"free": available, "utilization": share, "price": price, "currency": rates.currency}
    made = serving_plan(_served(models), _how(args), machine, **options)
    text = json.dumps(made.document()) if args.json else made.table()
    print(letters_of(text, getattr(sys.stdout, "encoding", None)))
    return 0


def _served(models: dict[str, Path]) -> list[Served]:
    from minga.planner.own_server import Served
    from minga.store import read_config, weight_files

    return [
        Served(name, read_config(path), float(sum(os.path.getsize(file) for file in weight_files(path))))
        for name, path in models.items()
    ]


def _how(args: argparse.Namespace) -> Serving:
    from minga.planner.own_server import Serving

    kept = None if args.prefix_memory is None else float(parse_bytes(args.prefix_memory, "prefix_memory"))
    return Serving(args.quant, args.cache, args.max_running, kept, args.replicas)


def named_models(specs: list[str]) -> dict[str, Path]:
    """`NAME=PATH` or `PATH` -> {name: path}; a path alone is named after its folder, or its file without the ending."""
    models: dict[str, Path] = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        named = bool(equals) and not os.path.exists(spec)
        path = Path(rest if named else spec)
        name = name if named else path.stem if path.suffix == ".gguf" else path.resolve().name
        if not (spec and name and (rest or not named) and name.isprintable()):
            raise UserError(f"{spec!r} names no model (MODEL). write PATH or NAME=PATH")
        if name in models:
            raise UserError(f"two models are called {name!r} (MODEL). give one another name with NAME=PATH")
        models[name] = path
    return models
