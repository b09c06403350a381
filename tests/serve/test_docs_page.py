"""The page at /docs, in a real browser, of a real server with a little model. pytest tests/serve/test_docs_page.py"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from minga.config.presets import tiny
from minga.data.tokenizer import train_bpe
from minga.engine.llm import LLM
from minga.model.transformer import Transformer
from minga.serve.app import create_app
from minga.serve.keys import Keys
from minga.serve.openapi import OPERATIONS, describe
from minga.serve.service import Settings
from tests.serve.browser import CHROMIUM, Browser, Tab
from tests.serve.conftest import serving

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt install chromium")
CHAT = "#post-v1-chat-completions"


@pytest.mark.parametrize("operation", [each for each in OPERATIONS if each.body], ids=lambda each: each.path)
def test_examples_are_what_the_server_accepts(operation):
    for models in (["a"], ["a", "b"]):
        content = describe(models)["paths"][operation.path][operation.method]["requestBody"]["content"]
        example = content["application/json"]["example"]
        operation.body.model_validate(example)
        assert ("model" in example) == (len(models) > 1 and operation.path != "/v1/moderations")


@pytest.fixture(scope="module")
def llm() -> LLM:
    model = Transformer(tiny().replace(vocab_size=259)).init_weights(torch.Generator().manual_seed(0))
    return LLM.from_parts(model, train_bpe(["bytes"], 259))


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.fixture
def visit(browser, llm, tmp_path) -> Iterator[Callable[..., Tab]]:
    """visit(hash="", key=None, **options): the page of a server, with nothing gone wrong on it at the end."""
    with ExitStack() as stack:

        def visit(hash: str = "", key: str | None = None, **options) -> Tab:
            keys = None if key is None else Keys(static=key)
            url = stack.enter_context(serving(create_app({"little": llm}, tmp_path, Settings(keys=keys))))
            return browser.open(f"{url}/docs{hash}", **options)

        yield visit
        assert browser.close_tabs() == []


@needs_chromium
def test_it_shows_every_operation_and_what_a_body_may_hold(visit):
    tab = visit()
    tab.wait("document.querySelector('.op')")
    assert tab.text("#contents a").split("\n") == [f"{each.method.upper()} {each.path}" for each in OPERATIONS]
    tab.js("location.hash = 'post-v1-chat-completions'")
    tab.wait(f"document.querySelector('{CHAT}').open && document.querySelector('{CHAT} .fields')")
    rows = tab.text(f"{CHAT} > div > .fields > li > p").split("\n")
    assert any(row.startswith("messages") and "1–4096 entries" in row and "required" in row for row in rows)
    assert "temperature number · ≥ 0 · ≤ 2" in [row.strip() for row in rows]
    assert "min_p number · ≥ 0 · ≤ 1" in [row.strip() for row in rows]
    assert "audio not supported" in [" ".join(row.split()) for row in rows]
    assert "0: no limit." in tab.text(CHAT)
    assert "429" in tab.text(f"{CHAT} table") and "401" in tab.text(f"{CHAT} table")
    inner = f"{CHAT} .fields details"
    tab.click(f"{inner} summary")
    tab.wait(f"document.querySelector('{inner} .fields')")  # an object opens to its own fields


@needs_chromium
def test_the_example_of_curl_is_the_one_of_the_document(visit):
    tab = visit(CHAT)
    tab.wait(f"document.querySelector('{CHAT} pre')")
    text = tab.text(f"{CHAT} .code pre")
    origin = tab.js("location.origin")
    assert text.startswith(f"curl {origin}/v1/chat/completions") and "Bearer" not in text
    body = describe(["little"])["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert json.loads(text.split("-d '")[1].removesuffix("'")) == body["example"]


@needs_chromium
def test_it_sends_and_shows_what_comes_back(visit):
    tab = visit(CHAT)
    tab.wait(f"document.querySelector('{CHAT} .try')")

    def reply(body: str) -> str:
        tab.fill(f"{CHAT} textarea", body)
        tab.click(f"{CHAT} .try button")
        tab.wait(f"document.querySelector('{CHAT} .try .row .label').textContent.includes(' s')")
        return tab.text(f"{CHAT} .reply")

    hello = {"messages": [{"role": "user", "content": "<b>hi</b>"}], "max_tokens": 3, "ignore_eos": True}
    assert json.loads(reply(json.dumps(hello)))["usage"]["completion_tokens"] == 3
    streamed = reply(json.dumps(hello | {"stream": True}))
    assert streamed.startswith("data: {") and streamed.rstrip().endswith("data: [DONE]")
    assert json.loads(reply('{"messages": 1}'))["error"]["param"] == "messages"
    assert tab.text(f"{CHAT} .try .row .label").startswith("400 · ")
    models = "#get-v1-models-name"
    tab.js(f"location.hash = '{models}'")
    tab.fill(f"{models} input", "little")
    tab.key("Enter")
    tab.wait(f"document.querySelector('{models} .reply')?.textContent.includes('max_model_len')")


@needs_chromium
def test_by_keyboard_alone(visit):
    tab = visit(CHAT)
    tab.wait(f"document.activeElement === document.querySelector('{CHAT} summary')")
    tab.key("Enter")
    tab.wait(f"!document.querySelector('{CHAT}').open")
    tab.key("Enter")
    tab.wait(f"document.querySelector('{CHAT}').open")
    for _ in range(400):  # past the fields
        tab.key("Tab")
        if tab.js("document.activeElement.tagName") == "TEXTAREA":
            break
    assert tab.js(f"document.activeElement === document.querySelector('{CHAT} textarea')")
    tab.key("Tab")
    assert tab.js("document.activeElement.type") == "submit"


@needs_chromium
def test_it_asks_for_the_key_once_and_keeps_it(visit):
    tab = visit(CHAT, key="open-sesame")
    tab.wait("document.querySelector('#key-dialog').open")
    tab.fill("#key", "open-sesame")
    tab.click("#key-form .solid")
    tab.wait(
        f"document.querySelector('{CHAT} .code pre')?.textContent.includes('Authorization: Bearer $MINGA_API_KEY')"
    )
    tab.click(f"{CHAT} .try button")
    tab.wait(f"document.querySelector('{CHAT} .reply').textContent.includes('chat.completion')")
    assert not tab.js("document.querySelector('#key-dialog').open")


@needs_chromium
def test_in_spanish_and_back(visit):
    tab = visit(CHAT, language="es")
    tab.wait(f"document.querySelector('{CHAT} .fields')")
    shown = tab.text(CHAT)
    assert "Campos del cuerpo" in shown and "obligatorio" in shown and "1–4096 elementos" in shown
    tab.click("#lang")
    assert "Fields of the body" in tab.text(CHAT) and "1–4096 entries" in tab.text(CHAT)


@needs_chromium
def test_on_a_phone_nothing_is_wider_than_the_page(visit):
    tab = visit(CHAT, width=360, height=740, phone=True)
    tab.wait(f"document.querySelector('{CHAT} .fields')")
    assert tab.js("document.documentElement.scrollWidth") <= 360
