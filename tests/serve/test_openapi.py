"""The OpenAPI document against the server: by rules of our own, and by schemathesis where it is installed.

Schemathesis is a program of its own environment: `SCHEMATHESIS=/path/to/schemathesis pytest -m peer tests/serve/test_openapi.py`
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from minga.config.presets import tiny
from minga.data.tokenizer import train_bpe
from minga.engine.llm import LLM
from minga.engine.watermark import secret_number
from minga.model.transformer import Transformer
from minga.serve.app import create_app
from minga.serve.keys import Keys
from minga.serve.moderation import RuleGuard
from minga.serve.openapi import OPERATIONS, describe
from minga.serve.service import Settings
from tests.serve import conftest

KEY = "sk-" + "k" * 40
SECONDS = 130  # of each of the two runs
# What no JSON schema can say is answered with a documented 400 all the same: that a pattern or a schema is one, that tools have
# different names, that a text fits the context of the model, that 1.0 is no whole number here.
EXCLUDED = "positive_data_acceptance"


def schemas(document: Any) -> Iterator[dict[str, Any]]:
    if isinstance(document, dict):
        yield document
    for item in document.values() if isinstance(document, dict) else document if isinstance(document, list) else ():
        yield from schemas(item)


def test_every_reference_leads_somewhere_and_every_object_is_closed() -> None:
    document = describe(["little"])
    components = document["components"]["schemas"]
    for node in schemas(document):
        if "$ref" in node and isinstance(node["$ref"], str):
            assert node["$ref"].removeprefix("#/components/schemas/") in components
        mapping = node.get("discriminator", {}).get("mapping", {})
        assert all(isinstance(target, str) for target in mapping.values())
        assert len(set(mapping.values())) == len(mapping)
    bodies = {operation.body.__name__ for operation in OPERATIONS if operation.body is not None}
    assert bodies <= set(components)
    for name in bodies:
        assert components[name]["additionalProperties"] is False


def test_models_are_those_that_are_served() -> None:
    one = describe(["a"])["components"]["schemas"]["ChatBody"]
    two = describe(["a", "b"])["components"]["schemas"]["ChatBody"]
    assert one["properties"]["model"]["enum"] == ["a", None] and "model" not in one["required"]
    assert two["properties"]["model"]["enum"] == ["a", "b"] and "model" in two["required"]


def test_a_server_with_keys_says_that_it_needs_one() -> None:
    assert {} in describe(["a"])["security"] and {} not in describe(["a"], needs_key=True)["security"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer = train_bpe(['{"city": "Quito", "days": 5} ' * 9], 270, specials=specials)
    config = tiny().replace(vocab_size=290, max_position_embeddings=2048, initializer_range=0.2)
    return LLM.from_parts(Transformer(config).init_weights(torch.Generator().manual_seed(3)), tokenizer)


def serving(llm: LLM, runs: Path, **settings: Any) -> AbstractContextManager[str]:
    whole = Settings(guard=RuleGuard(), watermark=secret_number(b"s" * 32), **settings)
    return conftest.serving(create_app({"little": llm}, runs, whole))


def test_the_document_and_the_routes_name_the_same(llm: LLM, tmp_path: Path) -> None:
    """Every operation is there, with its methods in `Allow`; and needs a key unless it is said to be public."""
    with serving(llm, tmp_path, keys=Keys(static=KEY)) as url, httpx.Client(base_url=url) as client:
        document = client.get("/openapi.json", headers={"x-api-key": KEY}).json()
        for path, methods in document["paths"].items():
            place = path.replace("{id}", "x").replace("{name}", "x")
            refused = client.request("PATCH", place, headers={"authorization": f"Bearer {KEY}"})
            assert refused.status_code == 405 and "does not work" in refused.json()["error"]["message"]
            assert {name.lower() for name in refused.headers["allow"].split(", ")} - {"head"} == set(methods)
            for method, operation in methods.items():
                answer = client.request(method, place)
                assert (answer.status_code == 401) == (operation.get("security") != []), path
                assert str(answer.status_code) in operation["responses"]


@pytest.mark.peer
@pytest.mark.timeout(2 * SECONDS + 60)
@pytest.mark.parametrize("key", [None, KEY], ids=["open", "with a key"])
def test_schemathesis_finds_nothing(llm: LLM, tmp_path: Path, key: str | None) -> None:
    program = os.environ.get("SCHEMATHESIS") or shutil.which("schemathesis")
    if program is None:
        pytest.skip("schemathesis is not installed")
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "run.jsonl").write_text(json.dumps({"kind": "start"}) + "\n")
    keys = None if key is None else Keys(static=key)
    with serving(llm, tmp_path / "runs", keys=keys, deadline=30) as url:
        command = [program, "run", f"{url}/openapi.json", "--phases", "examples,coverage,fuzzing", "--mode", "all"]
        command += [
            "--checks",
            "all",
            "--exclude-checks",
            EXCLUDED,
            "--continue-on-failure",
            "--max-time",
            str(SECONDS),
        ]
        command += ["--request-timeout", "20", "--warnings", "off", "--suppress-health-check", "all", "--seed", "5"]
        command += [] if key is None else ["--header", f"Authorization: Bearer {key}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    # With some seeds its generator gives one operation up, by an error of its own ("Cannot generate ..."); that is no finding.
    given_up = done.stdout.count("Cannot generate an array")
    found = "Failures:" in done.stdout or given_up != done.stdout.count("\nSchema Error\n")
    assert done.returncode == 0 or (given_up and not found), done.stdout[-8000:] + done.stderr[-2000:]
