from __future__ import annotations

import errno
import io
import itertools
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minga.data import shards as shards_module
from minga.data.corpus import PIECE, pieces
from minga.data.shards import Manifest, Shards, build_shards, open_shards
from minga.data.sources import read_documents
from minga.data.tokenizer import Tokenizer
from minga.errors import UserError

MakeText = Callable[[int, int], str]


def stored_texts(shards: Shards, split: str) -> list[str]:
    """The documents of a split, decoded; each must end with the end-of-text token and hold no other."""
    tokens, offsets = shards.tokens(split), shards.documents(split)
    texts = []
    for start, end in itertools.pairwise(offsets.tolist()):
        *ids, last = tokens[start:end].tolist()
        assert last == shards.manifest.eos_id
        assert shards.manifest.eos_id not in ids
        texts.append(shards.tokenizer.decode(ids, skip_specials=False))
    return texts


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------- what is stored


def test_documents_are_stored_whole_and_once(shards: Shards, corpus: Path) -> None:
    documents = [document.text for document in read_documents([corpus])]
    train, val = stored_texts(shards, "train"), stored_texts(shards, "val")
    assert sorted(train + val) == sorted(documents)
    assert not set(train) & set(val)
    assert train == [text for text in documents if text in set(train)]  # in the order of the input


def test_manifest_accounts_for_everything(shards: Shards, corpus: Path) -> None:
    manifest = shards.manifest
    for split in ("train", "val"):
        texts, info = stored_texts(shards, split), manifest.splits[split]
        assert info.num_documents == len(texts)
        assert info.num_bytes == sum(len(text.encode()) for text in texts)
        assert info.num_tokens == len(shards.tokens(split))
    assert manifest.num_bytes == sum(path.stat().st_size for path in corpus.iterdir())
    assert manifest.num_documents == len(manifest.sources) == 30
    assert {source.num_bytes for source in manifest.sources} == {path.stat().st_size for path in corpus.iterdir()}
    assert manifest.bytes_per_token == manifest.num_bytes / manifest.num_tokens > 1
    assert manifest.dtype == "<u2"
    assert (shards.path / "train.bin").stat().st_size == 2 * manifest.splits["train"].num_tokens
    assert shards.tokenizer.sha256 == manifest.tokenizer_sha256
    assert int(shards.token_num_bytes[shards.tokens("val")].sum()) == manifest.val_bytes
    shards.verify()


def test_manifest_file(shards: Shards) -> None:
    value = json.loads((shards.path / "manifest.json").read_text(encoding="utf-8"))
    assert (value["format"], value["version"]) == ("minga-shards", 1)
    assert (value["num_documents"], value["val_bytes"]) == (30, shards.manifest.val_bytes)
    assert value["split_rule"] == "documents by hash"
    assert Manifest.from_json(value, "here") == shards.manifest


def test_held_out_share(shards: Shards) -> None:
    """Reached, and by less than the same again."""
    wanted = 0.2 * shards.manifest.num_bytes
    assert wanted <= shards.manifest.val_bytes <= 2 * wanted


def test_order_of_the_input_does_not_move_the_split(
    shards: Shards, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    files = sorted(corpus.iterdir())
    random.Random(7).shuffle(files)
    build_shards(files, tmp_path / "out", tokenizer=tokenizer, val_fraction=0.2)
    assert set(stored_texts(open_shards(tmp_path / "out"), "val")) == set(stored_texts(shards, "val"))


def test_copies_are_dropped(corpus: Path, shards: Shards, tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [document.text for document in read_documents([corpus])]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[:10] + texts[5:12])
    (tmp_path / "again.jsonl").write_text(lines)
    manifest = build_shards([corpus, tmp_path / "again.jsonl"], tmp_path / "out", tokenizer=tokenizer, val_fraction=0.2)
    assert manifest.num_duplicates == 17
    assert manifest.sources[-1].num_documents == 17
    assert manifest.fingerprint == shards.manifest.fingerprint
    assert manifest != shards.manifest


def test_few_documents_lose_their_tails(make_text: MakeText, tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = {f"{seed}.txt": make_text(seed, 300) for seed in range(3)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    manifest = build_shards([tmp_path], tmp_path / "out", tokenizer=tokenizer, val_fraction=0.1)
    built = open_shards(tmp_path / "out")
    heads, tails = stored_texts(built, "train"), stored_texts(built, "val")
    assert [head + tail for head, tail in zip(heads, tails, strict=True)] == list(texts.values())
    assert manifest.split_rule == "tail of each document"
    assert 0.1 <= manifest.val_bytes / manifest.num_bytes <= 0.2
    assert all(head.endswith("\n") for head in heads)


def test_a_document_without_lines_is_cut_at_a_space(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("uno dos tres cuatro cinco seis siete ocho nueve diez " * 4)
    build_shards([tmp_path / "x.txt"], tmp_path / "out", tokenizer=tokenizer, val_fraction=0.2)
    head, tail = (stored_texts(open_shards(tmp_path / "out"), split)[0] for split in ("train", "val"))
    assert tail.startswith(" ")
    assert not head.endswith(" ")


def test_nothing_held_out(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = build_shards([corpus], tmp_path / "out", tokenizer=tokenizer, val_fraction=0)
    built = open_shards(tmp_path / "out")
    assert (manifest.split_rule, manifest.val_bytes, len(built.tokens("val"))) == ("none", 0, 0)
    assert built.documents("val").tolist() == [0]


def test_control_tokens_in_documents_are_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "uno<|endoftext|>dos<|im_end|>" * 30
    (tmp_path / "x.txt").write_text(text)
    build_shards([tmp_path / "x.txt"], tmp_path / "out", tokenizer=tokenizer, val_fraction=0)
    assert stored_texts(open_shards(tmp_path / "out"), "train") == [text]


def test_a_large_vocabulary_takes_four_bytes(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    added = {"content": "<far>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    far = {**added, "id": 2**16, "normalized": False}
    spec = {**tokenizer._spec, "added_tokens": [*tokenizer._spec["added_tokens"], far]}
    manifest = build_shards([corpus], tmp_path / "out", tokenizer=Tokenizer(spec, eos_id=2**16), val_fraction=0.2)
    assert (manifest.dtype, manifest.vocab_size, manifest.eos_id) == ("<u4", 2**16 + 1, 2**16)
    assert len(stored_texts(open_shards(tmp_path / "out"), "train")) == manifest.splits["train"].num_documents


def test_tokenizer_is_trained_on_the_training_part_only(make_text: MakeText, tmp_path: Path) -> None:
    documents = [make_text(seed, 120) for seed in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    manifest = build_shards([tmp_path / "a.jsonl"], tmp_path / "first", vocab_size=400)
    assert (manifest.vocab_size, manifest.trained_vocab_size) == (400, 400)
    held_out = stored_texts(open_shards(tmp_path / "first"), "val")
    (tmp_path / "b.txt").write_text("\n".join(text for text in documents if text not in held_out))
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents if text not in held_out)
    )
    again = build_shards([tmp_path / "c.jsonl"], tmp_path / "second", vocab_size=400, val_fraction=0)
    assert again.tokenizer_sha256 == manifest.tokenizer_sha256


def test_standard_input_is_read_once_and_kept_nowhere(
    make_text: MakeText, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = make_text(1, 200)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    manifest = build_shards(["-"], tmp_path / "out", tokenizer=tokenizer)
    built = open_shards(tmp_path / "out")
    assert stored_texts(built, "train")[0] + stored_texts(built, "val")[0] == text
    assert [source.name for source in manifest.sources] == ["stdin"]
    assert "stdin.txt" not in listing(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------------------------------------- long documents


@pytest.mark.parametrize("separator", ["\n", "\n\n  ", " ", ""])
def test_pieces_join_to_the_text(separator: str) -> None:
    rng = random.Random(0)
    text = separator.join("x" * rng.randrange(1, 400) for _ in range(1000))
    parts = pieces(text)
    assert "".join(parts) == text
    assert len(parts) >= len(text) // PIECE
    assert all(0 < len(part) <= PIECE for part in parts)


def test_pieces_do_not_change_the_tokens(make_text: MakeText, tokenizer: Tokenizer) -> None:
    text = make_text(5, 40_000)
    parts = pieces(text)
    assert len(parts) > 3
    assert [id for part in parts for id in tokenizer.encode(part)] == tokenizer.encode(text)


# ---------------------------------------------------------------------------------------------- building again


def test_up_to_date(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tokenizer": tokenizer, "val_fraction": 0.2}
    manifest = build_shards([corpus], tmp_path / "out", **settings)
    before = listing(tmp_path / "out")
    notes: list[str] = []
    stages: set[str] = set()
    again = build_shards(
        [corpus], tmp_path / "out", **settings, note=notes.append, progress=lambda stage, done, total: stages.add(stage)
    )
    assert again == manifest
    assert notes == [f"{tmp_path / 'out'} is up to date"]
    assert stages == {"read"}
    assert listing(tmp_path / "out") == before


def test_other_text_or_settings_need_force(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = build_shards([corpus], out, tokenizer=tokenizer, val_fraction=0.2)
    with pytest.raises(UserError, match="was made from other settings"):
        build_shards([corpus], out, tokenizer=tokenizer, val_fraction=0.1)
    with pytest.raises(UserError, match="was made from other settings"):
        build_shards([corpus], out, vocab_size=512, val_fraction=0.2)
    with pytest.raises(UserError, match="was made from other text .* --force"):
        build_shards([corpus / "00.txt"], out, tokenizer=tokenizer, val_fraction=0.2)
    assert open_shards(out).manifest == first
    second = build_shards([corpus], out, tokenizer=tokenizer, val_fraction=0.1, force=True)
    assert open_shards(out).manifest == second != first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_build_is_not_called_up_to_date(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_shards([corpus], out, tokenizer=tokenizer)
    data = bytearray((out / "train.bin").read_bytes())
    data[100] ^= 1
    (out / "train.bin").write_bytes(data)
    with pytest.raises(UserError, match="train.bin is not what was written"):
        build_shards([corpus], out, tokenizer=tokenizer)
    build_shards([corpus], out, tokenizer=tokenizer, force=True)
    open_shards(out).verify()


def test_nothing_is_overwritten_that_is_not_ours(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds other files"):
        build_shards([corpus], tmp_path, tokenizer=tokenizer, force=True)
    with pytest.raises(UserError, match="is a file"):
        build_shards([corpus], tmp_path / "thesis.tex", tokenizer=tokenizer, force=True)
    assert listing(tmp_path) == {"thesis.tex": b"precious"}


def test_an_empty_folder_is_a_place(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    build_shards([corpus], tmp_path / "out", tokenizer=tokenizer)
    open_shards(tmp_path / "out")


# ---------------------------------------------------------------------------------------------- failing halfway


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_nothing_or_the_old_build(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    out = tmp_path / "new" / "out"
    if exists:
        build_shards([corpus / "01.txt"], out, tokenizer=tokenizer)
        before = listing(out)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards_module, "_write_synced", full)
    with pytest.raises(UserError, match=r"cannot write .*out \(No space left on device\)"):
        build_shards([corpus], out, tokenizer=tokenizer, force=True)
    if exists:
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert listing(out) == before
    else:
        assert list(tmp_path.iterdir()) == []


def test_a_failing_rename_brings_the_old_build_back(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build_shards([corpus / "01.txt"], out, tokenizer=tokenizer)
    before = listing(out)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "shards":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError, match="Input/output error"):
        build_shards([corpus], out, tokenizer=tokenizer, force=True)
    assert listing(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_replacement_is_mended(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = build_shards([corpus], out, tokenizer=tokenizer)
    out.rename(tmp_path / ".out.replaced")  # killed between the two renames
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "train.bin").touch()
    notes: list[str] = []
    assert build_shards([corpus], out, tokenizer=tokenizer, note=notes.append) == manifest
    assert notes == [f"{out} is up to date"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_bad_document_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"bad.txt is not UTF-8 text \(byte 3"):
        build_shards([corpus, tmp_path / "bad.txt"], tmp_path / "deep" / "er" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


@pytest.mark.parametrize("stage", ["train tokenizer", "write"])
@pytest.mark.parametrize("change", ["append", "shrink", "same size"])
def test_a_file_that_changes_meanwhile(make_text: MakeText, tmp_path: Path, stage: str, change: str) -> None:
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": make_text(seed, 200)}) + "\n" for seed in range(4)]
    path.write_text("".join(lines))
    (tmp_path / "first.txt").write_text(make_text(9, 200), encoding="utf-8")

    def meddle(now: str, done: int, total: int) -> None:
        if now == stage and path.read_text() == "".join(lines):
            mended = {
                "append": [*lines, lines[0]],
                "shrink": lines[:-1],
                "same size": [*lines[:-1], "x" + lines[-1][1:]],
            }
            path.write_text("".join(mended[change]))

    with pytest.raises(UserError, match=r"changed while it was read|no JSON"):
        build_shards([tmp_path / "first.txt", path], tmp_path / "out", vocab_size=400, progress=meddle)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_built(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for fraction in (-0.1, 0.9, float("nan")):
        with pytest.raises(UserError, match="held-out share"):
            build_shards([corpus], out, tokenizer=tokenizer, val_fraction=fraction)
    with pytest.raises(UserError, match="no end-of-text token"):
        build_shards([corpus], out, tokenizer=Tokenizer({**tokenizer._spec, "added_tokens": []}))
    with pytest.raises(UserError, match="too small for a vocabulary of 60000"):
        build_shards([corpus], out, vocab_size=60_000)
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(UserError, match="1 bytes of text are too few to hold some out"):
        build_shards([tmp_path / "x.txt"], out, tokenizer=tokenizer)
    assert not out.exists()


# ---------------------------------------------------------------------------------------------- opening what is damaged


def change_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        value = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        change(value)
        (folder / "manifest.json").write_text(json.dumps(value))

    return damage


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-3])


def shift_offsets(folder: Path) -> None:
    offsets = np.fromfile(folder / "train.idx", "<i8")
    offsets[1:3] = offsets[2:0:-1]
    offsets.tofile(folder / "train.idx")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("train.bin"), r"train.bin is cut short \(\d+ bytes, the manifest says \d+\)"),
        (cut("val.idx"), "val.idx is cut short"),
        (lambda folder: (folder / "val.bin").write_bytes(b"1" * 10**6), "val.bin is too long"),
        (lambda folder: (folder / "val.bin").unlink(), "val.bin is missing"),
        (shift_offsets, "train.idx does not fit train.bin"),
        (cut("tokenizer.json"), "not the tokenizer that the tokens were made with"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "not the tokenizer"),
        (cut("manifest.json"), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[" * 10**5), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "is no manifest"),
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
        (lambda folder: shutil.rmtree(folder), "does not exist"),
        (change_manifest(lambda m: m.update(version=2)), "format version 2, this Minga reads 1"),
        (change_manifest(lambda m: m.pop("eos_id")), "'eos_id' is None"),
        (change_manifest(lambda m: m.update(eos_id=True)), "'eos_id' is True"),
        (change_manifest(lambda m: m.update(eos_id=10**6)), "do not fit"),
        (change_manifest(lambda m: m.update(vocab_size=-1)), "'vocab_size' is -1"),
        (change_manifest(lambda m: m.update(dtype="object")), "dtype object"),
        (change_manifest(lambda m: m.update(sources=[3])), "an entry is 3"),
        (change_manifest(lambda m: m["splits"].pop("val")), "an entry is None"),
        (change_manifest(lambda m: m["splits"]["val"].update(num_tokens="many")), "'num_tokens' is 'many'"),
    ],
)
def test_damage_is_named(shards: Shards, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(shards.path, folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_shards(folder)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_shards_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with pytest.raises(UserError, match="has no manifest.json"):
        open_shards(tmp_path / "x")
