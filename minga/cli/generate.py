"""minga generate: one prompt continued as it comes, or a file of prompts side by side."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minga.errors import UserError

if TYPE_CHECKING:
    from minga.engine.llm import LLM
    from minga.engine.runner import Stats
    from minga.engine.sampler import SamplingParams
    from minga.engine.sequence import Completion

DESCRIPTION = """\
Continues a prompt. The text goes to stdout as it is made, one line about it to stderr.
The prompt is --prompt, each line of --prompts-file, or what is piped in. --chat puts it to the model as a user's
message; without it the model continues the text as it stands."""

EXAMPLE = """\
examples:
  minga generate runs/shakespeare --prompt "To be, or" --max-tokens 64
  minga generate SmolLM2.gguf --chat --prompt "What is a quipu?" --temperature 0
  cat letter.txt | minga generate runs/letters --json
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "generate",
        help="continue a prompt",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_flags(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt (default: what is piped in)")
    prompt.add_argument("--prompts-file", metavar="FILE", type=Path, help="a prompt on each line; all run side by side")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="ask as a user, through the model's chat template")
    form.add_argument("--raw", action="store_true", help="continue the text as it stands (default)")
    add_sampling_flags(parser, max_tokens=256)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout at the end")
    parser.set_defaults(run=run)
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model runs and how; `open_model` reads them."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, a run folder or a .gguf file")
    parser.add_argument("--quant", choices=["int8", "int4", "fp8"], help="hold the weights in 8 or 4 bits")
    parser.add_argument("--no-speculate", action="store_true", help="do not guess ahead")
    parser.add_argument(
        "--cache",
        choices=["float32", "float16", "int8"],
        help="numbers of the attention cache (default: as the weights)",
    )
    parser.add_argument("--max-memory", metavar="SIZE", help="for weights and cache together, such as 4GB")


def add_sampling_flags(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """One flag for each field of `SamplingParams` that a person sets by hand; `sampling_params` reads them."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", metavar="N", type=int, default=max_tokens, help="longest answer (%(default)s)")
    group.add_argument("--temperature", metavar="X", type=float, default=0.8, help="0 is greedy (%(default)s)")
    group.add_argument("--top-p", metavar="X", type=float, default=0.95, help="keep this much mass (%(default)s)")
    group.add_argument("--top-k", metavar="N", type=int, default=0, help="keep so many tokens, 0 for all (%(default)s)")
    group.add_argument("--min-p", metavar="X", type=float, default=0.0, help="keep X times the likeliest (%(default)s)")
    group.add_argument(
        "--repetition-penalty",
        metavar="X",
        type=float,
        default=1.0,
        help="above 1 avoids what was said (%(default)s)",
    )
    group.add_argument("--seed", metavar="N", type=int, help="the same seed gives the same text")
    group.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before TEXT; repeatable")


def open_model(args: argparse.Namespace) -> LLM:
    from minga.engine.llm import LLM

    return LLM(
        args.model, quant=args.quant, speculate=not args.no_speculate, cache=args.cache, max_memory=args.max_memory
    )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    from minga.engine.sampler import SamplingParams

    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")
    return SamplingParams(**{name: getattr(args, name) for name in names})


def run(args: argparse.Namespace) -> int:
    params = sampling_params(args)  # refused before a model is opened
    prompts = _read_prompts(args)
    llm = open_model(args)
    try:
        if args.prompts_file is not None:
            _write_batch(llm, prompts, params, args)
        else:
            _write_one(llm, prompts[0], params, args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(in_words(llm.stats), file=sys.stderr)
    return 0


def _read_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        return [args.prompt]
    if args.prompts_file is not None:
        prompts = [line for line in _read_text(args.prompts_file).splitlines() if line.strip()]
        if not prompts:
            raise UserError(f"{args.prompts_file} holds no prompt (--prompts-file). write one on each line")
        return prompts
    if sys.stdin.isatty():
        raise UserError("there is no prompt (minga generate). give --prompt TEXT, or pipe one in")
    try:
        return [sys.stdin.read()]
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not UTF-8 (stdin, byte {error.start}). pipe UTF-8 text in") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}). give a file with a prompt on each line") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}). save it as UTF-8") from None


def _ids(llm: LLM, prompt: str, chat: bool) -> list[int]:
    return llm.tokenizer.render_chat([{"role": "user", "content": prompt}]) if chat else llm.encode(prompt)


def _write_one(llm: LLM, prompt: str, params: SamplingParams, args: argparse.Namespace) -> None:
    ids = _ids(llm, prompt, args.chat)
    if args.json:
        completion = llm.generate([ids], params)[0]
        print(json.dumps(_document(completion) | _speed(llm.stats), ensure_ascii=False))
        return
    for delta in llm.stream(ids, params):
        print(delta.text, end="", flush=True)
    print()


def _write_batch(llm: LLM, prompts: list[str], params: SamplingParams, args: argparse.Namespace) -> None:
    completions = llm.generate([_ids(llm, prompt, args.chat) for prompt in prompts], params)
    if args.json:
        answers = [{"prompt": prompt} | _document(done) for prompt, done in zip(prompts, completions, strict=True)]
        print(json.dumps({"completions": answers} | _speed(llm.stats), ensure_ascii=False))
        return
    for prompt, completion in zip(prompts, completions, strict=True):
        print(f"==> {prompt}\n{completion.text}\n")


def _document(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": completion.num_prompt_tokens,
    }


def _speed(stats: Stats) -> dict[str, float | None]:
    return {"tokens_per_second": stats.tokens_per_second, "acceptance": stats.acceptance, "ttft": stats.ttft}


def in_words(stats: Stats) -> str:
    """One line about the latest call: `64 tokens, 41.3 tokens/s, first after 0.12 s, 71 % of guesses right`."""
    parts = [f"{stats.tokens} tokens"]
    if stats.tokens_per_second is not None:
        parts.append(f"{stats.tokens_per_second:.1f} tokens/s")
    if stats.ttft is not None:
        parts.append(f"first after {stats.ttft:.2f} s")
    if stats.acceptance is not None:
        parts.append(f"{stats.acceptance:.0%} of guesses right")
    return ", ".join(parts)
