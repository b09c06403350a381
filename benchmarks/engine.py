"""The engine beside llama.cpp and transformers: the same random weights, alternating in one process, medians of ratios.

    minga bench engine [--quick] [--only decode/b] [--threads 2] [--model runs/demo] [--data shards]

  decode/MODEL/FORMAT/CONTEXT/threadsN   tokens/s of one sequence behind a prompt of so many tokens; llama.cpp has Q8_0, Q4_0
  decode/smollm2/int8/ctx0/threads2      the same of a GGUF file, in the types it has, which the note names (--smollm2)
  prefill/b/int8/512/threadsN            tokens/s of reading 512 tokens
  roofline/b/int8                        weights read a second, of what a plain reader of memory reaches
  decode-vs-transformers/b               transformers' DeepseekV3 in float32, experts by grouped_mm
  throughput/b/32                        32 requests of 256 + 128 tokens; transformers answers one after the other
  throughput-vs-llamacpp-server/b/32     the same in llama.cpp as its server does it, 32 sequences a batch; no HTTP on either side
  speculate/demo/batch1                  guesses against none, greedy, same text (--model)
  speculate/dense/batch1                 the same of a model without experts (--dense)
  memory/b/FORMAT                        weights in memory, of float32; what the process holds besides is in the note
  bits-per-byte/FORMAT                   rise of held-out bits a byte over float32 (--model and --data); cache-int8: floats
                                         whose attention cache alone is in int8
  start/first-token/b                    seconds from the command to its first token, all imports included

Models: a (29 M parameters), b (394 M, 98 M of them a token), 1b (1.1 B). Our side goes through the whole engine: scheduler,
sampler and text; llama.cpp's is the bare call. Peers come from the extra `bench`; a row whose peer is missing fails alone.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
from common import Failed, Row, measure, row, say

from minga.config import ModelConfig, presets
from minga.data.tokenizer import DecodeStream
from minga.planner.counts import speculation_limit

LLAMA, TRANSFORMERS = "llama.cpp", "transformers grouped_mm"
KINDS = {"int8": "Q8_0", "int4": "Q4_0"}
SMOLLM2 = "decode/smollm2/int8/ctx0/threads2"
PAUSE = 0.2  # seconds between two sides: each leaves its threads spinning for a while
PROMPTS = ["ROMEO:\n", "KING HENRY V\t", "\n", "Enter HAMLET and HORATIO\n"]


def model_config(name: str) -> ModelConfig:
    if name == "1b":
        return presets.small().replace(
            hidden_size=1024, intermediate_size=2816, num_hidden_layers=20, num_attention_heads=16,
            num_key_value_heads=16, n_routed_experts=32, moe_intermediate_size=512, num_nextn_predict_layers=0,
        )  # fmt: skip
    from train import SPEED_MODELS

    return SPEED_MODELS[name]().replace(num_nextn_predict_layers=0)


# ---------------------------------------------------------------------------------------------- measurements


class _Silent(DecodeStream):
    """Decodes tokens that are of no tokenizer."""

    def __init__(self) -> None:
        pass

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def _floats(name: str) -> Any:
    import torch

    from minga.model.transformer import Transformer

    return Transformer(model_config(name)).init_weights(torch.Generator().manual_seed(0)).eval()


def _compiled(model: Any, format: str) -> Any:
    from minga.engine.compiled import compile_model
    from minga.quant import blocks

    blocks.quantize(model, blocks.FORMATS[format])
    return compile_model(model, say)


def _answer(model: Any, prompts: list[list[int]], tokens: int) -> Any:
    """Runs prompts side by side through the engine; its statistics."""
    from minga.engine.runner import Runner
    from minga.engine.sampler import SamplingParams
    from minga.engine.scheduler import Entry
    from minga.engine.sequence import Sequence
    from minga.model.cache import PAGE, Pages

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    sequences = [
        Sequence(ids, params, stop_ids=frozenset(), max_length=len(ids) + tokens, decoder=_Silent()) for ids in prompts
    ]
    num_pages = sum((len(ids) + tokens) // PAGE + 1 for ids in prompts)
    runner = Runner(model, Pages(model.config, num_pages, dtype=model.cache_dtype))
    for sequence in sequences:
        runner.scheduler.add(Entry(sequence))
    while runner.scheduler.busy:
        runner.step()
    return runner.stats


def _prompt(config: ModelConfig, length: int, seed: int = 0) -> list[int]:
    import random

    return random.Random(seed).choices(range(config.vocab_size), k=length)


def _peer(model: Any, kind: str, *, threads: int, context: int, sequences: int = 1) -> Any:
    import peers

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        peers.write_gguf(model, file, kind)
        return peers.Llama(file, threads=threads, context=context, sequences=sequences)


def measure_decode(model: str, format: str, context: int, rounds: int, tokens: int) -> dict[str, list[float]]:
    """Tokens per second, a number a round: ours, theirs."""
    import torch

    config, threads = model_config(model), torch.get_num_threads()
    floats = _floats(model)
    peer = _peer(floats, KINDS[format], threads=threads, context=context + tokens + 16)
    ours = _compiled(floats, format)
    return _alternate(ours, peer, _prompt(config, max(1, context)), rounds, tokens)


def measure_file(path: str, rounds: int, tokens: int) -> dict[str, Any]:
    """The same of a GGUF file behind one token, both sides from the file's own bits; and the types of its matrices."""
    import peers
    import torch

    from minga import store
    from minga.engine.compiled import compile_model
    from minga.quant.blocks import formats_of

    model = store.load_stored(path)
    peer = peers.Llama(Path(path), threads=torch.get_num_threads(), context=tokens + 16)
    found: dict[str, Any] = _alternate(compile_model(model, say), peer, [1], rounds, tokens)
    return found | {"kinds": sorted(format.name for format in formats_of(model))}


def _alternate(ours: Any, peer: Any, prompt: list[int], rounds: int, tokens: int) -> dict[str, list[float]]:
    peer.prefill(prompt)
    result: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(rounds + 1):
        time.sleep(PAUSE)
        mine = _answer(ours, [prompt], tokens + 1).tokens_per_second
        time.sleep(PAUSE)
        peer.forget(len(prompt))
        began = time.perf_counter()
        for index in range(tokens):
            peer.decode(prompt[index % len(prompt)], len(prompt) + index)
        if turn:  # the first one warms up
            result["ours"].append(mine)
            result["theirs"].append(tokens / (time.perf_counter() - began))
    return result


def measure_prefill(model: str, format: str, length: int, rounds: int) -> dict[str, list[float]]:
    import torch

    config = model_config(model)
    floats = _floats(model)
    peer = _peer(floats, KINDS[format], threads=torch.get_num_threads(), context=length)
    ours, prompt = _compiled(floats, format), _prompt(config, length)
    result: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(rounds + 1):
        time.sleep(PAUSE)
        mine = length / _answer(ours, [prompt], 1).prefill_seconds
        time.sleep(PAUSE)
        peer.forget(0)
        began = time.perf_counter()
        peer.prefill(prompt)
        if turn:
            result["ours"].append(mine)
            result["theirs"].append(length / (time.perf_counter() - began))
    return result


def measure_throughput(model: str, format: str, requests: int, prompt: int, tokens: int) -> dict[str, float]:
    """Answered tokens per second, reading the prompts included: ours, and llama.cpp with as many sequences."""
    import torch

    config = model_config(model)
    floats = _floats(model)
    context = prompt + tokens
    peer = _peer(floats, KINDS[format], threads=torch.get_num_threads(), context=context, sequences=requests)
    ours, prompts = _compiled(floats, format), [_prompt(config, prompt, seed) for seed in range(requests)]
    _answer(ours, [ids[:8] for ids in prompts[:2]], 2)
    began = time.perf_counter()
    _answer(ours, prompts, tokens)
    mine = requests * tokens / (time.perf_counter() - began)
    time.sleep(PAUSE)
    began = time.perf_counter()
    for sequence, ids in enumerate(prompts):
        peer.prefill(ids, sequence)
    everyone = list(range(requests))
    for index in range(tokens - 1):
        peer.read([prompts[s][index] for s in everyone], [prompt + index] * requests, everyone, [True] * requests)
    return {"ours": mine, "theirs": requests * tokens / (time.perf_counter() - began)}


def _theirs(name: str) -> Any:
    """The model in transformers, with its best path for experts."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = model_config(name).to_hf()
    settings = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM._from_config(
        DeepseekV3Config(**settings), attn_implementation="sdpa", experts_implementation="grouped_mm"
    ).eval()


def measure_transformers(model: str, context: int, tokens: int, rounds: int) -> list[float]:
    """Tokens per second of transformers' decoding, a number a round."""
    import torch

    config, theirs = model_config(model), _theirs(model)
    speeds = []
    with torch.inference_mode():
        for _ in range(rounds):
            out = theirs(torch.tensor([_prompt(config, max(1, context))]), use_cache=True, logits_to_keep=1)
            ids, began = out.logits.argmax(-1), time.perf_counter()
            for _ in range(tokens):
                out = theirs(ids, past_key_values=out.past_key_values, use_cache=True)
                ids = out.logits.argmax(-1)
            speeds.append(tokens / (time.perf_counter() - began))
    return speeds


def measure_one_by_one(model: str, prompt: int, tokens: int) -> float:
    """Answered tokens per second of transformers' `generate` for one request."""
    import torch

    config, theirs = model_config(model), _theirs(model)
    ids_1T = torch.tensor([_prompt(config, prompt)])
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
    theirs.generate(ids_1T[:, :8], do_sample=False, max_new_tokens=2)
    began = time.perf_counter()
    theirs.generate(ids_1T, **options)
    return tokens / (time.perf_counter() - began)


def measure_bandwidth() -> float:
    """Bytes per second of summing 2 GB, the best of five."""
    import torch

    numbers, best = torch.ones(2**28, dtype=torch.float64), 0.0
    for _ in range(5):
        began = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - began))
    return best


def measure_roofline(model: str, format: str, tokens: int, rounds: int) -> dict[str, float]:
    """Tokens per second at context 0, and the bytes of weights that a token reads."""
    floats = _floats(model)
    config = floats.config
    ours = _compiled(floats, format)
    _answer(ours, [_prompt(config, 1)], 8)
    speeds = []
    for _ in range(rounds):
        time.sleep(PAUSE)
        speeds.append(_answer(ours, [_prompt(config, 1)], tokens).tokens_per_second)
    return {"tokens_per_second": statistics.median(speeds), "bytes_a_token": _bytes_a_token(floats)}


def _bytes_a_token(model: Any) -> int:
    """All weights but the embedding, and of the routed experts those that are chosen."""
    c, total = model.config, 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "embed_tokens" in name and not c.tie_word_embeddings:
            continue
        total += tensor.nbytes * c.num_experts_per_tok // c.n_routed_experts if ".experts." in name else tensor.nbytes
    return total


def measure_memory(model: str, format: str) -> dict[str, int]:
    """Bytes of the weights in float32 and as they are kept, and of the process after a token, its imports taken off."""
    import torch

    from minga import store
    from minga.engine.compiled import compile_model
    from minga.quant import blocks

    with tempfile.TemporaryDirectory() as folder:
        command = f"import engine; engine.save({model!r}, {format!r}, {folder!r})"
        subprocess.run([sys.executable, "-c", command], cwd=Path(__file__).parent, check=True)
        torch.ones(8, 8) @ torch.ones(8, 8)
        before = _resident()
        opened = store.load(folder)
        compiled = compile_model(opened, say)
        _answer(compiled, [[1, 2, 3]], 4)
        kept = sum(tensor.nbytes for tensor in [*opened.parameters(), *opened.buffers()])
        assert blocks.format_of(opened) is blocks.FORMATS[format]
        numbers = sum(tensor.numel() for tensor in _floats(model).parameters())
        return {"float32": 4 * numbers, "kept": kept, "resident": _resident() - before}


def save(model: str, format: str, folder: str) -> None:
    """A model of random weights as a folder."""
    from minga import store
    from minga.quant import blocks

    floats = _floats(model)
    blocks.quantize(floats, blocks.FORMATS[format])
    store.save(floats, folder)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure_bits(path: str, data: str, format: str | None, cached: str | None, max_tokens: int) -> float:
    """Held-out bits a byte through the engine's own forward pass."""
    import math

    import torch

    from minga import store
    from minga.data.loader import evaluation_batches
    from minga.data.shards import open_shards
    from minga.engine.compiled import compile_model
    from minga.engine.plain import Tokens
    from minga.model.cache import Cache
    from minga.train.losses import cross_entropy

    model = compile_model(store.load(path, quant=format), say)
    nats, num_bytes = 0.0, 0
    with torch.inference_mode():
        for batch in evaluation_batches(open_shards(data), batch_size=8, seq_len=256, max_tokens=max_tokens):
            cache = Cache.of(model.config, *batch.ids_BT.shape, dtype=getattr(torch, cached or "", model.cache_dtype))
            tokens = Tokens.of([(ids, 0, row) for row, ids in enumerate(batch.ids_BT.tolist())])
            logits = model.head(model.hidden(tokens, cache)).unflatten(0, batch.ids_BT.shape)
            nats += float(cross_entropy(logits, batch.targets_KBT[0], reduction="sum").double())
            num_bytes += batch.num_bytes or 0
    return nats / math.log(2) / num_bytes


def measure_speculation(path: str, quant: str | None, rounds: int, tokens: int) -> dict[str, Any]:
    """Tokens per second without drafts, with them, and where they may not be given up; a figure for each prompt and round."""
    import minga

    params = minga.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    kinds: dict[str, Any] = {"plain": False, "ahead": True, "always": "always"}
    llms = {name: minga.LLM(path, quant=quant, speculate=speculate) for name, speculate in kinds.items()}
    result: dict[str, Any] = {**{name: [] for name in llms}, "acceptance": []}
    for turn in range(rounds + 1):
        for prompt in PROMPTS:
            texts = []
            for name, llm in llms.items():
                texts.append(llm.generate(prompt, params)[0].token_ids)
                if turn:  # the first turn warms up
                    result[name].append(llm.stats.tokens_per_second)
            if any(text != texts[0] for text in texts):
                raise Failed(f"speculation changed the text of {prompt!r}")
            if turn:
                result["acceptance"].append(llms["always"].stats.acceptance or 0.0)
    result["limit"] = speculation_limit(llms["plain"].config, statistics.median(result["acceptance"]))
    return result


def measure_first_token(model: str) -> float:
    """Seconds from starting `python` to the first token, of a saved int8 model."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(__file__).parent
        subprocess.run(
            [sys.executable, "-c", f"import engine; engine.save({model!r}, 'int8', {folder!r})"], cwd=here, check=True
        )
        code = (
            "import torch; from minga import store; from minga.engine.compiled import compile_model; import engine; "
            f"engine._answer(compile_model(store.load_stored({folder!r})), [[1, 2, 3]], 1)"
        )
        times = []
        for _ in range(3):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=here, check=True)
            times.append(time.perf_counter() - began)
    return statistics.median(times)


# ---------------------------------------------------------------------------------------------- rows


class Bench:
    def __init__(
        self,
        *,
        threads: int,
        quick: bool,
        only: str,
        model: str | None,
        data: str | None,
        smollm2: str | None,
        dense: str | None,
    ):
        self.threads, self.quick, self.only, self.model, self.data = threads, quick, only, model, data
        self.smollm2, self.dense = smollm2, dense
        self.rounds = 3 if quick else 7

    def measure(self, name: str, *, threads: int | None = None, **arguments: Any) -> Any:
        return measure(__file__, name, threads=threads or self.threads, **arguments)

    def all(self) -> Iterator[tuple[str, Callable[[str], Row]]]:
        """Every row: its id, and what measures it."""
        models = ["a", "b"] if self.quick else ["a", "b", "1b"]
        for model in models:
            for format in KINDS:
                for context in (0, 4096):
                    for threads in (1, 2):
                        arguments: dict[str, Any] = {"model": model, "format": format, "context": context}
                        yield (
                            f"decode/{model}/{format}/ctx{context}/threads{threads}",
                            lambda id, a=arguments, t=threads: self.decode(id, t, **a),
                        )
        if self.smollm2 is not None:
            yield SMOLLM2, self.file
        yield f"prefill/b/int8/512/threads{self.threads}", self.prefill
        yield "roofline/b/int8", self.roofline
        yield "decode-vs-transformers/b", self.transformers
        yield "throughput/b/32", lambda id: self.throughput(id, one_by_one=True)
        yield "throughput-vs-llamacpp-server/b/32", lambda id: self.throughput(id, one_by_one=False)
        yield "speculate/demo/batch1", self.speculation
        if self.dense is not None:
            yield "speculate/dense/batch1", self.speculation
        for format in KINDS:
            yield f"memory/b/{format}", lambda id, f=format: self.memory(id, f)
        for format in (*KINDS, "cache-int8"):
            yield f"bits-per-byte/{format}", lambda id, f=format: self.bits(id, f)
        yield "start/first-token/b", self.first_token

    # ------------------------------------------------------------------------------------------ one kind each

    def _pairs(self, id: str, found: dict[str, list[float]], peer: str, **more: Any) -> Row:
        ratios = [a / b for a, b in zip(found["ours"], found["theirs"], strict=True)]
        ours, theirs = (statistics.median(found[side]) for side in ("ours", "theirs"))
        return row(id, ours, theirs, unit="tokens/s", peer=peer, ratios=ratios, **more)

    def decode(self, id: str, threads: int, *, model: str, format: str, context: int) -> Row:
        tokens = 32 if context else 64
        found = self.measure(
            "decode", threads=threads, model=model, format=format, context=context, rounds=self.rounds, tokens=tokens
        )
        return self._pairs(id, found, f"{LLAMA} {KINDS[format]}")

    def file(self, id: str) -> Row:
        found = self.measure("file", threads=2, path=self.smollm2, rounds=self.rounds, tokens=96)
        kinds = " and ".join(found["kinds"])
        return self._pairs(id, found, LLAMA, note=f"{Path(self.smollm2 or '').name}: {kinds}, as in the file")

    def prefill(self, id: str) -> Row:
        found = self.measure("prefill", model="b", format="int8", length=512, rounds=self.rounds)
        return self._pairs(id, found, f"{LLAMA} Q8_0")

    def roofline(self, id: str) -> Row:
        found = self.measure("roofline", model="b", format="int8", tokens=64, rounds=self.rounds)
        bandwidth = self.measure("bandwidth")
        reads = found["tokens_per_second"] * found["bytes_a_token"]
        note = f"{found['bytes_a_token'] / 1e6:.0f} MB a token, {bandwidth / 1e9:.1f} GB/s of a plain reader"
        return row(id, reads / bandwidth, unit="of the memory's bandwidth", note=note)

    def transformers(self, id: str) -> Row:
        ours = [
            self.measure("roofline", model="b", format="int8", tokens=64, rounds=1)["tokens_per_second"]
            for _ in range(3)
        ]
        theirs = self.measure("transformers", model="b", context=0, tokens=16, rounds=3)
        return self._pairs(id, {"ours": ours, "theirs": theirs}, TRANSFORMERS, note="int8 against float32")

    def throughput(self, id: str, *, one_by_one: bool) -> Row:
        arguments: dict[str, Any] = {"model": "b", "prompt": 256, "tokens": 32 if self.quick else 128}
        found = self.measure("throughput", format="int8", requests=32, **arguments)
        note = f"32 requests of 256 + {arguments['tokens']} tokens"
        if one_by_one:
            theirs, peer = self.measure("one_by_one", **arguments), "transformers, one by one"
        else:
            theirs, peer = found["theirs"], f"{LLAMA} Q8_0, 32 sequences a batch"
        return row(id, found["ours"], theirs, unit="tokens/s", peer=peer, ratio=found["ours"] / theirs, note=note)

    def speculation(self, id: str) -> Row:
        path = self.dense if "dense" in id else self.model
        if path is None:
            raise Failed("it needs a trained model with MTP. run `make demo` once, or give --model (--dense)")
        found = self.measure("speculation", path=path, quant="int8", rounds=self.rounds, tokens=64)
        pair = {"ours": found["ahead"], "theirs": found["plain"]}
        forced = statistics.median(a / b for a, b in zip(found["always"], found["plain"], strict=True))
        acceptance = statistics.median(found["acceptance"])
        note = (
            f"one guess always: {forced:.2f}x, {acceptance:.0%} accepted, of which bytes allow "
            f"{found['limit']:.2f}x; same text"
        )
        return self._pairs(id, pair, "minga without speculation", note=note)

    def memory(self, id: str, format: str) -> Row:
        found = self.measure("memory", model="b", format=format)
        note = f"the process holds {found['resident'] / found['kept']:.2f} times its weights, imports not counted"
        return row(id, found["kept"] / found["float32"], unit="of float32", note=note)

    def bits(self, id: str, format: str) -> Row:
        if self.model is None or self.data is None:
            raise Failed("it needs a trained model and shards of its language. give --model and --data")
        arguments: dict[str, Any] = {"path": self.model, "data": self.data, "max_tokens": 50_000}
        exact = self.measure("bits", format=None, cached=None, **arguments)
        stored = {"format": None, "cached": "int8"} if format == "cache-int8" else {"format": format, "cached": None}
        rounded = self.measure("bits", **stored, **arguments)
        return row(id, rounded / exact - 1, unit="of float32's", note=f"{rounded:.4f} against {exact:.4f} bits a byte")

    def first_token(self, id: str) -> Row:
        return row(id, self.measure("first_token", model="b"), unit="seconds", note="median of three starts")


def main() -> int:
    if common.answer(globals(), sys.argv[1:]):
        return 0
    parser = common.parser(__doc__)
    parser.add_argument("--data", help="shards that `minga data` wrote, in the model's tokens")
    parser.add_argument("--dense", metavar="RUN", help="a trained model without experts, with MTP")
    parser.add_argument("--smollm2", metavar="FILE", help="a GGUF file of SmolLM2-135M, such as `make demo` leaves")
    parser.add_argument("model", nargs="?", help="a trained model or run folder, such as the one of `make demo`")
    args = parser.parse_args()
    bench = Bench(
        threads=args.threads,
        quick=args.quick,
        only=args.only,
        model=args.model,
        data=args.data,
        smollm2=args.smollm2,
        dense=args.dense,
    )
    if args.smollm2 is None and SMOLLM2.startswith(args.only):
        say(f"{SMOLLM2} is left out: give its file with --smollm2")
    return common.measure_rows("engine", dict(bench.all()), parser, args)


if __name__ == "__main__":
    sys.exit(main())
