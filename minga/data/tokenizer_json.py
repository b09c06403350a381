"""`tokenizer.json` as data: parsed, made from the lists of a GGUF file, and turned into the library's tokenizer.

The file says how a text is cut into words (the *pre-tokenizer*: regular expressions, applied one after another), which
bytes and tokens merge, and which tokens are *added*: looked for in the raw text before anything else. A GGUF file has
lists for the second and third, but only a name for the first (`tokenizer.ggml.pre`). `WORDS` has the expressions behind
the names that the families here use, as llama.cpp defines them.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from minga.errors import UserError

_GPT2_WORD = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3_WORD = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The letters that have case, as of an old Unicode version: DeepSeek LLM's own table, which no property equals.
_DEEPSEEK_LLM_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    "\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair escaped in JSON, "\ud83d": no UTF-8 expresses it
WORDS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORD, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2_WORD,),
    "smollm": (r"\p{N}", _GPT2_WORD),
    "llama-bpe": (_LLAMA3_WORD,),
    "qwen2": (_LLAMA3_WORD.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "deepseek-llm": (
        "[\r\n]",
        rf"\s?[{_DEEPSEEK_LLM_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}+",
    ),
    "deepseek-v3": (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK_V3_WORD),
}
SAME_WORDS = {"gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}

_MAX_ADDED = 1 << 18  # characters of all added tokens, which become one regular expression; Gemma's have 70,000
_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types that are added tokens


@dataclass(frozen=True)
class AddedToken:
    """One added token of a `tokenizer.json`. `special`: control, left out of decoded text by default.

    `lstrip` and `rstrip` swallow the white space on that side; `single_word` matches no part of a longer word.
    """

    id: int
    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def pattern(self) -> str:
        body = re.escape(self.content)
        return rf"(?<!\w){body}(?!\w)" if self.single_word else body


def parse_spec(text: str) -> dict[str, Any]:
    """The parsed file. Raises `UserError` unless it is a byte-level BPE."""
    try:
        spec = json.loads(text)
        decoder = json.dumps(spec.get("decoder"))
    except (ValueError, RecursionError, AttributeError):
        spec, decoder = None, ""
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(spec, dict) or not isinstance(model, dict):
        raise UserError("the file is not a tokenizer.json (tokenizer). give the one of a model folder")
    if model.get("type", "BPE") != "BPE" or '"ByteLevel"' not in decoder:
        raise UserError(
            f"the tokenizer is no byte-level BPE (tokenizer.json, model {model.get('type')}). Minga opens those of the "
            "GPT-2 kind: Llama 3, Qwen, DeepSeek, SmolLM and what it trains itself"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):  # with a prefix that a token does not have, the library may abort the whole process
            raise UserError(
                f"{key} is set, and byte-level BPE has none (tokenizer.json). take a tokenizer of the GPT-2 kind"
            )
    entries = spec.get("added_tokens") or []
    well_formed = isinstance(model.get("vocab"), dict) and isinstance(model.get("merges"), list)
    well_formed = well_formed and all(map(_is_merge, model["merges"]))
    well_formed = well_formed and isinstance(entries, list) and all(map(_is_added_token, entries))
    if not well_formed:
        raise UserError("the tokenizer.json is damaged (vocab, merges or added_tokens). give the one of a model folder")
    return spec


def _is_merge(entry: Any) -> bool:
    return isinstance(entry, str) or (isinstance(entry, list) and all(isinstance(part, str) for part in entry))


def _is_added_token(entry: Any) -> bool:
    if not (isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int):
        return False
    return 0 <= entry["id"] < 1 << 32 and not LONE_SURROGATE.search(entry["content"])


def added_tokens(spec: Mapping[str, Any]) -> dict[int, AddedToken]:
    tokens = {}
    length = sum(len(entry["content"]) for entry in spec.get("added_tokens") or ())
    if length > _MAX_ADDED:
        raise UserError(f"the added tokens have {length} characters (tokenizer). Minga opens up to {_MAX_ADDED}")
    for entry in spec.get("added_tokens") or ():
        flags = {flag: bool(entry.get(flag)) for flag in ("special", "lstrip", "rstrip", "single_word")}
        if entry["content"]:
            tokens[entry["id"]] = AddedToken(entry["id"], entry["content"], **flags)
    return tokens


def backend_for_text(spec: Mapping[str, Any], added: Container[str]) -> tokenizers.Tokenizer:
    """The library's tokenizer without the added tokens.

    Those that are in the vocabulary as well leave it, because with `ignore_merges` a word that equals a token becomes
    that token. Exceptions are characters and what merges make: such a token is ordinary text.
    """
    model = spec["model"]
    control = {token for token in model["vocab"] if token in added and len(token) > 1}
    if control:
        control -= {
            merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge) for merge in model["merges"]
        }
    vocab = {token: id for token, id in model["vocab"].items() if token not in control}
    unknown = model.get("unk_token")
    kept = {**model, "vocab": vocab, "unk_token": unknown if isinstance(unknown, str) and unknown in vocab else None}
    text_only = {**spec, "added_tokens": [], "truncation": None, "padding": None, "model": kept}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(text_only, ensure_ascii=False))
    except BaseException as error:
        # For a faulty file the library raises Exception itself, nothing narrower, or panics, which is no Exception.
        faulty = type(error) is Exception or type(error).__name__ == "PanicException"
        if not faulty and not isinstance(error, (UnicodeEncodeError, RecursionError)):
            raise
        raise UserError(
            f"the tokenizer cannot be built ({' '.join(str(error).split())}). its file is damaged"
        ) from None


def bos_of_post_processor(spec: Mapping[str, Any]) -> int | None:
    """The token that transformers puts before every text, if the file's post-processor says so."""
    processor = spec.get("post_processor")
    try:
        for part in processor.get("processors", [processor]) if processor else ():
            if part["type"] == "TemplateProcessing" and "SpecialToken" in part["single"][0]:
                ids = part["special_tokens"][part["single"][0]["SpecialToken"]["id"]]["ids"]
                return int(ids[0])
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
        raise UserError("the tokenizer.json is damaged (post_processor). give the one of a model folder") from None
    return None


def with_bos(spec: Mapping[str, Any], token: int | None, content: str) -> dict[str, Any]:
    """The file with a post-processor that puts `token` before every text, or (None) nothing."""
    processors: list[dict[str, Any]] = [
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    ]
    if token is not None:
        bos, text = {"SpecialToken": {"id": content, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        second = [{"SpecialToken": {"id": content, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
        names = {content: {"id": content, "ids": [token], "tokens": [content]}}
        template = {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text, *second]}
        processors.append({**template, "special_tokens": names})
    return {**spec, "post_processor": {"type": "Sequence", "processors": processors}}


def pre_tokenizer(name: str) -> pre_tokenizers.Sequence:
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in WORDS[name]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# ---------------------------------------------------------------------------------------------- GGUF


def spec_of_gguf(metadata: Mapping[str, Any], pre: str) -> dict[str, Any]:
    """The `tokenizer.json` that a GGUF file's lists amount to."""
    lists = {}
    for name, kind in (("tokens", str), ("merges", str), ("token_type", int)):
        value = metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, (list, tuple, array)) or not all(isinstance(item, kind) for item in value):
            raise UserError(
                f"the file has no list of tokenizer {name} (tokenizer.ggml.{name}). convert the model to GGUF again"
            )
        lists[name] = list(value)
    tokens, types = lists["tokens"], lists["token_type"]
    if len(tokens) != len(types) or not tokens:
        raise UserError(
            f"{len(tokens)} tokens have {len(types)} types (tokenizer.ggml.token_type). convert the model to GGUF again"
        )
    merges = [merge.split(" ") for merge in lists["merges"]]
    if any(len(merge) != 2 for merge in merges):
        raise UserError("a merge does not join two tokens (tokenizer.ggml.merges). convert the model to GGUF again")
    added = [
        {"id": id, "content": token, "special": kind == _CONTROL}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = added
    spec["model"] |= {"vocab": {token: id for id, token in enumerate(tokens)}, "merges": merges}
    return spec


# ---------------------------------------------------------------------------------------------- bytes


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def spelled_bytes(token: str) -> bytes:
    """The bytes of a vocabulary entry; one that is not in the byte alphabet spells itself."""
    if all(character in _BYTE_OF_CHARACTER for character in token):
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    return token.encode("utf-8", "replace")
