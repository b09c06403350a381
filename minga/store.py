"""Opens and writes models: joins `checkpoint` (files), `model` (modules) and `data` (tokenizer), which know not each other.

A path is a model folder in the public format, a `.gguf` file, or the folder of a training run, which stands for its
newest checkpoint that is whole.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from minga.checkpoint import gguf, hf, names
from minga.checkpoint.durable import durable_folder, find_problems, recover
from minga.config import ModelConfig
from minga.data.tokenizer import Tokenizer
from minga.errors import UserError
from minga.kernels.panels import Empty
from minga.model.transformer import Transformer
from minga.quant import blocks, fp8

QUANTS = (*blocks.FORMATS, "fp8")
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
CHECKPOINT_ASIDE = re.compile(r"\.(checkpoint-\d+)\.old-\d+")  # being replaced (minga/checkpoint/durable.py)
_LOG = logging.getLogger("minga")


class _SkipInit(TorchFunctionMode):
    """Leaves tensors as they are where a module would fill them with random numbers (PyTorch's skip-init recipe)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def load(path: str | PathLike[str], *, dtype: torch.dtype = torch.float32, quant: str | None = None) -> Transformer:
    """A model in eval mode. `dtype`: of its floating weights. `quant`: "int8", "int4" or "fp8" holds them in few bits.

    A folder in block FP8 is widened to `dtype` unless `quant` is "fp8", which holds its very bytes.
    Raises `UserError` for what is no model, is damaged, or is of a family that Minga does not open.
    """
    if quant not in (None, *QUANTS):
        raise UserError(f"quant {quant!r} is not known (load). known: {', '.join(QUANTS)}")
    source, fp8_block = resolve(path), None
    if source.is_file():
        opened = gguf.open_gguf(source)
        config = ModelConfig.from_hf(gguf.config_from_gguf(opened))
        tensors = gguf.read_tensors(opened, config, dtype=dtype)
        stored = None
    else:
        config, stored = _read_config(source)
        fp8_block = hf.fp8_block(source) if quant == "fp8" and stored is None else None
        tensors = hf.read_tensors(source, config, dtype=dtype, keep_fp8=fp8_block is not None)
    model = _filled(config, stored, tensors, source, fp8_block)
    if quant is not None and stored is not None and quant != stored.name:
        raise UserError(
            f"the weights are stored in {stored.name}, not {quant} ({source}). take the float model for that"
        )
    if quant is not None and stored is None and fp8_block is None:
        quantize(model, quant)
    return model.eval()


def quantize(model: Transformer, name: str) -> Transformer:
    """Holds the weights of a model in one of `QUANTS`, in place."""
    if name == "fp8":
        fp8.quantize(model)
    else:
        blocks.quantize(model, blocks.FORMATS[name])
    return model


def load_stored(path: str | PathLike[str], *, quant: str | None = None, empty: Empty = torch.empty) -> Transformer:
    """A model to generate with, its matrices in memory as the file has them: GGUF's types, bfloat16, float16.

    quant: as for `load`, which does what is to be done where it is given. empty: gives the memory of what cannot stay in
    the file. Norms, biases and routers are float32. Raises
    `UserError` as `load` does.
    """
    source = resolve(path)
    if quant is not None:
        return load(source, quant=quant)
    if source.is_file():
        opened = gguf.open_gguf(source)
        config = ModelConfig.from_hf(gguf.config_from_gguf(opened))
        tensors, stored = gguf.read_stored(opened, config, empty=empty)
    else:
        config, rounded = _read_config(source)
        tensors, stored = hf.read_tensors(source, config, dtype=torch.float32 if rounded else None, empty=empty), {}
        if rounded is not None:
            return _filled(config, rounded, tensors, source).eval()
        for name in names.matrices(config) & tensors.keys():
            if tensors[name].dtype in (torch.bfloat16, torch.float16):
                stored[name] = blocks.Stored.keep(tensors.pop(name))
    model = _empty(config)
    left = {name: tensor.float() for name, tensor in tensors.items()}
    missing = model.load_state_dict(left, strict=False, assign=True).missing_keys
    assert set(missing) == stored.keys()
    blocks.put(model, stored)
    return model.eval()


def _filled(
    config: ModelConfig,
    rounded: blocks.Format | None,
    tensors: dict[str, torch.Tensor],
    source: Path,
    fp8_block: tuple[int, int] | None = None,
) -> Transformer:
    model = _empty(config)
    if rounded is not None:
        blocks.quantize(model, rounded)
    if fp8_block is not None:
        fp8.expect(model, tensors, fp8_block)
    _check_format(model, tensors, source)
    model.load_state_dict(tensors, assign=True)
    return model


def read_config(path: str | PathLike[str]) -> ModelConfig:
    """A model's config, its weights unread. Raises `UserError` as `load` does."""
    source = resolve(path)
    if source.is_file():
        return ModelConfig.from_hf(gguf.config_from_gguf(gguf.open_gguf(source)))
    return _read_config(source)[0]


def weight_files(path: str | PathLike[str]) -> list[Path]:
    """The files that hold a model's weights."""
    source = resolve(path)
    return [source] if source.is_file() else sorted(source.glob("*.safetensors"))


def _empty(config: ModelConfig) -> Transformer:
    """Without memory, and without time for weights that are about to be replaced."""
    with torch.device("meta"), _SkipInit():
        return Transformer(config)


def _check_format(model: Transformer, tensors: Mapping[str, torch.Tensor], source: Path) -> None:
    """Refuses weights in few bits that config.json does not promise, and floats where it does. Shapes of weights fit."""
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name in expected and name in tensors and expected[name].shape == tensors[name].shape:
            asked, given = expected[name].dtype, tensors[name].dtype
            if asked == given or (asked.is_floating_point and given.is_floating_point):
                continue
        raise UserError(
            f"{name} is not stored as quantization_config says ({source}). copy the model's own config.json there"
        )


def save(model: Transformer, path: str | PathLike[str], *, tokenizer: Tokenizer | None = None) -> None:
    """Writes a model folder in the public format, MTP and router bias included; whole or not at all."""
    with durable_folder(path) as folder:
        write_into(folder, model, tokenizer)


def write_into(folder: Path, model: Transformer, tokenizer: Tokenizer | None) -> None:
    """The files of `save`, into a folder that the caller makes durable."""
    config = model.config.to_hf()
    rounded = next((f for f in blocks.formats_of(model) if f.name in QUANTS), None)
    if rounded is not None:
        config["quantization_config"] = rounded.describe()
    ends = list(model.config.eos_token_ids)
    generation = {
        "bos_token_id": model.config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
    files = {"generation_config.json": json.dumps(generation, indent=2) + "\n"}
    dtype = torch.bfloat16 if isinstance(rounded, fp8.BlockFP8) else None  # whatever they are held in here
    hf.write_model(folder, config, model.state_dict(), dtype=dtype, files=files)
    if tokenizer is not None:
        tokenizer.save(folder, max_length=model.config.max_position_embeddings)


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """The tokenizer of a model. Raises `UserError` if its vocabulary is larger than the model's."""
    source = resolve(path)
    if source.is_file():
        opened = gguf.open_gguf(source)
        config = ModelConfig.from_hf(gguf.config_from_gguf(opened))
        tokenizer = Tokenizer.from_gguf_metadata(opened.metadata)
    else:
        config, _ = _read_config(source)
        tokenizer = Tokenizer.from_folder(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size} ({source}). "
            "they do not belong together: copy the model's own tokenizer files into the folder"
        )
    return tokenizer


def resolve(path: str | PathLike[str]) -> Path:
    """The model folder or `.gguf` file that a path stands for."""
    try:
        return _resolve(Path(path))
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero character, which no path may have
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot be opened: {reason} ({path}). check the path and its permissions") from error


def _resolve(source: Path) -> Path:
    if not source.exists() and source.parent.is_dir():
        recover(source)  # a save that replaced this folder may have been killed between its two renames
    if source.is_file():
        if source.suffix != ".gguf":
            raise UserError(f"a model is a folder or a .gguf file, and this is neither ({source}). give its folder")
        return source
    if not source.is_dir():
        raise UserError(f"there is nothing at this path ({source}). check the spelling")
    if (source / "config.json").is_file():
        return source
    checkpoint = latest_checkpoint(source)
    if checkpoint is not None:
        return checkpoint
    files = sorted(source.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    raise UserError(
        f"this folder holds neither a config.json nor a training checkpoint ({source}). give a model's folder"
    )


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run that is whole, None if there is none. Damaged ones are passed over, and a warning
    of the logger "minga" (a line on stderr, unless configured otherwise) says so.
    """
    damaged: list[str] = []
    for aside in [match[1] for child in run.iterdir() if (match := CHECKPOINT_ASIDE.fullmatch(child.name))]:
        recover(run / aside)  # a kill between the two renames of a replacement has left nothing under its own name
    for number in sorted(checkpoint_steps(run), reverse=True):
        folder = run / f"checkpoint-{number:06d}"
        recover(folder)
        problems = find_problems(folder)
        if not problems:
            for line in damaged:
                _LOG.warning("%s. using %s", line, folder)
            return folder
        damaged.append(f"damaged checkpoint passed over: {problems[0]} ({folder})")
    return None


def checkpoint_steps(run: Path) -> list[int]:
    """Steps for which a run has a checkpoint folder, in any state."""
    matches = (CHECKPOINT_NAME.fullmatch(child.name) for child in run.iterdir() if child.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def _read_config(folder: Path) -> tuple[ModelConfig, blocks.Format | None]:
    """The config with as many MTP modules as there are tensors for, and the format of weights stored in few bits.

    transformers drops MTP tensors on save and leaves the promise in config.json; we believe the tensors.
    """
    raw = hf.read_config(folder)
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int) and not isinstance(layers, bool) and raw.get("num_nextn_predict_layers"):
        raw["num_nextn_predict_layers"] = names.count_mtp(hf.tensor_names(folder), layers)
    quantization = raw.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise UserError(
            f"quantization_config is {quantization!r} ({folder / 'config.json'}). it must be an object or null"
        )
    method = quantization.get("quant_method")
    stored = next((known for known in blocks.FORMATS.values() if known.method == method), None)
    if method not in (None, "fp8") and stored is None:
        raise UserError(f"quantisation {method!r} is not supported ({folder}). use the unquantised or the FP8 weights")
    return ModelConfig.from_hf(raw), stored
