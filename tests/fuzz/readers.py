"""What hostile files are opened with, and what must be true of every one of them.

    A file either opens, and then the model computes and the tokenizer encodes, or is refused with a `UserError` of one
    printable line. Nothing else is raised, it takes at most `SECONDS`, and memory stays below twice the size of the
    files (of the opened weights, where those are widened on load) plus `ROOM`.

Memory is measured in three ways, each of which sees what the others do not: Python's own peak (tracemalloc), the peak
of resident memory (Linux' VmHWM: Rust and C++ too), and the largest tensor storage made, touched or not.
"""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minga import store
from minga.checkpoint import hf, names
from minga.data.tokenizer import Tokenizer, train_bpe
from minga.errors import UserError
from tests.checkpoint.models import CONFIGS, random_tensors, to_gguf, write_gguf
from tests.fuzz.mutations import Mutation, json_mutation, mutate_gguf, mutate_safetensors

SECONDS = 10.0  # of CPU; the slowest refusal takes hundredths, the rest is for a busy machine
ROOM = 64_000_000  # bytes; text costs up to 35 times its length as Python objects, and these files have a megabyte
MAX_LINE = 1000  # characters of a refusal, its path included
_VOCABULARY = 300
_FEW_EXPERTS = {"num_hidden_layers": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}


@dataclass(frozen=True)
class Reader:
    """`seeds`: valid inputs. `mutate` makes hostile ones of them. `open` raises `UserError` or what must not be."""

    seeds: list[bytes]
    mutate: Mutation
    open: Callable[[bytes], None]


class Finding(AssertionError):
    """An input that broke the rule."""


def check(reader: Reader, data: bytes) -> bool:
    """Opens one input and says whether it was refused. Raises `Finding` if the rule above does not hold of it."""
    said = None
    with _measured() as used:
        try:
            reader.open(data)
        except UserError as error:
            said = str(error)
        except BaseException as error:  # a panic of the Rust libraries is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise Finding(f"{type(error).__name__} at {_place(error)}: {str(error)[:200]}") from error
    if said is not None and not (said.isprintable() and len(said) <= MAX_LINE):
        raise Finding(f"the refusal is no printable line of {MAX_LINE} characters: {said[:200]!r}")
    limit = 2 * max(len(data), reader_bytes(reader)) + ROOM
    for kind, size in used.items():
        if kind != "seconds" and size > limit:
            raise Finding(f"{size:,} bytes ({kind}) for files of {len(data):,} bytes: {said}")
    if used["seconds"] > SECONDS:
        raise Finding(f"{used['seconds']:.1f} s: {said}")
    return said is not None


def warm_up(reader: Reader) -> None:
    """Opens every seed. What is imported and compiled at first use is no cost of a file."""
    for data in reader.seeds:
        with _measured():
            reader.open(data)


def reader_bytes(reader: Reader) -> int:
    """Of the largest model behind a reader's seeds: what a folder holds beside the file that is changed."""
    return getattr(reader.open, "num_bytes", 0)


def _place(error: BaseException) -> str:
    """The innermost line of ours, and the one that raised."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    ours = [frame for frame in frames if "/minga/" in frame[0]]
    shown = dict.fromkeys([*ours[-1:], *frames[-1:]])
    return ", ".join(f"{'/'.join(Path(file).parts[-2:])}:{line}" for file, line in shown)


# ---------------------------------------------------------------------------------------------------- measuring


class _Largest(TorchDispatchMode):
    """Remembers the largest storage that any operation of torch returned."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return out


@contextmanager
def _measured() -> Iterator[dict[str, float]]:
    """A dictionary that is filled at the end: seconds, and bytes in the three ways."""
    used: dict[str, float] = {}
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before, began, largest = tracemalloc.get_traced_memory()[0], time.process_time(), _Largest()
    _forget_peak()
    resident = _resident("VmRSS")
    try:
        with largest:
            yield used
    finally:
        used["seconds"] = time.process_time() - began
        used["largest tensor"] = largest.num_bytes
        used["Python's"] = tracemalloc.get_traced_memory()[1] - before
        used["resident"] = _resident("VmHWM") - resident
        if not tracing:
            tracemalloc.stop()


def _forget_peak() -> None:
    if _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew (proc(5))


def _resident(name: str) -> int:
    """Bytes, by a line of /proc/self/status; 0 on a system that has none."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


_STATUS = Path("/proc/self/status")


# ---------------------------------------------------------------------------------------------------- using


def use_model(path: Path) -> None:
    """Opens the weights and computes with them: views that reach too far would show here."""
    for load in (store.load, store.load_stored):
        model = load(path)
        with torch.no_grad():
            model(torch.zeros(1, 3, dtype=torch.int64))


def use_tokenizer(path: Path) -> None:
    tokenizer = store.load_tokenizer(path)
    tokenizer.decode(tokenizer.encode("Más vale <|im_end|> maña 12", specials=True))
    tokenizer.decode(range(min(tokenizer.vocab_size, 1000)), skip_specials=False)
    if tokenizer.chat_template is not None:
        tokenizer.render_chat([{"role": "user", "content": "hola <|im_end|>"}])


def _use_both(path: Path) -> None:
    """Both, even if the first is refused."""
    try:
        use_model(path)
    finally:
        use_tokenizer(path)


class _Open:
    """Writes the input into its place in one of some folders, which the first byte chooses, and opens that."""

    def __init__(self, folders: list[Path], files: list[str], use: Callable[[Path], None]) -> None:
        self.files = [folder / file for folder in folders for file in files if (folder / file).is_file()]
        self.whole = [file.read_bytes() for file in self.files]
        self.use = use
        self.num_bytes = max(sum(f.stat().st_size for f in folder.iterdir()) for folder in folders)

    def seeds(self) -> list[bytes]:
        return [bytes([number]) + content for number, content in enumerate(self.whole)]

    def __call__(self, data: bytes) -> None:
        number = (data[0] if data else 0) % len(self.files)
        file = self.files[number]
        file.unlink()  # a tensor may still be a view of the file before
        file.write_bytes(data[1:])
        try:
            self.use(file.parent)
        finally:
            file.unlink()
            file.write_bytes(self.whole[number])


def _behind_first_byte(mutation: Mutation) -> Mutation:
    def mutate(data: bytes, dice: Random) -> bytes:
        first = data[:1] if dice.random() < 0.9 else dice.randbytes(1)
        return first + mutation(data[1:], dice)

    return mutate


# ---------------------------------------------------------------------------------------------------- seeds


def make_readers(folder: Path) -> dict[str, Reader]:
    """The readers by name, with the models that they open below `folder`."""
    texts = ["Más vale maña que fuerza. " * 20, "la minga es trabajo de todos, 12 345. " * 20]
    tokenizer = train_bpe(texts, _VOCABULARY - 10)
    folders = _write_folders(folder, tokenizer)
    config_keys = ("rope_scaling", "rope_parameters", "quantization_config", "head_dim", "eos_token_id", "layer_types")
    config_keys += ("num_nextn_predict_layers", "first_k_dense_replace", "n_routed_experts", "partial_rotary_factor")
    tokenizer_keys = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "truncation", "single_word")
    settings_keys = ("bos_token", "eos_token", "chat_template", "add_bos_token", "eos_token_id", "name", "template")
    kinds: dict[str, tuple[list[str], Mutation, Callable[[Path], None]]] = {
        "config": (["config.json"], json_mutation(*config_keys), _use_both),
        "safetensors": ([hf.SINGLE], mutate_safetensors, use_model),
        "index": ([hf.INDEX], json_mutation("weight_map"), use_model),
        "tokenizer": (["tokenizer.json"], json_mutation(*tokenizer_keys), use_tokenizer),
        "settings": (
            ["tokenizer_config.json", "generation_config.json"],
            json_mutation(*settings_keys),
            use_tokenizer,
        ),
    }
    readers = {}
    for name, (files, mutation, use) in kinds.items():
        opener = _Open(folders, files, use)
        readers[name] = Reader(opener.seeds(), _behind_first_byte(mutation), opener)
    seeds = _gguf_seeds(folder, tokenizer)
    (folder / "one").mkdir()
    path = folder / "one" / "model.gguf"
    path.touch()
    opener = _Open([path.parent], [path.name], lambda parent: _use_both(parent / path.name))
    readers["gguf"] = Reader([b"\0" + seed for seed in seeds], _behind_first_byte(mutate_gguf), opener)
    return readers


def _write_folders(folder: Path, tokenizer: Tokenizer) -> list[Path]:
    """Small folders of every kind: plain, sharded, with experts and MTP, in 8 bits, block-FP8."""
    llama = CONFIGS["llama"].replace(vocab_size=_VOCABULARY, eos_token_id=0)
    v3 = CONFIGS["v3"].replace(vocab_size=_VOCABULARY, eos_token_id=0, **_FEW_EXPERTS)
    hf.write_folder(folder / "llama", llama.to_hf(), random_tensors(llama))
    hf.write_folder(folder / "sharded", llama.to_hf(), random_tensors(llama), max_shard_bytes=40_000)
    hf.write_folder(folder / "v3", v3.to_hf(), random_tensors(v3, torch.bfloat16))
    store.save(store.load(folder / "v3", quant="int8"), folder / "int8")
    (folder / "fp8").mkdir()
    public = {name: tensor.clone() for name, tensor in names.to_public(random_tensors(v3), v3).items()}
    for name in [name for name in public if name.endswith("_proj.weight") and "eh_proj" not in name]:
        public[name] = public[name].to(torch.float8_e4m3fn)
        public[name + names.SCALE_INV] = torch.ones([-(-side // 24) for side in public[name].shape])
    save_file(public, folder / "fp8" / hf.SINGLE)
    described = v3.to_hf() | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [24, 24]}}
    (folder / "fp8" / "config.json").write_text(json.dumps(described))
    folders = [folder / name for name in ("llama", "sharded", "v3", "int8", "fp8")]
    for each in folders:
        tokenizer.save(each)
        (each / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [0, 2]}')
    return folders


def _gguf_seeds(folder: Path, tokenizer: Tokenizer) -> list[bytes]:
    seeds = []
    for family, kind in (("llama", "F32"), ("v3", "F32"), ("llama", "Q8_0"), ("v3-two-mtp", "F16")):
        small = {} if family == "llama" else _FEW_EXPERTS
        config = CONFIGS[family].replace(vocab_size=_VOCABULARY, **small)
        metadata, tensors = to_gguf(config, random_tensors(config))
        if family == "llama":
            tensors["rope_freqs.weight"] = torch.tensor([1.0, 2.0, 8.0, 8.0])
        kinds = {name: kind for name, tensor in tensors.items() if tensor.ndim == 2 and tensor.shape[1] % 32 == 0}
        path = write_gguf(folder / "seed.gguf", metadata | _gguf_tokenizer(tokenizer), tensors, kinds)
        seeds.append(path.read_bytes())
    return seeds


def _gguf_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    spec = json.loads(tokenizer.json())
    tokens = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    control = {token["content"] for token in spec["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in control else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
