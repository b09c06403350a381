"""Text to token ids and back: byte-level BPE, opened from a model folder or a GGUF file, or trained on one's own text.

Byte-level BPE (Radford et al. 2019, section 2.2) is what GPT-2, Llama 3, Qwen, DeepSeek and SmolLM use. A text is cut
into words by a regular expression (the *pre-tokenizer*), each word becomes its UTF-8 bytes, and learned merges join
bytes into tokens. So every text has tokens, and every token is a byte string: decoding is joining bytes.

Beside the vocabulary stand the *added tokens* (`<|im_end|>`): control tokens and a few user-defined ones. The
`tokenizers` library matches them in any text, so anyone who may write text may write control tokens. Here the library
gets a tokenizer without them, and this file places them itself, only where the caller says so:

    encode(text)                  all of it is text: no added token comes out, whatever the text says
    encode(text, specials=True)   added tokens in the text become tokens, as in transformers
    render_chat(messages)         those that the chat template writes become tokens, those in the contents do not
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minga.data.chat_template import ChatTemplate
from minga.data.tokenizer_json import (
    LONE_SURROGATE,
    SAME_WORDS,
    WORDS,
    AddedToken,
    added_tokens,
    backend_for_text,
    bos_of_post_processor,
    parse_spec,
    pre_tokenizer,
    spec_of_gguf,
    spelled_bytes,
    with_bos,
)
from minga.errors import UserError

DEFAULT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Where no file says which token ends a text, the first of these in the vocabulary does; where none says which end an
# answer, all of these do. llama.cpp keeps the same kind of list: many files name only one of two.
_TEXT_ENDS = ("<|endoftext|>", "<｜end▁of▁sentence｜>", "<|end_of_text|>", "</s>")
_ANSWER_ENDS = (*_TEXT_ENDS, "<|im_end|>", "<|eot_id|>", "<|end|>", "<|EOT|>")
_MAX_BYTES = 1 << 26  # of a tokenizer.json; Gemma's, the largest, has 33 MB
_MARKS = 0x100000  # the first character of Unicode's last private-use plane
_MARK = re.compile("([\U00100000-\U0010ffff])")
_TEXT_STARTS = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>")

T = TypeVar("T")


class Tokenizer:
    """Byte-level BPE with its added tokens, the ids that start and end texts, and the chat template.

    `spec` is a parsed `tokenizer.json`; the class methods below find one and what belongs to it.
    `bos_id` and `eos_id` are None where the model has none; `eos_ids` are all ids that end an answer; `add_bos` says
    whether the model expects `bos_id` before a plain prompt (`encode` never adds it).
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        eos_ids: Sequence[int] | None = None,
        add_bos: bool = False,
        chat_template: str | None = None,
    ) -> None:
        self._added = added_tokens(spec)
        self._added_ids = {token.content: token.id for token in self._added.values()}
        self._control_ids = {token.id for token in self._added.values() if token.special}
        self._added_pattern = _alternatives(self._added.values())  # matches "" if there are none
        self._backend = backend_for_text(spec, self._added_ids)
        self.vocab_size = 1 + max([*spec["model"]["vocab"].values(), *self._added], default=-1)

        self.bos_id = self._first_known(_TEXT_STARTS) if bos_id is None else bos_id
        ends = _known_ends(self._added) if eos_ids is None else list(eos_ids)
        self.eos_id = next(iter(eos_ids or ()), self._first_known(_TEXT_ENDS)) if eos_id is None else eos_id
        self.eos_ids = tuple(dict.fromkeys(ends if self.eos_id is None else [self.eos_id, *ends]))
        for name, token in [("bos", self.bos_id), *(("eos", token) for token in self.eos_ids)]:
            if token is not None and not 0 <= token < self.vocab_size:
                outside = f"outside the vocabulary of {self.vocab_size} (tokenizer)"
                raise UserError(f"the {name} token id {token} is {outside}. mend the model's files")
        self.add_bos = add_bos and self.bos_id is not None
        self.chat_template = chat_template
        self._compiled_template: ChatTemplate | None = None
        self._bytes: dict[int, bytes] = {}
        self._spec = self._with_post_processor(spec)

    # ------------------------------------------------------------------ opening

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Opens a lone `tokenizer.json`; which tokens start and end a text is then known from their names only."""
        spec = parse_spec(_read_text(Path(path)))
        bos = bos_of_post_processor(spec)
        return cls(spec, bos_id=bos, add_bos=bos is not None)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Opens the tokenizer of a model folder, with the chat template and the ends that its other files name."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(
                f"{folder} has no tokenizer.json (tokenizer). give a model folder that has one, or the file itself"
            )
        spec = parse_spec(_read_text(folder / "tokenizer.json"))
        settings = _read_json_if_there(folder / "tokenizer_config.json")
        ids = {token.content: token.id for token in added_tokens(spec).values()}
        bos, eos = (_named_id(settings.get(key), ids, spec) for key in ("bos_token", "eos_token"))
        bos_of_file = bos_of_post_processor(spec)
        return cls(
            spec,
            bos_id=bos_of_file if bos is None else bos,
            eos_id=eos,
            eos_ids=_eos_ids_of_model(folder) or None,
            add_bos=bool(settings.get("add_bos_token", bos_of_file is not None)),
            chat_template=_template_of_folder(folder, settings),
        )

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Builds the tokenizer that a GGUF file describes in its `tokenizer.*` keys (lists of str and int)."""
        kind = metadata.get("tokenizer.ggml.model")
        if kind != "gpt2":
            raise UserError(
                f"the tokenizer is of kind {kind!r} (tokenizer.ggml.model). Minga opens 'gpt2', byte-level BPE"
            )
        pre = metadata.get("tokenizer.ggml.pre", "default")
        pre = SAME_WORDS.get(pre, pre) if isinstance(pre, str) else pre
        if not isinstance(pre, str) or pre not in WORDS:
            raise UserError(
                f"pre-tokenizer {pre!r} is not known (tokenizer.ggml.pre). known: {', '.join(sorted(WORDS))}"
            )
        spec = spec_of_gguf(metadata, pre)
        names = ("bos", "eos", "eot", "eom")
        bos, eos, *others = (_value_of(metadata, f"tokenizer.ggml.{name}_token_id", int) for name in names)
        return cls(
            spec,
            bos_id=bos,
            eos_id=eos,
            eos_ids=[*(end for end in others if end is not None), *_known_ends(added_tokens(spec))],
            # llama.cpp's default: of these pre-tokenizers, only Llama 3's starts texts with bos unless told otherwise.
            add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")),
            chat_template=_value_of(metadata, "tokenizer.chat_template", str),
        )

    # ------------------------------------------------------------------ text to ids

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Token ids of `text`. Added tokens spelled out in it stay text unless `specials`; `bos_id` is never added."""
        return self._encode_marked(text, {}) if specials else self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        try:
            if len(texts) == 1:  # without the library's threads, which a process that forks later would be warned about
                return [self._backend.encode(texts[0], add_special_tokens=False).ids]
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError:
            for text in texts:
                _refuse_lone_surrogate(text)
            raise

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        written: Mapping[str, str] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation, by the model's chat template: equal to transformers' `apply_chat_template`.

        The difference: control tokens spelled out in the messages stay text. `variables` go to the template
        (`enable_thinking=False`). `written` are characters that stand in the messages for control tokens which the caller,
        and no user, wrote there. Raises `UserError` without a template, and for messages that it refuses.
        """
        if self.chat_template is None:
            raise UserError(
                "the model has no chat template (tokenizer). use `minga generate`, or add a chat_template.jinja"
            )
        if self._compiled_template is None:
            self._compiled_template = ChatTemplate(self.chat_template, control_tokens=self._added_ids)
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        variables = {name: self._content(token) for name, token in names.items() if token is not None} | variables
        text, marks = self._compiled_template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
        )
        tokens = {ord(character): token for character, token in (written or {}).items()}
        return self._encode_marked(text.translate(tokens) if tokens else text, marks)

    def _encode_marked(self, text: str, marks: Mapping[int, str]) -> list[int]:
        """Added tokens in the text become tokens; then marks become what they stand for, and the rest is text."""
        runs, tokens, start = [], [], 0
        for match in self._added_pattern.finditer(text) if self._added else ():
            token = self._added[self._added_ids[match.group()]]
            run = text[start : match.start()]
            runs.append(run.rstrip() if token.lstrip else run)
            tokens.append(token.id)
            start = _end_of_space(text, match.end()) if token.rstrip else match.end()
        runs.append(text[start:])
        first, *others = self.encode_batch([run.translate(marks) for run in runs] if marks else runs)
        return first + [id for token, ids in zip(tokens, others, strict=True) for id in (token, *ids)]

    # ------------------------------------------------------------------ ids to text

    def token_bytes(self, token: int) -> bytes:
        """What a token spells: an added token its name, an id without a token (padding of the model) nothing."""
        if token not in self._bytes:
            if token in self._added:
                self._bytes[token] = self._added[token].content.encode()
            else:
                self._bytes[token] = spelled_bytes(self._content(token))
        return self._bytes[token]

    def decode(self, ids: Iterable[int], skip_specials: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Control tokens are left out unless asked for."""
        hidden = self._control_ids if skip_specials else ()
        return b"".join(self.token_bytes(token) for token in ids if token not in hidden).decode("utf-8", "replace")

    def stream(self, skip_specials: bool = True, *, mark: bool = False) -> DecodeStream:
        """A decoder for tokens that arrive one at a time; its pieces joined are `decode` of all of them.

        mark: added tokens come as one private-use character each, which no other token can write; `split_marks` says which.
        """
        if mark:
            return DecodeStream(self, set(), {id: chr(_MARKS + rank) for rank, id in enumerate(self._marked)})
        return DecodeStream(self, self._control_ids if skip_specials else set())

    def split_marks(self, text: str) -> list[tuple[str, bool]]:
        """The parts of a marked text: what stands in it as text, and added tokens spelled out (True). These are control
        tokens where `control_id` knows them; many models have marks of calls and thoughts that are not.
        """
        parts = _MARK.split(text)  # every second one is a mark
        return [
            (self._content(self._marked[ord(part) - _MARKS]), True) if index % 2 else (part, False)
            for index, part in enumerate(parts)
            if part
        ]

    @cached_property
    def _marked(self) -> list[int]:
        """The added tokens in the order of their marks."""
        return sorted(self._added)

    def control_id(self, name: str) -> int | None:
        """The id of a control token, None if there is none of this name."""
        id = self._added_ids.get(name)
        return id if id in self._control_ids else None

    def json(self) -> str:
        """The `tokenizer.json` that `save` writes."""
        return json.dumps(self._spec, ensure_ascii=False)

    # ------------------------------------------------------------------ saving

    @cached_property
    def sha256(self) -> str:
        """Of the `tokenizer.json` that `save` writes."""
        return hashlib.sha256(self.json().encode()).hexdigest()

    def save(self, folder: str | Path, *, max_length: int = 10**30) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, which transformers and vLLM open.

        `max_length` is the model's context; the default is transformers' way to say that it is not known.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        eos = self._content(self.eos_id) if self.eos_id is not None else None
        settings = {
            "add_bos_token": self.add_bos,
            "add_prefix_space": False,
            "bos_token": self._content(self.bos_id) if self.bos_id is not None else None,
            "clean_up_tokenization_spaces": False,
            "eos_token": eos,
            "model_max_length": max_length,
            "pad_token": eos,
            # The class that takes tokenizer.json as it is; those named after a family rebuild parts of it.
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        files = {
            "tokenizer.json": self.json(),
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        }
        if self.chat_template is not None:
            files["chat_template.jinja"] = self.chat_template
        for name, text in files.items():
            _write_durably(folder / name, text)

    # ------------------------------------------------------------------ parts

    def _content(self, token: int) -> str:
        if token in self._added:
            return self._added[token].content
        return (self._backend.id_to_token(token) or "") if 0 <= token < self.vocab_size else ""

    def _first_known(self, names: Sequence[str]) -> int | None:
        return next((self._added_ids[name] for name in names if name in self._added_ids), None)

    def _with_post_processor(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        """The post-processor is what makes transformers start texts with bos, so it has to agree with `add_bos`."""
        wanted = self.bos_id if self.add_bos else None
        if wanted == bos_of_post_processor(spec):
            return spec
        return with_bos(spec, wanted, "" if wanted is None else self._content(wanted))


class DecodeStream:
    """Turns tokens into text as they come, holding back the bytes of a character until it is whole."""

    def __init__(self, tokenizer: Tokenizer, hidden: set[int], marks: Mapping[int, str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._marks = marks
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, possibly empty."""
        if token in self._hidden:
            return ""
        if self._marks is None:
            return self._utf8.decode(self._tokenizer.token_bytes(token))
        if token in self._marks:
            return self.flush() + self._marks[token]
        return _MARK.sub("\ufffd", self._utf8.decode(self._tokenizer.token_bytes(token)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole, else nothing."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def train_bpe(texts: Iterable[str], vocab_size: int, *, specials: Sequence[str] = DEFAULT_SPECIALS) -> Tokenizer:
    """Learns a byte-level BPE of exactly `vocab_size` tokens, special tokens included; the first special ends texts.

    The words are DeepSeek-V3's. On Shakespeare at 4,096 tokens they give 3.19 bytes per token, GPT-2's 2.88 and
    Llama 3's 3.18: letting a line break join the punctuation before it, and a quote or bracket the word after it, pays.
    llama.cpp knows them by name too, so the result can be told to a GGUF file. Equal texts give equal tokenizers.
    Raises `UserError` where the texts hold too few repeated pieces for that many tokens.
    """
    smallest = 256 + len(specials)
    if vocab_size < smallest:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small (tokenizer). bytes and special tokens alone are {smallest}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer("deepseek-v3")
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    learned = backend.get_vocab_size()
    if learned < vocab_size:
        too_small = f"the text is too small for a vocabulary of {vocab_size} (tokenizer)"
        raise UserError(f"{too_small}. give more text, or --vocab-size {learned}")
    chat = CHATML if {"<|im_start|>", "<|im_end|>"} <= set(specials) else None
    return Tokenizer(parse_spec(backend.to_str()), eos_id=0 if specials else None, chat_template=chat)


# ---------------------------------------------------------------------------------------------- parts


def _known_ends(added: Mapping[int, AddedToken]) -> list[int]:
    ids = {token.content: token.id for token in added.values()}
    return [ids[end] for end in _ANSWER_ENDS if end in ids]


def _alternatives(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """Matches any of the tokens; of two that start alike the longer one, as the library does."""
    return re.compile("|".join(token.pattern for token in sorted(tokens, key=lambda token: -len(token.content))))


def _end_of_space(text: str, start: int) -> int:
    return len(text) - len(text[start:].lstrip())


def _refuse_lone_surrogate(text: str) -> None:
    match = LONE_SURROGATE.search(text)
    if match:
        raise UserError(
            f"the text holds half of a surrogate pair (character {match.start()}). send the whole character"
        )


def _value_of(metadata: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, kind):
        raise UserError(f"the value is {value!r} and no {kind.__name__} ({key}). convert the model to GGUF again")
    return value


# ---------------------------------------------------------------------------------------------- files of a model folder


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path} has more than {_MAX_BYTES} bytes (tokenizer). download it again")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"cannot read {path} ({reason}). give a tokenizer.json or a model folder") from None


def _read_json_if_there(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object (tokenizer). mend or remove it")
    return value


def _named_id(name: Any, ids: Mapping[str, int], spec: Mapping[str, Any]) -> int | None:
    """The id of a token that tokenizer_config.json names, as a string or as an object with `content`."""
    content = name.get("content") if isinstance(name, dict) else name
    return ids.get(content, spec["model"]["vocab"].get(content)) if isinstance(content, str) else None


def _eos_ids_of_model(folder: Path) -> list[int]:
    """The ids that end an answer: generation_config.json knows best, then config.json."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json_if_there(folder / name).get("eos_token_id")
        ids = [id for id in (value if isinstance(value, list) else [value]) if type(id) is int]
        if ids:
            return ids
    return []


def _template_of_folder(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the one of tokenizer_config.json: a string, or named ones of which `default` counts."""
    if (folder / "chat_template.jinja").is_file():
        return _read_text(folder / "chat_template.jinja")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", next(iter(named.values()), None))
    return template if isinstance(template, str) else None


def _write_durably(path: Path, text: str) -> None:
    """Writes beside, syncs and renames, so that the file is the old one or the new one and never half of either."""
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
