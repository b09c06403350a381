"""minga chat: a conversation in the terminal, or one question a line through a pipe.

`Conversation` holds the messages and does what each line asks; it knows the terminal only as a file to write to. `run`
reads the lines.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from minga.cli.generate import add_model_flags, add_sampling_flags, in_words, open_model, sampling_params
from minga.errors import UserError

if TYPE_CHECKING:
    from minga.engine.llm import LLM
    from minga.engine.sampler import SamplingParams

DESCRIPTION = """\
Talks with a model. Piped in, each line is one turn. A model without a chat template continues each line instead."""

EXAMPLE = """\
examples:
  minga chat SmolLM2.gguf --system "Answer in Spanish."
  printf 'Hello!\\nAnd in Quechua?\\n' | minga chat SmolLM2.gguf --temperature 0
"""

HELP = """\
/system TEXT      set the system prompt; without TEXT, remove it
/reset            forget the conversation (the system prompt stays)
/set NAME VALUE   change a setting, such as /set temperature 0.5; without NAME, show them all
/stats            speed of the last answer, and how full the context is
/save FILE        write the conversation as JSON
/quit             leave (also Ctrl-D). Ctrl-C stops an answer"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "chat",
        help="talk with a model in the terminal",
        description=DESCRIPTION,
        epilog=f"commands:\n{HELP}\n\n{EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_flags(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--raw", action="store_true", help="continue each line instead of answering it")
    add_sampling_flags(parser, max_tokens=1024)
    parser.add_argument("--json", action="store_true", help="the conversation as one JSON document on stdout")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    params = sampling_params(args)
    llm = open_model(args)
    out = sys.stderr if args.json else sys.stdout
    talk = Conversation(llm, params, system=args.system, raw=args.raw, out=out)
    interactive = sys.stdin.isatty()
    if interactive:
        talk.say(f"{args.model}, context {llm.max_context} tokens. /help shows the commands")
    for line in _typed_lines(talk, prompt="" if args.json else "> ") if interactive else _piped_lines():
        if not talk.take(line.strip()):
            break
    if args.json:
        print(json.dumps({"model": args.model} | talk.document(), ensure_ascii=False))
    return 2 if talk.num_errors and not interactive else 0


def _typed_lines(talk: Conversation, prompt: str) -> Iterator[str]:
    """Lines from the keyboard, with arrow keys and history where the system has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (importing it is what gives `input` its history)
    while True:
        try:
            yield input(prompt)
        except KeyboardInterrupt:
            talk.say("\n/quit or Ctrl-D leaves")
        except EOFError:
            talk.say("")
            return


def _piped_lines() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not UTF-8 (stdin, byte {error.start}). pipe UTF-8 text in") from None


class Conversation:
    """Messages so far, sampling settings, and the model that answers.

    Without a chat template, or with `raw`, each line is a prompt of its own that the model continues.
    """

    def __init__(self, llm: LLM, params: SamplingParams, *, system: str | None = None, raw: bool = False, out: TextIO):
        self.llm = llm
        self.params = params
        self.out = out
        self.num_errors = 0
        self.has_template = not raw and llm.tokenizer.chat_template is not None
        self.messages: list[dict[str, Any]] = []
        if not self.has_template:
            why = "as asked" if raw else "this model has no chat template"
            self.say(f"({why}: it continues your text instead of answering it, each line on its own)")
            if system:
                self.say("(so --system has no effect)")
        elif system:
            self.messages.append({"role": "system", "content": system})

    def say(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def take(self, line: str) -> bool:
        """Does what one line asks; False when it asks to leave. A user's mistake is said, and the talk goes on."""
        if line == "/quit":
            return False
        try:
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)
        except UserError as error:
            self.num_errors += 1
            self.say(f"error: {error}")
        return True

    def document(self) -> dict[str, Any]:
        """What `/save` and `--json` write."""
        return {"messages": self.messages, "settings": dataclasses.asdict(self.params)}

    # ------------------------------------------------------------------ turns

    def _answer(self, text: str) -> None:
        question = {"role": "user", "content": text}
        ids = self._fitting_ids(question) if self.has_template else self.llm.encode(text)
        stream = self.llm.stream(ids, self.params)
        answer, ended = "", None
        try:
            for delta in stream:
                print(delta.text, end="", file=self.out, flush=True)
                answer, ended = answer + delta.text, delta.finish_reason
        except KeyboardInterrupt:
            stream.close()
        if answer or ended:
            self.messages += [question, {"role": "assistant", "content": answer}]
        self.say("")
        if ended is None:
            self.say("(stopped)")
        elif ended == "length":
            self.say(f"(cut after {self.llm.stats.tokens} tokens. /set max_tokens N allows more, up to the context)")

    def _fitting_ids(self, question: dict[str, Any]) -> list[int]:
        """The conversation as token ids, with room for an answer; if need be the oldest turns are forgotten, aloud."""
        room = min(self.params.max_tokens, self.llm.max_context // 4)
        num_forgotten = 0
        ids = self.llm.tokenizer.render_chat([*self.messages, question])
        while len(ids) + room > self.llm.max_context and self._forget_oldest_turn():
            num_forgotten += 1
            ids = self.llm.tokenizer.render_chat([*self.messages, question])
        if num_forgotten:
            turns = "turn is" if num_forgotten == 1 else f"{num_forgotten} turns are"
            self.say(f"(the context of {self.llm.max_context} tokens is full: the oldest {turns} forgotten)")
        return ids

    def _forget_oldest_turn(self) -> bool:
        first = 1 if self._system_prompt() else 0
        turn = self.messages[first : first + 2]
        del self.messages[first : first + 2]
        return bool(turn)

    def _system_prompt(self) -> str | None:
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    # ------------------------------------------------------------------ commands

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        commands = {
            "help": self._do_help, "system": self._do_system, "reset": self._do_reset, "set": self._do_set,
            "stats": self._do_stats, "save": self._do_save,
        }  # fmt: skip
        if name not in commands:
            raise UserError(f"/{name} is not a command (chat). {_nearest(name, commands, '/')}/help shows them all")
        commands[name](rest.strip())

    def _do_help(self, _: str) -> None:
        self.say(HELP)

    def _do_system(self, text: str) -> None:
        if not self.has_template:
            raise UserError("there is no place for a system prompt (chat). this model only continues text")
        if self._system_prompt() is not None:
            del self.messages[0]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})
        self.say("(the system prompt is set)" if text else "(there is no system prompt)")

    def _do_reset(self, _: str) -> None:
        self.messages = self.messages[:1] if self._system_prompt() is not None else []
        self.say("(the conversation is forgotten)")

    def _do_set(self, rest: str) -> None:
        settings = dataclasses.asdict(self.params)
        if not rest:
            self.say("\n".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()))
            return
        name, _, value = rest.partition(" ")
        if name not in settings:
            raise UserError(f"{name!r} is not a setting (/set). {_nearest(name, settings)}/set alone shows them all")
        self.params = dataclasses.replace(self.params, **{name: _parse(value.strip())})
        self.say(f"({name} is {json.dumps(getattr(self.params, name), ensure_ascii=False)})")

    def _do_stats(self, _: str) -> None:
        used = len(self.llm.tokenizer.render_chat(self.messages)) if self.has_template and self.messages else 0
        self.say(f"last answer: {in_words(self.llm.stats)}. context: {used} of {self.llm.max_context} tokens")

    def _do_save(self, name: str) -> None:
        if not name:
            raise UserError("there is no file name (/save). write /save talk.json")
        path = Path(name).expanduser()
        beside = path.with_name(f".{path.name}.partial")
        try:
            beside.write_text(json.dumps(self.document(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise UserError(f"cannot write {path} ({error.strerror}). choose another place") from None
        self.say(f"(saved to {path})")


def _parse(text: str) -> Any:
    """A JSON value (`0.5`, `null`, `["a", "b"]`), else the text itself, so that `/set stop User:` needs no quotes."""
    try:
        return json.loads(text)
    except ValueError:
        return None if text.lower() in ("", "none") else text


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {prefix}{near[0]}? " if near else ""
