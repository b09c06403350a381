"""The page: its Markdown under node, its files as text, and the whole of it in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import minga.serve
from tests.serve.browser import CHROMIUM, Browser, Tab
from tests.serve.conftest import serving
from tests.serve.fake_server import HOLD, FakeServer, call, thoughts, words

PAGE = Path(minga.serve.__file__).parent / "page"
NODE = shutil.which("node")

needs_node = pytest.mark.skipif(NODE is None, reason="there is no node: apt install nodejs")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt install chromium")


# ---------------------------------------------------------------------------------------------- files


def _scripts() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in PAGE.glob("*.js")}


def _documents() -> dict[str, str]:
    """By the name of the script that each begins with."""
    return {
        script: (PAGE / page).read_text(encoding="utf-8")
        for script, page in (("app.js", "index.html"), ("docs.js", "docs.html"))
    }


def _imported(script: str) -> set[str]:
    """All that a script needs, itself included."""
    found, new = set(), {script}
    while new:
        found |= new
        new = {file for name in new for file in re.findall(r'from "\./(\S+)"', _scripts()[name])} - found
    return found


def test_no_script_makes_markup_out_of_text():
    for name, text in _scripts().items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", text), name


def test_every_import_is_a_file_of_the_page():
    assert set().union(*map(_imported, _documents())) == set(_scripts())  # and none is left over
    for script, document in _documents().items():
        preloaded = re.findall(r'rel="modulepreload" href="/static/(\S+)"', document)
        assert {*preloaded, script} == _imported(script)  # they come at once, not one after the other


def test_every_word_is_said_in_english_and_spanish():
    scripts = _scripts()
    table = dict(re.findall(r"^\t(\w+): \[(.*)\],$", scripts["words.js"], re.MULTILINE))
    assert all(len(json.loads(f"[{texts}]")) == 2 for texts in table.values())
    used = set(re.findall(r'data-t(?:-label|-hint)?="(\w+)"', "".join(_documents().values())))
    for text in scripts.values():
        used |= set(re.findall(r'\bt\("(\w+)"', text)) | set(re.findall(r'\bsaid\("\w+", "(\w+)"', text))
    assert used <= set(table) and len(used) > 40


def test_every_element_that_a_script_looks_up_is_there():
    for script, document in _documents().items():
        ids = re.findall(r'\bid="([\w-]+)"', document)
        assert len(ids) == len(set(ids))
        looked_up = {found for name in _imported(script) for found in re.findall(r'\$\("([\w-]+)"\)', _scripts()[name])}
        assert looked_up <= set(ids)


def _contrast(one: str, other: str) -> float:
    """WCAG 2's contrast of two colours, #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_words_stand_out_by_day_and_by_night():
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    palettes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})\b", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(palettes) == 2
    for palette in palettes:
        for ground in ("paper", "card", "sunk", "teal-wash"):
            for ink in ("ink", "soft", "teal", "amber", "red", "blue"):
                assert _contrast(palette[ink], palette[ground]) >= 4.5, (ink, ground)
        assert _contrast(palette["red"], palette["red-wash"]) >= 4.5


# ---------------------------------------------------------------------------------------------- Markdown


def _markdown(*texts: str) -> list[Any]:
    """The trees that markdown.js makes, [tag, attributes, ...children], here without the attributes."""
    program = """
        import { readFileSync } from "node:fs";
        const source = readFileSync(process.argv[1], "utf8");
        const { markdown } = await import(`data:text/javascript;base64,${Buffer.from(source).toString("base64")}`);
        const bare = (tree) => typeof tree === "string" ? tree : [tree[0], ...tree.slice(2).map(bare)];
        console.log(JSON.stringify(JSON.parse(readFileSync(0)).map((text) => markdown(text).map(bare))));
    """
    command = [str(NODE), "--input-type=module", "-e", program, str(PAGE / "markdown.js")]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


@needs_node
def test_markdown():
    cases = {
        "one\ntwo\n\nthree": [["p", "one", ["br"], "two"], ["p", "three"]],
        "**bold *both*** and *one*": [["p", ["strong", "bold ", ["em", "both"]], " and ", ["em", "one"]]],
        "`a**b**<i>`": [["p", ["code", "a**b**<i>"]]],
        "2 * 3 * 4, a*b*c, **open": [["p", "2 * 3 * 4, a*b*c, **open"]],
        "see:\n- a\n- *b*\n3. c": [["p", "see:"], ["ul", ["li", "a"], ["li", ["em", "b"]]], ["ol", ["li", "c"]]],
        "## Title\n### Part": [["h3", "Title"], ["h4", "Part"]],
        "1. a\n   - b\n   - c\n\n2. d": [["ol", ["li", "a", ["ul", ["li", "b"], ["li", "c"]]], ["li", "d"]]],
        "- a\n\n  more\n  ```\n  x\n  ```\n\nafter": [
            ["ul", ["li", "a", ["p", "more"], ["pre", ["code", "x"]]]], ["p", "after"],
        ],
        "> a\n> - b": [["blockquote", ["p", "a"], ["ul", ["li", "b"]]]],
        "| a | b |\n|---|--:|\n| *1* | 2 \\| 3 |\n| 4 |": [
            ["div", ["table",
                ["thead", ["tr", ["th", "a"], ["th", "b"]]],
                ["tbody", ["tr", ["td", ["em", "1"]], ["td", "2 | 3"]], ["tr", ["td", "4"], ["td"]]]]],
        ],
        "a | b\nno table": [["p", "a | b", ["br"], "no table"]],
        "a\n\n---\nb": [["p", "a"], ["hr"], ["p", "b"]],
        "~~old~~ __bold__ _thin_ snake_case_name \\*star\\*": [
            ["p", ["del", "old"], " ", ["strong", "bold"], " ", ["em", "thin"], " snake_case_name *star*"],
        ],
        "[site](https://a.org/x) https://b.org/y. ![cat](https://c.org/z)": [
            ["p", ["a", "site"], " ", ["a", "https://b.org/y"], ". ", ["a", "cat"]],
        ],
        "[no](javascript:alert(1)) [no](data:text/html,x)": [["p", "[no](javascript:alert(1)) [no](data:text/html,x)"]],
        "~~~\n```\n~~~": [["pre", ["code", "```"]]],
        "```py\n<b>\n\n  x\n```\nafter": [["pre", ["code", "<b>\n\n  x"]], ["p", "after"]],
        "```\nstill coming": [["pre", ["code", "still coming"]]],
        "<script>alert(1)</script>": [["p", "<script>alert(1)</script>"]],
        "": [],
    }  # fmt: skip
    assert _markdown(*cases) == list(cases.values())


@needs_node
def test_hostile_markdown_is_read_in_no_time():
    texts = [
        piece * 20_000
        for piece in (
            "*",
            "**",
            "`",
            "*a ",
            "**a** ",
            "`*",
            "- ",
            "# ",
            "```\n",
            "> ",
            "- a\n",
            " - a\n",
            "|",
            "|-",
            "a|b\n-|-\n",
            "[",
            "[a](",
            "__a ",
            "_a ",
            "~~a ",
            "\\\\",
            "* * *x",
            "https://",
        )
    ]
    texts.append("\n".join(" " * n + "- a" for n in range(2_000)))
    assert len(_markdown(*texts)) == len(texts)  # within the timeout, and without a stack overflow


def _leaves(tree: Any) -> str:
    return tree if isinstance(tree, str) else "".join(_leaves(child) for child in tree[1:])


@needs_node
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(st.text("ab *_#>-[]()\\!+.\n", max_size=60), min_size=100, max_size=300))
def test_no_letter_is_lost_whatever_stands_around_it(texts):
    for text, trees in zip(texts, _markdown(*texts), strict=True):
        assert re.sub(r"[^ab]", "", "".join(map(_leaves, trees))) == re.sub(r"[^ab]", "", text), text


# ---------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium) -> Iterator[Browser]:
    yield chromium
    assert chromium.close_tabs() == []


@pytest.fixture
def fake(tmp_path) -> FakeServer:
    return FakeServer(tmp_path)


@pytest.fixture
def url(fake) -> Iterator[str]:
    with serving(fake.app) as url:
        yield url
        fake.gate.set()


def _ready(browser: Browser, url: str, **options: Any) -> Tab:
    tab = browser.open(url, **options)
    tab.wait("performance.getEntriesByName('ready').length")
    return tab


def _ask(tab: Tab, text: str) -> None:
    tab.fill("#say", text)
    tab.key("Enter")


IDLE = "document.querySelector('.msg.bot') && !document.querySelector('.live')"


@needs_chromium
def test_an_answer_streams_and_what_a_model_says_is_text(browser, fake, url) -> None:
    fake.answer(*words("**Hola** <b>mundo</b>"), HOLD, *words("\n```py\nx = 1\n```"))
    tab = _ready(browser, url)
    _ask(tab, "buenos días")
    tab.wait("document.querySelector('.bot > .text strong')?.textContent === 'Hola'")
    assert tab.text("#send") == "Stop" and "mundo" in tab.text(".bot > .text")
    assert tab.js("document.querySelector('.bot b')") is None
    fake.gate.set()
    tab.wait(IDLE)
    assert tab.text(".code-head span") == "py" and tab.text(".bot pre") == "x = 1"
    assert tab.text(".stats").startswith("5 tokens")
    assert fake.requests[0]["messages"] == [{"role": "user", "content": "buenos días"}]
    tab.call("Page.reload")
    tab.wait("document.querySelector('.bot strong')")  # the conversation is still there


@needs_chromium
def test_the_first_message_may_stand_in_the_address(browser, fake, url) -> None:
    fake.answer(*words("Hello."))
    tab = browser.open(f"{url}/?say=buenos%20d%C3%ADas")
    tab.wait(IDLE)
    assert tab.text(".user .text") == "buenos días"
    assert tab.js("location.search") == ""


@needs_chromium
def test_stop_keeps_what_has_come_and_retry_asks_anew(browser, fake, url) -> None:
    fake.answer(*words("one two"), HOLD, *words("three"))
    fake.answer(*words("better"))
    tab = _ready(browser, url)
    _ask(tab, "count")
    tab.wait("document.querySelector('.bot > .text')?.textContent === 'one two'")
    tab.key("Escape")
    tab.wait(IDLE)
    assert "stopped" in tab.text(".stats") and tab.text(".bot > .text") == "one two"
    tab.click(".retry")
    tab.wait("document.querySelector('.bot > .text')?.textContent === 'better'")
    assert fake.requests[1]["messages"] == [{"role": "user", "content": "count"}]


@needs_chromium
def test_an_answer_that_fails_or_is_withheld_says_so(browser, fake, url) -> None:
    fake.answer({"content": "half"}, {"error": {"message": "the model failed"}})
    fake.answer(end="content_filter")
    tab = _ready(browser, url)
    _ask(tab, "one")
    tab.wait(IDLE)
    assert "the model failed" in tab.text(".error:not([hidden])")
    tab.click(".retry")
    tab.wait("document.querySelector('.notice')?.checkVisibility()")
    assert "content filter" in tab.text(".notice")


@needs_chromium
def test_reasoning_is_open_while_it_comes_and_folds_when_the_answer_begins(browser, fake, url) -> None:
    fake.usage = {"completion_tokens_details": {"reasoning_tokens": 3}, "prompt_tokens_details": {"cached_tokens": 8}}
    fake.answer(*thoughts("Let me see"), HOLD, *words("Forty-two."))
    fake.answer(*words("Yes."))
    tab = _ready(browser, url)
    _ask(tab, "why?")
    tab.wait("document.querySelector('.think')?.open")
    assert "Thinking" in tab.text("summary") and "Let me see" in tab.text(".think .text")
    fake.gate.set()
    tab.wait(IDLE)
    assert tab.js("document.querySelector('.think').open") is False
    assert re.fullmatch(r"Thought for [\d.]+ s", tab.js("document.querySelector('.think summary').textContent"))
    assert "3 for thinking" in tab.text(".stats") and "8 of 20 of the prompt cached" in tab.text(".stats")
    _ask(tab, "sure?")
    tab.wait("document.querySelectorAll('.bot').length === 2 && !document.querySelector('.live')")
    assert fake.requests[1]["messages"][1]["reasoning_content"] == "Let me see"


@needs_chromium
def test_tool_calls_are_shown_and_answered(browser, fake, url) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    calls = [*call("weather", '{"city":', ' "Quito"}', id="a"), *call("clock", "{}", id="b", index=1)]
    fake.answer(*thoughts("I look"), *calls, end="tool_calls")
    fake.answer(*words("17 degrees."))
    tab = _ready(browser, url)
    tab.click("#settings")
    tab.js("document.querySelector('.more').open = true")
    for wrong, said in (("[", "not JSON"), ("{}", "list of tools"), ('[{"type": "x"}]', "tool 1")):
        tab.fill("#tools", wrong)
        assert said in tab.text("#tools-error") and tab.js("document.querySelector('#tools').ariaInvalid") == "true"
    tab.fill("#tools", json.dumps([tool]))
    assert tab.text("#tools-error") == ""
    tab.click("#settings")
    _ask(tab, "weather in Quito?")
    tab.wait("document.activeElement.closest('.call')")  # the focus is where the reader goes on
    assert fake.requests[0]["tools"] == [tool]
    assert "weather" in tab.text(".call:first-child .call-head")
    assert json.loads(tab.text(".call pre").split("\n{}")[0]) == {"city": "Quito"}
    _ask(tab, "and now?")  # not before the tools have answered
    assert len(fake.requests) == 1 and "waits" in tab.js("document.querySelector('#announce').textContent")
    tab.fill(".call:first-child textarea", "17 C")
    tab.click(".call:first-child .result button")
    tab.wait("document.activeElement.closest('.call:nth-child(2)')")
    tab.fill(".call:nth-child(2) textarea", "noon")
    tab.click(".call:nth-child(2) .result button")
    tab.wait("document.querySelectorAll('.bot').length === 2 && !document.querySelector('.live')")
    assert "17 degrees." in tab.text(".bot:last-child > .text")
    _, answer, *results = fake.requests[1]["messages"]
    assert answer["reasoning_content"] == "I look"
    assert [call["function"] for call in answer["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Quito"}'},
        {"name": "clock", "arguments": "{}"},
    ]
    assert results == [
        {"role": "tool", "tool_call_id": "a", "content": "17 C"},
        {"role": "tool", "tool_call_id": "b", "content": "noon"},
    ]


@needs_chromium
def test_the_keyboard_is_enough(browser, fake, url) -> None:
    for text in ("first", "second", "third"):
        fake.answer(*words(text))
    tab = _ready(browser, url)
    tab.write("one")  # the field has the focus from the start
    tab.key("Enter", shift=True)
    tab.write("line")
    tab.key("Enter")
    tab.wait(IDLE)
    assert fake.requests[0]["messages"][0]["content"] == "one\nline"
    tab.key("ArrowUp")
    tab.wait("document.activeElement.closest('.edit')")
    tab.key("Escape")
    assert tab.text(".user .text") == "one\nline" and tab.text(".user .ghost") == "Edit"
    tab.js("document.querySelector('.user .ghost').click()")
    tab.call("Input.dispatchKeyEvent", type="keyDown", key="a", commands=["selectAll"])
    tab.write("other")
    tab.key("Enter")
    tab.wait("document.querySelector('.bot > .text')?.textContent === 'second'")
    tab.wait(IDLE)
    assert fake.requests[1]["messages"] == [{"role": "user", "content": "other"}]
    assert tab.js("document.activeElement.id") == "say"
    reached = []
    for _ in range(8):  # on from the field, through its tray, and round to the top
        tab.key("Tab")
        reached.append(tab.js("document.activeElement.id || document.activeElement.className"))
    assert reached[:4] == ["settings", "compare", "clear", "help"] and "skip" in reached
    tab.js("document.querySelector('#compare').focus()")
    tab.key("?")
    tab.wait("document.querySelector('#help-dialog').open")
    tab.key("Escape")
    tab.wait("!document.querySelector('#help-dialog').open")
    tab.js("document.querySelector('#settings').focus()")
    tab.key("Enter")
    assert tab.js("document.activeElement.id") == "system"
    tab.key("Escape")
    assert tab.js("document.activeElement.id") == "settings"


@needs_chromium
def test_two_models_are_asked_side_by_side(browser, fake, url) -> None:
    fake.answers_of = {
        "qwen": [*words("wide"), HOLD, *words("sea"), "stop"],
        "shakespeare": [*words("the main"), HOLD, "stop"],
    }
    tab = _ready(browser, url, width=1440, height=900)
    tab.click("#compare")
    tab.fill(".lane + .lane .heat input", "0")
    _ask(tab, "the sea?")
    tab.wait("[...document.querySelectorAll('.bot > .text')].map((e) => e.textContent).join() === 'wide,the main'")
    left, right = tab.js("[...document.querySelectorAll('.lane')].map((e) => e.getBoundingClientRect().left)")
    assert left < right
    tab.click("#send")  # stops both
    tab.wait("!document.querySelector('.live')")
    assert tab.text(".stats").count("stopped") == 2
    temperatures = {request["model"]: request["temperature"] for request in fake.requests}
    assert temperatures == {"qwen": 0.7, "shakespeare": 0}
    fake.gate.set()
    fake.answers_of = {"qwen": [*words("salt"), "stop"], "shakespeare": [*words("brine"), "stop"]}
    tab.click(".user .ghost")
    tab.write("?")
    tab.key("Enter")
    tab.wait("document.querySelectorAll('.bot').length === 2 && !document.querySelector('.live')")
    assert tab.text(".user .text").split("\n") == [fake.requests[-1]["messages"][0]["content"]] * 2
    tab.resize(360, 740)
    top, bottom = tab.js("[...document.querySelectorAll('.lane')].map((e) => e.getBoundingClientRect().top)")
    assert top < bottom
    tab.click("#compare")
    assert tab.text(".lane:not([hidden]) .bot > .text") == "salt"


@needs_chromium
def test_one_model_is_compared_with_itself(browser, fake, url) -> None:
    fake.models = ("alone",)
    fake.answers_of = {"alone": [*words("yes"), "stop"]}
    tab = _ready(browser, url)
    tab.click("#compare")
    tab.fill(".lane + .lane .heat input", "1.5")
    _ask(tab, "well?")
    tab.wait("document.querySelectorAll('.bot').length === 2 && !document.querySelector('.live')")
    assert sorted(request["temperature"] for request in fake.requests) == [0.7, 1.5]


@needs_chromium
def test_settings_are_sent_and_kept(browser, fake, url) -> None:
    fake.answer(*words("yes"))
    fake.answer(*words("yes"))
    tab = _ready(browser, url)
    tab.click("#settings")
    tab.js("document.querySelector('.more').open = true")
    wanted = {"top_p": 0.5, "max_tokens": 9, "top_k": 40, "min_p": 0.05, "seed": 7, "thinking_budget": 100}
    for name, value in wanted.items():
        tab.fill(f"#{name}", str(value))
    tab.fill("#system", "Be brief.")
    for effort in ("medium", "none"):
        tab.js(f"document.querySelector('#reasoning_effort').value = '{effort}'")
        tab.js("document.querySelector('#reasoning_effort').dispatchEvent(new Event('change'))")
        _ask(tab, "well?")
        tab.wait(IDLE)
        assert wanted | {"reasoning_effort": effort, "temperature": 0.7} == {
            name: fake.requests[-1][name] for name in (*wanted, "reasoning_effort", "temperature")
        }
        assert fake.requests[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
        tab.click("#clear")
    tab.call("Page.reload")
    tab.wait("document.querySelector('#top_k')?.value === '40'")


@needs_chromium
def test_memory_and_cost_are_shown_where_the_server_tells_them(browser, fake, url) -> None:
    fake.answer(*words("one two three"))
    tab = _ready(browser, url)
    tab.wait("document.querySelector('#version').textContent === 'Minga 0.2.0'")
    assert not tab.js("document.querySelector('#memory').checkVisibility()")
    fake.status = {"kv_bytes": 5e8, "kv_bytes_total": 1e9, "price_per_million_tokens": 1e5, "currency": "USD"}
    tab.call("Page.reload")
    tab.wait("document.querySelector('#memory')?.checkVisibility()")
    assert "50%" in tab.text("#memory")
    _ask(tab, "cost?")
    tab.wait(IDLE)
    assert tab.text("#spent") == "Cost $2.30"  # 23 tokens


@needs_chromium
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_nothing_is_wider_than_the_page(browser, fake, url, tmp_path, width: int) -> None:
    table = "\n\n| " + " | ".join(["a long heading"] * 12) + " |\n|" + "---|" * 12
    fake.answers_of = {
        name: [*thoughts("Hm " * 50), {"content": "x" * 300 + table}, *call("f", "y" * 300, id="1"), "tool_calls"]
        for name in fake.models
    }
    _write_run(tmp_path / "village")
    tab = _ready(browser, url, width=width, height=800, language="es", phone=width < 700)
    assert tab.text("#send") == "Enviar"
    tab.click("#settings")
    tab.js("document.querySelector('.more').open = true")
    tab.click("#compare")
    _ask(tab, "z" * 300)
    tab.wait("document.querySelectorAll('.result form').length === 2")
    tab.click("#help")
    parts = json.dumps(["html", "#chat", "#runs", ".log", ".top", ".composer", "#drawer"])
    overflow = f"{parts}.filter((part) => (e => e.scrollWidth > e.clientWidth)(document.querySelector(part)))"
    assert tab.js(overflow) == []
    tab.js("location.hash = '#runs'")
    tab.wait("document.querySelector('.run polyline')")
    assert tab.js(overflow) == []


@needs_chromium
def test_the_page_speaks_spanish(browser, fake, url) -> None:
    fake.answer(*thoughts("ya"), *words("Hola."), end="length")
    tab = _ready(browser, url, language="es")
    assert tab.js("document.documentElement.lang") == "es" and tab.text("#nav-runs") == "Corridas"
    _ask(tab, "hola")
    tab.wait(IDLE)
    assert "cortada en el límite" in tab.text(".stats") and "Reintentar" in tab.text(".foot")
    tab.click("#lang")
    assert "cut at the limit" in tab.text(".stats") and "Retry" in tab.text(".foot") and tab.text("#send") == "Send"
    assert "Thought for" in tab.text(".think")


@needs_chromium
def test_what_moves_stands_still_for_those_who_ask_for_it(browser, fake, url) -> None:
    fake.answer(HOLD, *words("x"))
    tab = _ready(browser, url)
    tab.prefer(**{"prefers-reduced-motion": "reduce"})
    _ask(tab, "hi")
    tab.wait("document.querySelector('.wait')?.checkVisibility()")
    assert tab.js("document.getAnimations().length") == 0


@needs_chromium
def test_every_control_has_a_name(browser, fake, url) -> None:
    fake.answers_of = {name: [*words("a"), *call("f", "{}", id="1"), "tool_calls"] for name in fake.models}
    tab = _ready(browser, url)
    tab.click("#settings")
    tab.js("document.querySelector('.more').open = true")
    tab.click("#compare")
    _ask(tab, "hi")
    tab.wait("document.querySelectorAll('.result form').length === 2")
    tab.call("Accessibility.enable")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "spinbutton", "combobox", "link", "meter", "log", "region"}
    named = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node["ignored"]]
    controls = [(role, name) for role, name in named if role in roles]
    assert len(controls) > 20 and [role for role, name in controls if not name] == []


# ---------------------------------------------------------------------------------------------- runs


def _write_run(folder: Path) -> None:
    watched = {"mfu": 0.375, "memory": 1.25e9, "grad_norm": 1.0}
    steps: list[dict[str, Any]] = [
        {"kind": "step", "step": n, "loss": 5 - n / 10, "seconds": n, **watched} for n in range(1, 21)
    ]
    steps[4]["expert_load"] = [[2.0, 1.0], [1, 1], [1, 1]]
    steps[9]["expert_load"] = [[0.5, 1.5], [1, 1], [2, 0]]
    lines = [
        {"kind": "start", "config": {"steps": 20}, "parameters": {"total": 12_300_000, "active": 4_560_000}},
        *steps,
        {"kind": "skip", "step": 7, "reason": "leapt"},
        {"kind": "eval", "step": 20, "val_loss": 3.2, "bits_per_byte": 2.125, "mtp_acceptance": 0.64},
        {"kind": "sample", "step": 20, "prompt": "To be", "text": ", or <i>not</i>"},
        {"kind": "end", "reason": "done", "seconds": 20},
    ]
    folder.mkdir()
    (folder / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "st')


@needs_chromium
def test_a_run_is_shown_on_the_page(browser, address: str, tmp_path: Path) -> None:
    """On the real server."""
    _write_run(tmp_path / "village")
    tab = browser.open(f"{address}/#runs/village")
    tab.wait("document.querySelector('.run polyline')")
    page = tab.js("document.documentElement.outerHTML")
    for value in ("12.3M", "2.125", "64%", "3.00", "20 s", "finished", "38%", "1.25 GB"):
        assert f">{value}<" in page, value
    assert "<b>To be</b>, or &lt;i&gt;not&lt;/i&gt;" in page
    assert page.count("<polyline") == 9  # loss, MFU, norm twice; held-out loss, bits per byte, MTP acceptance
    assert len(re.findall(r'<circle [^>]*class="dot spike"', page)) == 1
    shades = re.findall(r'<path class="(hot|cold)" fill-opacity="([\d.]+)" d="([^"]*)"', page)
    assert {(kind, shade): d.count("M") for kind, shade, d in shades} == {
        ("hot", "1"): 2, ("hot", "0.6"): 1, ("cold", "1"): 2,
    }  # fmt: skip
    assert len(re.findall(r'<rect [^>]*class="(?:hot|cold)"', page)) == 6


@needs_chromium
def test_a_run_that_goes_on_and_one_that_died(browser, fake, url, tmp_path: Path) -> None:
    start = {"kind": "start", "config": {"steps": 100}}
    steps = [{"kind": "step", "step": n, "loss": 2.0, "seconds": 2 * n} for n in range(1, 31)]
    for name in ("alive", "dead"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [start, *steps[:20]]))
    os.utime(tmp_path / "dead" / "run.jsonl", (0, 0))
    tab = browser.open(f"{url}/#runs")
    tab.wait("document.querySelector('.title h2')?.textContent === 'alive'")
    tab.wait("document.querySelector('.tiles').textContent.includes('2 min 40 s')")  # 80 steps, two seconds each
    with (tmp_path / "alive" / "run.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in steps[20:]))
    tab.wait("document.querySelector('.tiles').textContent.includes('2 min 20 s')")  # read on, not anew
    tab.js("document.querySelectorAll('.run-list a')[1].click()")
    tab.wait("document.querySelector('.title .state.dead') && document.querySelector('.note').checkVisibility()")
    assert "can be resumed" in tab.text(".note")
    tab.call("Page.reload")
    tab.wait("document.querySelector('.title h2')?.textContent === 'dead'")
