"""Model folders as Hugging Face writes them: `config.json` beside `model.safetensors`, or shards with an index.

Read: any such folder of a family we know, block-FP8 included (DeepSeek-V3's own release: E4M3 weights with one scale
per 128 x 128 block, the last block of a side cut off; `weight_scale_inv` is, its name notwithstanding, multiplied),
widened or as it is.
Files are memory-mapped: a tensor whose type is not changed is read from the disk when it is first used.

Write: whole or not at all (`durable`). safetensors is eight bytes of length, a JSON header and the raw numbers, so we
write it ourselves: experts go out as slices of their stacks and repeated tensors twice from one memory, types change
one tensor at a time instead of a whole shard, and a full disk stays an `OSError` with its number.

Nothing here reads or writes a pickle, which can run code when it is opened.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minga.checkpoint import durable, names
from minga.config.model import ModelConfig
from minga.errors import UserError
from minga.kernels import fp8
from minga.kernels.panels import Empty

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,  # a power of two: scales of `scale_fmt` ue8m0
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_SHARD_BYTES = 5_000_000_000
_MAX_CONFIG_BYTES = 4_000_000  # a thousand times a usual one
_MAX_INDEX_BYTES = 100_000_000  # DeepSeek-V3's has 9 MB; safetensors allows its own headers as much
_MAX_BLOCK = 1 << 16  # rows or columns with one FP8 scale: 128 in every release


# ---------------------------------------------------------------------------------------------------- reading


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dictionary of `config.json`. Raises `UserError` if `path` is no model folder."""
    folder = _model_folder(path)
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"there is no config.json, so this is no model folder ({folder}). choose one that holds it")
    config = _read_json(file, _MAX_CONFIG_BYTES)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"config.json names no model_type ({file}). copy the original config.json into the folder")
    return config


def tensor_names(path: str | os.PathLike[str]) -> list[str]:
    """Public names of all tensors in a model folder, from the headers alone."""
    with ExitStack() as stack:
        return list(_open_weights(_model_folder(path), stack))


def read_tensors(
    path: str | os.PathLike[str],
    config: ModelConfig,
    *,
    dtype: torch.dtype | None = None,
    keep_fp8: bool = False,
    empty: Empty = torch.empty,
) -> dict[str, Tensor]:
    """All tensors of a model folder under our names (see `names`). empty: gives the memory of stacked experts.

    dtype: what floating tensors become; None keeps each as stored, and makes bfloat16 of block-FP8. keep_fp8: gives
    block-FP8 as it is stored, X in E4M3 and X_scale_inv. Tensors that need no change are views of the memory-mapped
    files: private, so that writing to them changes no file.
    Raises `UserError` for damaged, missing, unknown or misshapen tensors, with the file's name.
    """
    folder = _model_folder(path)
    with ExitStack() as stack:
        weights = _open_weights(folder, stack)
        scales = {name + names.SCALE_INV for name in weights}
        plain = [name for name in weights if name not in scales]
        names.check_size(config, len(plain), where=str(folder))
        collector = names.Collector(names.hf_table(config), config, where=str(folder), dtype=dtype, empty=empty)
        collector.check_names(plain)
        for name in plain:  # nothing is allocated before all shapes are known to be the config's
            shape, stored = weights[name].describe(name)
            widened = stored == torch.float8_e4m3fn and not keep_fp8
            collector.check(name, shape, (dtype or torch.bfloat16) if widened else stored)
        block = fp8_block(folder)
        for name in filter(collector.wants, plain):
            tensor = weights[name].read(name)
            if tensor.dtype != torch.float8_e4m3fn:
                collector.add(name, tensor)
                continue
            scale = _read_scale(weights, name, tensor, block)
            if keep_fp8:
                collector.add(name, tensor)
                collector.add(name + names.SCALE_INV, scale)
            else:
                assert block is not None
                collector.add(name, dequantise_fp8(tensor, scale, block=block, dtype=dtype or torch.bfloat16))
        return collector.finish()


class _Shard:
    """An open safetensors file whose errors are the user's language."""

    def __init__(self, file: Path, stack: ExitStack) -> None:
        self.file = file
        if file.exists() and not file.is_file():  # opening a pipe would wait for its other end
            raise UserError(f"this is no file ({file}). download it again")
        try:
            file.open("rb").close()  # safetensors calls all that cannot be opened missing
            self._handle = stack.enter_context(safe_open(file, "pt"))
            self.names: list[str] = self._handle.offset_keys()
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from error

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type, from the header."""
        header = self._handle.get_slice(name)
        stored = header.get_dtype()
        if stored not in _DTYPES:
            raise UserError(f"{name} is in {stored}, which Minga does not read ({self.file}). convert the model")
        return tuple(header.get_shape()), _DTYPES[stored]

    def read(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._handle.get_tensor(name)
            return tensor
        except (SafetensorError, OSError, RuntimeError) as error:  # torch's, in older versions for numbers not aligned
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        if isinstance(error, FileNotFoundError):
            return UserError(f"a file of the model is missing ({self.file}). download it again")
        if isinstance(error, OSError) and error.strerror:
            return UserError(f"cannot be opened: {error.strerror} ({self.file}). check the file's permissions")
        if os.fsencode(self.file).decode(errors="replace") != str(self.file):
            return UserError(f"the path is not UTF-8, and safetensors opens no such file ({self.file}). rename it")
        reason = " ".join(str(error).split()).removeprefix("Error while deserializing header: ")[:160]
        return UserError(f"cut short or damaged: {reason} ({self.file}). download the file again")


def _model_folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    with suppress(OSError):  # a read-only disk: then what is there is what we read
        durable.recover(folder)
    if not folder.exists():
        raise UserError(f"no such folder ({folder}). check the path")
    if not folder.is_dir():
        raise UserError(f"this is a file, not a model folder ({folder}). name the folder that holds config.json")
    return folder


def _read_json(file: Path, most: int) -> dict[str, Any]:
    """The object in a file of at most `most` bytes: as Python objects, text may take 35 times its length."""
    try:
        size = file.stat().st_size
        raw = file.read_bytes() if size <= most else b""
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror} ({file}). check the file's permissions") from error
    if size > most:
        raise UserError(f"{size} bytes are too many: {most} would do ({file}). download the file again")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error} ({file}). mend it, or download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"not a JSON object ({file}). mend it, or download it again")
    return value


def _open_weights(folder: Path, stack: ExitStack) -> dict[str, _Shard]:
    """Public name -> the open file that holds it."""
    promised = _read_index(folder) if not (folder / SINGLE).is_file() and (folder / INDEX).is_file() else {}
    if not promised and not (folder / SINGLE).is_file():
        raise UserError(_no_weights_message(folder))
    weights: dict[str, _Shard] = {}
    for file in sorted(set(promised.values())) or [SINGLE]:
        shard = _Shard(folder / file, stack)
        for name in shard.names:
            if name in weights:
                both = f"{weights[name].file.name} and {file}"
                raise UserError(f"{name} is in two files, {both} ({folder}). delete the wrong one")
            weights[name] = shard
    for name, file in promised.items():
        if name not in weights or weights[name].file.name != file:
            raise UserError(f"{name} should be in {file} and is not ({folder / INDEX}). download the files again")
    return weights


def _read_index(folder: Path) -> dict[str, str]:
    weight_map = _read_json(folder / INDEX, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"no weight_map ({folder / INDEX}). download the file again")
    for name, file in weight_map.items():
        # a name with a path in it could reach files outside the folder
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\\" in file:
            where = f"{folder / INDEX}, {name}"
            raise UserError(f"{file!r} is no safetensors file of this folder ({where}). do not trust this model")
    return weight_map


def _no_weights_message(folder: Path) -> str:
    pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return (
            f"the weights are pickled ({folder / pickles[0]}), and opening a pickle can run any code. Minga reads "
            "safetensors only: save the model again with transformers' save_pretrained"
        )
    return f"neither {SINGLE} nor {INDEX} is there ({folder}). download the weights into the folder"


# ---------------------------------------------------------------------------------------------------- block FP8


def fp8_block(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Rows and columns that share one scale; None if the folder is not block-FP8."""
    folder = Path(path)
    quantization = read_config(folder).get("quantization_config")
    size = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if size is None:
        return None
    ok = (
        isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side <= _MAX_BLOCK for side in size)
    )
    if not ok:
        where = folder / "config.json"
        raise UserError(f"weight_block_size is {size!r} ({where}). it must be two positive numbers up to {_MAX_BLOCK}")
    return size[0], size[1]


def _read_scale(weights: Mapping[str, _Shard], name: str, tensor: Tensor, block: tuple[int, int] | None) -> Tensor:
    """The scale of a weight in FP8, one number for each of its blocks."""
    scale_name = name + names.SCALE_INV
    if block is None or scale_name not in weights or tensor.ndim != 2:
        raise UserError(f"{name} is FP8 without a scale for each block ({weights[name].file}). use a bfloat16 release")
    scale = weights[scale_name].read(scale_name)
    grid = tuple(-(-side // step) for side, step in zip(tensor.shape, block, strict=True))
    if tuple(scale.shape) != grid or not scale.dtype.is_floating_point:
        where = weights[scale_name].file
        raise UserError(f"{scale_name} is {tuple(scale.shape)} instead of {grid} ({where}). download the file again")
    return scale


def dequantise_fp8(weight: Tensor, scale: Tensor, *, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`weight` (rows, columns) in E4M3 times `scale` (one number a block; blocks at the far edges may be partial).

    Multiplied in float32, then rounded to `dtype` once, some rows of blocks at a time.
    """
    out = torch.empty(weight.shape, dtype=dtype)
    rows, columns = (max(1, min(pair)) for pair in zip(block, weight.shape, strict=True))  # `fp8` fills blocks up
    step = max(1, 128 // rows)
    for i in range(0, scale.shape[0], step):
        band = slice(i * rows, (i + step) * rows)
        out[band] = fp8.dequantize(weight[band], scale[i : i + step], (rows, columns))
    return out


# ---------------------------------------------------------------------------------------------------- writing


def write_folder(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    files: Mapping[str, bytes | str] | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """Writes a model folder in the public format, whole or not at all. A model already at `path` is replaced.

    config: what `config.json` will hold, e.g. `ModelConfig.to_hf()`; the type of the numbers is added.
    tensors: under our names. dtype: what floating tensors become; the router's bias, FP8 and scales stay as they are.
    files: further files by name, e.g. `tokenizer.json`. Raises `UserError` as `durable_folder` and `to_public` do.
    """
    public = names.to_public(tensors, ModelConfig.from_hf(config))  # refuse before anything is written
    with durable.durable_folder(path) as folder:
        _write_model(folder, config, public, dtype=dtype, files=files or {}, max_shard_bytes=max_shard_bytes)


def write_model(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    files: Mapping[str, bytes | str] | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """The files of `write_folder`, into a folder that is there: for callers with their own `durable_folder` around."""
    public = names.to_public(tensors, ModelConfig.from_hf(config))
    _write_model(folder, config, public, dtype=dtype, files=files or {}, max_shard_bytes=max_shard_bytes)


def _write_model(
    folder: Path,
    config: Mapping[str, Any],
    public: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    files: Mapping[str, bytes | str],
    max_shard_bytes: int,
) -> None:
    stored = dtype or public["model.norm.weight"].dtype  # never quantised, unlike the embedding
    kind = str(stored).removeprefix("torch.")
    described = {**config, "dtype": kind, "torch_dtype": kind}  # the new spelling and the old one
    (folder / "config.json").write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    shards = list(_split(public, dtype, max_shard_bytes))
    if len(shards) == 1:
        write_tensors(folder / SINGLE, public, dtype=dtype)
        return
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, {name: public[name] for name in shard}, dtype=dtype)
        sizes = (_num_bytes(public[name], _stored(name, public[name], dtype)) for name in shard)
        index["metadata"]["total_size"] += sum(sizes)
        index["weight_map"].update(dict.fromkeys(shard, file))
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(file: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
    """One safetensors file. Tensors may be views and may share memory. Raises `OSError`, e.g. for a full disk."""
    stored = {name: _stored(name, tensor, dtype) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: -stored[name].itemsize)  # widest first, so that all begin aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        end = position + _num_bytes(tensors[name], stored[name])
        span = [position, end]
        header[name] = {"dtype": _DTYPE_NAMES[stored[name]], "shape": list(tensors[name].shape), "data_offsets": span}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers start on a multiple of eight
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor = tensors[name].detach().cpu().to(stored[name]).contiguous()
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _split(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, limit: int) -> Iterator[list[str]]:
    """Names in order, in groups of at most `limit` bytes; a larger tensor is a group of its own."""
    group: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        num_bytes = _num_bytes(tensor, _stored(name, tensor, dtype))
        if group and size + num_bytes > limit:
            yield group
            group, size = [], 0
        group.append(name)
        size += num_bytes
    yield group


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type a tensor has on the disk."""
    keeps = not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1 or name.endswith(names.KEEP_TYPE)
    return tensor.dtype if keeps or dtype is None else dtype


def _num_bytes(tensor: Tensor, dtype: torch.dtype) -> int:
    return tensor.numel() * dtype.itemsize
