"""Minga's number formats beside llama.cpp's, on one trained model: how far the rounded model is from the float one, at what size.

    minga bench quant --model runs/demo --data shards [--quick] [--only kl/int4]

  kl/OURS/THEIRS                mean KL(float || rounded) of the next token's distribution, nats a token
  top1/OURS/THEIRS              share of positions where the likeliest token stays the same
  bits-per-byte/OURS/THEIRS     rise of held-out bits a byte over float32
  bits-per-weight/OURS/THEIRS   of all tensors of the file

Ours: int8, int4, int4-gptq (calibrated on the shards' training split) and fp8 (DeepSeek-V3's blocks, the rest in bfloat16).
Theirs: llama.cpp rounds the same weights, from a file in F32, to one type for every matrix but the router ("pure"), and
Minga's reader widens them. A matrix whose rows do not fit the type gets llama.cpp's substitute; the note says how many of the
weights did. Both sides are computed in float32, on the held-out split, without MTP: what differs is the rounding alone.
llama.cpp comes from the extra `bench`. Models without MLA, of which no such file is written here, have no rows.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
from common import Failed, Row, measure, row, say

from minga.errors import UserError

PAIRS = {
    "int8": ("Q8_0", "Q6_K"),
    "fp8": ("Q8_0", "Q6_K"),
    "int4": ("Q4_0", "Q4_1", "Q4_K"),
    "int4-gptq": ("Q4_0", "Q4_1", "Q4_K"),
}
UNITS = {"kl": "nats a token", "top1": "of positions", "bits-per-byte": "of float32's", "bits-per-weight": "bits"}


# ---------------------------------------------------------------------------------------------- measurements


def measure_ours(path: str, data: str, format: str, max_tokens: int | None, calibration: int) -> dict[str, Any]:
    """One of our formats against the float model."""
    from minga import store

    model = _float_model(path)
    if format == "int4-gptq":
        from minga.recipes.quantize import calibrate_int4, calibration_batches

        calibrate_int4(model, calibration_batches(_shards(path, data), model, calibration))
    else:
        store.quantize(model, format)
    with tempfile.TemporaryDirectory() as folder:
        store.save(model, folder)
        sizes = [_tensor_bytes(file) for file in store.weight_files(folder)]
    return {"bits-per-weight": 8 * sum(sizes) / _num_weights(path), **_compare(path, model, data, max_tokens)}


def measure_theirs(path: str, data: str, kind: str, max_tokens: int | None) -> dict[str, Any]:
    """One of llama.cpp's types against the float model. `substituted`: weights that another type holds, by its name."""
    import peers
    import torch

    from minga.checkpoint.gguf import open_gguf, read_tensors

    model = _float_model(path)
    if not model.config.is_mla:
        raise UserError(f"the model has no MLA, so llama.cpp's side cannot be written ({path}). give another model")
    with tempfile.TemporaryDirectory() as folder:
        floats, file = Path(folder) / "floats.gguf", Path(folder) / "model.gguf"
        peers.write_gguf(model, floats, "F32")
        name = {"Q4_K": "Q4_K_S"}.get(kind, kind)  # of the mixture, which is then not mixed
        peers.quantize_gguf(floats, file, name, threads=torch.get_num_threads())
        opened, types = open_gguf(file), Counter[str]()
        for info in opened.tensors.values():
            types[info.kind.name] += math.prod(info.shape)
        size = sum(opened.raw(name).nbytes for name in opened.tensors)
        model.load_state_dict(read_tensors(opened, model.config))
        found = _compare(path, model, data, max_tokens)
    substituted = {name: number for name, number in types.items() if name not in (kind, "F32")}
    return {
        "bits-per-weight": 8 * size / _num_weights(path),
        "weights": sum(types.values()),
        "substituted": substituted,
        **found,
    }


def _float_model(path: str) -> Any:
    """Without MTP modules, which llama.cpp's file would not hold."""
    from torch import nn

    from minga import store
    from minga.quant.blocks import format_of

    model = store.load(path)
    if format_of(model) is not None:
        raise UserError(f"the model is in few bits already ({path}). give the float model")
    model.config, model.mtp = model.config.replace(num_nextn_predict_layers=0), nn.ModuleList()
    return model


def _shards(path: str, data: str) -> Any:
    from minga import store
    from minga.recipes.evaluate import matching_shards

    return matching_shards(data, store.load_tokenizer(path))


def _num_weights(path: str) -> int:
    return sum(tensor.numel() for tensor in _float_model(path).state_dict().values())


def _tensor_bytes(file: Path) -> int:
    """Of a safetensors file without its header."""
    with file.open("rb") as stream:
        return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def _compare(path: str, model: Any, data: str, max_tokens: int | None) -> dict[str, float]:
    from minga.data.loader import evaluation_batches
    from minga.recipes.evaluate import compare

    seq_len = min(256, model.config.max_position_embeddings)
    batches = evaluation_batches(_shards(path, data), batch_size=8, seq_len=seq_len, max_tokens=max_tokens)
    found = compare(_float_model(path), model, batches)
    rise = found.bits_per_byte / found.bits_per_byte_reference - 1
    return {"kl": found.kl, "top1": found.top1, "bits-per-byte": rise, "tokens": found.tokens}


# ---------------------------------------------------------------------------------------------- rows


class Bench:
    def __init__(self, *, threads: int, quick: bool, model: str | None, data: str | None):
        self.threads, self.model, self.data = threads, model, data
        self.max_tokens, self.calibration = (20_000, 8192) if quick else (None, 32_768)
        self._found: dict[str, dict[str, Any] | Failed] = {}

    def all(self) -> Iterator[tuple[str, Callable[[str], Row]]]:
        """Every row: its id, and what measures it."""
        for metric in UNITS:
            for ours, kinds in PAIRS.items():
                for kind in kinds:
                    pair = (metric, ours, kind)
                    yield f"{metric}/{ours}/{kind.lower()}", lambda id, pair=pair: self.row(id, *pair)

    def row(self, id: str, metric: str, ours: str, kind: str) -> Row:
        mine = self.measured("ours", format=ours, calibration=self.calibration)
        theirs = self.measured("theirs", kind=kind)
        notes = [f"{mine['tokens']:,} tokens"]
        notes += [f"{n / theirs['weights']:.0%} of the weights in {name}" for name, n in theirs["substituted"].items()]
        a, b = mine[metric], theirs[metric]
        ratio = a / b if metric in ("kl", "bits-per-weight") else None
        return row(id, a, b, unit=UNITS[metric], peer=f"llama.cpp {kind}", ratio=ratio, note=", ".join(notes))

    def measured(self, side: str, **arguments: Any) -> dict[str, Any]:
        """Once for all rows that need it."""
        if self.model is None or self.data is None:
            raise Failed("it needs a trained model and shards of its language. give --model and --data")
        key = f"{side} {arguments}"
        if key not in self._found:
            say(f"  {' '.join(map(str, arguments.values()))}")
            settings = {"path": self.model, "data": self.data, "max_tokens": self.max_tokens}
            try:
                self._found[key] = measure(__file__, side, threads=self.threads, **settings, **arguments)
            except Failed as error:
                self._found[key] = error
        found = self._found[key]
        if isinstance(found, Failed):
            raise found
        return found


def main() -> int:
    if common.answer(globals(), sys.argv[1:]):
        return 0
    parser = common.parser(__doc__)
    parser.add_argument("--data", help="shards that `minga data` wrote, in the model's tokens")
    parser.add_argument("model", nargs="?", help="a trained float model or run folder, such as the one of `make demo`")
    args = parser.parse_args()
    bench = Bench(threads=args.threads, quick=args.quick, model=args.model, data=args.data)
    return common.measure_rows("quant", dict(bench.all()), parser, args)


if __name__ == "__main__":
    sys.exit(main())
