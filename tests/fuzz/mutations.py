"""Ways to make a model file hostile while most of it stays as it was, so that a reader gets past its first checks.

Three kinds: bytes (flips, cuts, insertions), the fields of a GGUF header (counts, lengths, types, dimensions, offsets,
alignment, whole entries), and the values of a JSON document, alone or as the header of a safetensors file.
Each takes the file and the dice, and gives a new file; the same dice give the same file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

Mutation = Callable[[bytes, Random], bytes]

_WHOLE = [0, 1, 2, 3, 7, 8, 12, 31, 32, 33, 64, 96, 255, 256, 257, 1000, 2**16, 2**20, 2**24, 10**9]
_WHOLE += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_REAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1 + 1e-7,
    2.0,
    1e4,
    1e-30,
    1e30,
    1e-300,
    1e300,
    1.7e308,
    math.inf,
    -math.inf,
    math.nan,
]


def mutate_bytes(data: bytes, dice: Random) -> bytes:
    out = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 3, 8])):
        at = dice.randrange(len(out) + 1)
        kind = dice.randrange(6)
        if kind == 0:
            del out[at:]
        elif kind == 1:
            out[at:at] = dice.randbytes(dice.choice([1, 2, 4, 8, 64]))
        elif kind == 2:
            del out[at : at + dice.choice([1, 2, 4, 8, 64])]
        elif kind == 3:
            out[at : at + 8] = struct.pack("<Q", dice.choice(_WHOLE))
        elif kind == 4 and out:
            other = dice.randrange(len(out))
            out[at:at] = out[other : other + dice.choice([4, 16, 100])]
        elif at < len(out):
            out[at] ^= 1 << dice.randrange(8) if dice.random() < 0.5 else dice.randrange(256)
    return bytes(out)


# ---------------------------------------------------------------------------------------------------- GGUF


class _Field(NamedTuple):
    start: int
    size: int
    kind: str  # whole, real, text


class _Header(NamedTuple):
    """What could be made out of a header: its fields, and the spans of its metadata entries and tensor infos."""

    fields: list[_Field]
    entries: list[tuple[int, int]]
    infos: list[tuple[int, int]]


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_KEYS = {  # a key of any architecture, and what would be a value of it
    "general.alignment": [8, 64, 3, 0, 1 << 20, 1 << 21, "32", [32]],
    "split.count": [1, 2, "1", [1]],
    "{}.rope.scaling.type": ["none", "linear", "yarn", "longrope", 3, ["yarn"]],
    "{}.rope.scaling.factor": [4.0, 0.0, -1.0, math.inf, 1e-30],
    "{}.rope.scaling.original_context_length": [64, 0, 2**32 - 1],
    "{}.rope.scaling.yarn_log_multiplier": [0.0707, 1e30, math.nan],
    "{}.rope.scaling.yarn_beta_fast": [32.0, 1e-30, 1e30],
    "{}.rope.scaling.yarn_beta_slow": [1.0, 1e-30, 1e30],
    "{}.rope.freq_base": [1e4, 1.0, 0.0, -5.0, 1e-30],
    "{}.attention.key_length": [8, 0, 16, 2**31],
    "{}.attention.head_count": [4, 1, 2**31, [4, 4], [], ["4"]],
    "{}.attention.kv_lora_rank": [16, 0, 2**31],
    "{}.expert_count": [8, 0, 2**31],
    "{}.nextn_predict_layers": [1, 0, 100],
    "tokenizer.ggml.pre": ["default", "llama-bpe", "unknown", 3, ["default"]],
    "tokenizer.ggml.model": ["gpt2", "llama", 3, ["gpt2"]],
    "tokenizer.ggml.tokens": [["a", "b"], [], [1, 2], "ab", 7],
    "tokenizer.ggml.token_type": [[1, 3], [], ["1"], [math.nan, 1.0], 1],
    "tokenizer.ggml.merges": [["a b"], ["ab"], ["a b c"], [1], " ", 7],
    "tokenizer.ggml.bos_token_id": [0, 2**32 - 1, "0", [0], math.nan, True],
    "tokenizer.ggml.eos_token_id": [0, 2**32 - 1, "0", [0], math.inf],
    "tokenizer.ggml.eot_token_id": [0, 2**32 - 1, "0", [0], math.inf],
    "tokenizer.ggml.add_bos_token": [True, "no", [0]],
    "tokenizer.chat_template": ["{{", "x", 3, ["x"]],
}


def mutate_gguf(data: bytes, dice: Random) -> bytes:
    for _ in range(dice.choice([1, 1, 2, 3])):
        data = _mutate_header(data, dice) if dice.random() < 0.85 else mutate_bytes(data, dice)
    return data


def _mutate_header(data: bytes, dice: Random) -> bytes:
    header = _read_header(data)
    if not header.fields:
        return mutate_bytes(data, dice)
    out = bytearray(data)
    kind = dice.randrange(10)
    spans, count_at = (header.entries, 16) if dice.random() < 0.6 else (header.infos, 8)
    if kind == 0 and spans:  # an entry goes away, comes twice, or takes another's place
        first, second = dice.choice(spans), dice.choice(spans)
        replacement = dice.choice([b"", data[slice(*first)] * 2, data[slice(*second)]])
        out[slice(*first)] = replacement
        change = (not replacement) * -1 + (len(replacement) == 2 * (first[1] - first[0])) * 1
        if dice.random() < 0.8:
            _add_to(out, count_at, change)
    elif kind in (1, 2) and header.entries:
        arch = dice.choice(["llama", "deepseek2"])
        key, values = dice.choice(list(_KEYS.items()))
        added = _text(key.format(arch)) + _value(dice.choice([*values, *values, dice.choice(_WHOLE)]), dice)
        same = [span for span in header.entries if data[slice(*span)].startswith(_text(key.format(arch)))]
        if same and dice.random() < 0.9:
            out[slice(*same[0])] = added
        else:
            out[header.entries[-1][1] : header.entries[-1][1]] = added
            _add_to(out, 16, 1)
    elif kind == 3 and header.infos:
        dims = [dice.choice(_WHOLE) for _ in range(dice.randrange(6))]
        name = dice.choice(
            ["rope_freqs.weight", "blk.0.attn_q.bias", f"blk.{'9' * dice.choice([1, 9, 5000])}.x\n\x1b[31m"]
        )
        span = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, dice.choice([0, 1, 2, 8, 14, 30, 77]), 0)
        out[header.infos[-1][1] : header.infos[-1][1]] = _text(name) + span
        _add_to(out, 8, 1)
    else:
        field = dice.choice(header.fields)
        out[field.start : field.start + field.size] = _other_value(data, field, dice)
    return bytes(out)


def _other_value(data: bytes, field: _Field, dice: Random) -> bytes:
    old = data[field.start : field.start + field.size]
    if field.kind == "text":
        return dice.choice([bytes(len(old)), b"\xff" * len(old), bytes(reversed(old)), b"\n" * len(old)])
    if field.kind == "real":
        value = dice.choice(_REAL)
        try:
            return struct.pack("<f" if field.size == 4 else "<d", value)
        except OverflowError:
            return struct.pack("<f", math.inf)
    number = int.from_bytes(old, "little")
    near = [number + 1, number - 1, number * 2, number // 2, number + 32, -number]
    return (dice.choice([*near, *_WHOLE]) % (1 << 8 * field.size)).to_bytes(field.size, "little")


def _add_to(out: bytearray, at: int, change: int) -> None:
    (count,) = struct.unpack_from("<Q", out, at)
    struct.pack_into("<Q", out, at, (count + change) % 2**64)


def _read_header(data: bytes) -> _Header:
    """As far as it can be read: written apart from the reader that is tested, and without any of its checks."""
    header = _Header([], [], [])
    at = 24

    def number(size: int, kind: str = "whole") -> int:
        nonlocal at
        value = int.from_bytes(data[at : at + size], "little")
        if at + size > len(data):
            raise IndexError
        header.fields.append(_Field(at, size, kind))
        at += size
        return value

    def text() -> None:
        nonlocal at
        length = number(8)
        if at + length > len(data):
            raise IndexError
        header.fields.append(_Field(at, length, "text"))
        at += length

    def scalar(kind: int) -> None:
        if kind == 8:
            text()
        else:
            number(_SIZES[kind], "real" if kind in (6, 12) else "whole")

    try:
        header.fields.extend(_Field(at, size, "whole") for at, size in ((4, 4), (8, 8), (16, 8)))
        num_tensors, num_entries = struct.unpack_from("<QQ", data, 8)
        for _ in range(num_entries):
            start = at
            text()
            kind = number(4)
            if kind == 9:
                item, count = number(4), number(8)
                for _ in range(min(count, 1 << 16)):
                    scalar(item)
            else:
                scalar(kind)
            header.entries.append((start, at))
        for _ in range(num_tensors):
            start = at
            text()
            for _ in range(min(number(4), 8)):
                number(8)
            number(4)
            number(8)
            header.infos.append((start, at))
    except (IndexError, KeyError, struct.error):
        pass
    return header


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any, dice: Random) -> bytes:
    """Type and value; numbers in a type of the right width or not."""
    if isinstance(value, list):
        items = [_value(item, Random(0)) for item in value] or [struct.pack("<II", 4, 0)]
        count = len(value) if dice.random() < 0.9 else dice.choice(_WHOLE)
        return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", count) + b"".join(i[4:] for i in items if value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    return struct.pack("<II", 4, value) if value < 2**32 else struct.pack("<IQ", 10, value)


# ---------------------------------------------------------------------------------------------------- JSON

_MARKS = {  # what json.dumps would not write
    '"@HUGE@"': "9" * 5000,
    '"@WIDE@"': "1" + "0" * 400,
    '"@FAR@"': "1e999",
    '"@DEEP@"': "[" * 20_000 + "]" * 20_000,
    '"@NEST@"': '{"a":' * 300 + "1" + "}" * 300,
}
_VALUES: list[Any] = [*_WHOLE, *_REAL, *(name.strip('"') for name in _MARKS), -1, -(2**31), True, False, None]
_VALUES += ["", "x", "x" * 3000, "\ud800", "\n\x1b[31m", "\0", [], {}, [[]], [1], {"a": 1}, [None], ["x", 1], {"": []}]
_VALUES += ["yarn", "dynamic", "linear", "llama3", "fp8", "minga-int8", "minga-int4", "greedy", "sigmoid"]
_VALUES += ["llama", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3", "BPE", "WordPiece", "ByteLevel"]
_VALUES += ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "I64", "I8", "U8", "BOOL", "C64"]
_VALUES += ["../model.safetensors", "/etc/passwd", ".", "..", "a/b.safetensors", "other.safetensors", "\\x.safetensors"]
_VALUES += [{"quant_method": "fp8", "weight_block_size": [size, size]} for size in (0, 1, 3, 128, 10**9, 2**63)]
_VALUES += [{"rope_type": kind, "factor": 4.0} for kind in ("yarn", "dynamic", "linear", "llama3")]


def json_mutation(*keys: str) -> Mutation:
    """Changes values of a JSON document. `keys`: those that a reader looks for and that the document may lack."""

    def mutate(data: bytes, dice: Random) -> bytes:
        if dice.random() < 0.15:
            return mutate_bytes(data, dice)
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return mutate_bytes(data, dice)
        for _ in range(dice.choice([1, 1, 2, 3])):
            document = _mutate_value(document, dice, keys)
        return _dump(document)

    return mutate


def mutate_safetensors(data: bytes, dice: Random) -> bytes:
    """The header as JSON, with its length right most of the time; else bytes."""
    length = int.from_bytes(data[:8], "little")
    if dice.random() < 0.15 or length > len(data):
        return mutate_bytes(data, dice)
    header = json_mutation("__metadata__", "dtype", "shape", "data_offsets")(data[8 : 8 + length], dice)
    header += b" " * (-len(header) % 8 if dice.random() < 0.7 else dice.randrange(9))
    told = len(header) if dice.random() < 0.9 else dice.choice(_WHOLE)
    return struct.pack("<Q", told) + header + data[8 + length :]


def _mutate_value(document: Any, dice: Random, keys: tuple[str, ...]) -> Any:
    """A copy with one place changed, each depth as likely as the next."""
    if isinstance(document, dict) and document and dice.random() < 0.9:
        copy = dict(document)
        key = dice.choice(list(copy))
        kind = dice.randrange(12)
        if kind == 0:
            del copy[key]
        elif kind == 1:
            copy[dice.choice(list(copy))] = copy[key]
        elif kind == 2:
            copy[dice.choice([*keys, "a\n\x1b[31m", "\udc80", "9" * 5000])] = copy.pop(key)
        elif kind in (3, 4) and keys:
            copy[dice.choice(keys)] = dice.choice(_VALUES)
        else:
            copy[key] = _mutate_value(copy[key], dice, keys)
        return copy
    if isinstance(document, list) and document and dice.random() < 0.9:
        items = list(document)
        at = dice.randrange(len(items))
        kind = dice.randrange(6)
        if kind == 0:
            del items[at]
        elif kind == 1:
            items.insert(at, dice.choice(items))
        else:
            items[at] = _mutate_value(items[at], dice, keys)
        return items
    if type(document) is int and dice.random() < 0.4:
        return dice.choice([document + 1, document - 1, document * 2, document // 2, -document, str(document)])
    return dice.choice(_VALUES)


def _dump(document: Any) -> bytes:
    text = json.dumps(document, separators=(",", ":"))
    for mark, raw in _MARKS.items():
        text = text.replace(mark, raw)
    return text.encode("utf-8", "surrogatepass")
