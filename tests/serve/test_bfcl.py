"""Calls by a model that knows nothing: whatever its weights, a call that it finishes fits the schema of its tool.

The functions are those of the Berkeley Function Calling Leaderboard, from the `bfcl-eval` wheel (installed, or its data
folder named by BFCL_DATA), and for every run of the tests some that are made up in their manner.
"""

from __future__ import annotations

import importlib.util
import json
import os
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from time import thread_time
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from minga.config.presets import tiny
from minga.data.dialects import (
    DIALECTS,
    CallArguments,
    CallStart,
    Dialect,
    StreamParser,
    Tool,
    call_grammar,
    marker_tokens,
)
from minga.data.json_schema import check_schema, closed
from minga.data.tokenizer import Tokenizer, train_bpe
from minga.engine.grammar import Grammar
from minga.engine.llm import LLM
from minga.engine.sampler import SamplingParams
from minga.errors import UserError
from minga.model.transformer import Transformer

TOGETHER = 64  # answers
MAX_TOKENS = 400


@lru_cache
def speaker(name: str) -> tuple[LLM, Dialect]:
    """A model with random weights, and the dialect with the control tokens that its vocabulary has for it."""
    dialect = DIALECTS[name]
    text = json.dumps({"name": "get_weather", "arguments": {"city": "Paris", "days": [3, 1.5], "is_metric": True}})
    tokenizer = train_bpe([text * 3, text * 2], 300, specials=("<|endoftext|>", *sorted(dialect.tokens)))
    config = tiny().replace(vocab_size=tokenizer.vocab_size, max_position_embeddings=2048, initializer_range=0.2)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    return LLM.from_parts(model, tokenizer, speculate=False), dialect


def closing(tokenizer: Tokenizer) -> dict[int, float]:
    """What makes a model that knows nothing end its strings, lists and objects sooner than once in 300 tokens."""
    return {id: 4.0 for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id)[:1] in (b'"', b"]", b"}")}


@dataclass
class Tally:
    """finished: calls that were written to their end; cut: by MAX_TOKENS; refused: why, and how many; wrong: none, we hope."""

    finished: int = 0
    cut: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    compile_seconds: list[float] = field(default_factory=list)
    num_tokens: int = 0


def call_all(name: str, tools: Sequence[Tool]) -> Tally:
    """Has the model call each of the tools, by name or because it must, and looks at what comes."""
    llm, dialect = speaker(name)
    bias, tally, markers = closing(llm.tokenizer), Tally(), marker_tokens(llm.tokenizer, dialect)
    seen: set[str] = set()
    for start in range(0, len(tools), TOGETHER):
        asked = []
        for number, tool in enumerate(tools[start : start + TOGETHER], start):
            began = thread_time()  # not what others take of the machine
            try:
                check_schema(tool.parameters, "parameters")
                choice = "required" if number % 2 else tool.name
                lark = call_grammar(dialect, [tool], choice=choice, parallel=False, tokenizer=llm.tokenizer).lark
                llm.check_grammar(Grammar(lark))
            except UserError as error:
                tally.refused[str(error)] += 1
                continue
            if lark not in seen:  # what is known is not compiled again
                tally.compile_seconds.append(thread_time() - began)
            seen.add(lark)
            params = SamplingParams(max_tokens=MAX_TOKENS, seed=number, grammar=Grammar(lark), logit_bias=bias)
            asked.append((tool, llm.submit([1, 2, 3], params, marked=markers)))
        while not all(entry.sequence.finished for _, entry in asked):
            llm.step()
        for tool, entry in asked:
            delta = entry.sequence.take_delta()
            tally.num_tokens += len(delta.token_ids)
            if delta.finish_reason == "stop":
                tally.finished += 1
                tally.wrong += [] if fits(llm.tokenizer, dialect, tool, delta.text) else [f"{tool}: {delta.text!r}"]
            else:
                tally.cut += 1
    return tally


def fits(tokenizer: Tokenizer, dialect: Dialect, tool: Tool, text: str) -> bool:
    """Whether the text is one call of the tool, and nothing else, with arguments that its schema allows."""
    parser = StreamParser(dialect, tools=[tool.name])
    parts = tokenizer.split_marks(text, marker_tokens(tokenizer, dialect))
    events = [event for piece, control in parts for event in parser.push(piece, control)]
    events += parser.close()
    arguments = "".join(event.text for event in events if isinstance(event, CallArguments))
    validator = Draft202012Validator(closed(tool.parameters), format_checker=Draft202012Validator.FORMAT_CHECKER)
    return (
        events[:1] == [CallStart(0, tool.name)]
        and len([event for event in events if not isinstance(event, CallArguments)]) == 2  # it begins, it ends
        and not parser.malformed
        and validator.is_valid(json.loads(arguments))
    )


# ---------------------------------------------------------------------------------------------- made up


def made_up(random: Random) -> Tool:
    """In the manner of the leaderboard: a few properties, some nested, with defaults and enums, most of them required."""
    name = ".".join(_word(random) for _ in range(random.randint(1, 2)))
    return Tool(name, _object(random, depth=0), f"It does {_word(random)}.")


def _object(random: Random, depth: int) -> dict[str, Any]:
    properties = {_word(random): _value(random, depth + 1) for _ in range(random.randint(0, 4))}
    required = [name for name in properties if random.random() < 0.7]
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return schema | ({"required": required} if random.random() < 0.9 else {})


def _value(random: Random, depth: int) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"type": "string"},
        {"type": "string", "enum": [_word(random) for _ in range(3)], "default": 'é, "ñ" \\ 漢'},
        {"type": "string", "format": "date"},
        {"type": "string", "maxLength": 5},
        {"type": "integer", "minimum": -3, "maximum": 120},
        {"type": "integer", "enum": [1, 2, 30]},
        {"type": "number"},
        {"type": "boolean", "optional": True},
        {"type": ["string", "null"]},
        {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "boolean"}}]},
        {},
    ]
    if depth < 3:
        kinds += [
            _object(random, depth),
            {"type": "array", "items": _value(random, depth + 1)},
            {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
            {"type": "object", "additionalProperties": {"type": "string"}},
        ]
    return random.choice(kinds) | {"description": _word(random)}


def _word(random: Random) -> str:
    return "".join(random.choices(string.ascii_letters + "_-", k=random.randint(1, 10)))


@pytest.mark.parametrize("name", DIALECTS)
def test_calls_of_tools_that_are_made_up(name: str) -> None:
    random = Random(name)
    tally = call_all(name, [made_up(random) for _ in range(40)])
    assert not tally.wrong and not tally.refused
    assert tally.finished >= 30, tally


# ---------------------------------------------------------------------------------------------- the leaderboard

TYPES = {
    "dict": "object", "HashMap": "object", "tuple": "array", "Array": "array", "ArrayList": "array", "float": "number",
    "double": "number", "long": "integer", "String": "string", "char": "string", "Boolean": "boolean", "any": None, "": None,
}  # fmt: skip  # None: whatever


def bfcl_folder() -> Path | None:
    if "BFCL_DATA" in os.environ:
        return Path(os.environ["BFCL_DATA"])
    spec = importlib.util.find_spec("bfcl_eval")
    return Path(spec.origin).parent / "data" if spec is not None and spec.origin is not None else None


def json_schema_of(parameters: dict[str, Any]) -> dict[str, Any]:
    """The leaderboard's parameters, with the names of types that JSON schema has."""
    schema = dict(parameters)
    if (kind := TYPES.get(schema.get("type", "object"), schema.get("type"))) is not None:
        schema["type"] = kind
    else:
        schema.pop("type")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = json_schema_of(schema[key])
    if "properties" in schema:
        schema["properties"] = {name: json_schema_of(inner) for name, inner in schema["properties"].items()}
    return schema


@pytest.mark.peer
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", DIALECTS)
def test_calls_of_the_leaderboards_tools(name: str) -> None:
    """All function schemas of its single-turn questions. `pytest -s` shows how many calls came to their end, and times."""
    folder = bfcl_folder()
    if folder is None:
        pytest.skip("needs the data of bfcl-eval: install it, or name its data folder by BFCL_DATA")
    tools = [
        Tool(function["name"], json_schema_of(function["parameters"]), function.get("description", ""))
        for file in sorted(folder.glob("BFCL_v4_*.json"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith('{"id"')
        for function in json.loads(line).get("function", ())
    ]
    assert len(tools) >= 8_000
    tally = call_all(name, tools)
    times = sorted(tally.compile_seconds)
    p50, p99 = (1000 * times[int(share * (len(times) - 1))] for share in (0.5, 0.99))
    print(
        f"\n{name}: {tally.finished} calls finished, {tally.cut} cut at {MAX_TOKENS} tokens, {len(tally.wrong)} wrong"
    )
    print(f"  {len(times)} kinds compiled in {p50:.1f} ms (p50), {p99:.1f} ms (p99), {1000 * times[-1]:.1f} ms at most")
    for reason, count in tally.refused.most_common():
        print(f"  refused {count}: {reason}")
    assert not tally.wrong
    assert tally.finished > 0.9 * len(tools)
