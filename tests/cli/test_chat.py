"""pytest tests/cli/test_chat.py"""

from __future__ import annotations

import argparse
import io
import json
import sys

import pytest
import torch

from minga.cli import chat
from minga.cli.chat import Conversation
from minga.config.presets import tiny
from minga.data.tokenizer import Tokenizer, train_bpe
from minga.engine.llm import LLM
from minga.engine.runner import Stats
from minga.engine.sampler import SamplingParams
from minga.engine.sequence import Delta
from minga.model.transformer import Transformer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["bytes"], 259)


@pytest.fixture(scope="module")
def plain_tokenizer() -> Tokenizer:
    return train_bpe(["bytes"], 257, specials=["<|endoftext|>"])


class FakeLLM:
    """Answers "ok" in two pieces, and remembers what it was asked."""

    def __init__(self, tokenizer: Tokenizer, max_context: int = 10_000):
        self.tokenizer, self.max_context = tokenizer, max_context
        self.stats = Stats(tokens=2)
        self.asked: list[str] = []
        self.pieces: list[Delta | type[BaseException]] = [Delta("o", [1], None), Delta("k", [2], "stop")]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def stream(self, ids: list[int], params: SamplingParams):
        self.asked.append(self.tokenizer.decode(ids, skip_specials=False))
        return self._pieces()

    def _pieces(self):
        for piece in self.pieces:
            if not isinstance(piece, Delta):
                raise piece
            yield piece


def talk(llm: FakeLLM, *lines: str, **options) -> tuple[Conversation, str]:
    """Feeds the lines; returns the conversation and all that was said."""
    out = io.StringIO()
    conversation = Conversation(llm, SamplingParams(max_tokens=20), out=out, **options)
    for line in lines:
        conversation.take(line)
    return conversation, out.getvalue()


def test_history_goes_along(tokenizer):
    llm = FakeLLM(tokenizer)
    conversation, said = talk(llm, "uno", "", "dos", system="Be brief.")
    assert said.endswith("ok\nok\n")
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 2]
    assert llm.asked[1] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nuno<|im_end|>\n"
        "<|im_start|>assistant\nok<|im_end|>\n<|im_start|>user\ndos<|im_end|>\n<|im_start|>assistant\n"
    )


def test_reset_and_system(tokenizer):
    llm = FakeLLM(tokenizer)
    conversation, _ = talk(llm, "/system A", "uno", "/system B", "/reset", "dos")
    assert [message["content"] for message in conversation.messages] == ["B", "dos", "ok"]
    conversation.take("/system")
    assert [message["content"] for message in conversation.messages] == ["dos", "ok"]


def test_set(tokenizer):
    conversation, said = talk(FakeLLM(tokenizer), "/set temperature 0.5", "/set seed 7", "/set stop User:", "/set")
    assert (conversation.params.temperature, conversation.params.seed, conversation.params.stop) == (0.5, 7, ("User:",))
    assert "(temperature is 0.5)" in said and "max_tokens 20" in said
    conversation.take("/set seed none")
    assert conversation.params.seed is None and conversation.num_errors == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temprature 1", "did you mean temperature?"),
        ("/set temperature hot", "temperature is 'hot'"),
        ("/set top_p 3", "top_p is 3"),
        ("/sav x", "did you mean /save?"),
        ("/save", "no file name"),
        ("/save /nowhere/at/all.json", "cannot write"),
    ],
)
def test_mistakes_are_said_and_the_talk_goes_on(tokenizer, line, message):
    conversation, said = talk(FakeLLM(tokenizer), line, "hola")
    assert "error: " in said and message in said
    assert conversation.num_errors == 1 and conversation.messages[-1]["content"] == "ok"
    assert conversation.params == SamplingParams(max_tokens=20)


def test_help_and_stats_and_quit(tokenizer):
    conversation, said = talk(FakeLLM(tokenizer), "/help", "hola", "/stats")
    used = len(tokenizer.render_chat(conversation.messages))
    assert "/save FILE" in said and f"2 tokens. context: {used} of 10000 tokens" in said
    assert not conversation.take("/quit")


def test_save(tokenizer, tmp_path):
    file = tmp_path / "talk.json"
    file.write_text("old", encoding="utf-8")
    conversation, _ = talk(FakeLLM(tokenizer), "¿qué?", f"/save {file}")
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["messages"] == conversation.messages and document["settings"]["max_tokens"] == 20
    assert list(tmp_path.iterdir()) == [file]


def test_ctrl_c_stops_the_answer_only(tokenizer):
    llm = FakeLLM(tokenizer)
    llm.pieces = [Delta("half", [1], None), KeyboardInterrupt]
    conversation, said = talk(llm, "uno")
    assert said == "half\n(stopped)\n"
    llm.pieces = [KeyboardInterrupt]  # before the first token: as if it had not been asked
    conversation.take("never")
    llm.pieces = [Delta("ok", [1], "stop")]
    conversation.take("dos")
    assert [message["content"] for message in conversation.messages] == ["uno", "half", "dos", "ok"]


def test_an_answer_that_is_cut_says_so(tokenizer):
    llm = FakeLLM(tokenizer)
    llm.pieces = [Delta("ok", [1, 2], "length")]
    assert "(cut after 2 tokens" in talk(llm, "uno")[1]


def test_a_full_context_forgets_the_oldest_turns_aloud(tokenizer):
    """A turn is about 55 tokens of bytes and template, so 160 hold two of them and room for an answer."""
    llm = FakeLLM(tokenizer, max_context=160)
    conversation, said = talk(llm, "first " * 5, "second " * 5, "third " * 5, "fourth " * 5, system="S")
    assert said.count("(the context of 160 tokens is full: the oldest turn is forgotten)") == 2
    assert conversation.messages[0] == {"role": "system", "content": "S"}
    assert "first" not in llm.asked[-1] and "third" in llm.asked[-1] and "fourth" in llm.asked[-1]
    assert all(len(tokenizer.encode(asked, specials=True)) + 20 <= 160 for asked in llm.asked)


def test_without_a_template_lines_are_continued_and_that_is_said_once(plain_tokenizer):
    llm = FakeLLM(plain_tokenizer)
    _, said = talk(llm, "Once upon", "a time", "/system X", "/stats")
    assert llm.asked == ["Once upon", "a time"]
    assert said.count("no chat template") == 1
    assert "error: there is no place for a system prompt" in said


def test_raw_continues_although_there_is_a_template(tokenizer):
    llm = FakeLLM(tokenizer)
    _, said = talk(llm, "Once upon", raw=True)
    assert llm.asked == ["Once upon"] and "as asked" in said


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def small_llm(tokenizer, monkeypatch) -> LLM:
    config = tiny().replace(vocab_size=259, initializer_range=0.2, max_position_embeddings=128)
    llm = LLM.from_parts(Transformer(config).init_weights(torch.Generator().manual_seed(0)), tokenizer)
    monkeypatch.setattr("minga.engine.llm.LLM", lambda path, **_: llm)
    return llm


def call(monkeypatch, stdin: io.TextIOBase, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", stdin)
    parser = argparse.ArgumentParser()
    chat.add_parser(parser.add_subparsers())
    args = parser.parse_args(["chat", "a-model", *arguments])
    return args.run(args)


def test_piped_lines_are_turns(small_llm, monkeypatch, capsys):
    lines = io.StringIO("hola\n\n/reset\nhola\n/quit\nnever\n")
    assert call(monkeypatch, lines, "--temperature", "0", "--max-tokens", "8") == 0
    expected = small_llm.chat([{"role": "user", "content": "hola"}], SamplingParams(temperature=0, max_tokens=8)).text
    assert capsys.readouterr().out.count(expected + "\n") == 2


def test_json_is_one_document(small_llm, monkeypatch, capsys):
    assert call(monkeypatch, io.StringIO("hola\n"), "--json", "--max-tokens", "8", "--system", "Breve.") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"] == "a-model"
    assert [message["role"] for message in document["messages"]] == ["system", "user", "assistant"]


def test_a_question_longer_than_the_context(small_llm, monkeypatch, capsys):
    assert call(monkeypatch, io.StringIO("x" * 300 + "\nhola\n"), "--max-tokens", "8") == 2
    out = capsys.readouterr().out
    assert "error: the prompt has" in out and "context 128" in out


def test_keyboard(small_llm, monkeypatch, capsys):
    """Ctrl-C at the prompt explains how to leave; Ctrl-D leaves."""
    typed = iter([KeyboardInterrupt, "/set temperature 3", "/nonsense", EOFError])

    def fake_input(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("builtins.input", fake_input)
    assert call(monkeypatch, terminal) == 0
    out = capsys.readouterr().out
    assert "a-model, context 128 tokens" in out and "/quit or Ctrl-D leaves" in out and "(temperature is 3)" in out
